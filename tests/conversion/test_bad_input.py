"""Every kind of bad input to `convert`: one error that names all faults, and nothing written."""

import json
import pickle
import shutil

import numpy as np
import pytest

from tests.conversion.conftest import BF16, Models, edit_json, rewrite
from wemmu_jax.conversion.backbones import DC_AE, DIT, VLM
from wemmu_jax.conversion.convert import convert


def run(models: Models, out):
    return convert(str(models.vlm), str(models.sana), str(out))


SHARD = "model-00002-of-00007.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
V_PROJ = "model.layers.2.self_attn.v_proj.weight"


def shard_of(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def drop_from_index_and_file(folder, name):
    rewrite(shard_of(folder, name), lambda t: t.pop(name))
    edit_json(folder / "model.safetensors.index.json", lambda i: i["weight_map"].pop(name))


def add_to_index_and_file(folder, name, array):
    rewrite(folder / SHARD, lambda t: t.update({name: array}))
    edit_json(
        folder / "model.safetensors.index.json", lambda i: i["weight_map"].update({name: SHARD})
    )


def map_all_to(file):
    return lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], file))


def only_pickles(m, name):
    for file in m.vlm.glob("*.safetensors*"):
        file.unlink()
    with (m.vlm / name).open("wb") as stream:
        pickle.dump({}, stream)


def cast(name, dtype):
    return lambda m: rewrite(
        shard_of(m.vlm, name), lambda t: t.update({name: t[name].astype(dtype)})
    )


def no_weights(m):
    for file in (m.sana / "transformer").glob("*.safetensors*"):
        file.unlink()


def empty_shard(m):
    (m.vlm / SHARD).write_bytes(b"")


def truncate(m):
    file = m.vlm / SHARD
    file.write_bytes(file.read_bytes()[:-10])


