"""A plan as text for a terminal."""

import collections
from collections.abc import Iterator, Sequence

from wemmu_jax.planning.chips import GIB
from wemmu_jax.planning.collectives import KINDS
from wemmu_jax.planning.plan import StagePlan

TERA = 1e12
TIMES = {
    "raw_overlapped": "raw, overlapped",
    "raw_exposed": "raw, exposed",
    "capped_overlapped": "capped, overlapped",
    "capped_exposed": "capped, exposed",
}
_TRANSFERS = 25  # rows of collectives; the rest is added up


def table(plan: StagePlan) -> str:
    """All that a plan knows, in sections; of a draft nothing that follows from the compiler's cycles."""
    sections = [_head, _memory, _shapes, _programs, _step, _parts, _moved, _transfers, _notes]
    if plan.draft:
        sections.remove(_parts)
    return "\n\n".join("\n".join(section(plan)) for section in sections)


def totals(plans: Sequence[StagePlan]) -> str:
    """Chip-hours and days of all stages."""
    rows = [("all stages", "chip-hours", "days")]
    for name, title in TIMES.items():
        hours = sum(plan.chip_hours[name] for plan in plans)
        rows.append((title, f"{hours:,.0f}", f"{sum(plan.days[name] for plan in plans):.2f}"))
    return "\n".join(_aligned(rows))


def _head(plan: StagePlan) -> Iterator[str]:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    batch = plan.rows * plan.micro_batches
    yield f"{plan.stage} on {plan.topology}: {plan.devices} x {plan.device_kind}, mesh {mesh}, remat {plan.remat}"
    yield (
        f"{plan.steps} steps of {plan.micro_batches} micro-batches x {plan.rows} rows = {batch} samples, "
        f"{plan.rows / (plan.mesh['data'] * plan.mesh['fsdp']):g} rows a device"
    )


def _memory(plan: StagePlan) -> Iterator[str]:
    used = sum(plan.memory.values())
    rows = [("memory a device", "GiB")]
    rows += [(kind, f"{size / GIB:.3f}") for kind, size in plan.memory.items()]
    rows.append(("in all", f"{used / GIB:.3f}"))
    yield from _aligned(rows)
    verdict = "fits" if plan.spare >= 0 else "DOES NOT FIT"
    word = "free" if plan.spare >= 0 else "too much"
    yield (
        f"{verdict}: {abs(plan.spare) / GIB:.2f} GiB {word} of the {plan.chip.memory / GIB:.2f} that a program may use"
    )


def _shapes(plan: StagePlan) -> Iterator[str]:
    times_of = {} if plan.draft else TIMES
    heads = ("sources", "bucket", "share %", "model TF/sample")
    rows = [(*heads, *(f"{title} ms" for title in times_of.values()))]
    for one in plan.shapes:
        scaled = "" if one.shape == one.compiled else " *"
        times = [f"{getattr(one.times, name) * 1e3:.1f}" for name in times_of]
        bucket = f"{one.shape.bucket.height}x{one.shape.bucket.width}{scaled}"
        flops = sum(one.model_flops.values()) / TERA
        rows.append(
            (str(one.shape.arity), bucket, f"{100 * one.share:.2f}", f"{flops:.4g}", *times)
        )
    yield f"micro-batches: {len(plan.shapes)} shapes"
    yield from _aligned(rows)


def _programs(plan: StagePlan) -> Iterator[str]:
    head = ("program", "runs/step", "compile s", "beside GiB", "TF a device")
    rows = [head if plan.draft else (*head, "raw ms", "capped ms", "collectives ms")]
    for one in plan.programs:
        times = one.prediction.times
        wire = one.prediction.works.get("collective", 0.0)
        seconds = (times.raw_exposed - wire, times.capped_exposed - wire, wire)
        rows.append(
            (
                one.name,
                f"{one.runs:.2f}",
                f"{one.compile_seconds:.0f}",
                f"{one.beside_arguments / GIB:.3f}",
                f"{one.prediction.flops / TERA:.4g}",
                *(() if plan.draft else (f"{value * 1e3:.2f}" for value in seconds)),
            )
        )
    yield from _aligned(rows)


