"""Tables and figures of what was run, into the marked sections of docs/miniworld.md.

A section is what stands between `<!-- NAME -->` and `<!-- /NAME -->`; the words around it are written by hand, and
everything between the marks by this module.
"""

import json
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from configs.ablations import BUDGETS, PHASES, get_config
from wemmu_jax.ablations import figures
from wemmu_jax.ablations.studies import SETTINGS, Run, Study, study
from wemmu_jax.ablations.work import REQUESTS_SEED
from wemmu_jax.evaluation.attention import GROUPS
from wemmu_jax.evaluation.miniworld import DRAWING_TASKS, cases, show
from wemmu_jax.training.origin import Origin

NAMES = {
    "fixed": "learnable, fixed",
    "dynamic": "learnable, dynamic",
    "noisy": "noisy",
    "noisy-0.3": "noisy, 0.3",
    "noisy-0.1": "noisy, 0.1",
    "noisy-vae": "noisy + VAE branch",
    "noisy-vae-expert": "noisy + VAE branch in the expert",
    "scaled-vae": "noisy with a learned scale + VAE branch",
    "vit2": "ViT of 2 layers",
    "vit2-expert": "ViT of 2 layers, in the expert",
    "vit6": "ViT of 6 layers",
    "vit6-expert": "ViT of 6 layers, in the expert",
    "vit6-distilled": "ViT of 6 layers, distilled",
    "straight": "ViT features straight to the DiT",
}
_WINDOW = 50  # steps that a loss curve is the mean of
_EDIT_FIELDS = ("changed", "kept", "facts", "copied")
_EDIT_HEADS = ("edits right", *_EDIT_FIELDS, "T2I", "Rec", "Rec facts")
_FIELDS = (
    "`changed`: what was asked for is there; `kept`: all else is as it was; `facts`: the share of background, places, "
    "shapes and colours that are as wanted; `copied`: the source came back unchanged."
)


def write(docs: pathlib.Path, section: str, text: str) -> None:
    """Puts `text` between the marks of `section`.

    Raises:
      ValueError: the file has no such section.
    """
    old = docs.read_text()
    pattern = re.compile(rf"(<!-- {section} -->\n).*?(<!-- /{section} -->)", re.DOTALL)
    new, count = pattern.subn(lambda found: f"{found[1]}{text.strip()}\n{found[2]}", old)
    if count != 1:
        raise ValueError(f"{docs}: expected one section <!-- {section} -->, found {count}")
    docs.write_text(new)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers with three digits."""

    def cell(value: object) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


class Results:
    """What the jobs of a budget left in a folder."""

    def __init__(self, out: pathlib.Path, budget: str, pictures: pathlib.Path):
        """`pictures`: where figures go."""
        self.out, self.budget, self.pictures = out / budget, BUDGETS[budget], pictures
        self.name = budget

    def graded(self, run: Run) -> bool:
        """Whether there are scores of it."""
        return self._scores(run).exists()

    def scores(self, run: Run) -> dict[str, dict[str, float]]:
        """task -> kind -> share."""
        return json.loads(self._scores(run).read_text())

    def _scores(self, run: Run) -> pathlib.Path:
        return self.out / f"grades/{run}/scores.json"

    def grades(self, run: Run, task: str) -> list[dict]:
        """The grades of a task, one for each request."""
        lines = (self.out / f"grades/{run}/grades.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["task"] == task]

    def share(self, run: Run, task: str, field: str) -> float:
        """Mean of a field of the grades."""
        return float(np.mean([grade[field] for grade in self.grades(run, task)]))

    def curve(self, run: Run, field: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric; a step that was run twice counts once."""
        lines = (self.out / f"runs/{run}/metrics.jsonl").read_text().splitlines()
        found = {row["step"]: row[field] for row in map(json.loads, lines) if field in row}
        return sorted(found), [found[step] for step in sorted(found)]

    def picture(self, run: Run, task: str, kind: str, number: int) -> Image.Image:
        """What the run drew."""
        return Image.open(
            self.out / f"grades/{run}/{task}/{kind.replace(' ', '-')}-{number:04}.png"
        )

    def figure(self, name: str) -> tuple[pathlib.Path, str]:
        """Where a figure is drawn, and the Markdown that shows it."""
        path = self.pictures / f"{name}.png"
        return path, f"![{name}]({path.parent.name}/{path.name})"


def report(name: str, results: Results) -> str:
    """The section of a study.

    Raises:
      FileNotFoundError: a run that it compares has not been trained or looked at (`queries`: under any seed).
    """
    one = study(name, budget=results.name)
    phases = {phase: run for run in one.runs for phase in _road(run.phase)}
    steps = ", ".join(_length(results.name, run.at(phase)) for phase, run in phases.items())
    said = (
        f"Budget `{results.name}`: optimizer steps x samples: {steps}; "
        f"{results.budget.graded} held-out requests of each kind. "
        f"Made by `wemmu miniworld ablate {name} --budget {results.name}` and `wemmu miniworld report`."
    )
    return f"{_REPORTS[name](one, results)}\n\n{said}"


