"""Time from programs."""

import dataclasses

import pytest

from tests.planning.samples import LAYER_FLOPS, ROWS, V5P, WIDTH, predictor, program, torus
from wemmu_jax.planning.collectives import Collective
from wemmu_jax.planning.hlo import Shape
from wemmu_jax.planning.kernels import kernel_flops
from wemmu_jax.planning.predict import CAP, KERNEL_SPEED, Times, phase
from wemmu_jax.planning.program import Operation, Region, Work

NAMES = [field.name for field in dataclasses.fields(Times)]


def with_bytes(region: Region, factor: int) -> Region:
    """The same with so many times the bytes in every collective."""
    operations = []
    for one in region.operations:
        if one.collective:
            more = dataclasses.replace(one.collective, bytes=factor * one.collective.bytes)
            one = dataclasses.replace(one, collective=more)
        operations.append(one)
    inner = tuple((times, with_bytes(inner, factor)) for times, inner in region.inner)
    return Region(tuple(operations), inner)


def test_a_large_product_runs_at_nine_tenths_of_peak():
    seconds = dataclasses.astuple(predictor().times(program("product")))
    assert seconds == pytest.approx([2 * 8192**3 / (0.9 * V5P.peak)] * 4, rel=0.1)


@pytest.mark.parametrize("name", ["loops", "overlapped"])
def test_more_collective_bytes_predict_slower(name):
    region = program(name)
    one, two, many = (predictor().times(with_bytes(region, n)) for n in (1, 2, 100))
    for exposed in ("raw_exposed", "capped_exposed"):
        assert getattr(one, exposed) < getattr(two, exposed)
    for each in NAMES:
        assert getattr(one, each) < getattr(many, each)


@pytest.mark.parametrize("name", ["loops", "overlapped", "kernels"])
def test_the_four_times_bound_each_other(name):
    times = predictor().times(program(name))
    assert times.capped_overlapped <= times.raw_overlapped <= times.raw_exposed
    assert times.capped_overlapped <= times.capped_exposed <= times.raw_exposed
    wire = predictor().predict(program(name)).works.get("collective", 0)
    assert times.raw_exposed - times.raw_overlapped <= wire


def test_an_overlapped_collective_hides_only_behind_its_own_pass():
    """Two regions of 1 ms: all the work in one and all the transfer in the other gives 2 ms, not 1."""
    work = Operation("fusion", "a", "", Work.CORE, cycles=int(V5P.clock / 1000))
    moved = Collective("all-reduce", "bf16[1]", int(1e-3 * 2 * V5P.link * 4 / 6), "{{0,1,2,3}}")
    wire = Operation("all-reduce", "b", "", Work.COLLECTIVE, collective=moved)
    apart = predictor().times(Region((wire,), ((1, Region((work,))),)))
    together = predictor().times(Region((wire, work)))
    assert apart.raw_overlapped == pytest.approx(2e-3)
    assert together.raw_overlapped == pytest.approx(1e-3)
    assert together.raw_exposed == pytest.approx(2e-3)


@pytest.mark.parametrize("name", ["loops", "overlapped", "kernels", "product"])
def test_the_parts_add_up_to_the_whole(name):
    prediction = predictor().predict(program(name))
    parts = sum(prediction.parts.values()) + prediction.works.get("collective", 0)
    assert parts == pytest.approx(prediction.times.raw_exposed, rel=0.1)


def test_a_kernel_never_costs_nothing():
    kernels = [one for _, one in program("kernels").walk() if one.work is Work.KERNEL]
    assert len(kernels) == 4
    for one in kernels:
        assert predictor().seconds(one, capped=True) >= one.bytes / V5P.bandwidth > 0


def test_a_kernel_that_says_its_flops_is_believed():
    [said] = [one for _, one in program("kernels").walk() if one.name == "said"]
    assert predictor().seconds(said, capped=False) == 1e12 / (KERNEL_SPEED * V5P.peak)


def test_flops_of_attention_kernels_come_from_their_operands():
    flops = {one.name: kernel_flops(one) for _, one in program("kernels").walk()}
    product = 2 * 4 * 512 * 512 * 128  # of 4 heads
    assert flops["splash_mha_fwd_residuals"] == 2 * product
    assert flops["splash_mha_dq_no_residuals"] == 3 * product


@pytest.mark.parametrize(("size", "cycles"), [(3, 9), (5, 25)])
def test_a_depthwise_kernel_takes_what_its_vectors_take(size, cycles):
    """A matrix unit would be done in no time, and memory sooner."""
    x, filters = Shape("bf16", (6, 16, 16, 11200)), Shape("f32", (size, size, 11200))
    kernel = Operation("custom-call", "depthwise", "", Work.KERNEL, bytes=4 * x.size, flops=1)
    kernel = dataclasses.replace(kernel, operands=(x, filters))
    vectors = x.size / 1024
    expected = pytest.approx(1.16 * cycles * vectors / V5P.clock)
    assert predictor().seconds(kernel, capped=False) == expected
    assert predictor().seconds(kernel, capped=True) > 3 * kernel.bytes / V5P.bandwidth


def test_an_unknown_kernel_is_named_as_such():
    prediction = predictor().predict(program("kernels"))
    known = {name: known for name, (_, _, known) in prediction.kernels.items()}
    assert [name for name in known if not known[name]] == ["unsaid"]


