"""Plans without a compiler for TPUs: shares, what is kept on disk, and what does not fit."""

import collections
import dataclasses
import json
from fractions import Fraction
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from configs.wemmu_3b import STAGES
from tests.planning.samples import program, setting, torus
from wemmu_jax.data.pools import Pool
from wemmu_jax.data.schedule import SPAN, Schedule
from wemmu_jax.data.tasks import Task
from wemmu_jax.planning import memory, programs
from wemmu_jax.planning.chips import GIB
from wemmu_jax.planning.plan import branches, plan_stage
from wemmu_jax.planning.predict import Predictor, Times
from wemmu_jax.planning.programs import Compiled, Key, Library, Setting
from wemmu_jax.planning.shapes import model_flops, shares, squarest
from wemmu_jax.planning.table import table
from wemmu_jax.training.curriculum import load_config

pytestmark = pytest.mark.usefixtures("cpu_for_tpu")


# -- shapes


@pytest.mark.parametrize(("stage", "arities"), [("stage1", 2), ("stage3", 2), ("stage4", 3)])
def test_shares_are_those_of_the_mixture(stage, arities):
    planned = setting(stage)
    found = shares(planned)
    assert sum(found.values()) == pytest.approx(1)
    assert len(found) == 9 * arities
    assert len(found) * len(planned.config.data.text_lengths) <= 30
    weights = STAGES[stage]["data.mixture"]
    text_only = (weights["T2I"] + weights["Uncond"]) / sum(weights.values())
    of = collections.Counter()
    for shape, share in found.items():
        of[shape.arity] += share
    assert of[0] == pytest.approx(text_only)


def test_shares_are_how_often_the_schedule_deals_a_shape():
    members = (np.arange(30), np.arange(10))
    pools = [
        Pool(Task.T2I, 0, 0, Fraction(1), members, any_size=False),
        Pool(Task.REC, 1, 0, Fraction(1), members[::-1], any_size=False),
    ]
    mixture = {Task.T2I: 1.0, Task.REC: 3.0}
    schedule = Schedule(mixture, pools, bucket_count=2, rows=1, seed=0)
    count = 8 * SPAN
    dealt = collections.Counter((m.arity, m.bucket) for m in map(schedule.plan, range(count)))
    assert dealt == {shape: count * share for shape, share in schedule.shares.items()}
    assert schedule.shares[1, 0] == Fraction(3, 4) * Fraction(1, 4)


def test_a_square_stands_for_an_arity():
    shape = squarest(shares(setting()), 1)
    assert (shape.arity, shape.bucket.height, shape.bucket.width) == (1, 512, 512)
    assert [key.name for key in shape.programs] == ["accumulate", "encode target", "encode source"]


def test_data_sets_are_given_as_training_takes_them(tmp_path):
    """Entries, or YAML files of them; what of a set cannot be read counts as there."""
    lines = [{"image": f"{number}.png", "caption": "a star"} for number in range(4)]
    for line in lines:
        PIL.Image.new("RGB", (64, 64)).save(tmp_path / line["image"])
    lines.append({"image": "missing.png", "caption": "a star"})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"name": "a", "tasks": ["T2I", "Rec", "Uncond"], "type": "folder"}
    entry["folder"] = str(tmp_path)
    (tmp_path / "sets.yaml").write_text(json.dumps([entry]))
    some = {"data.bad_share": 0.5}
    found = shares(setting(**{"data.sources": (str(tmp_path / "sets.yaml"),)}, **some))
    assert found == shares(setting(**{"data.sources": (entry,)}, **some))
    assert {shape.bucket.log_aspect for shape in found} == {0} and sum(found.values()) == 1
    with pytest.raises(ValueError, match=r"'a': 1 of 5 records cannot be read"):
        shares(setting(**{"data.sources": (entry,)}))


