"""There and back: every tensor bit-equal, and the reference libraries load what is written."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.conversion.conftest import BF16, edit_json, read_tensors, same_bits
from wemmu_jax.conversion import export
from wemmu_jax.conversion.convert import convert
from wemmu_jax.conversion.export import export_backbones
from wemmu_jax.conversion.safetensors_io import read_header, save_tensors
from wemmu_jax.conversion.weights import Weights

PREFIXES = ("vlm", "dit", "dc_ae")
FOLDERS = {"vlm": "vlm", "dit": "sana/transformer", "dc_ae": "sana/vae"}


@pytest.mark.parametrize("limit", [5_000_000_000, 30_000])
def test_there_and_back(models, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(export, "_FILE_BYTES", limit)
    converted = convert(str(models.vlm), str(models.sana), str(tmp_path / "checkpoint"))
    report = export_backbones(tmp_path / "checkpoint", tmp_path / "out")
    assert (report.tensors, report.bytes) == (converted.tensors, converted.bytes)
    for prefix in PREFIXES:
        original, back = models.folder(prefix), tmp_path / "out" / FOLDERS[prefix]
        expected, found = read_tensors(original), read_tensors(back)
        assert found.keys() == expected.keys()
        assert [n for n in expected if not same_bits(found[n], expected[n])] == []
        assert (back / "config.json").read_bytes() == (original / "config.json").read_bytes()
        sharded = list(back.glob("*.index.json"))
        assert bool(sharded) == (limit == 30_000)
    assert (tmp_path / "out/vlm/README.txt").read_text() == "ü\n"
    assert (tmp_path / "out/sana/model_index.json").exists()
    assert (tmp_path / "out/sana/scheduler/scheduler_config.json").exists()
    load_in_reference_libraries(tmp_path / "out", models)


def load_in_reference_libraries(out, models):
    classes = {
        "vlm": Qwen2_5_VLForConditionalGeneration,
        "dit": SanaTransformer2DModel,
        "dc_ae": AutoencoderDC,
    }
    for prefix, model_class in classes.items():
        folder = out / FOLDERS[prefix]
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        original = model_class.from_pretrained(models.folder(prefix)).state_dict()
        assert all((model.state_dict()[name] == original[name]).all() for name in original)


def test_trained_leaves_take_the_place_of_the_backbones(tied, checkpoint, tmp_path):
    weights = Weights.open(checkpoint)
    stack = "dit/blocks/self_attention/q_proj/kernel"
    trained = {
        stack: jnp.asarray(weights.map(stack), jnp.float32) + 1,
        "dit/patch_embed/bias": np.arange(16, dtype=np.float32),
    }
    export_backbones(checkpoint, tmp_path / "out", trained)
    found = read_tensors(tmp_path / "out" / "sana" / "transformer")
    expected = read_tensors(tied.folder("dit"))
    for i in range(3):
        name = f"transformer_blocks.{i}.attn1.to_q.weight"
        assert same_bits(found.pop(name), expected.pop(name).astype(np.float32) + 1)
    assert same_bits(found.pop("patch_embed.proj.bias"), np.arange(16, dtype=np.float32))
    expected.pop("patch_embed.proj.bias")
    assert all(same_bits(found[name], expected[name]) for name in expected)
    SanaTransformer2DModel.from_pretrained(tmp_path / "out" / "sana", subfolder="transformer")


def test_overrides_that_do_not_fit(checkpoint, tmp_path):
    overrides = {"dit/nothing": np.zeros(3), "dit/patch_embed/bias": np.zeros(3)}
    with pytest.raises(ValueError) as caught:
        export_backbones(checkpoint, tmp_path / "out", overrides)
    assert caught.match(r"override dit/nothing: expected no such leaf, found \(3,\)")
    assert caught.match(r"override dit/patch_embed/bias: expected \(16,\), found \(3,\)")
    assert list(tmp_path.iterdir()) == []


def test_config_that_does_not_fit(tied, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    convert(str(tied.vlm), str(tied.sana), str(checkpoint))
    edit_json(checkpoint / "sana/transformer/config.json", lambda c: c.update(num_layers=2))
    with pytest.raises(
        ValueError, match=r"dit/blocks/modulation_table: the configs imply \(2, 6, 16\)"
    ):
        export_backbones(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_must_be_free(checkpoint, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="exists already"):
        export_backbones(checkpoint, tmp_path)


def test_one_file_for_what_wemmu_adds(tmp_path):
    flat = {
        "expert/layers/norm/scale": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "queries/table": np.arange(4, dtype=np.float32),
    }
    file = tmp_path / "new" / "bridge.safetensors"
    save_tensors(file, flat, {"stage": "2"})
    header = read_header(file)
    assert header.metadata == {"stage": "2"}
    assert header.tensors.keys() == flat.keys()
    assert all(same_bits(header.tensors[path].read(), flat[path]) for path in flat)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.get_tensor("expert/layers/norm/scale").dtype == BF16


def test_a_failed_save_keeps_the_old_file(tmp_path):
    file = tmp_path / "bridge.safetensors"
    save_tensors(file, {"a": np.zeros(2)}, {})
    with pytest.raises(ValueError, match="cannot hold complex64"):
        save_tensors(file, {"a": np.zeros(2, np.complex64)}, {})
    assert read_header(file).tensors["a"].read().dtype == np.float64
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.safetensors")
