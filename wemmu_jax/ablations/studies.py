"""What is compared with what. A study names runs; `plan.py` turns them into jobs."""

import dataclasses
from collections.abc import Mapping

from configs.ablations import BUDGETS

SETTINGS = (
    "fixed",
    "dynamic",
    "noisy",
    "noisy-vae",
)  # the paper's four, in the order of its Table 4
CONNECTORS = ("noisy", "noisy-vae", "vit2", "vit2-expert", "vit6", "vit6-expert", "vit6-distilled")
COLLAPSE = ("dynamic", "noisy", "noisy-vae")
_EDITING = ("S-Edit", "T2I", "Rec")


@dataclasses.dataclass(frozen=True)
class Run:
    """A phase of an arm under a seed. Its name, ARM/seedN/PHASE, is also its folder and its config's name."""

    arm: str
    seed: int
    phase: str

    @classmethod
    def parse(cls, name: str) -> "Run":
        arm, seed, phase = name.split("/")
        return cls(arm, int(seed.removeprefix("seed")), phase)

    def at(self, phase: str) -> "Run":
        """Another phase of the same arm and seed."""
        return dataclasses.replace(self, phase=phase)

    def __str__(self) -> str:
        return f"{self.arm}/seed{self.seed}/{self.phase}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
      runs: what is trained.
      graded: run -> tasks of `evaluation.miniworld` that it is graded in.
      attention: runs whose queries are looked at.
    """

    runs: tuple[Run, ...]
    graded: Mapping[Run, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    attention: tuple[Run, ...] = ()


def _queries(seeds: int) -> Study:
    """The four settings of queries through stages 1 to 3 (Table 4)."""
    runs = tuple(Run(arm, seed, "stage3") for seed in range(seeds) for arm in SETTINGS)
    return Study(runs, dict.fromkeys(runs, _EDITING))


def _scale(_: int) -> Study:
    """The noise's scale: what noise costs a small model."""
    runs = tuple(Run(arm, 0, "stage3") for arm in ("noisy", "noisy-0.3", "noisy-0.1", "dynamic"))
    return Study(runs, dict.fromkeys(runs, _EDITING))


def _collapse(seeds: int) -> Study:
    """Editing after T2I and reconstruction (Fig. 1)."""
    phases = [(arm, phase) for arm in COLLAPSE for phase in ("stage2", "edits", "joint2")]
    phases += [("dynamic", "edits-queries"), ("dynamic", "edits-new-queries")]
    runs = [Run(arm, 0, phase) for arm, phase in phases]
    # What is forgotten is what the paper claims: that, and no other row, under every seed.
    more = range(1, seeds)
    runs += [Run(arm, s, phase) for s in more for arm in COLLAPSE for phase in ("stage2", "edits")]
    return Study(tuple(runs), dict.fromkeys(runs, _EDITING))


def _several(_: int) -> Study:
    """Stage 4: several pictures, and what is forgotten (4.4)."""
    runs = tuple(Run(arm, 0, phase) for arm in SETTINGS for phase in ("stage3", "stage4"))
    tasks = ("S-Edit", "T2I", "Rec", "M-Edit")
    graded = {run: tasks if run.phase == "stage4" else _EDITING for run in runs}
    return Study(runs, graded)


def _attention(_: int) -> Study:
    """Where the queries look (Fig. 3)."""
    runs = tuple(Run(arm, 0, "stage3") for arm in SETTINGS)
    return Study(runs, attention=runs)


def _connectors(_: int) -> Study:
    """Connectors of the VAE branch (Fig. 4, right)."""
    runs = tuple(Run(arm, 0, "mixed") for arm in CONNECTORS)
    return Study(runs)


def _vit(_: int) -> Study:
    """The ViT unfrozen (Fig. 4, left)."""
    runs = tuple(Run("noisy", 0, phase) for phase in ("stage3", "stage3-vit"))
    return Study(runs, dict.fromkeys(runs, _EDITING))


def _stream(_: int) -> Study:
    """Where the VAE tokens run, and noise with a learned scale (design, section 3)."""
    arms = ("noisy-vae", "noisy-vae-expert", "scaled-vae")
    runs = tuple(Run(arm, 0, "stage3") for arm in arms)
    return Study(runs, dict.fromkeys(runs, _EDITING))


def _pathway(_: int) -> Study:
    """ViT features straight to the DiT (4.3.2)."""
    runs = tuple(Run(arm, 0, "reconstruction") for arm in ("straight", "noisy", "noisy-vae"))
    return Study(runs, dict.fromkeys(runs, ("Rec",)))


def _losses(_: int) -> Study:
    """Flow matching and its contrastive form (Eq. 4)."""
    phases = ("cfm-8", "contrastive-8", "cfm-32", "contrastive-32")
    runs = tuple(Run("noisy-vae", 0, phase) for phase in phases)
    return Study(runs, dict.fromkeys(runs, ("T2I",)))


_STUDIES = {
    "queries": _queries,
    "scale": _scale,
    "collapse": _collapse,
    "several": _several,
    "attention": _attention,
    "connectors": _connectors,
    "vit": _vit,
    "stream": _stream,
    "pathway": _pathway,
    "losses": _losses,
}
STUDIES = tuple(_STUDIES)


def study(name: str, *, budget: str) -> Study:
    """The study of that name at the seeds of `budget`."""
    return _STUDIES[name](BUDGETS[budget].seeds)
