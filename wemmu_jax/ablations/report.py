"""Tables and figures of what was run, into the marked sections of docs/miniworld.md.

A section is what stands between `<!-- NAME -->` and `<!-- /NAME -->`; the words around it are written by hand, and
everything between the marks by this module.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from wemmu_jax.ablations import figures
from wemmu_jax.ablations.results import Results, length, road
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


def report(name: str, results: Results) -> str:
    """The section of a study.

    Raises:
      FileNotFoundError: a run that it compares has not been trained or looked at (`queries`: under any seed).
    """
    one = study(name, budget=results.name)
    results.keep(one.graded)
    phases = {phase: run for run in one.runs for phase in road(run.phase)}
    steps = ", ".join(length(results.name, run.at(phase)) for phase, run in phases.items())
    said = (
        f"Budget `{results.name}`: optimizer steps x samples: {steps}; "
        f"{results.budget.graded} held-out requests of each kind. "
        f"Made by `wemmu miniworld ablate {name} --budget {results.name} --out DIR` and "
        f"`wemmu miniworld report {name} --budget {results.name} --out DIR`."
    )
    return f"{_REPORTS[name](one, results)}\n\n{said}"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _done(one: Study, results: Results) -> Sequence[Run]:
    """The runs of the seeds that all arms have; all of them if no seed is done."""
    undone = {run.seed for run in one.runs if not results.graded(run)}
    return [run for run in one.runs if run.seed not in undone] or one.runs


def _queries(one: Study, results: Results) -> str:
    done = _done(one, results)
    arms = dict.fromkeys(run.arm for run in done)
    kinds = [*DRAWING_TASKS["S-Edit"].kinds, "overall"]
    rows = []
    for arm in arms:
        runs = [run for run in done if run.arm == arm]
        scores = [results.means(run)["S-Edit"] for run in runs]
        edits = [_spread([kinds_of[kind] for kinds_of in scores]) for kind in kinds]
        others = zip(*(_edit_row(run, results)[1:] for run in runs), strict=True)
        rows.append([NAMES[arm], *edits, *map(_spread, others)])
    shown = _sheet("queries", "S-Edit", [Run(arm, 0, "stage3") for arm in arms], results)
    seeds = sorted({run.seed for run in done})
    note = f"Mean and standard deviation over seeds {', '.join(map(str, seeds))}. {_FIELDS}"
    heads = ["queries", *kinds, *_EDIT_HEADS[1:]]
    return f"{table(heads, rows)}\n\n{note}\n\n{shown}"


def _sheet(name: str, task: str, runs: Sequence[Run], results: Results) -> str:
    """What each run drew of the first request of each kind, beside sources and target; the Markdown that shows it."""

    def draw(path: pathlib.Path) -> None:
        rows = []
        for kind in DRAWING_TASKS[task].kinds:
            (case,) = cases(task, kind, count=1, seed=REQUESTS_SEED)
            drawn = [results.picture(run, task, kind, 0) for run in runs]
            given = [show(scene, drawn[0].height) for scene in (*case.sources, case.target)]
            rows.append((case.text, [*given, *drawn]))
        sources = [f"source {number}" for number in range(1, len(case.sources) + 1)]
        figures.sheet(path, [*sources, "wanted", *(f"{r.arm} {r.phase}" for r in runs)], rows)

    return results.figure(name, draw)


def _edit_row(run: Run, results: Results) -> list[float]:
    means = results.means(run)
    edits = [means["S-Edit"][field] for field in ("correct", *_EDIT_FIELDS)]
    return [*edits, means["T2I"]["overall"], means["Rec"]["overall"], means["Rec"]["facts"]]


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
    done = _done(one, results)
    rows = []
    for first in (run for run in one.runs if run.seed == 0):
        runs = [run for run in done if (run.arm, run.phase) == (first.arm, first.phase)]
        if not runs:  # of seed 0 alone, which is not done
            continue
        cells = zip(*(_edit_row(run, results) for run in runs), strict=True)
        rows.append([NAMES[first.arm], meant[first.phase], len(runs), *map(_spread, cells)])
    sheets = (
        ("collapse", "S-Edit", ("edits", "joint2")),
        ("collapse-t2i", "T2I", ("stage2", "edits")),
    )
    shown = [
        _sheet(name, task, [r for r in one.runs if r.seed == 0 and r.phase in phases], results)
        for name, task, phases in sheets
    ]
    note = "Mean and, of several, standard deviation over the seeds."
    table_of = _edit_table(["queries", "trained on", "seeds"], rows)
    return f"{table_of} {note}\n\n" + "\n".join(shown)


def _several(one: Study, results: Results) -> str:
    rows = []
    for arm in dict.fromkeys(run.arm for run in one.runs):
        before, after = (results.means(Run(arm, 0, phase)) for phase in ("stage3", "stage4"))
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
        fields, maps = results.attention(run)
        mass = [fields["mass"][group] for group in GROUPS]
        forms = [fields[f] for f in ("log_ratio", "logit_difference", "mass_difference")]
        rows.append(
            [NAMES[run.arm], f"{paper[run.arm]:+.2f}", *(f"{f:+.3f}" for f in forms), *mass]
        )
        found[NAMES[run.arm]] = (maps, fields["groups"])
    shown = results.figure("attention", lambda path: figures.maps(path, found))
    heads = ["queries", "the paper", "log ratio", "logits", "mass"]
    heads += [f"to {group}" for group in GROUPS]
    note = (
        f"Request: {fields['text']!r}. Blue: where VAE tokens begin; red: the text behind the picture; green: the chat "
        "template behind the text. "
        "Log ratio of the mean attention a picture token gets over that of a token behind the picture, text or chat "
        "template; difference of mean logits; difference of total attention. The rest stands before the picture."
    )
    return f"{table(heads, rows)}\n\n{shown}\n\n{note}"


def _curves(name: str, runs: Mapping[str, Run], field: str, label: str, results: Results) -> str:
    """The runs' losses, by the names that they have in the table."""

    def draw(path: pathlib.Path) -> None:
        lines = {}
        for shown, run in runs.items():
            steps, values = results.curve(run, field)
            lines[shown] = (steps, figures.smoothed(values, window=_WINDOW))
        figures.curves(path, lines, label=label)

    return results.figure(name, draw)


