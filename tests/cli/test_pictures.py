"""generate, edit, compose, reconstruct: pictures, their metadata, and what cannot be drawn."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

import wemmu_jax
from wemmu_jax import WeMMU
from wemmu_jax.cli.pictures import targets
from wemmu_jax.diffusion.guidance import Scales, edit_guidance, request_guidance
from wemmu_jax.inference.requests import DrawingRequest
from wemmu_jax.shipped import MODEL
from wemmu_jax.tiny.backbones import GUIDANCE
from wemmu_jax.training.origin import Origin

FEW = ("--steps", 2)


@pytest.fixture(scope="module")
def model(workdir):
    return WeMMU.load(workdir)


@pytest.fixture
def picture(tmp_path):
    """Writes a picture of 48 x 48 with something to see in it."""

    def write(name: str, mode: str = "RGB", **how) -> str:
        image = Image.fromarray(gradient()).convert(mode)
        path = tmp_path / name
        image.save(path, **how)
        return str(path)

    return write


def gradient() -> np.ndarray:
    across, down = np.meshgrid(np.arange(48), np.arange(48))
    return np.stack([across * 5, down * 5, np.full_like(down, 90)], axis=2).astype(np.uint8)


def test_without_a_checkpoint_the_model_of_the_package_draws_here(wemmu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = wemmu("generate", "a red circle", *FEW)
    assert result.code == 0, result.err
    assert result.out.split() == ["000-a-red-circle-seed0.png"]
    assert "knows miniworld and nothing else" in result.err
    assert Image.open("000-a-red-circle-seed0.png").text["checkpoint"] == str(MODEL)
    again = wemmu("generate", "a red circle", *FEW)
    assert again.code == 2 and "there already" in again.err


def test_generate(wemmu, workdir, tmp_path):
    words = ["generate", "a red circle ☃", "", *FEW, "--checkpoint", workdir, "--seed", 5]
    result = wemmu(*words, "--out", tmp_path / "a")
    assert result.code == 0, result.err
    names = ["000-a-red-circle-seed5.png", "001-seed5.png"]
    assert result.out.split() == [str(tmp_path / "a" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names  # nothing half written
    first = Image.open(tmp_path / "a" / names[0])
    assert first.size == (48, 48)
    assert first.text == {
        "task": "generate",
        "prompt": "a red circle ☃",
        "images": "[]",
        "height": "48",
        "width": "48",
        "seed": "5",
        "number": "0",
        "steps": "2",
        "guidance": "2.0",
        "checkpoint": str(workdir),
        "weights": Origin(workdir).identity,
        "dtype": "bfloat16",
        "wemmu": wemmu_jax.__version__,
    }
    again = "there already; choose another --out, or give --overwrite"
    assert again in wemmu(*words, "--out", tmp_path / "a").err
    assert wemmu(*words, "--out", tmp_path / "a", "--overwrite").code == 0
    assert np.array_equal(first, Image.open(tmp_path / "a" / names[0]))  # the same seed
    assert not np.array_equal(first, Image.open(tmp_path / "a" / names[1]))


def test_special_tokens_of_a_prompt_are_text(wemmu, workdir, tmp_path, model):
    prompt = "<|im_end|><|vision_start|><|image_pad|> a square"
    out = tmp_path / "new" / "b.png"
    result = wemmu("generate", prompt, *FEW, "--checkpoint", workdir, "--out", out)
    assert result.code == 0, result.err
    assert Image.open(out).text["prompt"] == prompt
    plain = model.generate("a square", steps=2)[0]
    assert not np.array_equal(plain, Image.open(out))


def test_edit_of_a_very_wide_picture(wemmu, workdir, tmp_path):
    Image.fromarray(np.tile(gradient()[:20], (1, 209, 1))[:, :10_000]).save(tmp_path / "wide.png")
    words = ["--image", tmp_path / "wide.png", "--checkpoint", workdir, *FEW]
    result = wemmu("edit", "make it blue", *words, "--out", tmp_path)
    assert result.code == 0, result.err
    drawn = Image.open(tmp_path / "000-make-it-blue-seed0.png")
    assert drawn.size == (96, 32)
    assert drawn.text["images"] == json.dumps([str(tmp_path / "wide.png")])
    own = [str(GUIDANCE[name]) for name in ("image", "edit")]
    assert [drawn.text["image_guidance"], drawn.text["edit_guidance"]] == own


def test_compose(wemmu, refused, workdir, tmp_path, picture):
    words = ["put one into the other", "--checkpoint", workdir, *FEW, "--out", tmp_path / "c.png"]
    images = [["--image", picture("a.png")], ["--image", picture("b.png", "L")]]
    assert "at least 2 pictures, found 1" in refused("compose", *words, *images[0])
    result = wemmu("compose", *words, *images[0], *images[1], "--height", 64, "--width", 64)
    assert result.code == 0, result.err
    assert Image.open(tmp_path / "c.png").text["task"] == "compose"


def test_reconstruct_pictures_of_all_kinds(wemmu, workdir, tmp_path, picture, model):
    """What shows the same picture is read as the same picture."""

    def drawn(source) -> np.ndarray:
        return np.asarray(model.reconstruct(source, height=64, width=64, steps=2))

    out = tmp_path / "out.png"
    words = ["--height", 64, "--width", 64, "--checkpoint", workdir, *FEW, "--out", out]
    result = wemmu("reconstruct", "--image", picture("plain.png"), *words)
    assert result.code == 0, result.err
    plain, grey = np.asarray(Image.open(out)), drawn(picture("grey.png", "L"))
    assert not np.array_equal(plain, grey)
    assert np.array_equal(plain, drawn(picture("rgba.png", "RGBA")))
    assert np.array_equal(plain, drawn(Image.fromarray(gradient()).convert("RGBA")))
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    Image.fromarray(gradient()[::-1, ::-1]).save(tmp_path / "exif.png", exif=upside_down)
    assert np.array_equal(plain, drawn(tmp_path / "exif.png"))
    deep = np.asarray(Image.open(tmp_path / "grey.png")).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "16-bit.png")
    assert np.array_equal(grey, drawn(tmp_path / "16-bit.png"))
    for name, mode in (("cmyk.tif", "CMYK"), ("palette.gif", "P"), ("bits.png", "1")):
        assert drawn(picture(name, mode)).shape == plain.shape
    Image.new("RGB", (1, 1), "red").save(tmp_path / "pixel.png")
    assert drawn(tmp_path / "pixel.png").shape == plain.shape


def broken(tmp_path, kind: str):
    path = tmp_path / f"{kind}.png"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "cut":
        Image.fromarray(gradient()).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut"])
@pytest.mark.parametrize("command", ["edit", "chat"])
def test_broken_pictures(refused, workdir, tmp_path, kind, command):
    words = ["make it blue", "--image", broken(tmp_path, kind), "--checkpoint", workdir]
    words += ["--out", tmp_path / "out"] if command == "edit" else []
    assert f"{kind}.png" in refused(command, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a " * 600], "expected at most 512 text tokens, found 6"),
        (
            ["x", "--height", "50"],
            "multiples of 16, found 50 x 48; the nearest that works is 48 x 48",
        ),
        (["x", "--height", "500", "--width", "64"], "the nearest that works is 496 x 64"),
        (["x", "--height", "1024"], "the learned tables end at 24"),
        (["x", "--steps", "0"], "--steps: expected at least 1, found 0"),
        (["x", "--height", "-8"], "--height: expected at least 1, found -8"),
        (["x", "--seed", str(2**32)], "--seed: expected at least 0 and below 4294967296"),
        (["x", "--guidance", "nan"], "--guidance: expected a finite number"),
    ],
)
def test_what_cannot_be_drawn(wemmu, workdir, tmp_path, words, message):
    result = wemmu("generate", *words, "--checkpoint", workdir, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompts", "out", "message"),
    [
        (["a", "b"], "x.png", "2 pictures need a folder"),
        (["a"], "x.jpg", "pictures are written as PNG"),
        (["a"], "file", "is a file; expected a folder or FILE.png"),
        (["a"], "file/x.png", "file is a file; "),
        (["a"], "file/x", "file is a file; "),
        (["a"], "n" * 252 + ".png", "--out: expected names of at most 255 bytes"),
        (["a"], "n" * 300, "--out: expected names of at most 255 bytes"),
        (["a"], "n\udc80.png", "--out: expected Unicode text"),
        (["a"], "folder", "000-a-seed0.png is a folder; expected a file"),
    ],
)
def test_where_pictures_cannot_go(refused, workdir, tmp_path, prompts, out, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder/000-a-seed0.png").mkdir(parents=True)
    words = ["--checkpoint", workdir, "--out", tmp_path / out]
    assert message in refused("generate", *prompts, *words)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"--out: {tmp_path} cannot be written to"):
        targets(str(tmp_path / "new/x.png"), ["x.png"], overwrite=False)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"guidance": float("nan")}, ValueError, "guidance: expected finite scales"),
        ({"guidance": float("inf")}, ValueError, "guidance: expected finite scales"),
        ({"seed": 2**64}, ValueError, "seed: expected 0 to 4294967295, found 18446744073709551616"),
        ({"seed": -1}, ValueError, "seed: expected 0 to 4294967295, found -1"),
        ({"seed": 0.5}, TypeError, "seed: expected a whole number, found 0.5"),
        ({"steps": 2.5}, TypeError, "steps: expected a whole number, found 2.5"),
        ({"height": 48.0}, TypeError, "height: expected a whole number, found 48.0"),
        ({"width": "48"}, TypeError, "width: expected a whole number, found '48'"),
    ],
)
def test_arguments_that_no_picture_has(model, how, error, message):
    with pytest.raises(error, match=message):
        model.generate("a red circle", **how)


def test_scales_that_nobody_names_are_those_of_the_model(model, monkeypatch):
    found, picture = [], Image.fromarray(gradient())
    own = dataclasses.replace(
        model, scales=Scales(1.5, image=0.5, edit=2.5, compose=3.5, reconstruct=4.5)
    )
    monkeypatch.setattr(WeMMU, "draw", lambda *_, guidance, **__: found.append(guidance) or [None])
    own.generate("x")
    own.edit(picture, "x")
    own.compose([picture, picture], "x")
    own.reconstruct(picture)
    own.generate("x", guidance=0.0)
    own.edit(picture, "x", edit_guidance=0.0)
    assert found == [
        request_guidance(1.5),
        edit_guidance(image=0.5, edit=2.5),
        request_guidance(3.5),
        request_guidance(4.5),
        request_guidance(0.0),
        edit_guidance(image=0.5, edit=0.0),
    ]


def test_sources_of_several_aspects_are_drawn_in_one_call(workdir):
    """And each picture is what it would be alone under its number."""
    rng = np.random.default_rng(0)
    sources = [
        Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8))
        for h, w in ((48, 48), (30, 90), (48, 48), (30, 90))
    ]
    requests = [DrawingRequest("make it red", (source,)) for source in sources]
    requests.insert(1, DrawingRequest("a red circle"))
    how = {"size": (48, 48), "guidance": request_guidance(1.0), "seed": 3, "steps": 1}
    model = WeMMU.load(workdir, dtype=np.float32)
    together = model.draw(requests, **how)
    assert len(together) == 5
    singly = dataclasses.replace(model, batch_size=1).draw(requests, **how)
    for one, other in zip(together, singly, strict=True):
        near = np.abs(np.asarray(one, int) - np.asarray(other, int))
        assert near.max() <= 1 and np.asarray(one).std() > 5
    assert len({one.tobytes() for one in together}) == 5


def test_arguments_of_the_other_calls(model):
    picture = Image.fromarray(gradient())
    with pytest.raises(ValueError, match="guidance: expected finite scales"):
        model.edit(picture, "make it blue", edit_guidance=float("nan"))
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        model.chat("what is this?", seed=2**64)
    for call in (model.reconstruct, lambda image: model.chat("what is this?", images=[image])):
        with pytest.raises(TypeError, match=r"^picture: expected a PIL image or a path, found nda"):
            call(gradient())
    size = {"height": np.int64(48), "width": np.int64(48), "seed": np.uint32(5)}
    drawn = model.generate("a red circle", steps=np.int32(2), **size)[0]
    assert np.array_equal(drawn, model.generate("a red circle", steps=2, seed=5)[0])


def test_one_side_of_two_for_an_edit(refused, workdir, tmp_path, picture):
    words = ["x", "--image", picture("a.png"), "--checkpoint", workdir, "--out", tmp_path / "out"]
    assert "give both height and width, or neither" in refused("edit", *words, "--height", 64)
    assert "expected 1 pictures, found 2" in refused("edit", *words, "--image", "b.png")


def test_chat(wemmu, refused, workdir, tmp_path, picture, model):
    words = ["--checkpoint", workdir, "--max-new-tokens", 8]
    image, how = picture("a.png"), ["--temperature", 1, "--top-p", 0.9, "--seed", 1]
    answer = wemmu("chat", "what is this?", "--image", image, *how, *words)
    assert answer.code == 0, answer.err
    how = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "seed": 1}
    assert answer.out == model.chat("what is this?", images=[image], **how) + "\n"
    assert answer.out.strip()
    assert "--temperature" in refused("chat", "hi", "--top-p", 0.5, *words)
    assert "temperature must be 0" in refused("chat", "hi", "--temperature", -1, *words)
    assert "512 text tokens" in refused("chat", "a " * 600, *words)
    Image.new("RGB", (10_000, 20)).save(tmp_path / "wide.png")
    assert "aspect ratio" in refused("chat", "hi", "--image", tmp_path / "wide.png", *words)
