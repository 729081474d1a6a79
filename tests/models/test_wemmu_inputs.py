"""From requests and training examples to arrays, on a merged token of 8 pixels and a latent of 16."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.models import qwen_vocabulary
from tests.models import wemmu_fixtures as fixtures
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.records import Picture
from wemmu_jax.data.tasks import Example, Task
from wemmu_jax.models.qwen2_5_vl.images import patchify, slots_needed
from wemmu_jax.models.qwen2_5_vl.prompt import TEXT_LIMIT, PromptEncoder
from wemmu_jax.models.wemmu.config import Connector, VAEStream
from wemmu_jax.models.wemmu.inputs import (
    RowEncoder,
    Shapes,
    prompt_batch,
    read_preprocessing,
)

BUCKET, GRID = Bucket(32, 48), (4, 6)
LENGTH = 100
STREAMS = {
    "VAE in the LLM": {"vae_stream": VAEStream.FROZEN},
    "VAE in the expert": {"vae_stream": VAEStream.EXPERT},
    "no VAE": {"connector": Connector.NONE},
}


def encoder_of(**bridge) -> RowEncoder:
    return fixtures.row_encoder(fixtures.small_config(**bridge), grids=[GRID, *fixtures.GRIDS])


def example_of(sources: int, text: str = "the star"):
    """An example whose pictures note at which sizes they are asked for."""
    asked = []

    def picture(number: int) -> Picture:
        def load(height: int, width: int) -> np.ndarray:
            asked.append((number, height, width))
            rng = np.random.default_rng(number)
            return rng.integers(0, 256, (height, width, 3), np.uint8)

        return Picture(None, None, load)

    pictures = tuple(picture(number) for number in range(1, sources + 1))
    task = (Task.T2I, Task.S_EDIT, Task.M_EDIT)[min(sources, 2)]
    return Example(task, text, pictures, picture(0), "k"), asked


@pytest.mark.parametrize("bridge", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("grids", [(), fixtures.GRIDS[:1], fixtures.GRIDS])
def test_place_and_feature_index_are_inverse_to_each_other(bridge, grids):
    encoder, n = encoder_of(**bridge), len(grids)
    prompt = encoder.prompt("the star", grids, overflow="error")
    row = encoder.prompt_row(prompt, text_length=LENGTH, sources=n)
    padded = encoder.shapes.tokens
    index, place = row["feature_index"], row["place"]
    assert place.shape == (n * padded,) and len(index) == encoder.prompt_length(LENGTH, n)
    for picture, (rows, columns) in enumerate(grids):
        own = place[picture * padded : (picture + 1) * padded]
        assert (own[: rows * columns] >= 0).all() and (own[rows * columns :] == -1).all()
    held = place >= 0
    np.testing.assert_array_equal(index[place[held]], np.flatnonzero(held))
    vit = (index >= 0) & (index < n * padded)
    assert vit.sum() == held.sum() == sum(rows * columns for rows, columns in grids)
    vae = index >= n * padded
    assert vae.sum() == (held.sum() if encoder.vae_in_prompt else 0)
    assert encoder.vae_in_prompt == (bridge == STREAMS["VAE in the LLM"])


def test_vae_tokens_follow_their_picture_at_its_positions():
    encoder = encoder_of()
    prompt = encoder.prompt("the star", fixtures.GRIDS, overflow="error")
    row = encoder.prompt_row(prompt, text_length=LENGTH, sources=2)
    ids, padded = fixtures.special_ids(), encoder.shapes.tokens
    for picture, (rows, columns) in enumerate(fixtures.GRIDS):
        count = rows * columns
        place = row["place"][picture * padded :][:count]
        after = place + count
        np.testing.assert_array_equal(np.diff(place), 1)
        np.testing.assert_array_equal(
            row["feature_index"][after], 2 * padded + row["feature_index"][place]
        )
        positions = row["position_ids"]
        np.testing.assert_array_equal(positions[:, after], positions[:, place])
        start = positions[0, place[0] - 1] + 1
        wanted = np.indices((1, rows, columns)).reshape(3, -1) + start
        np.testing.assert_array_equal(positions[:, place], wanted)
        assert row["tokens"][place[0] - 1] == ids["vision_start_token_id"]
        assert row["tokens"][after[-1] + 1] == ids["vision_end_token_id"]
        assert (positions[:, after[-1] + 1] == start + max(rows, columns)).all()
    length = row["valid"].sum()
    assert row["tokens"][length - 1] == ids["vision_start_token_id"]
    assert row["next_position"] == row["position_ids"][0, length - 1] + 1


@pytest.mark.parametrize("sources", [0, 1, 2])
def test_a_training_row(sources):
    encoder = encoder_of()
    example, asked = example_of(sources)
    row = encoder.encode_example(example, BUCKET, LENGTH)
    assert row["target"].shape == (32, 48, 3) and row["target"].dtype == np.uint8
    assert row["cut"] == 0 and row["cut"].dtype == np.int32
    length = LENGTH + sources * encoder.shapes.tokens * 2
    assert {row[name].shape for name in ("tokens", "feature_index", "valid")} == {(length,)}
    assert row["position_ids"].shape == (3, length)
    wanted = {(0, 32, 48)}
    # 4 x 6 tokens: 8 pixels each for the ViT, 16 for the DC-AE.
    wanted |= {(n, *size) for n in range(1, sources + 1) for size in ((32, 48), (64, 96))}
    assert set(asked) == wanted
    if not sources:
        assert not {"source_pixels", "vit_pixels"} & set(row)
        return
    assert row["source_pixels"].shape == (sources, 64, 96, 3)
    for name, size in (("source_pixels", (64, 96)), ("vit_pixels", (32, 48))):
        for source, pixels in zip(example.sources, row[name], strict=True):
            np.testing.assert_array_equal(pixels, source.load(*size))


def test_source_sizes_follow_the_configs():
    config = fixtures.small_config()
    assert (config.vlm.vision.unit, config.dc_ae.ratio) == (8, 16)
    assert encoder_of().source_sizes((3, 5)) == ((24, 40), (48, 80))


def test_pack_keeps_every_picture():
    encoder = encoder_of()
    vision = encoder.config.vlm.vision
    pictures = fixtures.request(encoder.config).pictures[0]
    packed = encoder.pack(pictures)
    for number, (picture, (rows, columns)) in enumerate(zip(pictures, fixtures.GRIDS, strict=True)):
        places = packed.patches[number].reshape(-1, vision.spatial_merge_size**2, vision.patch_dim)
        seen = places[packed.order[number, : rows * columns]]
        wanted = patchify(picture, vision, encoder.mean, encoder.std)
        np.testing.assert_array_equal(seen.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("grid", [(4, 6), *fixtures.GRIDS])
def test_the_device_packs_as_the_host_does(grid):
    encoder = encoder_of()
    unit = encoder.config.vlm.vision.unit
    size = (3, grid[0] * unit, grid[1] * unit, 3)
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    host, device = encoder.pack(list(pixels)), jax.jit(encoder.pack_pixels)(pixels)
    for name in ("positions", "segments", "order"):
        np.testing.assert_array_equal(getattr(device, name), getattr(host, name))
        assert getattr(device, name).dtype == getattr(host, name).dtype
    assert device.patches.dtype == np.float32
    np.testing.assert_allclose(device.patches, host.patches, rtol=0, atol=3e-7)


def test_shapes_hold_the_largest_grid():
    config = fixtures.small_config()
    shapes = Shapes.of([(3, 5), (2, 9), (4, 2)], config, multiple=5)
    slots = max(slots_needed(*grid, config.vlm.vision) for grid in [(3, 5), (2, 9), (4, 2)])
    assert shapes == Shapes(tokens=20, slots=slots)
    assert Shapes.of([], config, multiple=5) == Shapes(0, 0)


def test_a_long_text_is_cut_and_counted_in_training_and_refused_in_sampling():
    encoder = encoder_of()
    text = "star " * 600
    example, _ = example_of(1, text)
    assert encoder.text_length(example) == TEXT_LIMIT
    row = encoder.encode_example(example, BUCKET, TEXT_LIMIT)
    whole = encoder.prompts.encode_user(
        text, [GRID], vae_tokens=True, source_tokens=24, open_image=True, limit=10_000
    )
    assert row["cut"] == whole.text_tokens - TEXT_LIMIT > 0
    assert row["valid"].sum() == TEXT_LIMIT + 2 * GRID[0] * GRID[1]
    with pytest.raises(ValueError, match=f"at most {TEXT_LIMIT} text tokens"):
        encoder.prompt(text, [GRID], overflow="error")


@pytest.mark.parametrize("sources", [0, 1, 2])
def test_text_length_is_what_a_row_needs(sources):
    encoder = encoder_of()
    example, asked = example_of(sources)
    length = encoder.text_length(example)
    assert not asked  # known before any picture is decoded
    row = encoder.encode_example(example, BUCKET, length)
    assert row["valid"].sum() == length + 2 * sources * GRID[0] * GRID[1]
    short = encoder.encode_example(example, BUCKET, length - 1)
    assert (short["cut"], short["valid"].sum()) == (1, row["valid"].sum() - 1)


def test_rows_become_a_batch():
    encoder = encoder_of()
    rows = [
        encoder.encode_example(example_of(2, text)[0], BUCKET, LENGTH) for text in fixtures.TEXTS
    ]
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    prompt = prompt_batch(arrays)
    assert prompt.position_ids.shape == (3, 2, encoder.prompt_length(LENGTH, 2))
    assert prompt.next_position.shape == (2,)
    np.testing.assert_array_equal(prompt.position_ids[:, 1], rows[1]["position_ids"])
    assert len({int(i) for i in arrays["picture_id"]}) == 1, "both draw the same picture"


def test_the_real_vocabulary(tmp_path):
    """A folder as `convert` leaves it: tokenizer and normalisation are read from it."""
    vlm = tmp_path / "vlm"
    qwen_vocabulary.write_tokenizer(vlm)
    qwen_vocabulary.small_config().save_pretrained(vlm)
    (vlm / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],'
        ' "min_pixels": 64, "max_pixels": 4096}'
    )
    # As a processor of transformers 5 writes it, all parts in one file; what is null is not there.
    size = {"shortest_edge": 64, "longest_edge": 4096}
    channels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/processor_config.json").write_text(
        json.dumps({"image_processor": {**channels, "min_pixels": None, "size": size}})
    )
    assert read_preprocessing(tmp_path / "whole") == read_preprocessing(vlm)
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json: missing"):
        read_preprocessing(tmp_path)
    encoder = RowEncoder.load(tmp_path, fixtures.small_config()).sized([GRID], multiple=5)
    assert encoder.shapes.tokens == 25 and encoder.pixel_limits == (64, 4096)
    assert isinstance(encoder.prompts, PromptEncoder)
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    prompt = encoder.prompt("make it <|vision_end|> blue", [GRID], overflow="error")
    assert (prompt.tokens == 151_655).sum() == 2 * 24
    assert (prompt.tokens == 151_653).sum() == 1  # the one in the text stays text
    row = encoder.prompt_row(prompt, text_length=prompt.text_tokens, sources=1)
    assert (row["place"] >= 0).tolist() == [True] * 24 + [False]
    assert dataclasses.replace(encoder, shapes=Shapes(0, 0)).prompt_length(7, 3) == 7