def _step(plan: StagePlan) -> Iterator[str]:
    ratio = plan.program_flops / plan.model_flops
    yield (
        f"a step: model {plan.model_flops / TERA:,.4g} TF, programs {plan.program_flops / TERA:,.4g} TF "
        f"(x {ratio:.2f}: padding and recomputation)"
    )
    if plan.draft:
        return
    batch = plan.rows * plan.micro_batches
    rows = [("predicted", "s/step", "ms/sample/chip", "MFU %", "chip-hours", "days")]
    for name, title in TIMES.items():
        seconds = getattr(plan.times, name)
        rows.append(
            (
                title,
                f"{seconds:.4g}",
                f"{seconds * plan.chips / batch * 1e3:.4g}",
                f"{100 * plan.mfu[name]:.1f}",
                f"{plan.chip_hours[name]:,.4g}",
                f"{plan.days[name]:.3g}",
            )
        )
    yield from _aligned(rows)


def _parts(plan: StagePlan) -> Iterator[str]:
    total = sum(plan.parts.values())
    rows = [("part", "core s/step, raw", "%")]
    for part, seconds in plan.parts.items():
        rows.append((part, f"{seconds:.4g}", f"{100 * seconds / total:.1f}"))
    yield from _aligned(rows)


def _moved(plan: StagePlan) -> Iterator[str]:
    moved = collections.Counter()
    for one in plan.transfers:
        moved[(one.part, one.phase), one.kind] += one.bytes / 1e9
    rows = [("GB/step of", "in the pass", *KINDS)]
    for place in dict.fromkeys(place for place, _ in moved):
        sizes = (moved[place, kind] for kind in KINDS)
        rows.append((*place, *(f"{size:.4g}" if size else "" for size in sizes)))
    yield from _aligned(rows, left=(0, 1))


def _transfers(plan: StagePlan) -> Iterator[str]:
    rows = [("collective", "of", "devices", "times/step", "GB/step", "ms/step", "where")]
    transfers = plan.transfers
    for one in transfers[:_TRANSFERS]:
        where = " ".join(word for word in (one.part, one.phase, one.what) if word)
        numbers = (one.group, one.count, one.bytes / 1e9, one.seconds * 1e3)
        rows.append((one.kind, one.array, *(f"{number:.4g}" for number in numbers), where))
    rest = transfers[_TRANSFERS:]
    if rest:
        size, seconds = (sum(getattr(one, name) for one in rest) for name in ("bytes", "seconds"))
        rows.append(
            (f"{len(rest)} more", "", "", "", f"{size / 1e9:.4g}", f"{seconds * 1e3:.4g}", "")
        )
    yield from _aligned(rows, left=(0, 1, 6))


def _notes(plan: StagePlan) -> Iterator[str]:
    yield "assumed:"
    yield from (f"- {one}" for one in plan.assumptions)
    unpriced = collections.Counter()
    for program in plan.programs:
        for name, (count, seconds, known) in program.prediction.kernels.items():
            by = "its FLOPs" if known else "its bytes alone, because its FLOPs are not known"
            yield f"- Pallas call {name} in {program.name}: {count:g} times, {seconds * 1e3:.3g} ms, by {by}"
        for opcode, seconds in program.prediction.unpriced.items():
            unpriced[opcode] += program.runs * seconds
    if plan.draft:
        return
    longest = [(name, seconds * 1e3) for name, seconds in unpriced.most_common() if seconds > 1e-6]
    listed = ", ".join(f"{name} {milliseconds:.3g}" for name, milliseconds in longest)
    yield f"- without cycles, ms a step: {listed or 'nothing that counts'}"


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
