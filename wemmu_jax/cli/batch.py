"""`wemmu batch`: many requests from a JSONL file. All of them are checked before the first picture is drawn."""

import argparse
import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from wemmu_jax.cli.answers import FOLDER, Answers
from wemmu_jax.cli.arguments import add_model, add_steps
from wemmu_jax.cli.pictures import check_target, save, settings_of
from wemmu_jax.cli.request_lines import ANSWERS, Line, read_lines

if TYPE_CHECKING:
    from wemmu_jax.inference.pipeline import WeMMU


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that can be done.

    Attributes:
      line: the request.
      settings: what is written beside its picture or its answer.
      done: an earlier run did it.
    """

    line: Line
    settings: dict[str, Any]
    done: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.add_argument(
        "requests",
        metavar="REQUESTS.jsonl",
        help="a JSON object a line: task, instruction, input_images, output_image, height, width, seed",
    )
    add_model(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="for pictures, and answers.jsonl of chat"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="do again what is there, instead of skipping it"
    )
    add_steps(parser)


def run(args: argparse.Namespace) -> None:
    """Does what is not there yet, one request at a time: a picture depends on its own line alone."""
    from wemmu_jax.inference.pipeline import WeMMU

    file = pathlib.Path(args.out) / ANSWERS
    check_target(file, name="--out")
    answers = Answers(file)
    bare = WeMMU.without_weights(args.checkpoint, dtype=args.dtype)
    jobs = _jobs(args, bare, answers)
    todo = [job for job in jobs if not job.done]
    if todo:
        model = WeMMU.load(args.checkpoint, dtype=args.dtype)
        for job in todo:
            _do(job, model, answers)
    drawn = sum(job.line.target is not None for job in todo)
    print(
        f"{args.out}: {drawn} pictures drawn, {len(todo) - drawn} questions answered, "
        f"{len(jobs) - len(todo)} skipped because they were there"
    )


def _jobs(args: argparse.Namespace, bare: "WeMMU", answers: Answers) -> list[Job]:
    """All requests of the file; raises one ValueError that names every bad line."""
    file = pathlib.Path(args.requests)
    lines, faults = read_lines(file, pathlib.Path(args.out), steps=args.steps)
    jobs = []
    for line in lines:
        try:
            jobs.append(_job(line, bare, args, answers))
        except (ValueError, OSError) as error:
            faults.append((line.number, str(error)))
    if faults:
        listed = "\n  ".join(f"line {number}: {fault}" for number, fault in sorted(faults))
        raise ValueError(f"{file}: nothing was drawn, these lines cannot be:\n  {listed}")
    return jobs


def _job(line: Line, bare: "WeMMU", args: argparse.Namespace, answers: Answers) -> Job:
    request, target = line.request, line.target
    if target is None:
        bare.check_chat(request.instruction, request.images)
        asked = {
            "instruction": request.instruction,
            "input_images": list(request.images),
            "seed": request.seed,
            "checkpoint": str(pathlib.Path(args.checkpoint)),
            "weights": bare.identity,
            "dtype": args.dtype,
        }
        return Job(line, asked, answers.has(asked) and not args.overwrite)
    size = request.size(bare)
    settings = request.settings(size, bare, checkpoint=args.checkpoint, dtype=args.dtype)
    if args.overwrite or not target.exists():
        return Job(line, settings, done=False)
    found = settings_of(target)
    differing = [
        f"{name} {found.get(name)!r} there, {value!r} here"
        for name, value in settings.items()
        if name not in ("wemmu", FOLDER) and found.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"output_image: {target} is there with other settings ({'; '.join(differing)}); choose another "
            "--out, or give --overwrite"
        )
    return Job(line, settings, done=True)


def _do(job: Job, model: "WeMMU", answers: Answers) -> None:
    request, target = job.line.request, job.line.target
    if target is None:
        answer = model.chat(request.instruction, images=request.images, seed=request.seed)
        answers.add(job.settings, answer)
    else:
        save(request.draw(model), target, job.settings)
    print(f"line {job.line.number}: {target or 'answered'}", flush=True)
