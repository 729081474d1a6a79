"""Rows of training: a step of the DiT alone, steps of stages 1 and 2."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.side_by_side.inputs import normal, pictures, prompt, source
from benchmarks.side_by_side.pair import Pair, compiled, on_device, recomputed
from benchmarks.side_by_side.parts import ROUNDED, RUNGS, on_torch
from benchmarks.side_by_side.reference import PARTS, Modules
from benchmarks.side_by_side.timing import Row, Side
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.diffusion.flow import TIMESTEPS, TimeLaw, draw_flow_noise, draw_sigma
from wemmu_jax.diffusion.losses import partners
from wemmu_jax.models.wemmu.queries import draw_noise
from wemmu_jax.ops.attention import AttentionBackend
from wemmu_jax.ops.programs import jit
from wemmu_jax.planning import flops
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.training.batch import TrainBatch
from wemmu_jax.training.curriculum import (
    ALL_BUT_VLM_LEARN,
    BRIDGE_LEARNS,
    FreezeRule,
    Loss,
    Stage,
)
from wemmu_jax.training.optimizer import OptimizerConfig, make_optimizer, split
from wemmu_jax.training.state import TrainState
from wemmu_jax.training.step import Trainer

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup=0, steps=1000)
CONTRAST = 0.05
BRIDGE = frozenset({"expert", "vae_linear", "position_mlp"})
STEP_TOLERANCE = 5e-5  # of a loss and of a gradient's norm, float32


def _step_tolerance(pair: Pair) -> float:
    return STEP_TOLERANCE if pair.sizes.dtype == "float32" else ROUNDED


class TorchOptimizer:
    """AdamW as `make_optimizer` has it, around the modules that learn."""

    def __init__(self, modules: list[torch.nn.Module]):
        named = [item for module in modules for item in module.named_parameters()]
        self.parameters = [parameter for _, parameter in named]
        matrices = [p for name, p in named if p.ndim >= 2 and "table" not in name]
        others = [p for name, p in named if p.ndim < 2 or "table" in name]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": OPTIMIZER.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.b1, OPTIMIZER.b2),
            fused=True,
        )
        self._is_first = True

    def step(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward pass and update; returns the loss and the gradient's norm.

        The first step, which is compared and never timed, sums the norm in float64: of Sana's gradient torch's own sum
        in float32 is off by 2.5e-4 on a CPU, where ours is by 1e-8.
        """
        loss.backward()
        exact = self._norm() if self._is_first else None
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, OPTIMIZER.clip)
        self._is_first = False
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return loss.detach(), norm if exact is None else exact

    def _norm(self) -> torch.Tensor:
        leaves = [
            torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
            for parameter in self.parameters
        ]
        return torch.linalg.vector_norm(torch.stack(leaves))


def _mixed(pair: Pair) -> contextlib.AbstractContextManager:
    """What learns is float32; its products run in the compute type."""
    return torch.autocast(
        pair.sizes.device, dtype=torch.bfloat16, enabled=pair.sizes.dtype == "bfloat16"
    )


def _moves(pair: Pair, modules: list[torch.nn.Module], learns: list[torch.nn.Module]):
    """(start, stop, optimizers) of torch's side: modules go to the device, with a fresh optimizer, and back. Each turn
    begins with the weights of the first."""
    optimizers = []
    first = [
        {name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}
        for module in learns
    ]

    def start():
        for module in modules:
            module.to(pair.sizes.device)
        for module, tensors in zip(learns, first, strict=True):
            module.load_state_dict(tensors)
        optimizers.append(TorchOptimizer(learns))

    def stop():
        optimizers.clear()
        if pair.sizes.apart:
            for module in modules:
                module.to("cpu")

    return start, stop, optimizers


# -- the DiT alone


