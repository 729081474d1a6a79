"""`wemmu miniworld`: trains the tiny preset's backbones, and the paper's ablations on them."""

import argparse
import pathlib

from wemmu_jax.cli.arguments import whole
from wemmu_jax.shipped import BACKBONES

BACKBONE_NAMES = ("vlm", "dc-ae", "sana")
STUDIES = (
    "queries",
    "scale",
    "collapse",
    "several",
    "attention",
    "connectors",
    "vit",
    "stream",
    "pathway",
    "losses",
)

_SECTIONS = ("backbones", "stages", "scores")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "trains a backbone of the tiny preset; `sana` learns on the latents of `dc-ae`"
    pretrain = actions.add_parser("pretrain", help=text, description=text, allow_abbrev=False)
    pretrain.add_argument("backbone", choices=BACKBONE_NAMES)
    pretrain.add_argument(
        "--out", required=True, type=pathlib.Path, metavar="DIR", help="DIR/vlm and DIR/sana"
    )
    pretrain.add_argument(
        "--workdir", required=True, type=pathlib.Path, metavar="DIR", help="checkpoints and metrics"
    )
    pretrain.add_argument("--seed", type=whole(0), default=0)
    pretrain.add_argument("--steps", type=whole(2), help="of training; the recipe's own by default")
    pretrain.set_defaults(act=_pretrain)

    text = "trains and grades what a study of the paper compares; goes on where it was stopped"
    ablate = actions.add_parser("ablate", help=text, description=text, allow_abbrev=False)
    ablate.add_argument("study", choices=(*STUDIES, "all"))
    ablate.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
    ablate.add_argument("--budget", choices=("smoke", "full"), default="smoke")
    ablate.add_argument(
        "--backbones",
        type=pathlib.Path,
        default=BACKBONES,
        metavar="DIR",
        help="with vlm/ and sana/ (default: those that come with the package)",
    )
    ablate.add_argument(
        "--processes", type=whole(1), default=1, help="share the cores; 2 on a two-core CPU"
    )
    text = "of the study's runs, ARM/seedN/PHASE, those of such names; '*/seed1/*' is a seed (default: %(default)s)"
    ablate.add_argument("--only", metavar="PATTERN", default="*", help=text)
    ablate.set_defaults(act=_ablate)

    text = "writes what ablations found into the marked sections of a page"
    report = actions.add_parser("report", help=text, description=text, allow_abbrev=False)
    report.add_argument("section", choices=(*STUDIES, "all", *_SECTIONS))
    text = (
        "of ablate; for backbones with the card; for stages with the workdirs stage1/ to stage4/; "
        "for scores with stage3/ and stage4/ of `wemmu evaluate`"
    )
    report.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR", help=text)
    report.add_argument("--budget", choices=("smoke", "full"), default="smoke")
    report.add_argument("--page", type=pathlib.Path, default=pathlib.Path("docs/miniworld.md"))
    report.set_defaults(act=_report)


def run(args: argparse.Namespace) -> None:
    """Does what was asked for."""
    args.act(args)


def _pretrain(args: argparse.Namespace) -> None:
    from wemmu_jax.tiny.commands import pretrain_backbone

    pretrain_backbone(args.backbone, args.out, args.workdir, seed=args.seed, steps=args.steps)


def _ablate(args: argparse.Namespace) -> None:
    from wemmu_jax.ablations.jobs import Ledger, run_jobs
    from wemmu_jax.ablations.plan import estimate, jobs
    from wemmu_jax.training.metrics import clock

    names = STUDIES if args.study == "all" else (args.study,)
    out = args.out / args.budget
    todo = jobs(names, budget=args.budget, out=out, backbones=args.backbones, only=args.only)
    ledger = Ledger(out / "jobs")
    seconds = estimate(todo, budget=args.budget, ledger=ledger) / args.processes
    left = sum(ledger.seconds(job.name) is None for job in todo)
    print(f"{left} of {len(todo)} jobs to do, about {clock(seconds)} on {args.processes} processes")
    run_jobs(todo, ledger, processes=args.processes, say=lambda text: print(text, flush=True))


def _report(args: argparse.Namespace) -> None:
    from wemmu_jax.ablations import summary
    from wemmu_jax.ablations.report import Results, report, write

    pictures = args.page.with_suffix("")
    if args.section == "scores":
        write(args.page, "scores", summary.scores_section(args.out))
    elif args.section == "backbones":
        write(args.page, "backbones", summary.backbones_section(args.out, pictures))
    elif args.section == "stages":
        write(args.page, "stages", summary.stages_section(args.out, pictures))
    else:
        results = Results(args.out, args.budget, pictures)
        for name in STUDIES if args.section == "all" else (args.section,):
            try:
                section = report(name, results)
            except FileNotFoundError as error:
                if args.section != "all":
                    raise
                print(f"{name}: not run to its end, its section stays as it is ({error.filename})")
            else:
                write(args.page, name, section)
    print(args.page)
