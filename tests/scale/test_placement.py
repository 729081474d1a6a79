"""Where the arguments of training lie, and what moves between devices: a small model on eight of them."""

import collections
import contextlib
import math
import re

import jax
import numpy as np
import pytest

from configs.wemmu_3b import get_config
from tests.models.wemmu_fixtures import row_encoder, small_config
from wemmu_jax.data.pipeline import MicroBatch
from wemmu_jax.data.records import Picture
from wemmu_jax.data.tasks import Example, Task
from wemmu_jax.models.wemmu.config import VAEStream
from wemmu_jax.planning.collectives import KINDS
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.training.abstract import AbstractRun
from wemmu_jax.training.batch import on_devices, packer, train_batch
from wemmu_jax.training.optimizer import merge
from wemmu_jax.training.step import row_losses

STREAMS = [stream.value for stream in VAEStream]


def small_run(
    stream: str, rows: int, remat: str = "full", *, loss: str = "flow_matching"
) -> AbstractRun:
    config = get_config("stage4")
    config.loss.kind = loss
    config.model.remat = remat
    config.model.bridge = small_config(vae_stream=VAEStream(stream)).bridge.to_dict()
    config.data.resolution, config.data.max_aspect, config.data.pad_multiple = 64, 1.5, 4
    config.batch.rows = rows
    return AbstractRun.of(config, small_config(vae_stream=VAEStream(stream)), make_mesh(fsdp=2))


def real_batch(run: AbstractRun, bucket, arity: int, text_length: int):
    """A micro-batch of grey pictures on the devices, encoded as the input pipeline encodes."""
    model, rows = run.trainer.model, run.trainer.stage.rows
    grids = [model.config.source_grid(b.height, b.width) for b in run.buckets]
    encoder = row_encoder(model.config, grids)
    grey = Picture(None, None, lambda height, width: np.full((height, width, 3), 128, np.uint8))
    example = Example(Task.M_EDIT, "the star", (grey,) * arity, grey, "key")
    encoded = encoder.encode_example(example, bucket, text_length)
    micro_batch = MicroBatch(
        number=0,
        bucket=bucket,
        arity=arity,
        text_length=text_length,
        tasks=(Task.M_EDIT,) * rows,
        keys=("key",) * rows,
        sample_numbers=np.arange(rows, dtype=np.uint32),
        arrays={name: np.stack([value] * rows) for name, value in encoded.items()},
    )
    grid = model.config.query_grid(bucket.height, bucket.width)
    batch, pixels = train_batch(micro_batch, grid=grid, query_tokens=encoder.shapes.tokens)
    pixels = on_devices(pixels, run.trainer.mesh)
    images = packer(encoder, run.trainer.mesh)(pixels.vit) if arity else None
    return on_devices(batch, run.trainer.mesh).replace(images=images), pixels