def _last(run: Run, field: str, results: Results) -> float:
    return results.curve(run, field)[1][-1]


def _connectors(one: Study, results: Results) -> str:
    names = NAMES | {"noisy": "no VAE branch", "noisy-vae": "linear"}
    runs = {names[run.arm]: run for run in one.runs}
    rows = [
        [name, *(_last(run, f"validation/{task}", results) for task in ("Rec", "S-Edit", "T2I"))]
        for name, run in runs.items()
    ]
    shown = [
        _curves(f"connectors-{task}", runs, f"train/loss_{task}", f"training loss, {task}", results)
        for task in ("Rec", "S-Edit")
    ]
    heads = ["connector", "validation loss, Rec", "S-Edit", "T2I"]
    return f"{table(heads, rows)}\n\n" + "\n".join(shown)


def _vit(one: Study, results: Results) -> str:
    names = {"stage3": "frozen", "stage3-vit": "learns"}
    runs = {names[run.phase]: run for run in one.runs}
    rows = [[name, *_edit_row(run, results)] for name, run in runs.items()]
    shown = _curves("vit", runs, "train/loss", "training loss", results)
    return f"{_edit_table(['ViT'], rows)}\n\n{shown}"


def _scale(one: Study, results: Results) -> str:
    runs = {NAMES[run.arm]: run for run in one.runs}
    rows = [[name, *_edit_row(run, results)] for name, run in runs.items()]
    shown = _curves("scale", runs, "train/loss", "training loss, stage 3", results)
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
    runs = {NAMES[run.arm]: run for run in one.runs}
    rows = [
        [
            name,
            results.means(run)["Rec"]["overall"],
            f"{results.means(run)['Rec']['psnr']:.1f}",
            _last(run, "validation/Rec", results),
        ]
        for name, run in runs.items()
    ]
    shown = _curves("pathway", runs, "train/loss_Rec", "training loss, Rec", results)
    return f"{table(['what the DiT reads', 'scene kept', 'PSNR, dB', 'validation loss'], rows)}\n\n{shown}"


def _losses(one: Study, results: Results) -> str:
    runs = {run.phase: run for run in one.runs}
    rows = [
        [
            name,
            results.means(run)["T2I"]["overall"],
            *(_last(run, f"validation/{task}", results) for task in ("T2I", "Rec")),
        ]
        for name, run in runs.items()
    ]
    shown = _curves("losses", runs, "train/loss_T2I", "flow matching loss, T2I", results)
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
