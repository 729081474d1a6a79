"""Conversion of real model folders, and what is left behind when it fails."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.conversion.conftest import (
    BF16,
    Models,
    edit_json,
    read_tensors,
    rewrite,
    same_bits,
)
from wemmu_jax.conversion import convert as convert_module
from wemmu_jax.conversion import hub, staging
from wemmu_jax.conversion.backbones import DC_AE, DIT, VLM
from wemmu_jax.conversion.convert import convert
from wemmu_jax.conversion.memory import flatten, params_from_tensors
from wemmu_jax.conversion.safetensors_io import Stored
from wemmu_jax.conversion.weights import Weights


def run(models: Models, out):
    return convert(str(models.vlm), str(models.sana), str(out))


def test_equals_conversion_in_memory(models, tmp_path):
    report = run(models, tmp_path / "out")
    weights = Weights.open(tmp_path / "out")
    weights.verify()
    count = size = leaves = 0
    for backbone in (VLM, DIT, DC_AE):
        folder = models.folder(backbone.prefix)
        tensors = read_tensors(folder)
        config = json.loads((folder / "config.json").read_text())
        expected = params_from_tensors(tensors, backbone.rows(config, tensors.keys()).table)
        expected, found = flatten(expected), flatten(weights.load(backbone.prefix))
        assert found.keys() == expected.keys()
        assert [p for p in expected if not same_bits(found[p], expected[p])] == []
        count, leaves = count + len(tensors), leaves + len(expected)
        size += sum(tensor.nbytes for tensor in tensors.values())
    assert (report.tensors, report.bytes, report.ignored) == (count, size, ())
    assert len(weights.specs) == leaves


def test_stacks_and_dtypes(checkpoint):
    specs = Weights.open(checkpoint).specs
    kernel = specs["vlm/text/layers/attention/q_proj/kernel"]
    assert kernel.shape == (3, 64, 64)
    assert {spec.dtype for spec in specs.values()} == {BF16}


def test_files_beside_the_weights(tied, checkpoint):
    files = sorted(str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file())
    expected = [
        "sana/model_index.json",
        "sana/scheduler/scheduler_config.json",
        "sana/transformer/config.json",
        "sana/vae/config.json",
        "vlm/README.txt",
        "vlm/chat_template.jinja",
        "vlm/config.json",
        "vlm/generation_config.json",
        "vlm/preprocessor_config.json",
        "vlm/tokenizer.json",
        "vlm/tokenizer_config.json",
    ]
    ours = ["weights/index.json", "weights/weights-00001-of-00001.safetensors", "wemmu.json"]
    assert files == expected + ours
    for name in expected:
        original = (tied.vlm.parent / name).read_bytes()
        assert (checkpoint / name).read_bytes() == original


def test_same_weights_have_the_same_fingerprint(tied, checkpoint, copy, tmp_path):
    run(tied, tmp_path / "again")
    assert Weights.open(tmp_path / "again").fingerprint == Weights.open(checkpoint).fingerprint
    rewrite(next(copy.vlm.glob("model-00001*")), lambda t: next(iter(t.values())).__setitem__(0, 9))
    run(copy, tmp_path / "other")
    assert Weights.open(tmp_path / "other").fingerprint != Weights.open(checkpoint).fingerprint


def test_names_as_in_memory(copy, checkpoint, tmp_path):
    """Files written from `state_dict()` carry the modules' names."""

    def rename(tensors):
        for name in list(tensors):
            ours = f"model.{name}" if name.startswith("visual.") else name
            ours = ours.replace("model.", "model.language_model.") if ours == name else ours
            tensors[ours] = tensors.pop(name)

    for file in copy.vlm.glob("*.safetensors"):
        rewrite(file, rename)
    files = {f.name: read_names(f) for f in copy.vlm.glob("*.safetensors")}
    weight_map = {name: file for file, names in files.items() for name in names}
    index = copy.vlm / "model.safetensors.index.json"
    edit_json(index, lambda i: i.update(weight_map=weight_map))
    run(copy, tmp_path / "out")
    ours, expected = Weights.open(tmp_path / "out"), Weights.open(checkpoint)
    assert ours.specs.keys() == expected.specs.keys()
    assert [p for p in expected.specs if not same_bits(ours.map(p), expected.map(p))] == []


def read_names(file):
    with safe_open(file, "np") as opened:
        return list(opened.keys())


def single_file(folder, stem, change=lambda tensors: None):
    """Joins the shards of a folder into one file, changed on the way."""
    tensors = read_tensors(folder)
    for file in [*folder.glob("*.safetensors"), folder / f"{stem}.safetensors.index.json"]:
        file.unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def test_repeated_output_layer_is_ignored(copy, tmp_path):
    embedding = "model.embed_tokens.weight"
    single_file(copy.vlm, "model", lambda t: t.update({"lm_head.weight": t[embedding].copy()}))
    report = run(copy, tmp_path / "out")
    assert report.ignored == ("lm_head.weight",)
    assert not any("lm_head" in path for path in Weights.open(tmp_path / "out").specs)


def test_pickles_beside_safetensors_are_left_alone(copy, checkpoint, tmp_path):
    (copy.vlm / "pytorch_model.bin").write_bytes(b"never read")
    run(copy, tmp_path / "out")
    assert Weights.open(tmp_path / "out").fingerprint == Weights.open(checkpoint).fingerprint
    assert not (tmp_path / "out" / "vlm" / "pytorch_model.bin").exists()


