"""The jobs that studies need, and how long they will take."""

import fnmatch
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

from configs.ablations import BUDGETS, PHASES, get_config
from wemmu_jax.ablations import work
from wemmu_jax.ablations.jobs import Job, Ledger
from wemmu_jax.ablations.results import recipe
from wemmu_jax.ablations.studies import Run, study
from wemmu_jax.conversion.safetensors_io import sha256_of
from wemmu_jax.evaluation.miniworld import DRAWING_TASKS


def jobs(
    names: Sequence[str],
    *,
    budget: str,
    out: pathlib.Path,
    backbones: pathlib.Path,
    only: str = "*",
) -> list[Job]:
    """Everything that the studies need, each job after those that it needs; what two of them need is there once.

    Args:
      names: of the studies.
      budget: of `configs.ablations.BUDGETS`.
      out: where runs, grades and logs go.
      backbones: Hugging Face folders vlm/ and sana/.
      only: which of the studies' runs, as a pattern of their names, ARM/seedN/PHASE.

    Raises:
      ValueError: no run has such a name.
    """
    studies = [study(name, budget=budget) for name in names]
    runs = {str(run): run for one in studies for run in one.runs}
    wanted = {runs[name] for name in fnmatch.filter(runs, only)}
    if not wanted:
        raise ValueError(f"no run is named {only!r}; there are {', '.join(sorted(runs))}")
    common = {"out": str(out), "budget": budget}
    found: dict[str, Job] = {}

    def add(name: str, needs: Iterable[str], call, made_from: str = "", **arguments) -> str:
        found[name] = Job(name, tuple(needs), call, arguments, made_from)
        return name

    converted = add(
        "convert",
        (),
        work.convert_backbones,
        made_from=_content(backbones),
        backbones=str(backbones),
        **common,
    )

    def trained(run: Run) -> str:
        name = f"train/{run}"
        if name in found:
            return name
        start = PHASES[run.phase].start
        need = converted if start is None else trained(run.at(start))
        made_from = recipe(json.loads(get_config(f"{budget}/{run}").to_json()))
        return add(name, (need,), work.train_phase, made_from=made_from, run=str(run), **common)

    asked_for = f"{BUDGETS[budget].graded} requests of a kind, seed {work.REQUESTS_SEED}"
    tasks: dict[Run, list[str]] = {}
    for one in studies:
        for run, asked in one.graded.items():
            known = tasks.setdefault(run, [])
            known += [task for task in asked if task not in known]
    looked_at = {run for one in studies for run in one.attention}
    # Seed by seed, and looked at as soon as it is trained: stopped early, every study has its first seeds.
    for run in sorted(runs.values(), key=lambda run: run.seed):
        if run not in wanted:
            continue
        need = trained(run)
        if run in tasks:
            graded = f"{asked_for}, {BUDGETS[budget].solver_steps} steps"
            where = {"run": str(run), "tasks": tasks[run]}
            add(f"grade/{run}", (need,), work.grade, made_from=graded, **where, **common)
        if run in looked_at:
            add(f"attend/{run}", (need,), work.attend, made_from=asked_for, run=str(run), **common)
    return list(found.values())


def _content(folder: pathlib.Path) -> str:
    """A digest of what is converted; a card beside it may be written anew."""
    digest = hashlib.sha256()
    files = [file for part in ("vlm", "sana") for file in (folder / part).rglob("*")]
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.relative_to(folder)}: {sha256_of(file)}\n".encode())
    return digest.hexdigest()


# Guesses for one core, until jobs of a kind are done: samples of training and pictures of grading a second, and the
# seconds that a job takes to compile, with XLA's optimizations and without.
_SAMPLES, _PICTURES, _COMPILE = 25.0, 4.0, {True: 60.0, False: 25.0}


def estimate(todo: Sequence[Job], *, budget: str, ledger: Ledger) -> float:
    """Seconds of one process for all jobs that are not done; finished jobs of a kind tell what the others will take."""
    known: dict[str, list[float]] = {}
    for job in todo:
        if (seconds := ledger.seconds(job.name)) is not None:
            known.setdefault(_kind(job), []).append(seconds)
    total = 0.0
    for job in todo:
        if ledger.seconds(job.name) is None:
            took = known.get(_kind(job))
            total += sum(took) / len(took) if took else _guess(job, budget)
    return total


def _kind(job: Job) -> str:
    """What jobs that take about as long have in common."""
    return f"{job.name.split('/')[0]}/{job.name.split('/')[-1]}"


def _guess(job: Job, budget: str) -> float:
    limits = BUDGETS[budget]
    begin = _COMPILE[limits.optimised]
    what = job.name.split("/")[0]
    if what == "train":
        config = get_config(f"{budget}/{job.arguments['run']}")
        return begin + config.optimizer.steps * config.paper.batch / _SAMPLES
    if what == "grade":
        kinds = sum(len(DRAWING_TASKS[task].kinds) for task in job.arguments["tasks"])
        pictures = limits.graded * kinds
        return begin + pictures * limits.solver_steps / 20 / _PICTURES
    return begin
