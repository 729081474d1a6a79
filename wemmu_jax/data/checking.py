"""What a data set holds and what is wrong with it, before it is trained on."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from wemmu_jax.data.buckets import Bucket, nearest_indices
from wemmu_jax.data.index import Problem
from wemmu_jax.data.indexing import Progress
from wemmu_jax.data.pictures import open_picture
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.processes import each
from wemmu_jax.data.records import conversations, source_counts
from wemmu_jax.data.sources import IndexedSource
from wemmu_jax.data.tasks import Task, arities, make_example

CHUNK = 256  # records that a process checks at a time
# What other formats put where a picture goes; the prompt has places of its own, so these would be read as words.
PLACEHOLDERS = ("<image>", "<gen_image>", "<|image_pad|>", "<|vision_start|>", "<img>")
TRIED = 100  # records, before none is thought to serve a task
LONG = 1000  # characters; about what the 256 tokens hold that a text is cut to, the chat template among them

_DIGITS = str.maketrans("0123456789", "##########")


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found in a data set.

    Attributes:
      records, pictures, bytes: how many could be read.
      sources: the number of source pictures -> records.
      conversations, turns: how many of the records are conversations, and the turns of all of them.
      heights, widths: smallest, median and largest of the targets, and of conversations' first pictures; pixels.
      buckets: of the resolution asked for -> records that are nearest to it.
      same_pictures: targets whose bytes another record's target has too, by their checksum and size.
      placeholders, long: texts with another format's placeholder, and texts of more than LONG characters.
      problems: what cannot be read.
    """

    records: int
    pictures: int
    bytes: int
    sources: dict[int, int]
    conversations: int
    turns: int
    heights: tuple[int, int, int]
    widths: tuple[int, int, int]
    buckets: dict[Bucket, int]
    same_pictures: int
    placeholders: int
    long: int
    problems: tuple[Problem, ...]

    def lines(self) -> list[str]:
        """As a person reads it."""
        sources = ", ".join(f"{count} with {n}" for n, count in sorted(self.sources.items()))
        lines = [
            f"records            {self.records:>12,}   source pictures: {sources}",
            f"pictures           {self.pictures:>12,}   {self.bytes / 1e6:,.1f} MB",
            f"target heights     {_range(self.heights)}",
            f"target widths      {_range(self.widths)}",
            f"same target bytes  {self.same_pictures:>12,}",
            f"placeholder texts  {self.placeholders:>12,}   of another format, read as words",
            f"long texts         {self.long:>12,}   over {LONG} characters, may be cut",
            f"unreadable         {len(self.problems):>12,}",
        ]
        if self.conversations:
            lines.insert(1, f"conversations      {self.conversations:>12,}   turns: {self.turns:,}")
        for kind, count in self.kinds().most_common(10):
            lines.append(f"  {count:>8,} x {kind}")
        lines.append("buckets")
        most = max(self.buckets.values(), default=0) or 1
        for bucket, count in self.buckets.items():
            bar = "#" * round(30 * count / most)
            lines.append(f"  {bucket.height:>5} x {bucket.width:<5} {count:>10,}  {bar}")
        return lines

    def kinds(self) -> collections.Counter[str]:
        """Problems of one kind together: without paths and numbers."""
        return collections.Counter(
            " ".join("..." if "/" in word else word for word in problem.reason.split())
            .translate(_DIGITS)
            .strip()[:100]
            for problem in self.problems
        )


def check(
    source: IndexedSource, buckets: Sequence[Bucket], *, processes: int, progress: Progress
) -> Report:
    """Reads and decodes every picture of a data set."""
    starts = range(0, len(source), CHUNK)
    jobs = [(source, start, min(start + CHUNK, len(source))) for start in starts]
    problems = list(source.problems())
    counts: collections.Counter[str] = collections.Counter()
    for done, (found, counted) in enumerate(each(_check_part, jobs, processes), 1):
        problems += found
        counts += counted
        progress(done, len(jobs))
    nearest = np.bincount(nearest_indices(buckets, source.sizes()), minlength=len(buckets))
    sums = source.index.checksums()
    numbers, records = np.unique(source.source_counts(), return_counts=True)
    talks = source.conversations()
    sizes = source.sizes()[~talks | (source.source_counts() > 0)]
    return Report(
        records=len(source) - (len(problems) - source.index.problem_count),
        pictures=counts["pictures"],
        bytes=counts["bytes"],
        sources=dict(zip(numbers.tolist(), records.tolist(), strict=True)),
        conversations=int(np.count_nonzero(talks)),
        turns=counts["turns"],
        heights=_spread(sizes[:, 0]),
        widths=_spread(sizes[:, 1]),
        buckets=dict(zip(buckets, nearest.tolist(), strict=True)),
        same_pictures=len(sums) - len(np.unique(sums)),
        placeholders=counts["placeholders"],
        long=counts["long"],
        problems=tuple(sorted(problems, key=lambda problem: problem.key)),
    )


def _check_part(
    source: IndexedSource, start: int, stop: int
) -> tuple[list[Problem], collections.Counter[str]]:
    problems, counts = [], collections.Counter()
    for number in range(start, stop):
        key, turns = source.index.key(number), source.index.turns(number)
        said = [text for turn in turns for text in (turn.question, turn.answer)]
        text = "\n".join(said or [source.index.text(number)])
        counts["turns"] += len(turns)
        counts["placeholders"] += any(word in text for word in PLACEHOLDERS)
        counts["long"] += len(text) > LONG
        try:
            for found in dict.fromkeys(source.index.pictures(number)):
                data = source.read(found)
                open_picture(data, name=found.place.path)
                counts["pictures"] += 1
                counts["bytes"] += len(data)
        except (ValueError, OSError) as error:
            problems.append(Problem(key, str(error)))
    return problems, counts


def check_task(feed: Feed) -> None:
    """Sees that a data set has records for a task that it is given to.

    Raises:
      ValueError: none can serve it; says why.
    """
    own = conversations(feed.source) == (feed.task is Task.VQA)
    serving = np.flatnonzero(own & (arities(feed.task, source_counts(feed.source)) >= 0))
    error = f"none of its {len(feed.source):,} records can serve task {feed.task.value}"
    for number in serving[:TRIED].tolist():
        try:
            make_example(feed.task, feed.source[number])
            return
        except ValueError as reason:
            error = f"task {feed.task.value} can use none of its records that were tried: {reason}"
    raise ValueError(error)


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    if not len(values):  # conversations without pictures
        return 0, 0, 0
    return int(values.min()), int(np.median(values)), int(values.max())


def _range(spread: tuple[int, int, int]) -> str:
    return f"{spread[1]:>12,}   median; {spread[0]:,} to {spread[2]:,}"


def duplicate_keys(source: IndexedSource) -> list[str]:
    """Keys that several records have; the ledger and sidecars could not tell these apart."""
    keys: Callable[[int], str] = source.index.key
    hashes = np.fromiter((hash(keys(number)) for number in range(len(source))), np.int64)
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    return sorted({keys(number) for number in order[1:][same].tolist()})
