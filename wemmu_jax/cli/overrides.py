"""`--config.key=value` and `--config.key value`: keys of a config, which argparse cannot know."""

from collections.abc import Sequence

PREFIX = "--config."


def take_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words without `--config.KEY=VALUE`, and these as {KEY: VALUE}.

    Raises:
      SystemExit: a key has no value, or is given twice.
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
            raise SystemExit(f"wemmu: {word}: expected {PREFIX}KEY=VALUE")
        if key in overrides:
            raise SystemExit(f"wemmu: {PREFIX}{key} is given twice")
        overrides[key] = value
    return left, overrides