def test_only_what_holds_no_product_is_capped():
    slow = {"cycles": int(V5P.clock), "bytes": int(V5P.bandwidth / 10)}
    plain, product = (
        Operation("fusion", "a", "", Work.CORE, flops=flops, **slow) for flops in (0, 1)
    )
    assert predictor().seconds(plain, capped=True) == pytest.approx(0.1 / CAP)
    assert predictor().seconds(plain, capped=False) == pytest.approx(1)
    assert predictor().seconds(product, capped=True) == pytest.approx(1)


def test_copies_run_beside_the_core_and_the_hosts_are_slow():
    """Three layers' work is hidden behind their way to the host and back."""
    prediction = predictor().predict(program("offloaded"))
    moved = 6 * 2 * ROWS * WIDTH / V5P.host
    assert prediction.works["copy"] == pytest.approx(moved, rel=0.1)
    assert prediction.works["core"] < moved
    wire = prediction.works["collective"]
    assert prediction.times.raw_exposed - wire == pytest.approx(moved, rel=0.2)


def test_what_has_no_cycles_takes_its_bytes():
    bare = Operation("concatenate", "a", "", Work.UNPRICED, bytes=3 * 10**9)
    assert predictor().seconds(bare, capped=False) == pytest.approx(3e9 / CAP / V5P.bandwidth)
    region = Region((), ((5, Region((bare,))),))
    assert predictor().predict(region).unpriced["concatenate"] == pytest.approx(
        5 * predictor().seconds(bare, capped=False)
    )


def test_passes_are_told_apart():
    assert phase("jit(step)/jvp(DecoderStack)/while/body/dot_general") == "forward"
    assert phase("jit(step)/transpose(jvp(DecoderStack))/dot_general") == "backward"
    again = "jit(step)/transpose(jvp(DecoderStack))/checkpoint/rematted_computation/dot_general"
    assert phase(again) == "recompute"


def test_flops_of_a_prediction_are_those_of_the_text():
    assert predictor().predict(program("loops")).flops == 39 * LAYER_FLOPS


# -- where devices sit


def moved(kind: str, size: float, group: tuple[int, ...]) -> Collective:
    return Collective(kind, "bf16[1]", size, "{{" + ",".join(map(str, group)) + "}}")


def test_a_group_uses_the_links_along_which_it_lies():
    pod = torus(4, 4, 8)  # the last two axes of 4 are closed, like that of 8
    assert pod.bandwidth(range(8)) == 2 * V5P.link  # a whole ring
    assert pod.bandwidth(range(4)) == V5P.link  # half of it
    assert pod.bandwidth(range(32)) == 4 * V5P.link  # two whole rings
    assert torus(2, 2).bandwidth(range(4)) == 2 * V5P.link  # too short to be closed
    assert (
        torus(2, 2, 4).bandwidth(range(4)) == V5P.link
    )  # closed in a whole cube of 4 x 4 x 4 alone


def test_collectives_take_the_time_of_their_bytes():
    pod, group = torus(4, 4, 8), tuple(range(8))
    gather = pod.seconds(moved("all-gather", 1e9, group))
    assert gather == pytest.approx(1e9 * 7 / 8 / (2 * V5P.link))
    assert pod.seconds(moved("reduce-scatter", 1e9, group)) == gather
    assert pod.seconds(moved("all-reduce", 1e9, group)) == pytest.approx(2 * gather)
    assert pod.seconds(moved("collective-permute", 1e9, (0, 1))) == 1e9 / V5P.link


def test_between_slices_a_slice_shares_the_work():
    two = torus(2, 2, slices=2)
    inside = two.seconds(moved("all-reduce", 1e9, (0, 1, 2, 3)))
    across = two.seconds(moved("all-reduce", 1e9, tuple(range(8))))
    assert across - inside == pytest.approx(2 * 1e9 / 4 / 2 / V5P.network)
    assert two.seconds(moved("collective-permute", 1e9, (0, 4))) == 1e9 / V5P.network


@pytest.mark.parametrize("pairs", ["{{0,1},{3,4},{6,7}}", "{{3,4},{0,1},{6,7}}"])
def test_a_permutation_takes_as_long_as_its_slowest_pair(pairs):
    """Of two slices of four, whatever the order in which XLA lists them; inside a slice all pairs are alike."""
    two = torus(2, 2, slices=2)
    assert two.seconds(Collective("collective-permute", "bf16[1]", 1e9, pairs)) == 1e9 / V5P.network
    inside = Collective("collective-permute", "bf16[1]", 1e9, pairs.replace("{3,4}", "{2,3}"))
    assert two.seconds(inside) == 1e9 / V5P.link


def test_pairs_that_cannot_be_read():
    odd = Collective("collective-permute", "bf16[1]", 1e9, "[4,2]<=[8]")
    with pytest.raises(ValueError, match=r"cannot read who takes part .*\[4,2\]"):
        _ = odd.pairs


def test_devices_of_one_chip_are_neighbours():
    pairs = torus(2, 2, cores=2)
    assert pairs.bandwidth((0, 1)) == V5P.link
    assert (pairs.chips, torus(2, 2, slices=3).chips) == (4, 12)
