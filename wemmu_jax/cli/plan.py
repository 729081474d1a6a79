"""`wemmu plan`: what a stage needs and is predicted to take on a TPU pod that is not there."""

import argparse
import os
import pathlib
from collections.abc import Mapping

from wemmu_jax.cli.arguments import whole

_CACHE = "~/.cache/wemmu/plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads; `--config.KEY=VALUE` reaches it as `args.overrides`."""
    parser.set_defaults(overrides={})
    parser.add_argument(
        "--config",
        required=True,
        nargs="+",
        metavar="FILE.py:STAGE",
        help="one stage or several; any key can be set: --config.batch.rows=128",
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:CHIPS",
        help="v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, ...",
    )
    parser.add_argument(
        "--slices", type=whole(1), default=1, help="so many of the topology, joined by DCN"
    )
    parser.add_argument(
        "--init",
        metavar="DIR",
        help="weights or workdir whose sizes are planned (default: the config's, or the paper's backbones)",
    )
    parser.add_argument(
        "--text-length",
        type=whole(1),
        metavar="L",
        help="tokens that texts are padded to (default: the longest of the config's)",
    )
    parser.add_argument(
        "--all-shapes",
        action="store_true",
        help="compile every bucket; by default one of each arity, and scale the others",
    )
    parser.add_argument(
        "--draft",
        action="store_true",
        help="compile with the least effort, in a fifth of the time: all but what a step takes",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="look for the micro-batch, mesh.fsdp and remat policy that predict fastest within memory",
    )
    parser.add_argument(
        "--processes", type=whole(1), default=1, metavar="N", help="that compile at once"
    )
    parser.add_argument(
        "--cache", default=_CACHE, metavar="DIR", help="compiled programs (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="all numbers")


def run(args: argparse.Namespace) -> None:
    """Prints a table for each stage. An error after all of them says which could not be planned or do not fit."""
    os.environ["JAX_PLATFORMS"] = (
        "cpu"  # or this process would take a TPU that it only compiles for
    )

    from wemmu_jax.files import write_json
    from wemmu_jax.planning.programs import Library
    from wemmu_jax.planning.table import table, totals

    if args.draft and args.search:
        raise ValueError("--search goes by the time of a step, which --draft does not tell")
    if args.all_shapes and args.search:
        raise ValueError(
            "--search compiles the shapes that a step's time is told from, not --all-shapes"
        )
    library = Library(pathlib.Path(args.cache).expanduser())
    plans, failed = [], {}
    for spec in args.config:
        try:
            plan, misfit = _planned(spec, args, library)
        except (ValueError, OSError) as error:
            failed[spec] = str(error)
        else:
            print(f"\n{table(plan)}\n", flush=True)
            plans.append(plan)
            if misfit:
                failed[spec] = misfit
        # After each, because a plan may take an hour.
        if args.json:
            found = {"stages": [plan.to_json() for plan in plans], "failed": failed}
            write_json(pathlib.Path(args.json), found)
    if len(plans) > 1 and len(plans) == len(args.config) and not args.draft:
        print(totals(plans))
    if failed:
        raise ValueError(_listed(failed, several=len(args.config) > 1))


def _planned(spec: str, args: argparse.Namespace, library):
    """The plan of a stage; and what would work, if it does not fit."""
    from wemmu_jax.planning.memory import what_fits
    from wemmu_jax.planning.plan import plan_stage
    from wemmu_jax.planning.programs import Setting
    from wemmu_jax.planning.search import search

    setting = Setting.of(
        spec,
        args.overrides,
        topology=args.topology,
        slices=args.slices,
        init=args.init,
        text_length=args.text_length,
        draft=args.draft,
    )
    if args.search:
        setting, plan = search(setting, library, processes=args.processes)
    else:
        plan = plan_stage(setting, library, all_shapes=args.all_shapes, processes=args.processes)
    if plan.spare >= 0:
        return plan, ""
    hint = what_fits(setting, plan.memory["temporaries"], plan.chip.memory)
    return plan, f"{plan.stage} does not fit {plan.topology}: {hint}"


def _listed(failed: Mapping[str, str], *, several: bool) -> str:
    """The errors of stages; one that several have, once."""
    of: dict[str, list[str]] = {}
    for spec, error in failed.items():
        of.setdefault(error, []).append(spec)
    lines = [f"{', '.join(specs)}: {error}" if several else error for error, specs in of.items()]
    return "\n  ".join(lines)
