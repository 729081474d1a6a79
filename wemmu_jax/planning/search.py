"""Which micro-batch, `fsdp` and remat policy predict the fastest step within memory."""

from collections.abc import Callable, Iterator

from wemmu_jax.planning.chips import GIB
from wemmu_jax.planning.plan import DoesNotFit, StagePlan, plan_stage
from wemmu_jax.planning.programs import Library, Setting
from wemmu_jax.sharding.mesh import row_shards
from wemmu_jax.training.curriculum import Remat

BY = "raw_overlapped"  # what is made small
POLICIES = tuple(policy for policy in Remat if policy is not Remat.UNROLLED)


def search(
    setting: Setting, library: Library, *, processes: int = 1, say: Callable[[str], None] = print
) -> tuple[Setting, StagePlan]:
    """For each remat policy, changes rows or `fsdp` for as long as the prediction falls. The batch of a step stays.

    Args:
      setting: where to start; if it does not fit, with fewer rows and then with a wider `fsdp`.
      library: where compiled programs are kept; what has been tried once costs no compilation again.
      processes: that compile at once.
      say: is told each candidate.

    Raises:
      DoesNotFit: nothing that was tried fits.
    """

    def plan(candidate: Setting) -> StagePlan | None:
        key = _key(candidate)
        if key not in tried:
            try:
                found = plan_stage(candidate, library, processes=processes)
                result = f"{_seconds(found):.4g} s/step"
                if found.spare < 0:
                    found, result = None, f"needs {-found.spare / GIB:.1f} GiB too much"
            except DoesNotFit as error:
                found, result = None, str(error)
            tried[key] = found
            say("rows={}, fsdp={}, remat={}: ".format(*key) + result)
        return tried[key]

    tried: dict[tuple, StagePlan | None] = {}
    ends = [_descend(setting.changed({"model.remat": remat.value}), plan) for remat in POLICIES]
    fitting = [end for end in ends if end is not None]
    if not fitting:
        raise DoesNotFit(
            f"{setting.config.name}: no setting that was tried fits {setting.topology}"
        )
    return min(fitting, key=lambda end: _seconds(end[1]))


def _descend(
    setting: Setting, plan: Callable[[Setting], StagePlan | None]
) -> tuple[Setting, StagePlan] | None:
    """The fastest that steps from `setting` lead to; None if nothing fits on the way."""
    best = plan(setting)
    while best is None:
        smaller = [*_other_rows(setting, less=True), *_other_fsdp(setting, more=True)]
        if not smaller:
            return None
        setting = smaller[0]
        best = plan(setting)
    while True:
        plans = ((candidate, plan(candidate)) for candidate in _neighbours(setting))
        faster = next((one for one in plans if one[1] and _seconds(one[1]) < _seconds(best)), None)
        if faster is None:
            return setting, best
        setting, best = faster


def _seconds(plan: StagePlan) -> float:
    return getattr(plan.times, BY)


def _key(setting: Setting) -> tuple:
    config = setting.config
    return (config.batch.rows, config.mesh.fsdp, config.model.remat)


def _neighbours(setting: Setting) -> Iterator[Setting]:
    yield from _other_rows(setting, less=True)
    yield from _other_rows(setting, less=False)
    yield from _other_fsdp(setting, more=False)
    yield from _other_fsdp(setting, more=True)


def _other_rows(setting: Setting, *, less: bool) -> Iterator[Setting]:
    """The nearest micro-batch that divides the step's batch and that the mesh divides."""
    rows, parts = setting.config.batch.rows, row_shards(setting.mesh)
    batch = rows * setting.config.batch.micro_batches
    possible = [n for n in range(parts, batch + 1, parts) if batch % n == 0]
    nearest = (
        [n for n in possible if n < rows][-1:] if less else [n for n in possible if n > rows][:1]
    )
    for other in nearest:
        yield setting.changed({"batch.rows": other, "batch.micro_batches": batch // other})


def _other_fsdp(setting: Setting, *, more: bool) -> Iterator[Setting]:
    """Half or twice as many parts of the weights."""
    mesh = setting.mesh.shape
    other = 2 * mesh["fsdp"] if more else mesh["fsdp"] // 2
    in_slice = setting.mesh.size // setting.slices // mesh["sequence"] // mesh["tensor"]
    if other and in_slice % other == 0:
        yield setting.changed({"mesh.fsdp": other, "mesh.data": 0})
