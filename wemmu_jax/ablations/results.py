"""What the runs of a budget came to: left in a folder by their jobs, and their scores kept beside the page.

One machine need not run it all: a table takes what is in the folder, and of other runs what an earlier report kept.
"""

import hashlib
import json
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from configs.ablations import BUDGETS, PHASES, get_config
from wemmu_jax.ablations.studies import Run
from wemmu_jax.files import read_object, write_json

Means = dict[str, dict[str, float]]
KEPT = "scores.json"


class Results:
    """The results of a budget.

    Args:
      out: the folder of `wemmu miniworld ablate`.
      budget: one of `configs.ablations.BUDGETS`.
      pictures: where figures go, and the scores that are kept.
    """

    def __init__(self, out: pathlib.Path, budget: str, pictures: pathlib.Path):
        self.out, self.name, self.budget = out / budget, budget, BUDGETS[budget]
        self.pictures = pictures

    def graded(self, run: Run) -> bool:
        """Whether there are scores of it. Raises ValueError as `_check` does."""
        return self._grades(run).exists() or self._kept(run) is not None

    def means(self, run: Run) -> Means:
        """task -> kind, `overall` or number of its grades (`scorer.Grade`) -> mean over the task's requests.

        Raises:
          FileNotFoundError: it is neither in the folder nor kept.
        """
        file = self._grades(run)
        if not file.exists() and (kept := self._kept(run)) is not None:
            return kept["means"]
        rows: dict[str, list[dict]] = defaultdict(list)
        for row in map(json.loads, file.read_text().splitlines()):
            rows[row["task"]].append(row)
        scores = read_object(file.with_name("scores.json"))
        return {task: scores[task] | _fields(found) for task, found in rows.items()}

    def keep(self, runs: Iterable[Run]) -> None:
        """Keeps the scores of those that are in the folder, with what they were trained on and by which code. What was
        kept of other backbones goes: no table compares the two."""
        file = self.pictures / KEPT
        kept = read_object(file) if file.exists() else {}
        ours = kept.setdefault(self.name, {})
        for run in runs:
            if self._grades(run).exists():
                folder = self.out / f"runs/{run}"
                backbones = read_object(folder / "run.json", keys=["fingerprint"])["fingerprint"]
                ours = {
                    name: one for name, one in ours.items() if one.get("backbones") == backbones
                }
                ours[str(run)] = {
                    **self._setting(run),
                    "backbones": backbones,
                    "code": read_object(folder / "run_description.json")["code"],
                    "means": self.means(run),
                }
        kept[self.name] = dict(sorted(ours.items()))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, kept)

    def _grades(self, run: Run) -> pathlib.Path:
        self._check(run)
        return self.out / f"grades/{run}/grades.jsonl"

    def _check(self, run: Run) -> None:
        """Raises ValueError if it, or a stretch before it, is in the folder and was trained by another config than
        today's, by which the tables would name it."""
        for one in map(run.at, road(run.phase)):
            file = self.out / f"runs/{one}/config.json"
            if file.exists() and recipe(read_object(file)) != self._recipe(one):
                raise ValueError(f"{file}: this run was trained by another config than today's")

    def _recipe(self, run: Run) -> str:
        return recipe(json.loads(get_config(f"{self.name}/{run}").to_json()))

    def _kept(self, run: Run) -> dict[str, Any] | None:
        """None as well where it was trained or graded otherwise than it would be now."""
        file = self.pictures / KEPT
        kept = read_object(file).get(self.name, {}) if file.exists() else {}
        found = kept.get(str(run))
        return found if found and found.items() >= self._setting(run).items() else None

    def _setting(self, run: Run) -> dict[str, Any]:
        stretches = [run.at(phase) for phase in road(run.phase)]
        return {
            "trained": ", ".join(length(self.name, one) for one in stretches),
            "recipe": " ".join(map(self._recipe, stretches)),
            "graded": self.budget.graded,
        }

    def curve(self, run: Run, field: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric; a step that was run twice counts once.

        Raises:
          FileNotFoundError: the run is not in the folder, or has not come to its end.
          ValueError: as of `_check`.
        """
        self._check(run)
        file = self.out / f"runs/{run}/metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        at, of = max((row["step"] for row in rows), default=0), self.budget.steps[run.phase]
        if at < of:
            raise FileNotFoundError(f"{file}: the run is at step {at} of {of}")
        found = {row["step"]: row[field] for row in rows if field in row}
        return sorted(found), [found[step] for step in sorted(found)]

    def attention(self, run: Run) -> tuple[dict[str, Any], np.ndarray]:
        """What `work.attend` found: its fields, and the map.

        Raises:
          FileNotFoundError: the run has not been looked at.
          ValueError: as of `_check`.
        """
        self._check(run)
        file = self.out / f"attention/{run}.json"
        return read_object(file), np.load(file.with_suffix(".npy"))

    def picture(self, run: Run, task: str, kind: str, number: int) -> Image.Image:
        """What the run drew.

        Raises:
          FileNotFoundError: it is not in the folder.
        """
        name = f"{kind.replace(' ', '-')}-{number:04}.png"
        return Image.open(self._grades(run).parent / task / name)

    def figure(self, name: str, draw: Callable[[pathlib.Path], None]) -> str:
        """Draws a figure, and returns the Markdown that shows it. One whose runs are not all in the folder stays as it
        was drawn before.

        Raises:
          FileNotFoundError: it never was.
        """
        path = self.pictures / f"{name}.png"
        try:
            draw(path)
        except FileNotFoundError:
            if not path.exists():
                raise
        return f"![{name}]({path.parent.name}/{path.name})"


def _fields(rows: list[dict]) -> dict[str, float]:
    """Means of what is a number or true or false in every row."""
    names = [name for name, value in rows[0].items() if isinstance(value, bool | float)]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def recipe(config: Mapping[str, Any]) -> str:
    """What tells one training from another: a digest of a config as JSON, but for its name, the weights that it starts
    from, how its programs are compiled and what it says on its way."""
    told = {"name", "init", "every", "keep_checkpoints"}
    settings = {key: value for key, value in config.items() if key not in told}
    settings["model"] = {key: value for key, value in config["model"].items() if key != "remat"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def road(phase: str) -> list[str]:
    """The phases that lead to one, and itself."""
    start = PHASES[phase].start
    return ([] if start is None else road(start)) + [phase]


def length(budget: str, run: Run) -> str:
    """Phase, optimizer steps and samples a step."""
    config = get_config(f"{budget}/{run}")
    return f"{run.phase} {config.optimizer.steps} x {config.paper.batch}"