def test_with_cached_latents_the_autoencoder_does_not_run():
    plain, cached = setting("stage4"), setting("stage4", **{"data.features": "latents"})
    assert [shape[:2] for shape in shares(cached)] == [shape[:2] for shape in shares(plain)]
    shape = squarest(shares(cached), 2)
    assert [key.name for key in shape.programs] == ["accumulate"]
    flops = [model_flops(one, squarest(shares(one), 2)) for one in (plain, cached)]
    assert flops[0].keys() - flops[1].keys() == {"DC-AE encode"}
    # What the host hands over.
    pixels = [one.run.pixels(shape.bucket, arity=2) for one in (plain, cached)]
    assert pixels[1].vit == pixels[0].vit
    assert (pixels[1].target.shape, pixels[1].target.dtype) == ((128, 32, 32, 32), np.float16)
    assert [one.shape for one in pixels[1].sources] == [(128, 37, 37, 32)] * 2


def test_branches_are_those_of_the_model_and_others_are_an_error():
    taken = branches(setting().sizes)
    assert taken("jit(step)/jvp(VisionTransformer)/layers/attention/cond", 2) == (28 / 32, 4 / 32)
    assert taken("jit(update)/cond", 2) == (0, 1)
    # Which part of causal queries a device has along `sequence`.
    assert taken("jit(step)/jvp(TextModel)/attention_splash/shard_map/cond", 4) == (1 / 4,) * 4
    with pytest.raises(ValueError, match="not known how often the 3 branches of 'jit"):
        taken("jit(step)/cond", 3)


# -- the library


class Fake:
    """A setting with programs that a CPU can compile."""

    draft = False

    def lower(self, key: Key) -> jax.stages.Lowered:
        return jax.jit(lambda x: x @ x).lower(jnp.zeros((len(key.name), len(key.name))))

    def fingerprint(self, lowered: jax.stages.Lowered) -> str:
        return Setting.fingerprint(setting(), lowered)


def test_what_was_compiled_once_is_never_compiled_again(tmp_path, monkeypatch):
    keys = [Key("update"), Key("zero")]
    first = Library(tmp_path).compile(Fake(), keys)
    with mock.patch.object(programs, "compile_program", side_effect=AssertionError):
        again = Library(tmp_path).compile(Fake(), keys)
    assert again == first
    assert first[keys[0]].memory["arguments"] == 6 * 6 * 4
    monkeypatch.setattr(programs.importlib.metadata, "version", lambda name: "2")
    with mock.patch.object(programs, "compile_program") as compiled:
        compiled.return_value = Compiled("new", 0.0, {})
        assert Library(tmp_path).compile(Fake(), keys)[keys[0]].text == "new"


def test_a_draft_is_compiled_with_the_least_effort_and_kept_apart(tmp_path, monkeypatch):
    draft, asked = dataclasses.replace(setting(), draft=True), []

    class Lowered:
        def as_text(self):
            return "the same"

        def compile(self, compiler_options):
            asked.append(compiler_options)
            return jax.jit(jnp.sin).lower(1.0).compile()

    for one in (setting(), draft, setting()):
        monkeypatch.setattr(Setting, "lower", lambda self, key: Lowered())
        Library(tmp_path).compile(one, [Key("zero")])
    assert asked == [None, {"exec_time_optimization_effort": -1.0}]


