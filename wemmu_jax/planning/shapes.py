"""The shapes of a stage: which micro-batches there are, how often, and what the model needs for each."""

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.pools import Pool, gather_pools
from wemmu_jax.data.schedule import Schedule
from wemmu_jax.data.sources import build_feeds
from wemmu_jax.data.tasks import STAGE_TASKS, Task
from wemmu_jax.planning.flops import sample_flops
from wemmu_jax.planning.programs import Key, Setting

# Sources of a task's rows where no data sets say it.
_ARITIES = {Task.T2I: 0, Task.UNCOND: 0, Task.REC: 1, Task.S_EDIT: 1, Task.M_EDIT: 2}


class Shape(NamedTuple):
    """What micro-batches of one shape have in common; `cached`: their latents are, so that the DC-AE does not run."""

    arity: int
    bucket: Bucket
    cached: bool = False

    @property
    def programs(self) -> dict[Key, int]:
        """What a micro-batch runs, and how often."""
        bucket = self.bucket
        runs = {Key("accumulate", self.arity, bucket): 1}
        if not self.cached:
            runs[Key("encode target", bucket=bucket)] = 1
            if self.arity:
                runs[Key("encode source", bucket=bucket)] = self.arity
        return runs


def shares(setting: Setting) -> dict[Shape, float]:
    """Share of each shape in the micro-batches, as the schedule deals them out.

    By the config's data sets; without any, all buckets alike, and as many sources as each task usually has.
    """
    config, buckets = setting.config, setting.run.buckets
    mixture = {task: config.data.mixture[task.value] for task in STAGE_TASKS}
    mixture = {task: weight for task, weight in mixture.items() if weight}
    if config.data.sources:
        feeds = build_feeds(config.data.sources, bad_share=config.data.bad_share)
        pools = gather_pools(feeds, mixture, buckets, config.batch.rows)
    else:
        pools = [
            Pool(task, _ARITIES[task], 0, Fraction(1), (np.zeros(1, np.int32),), any_size=True)
            for task in mixture
        ]
    schedule = Schedule(
        mixture, pools, bucket_count=len(buckets), rows=config.batch.rows, seed=config.seed
    )
    return {
        Shape(arity, buckets[bucket], cached=setting.run.cached): float(share)
        for (arity, bucket), share in sorted(schedule.shares.items())
    }


def squarest(shapes: Mapping[Shape, float], arity: int) -> Shape:
    """Of an arity, the shape that is nearest to a square."""
    return min(
        (shape for shape in shapes if shape.arity == arity),
        key=lambda shape: abs(shape.bucket.log_aspect),
    )


def model_flops(setting: Setting, shape: Shape) -> Mapping[str, float]:
    """Part -> FLOPs of a sample."""
    return sample_flops(
        setting.sizes,
        shape.bucket,
        arity=shape.arity,
        text=setting.text_length,
        learns=setting.run.trainer.learns,
        cached=shape.cached,
    )
