"""The demo's own parts; the whole of it is `make demo`."""

import numpy as np
import pytest
from PIL import Image

from configs.tiny import get_config, photographs
from wemmu_jax.data.sources import build_feeds
from wemmu_jax.data.tasks import Task
from wemmu_jax.demo import photographs as photographs_lib
from wemmu_jax.demo.gallery import curve, write_gallery


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs")
    photographs_lib.write_photographs(path)
    return path


def test_photographs_feed_captions_and_edits(folder):
    feeds = {feed.task: feed.source for feed in build_feeds(photographs(str(folder)))}
    assert set(feeds) == {Task.T2I, Task.REC, Task.S_EDIT}
    count = len(photographs_lib.CAPTIONS) * len(photographs_lib.ASPECTS) * photographs_lib.CROPS
    sources = feeds[Task.T2I].source_counts().tolist()
    assert sources.count(0) == count and sources.count(1) == count * len(photographs_lib.EDITS)


def test_an_edited_photograph_is_the_edit_of_its_source(folder):
    source = build_feeds(photographs(str(folder)))[-1].source
    record = next(r for r in map(source.__getitem__, range(1, 9)) if r.text.startswith("Invert"))
    size = record.target.height, record.target.width
    np.testing.assert_array_equal(record.target.load(*size), 255 - record.sources[0].load(*size))


def test_photographs_have_all_the_buckets_aspects(folder):
    source = build_feeds(photographs(str(folder)))[0].source
    aspects = source.sizes()[:, 0] / source.sizes()[:, 1]
    assert {round(float(aspect), 1) for aspect in aspects} == {0.5, 1.0, 2.0}


def test_every_stage_is_fed(folder):
    for number in range(1, 5):
        config = get_config(f"stage{number}")
        entries = [*map(dict, config.data.sources), *photographs(str(folder))]
        fed = {feed.task.value for feed in build_feeds(entries)}
        assert {task for task, weight in config.data.mixture.items() if weight} <= fed


def test_the_gallery_holds_what_it_is_given(tmp_path):
    picture = Image.fromarray(np.full((4, 6, 3), 7, np.uint8))
    page = tmp_path / "gallery.html"
    write_gallery(
        page,
        note="a <note>",
        losses={"stage1": [3.0, 2.0, 1.0]},
        sections={"Generate": [("a circle & a square", [picture, picture])]},
        scores={"T2I": {"counting": 0.25}},
    )
    text = page.read_text()
    assert text.count("<img") == 2
    for part in ("a &lt;note&gt;", "a circle &amp; a square", "3.000 to 1.000 in 3 steps", "0.25"):
        assert part in text


def test_a_flat_curve_is_drawn():
    assert "nan" not in curve("stage1", [1.0, 1.0])