def dit_training(pair: Pair) -> Row:
    """A step of Sana: velocity, mean square, gradient, AdamW."""
    pair = dataclasses.replace(pair, learns=frozenset({"dit"}))
    sizes, config = pair.sizes, pair.config.dit
    side, rows = sizes.side // pair.config.dc_ae.ratio, sizes.rows
    queries = sizes.grid[0] * sizes.grid[1]
    latents, target = (normal(rows, side, side, config.in_channels, seed=i) for i in (1, 2))
    condition = normal(rows, queries, config.caption_channels, seed=3)
    times = normal(rows, seed=4) * 100 + 500
    optimizer, host = make_optimizer(OPTIMIZER), pair.params("dit")["dit"]
    valid = jnp.ones((rows, queries), bool)
    given = jnp.asarray(latents), jnp.asarray(times), jnp.asarray(condition, sizes.dtype), valid

    def step(state: TrainState, target, *given):
        def loss(params):
            velocity = pair.model.dit.apply({"params": params}, *given)
            return jnp.mean(jnp.square(velocity - target))

        value, gradient = jax.value_and_grad(loss)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, None), (
            value,
            optax.global_norm(gradient),
        )

    program, held = jit(step, donate_argnums=0), {}

    def start():
        held["state"] = TrainState.create(on_device(host), optimizer, ema=False)

    def ours():
        held["state"], outputs = program(held["state"], target, *given)
        return outputs

    learns = [pair.dit]
    load, drop, optimizers = _moves(pair, learns, learns)
    noisy = on_torch(pair, latents.transpose(0, 3, 1, 2))
    wanted = torch.from_numpy(target.transpose(0, 3, 1, 2).copy()).to(sizes.device)
    words, at = on_torch(pair, condition), torch.from_numpy(times).to(sizes.device)

    def theirs(module):
        with _mixed(pair):
            velocity = module(noisy, encoder_hidden_states=words, timestep=at).sample
        return optimizers[-1].step((velocity.float() - wanted).square().mean())

    made = {"eager": pair.dit, "compiled": compiled(pair.dit, sizes)}
    if sizes.remat:
        made = {rung: recomputed(module) for rung, module in made.items()}
    return Row(
        ours=Side(ours, start, held.clear),
        theirs={n: Side(functools.partial(theirs, made[n]), load, drop) for n in RUNGS},
        compared=lambda ours, theirs: list(zip(ours, theirs, strict=True)),
        tolerance=_step_tolerance(pair),
        flops=3 * rows * flops.dit_flops(config, side * side, queries),
        apart=True,
    )


# -- stages


def stage_step(pair: Pair, *, stage: int) -> Row:
    """A training step with one source a row: encoding, gradient, AdamW; of stage 1 or 2."""
    learns = BRIDGE if stage == 1 else BRIDGE | {"dit"}
    pair = dataclasses.replace(pair, learns=learns)
    sizes, config, rows = pair.sizes, pair.config, pair.sizes.rows
    grid = sizes.grid
    settings = _settings(pair, stage)
    given, asked = source(sizes, rows), prompt(sizes, rows=rows, text=sizes.text_tokens, sources=1)
    target = pictures(rows, sizes.side, sizes.side, seed=9)
    host = pair.params(*PARTS)
    trainable, frozen = split(host, settings.trainable)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable)
    trainer = Trainer(pair.model, settings, make_mesh(devices=jax.devices()[:1]), abstract)
    numbers = jnp.arange(rows, dtype=jnp.uint32)
    batch = TrainBatch(
        number=jnp.uint32(0),
        sample_numbers=numbers,
        picture_ids=numbers,
        unconditional=jnp.zeros(rows, bool),
        prompt=on_device(asked.ours()),
        images=on_device(given.packed),
        place=jnp.asarray(asked.place),
        target=None,
        source_latents=None,
        grid=grid,
        query_tokens=grid[0] * grid[1],
    )
    held = {}

    def start():
        held["state"] = trainer.init_state(on_device(trainable))
        held["frozen"] = on_device(frozen)

    def ours():
        state, frozen = held["state"], held["frozen"]
        autoencoder = {"dc_ae": frozen["dc_ae"]}
        full = batch.replace(
            target=trainer.encode(autoencoder, target),
            source_latents=(trainer.encode(autoencoder, given.pixels),),
        )
        zeros = trainer.zero_gradients()
        gradients, losses, _ = trainer.accumulate(zeros, state.params, frozen, full)
        # The step before is told, so that the state moves on.
        held["state"], norm = trainer.update(state, gradients, [losses], state.step + 1)
        return jnp.mean(losses), norm

    modules = {name: getattr(pair, name) for name in PARTS}
    trained = [modules[name] for name in PARTS if name in learns]
    load, drop, optimizers = _moves(pair, list(modules.values()), trained)
    draws = _Draws.of(settings, numbers, config, sizes.side, grid, pair.model.width)
    draws = dataclasses.replace(draws, queries=on_torch(pair, draws.queries))
    shown = dataclasses.replace(given, patches=on_torch(pair, given.patches))

    def theirs(rung: str):
        loss = _torch_loss(pair, made[rung], stage, asked, shown, target, draws)
        return optimizers[-1].step(loss)

    made = {rung: Modules.of(pair, rung) for rung in RUNGS}
    counted = flops.sample_flops(
        config,
        Bucket(sizes.side, sizes.side),
        arity=1,
        text=sizes.text_tokens,
        learns=flops.Learns(dit=stage > 1, branch=True),
    )
    return Row(
        ours=Side(ours, start, held.clear),
        theirs={rung: Side(functools.partial(theirs, rung), load, drop) for rung in RUNGS},
        compared=lambda ours, theirs: list(zip(ours, theirs, strict=True)),
        tolerance=_step_tolerance(pair),
        flops=rows * sum(counted.values()),
        apart=True,
    )