def test_a_damaged_file_is_named(tmp_path):
    library = Library(tmp_path)
    library.put("a", Compiled("text", 1.0, {}))
    assert library.get("a").text == "text"
    (tmp_path / "a.json.gz").write_bytes((tmp_path / "a.json.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.json\.gz: damaged"):
        library.get("a")


def test_a_program_of_other_flags_is_another(monkeypatch):
    lowered = jax.jit(jnp.sin).lower(jnp.zeros(3))
    before = setting().fingerprint(lowered)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    assert setting().fingerprint(lowered) != before


def test_the_longest_texts_are_planned():
    assert setting(**{"data.text_lengths": (128, 512)}).text_length == 512


# -- a plan from programs that are not the model's


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Keys of the config -> a stage whose every program is the sample `loops`."""
    made = {"temporaries": GIB, "outputs": 0, "aliased": 0}
    monkeypatch.setattr(
        Library,
        "compile",
        lambda library, setting, keys, processes: {key: Compiled("", 2.0, made) for key in keys},
    )
    monkeypatch.setattr(
        "wemmu_jax.planning.plan.read_program", lambda text, taken: program("loops")
    )
    return lambda draft=False, **changed: plan_stage(
        dataclasses.replace(setting("stage4", **{"mesh.fsdp": 8, **changed}), draft=draft),
        Library(tmp_path),
    )


@pytest.fixture
def planned(plan):
    """The config as it is."""
    return plan()


def test_cached_latents_save_what_encoding_takes(plan):
    """Every program is the same here, so a micro-batch costs one where it cost two and its sources."""
    plain, cached = plan(), plan(**{"data.features": "latents"})
    one = Predictor(torus(2, 2, cores=2)).times(program("loops"))
    for shape, saved in zip(plain.shapes, cached.shapes, strict=True):
        if shape.shape == shape.compiled:
            runs = shape.times.raw_exposed / one.raw_exposed
            assert runs == pytest.approx(2 + shape.shape.arity)
            assert saved.times.raw_exposed == pytest.approx(one.raw_exposed)
    assert not any("encode" in one.name for one in cached.programs)
    assert any("data.features" in said for said in cached.assumptions)
    batches = [one.memory["micro-batches"] for one in (plain, cached)]
    assert batches[1] < batches[0]


def test_a_draft_says_so_and_tells_no_times(plan):
    full, draft = table(plan()), table(plan(draft=True))
    for said in ("\npredicted", "raw, overlapped ms", "raw ms", "\npart ", "- without cycles"):
        assert said in full and said not in draft
    assert "- a draft" in draft and "- a draft" not in full
    assert [line for line in draft.splitlines() if "GiB" in line] == [
        line.partition("  raw ms")[0] for line in full.splitlines() if "GiB" in line
    ]


def test_a_step_is_its_micro_batches_and_what_runs_once(planned):
    one = dataclasses.astuple(Predictor(torus(2, 2, cores=2)).times(program("loops")))
    sources = sum(shape.share * shape.shape.arity for shape in planned.shapes)
    scale = sum(
        shape.share
        * (2 + shape.shape.arity)
        * sum(shape.model_flops.values())
        / sum(next(s for s in planned.shapes if s.shape == shape.compiled).model_flops.values())
        for shape in planned.shapes
    )
    assert scale == pytest.approx(2 + sources, rel=0.05) and scale != 2 + sources
    expected = [seconds * (planned.micro_batches * scale + 2) for seconds in one]
    assert dataclasses.astuple(planned.times) == pytest.approx(expected)
    by_shape = sum((one.times * one.share for one in planned.shapes), Times())
    assert by_shape.raw_exposed * planned.micro_batches == pytest.approx(expected[1] - 2 * one[1])


def test_hours_days_and_mfu_follow_from_the_step(planned):
    seconds = planned.times.capped_exposed
    assert planned.days["capped_exposed"] == pytest.approx(seconds * planned.steps / 86400)
    could = seconds * planned.devices * planned.chip.peak
    assert planned.mfu["capped_exposed"] == pytest.approx(planned.model_flops / could)
    assert planned.model_flops / planned.rows / planned.micro_batches == pytest.approx(
        80.2e12, rel=0.05
    )


def test_memory_is_what_lies_there_and_the_largest_program(planned):
    kinds = planned.memory
    weights = kinds["trainable weights"]
    assert 8 * weights == pytest.approx(18.0e9, rel=0.01)  # the design's table, stages 2 to 4
    assert kinds["optimizer"] == pytest.approx(2 * weights, rel=1e-3)
    assert kinds["gradients"] == weights and kinds["temporaries"] == GIB
    assert planned.spare == planned.chip.memory - sum(kinds.values())


def test_bytes_a_device_are_those_of_its_shards():
    run = setting(**{"mesh.fsdp": 4}).run
    trainable = memory.bytes_a_chip(run.trainable)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(run.trainable))
    assert whole / 4 < trainable < 1.01 * whole / 4


def test_rows_a_device_are_those_of_its_part_of_the_batch(plan):
    said = table(plan(**{"batch.rows": 64, "mesh.tensor": 2, "mesh.fsdp": 4}))
    assert "x 64 rows" in said and ", 16 rows a device" in said


def test_stages_that_differ_in_the_seed_alone_share_programs():
    """Down to the seed, which is a constant of the programs."""
    two, three = setting("stage2"), setting("stage3")
    assert (two.run.trainer.stage.seed, three.run.trainer.stage.seed) == (0, 0)
    assert load_config("configs/wemmu_3b.py:stage3").seed == 3
