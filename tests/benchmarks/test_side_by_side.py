"""The comparison with torch, at a size of seconds: parity of every row, what is timed, what is written."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import torch

from benchmarks.side_by_side import __main__ as command
from benchmarks.side_by_side import pair, timing
from benchmarks.side_by_side.sizes import CPU, GPU_512, GPU_1024, SMALL, SMALL_GPU
from benchmarks.side_by_side.table import BOUND, MFU, PEAK, SPEED, Table, bound, write_section
from benchmarks.side_by_side.timing import Result, Row, Side, measure
from tests.conftest import unoptimised
from wemmu_jax.models.wemmu.config import BridgeConfig
from wemmu_jax.models.wemmu.published import published_wemmu

SLOW = ("edit", "stage 2 step", "DiT training step")  # what the other rows have parts of


@pytest.fixture(autouse=True)
def _quick():
    with unoptimised():
        yield


def slow_ones(names: tuple[str, ...]) -> list:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.mark.parametrize("name", slow_ones(command.ROWS))
def test_every_row_agrees_with_torch(name):
    result = command.run_row(name, SMALL, rounds=0, rungs=("eager",))
    assert 0 <= result.error < 5e-4 and result.flops > 0
    assert result.pictures == (SMALL.pictures if name in ("T2I", "edit") else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", command.ROWS)
def test_every_row_the_way_a_gpu_takes(name):
    """bfloat16 after a check in float32, states in turns, layers compiled one by one and recomputed."""
    result = command.run_row(name, SMALL_GPU, rounds=2)
    assert all(len(times) == 2 and min(times) > 0 for times in result.seconds.values())
    rungs = {"eager"} if name == PEAK else {"eager", "compiled"}
    assert {"ours", *rungs} <= result.seconds.keys()


def test_training_starts_from_the_same_weights_in_every_turn():
    row = command.row_of("DiT training step")(pair.Pair(SMALL))
    losses = []
    for side in (row.theirs["eager"], row.ours, row.theirs["eager"], row.ours):
        side.start()
        losses.append([float(side.run()[0]) for _ in range(2)])
        side.stop()
    assert losses[0] == losses[2] and losses[1] == losses[3]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][1]


@pytest.mark.parametrize(("name", "leaf"), [("DC-AE decode", "dc_ae"), ("T2I", "position_mlp")])
def test_a_row_that_does_not_agree_is_not_timed(name, leaf, monkeypatch):
    right = pair.Pair.params

    def wrong(self, *names):
        params = right(self, *names)
        return {**params, leaf: jax.tree.map(lambda x: np.float32(1.01) * x, params[leaf])}

    monkeypatch.setattr(pair.Pair, "params", wrong)
    monkeypatch.setattr(timing, "_turn", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="eager: relative error"):
        command.run_row(name, SMALL, rounds=1, rungs=("eager",))


def test_gpu_sizes_are_the_real_ones():
    assert GPU_512.config.vlm.text == published_wemmu(BridgeConfig()).vlm.text
    for sizes in (GPU_512, GPU_1024):
        found, real = sizes.config, published_wemmu(BridgeConfig())
        assert (found.vlm.vision, found.dit, found.dc_ae) == (
            real.vlm.vision,
            real.dit,
            real.dc_ae,
        )
        assert (sizes.product, sizes.training_mfu, sizes.solver_steps) == (8192, 0.46, 20)
    assert (GPU_512.grid, GPU_1024.grid) == ((18, 18), (37, 37))
    assert GPU_1024.pictures > 1 and GPU_1024.pictures_per_second == 2.4
    widths = dataclasses.replace(CPU.config.vlm.text, num_hidden_layers=36, vocab_size=151_936)
    assert widths == real.vlm.text
    assert GPU_512.exact.dtype == "float32" and SMALL.exact is SMALL


# -- timing


def fake(seconds: list[float], clock, name: str, order: list[str], value: float = 1.0) -> Side:
    """A side whose runs take the next of `seconds`, or the last for ever."""
    left = list(seconds)

    def run():
        order.append(name)
        clock.now += left.pop(0) if len(left) > 1 else left[0]
        return torch.full((2,), value)

    return Side(run)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_sides_take_turns_and_compilation_is_not_their_time(clock):
    order = []
    row = Row(
        ours=fake([9, 2], clock, "o", order),
        theirs={
            "eager": fake([4], clock, "e", order),
            "compiled": fake([50, 1], clock, "c", order),
        },
        compared=lambda ours, theirs: [(ours, theirs)],
        tolerance=0.0,
        flops=1e12,
        control=(fake([3], clock, "x", order), fake([2], clock, "y", order)),
    )
    result = measure(row, rounds=3)
    assert result.seconds == {
        "ours": [2, 2, 2],
        "eager": [4, 4, 4],
        "compiled": [1, 1, 1],
        "control ours": [3, 3, 3],
        "control torch": [2, 2, 2],
    }
    assert result.first == {"ours": 9, "eager": 4, "compiled": 50}
    assert result.best == "compiled" and result.ratio("ours", "compiled") == (2, 2, 2)
    assert "".join(order) == "oec" + "ooeeccxxyy" + "oecxy" + "yxceo" + "oecxy"


def test_quick_programs_are_repeated(clock):
    order = []
    quick = {name: fake([0.0625], clock, name, order) for name in ("ours", "eager")}
    row = Row(quick["ours"], {"eager": quick["eager"]}, lambda *_: [(1.0, 1.0)], 0.0, 1.0)
    result = measure(row, rounds=1, rungs=("eager",))
    assert result.seconds["ours"] == [0.0625]
    assert order.count("ours") == 1 + 2 + 4  # which is the first whole number past 0.2 s / 0.0625 s


def test_states_apart_are_never_there_together(clock, monkeypatch):
    monkeypatch.setattr(
        timing, "free", lambda: None
    )  # which takes a second in a process full of tests
    there, most = {"e"}, []  # where torch's modules have been built

    def side(name):
        return Side(
            lambda: most.append(set(there)) or torch.ones(1),
            start=lambda: there.add(name),
            stop=lambda: there.discard(name),
        )

    row = Row(side("o"), {"eager": side("e")}, lambda a, b: [(a, b)], 0.0, 1.0, apart=True)
    measure(row, rounds=2, rungs=("eager",))
    assert not there and all(len(found) == 1 for found in most) and len(most) > 6


# -- what is written

RESULT = Result(
    error=3e-7,
    first={"ours": 9.0, "eager": 1.0, "compiled": 30.0},
    seconds={"ours": [1.2, 1.2], "eager": [2.0, 2.0], "compiled": [1.0, 1.0]},
    flops=1.2e12,
)
CONTROLLED = dataclasses.replace(
    RESULT, seconds={**RESULT.seconds, "control ours": [1.2, 1.2], "control torch": [1.0, 1.0]}
)


def made(sizes, peak: float | str = "", **results: Result | str) -> Table:
    """A table whose device can do `peak` FLOP/s, as the faster library found; or why nobody knows."""
    found = dict(results)
    if peak:
        measured = Result(0.0, {"ours": 1.0}, {"ours": [2.0], "eager": [1.0]}, flops=peak)
        found[PEAK] = peak if isinstance(peak, str) else measured
    return Table(sizes, found)


def test_a_row_misses_its_bound_or_meets_that_of_its_control():
    assert bound(RESULT, "cpu") == 1.0 and bound(CONTROLLED, "cpu") == pytest.approx(1.26)
    table = made(CPU, peak=4e12, a=RESULT, b=CONTROLLED)
    assert (table.missed("a"), table.missed("b")) == ({BOUND}, set())
    assert "| 1.20 | 1.20 to 1.20 |  | 1.00 **missed** | 1 | 0.25 |  | 9, 30 | 3e-07 |" in (
        table.line("a")
    )
    assert "| 1.20 | 1.20 to 1.20 | 1.20 | 1.26 | 1 | 0.25 |" in table.line("b")


def test_on_a_gpu_no_row_may_be_slower_than_torch():
    """Whatever the bare products take."""
    table = made(GPU_512, ViT=CONTROLLED)
    assert bound(CONTROLLED, "cuda") == 1.0 and table.missed("ViT") == {BOUND}
    assert "| 1.20 | 1.20 to 1.20 | 1.20 | 1.00 **missed** |" in table.line("ViT")
    assert made(CPU, ViT=CONTROLLED).missed("ViT") == set()


FAST = dataclasses.replace(RESULT, seconds={"ours": [1.0], "eager": [2.0]}, pictures=4)


def test_training_is_held_against_the_peak_that_was_measured():
    step = {"stage 1 step": FAST, "DiT training step": FAST}
    enough, short = made(GPU_512, peak=2.6e12, **step), made(GPU_512, peak=2.7e12, **step)
    assert enough.mfu("stage 1 step") == pytest.approx(1.2 / 2.6)
    assert (enough.missed("stage 1 step"), short.missed("stage 1 step")) == (set(), {MFU})
    assert "| 0.46 of 0.46 |" in enough.line("stage 1 step")
    assert "| 0.44 of 0.46 **missed** |" in short.line("stage 1 step")
    assert short.missed("DiT training step") == set() and short.missed(PEAK) == set()
    assert "Peak: 2.7 TFLOP/s" in short.said_of_peak and "8192 x 8192" in short.said_of_peak
    assert made(CPU, peak=1e15, **step).missed("stage 1 step") == set()


def test_a_peak_that_could_not_be_measured():
    table = made(GPU_512, peak="failed, code 1: why", **{"stage 1 step": FAST, "T2I": FAST})
    assert (table.missed("peak"), table.missed("stage 1 step"), table.missed("T2I")) == (
        {"peak"},
        {MFU},
        set(),
    )
    assert "| ? of 0.46 **missed** |" in table.line("stage 1 step") and table.peak is None


def test_pictures_a_second():
    slow = dataclasses.replace(FAST, seconds={"ours": [1.7], "eager": [2.0]})
    table = made(GPU_1024, peak=1e12, T2I=FAST, edit=slow)
    assert table.missed("T2I") == set() and "| 4.00 of 2.4 |" in table.line("T2I")
    assert table.missed("edit") == set() and "| 2.35 |" in table.line("edit")
    table = made(GPU_1024, peak=1e12, T2I=slow)
    assert table.missed("T2I") == {SPEED} and "| 2.35 of 2.4 **missed** |" in table.line("T2I")
    assert made(GPU_512, peak=1e12, T2I=slow).missed("T2I") == set()


def test_only_the_marked_section_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n<!-- begin cpu -->\nold\n<!-- end cpu -->\n## B\n")
    table = made(CPU, ViT=RESULT, T2I="failed, code 1: why")
    write_section(page, "cpu", table.text("Here."))
    text = page.read_text()
    assert text.startswith("# A\n<!-- begin cpu -->\n\nHere.\n") and "old" not in text
    assert text.endswith("\n<!-- end cpu -->\n## B\n") and "| T2I | failed, code 1: why |" in text
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 4
    with pytest.raises(ValueError, match="expected the marks <!-- begin gpu-512 -->"):
        write_section(page, "gpu-512", "")


def test_the_page_has_room_for_every_table(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text((pathlib.Path(__file__).parents[2] / "docs/performance.md").read_text())
    for sizes in (CPU, GPU_512, GPU_1024):
        write_section(page, sizes.name, f"results of {sizes.name}")
        assert f"results of {sizes.name}" in page.read_text()


def test_the_command(tmp_path, capsys, monkeypatch):
    page, spawn, asked = tmp_path / "page.md", command._spawn, []
    page.write_text("<!-- begin small --><!-- end small -->")
    peak = dataclasses.asdict(Result(0.0, {"ours": 1.0}, {"ours": [2.0], "eager": [1.0]}, 1e15))

    def spawned(args, name, **more):
        asked.append(name)
        return peak.copy() if name == PEAK else spawn(args, name, **more)

    monkeypatch.setattr(command, "_spawn", spawned)  # a process less
    words = ["--small", "--only", "DC-AE decode", "--eager", "--rounds", "2", "--write", str(page)]
    assert command.main(words) in (0, 1)  # who is faster depends on the hour
    printed, text = capsys.readouterr().out, page.read_text()
    assert "| DC-AE decode | " in printed and "torch" in text
    assert asked == [PEAK, "DC-AE decode"], "MFU needs the peak, whatever is asked for"
    for said in (printed, text):
        assert "Peak: 1000 TFLOP/s" in said and "| MFU | pictures/s |" in said
    assert "| 0.00 |" in text  # of so much


@pytest.mark.parametrize("words", [["cpu", "--only", "DC-EA"], ["gpu-512", "--only", "stage 2"]])
def test_a_row_that_is_not_there(words):
    """Nor may a page's table be replaced by one without rows."""
    with pytest.raises(SystemExit, match=f"no row of --sizes {words[0]} has such a name"):
        command.main(["--sizes", *words, "--write", "none.md"])


def test_a_device_that_is_not_there():
    command.check_device("cpu", "cpu", False)
    command.check_device("cuda", "gpu", True)
    with pytest.raises(RuntimeError, match=r"jax runs on cpu, and torch sees no GPU\. Install"):
        command.check_device("cuda", "cpu", False)
    with pytest.raises(RuntimeError, match="set JAX_PLATFORMS=cpu"):
        command.check_device("cpu", "gpu", True)
