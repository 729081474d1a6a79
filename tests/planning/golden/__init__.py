"""What plans of the paper's stages say of their programs: FLOPs, memory, collectives. No cycles, which follow libtpu.

    python -m tests.planning.golden stage1/v5p-4x4x8/frozen     # plans it and writes its file; minutes
    python -m tests.planning.golden all
    python -m tests.planning.golden                             # the names, and which have a file

They are drafts (`wemmu plan --draft`), in the cache of `wemmu plan`.
"""

import dataclasses
import pathlib
from typing import Any

from wemmu_jax.planning.plan import StagePlan, plan_stage
from wemmu_jax.planning.programs import Library, Setting

FOLDER = pathlib.Path(__file__).parent
CACHE = pathlib.Path("~/.cache/wemmu/plan").expanduser()


@dataclasses.dataclass(frozen=True)
class Case:
    """A stage on a topology, with the VAE tokens in one stream or the other."""

    stage: str
    topology: str
    stream: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.topology.replace(':', '-')}/{self.stream}"

    @property
    def changed(self) -> dict[str, Any]:
        """Keys of the config that are others here: 256 devices do not divide stage 4's micro-batches of 128 rows."""
        changed: dict[str, Any] = {"model.bridge.vae_stream": self.stream}
        if (self.stage, self.topology) == ("stage4", "v6e:16x16"):
            changed |= {"batch.rows": 256, "batch.micro_batches": 1}
        return changed

    @property
    def file(self) -> pathlib.Path:
        """Where its numbers are, once it has been planned."""
        return FOLDER / f"{self.stage}-{self.topology.replace(':', '-')}-{self.stream}.json"

    def plan(self) -> StagePlan:
        """A draft of the config, but for `changed`."""
        return plan_stage(self.setting, Library(CACHE))

    @property
    def setting(self) -> Setting:
        """What is planned."""
        spec = f"configs/wemmu_3b.py:{self.stage}"
        return Setting.of(spec, self.changed, topology=self.topology, draft=True)


CASES = {
    str(case): case
    for stage in ("stage1", "stage2", "stage3", "stage4")
    for topology in ("v5p:4x4x8", "v6e:16x16")
    for stream in ("frozen", "expert")
    for case in (Case(stage, topology, stream),)
}


def described(plan: StagePlan) -> dict[str, Any]:
    """What a change of the code would change: teraflops and GiB of a device, and the kinds of collectives of a part."""
    kinds: dict[str, set[str]] = {}
    for one in plan.transfers:
        kinds.setdefault(f"{one.part} {one.phase}", set()).add(one.kind)
    return {
        "devices": plan.devices,
        "mesh": dict(plan.mesh),
        "rows": plan.rows,
        "remat": plan.remat,
        "model_teraflops": plan.model_flops / 1e12,
        "program_teraflops": plan.program_flops / 1e12,
        "programs": {
            one.name: {
                "teraflops": one.prediction.flops / 1e12,
                "beside_gib": one.beside_arguments / 2**30,
            }
            for one in plan.programs
        },
        "memory_gib": {what: size / 2**30 for what, size in plan.memory.items()},
        "spare_gib": plan.spare / 2**30,
        "collectives": {part: sorted(found) for part, found in sorted(kinds.items())},
    }
