"""`wemmu plan`: what a stage needs and is predicted to take on a TPU pod that is not there."""

import argparse
import os
import pathlib

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
        help="tokens that texts are padded to (default: the config's shortest)",
    )
    parser.add_argument(
        "--all-shapes",
        action="store_true",
        help="compile every bucket; by default one of each arity, and scale the others",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="look for the micro-batch, mesh and remat policy that predict fastest within memory",
    )
    parser.add_argument(
        "--processes", type=whole(1), default=1, metavar="N", help="that compile at once"
    )
    parser.add_argument(
        "--cache", default=_CACHE, metavar="DIR", help="compiled programs (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="all numbers")


def run(args: argparse.Namespace) -> None:
    """Prints a table for each stage. An error after it says so where a stage does not fit."""
    os.environ["JAX_PLATFORMS"] = (
        "cpu"  # or this process would take a TPU that it only compiles for
    )

    from wemmu_jax.files import write_json
    from wemmu_jax.planning.memory import what_fits
    from wemmu_jax.planning.plan import DoesNotFit, plan_stage
    from wemmu_jax.planning.programs import Library, Setting
    from wemmu_jax.planning.search import search
    from wemmu_jax.planning.table import table, totals

    library = Library(pathlib.Path(args.cache).expanduser())
    plans, misfits = [], []
    for spec in args.config:
        setting = Setting.of(
            spec,
            args.overrides,
            topology=args.topology,
            slices=args.slices,
            init=args.init,
            text_length=args.text_length,
        )
        if args.search:
            setting, plan = search(setting, library, processes=args.processes)
        else:
            plan = plan_stage(
                setting, library, all_shapes=args.all_shapes, processes=args.processes
            )
        print(f"\n{table(plan)}\n", flush=True)
        plans.append(plan)
        if plan.spare < 0:
            hint = what_fits(setting, plan.memory["temporaries"], plan.chip.memory)
            misfits.append(f"{plan.stage} does not fit {plan.topology}: {hint}")
    if len(plans) > 1:
        print(totals(plans))
    if args.json:
        write_json(pathlib.Path(args.json), {"stages": [plan.to_json() for plan in plans]})
    if misfits:
        raise DoesNotFit("; ".join(misfits))