def test_leaves_are_spread_over_files(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("wemmu_jax.conversion.weights._FILE_BYTES", 20_000)
    run(copy, tmp_path / "out")
    weights = Weights.open(tmp_path / "out")
    weights.verify()
    files = sorted((tmp_path / "out" / "weights").glob("*.safetensors"))
    assert len(files) > 5
    assert files[0].name == f"weights-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert file.stat().st_size < 25_000 or len(read_names(file)) == 1


def test_out_must_be_free(tied, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="out: exists already"):
        run(tied, tmp_path / "out")
    assert [f.name for f in tmp_path.rglob("*")] == ["out", "mine"]
    (tmp_path / "out" / "mine").unlink()
    run(tied, tmp_path / "out")
    Weights.open(tmp_path / "out")


def test_out_is_no_link_and_no_disk(tied, tmp_path, monkeypatch):
    """A folder cannot be put in the place of either, which is found out before any work."""
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(FileExistsError, match="out: is a link"):
        run(tied, tmp_path / "out")
    monkeypatch.setattr(staging.os.path, "ismount", lambda path: path == tmp_path / "real")
    with pytest.raises(FileExistsError, match="real: is where a disk is mounted"):
        run(tied, tmp_path / "real")
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["out", "real"]


def test_failure_while_writing_leaves_nothing(tied, tmp_path, monkeypatch):
    reads = iter(range(40))

    def fail_late(stored):
        next(reads)
        return np.zeros(stored.shape, stored.dtype)

    monkeypatch.setattr(Stored, "read", fail_late)
    with pytest.raises(RuntimeError):
        run(tied, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_processes_go(tied, tmp_path):
    host = staging.socket.gethostname()
    dead, living = (tmp_path / f"out.partial-{host}-{pid}" for pid in (2**22 + 1, 1))
    elsewhere = tmp_path / "out.partial-another.host-5"
    for folder in (dead, living, elsewhere):
        folder.mkdir()
    run(tied, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", living, elsewhere])


def test_full_disk_is_noticed_first(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(
        convert_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1)
    )
    with pytest.raises(OSError, match="GB needed"):
        run(tied, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such folder, and not a hub id"),
        ("../vlm", "no such folder, and not a hub id"),
        ("Qwen/nothing-of-that-name", "no such folder, and as a hub id it cannot be reached"),
    ],
)
def test_neither_folder_nor_hub(tied, tmp_path, source, message):
    with pytest.raises(FileNotFoundError, match=message):
        convert(source, str(tied.sana), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tied, tmp_path):
    file = tied.vlm / "config.json"
    with pytest.raises(FileNotFoundError, match="is a file; expected the model's folder"):
        convert(str(file), str(tied.sana), str(tmp_path / "out"))


class Refused(Exception):
    """As the hub's client has it: no OSError."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Refused("[Errno 111] Connection refused"), ConnectionError),
        (TimeoutError("slow"), ConnectionError),
        (huggingface_hub.errors.LocalEntryNotFoundError("offline"), FileNotFoundError),
        (ValueError("no such repository"), FileNotFoundError),
    ],
)
def test_a_hub_that_cannot_be_reached(tied, tmp_path, monkeypatch, error, kind):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    with pytest.raises(kind, match=r"owner/name: no such folder, and as a hub id .*Check the name"):
        convert("owner/name", str(tied.sana), str(tmp_path / "out"))


def test_a_user_that_is_not_there(tied, tmp_path):
    with pytest.raises(FileNotFoundError, match="~nobody-of-that-name/x: no such folder"):
        convert("~nobody-of-that-name/x", str(tied.sana), str(tmp_path / "out"))


def test_hub_downloads_no_pickles(tied, monkeypatch):
    asked = {}

    def download(repo, **patterns):
        asked[repo] = patterns
        return str(tied.vlm)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    assert hub.local_folder("owner/name", hub.VLM_FILES) == tied.vlm
    suffixes = {pattern.rsplit(".", 1)[1] for pattern in asked["owner/name"]["allow_patterns"]}
    assert suffixes == {"safetensors", "json", "txt", "jinja"}
    assert {p.rsplit(".", 1)[1] for p in hub.SANA_FILES} == {"safetensors", "json"}


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_variant_only(copy, checkpoint, tmp_path, size):
    """Some published Sana models have `diffusion_pytorch_model.bf16.safetensors` and no plain file."""
    folder = copy.sana / "transformer"
    model = SanaTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size=size, variant="bf16")
    assert not (folder / "diffusion_pytorch_model.safetensors").exists()
    run(copy, tmp_path / "out")
    assert Weights.open(tmp_path / "out").fingerprint == Weights.open(checkpoint).fingerprint
    names = {file.name for file in (tmp_path / "out/sana/transformer").iterdir()}
    assert names == {"config.json"}


def test_float16(copy, tmp_path):
    for folder in (copy.vlm, copy.sana / "transformer", copy.sana / "vae"):
        for file in folder.glob("*.safetensors"):
            rewrite(file, lambda t: t.update({n: a.astype(np.float16) for n, a in t.items()}))
    run(copy, tmp_path / "out")
    assert {s.dtype for s in Weights.open(tmp_path / "out").specs.values()} == {
        np.dtype(np.float16)
    }


def test_torch_is_not_needed():
    """The reference library must not creep into what a user runs."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from wemmu_jax.conversion.convert import convert\n"
        "from wemmu_jax.conversion.export import export_backbones\n"
        "from wemmu_jax.conversion.weights import Weights\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