def _settings(pair: Pair, stage: int) -> Stage:
    rules = BRIDGE_LEARNS if stage == 1 else ALL_BUT_VLM_LEARN
    return Stage(
        name=f"stage{stage}",
        seed=stage,
        bridge=pair.sizes.bridge,
        dtype=jnp.dtype(pair.sizes.dtype),
        remat=pair.model.remat,
        attention=AttentionBackend.AUTO,
        rows=pair.sizes.rows,
        micro_batches=1,
        optimizer=OPTIMIZER,
        ema=0.0,
        loss=Loss.CONTRASTIVE if stage == 1 else Loss.FLOW_MATCHING,
        contrast=CONTRAST,
        time_law=TimeLaw.LOGIT_NORMAL,
        shift=3.0,
        draws=1,
        trainable=tuple(FreezeRule(*rule) for rule in rules),
    )


@dataclasses.dataclass(frozen=True)
class _Draws:
    """What the step draws, made by our functions: torch would draw other numbers."""

    queries: np.ndarray | torch.Tensor  # [B, Q, D]
    noise: np.ndarray  # [B, h, w, C]
    sigma: np.ndarray  # [B]
    partner: int

    @classmethod
    def of(cls, settings: Stage, numbers, config, side: int, grid, width: int) -> "_Draws":
        seed, places = settings.seed, side // config.dc_ae.ratio
        shape = (places, places, config.dit.in_channels)
        return cls(
            np.array(draw_noise(seed, numbers, grid=grid, width=width)),
            np.array(draw_flow_noise(seed, numbers, shape)),
            np.array(draw_sigma(seed, numbers, law=settings.time_law, shift=settings.shift)),
            int(partners(seed, 0, len(numbers))),
        )


def _torch_loss(pair, modules: Modules, stage: int, asked, given, target, draws: _Draws):
    """The mean loss, with a graph."""
    with torch.no_grad():
        clean, latents = modules.to_latents(target), modules.to_latents(given.pixels)
    noise = torch.from_numpy(draws.noise).permute(0, 3, 1, 2).to(clean.device)
    sigma = torch.from_numpy(draws.sigma).to(clean.device)
    share = sigma.view(-1, 1, 1, 1)
    with _mixed(pair):
        cache = modules.read(asked, given, latents)
        condition = modules.write(asked, cache, modules.tensor(draws.queries))
        noisy = (1 - share) * clean + share * noise
        velocity = modules.paint(noisy, TIMESTEPS * sigma, condition)
    wanted = noise - clean
    loss = (velocity - wanted).square().mean()
    if stage == 1:
        loss = loss - CONTRAST * (velocity - wanted.roll(-draws.partner, 0)).square().mean()
    return loss