def forms(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


@pytest.mark.parametrize("arity", [0, 1, 2])
@pytest.mark.parametrize("stream", STREAMS)
def test_an_abstract_batch_has_the_form_of_the_real_one(stream, arity):
    run = small_run(stream, rows=8)
    for bucket in (run.buckets[0], run.square):
        batch, pixels = real_batch(run, bucket, arity, text_length=128)
        abstract = run.batch(bucket, arity=arity, text_length=128)
        assert forms(pixels) == forms(run.pixels(bucket, arity=arity))
        latents = [jax.eval_shape(run.trainer.model.encode, run.frozen, p) for p in pixels.sources]
        target = jax.eval_shape(run.trainer.model.encode, run.frozen, pixels.target)
        assert (abstract.target.shape, abstract.target.dtype) == (target.shape, target.dtype)
        for one, other in zip(abstract.source_latents, latents, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert forms(abstract.replace(target=None, source_latents=None)) == forms(batch)


def moved(text: str, rows: int) -> set[str]:
    """Collectives of an optimised program that have an axis along which all rows of the batch lie, once or twice; but
    for the losses, of which every device has a copy."""
    kinds = rf"= \(?(.*?)\)? (?:{'|'.join(KINDS)})(?:-start)?\("
    shapes = {
        shape for found in re.findall(kinds, text) for shape in re.findall(r"\w+\[[\d,]+\]", found)
    }
    whole = {shape for shape in shapes if re.search(rf"[\[,]({rows}|{2 * rows})[,\]]", shape)}
    return whole - {f"f32[{rows}]"}


def test_weights_come_to_the_rows_and_never_the_rows_to_the_weights(monkeypatch):
    """Nor to their negatives: the loss is stage 1's, what learns is the later stages'."""
    rows, own = 136, 17  # no other axis is as long
    monkeypatch.setattr("wemmu_jax.sharding.rules.SMALL", 0)  # so that small leaves are cut too

    def text() -> str:
        run = small_run("frozen", rows, loss="contrastive")
        batch = run.batch(run.square, arity=1, text_length=32)
        # Unoptimised code compiles faster; the partitioner has done its work by then.
        options = {"xla_backend_optimization_level": 0}
        return run.accumulate(batch).compile(compiler_options=options).as_text()

    spread = text()
    assert moved(spread, rows) == set()
    assert "all-to-all" not in spread
    handed_on = re.findall(r"= (\w+\[[\d,]+\])\S* collective-permute\(", spread)
    assert collections.Counter(handed_on) == {f"u32[{own}]": 4, f"f32[{own},4,4,6]": 4}
    monkeypatch.setattr("wemmu_jax.training.step.placed", lambda *_: contextlib.nullcontext())
    assert moved(text(), rows), "the pins were not needed here, so this test shows nothing"


@pytest.mark.parametrize("program", ["accumulate", "encode", "update"])
def test_programs_are_compiled_with_the_devices_options(program, monkeypatch):
    asked = []

    def options(kind: str) -> dict[str, str]:
        asked.append(kind)
        return {"no_such_option": "1"}

    monkeypatch.setattr("wemmu_jax.training.step.compiler_options", options)
    run = small_run("frozen", 8)
    batch = run.batch(run.square, arity=0, text_length=32)
    lowered = {
        "accumulate": lambda: run.accumulate(batch),
        "encode": lambda: run.encode(run.pixels(run.square, arity=0).target),
        "update": run.update,
    }[program]()
    with pytest.raises(Exception, match="no_such_option"):
        lowered.compile()
    assert asked == [run.trainer.mesh.devices.flat[0].device_kind]


def kept(run: AbstractRun, arity: int) -> list[tuple[int, ...]]:
    """Shapes of what the backward pass of a micro-batch finds, but for weights and the micro-batch itself."""
    batch = run.batch(run.square, arity=arity, text_length=32)
    trainer = run.trainer

    def pullback(trainable, frozen, batch):
        def loss(trainable):
            tree = merge(trainable, frozen)
            return row_losses(trainer.model, trainer.stage, tree, batch, frozen_vlm=True)[0]

        return jax.vjp(loss, trainable)[1]

    found = jax.eval_shape(pullback, run.trainable, run.frozen, batch)
    given = {leaf.shape for leaf in jax.tree.leaves((run.trainable, run.frozen, batch))}
    return [leaf.shape for leaf in jax.tree.leaves(found) if leaf.shape not in given]


@pytest.mark.parametrize("remat", ["full", "named"])
def test_what_is_frozen_keeps_next_to_nothing(remat):
    """Nothing of the ViT. Of the language model keys and values, which the expert reads, and of the tokens that the VAE
    linear's gradient goes through a layer's input, and by name what else is kept."""
    rows, layers, width = 8, 2, 32
    run = small_run("frozen", rows, remat)
    for arity in (0, 1):
        batch = run.batch(run.square, arity=arity, text_length=32)
        length = batch.prompt.tokens.shape[1]
        queries = run.shapes.tokens
        shapes = kept(run, arity)
        slots = [shape for shape in shapes if run.shapes.slots in shape[1:2] and len(shape) >= 4]
        assert not [shape for shape in slots if shape[-1] in (16, 20, 48)]
        prompt = [shape for shape in shapes if shape[:3] == (layers, rows, length)]
        assert prompt == [(layers, rows, length, 2, 8)] * 2
        behind = length - math.prod(batch.grid) // 16 * 16 if arity else 0
        inputs = [shape for shape in shapes if shape == (layers, rows, behind, width)]
        assert len(inputs) == {"full": 1, "named": 2}[remat] * arity  # named: and attention's out
        named = [shape for shape in shapes if shape == (layers, rows, behind, 40)]
        assert len(named) == (2 if remat == "named" and arity else 0)
        hidden = [shape for shape in shapes if shape == (layers, rows, queries, 40)]
        assert len(hidden) == (2 if remat == "named" else 0)  # gate and up of the expert
