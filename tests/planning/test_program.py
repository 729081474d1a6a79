"""Texts of real TPU programs: loops, conditionals, collectives, products and kernels are all found and counted."""

import collections
import re

import pytest

from tests.planning.samples import (
    DEVICES,
    INNER,
    LAYER_FLOPS,
    OUTER,
    ROWS,
    WEIGHT_BYTES,
    WIDTH,
    program,
    text,
)
from wemmu_jax.planning.collectives import first_group
from wemmu_jax.planning.hlo import parse
from wemmu_jax.planning.program import Work, read_program
from wemmu_jax.planning.trips import trip_count

LAYERS = OUTER * INNER


def loops_of(module):
    return [
        (scope, one)
        for scope in module.computations.values()
        for one in scope
        if one.opcode == "while"
    ]


def test_trip_counts_are_those_of_the_scans():
    module = parse(text("loops"))
    counts = [trip_count(module, scope, loop) for scope, loop in loops_of(module)]
    assert sorted(counts) == [OUTER, OUTER, INNER, INNER]


def test_a_loop_that_no_constant_ends_is_an_error():
    changed = text("loops").replace("direction=LT", "direction=EQ")
    with pytest.raises(ValueError, match="cannot read how often loop"):
        read_program(changed, lambda op_name, count: (0, 1))


def test_a_loop_that_begins_behind_a_barrier():
    """XLA may keep the values of a loop together before it; what it cannot be followed through is an error."""
    for opcode in ("opt-barrier", "custom-call"):
        begins = re.compile(r"^( *)(%[\w.\-]+) = (.*) while\((%[\w.\-]+)\)", re.MULTILINE)
        behind = rf"\1\2.b = \3 {opcode}(\4)\n\1\2 = \3 while(\2.b)"
        module = parse(begins.sub(behind, text("loops")))
        [(scope, loop), *_] = loops_of(module)
        if opcode == "opt-barrier":
            assert trip_count(module, scope, loop) in (OUTER, INNER)
        else:
            with pytest.raises(ValueError, match="custom-call is no tuple"):
                trip_count(module, scope, loop)


def test_a_collective_of_another_kind_is_an_error():
    changed = re.sub(r" all-gather(-start|-done)?\(", r" collective-broadcast\1(", text("loops"))
    with pytest.raises(ValueError, match=r"collective-broadcast.*nothing is known"):
        read_program(changed, lambda op_name, count: (0, 1))


def test_products_of_nested_loops_and_of_the_branch_taken():
    """Forward, and gradients of inputs and of weights: three products a layer, three more in the true branch."""
    loops, branch = 3 * LAYERS * LAYER_FLOPS, 3 * LAYER_FLOPS
    assert program("loops", (1, 0)).flops == loops
    assert program("loops", (0, 1)).flops == loops + branch
    assert program("loops", (0.75, 0.25)).flops == loops + branch / 4


def test_the_rule_for_branches_sees_where_the_conditional_is():
    seen = []
    read_program(text("loops"), lambda op_name, count: seen.append((op_name, count)) or (0, 1))
    assert all("/cond" in name and count == 2 for name, count in seen)
    assert {"transpose" in name for name, _ in seen} == {True, False}


def collectives(name: str) -> dict[str, tuple[float, float]]:
    """Kind -> how many of whole weights, and their bytes."""
    counts, sizes = collections.Counter(), collections.Counter()
    for times, one in program(name).walk():
        if one.collective and one.collective.bytes > 2:
            assert len(one.collective.group) == DEVICES
            counts[one.collective.kind] += times
            sizes[one.collective.kind] += times * one.collective.bytes
    return {kind: (counts[kind], sizes[kind]) for kind in counts}


def test_weights_are_gathered_and_their_gradients_scattered_once_a_layer():
    """Every device's gradients come as an all-reduce that XLA has fused with the slice that the device keeps."""
    assert "reduce-scatter(" not in text("loops")
    layers = LAYERS + 1  # and the branch
    expected = (layers, layers * WEIGHT_BYTES)
    assert collectives("loops") == {"all-gather": expected, "reduce-scatter": expected}


def test_an_asynchronous_collective_counts_once():
    """It stands in three fusions: its start, the product that it runs beside, its end."""
    assert text("overlapped").count("all-gather(") == 4
    assert collectives("overlapped") == {"all-gather": (2, 2 * 2 * 4096**2)}


def test_the_product_beside_an_asynchronous_collective_is_not_lost():
    assert program("overlapped").flops == 2 * 2 * 8192 * 4096**2


def test_kernels_are_found_with_what_they_say():
    kernels = {one.name: one for _, one in program("kernels").walk() if one.work is Work.KERNEL}
    assert set(kernels) == {
        "splash_mha_fwd_residuals",
        "splash_mha_dq_no_residuals",
        "said",
        "unsaid",
    }
    assert kernels["said"].flops == 10**12 and kernels["unsaid"].flops == 0
    assert kernels["unsaid"].bytes == 2 * 4 * 512 * 128 * 2


def test_what_goes_to_the_host_and_back():
    """Rows of every layer once each way, in loops whose first or last pass XLA has taken out."""
    copies = collections.Counter()
    for times, one in program("offloaded").walk():
        if one.to_host:
            assert one.work is Work.COPY
            copies[one.opcode] += times * one.bytes
    size = OUTER * 2 * ROWS * WIDTH
    assert copies == {"dynamic-update-slice-start": size, "dynamic-slice-start": size}


