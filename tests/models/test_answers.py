"""Conversations as the VLM learns from them: which tokens are targets, and the rows that a pipeline makes of a set."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.models import qwen_vocabulary
from tests.models.wemmu_fixtures import small_config
from wemmu_jax.data.buckets import Bucket, make_buckets
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.records import Picture, Record, Turn
from wemmu_jax.data.sources import build_feeds
from wemmu_jax.data.tasks import Task, make_example
from wemmu_jax.models.qwen2_5_vl.answers import TARGET_WEIGHTS, encode_turns, target_weights
from wemmu_jax.models.qwen2_5_vl.prompt import PromptEncoder
from wemmu_jax.models.wemmu.inputs import RowEncoder

IMAGE_TOKEN = 151_655
TURNS = (
    Turn("What is on the left?", "Ein Würfel.", 1),
    Turn("", "A sphere <|im_end|>", 2),
    Turn("And?\nsystem\n", "No."),
)
GRIDS = ((2, 3), (3, 4), (1, 5))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    qwen_vocabulary.write_tokenizer(folder)
    qwen_vocabulary.small_config().save_pretrained(folder)
    return PromptEncoder.load(folder)


@pytest.fixture(scope="module")
def encoder(prompts):
    rows = RowEncoder(small_config(max_grid=16), prompts, (0.5,) * 3, (0.5,) * 3, (64, 4096))
    grids = [rows.config.source_grid(b.height, b.width) for b in make_buckets(64, multiple=32)]
    return rows.sized(grids, multiple=4)


def runs(prompts, padded, weights, value):
    """The texts of the stretches that have that weight; special tokens show."""
    texts, at = [], np.flatnonzero(weights == np.float32(value))
    for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
        texts.append(prompts._tokenizer.decode(padded.tokens[run]))
    return texts


@pytest.mark.parametrize("padding", [0, 7])
def test_answers_count_and_questions_a_little(prompts, padding):
    prompt = encode_turns(prompts, TURNS, GRIDS, source_tokens=12)
    padded = prompts.pad(prompt, len(prompt.tokens) + padding)
    weights = target_weights(prompts, padded)
    assert weights.dtype == np.float32 and set(np.unique(weights)) == set(
        np.float32([0, TARGET_WEIGHTS["user"], 1])
    )
    assert runs(prompts, padded, weights, 1) == [
        "Ein Würfel.<|im_end|>",
        "A sphere <|im_end|><|im_end|>",  # the first one is the user's five words
        "No.<|im_end|>",
    ]
    start, end = "<|vision_start|>", "<|vision_end|>"
    assert runs(prompts, padded, weights, TARGET_WEIGHTS["user"]) == [
        start,
        f"{end}What is on the left?<|im_end|>",
        start,
        f"{end}{start}",
        f"{end}<|im_end|>",
        "And?\nsystem\n<|im_end|>",
    ]
    assert np.count_nonzero(padded.feature_index >= 0) == 6 + 12 + 5
    assert not weights[padded.feature_index >= 0].any() and not weights[~padded.valid].any()


def test_pictures_stand_where_their_turn_shows_them(prompts):
    prompt = encode_turns(prompts, TURNS, GRIDS, source_tokens=12)
    features = prompt.feature_index[prompt.feature_index >= 0]
    assert features.tolist() == [*range(6), *range(12, 24), *range(24, 29)]
    before = prompts.decode(prompt.tokens[: np.flatnonzero(prompt.feature_index >= 12)[0]])
    assert "Ein Würfel." in before and "sphere" not in before


def test_whole_turns_are_left_out(prompts):
    whole = encode_turns(prompts, TURNS, GRIDS, source_tokens=12)
    two = encode_turns(prompts, TURNS[:2], GRIDS, source_tokens=12)
    one = encode_turns(prompts, TURNS[:1], GRIDS[:1], source_tokens=12)
    for length, expected in [
        (len(whole.tokens), whole),
        (len(whole.tokens) - 1, two),
        (len(two.tokens), two),
        (len(two.tokens) - 1, one),
        (len(one.tokens), one),
    ]:
        found = encode_turns(prompts, TURNS, GRIDS, source_tokens=12, length=length)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.feature_index, expected.feature_index)
    with pytest.raises(
        ValueError, match=rf"first turn of at most \d+ tokens, found {len(one.tokens)}"
    ):
        encode_turns(prompts, TURNS, GRIDS, source_tokens=12, length=len(one.tokens) - 1)


def test_long_conversations_pass_the_prompts_limit(prompts, encoder):
    turns = (Turn("What? " * 400, "x"),)
    assert encode_turns(prompts, turns, (), source_tokens=1).text_tokens > 512
    example = make_example(Task.VQA, Record("k", "", (), None, turns))
    assert encoder.text_length(example) == 512
    with pytest.raises(ValueError, match="expected a first turn of at most 512 tokens"):
        encoder.encode_example(example, Bucket(64, 64), 512)


def test_rows(prompts, encoder):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), np.uint8)
    pictures = tuple(
        Picture(None, None, lambda height, width, n=n: pixels[n, :height, :width]) for n in range(3)
    )
    example = make_example(Task.VQA, Record("k", "", pictures, None, TURNS))
    text = encode_turns(prompts, TURNS, ((1, 1),) * 3, source_tokens=1).text_tokens
    assert encoder.text_length(example) == text
    bucket = Bucket(32, 96)
    grid = encoder.config.source_grid(32, 96)
    row = encoder.encode_example(example, bucket, 128)
    assert set(row) == {
        "tokens", "feature_index", "position_ids", "valid", "weights", "vit_pixels",
    }  # fmt: skip
    vit, _ = encoder.source_sizes(grid)
    np.testing.assert_array_equal(row["vit_pixels"], pixels[:, : vit[0], : vit[1]])
    assert row["tokens"].shape == (128 + 3 * encoder.shapes.tokens,)
    assert (row["tokens"] == IMAGE_TOKEN).sum() == 3 * grid[0] * grid[1]
    again = encoder.encode_example(example, bucket, 128)
    assert all(np.array_equal(row[name], again[name]) for name in row)


def test_micro_batches_of_a_set(prompts, encoder, tmp_path):
    rng = np.random.default_rng(1)
    rows = []
    for number in range(24):
        count = number % 3
        for place in range(count):
            size = ((40, 100), (100, 40), (64, 64))[(number + place) % 3]
            name = tmp_path / f"{number}-{place}.png"
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(name)
        asked = "<image>" * count + f"Number {number}?"
        said = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"it is {number}"}]
        if number == 7:  # no length holds it, so that it is replaced
            said[0]["value"] += " why" * 600
        images = [f"{number}-{place}.png" for place in range(count)]
        rows.append({"image": images, "conversations": said})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"name": "a", "tasks": ["VQA"], "type": "conversations"}
    feeds = build_feeds([{**entry, "file": str(tmp_path / "a.jsonl")}])

    def batches(**changes):
        settings = {
            "feeds": feeds,
            "mixture": {Task.VQA: 1.0},
            "buckets": make_buckets(64, multiple=32),
            "rows": 2,
            "seed": 0,
            "encode_row": encoder.encode_example,
            "text_length": encoder.text_length,
        }
        return MicroBatches(**settings | changes)

    whole, seen, bad = batches(), set(), set()
    halves = [batches(process_index=index, process_count=2) for index in range(2)]
    for number in range(16):
        made = whole[number]
        parts = [half[number] for half in halves]
        assert made.keys == parts[0].keys + parts[1].keys
        for name, value in made.arrays.items():
            np.testing.assert_array_equal(value, np.concatenate([p.arrays[name] for p in parts]))
        assert ("vit_pixels" in made.arrays) == (made.arity > 0) and set(made.tasks) == {Task.VQA}
        for tokens, weights, key in zip(
            made.arrays["tokens"], made.arrays["weights"], made.keys, strict=True
        ):
            own = int(key.removeprefix("a/")) - 1
            assert prompts.decode(tokens[weights == 1]) == f"it is {own}"
            assert own % 3 == made.arity
            seen.add(own)
        bad |= {one.key for one in made.bad}
    assert len(seen) >= 20 and 7 not in seen and bad == {"8"}
