"""What a request is turned into, beside what a training sample of the same task is."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from tests.models import wemmu_fixtures as fixtures
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.pictures import lazy_picture, open_picture
from wemmu_jax.data.records import Record
from wemmu_jax.data.tasks import Task, make_example
from wemmu_jax.diffusion.guidance import Branch
from wemmu_jax.inference.requests import BranchInputs, DrawingRequest, RequestEncoder
from wemmu_jax.models.wemmu.inputs import PROMPT_FIELDS, RowEncoder

SIZE = (32, 64)  # pixels; a token is 8 of the ViT's and 16 of the DC-AE's
TEXTS = ("make the star green", "turn it")
TRAINED_AS = {Branch.NOTHING: Task.UNCOND, Branch.SOURCE: Task.REC, Branch.REQUEST: Task.S_EDIT}


def requests_of(**bridge) -> RequestEncoder:
    config = fixtures.small_config(**bridge)
    return RequestEncoder(config, fixtures.row_encoder(config), default_size=SIZE[1])


def png(number: int, height: int, width: int) -> bytes:
    """A picture of nothing, neither square nor of any size that the model reads."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def opened(number: int, shape: tuple[int, int] = (50, 100)) -> Image.Image:
    return open_picture(png(number, *shape), name="a picture")


def stored(number: int, shape: tuple[int, int] = (50, 100)):
    return lazy_picture(lambda: png(number, *shape), shape, name=str(number))


def assert_rows_are(inputs: BranchInputs, rows: RowEncoder, trained: Sequence[dict]) -> None:
    """What a branch is given is what training would give the same records."""
    count = len(inputs.pixels)
    for number, row in enumerate(trained):
        for name in PROMPT_FIELDS:
            values = np.asarray(getattr(inputs.prompt, name))
            drawn = values[:, number] if name == "position_ids" else values[number]
            np.testing.assert_array_equal(drawn, row[name], name)
        assert len(row.get("source_pixels", ())) == count
        if not count:
            assert inputs.images is None
            continue
        np.testing.assert_array_equal(inputs.place[number], row["place"])
        for drawn, pixels in zip(inputs.pixels, row["source_pixels"], strict=True):
            np.testing.assert_array_equal(drawn[number], pixels)
        packed, own = (
            rows.pack(list(row["vit_pixels"])),
            slice(count * number, count * (number + 1)),
        )
        for field in dataclasses.fields(packed):
            drawn, wanted = getattr(inputs.images, field.name), getattr(packed, field.name)
            np.testing.assert_array_equal(drawn[own], wanted, field.name)


@pytest.mark.parametrize("branch", TRAINED_AS)
def test_each_branch_of_an_edit_is_what_its_task_was_trained_with(branch):
    """Eq. 6: nothing is Uncond, the source with the project's own words is Rec, and the request an edit."""
    encoder = requests_of()
    asked = [DrawingRequest(text, (opened(n),)) for n, text in enumerate(TEXTS)]
    rows = encoder.sized(asked, SIZE)
    trained = []
    for number, text in enumerate(TEXTS):
        # Rec shows a record's target; an edit its source, and draws its target.
        target = stored(number if branch is Branch.SOURCE else 7)
        example = make_example(TRAINED_AS[branch], Record("k", text, (stored(number),), target))
        trained.append(rows.encode_example(example, Bucket(*SIZE), 128))
    assert_rows_are(encoder.branch(branch, asked, SIZE, rows), rows, trained)


def test_the_pictures_of_a_composition_are_shown_as_in_training():
    """On one grid, that of the output; one of another aspect whole, on white."""
    encoder, shapes = requests_of(), ((50, 100), (60, 50))
    asked = [
        DrawingRequest(text, (opened(n, shapes[0]), opened(n + 5, shapes[1])))
        for n, text in enumerate(TEXTS)
    ]
    rows = encoder.sized(asked, SIZE)
    trained = []
    for number, text in enumerate(TEXTS):
        sources = stored(number, shapes[0]), stored(number + 5, shapes[1])
        example = make_example(Task.M_EDIT, Record("k", text, sources, stored(7)))
        trained.append(rows.encode_example(example, Bucket(*SIZE), 128))
    assert (trained[0]["source_pixels"][1][:, 0] == 255).all(), "white beside the upright one"
    assert_rows_are(encoder.branch(Branch.REQUEST, asked, SIZE, rows), rows, trained)


def test_a_caption_has_the_templates_words_in_training_and_in_drawing():
    encoder = requests_of(caption_template="draw {caption}, please")
    plain = requests_of()
    caption, edit = (
        DrawingRequest("a {red} star"),
        DrawingRequest("turn it", (Image.new("RGB", (9, 9)),)),
    )
    told = DrawingRequest("draw a {red} star, please")

    def tokens(encoder: RequestEncoder, branch: Branch, request: DrawingRequest) -> np.ndarray:
        rows = encoder.sized([request], SIZE)
        return encoder.branch(branch, [request], SIZE, rows).prompt.tokens

    def trained(encoder: RequestEncoder, task: Task, text: str) -> np.ndarray:
        rows = encoder.rows.sized([encoder.config.query_grid(*SIZE)], multiple=64)
        example = make_example(task, Record("k", text, (), stored(0)))
        assert rows.text_length(example) <= 128
        return rows.encode_example(example, Bucket(*SIZE), 128)["tokens"][None]

    wanted = tokens(plain, Branch.REQUEST, told)
    np.testing.assert_array_equal(tokens(encoder, Branch.REQUEST, caption), wanted)
    np.testing.assert_array_equal(trained(encoder, Task.T2I, caption.text), wanted)
    assert not np.array_equal(trained(plain, Task.T2I, caption.text), wanted)
    # Neither the empty turn nor what stands behind a picture has any.
    for branch in Branch:
        both = (tokens(one, branch, edit) for one in (encoder, plain))
        np.testing.assert_array_equal(*both)
    both = (trained(one, Task.UNCOND, "a star") for one in (encoder, plain))
    np.testing.assert_array_equal(*both)