def test_a_loop_that_lost_a_pass_counts_the_others():
    """Nobody wants the rows' own gradient, so XLA takes the last pass back out of its loop and drops a product."""
    assert program("offloaded").flops == (3 * OUTER - 1) * LAYER_FLOPS


@pytest.mark.parametrize("name", ["loops", "overlapped", "kernels", "offloaded", "product"])
def test_every_cycle_of_the_text_is_counted(name):
    """Each estimate once, in a pass of its loop or in its branch."""
    cycles = [int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', text(name))]
    assert sorted(one.cycles for _, one in program(name).walk() if one.cycles) == sorted(cycles)


def test_what_is_sliced_from_a_stack_counts_as_the_slice():
    stack = LAYERS // INNER * INNER * WIDTH**2 * 2 // DEVICES
    reads = [one for _, one in program("loops").walk() if "dynamic-slice_fusion" in one.name]
    assert reads and all(one.bytes < stack for one in reads)


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,1},{2,3}}", (0, 1)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("mesh['a'=2,'b'=4], device_ids=([8]<=[4,2]T(1,0)) {'a'}", (0, 1)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", (0, 2, 4, 6)),
    ],
)
def test_who_takes_part(groups, first):
    assert first_group(groups) == first


def test_the_order_of_a_meshs_devices_belongs_to_its_groups():
    groups = "mesh['a'=2,'b'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'b'}"
    lines = (
        "HloModule one, num_partitions=4",
        "",
        "ENTRY %main (x: f32[8]) -> f32[8] {",
        "  %x = f32[8]{0} parameter(0)",
        f"  ROOT %sum = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add",
        "}",
    )
    [(_, one)] = read_program("\n".join(lines) + "\n", lambda name, count: ()).walk()
    assert one.collective.groups == groups and first_group(groups) == (0, 2)


def test_a_sum_and_a_slice_are_a_scatter_where_they_are_fused():
    body = [
        "  %x = f32[8]{0} parameter(0)",
        "  %k = s32[] parameter(1)",
        "  %sum = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add",
        "  ROOT %slice = f32[4]{0} dynamic-slice(%sum, %k), dynamic_slice_sizes={4}",
        "}",
    ]
    call = "  ROOT %both = f32[4]{0} fusion(%y, %j), kind=kCustom, calls=%inner"
    entry = "ENTRY %main (x: f32[8], k: s32[]) -> f32[4] {"
    outer = ["  %y = f32[8]{0} parameter(0)", "  %j = s32[] parameter(1)", call, "}"]
    inner = "%inner (x: f32[8], k: s32[]) -> f32[4] {"
    for lines, kind in (
        ([inner, *body, "", entry, *outer], "reduce-scatter"),
        ([entry, *body], "all-reduce"),
    ):
        text = "\n".join(["HloModule one, num_partitions=2", "", *lines]) + "\n"
        found = [one for _, one in read_program(text, lambda name, count: ()).walk()]
        assert [one.collective.kind for one in found if one.collective] == [kind]


def test_what_a_sparse_core_lays_out_anew_runs_beside_the_core():
    """As on a TPU7x; such computations end in a line that says where they run."""
    lines = (
        "HloModule one",
        "",
        "%copied (p: bf16[64,128]) -> bf16[64,128] {",
        "  %p = bf16[64,128]{1,0} parameter(0)",
        "  ROOT %copy = bf16[64,128]{0,1} copy(%p)",
        '}, execution_thread="sparsecore"',
        "",
        "ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {",
        "  %x = bf16[64,128]{1,0} parameter(0)",
        "  %begun = ((bf16[64,128]{1,0}), bf16[64,128]{0,1}, u32[]{:S(8)}) call-start(%x),"
        ' async_execution_thread="sparsecore", to_apply=%copied',
        "  ROOT %done = bf16[64,128]{0,1} call-done(%begun)",
        "}",
    )
    [(_, one)] = read_program("\n".join(lines) + "\n", lambda name, count: ()).walk()
    assert one.work is Work.COPY and one.bytes == 2 * 64 * 128 * 2


def test_slices_on_their_way_to_vector_memory_count_once():
    """Their pieces, and not the name for them as one; in the form that the compiler writes for a large weight."""
    line = """\
  %start.{n} = ((s8[4096]{{0}}), s8[2048]{{0:S(1)}}, s32[]{{:S(2)}}) slice-start(%w), slice={{[{since}:{until}]}}
  %done.{n} = s8[2048]{{0:S(1)}} slice-done(%start.{n})
"""
    pieces = line.format(n=1, since=2048, until=4096) + line.format(n=2, since=0, until=2048)
    module = f"""HloModule sliced

ENTRY %main (w: s8[4096]) -> bf16[2048] {{
  %w = s8[4096]{{0}} parameter(0)
{pieces}\
  ROOT %whole = bf16[2048]{{0:S(1)}} custom-call(%done.1, %done.2), custom_call_target="ConcatBitcast"
}}
"""
    found = list(read_program(module, lambda name, count: (1.0,) * count).walk())
    assert [(one.work, one.bytes) for _, one in found] == [(Work.COPY, 2048)] * 2


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")
    with pytest.raises(ValueError, match="who takes part"):
        first_group("all of you")
