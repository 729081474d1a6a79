"""Which micro-batch, mesh and remat policy predict the fastest step within memory."""

from collections.abc import Callable, Iterator

from wemmu_jax.planning.plan import StagePlan, plan_stage
from wemmu_jax.planning.programs import Library, Setting
from wemmu_jax.training.curriculum import Remat

BY = "raw_overlapped"  # what is made small


def search(
    setting: Setting, library: Library, *, processes: int = 1, say: Callable[[str], None] = print
) -> tuple[Setting, StagePlan]:
    """Changes one of the three at a time for as long as the prediction falls. The batch of a step stays.

    Args:
      setting: where to start.
      library: where compiled programs are kept; what has been tried once costs no compilation again.
      processes: that compile at once.
      say: is told each candidate.

    Raises:
      ValueError: nothing that was tried fits.
    """
    tried: dict[tuple, StagePlan | None] = {}

    def plan(candidate: Setting) -> StagePlan | None:
        key = _key(candidate)
        if key not in tried:
            try:
                found = plan_stage(candidate, library, processes=processes)
                tried[key] = found if found.spare >= 0 else None
                why = f"needs {-found.spare / 2**30:.1f} GiB too much"
            except ValueError as error:
                tried[key], why = None, str(error)
            good = tried[key]
            result = f"{getattr(good.times, BY):.4g} s/step" if good else why
            say("rows={}, fsdp={}, remat={}: ".format(*key) + result)
        return tried[key]

    best, moved = (setting, plan(setting)), True
    while moved:
        moved = False
        for candidate in _neighbours(best[0]):
            found = plan(candidate)
            if found and (best[1] is None or _seconds(found) < _seconds(best[1])):
                best, moved = (candidate, found), True
                break
    if best[1] is None:
        raise ValueError(f"{setting.config.name}: nothing near the config fits {setting.topology}")
    return best


def _seconds(plan: StagePlan) -> float:
    return getattr(plan.times, BY)


def _key(setting: Setting) -> tuple:
    config = setting.config
    return (config.batch.rows, config.mesh.fsdp, config.model.remat)


def _neighbours(setting: Setting) -> Iterator[Setting]:
    """The nearest rows on both sides that divide the batch and the mesh, `fsdp` halved and doubled, other policies."""
    rows, fsdp, remat = _key(setting)
    batch, devices = rows * setting.config.batch.micro_batches, len(setting.devices)
    possible = [n for n in range(devices, batch + 1, devices) if batch % n == 0]
    smaller = [n for n in possible if n < rows][-1:]
    for other in [*smaller, *[n for n in possible if n > rows][:1]]:
        yield setting.changed({"batch.rows": other, "batch.micro_batches": batch // other})
    for other in (fsdp // 2, fsdp * 2):
        if 1 <= other <= devices and devices % other == 0:
            yield setting.changed({"mesh.fsdp": other})
    for other in Remat:
        if other.value != remat:
            yield setting.changed({"model.remat": other.value})
