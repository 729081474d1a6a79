"""How much a step does and how long it takes: tokens and model FLOPs of rows, seconds of laps, MFU.

B rows of a micro-batch. A lap is what lies between two reports of the loop, mostly one step.
"""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Hashable, Iterator

import jax
import numpy as np

from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.pipeline import MicroBatch
from wemmu_jax.models.wemmu.config import Connector, Pathway, VAEStream, WeMMUConfig
from wemmu_jax.planning.chips import peak_flops
from wemmu_jax.planning.flops import Learns, sample_flops

WINDOW = 20  # laps over which speeds are taken
ASIDE = "aside"  # what a lap spends on anything but training: validation, pictures, checkpoints
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Work:
    """What some rows make the model do, padding not counted.

    Attributes:
      tokens: that the VLM and the expert read: of prompts, pictures among them, and queries.
      teraflops: by formula, see `planning.flops`; the DC-AE's only where it runs.
    """

    tokens: int = 0
    teraflops: float = 0.0


def row_work(config: WeMMUConfig, learns: Learns, micro_batch: MicroBatch) -> dict[str, np.ndarray]:
    """The work of each row of this process: `tokens` int32[B] and `teraflops` float32[B]."""
    arrays, bucket, arity = micro_batch.arrays, micro_batch.bucket, micro_batch.arity
    cached = arrays["target"].dtype != np.uint8
    rows = [
        _sample_work(config, learns, bucket, arity, int(count), cached)
        for count in arrays["valid"].sum(axis=1)
    ]
    return {
        "tokens": np.array([row.tokens for row in rows], np.int32),
        "teraflops": np.array([row.teraflops for row in rows], np.float32),
    }


@functools.lru_cache(maxsize=4096)
def _sample_work(
    config: WeMMUConfig, learns: Learns, bucket: Bucket, arity: int, prompt: int, cached: bool
) -> Work:
    """`prompt`: its tokens; `cached`: whether latents came from a cache."""
    bridge = config.bridge
    rows, columns = config.source_grid(bucket.height, bucket.width)
    sources = arity * rows * columns
    text = prompt - sources * (1 + bridge.vae_in_prompt)
    flops = sample_flops(config, bucket, arity=arity, text=text, learns=learns, cached=cached)
    grid = config.query_grid(bucket.height, bucket.width)
    has_vae = bridge.connector is not Connector.NONE
    beside = sources if has_vae and bridge.vae_stream is VAEStream.EXPERT else 0
    tokens = prompt + beside + grid[0] * grid[1]
    if bridge.pathway is Pathway.VIT:
        tokens = sources
    return Work(tokens, sum(flops.values()) / TERA)


@dataclasses.dataclass(frozen=True)
class _Lap:
    steps: int
    seconds: float  # of training
    work: Work


class Stopwatch:
    """Where the time goes between reports, and speeds over the last `WINDOW` laps.

    A lap that compiles, the first one or one with micro-batches of a new shape, counts only while there is no other.
    """

    def __init__(self, *, batch: int, start: int):
        """`batch`: samples a step; `start`: the step after which the run begins."""
        self._batch, self._step = batch, start
        self._began = time.perf_counter()
        self._spent: dict[str, float] = collections.defaultdict(float)
        self._laps: collections.deque[_Lap] = collections.deque(maxlen=WINDOW)
        self._shapes: set[Hashable] = set()
        self._compiles, self._only_compiled = True, True

    def see(self, shape: Hashable) -> None:
        """A micro-batch of this shape is dispatched in this lap."""
        if shape not in self._shapes:
            self._shapes.add(shape)
            self._compiles = True

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Counts the time inside as spent on `what` in this lap."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - start

    def lap(self, step: int, work: Work) -> dict[str, float]:
        """Ends a lap at `step`, in which `work` was done, of all processes.

        Returns:
          `step_seconds` without what was spent aside; `WHAT_seconds` for all else that was timed; `steps_per_second`,
          `samples_per_second`; and, where there is work, `tokens_per_second`, `model_teraflops_per_second` of one
          device, and `mfu` of devices whose peak is known.
        """
        now = time.perf_counter()
        spent = dict(self._spent)
        self._spent.update(dict.fromkeys(spent, 0.0))  # what was timed once is told in every lap
        steps, seconds = step - self._step, now - self._began - spent.pop(ASIDE, 0.0)
        if self._only_compiled:
            self._laps.clear()
            self._only_compiled = self._compiles
        if self._only_compiled or not self._compiles:
            self._laps.append(_Lap(steps, max(seconds, 1e-9), work))
        self._compiles = False
        self._began, self._step = now, step
        values = {f"{what}_seconds": part / steps for what, part in spent.items()}
        return {"step_seconds": seconds / steps, **values, **self._speeds()}

    def _speeds(self) -> dict[str, float]:
        seconds = sum(lap.seconds for lap in self._laps)
        steps = sum(lap.steps for lap in self._laps) / seconds
        values = {"steps_per_second": steps, "samples_per_second": steps * self._batch}
        teraflops = sum(lap.work.teraflops for lap in self._laps) / seconds / jax.device_count()
        if teraflops:
            tokens = sum(lap.work.tokens for lap in self._laps)
            values["tokens_per_second"] = tokens / seconds
            values["model_teraflops_per_second"] = teraflops
            if peak := peak_flops(jax.devices()[0].device_kind):
                values["mfu"] = teraflops * TERA / peak
        return values
