"""`--config.key=value` and `--config.key value`: keys of a config, which argparse cannot know."""

import sys
from collections.abc import Sequence
from typing import NoReturn

PREFIX = "--config."


def take_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words without `--config.KEY=VALUE`, and these as {KEY: VALUE}.

    Raises:
      SystemExit: with argparse's code, 2: a key has no value, or is given twice.
    """
    left, overrides, rest = [], {}, iter(words)
    for word in rest:
        if word == "--":
            return [*left, word, *rest], overrides
        if not word.startswith(PREFIX):
            left.append(word)
            continue
        key, equals, value = word.removeprefix(PREFIX).partition("=")
        value = value if equals else next(rest, None)
        if not key or value is None:
            _refuse(f"{word}: expected {PREFIX}KEY=VALUE")
        if key in overrides:
            _refuse(f"{PREFIX}{key} is given twice")
        overrides[key] = value
    return left, overrides


def _refuse(message: str) -> NoReturn:
    print(f"wemmu: {message}", file=sys.stderr)
    raise SystemExit(2)
