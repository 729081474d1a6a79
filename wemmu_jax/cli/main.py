"""`wemmu COMMAND ...`: finds the command's module, runs it, and turns a user's errors into one message.

A command is a module with `add_arguments(parser)` and `run(args)`. It is imported only when it is asked for, and
imports jax only inside `run`, so that `--help` answers at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import wemmu_jax
from wemmu_jax.cli.overrides import take_overrides
from wemmu_jax.errors import USER_ERRORS, passes
from wemmu_jax.files import check_local

COMMANDS = {
    "convert": "Hugging Face folders -> our checkpoint",
    "export": "our checkpoint -> Hugging Face folders, and one file of what WeMMU adds",
    "data": "checks, shows, indexes, encodes, captions and packs data sets",
    "plan": "what a stage needs and takes on a TPU pod, without one",
    "train": "one stage of the curriculum",
    "generate": "pictures from text",
    "edit": "a picture and an instruction -> a picture",
    "compose": "several pictures and an instruction -> a picture",
    "reconstruct": "the same picture again",
    "chat": "answers a question, about pictures or without any",
    "batch": "many requests from a JSONL file",
    "evaluate": "draws a benchmark's pictures and scores them",
    "miniworld": "trains the tiny preset's backbones; runs and reports ablations on them",
    "demo": "the whole life of a model on the tiny preset",
}

# Arguments that name what is read or written on a disk; data sets' own paths may be URLs.
_LOCAL = {
    *("workdir", "init", "checkpoint", "out", "vlm", "sana", "bridge", "backbones", "cache"),
    *("json", "page"),
}

FAILED, TRY_AGAIN, INTERRUPTED = 2, 75, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after `wemmu`; those of this process by default.

    Returns:
      The exit code: 0, 2 after an error that the user can mend (a message on stderr, with a traceback only under
      `--debug` or WEMMU_DEBUG=1), 75 (sysexits' EX_TEMPFAIL) if the same command is to be run again: SIGTERM
      stopped it, a process never came, or storage or network failed for the moment (`errors.passes`), 130 after
      Ctrl-C.

    Raises:
      SystemExit: from argparse, for `--help` and for words that no command takes.
    """
    words, overrides = take_overrides(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), None)
    parser, module = _parser(command)
    args = parser.parse_args(words)
    if overrides and "overrides" not in args:
        parser.error(f"wemmu {command} takes no --config.KEY: {', '.join(overrides)}")
    args.overrides = overrides
    try:
        for name in sorted(_LOCAL & vars(args).keys()):
            check_local(vars(args)[name] or "", name=f"--{name}")
        module.run(args)
    except InterruptedError as error:
        print(f"wemmu {command}: {error}", file=sys.stderr)
        return TRY_AGAIN
    except USER_ERRORS as error:
        if args.debug or os.environ.get("WEMMU_DEBUG", "0") not in ("", "0"):
            raise
        print(f"wemmu {command}: {error}", file=sys.stderr)
        return TRY_AGAIN if passes(error) else FAILED
    except KeyboardInterrupt:
        print(f"wemmu {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser(command: str | None):
    """The parser, whose `command` alone knows its arguments, and that command's module."""
    parser = argparse.ArgumentParser(
        prog="wemmu", description=wemmu_jax.__doc__, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"wemmu {wemmu_jax.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = None
    for name, text in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
        if name == command:
            module = importlib.import_module(f"wemmu_jax.cli.{name}")
            module.add_arguments(one)
    return parser, module