def _road(phase: str) -> list[str]:
    """The phases that lead to one, and itself."""
    start = PHASES[phase].start
    return ([] if start is None else _road(start)) + [phase]


def _length(budget: str, run: Run) -> str:
    config = get_config(f"{budget}/{run}")
    return f"{run.phase} {config.optimizer.steps} x {config.paper.batch}"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _queries(one: Study, results: Results) -> str:
    # A study that was stopped early compares the seeds that all arms have.
    undone = {run.seed for run in one.runs if not results.graded(run)}
    done = [run for run in one.runs if run.seed not in undone] or one.runs
    arms = dict.fromkeys(run.arm for run in done)
    kinds = list(results.scores(done[0])["S-Edit"])
    rows = []
    for arm in arms:
        runs = [run for run in done if run.arm == arm]
        scores = [results.scores(run) for run in runs]
        edits = [_spread([s["S-Edit"][kind] for s in scores]) for kind in kinds]
        others = zip(*(_edit_row(run, results)[1:] for run in runs), strict=True)
        rows.append([NAMES[arm], *edits, *map(_spread, others)])
    shown = _sheet("queries", "S-Edit", [Run(arm, 0, "stage3") for arm in arms], results)
    seeds = sorted({run.seed for run in done})
    note = f"Mean and standard deviation over seeds {', '.join(map(str, seeds))}. {_FIELDS}"
    heads = ["queries", *kinds, *_EDIT_HEADS[1:]]
    return f"{table(heads, rows)}\n\n{note}\n\n{shown}"


def _sheet(name: str, task: str, runs: Sequence[Run], results: Results) -> str:
    """What each run drew of the first request of each kind, beside sources and target; the Markdown that shows it."""
    path, shown = results.figure(name)
    rows = []
    for kind in DRAWING_TASKS[task].kinds:
        (case,) = cases(task, kind, count=1, seed=REQUESTS_SEED)
        drawn = [results.picture(run, task, kind, 0) for run in runs]
        given = [show(scene, drawn[0].height) for scene in (*case.sources, case.target)]
        rows.append((case.text, [*given, *drawn]))
    sources = [f"source {number}" for number in range(1, len(case.sources) + 1)]
    figures.sheet(path, [*sources, "wanted", *(f"{r.arm} {r.phase}" for r in runs)], rows)
    return shown


def _edit_row(run: Run, results: Results) -> list[float]:
    fields = [results.share(run, "S-Edit", field) for field in ("correct", *_EDIT_FIELDS)]
    scores = results.scores(run)
    rec = results.share(run, "Rec", "facts")
    return [*fields, scores["T2I"]["overall"], scores["Rec"]["overall"], rec]