PREPROCESSOR = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
VAE = "diffusion_pytorch_model.safetensors"
# what is done to a sound pair of folders -> what the error must say
BAD = {
    "missing shard": (lambda m: (m.vlm / SHARD).unlink(), f"{SHARD}: missing; {INDEX} names it"),
    "missing index": (
        lambda m: (m.vlm / INDEX).unlink(),
        f"{INDEX}: missing, but there are shards",
    ),
    "no weights": (
        no_weights,
        "sana/transformer: no weights; expected diffusion_pytorch_model.saf",
    ),
    "no folder": (lambda m: shutil.rmtree(m.sana / "vae"), "sana/vae: no weights"),
    "missing key": (
        lambda m: drop_from_index_and_file(m.vlm, Q_PROJ),
        rf"vlm: missing tensor {Q_PROJ} \(64, 64\)",
    ),
    "extra key": (
        lambda m: add_to_index_and_file(m.vlm, "model.extra", np.zeros(3, np.float32)),
        rf"{SHARD}: tensor model.extra \(3,\) is not part of the model",
    ),
    "wrong shape": (
        lambda m: rewrite(
            shard_of(m.vlm, Q_PROJ), lambda t: t.update({Q_PROJ: t[Q_PROJ][:60].copy()})
        ),
        rf"shape of {Q_PROJ}: the config implies \(64, 64\), found \(60, 64\)",
    ),
    "config of another size": (
        lambda m: edit_json(
            m.vlm / "config.json", lambda c: c["text_config"].update(intermediate_size=99)
        ),
        r"shape of model.layers.2.mlp.up_proj.weight: the config implies \(99, 64\), found \(96, 64\)",
    ),
    "config of more layers": (
        lambda m: edit_json(m.sana / "transformer/config.json", lambda c: c.update(num_layers=4)),
        "transformer: missing tensor transformer_blocks.3.attn1.to_q.weight",
    ),
    "config of fewer layers": (
        lambda m: edit_json(m.sana / "transformer/config.json", lambda c: c.update(num_layers=2)),
        "tensor transformer_blocks.2.attn1.to_q.weight .* is not part of the model",
    ),
    "config that is not ours": (
        lambda m: edit_json(m.vlm / "config.json", lambda c: c.update(model_type="llama")),
        "vlm/config.json: model_type: expected 'qwen2_5_vl', found 'llama'",
    ),
    "config without sizes": (
        lambda m: edit_json(m.vlm / "config.json", lambda c: c["text_config"].pop("hidden_size")),
        "vlm/config.json: .*hidden_size",
    ),
    "no config": (
        lambda m: (m.sana / "vae/config.json").unlink(),
        "vae/config.json: missing",
    ),
    "config is no json": (
        lambda m: (m.vlm / "config.json").write_text("{"),
        "vlm/config.json: expected JSON: ",
    ),
    "config is a list": (
        lambda m: (m.vlm / "config.json").write_text("[]"),
        "vlm/config.json: expected a JSON object, found list",
    ),
    "index leads up": (
        lambda m: edit_json(m.vlm / INDEX, map_all_to("../vlm/" + SHARD)),
        f"{INDEX}: names '../vlm/{SHARD}'; expected a .safetensors file in the same folder",
    ),
    "index leads to the root": (
        lambda m: edit_json(m.vlm / INDEX, map_all_to("/etc/passwd")),
        f"{INDEX}: names '/etc/passwd'; expected a .safetensors",
    ),
    "index names a pickle": (
        lambda m: edit_json(m.vlm / INDEX, map_all_to("pytorch_model.bin")),
        "names 'pytorch_model.bin'; expected a .safetensors",
    ),
    "index without a map": (
        lambda m: edit_json(m.vlm / INDEX, lambda i: i.pop("weight_map")),
        f"{INDEX}: no weight_map",
    ),
    "index with an odd map": (
        lambda m: edit_json(m.vlm / INDEX, lambda i: i.update(weight_map={"a": 3})),
        f"{INDEX}: no weight_map",
    ),
    "index is wrong about a file": (
        lambda m: edit_json(
            m.vlm / INDEX, lambda i: i["weight_map"].update({"model.norm.weight": SHARD})
        ),
        f"says that model.norm.weight is in {SHARD}, which does not have it",
    ),
    "index forgets a tensor": (
        lambda m: edit_json(m.vlm / INDEX, lambda i: i["weight_map"].pop(Q_PROJ)),
        f"has {Q_PROJ}, which {INDEX} does not name",
    ),
    "single and sharded": (
        lambda m: shutil.copy(m.vlm / SHARD, m.vlm / "model.safetensors"),
        f"both model.safetensors and {INDEX}: two saves in one folder",
    ),
    "duplicate over shards": (
        lambda m: rewrite(m.vlm / SHARD, lambda t: t.update({Q_PROJ: np.zeros((64, 64), BF16)})),
        f"{Q_PROJ} is both in ",
    ),
    "truncated": (truncate, f"{SHARD}: not a sound safetensors file: truncated"),
    "zero bytes": (empty_shard, f"{SHARD}: not a sound safetensors file: 0 bytes are too few"),
    "unsupported dtype": (
        cast(Q_PROJ, np.int8),
        f"unsupported dtype of {Q_PROJ}: expected float32, float16 or bfloat16, found int8",
    ),
    "mixed dtypes": (
        cast(V_PROJ, np.float32),
        r"mixed dtypes in model.layers.\{i\}.self_attn.v_proj.weight: \['bfloat16', 'float32'\]",
    ),
    "both namings": (
        lambda m: add_to_index_and_file(
            m.vlm, "model.language_model.embed_tokens.weight", np.zeros((300, 64), BF16)
        ),
        "found both",
    ),
    "tied, but different": (
        lambda m: add_to_index_and_file(m.vlm, "lm_head.weight", np.zeros((300, 64), BF16)),
        "lm_head.weight differs from model.embed_tokens.weight, but the config says .* tied",
    ),
    "pickle .bin": (
        lambda m: only_pickles(m, "pytorch_model.bin"),
        "vlm/pytorch_model.bin: pickled weights are refused.*save the model as safetensors",
    ),
    "pickle .pt": (
        lambda m: only_pickles(m, "model.pt"),
        "vlm/model.pt: pickled weights are refused",
    ),
    "pickle .ckpt": (
        lambda m: only_pickles(m, "m.ckpt"),
        "vlm/m.ckpt: pickled weights are refused",
    ),
    "pickle .pkl": (lambda m: only_pickles(m, "m.pkl"), "vlm/m.pkl: pickled weights are refused"),
    "no tokenizer": (
        lambda m: (m.vlm / "tokenizer.json").unlink(),
        "vlm: expected tokenizer.json, or vocab.json and merges.txt, found neither",
    ),
    "no tokenizer at all": (
        lambda m: [(m.vlm / f"tokenizer{end}.json").unlink() for end in ("", "_config")],
        "vlm: expected a tokenizer_config.json, found none; expected tokenizer.json, or",
    ),
    "tokenizer of another kind": (
        lambda m: (m.vlm / "tokenizer.json").write_text('{"a": 1}'),
        "vlm/tokenizer.json: no tokenizer",
    ),
    "tokenizer is cut": (
        lambda m: (m.vlm / "tokenizer.json").write_text("{"),
        "vlm/tokenizer.json: expected JSON: ",
    ),
    "tokenizer of another model": (
        lambda m: edit_json(m.vlm / "config.json", lambda c: c.update(image_token_id=7)),
        "vlm/config.json: image_token_id: expected [0-9]+ .*found 7",
    ),
    "ends that are no ids": (
        lambda m: (m.vlm / "generation_config.json").write_text('{"eos_token_id": "x"}'),
        "vlm/generation_config.json: eos_token_id: expected token ids, found",
    ),
    "no preprocessor": (
        lambda m: (m.vlm / PREPROCESSOR).unlink(),
        f"vlm/{PREPROCESSOR}: missing",
    ),
    "preprocessor without a mean": (
        lambda m: edit_json(m.vlm / PREPROCESSOR, lambda c: c.pop("image_mean")),
        f"vlm/{PREPROCESSOR}: image_mean: expected three numbers, found None",
    ),
    "preprocessor that divides by zero": (
        lambda m: edit_json(m.vlm / PREPROCESSOR, lambda c: c.update(image_std=[0, 1, 1])),
        f"vlm/{PREPROCESSOR}: image_std: expected numbers above 0",
    ),
    "preprocessor with crossed limits": (
        lambda m: edit_json(m.vlm / PREPROCESSOR, lambda c: c.update(min_pixels=1e9)),
        f"vlm/{PREPROCESSOR}: min_pixels and max_pixels: expected two rising",
    ),
    "preprocessor is a list": (
        lambda m: (m.vlm / PREPROCESSOR).write_text("[]"),
        f"vlm/{PREPROCESSOR}: expected a JSON object, found list",
    ),
    "preprocessor is no json": (
        lambda m: (m.vlm / PREPROCESSOR).write_text("{"),
        f"vlm/{PREPROCESSOR}: expected JSON: ",
    ),
    "no sample_size": (
        lambda m: edit_json(m.sana / "transformer/config.json", lambda c: c.pop("sample_size")),
        "transformer/config.json: sample_size: expected a whole number above 0, found None",
    ),
    "latents of two widths": (
        lambda m: edit_json(m.sana / "vae/config.json", lambda c: c.update(latent_channels=8)),
        "the DiT reads 4 latent channels, the autoencoder writes 8",
    ),
    "empty config": (
        lambda m: (m.vlm / "config.json").write_text("{}"),
        "vlm/config.json: model_type: expected 'qwen2_5_vl', found None",
    ),
    "vision_config is text": (
        lambda m: edit_json(m.vlm / "config.json", lambda c: c.update(vision_config="x")),
        "vlm/config.json: vision_config: expected an object, found 'x'",
    ),
    "rope_scaling is a list": (
        lambda m: edit_json(
            m.vlm / "config.json",
            lambda c: c["text_config"].update(rope_parameters=None, rope_scaling=["x"]),
        ),
        "vlm/config.json: rope_scaling: expected an object, found \\['x'\\]",
    ),
    "patches of no size": (
        lambda m: edit_json(
            m.vlm / "config.json", lambda c: c["vision_config"].update(patch_size=0)
        ),
        "vlm/config.json: vision_config.patch_size: expected one whole number above 0, found 0",
    ),
    "latents of no width": (
        lambda m: edit_json(m.sana / "vae/config.json", lambda c: c.update(latent_channels=0)),
        r"vae/config.json: DC-AE config: latent_channels: expected whole numbers .*found \[0\]",
    ),
    "damaged vae": (
        lambda m: (m.sana / "vae" / VAE).write_bytes(b"\xff" * 20),
        f"vae/{VAE}: not a sound safetensors file: the header claims",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(copy, tmp_path, name):
    damage, message = BAD[name]
    damage(copy)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        run(copy, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_all_faults_in_one_error(copy, tmp_path):
    together = (
        "missing shard",
        "missing key",
        "config of more layers",
        "mixed dtypes",
        "no preprocessor",
        "no tokenizer at all",
        "no sample_size",
        "damaged vae",
    )
    for name in together:
        BAD[name][0](copy)
    with pytest.raises(ValueError) as caught:
        run(copy, tmp_path / "out")
    for name in together:
        assert caught.match(BAD[name][1])
    lost = read_names_of_index(copy.vlm / INDEX, SHARD)
    assert lost
    assert not [name for name in lost if f"missing tensor {name} " in str(caught.value)]


VALUES = (0, -1, 1.5, float("nan"), True, None, "x", "", [], ["x"], [0], [None], {}, {"a": 1})


@pytest.mark.parametrize("backbone", [VLM, DIT, DC_AE], ids=lambda backbone: backbone.prefix)
def test_any_value_of_a_config_is_read_or_refused(tied, backbone):
    config = json.loads((tied.folder(backbone.prefix) / "config.json").read_text())
    refused = 0
    for place, key in entries(config):
        good = place[key]
        for value in VALUES:
            place[key] = value
            try:
                backbone.rows(config, None)
            except ValueError:
                refused += 1
        place[key] = good
    assert refused > 100


def entries(value):
    """(container, key) of everything in a JSON value, at every depth."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from entries(value[key])


def read_names_of_index(index, file):
    return [n for n, f in json.loads(index.read_text())["weight_map"].items() if f == file]
