"""New captions for a data set by the frozen VLM, as the paper made its own: `wemmu data caption`.

Pictures are grouped by bucket, so that one compiled program captions a batch of them; all chips of the host share a
batch. Captions go to sidecars that sources read, a part at a time; a part that is there is not made again, and a folder
goes on with the records, the model and the question that it began with.
"""

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.conversion.memory import nest
from wemmu_jax.data.buckets import Bucket, make_buckets, nearest_indices
from wemmu_jax.data.indexing import Progress
from wemmu_jax.data.manifest import go_on
from wemmu_jax.data.prompts import DESCRIPTION_PROMPT
from wemmu_jax.data.sources import IndexedSource
from wemmu_jax.files import replacing
from wemmu_jax.inference.sampling import Sampler
from wemmu_jax.models.qwen2_5_vl.decode import Sampling
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.rng import Stream, stream_key
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.rules import replicated, rows_sharding
from wemmu_jax.training.origin import Origin

PART = 2048  # records


class Captioner:
    """The VLM of a checkpoint, and what it is asked.

    Attributes:
      buckets: sizes at which pictures are looked at.
      made_from: what a caption depends on beside its picture, as JSON values.
    """

    def __init__(
        self,
        checkpoint: str | pathlib.Path,
        *,
        dtype: jnp.dtype = jnp.bfloat16,
        prompt: str = DESCRIPTION_PROMPT,
        resolution: int = 512,
        batch: int = 32,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 frozen
        seed: int = 0,
    ):
        """Reads the VLM's weights alone.

        Args:
          checkpoint: a converted folder or a training workdir.
          dtype: of weights and large products.
          prompt: what is asked about every picture.
          resolution: sides of the square among the sizes at which pictures are looked at, near it.
          batch: pictures at a time, over all chips of this host.
          max_new_tokens: at which a caption is cut.
          sampling: greedy by default.
          seed: of the sampling.

        Raises:
          FileNotFoundError, ValueError: as `Origin`; or the chips do not divide the batch.
        """
        origin = Origin(checkpoint)
        config = WeMMUConfig.from_folder(origin.backbones_folder, BridgeConfig())
        self._sampler = Sampler(WeMMUModel(config, dtype=jnp.dtype(dtype)))
        self._mesh = make_mesh(fsdp=1)
        if batch % jax.device_count():
            raise ValueError(f"{jax.device_count()} chips do not divide a batch of {batch}")
        unit = config.vlm.vision.unit
        self.buckets = make_buckets(max(round(resolution / unit), 1) * unit, multiple=unit)
        grids = [(bucket.height // unit, bucket.width // unit) for bucket in self.buckets]
        self._rows = RowEncoder.load(origin.backbones_folder, config).sized(grids, multiple=1)
        self._prompt, self._batch, self._seed = prompt, batch, seed
        self._tokens, self._sampling = max_new_tokens, sampling
        self.made_from = {
            "vlm": origin.backbones.fingerprint,
            "dtype": jnp.dtype(dtype).name,
            "prompt": prompt,
            "resolution": resolution,
            "max_new_tokens": max_new_tokens,
            "sampling": {**dataclasses.asdict(sampling), "seed": seed},
        }
        leaves = {
            path: origin.backbones.load_leaf(path, dtype=dtype)
            for path in origin.backbones.specs
            if path.startswith("vlm/")
        }
        self._params = jax.device_put(nest(leaves)["vlm"], replicated(self._mesh))
        self._pack = jax.jit(self._rows.pack_pixels, out_shardings=rows_sharding(self._mesh))

    def captions(self, pictures: Sequence[np.ndarray], *, number: int = 0) -> list[str]:
        """A caption of each picture.

        Args:
          pictures: at most a batch of them, uint8[H, W, 3] of one of `buckets`.
          number: of the batch; sampling depends on it.
        """
        filled = [*pictures, *[pictures[-1]] * (self._batch - len(pictures))]
        unit = self._rows.config.vlm.vision.unit
        grid = (filled[0].shape[0] // unit, filled[0].shape[1] // unit)
        prompt = self._rows.prompts.encode_user(
            self._prompt,
            [grid],
            vae_tokens=False,
            source_tokens=self._rows.shapes.tokens,
            open_image=False,
        )
        length = prompt.text_tokens + self._rows.shapes.tokens
        padded = self._rows.prompts.pad(prompt, length)
        own = {
            name: np.repeat(np.asarray(getattr(padded, name))[None], self._batch, axis=0)
            for name in ("tokens", "feature_index", "position_ids", "valid", "next_position")
        }
        own, pixels = jax.device_put((own, np.stack(filled)), rows_sharding(self._mesh))
        with jax.set_mesh(self._mesh):  # for the kernels of attention
            embeds = self._sampler.embed(
                self._params, own["tokens"], own["feature_index"], self._pack(pixels)
            )
            answer = self._sampler.answer(
                self._sampler.model.text,
                self._params["text"],
                embeds,
                jnp.moveaxis(own["position_ids"], 1, 0),
                own["valid"],
                own["next_position"],
                max_new_tokens=self._tokens,
                eos_ids=self._rows.prompts.eos_ids,
                sampling=self._sampling,
                key=jax.random.fold_in(stream_key(self._seed, Stream.SAMPLER), number),
            )
        tokens, lengths = np.asarray(answer.tokens), np.asarray(answer.lengths).tolist()
        return [
            self._rows.prompts.decode(row[:length]).strip()
            for row, length in zip(tokens[: len(pictures)], lengths, strict=False)
        ]

    @property
    def batch(self) -> int:
        """Pictures at a time."""
        return self._batch


def caption_records(
    source: IndexedSource,
    captioner: Captioner,
    folder: pathlib.Path,
    *,
    shard: int,
    shards: int,
    threads: int,
    progress: Progress,
) -> int:
    """Captions the targets of a data set, into `captions-00000-of-00012.jsonl`; `*.bad.jsonl` has what could not be,
    `captions.json` what they were made from.

    Returns:
      How many could not be read or got no words.

    Raises:
      ValueError: the folder holds captions of other records, by another model or of another question.
    """
    made_from = {"records": source.index.identity, "part": PART, **captioner.made_from}
    go_on(folder / "captions.json", made_from, made="captions-*.jsonl")
    parts = -(-len(source) // PART)
    own = list(range(shard, parts, shards))
    files = {part: folder / f"captions-{part:05}-of-{parts:05}.jsonl" for part in own}
    left = [part for part in own if not files[part].exists()]
    progress(len(own) - len(left), len(own))
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:
        for done, part in enumerate(left, len(own) - len(left) + 1):
            numbers = np.arange(part * PART, min((part + 1) * PART, len(source)))
            found, failed = _caption_part(source, captioner, numbers, pool, part)
            _write(files[part].with_suffix(".bad.jsonl"), failed)
            _write(files[part], found)
            bad += len(failed)
            progress(done, len(own))
    return bad


def _caption_part(source, captioner: Captioner, numbers: np.ndarray, pool, part: int):
    """Rows of the sidecar and of what failed, in the order of the records."""
    nearest = nearest_indices(captioner.buckets, source.sizes()[numbers])
    captions: dict[int, str] = {}
    errors: dict[int, str] = {}
    batches = 0
    for place in np.unique(nearest).tolist():
        load = functools.partial(_load, source, captioner.buckets[place])
        mine = numbers[nearest == place].tolist()
        pictures = {}
        for number, pixels in zip(mine, pool.map(load, mine), strict=True):
            if isinstance(pixels, str):
                errors[number] = pixels
            else:
                pictures[number] = pixels
        ready = list(pictures)
        for start in range(0, len(ready), captioner.batch):
            group = ready[start : start + captioner.batch]
            made = captioner.captions(
                [pictures[number] for number in group], number=part * PART + batches
            )
            batches += 1
            for number, caption in zip(group, made, strict=True):
                (captions if caption else errors)[number] = caption or "no words"
    keys = source.index.key
    return (
        [{"key": keys(number), "caption": captions[number]} for number in sorted(captions)],
        [{"key": keys(number), "reason": errors[number]} for number in sorted(errors)],
    )


def _load(source: IndexedSource, bucket: Bucket, number: int) -> np.ndarray | str:
    try:
        target = source[number].target
        if target is None:
            raise ValueError("a conversation has no picture of its own to describe")
        return target.load(bucket.height, bucket.width)
    except (ValueError, OSError) as error:
        return str(error)


def _write(file: pathlib.Path, rows: list[dict]) -> None:
    with replacing(file) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