def _edit_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows that end in an `_edit_row`."""
    return f"{table([*heads, *_EDIT_HEADS], rows)}\n\n{_FIELDS}"


def _collapse(one: Study, results: Results) -> str:
    meant = {
        "stage2": "T2I and reconstruction",
        "edits": "then editing alone",
        "joint2": "all tasks from the start",
        "edits-queries": "then editing, the queries alone learn",
        "edits-new-queries": "the same with new queries",
    }
    rows = [[NAMES[r.arm], meant[r.phase], *_edit_row(r, results)] for r in one.runs]
    compared = [run for run in one.runs if run.phase in ("edits", "joint2")]
    shown = _sheet("collapse", "S-Edit", compared, results)
    return f"{_edit_table(['queries', 'trained on'], rows)}\n\n{shown}"


def _several(one: Study, results: Results) -> str:
    rows = []
    for arm in dict.fromkeys(run.arm for run in one.runs):
        before, after = (results.scores(Run(arm, 0, phase)) for phase in ("stage3", "stage4"))
        pairs = [s[task]["overall"] for task in ("T2I", "S-Edit", "Rec") for s in (before, after)]
        rows.append([NAMES[arm], after["M-Edit"]["overall"], *pairs])
    heads = ["queries", "compositions after"]
    heads += [f"{task} {when}" for task in ("T2I", "edits", "Rec") for when in ("before", "after")]
    after = [run for run in one.runs if run.phase == "stage4"]
    shown = _sheet("several", "M-Edit", after, results)
    return f"{table(heads, rows)}\n\n{shown}"


def _attention(one: Study, results: Results) -> str:
    rows, found = [], {}
    paper = dict(zip(SETTINGS, (1.80, 1.01, -0.99, -0.68), strict=True))
    for run in one.attention:
        fields = json.loads((results.out / f"attention/{run}.json").read_text())
        mass = [fields["mass"][group] for group in GROUPS]
        forms = [fields[f] for f in ("log_ratio", "logit_difference", "mass_difference")]
        rows.append(
            [NAMES[run.arm], f"{paper[run.arm]:+.2f}", *(f"{f:+.3f}" for f in forms), *mass]
        )
        maps = np.load(results.out / f"attention/{run}.npy")
        found[NAMES[run.arm]] = (maps, fields["groups"])
    path, shown = results.figure("attention")
    figures.maps(path, found)
    heads = ["queries", "the paper", "log ratio", "logits", "mass"]
    heads += [f"to {group}" for group in GROUPS]
    note = (
        f"Request: {fields['text']!r}. Blue: where VAE tokens begin; red: the text behind the picture; green: the chat "
        "template behind the text. "
        "Log ratio of the mean attention a picture token gets over that of a token behind the picture, text or chat "
        "template; difference of mean logits; difference of total attention. The rest stands before the picture."
    )
    return f"{table(heads, rows)}\n\n{shown}\n\n{note}"


def _curves(name: str, runs: Sequence[Run], field: str, label: str, results: Results) -> str:
    path, shown = results.figure(name)
    lines = {}
    for run in runs:
        steps, values = results.curve(run, field)
        lines[f"{run.arm} {run.phase}"] = (steps, figures.smoothed(values, window=_WINDOW))
    figures.curves(path, lines, label=label)
    return shown


def _last(run: Run, field: str, results: Results) -> float:
    return results.curve(run, field)[1][-1]


def _connectors(one: Study, results: Results) -> str:
    rows = [
        [
            "no VAE branch"
            if run.arm == "noisy"
            else NAMES[run.arm].replace("noisy + VAE branch", "linear"),
            *(_last(run, f"validation/{task}", results) for task in ("Rec", "S-Edit", "T2I")),
        ]
        for run in one.runs
    ]
    shown = [
        _curves(
            f"connectors-{task}", one.runs, f"train/loss_{task}", f"training loss, {task}", results
        )
        for task in ("Rec", "S-Edit")
    ]
    heads = ["connector", "validation loss, Rec", "S-Edit", "T2I"]
    return f"{table(heads, rows)}\n\n" + "\n".join(shown)


def _vit(one: Study, results: Results) -> str:
    names = {"stage3": "frozen", "stage3-vit": "learns"}
    rows = [[names[run.phase], *_edit_row(run, results)] for run in one.runs]
    shown = _curves("vit", one.runs, "train/loss", "training loss", results)
    return f"{_edit_table(['ViT'], rows)}\n\n{shown}"


def _scale(one: Study, results: Results) -> str:
    rows = [[NAMES[run.arm], *_edit_row(run, results)] for run in one.runs]
    shown = _curves("scale", one.runs, "train/loss", "training loss, stage 3", results)
    return f"{_edit_table(['queries'], rows)}\n\n{shown}"


def _stream(one: Study, results: Results) -> str:
    rows = [[NAMES[run.arm], *_edit_row(run, results)] for run in one.runs]
    (scaled,) = [run for run in one.runs if run.arm == "scaled-vae"]
    scale = np.asarray(Origin(results.out / f"runs/{scaled}").trained()["queries/scale"])
    note = (
        f"The learned scale of the noise after stage 3: mean {scale.mean():.3f}, standard deviation over channels "
        f"{scale.std():.3f}, from {scale.min():.3f} to {scale.max():.3f}; it began at 1."
    )
    return f"{_edit_table(['bridge'], rows)}\n\n{note}"


def _pathway(one: Study, results: Results) -> str:
    rows = [
        [
            NAMES[run.arm],
            results.scores(run)["Rec"]["overall"],
            f"{results.share(run, 'Rec', 'psnr'):.1f}",
            _last(run, "validation/Rec", results),
        ]
        for run in one.runs
    ]
    shown = _curves("pathway", one.runs, "train/loss_Rec", "training loss, Rec", results)
    return f"{table(['what the DiT reads', 'scene kept', 'PSNR, dB', 'validation loss'], rows)}\n\n{shown}"


def _losses(one: Study, results: Results) -> str:
    rows = [
        [
            run.phase,
            results.scores(run)["T2I"]["overall"],
            *(_last(run, f"validation/{task}", results) for task in ("T2I", "Rec")),
        ]
        for run in one.runs
    ]
    shown = _curves("losses", one.runs, "train/loss_T2I", "flow matching loss, T2I", results)
    return f"{table(['loss and rows', 'T2I', 'validation loss, T2I', 'Rec'], rows)}\n\n{shown}"


_REPORTS: dict[str, Callable[[Study, Results], str]] = {
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
