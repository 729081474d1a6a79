"""Parity of the connectors that the VAE branch may have, and of their distillation, with torch: a Simple ViT's layer
(paper, A.2) is `torch.nn.TransformerEncoderLayer` with its norms first.

B rows, h w the grid of a source, S = h w tokens, D width, C latent channels.
"""

import functools
from collections.abc import Mapping
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.models import wemmu_fixtures as fixtures
from tests.parity.harness import BLOCK, GRADIENT, Case, Sabotage, randomise, relative_l2, to_torch
from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.models.wemmu import vae_branch
from wemmu_jax.models.wemmu.config import Connector
from wemmu_jax.models.wemmu.vae_branch import VAEBranch, distillation_loss

BATCH, GRID, CHANNELS, WIDTH, HEADS, MAX_GRID = 2, (3, 5), 6, 32, 4, 10


class Reference(torch.nn.Module):
    """Projection, the centre of a table of positions, layers, projection. Its keys have a bias, ours none."""

    def __init__(self, depth: int):
        super().__init__()
        self.input_proj = torch.nn.Linear(CHANNELS, WIDTH)
        self.table = torch.nn.Parameter(torch.zeros(MAX_GRID, MAX_GRID, WIDTH))
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(
                WIDTH,
                HEADS,
                4 * WIDTH,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.output_proj = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, h, w, C] -> [B, S, D]."""
        top, left = ((MAX_GRID - side) // 2 for side in GRID)
        crop = self.table[top : top + GRID[0], left : left + GRID[1]]
        x = (self.input_proj(latents) + crop).flatten(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.output_proj(x)


@functools.cache
def reference(depth: int) -> Reference:
    """With random parameters; in training mode, for in the other torch takes a path of its own."""
    return randomise(Reference(depth), seed=41).train()


def ours_of(tensors: Mapping[str, torch.Tensor], depth: int) -> dict:
    """Parameters, or their gradients, as our tree."""
    flat = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    leaves = {"table": flat["table"]}

    def dense(path: str, weight: np.ndarray, bias: np.ndarray | None) -> dict:
        kernel = {f"{path}/kernel": np.swapaxes(weight, -1, -2)}
        return kernel if bias is None else {**kernel, f"{path}/bias": bias}

    def stacked(name: str) -> np.ndarray:
        return np.stack([flat[f"layers.{i}.{name}"] for i in range(depth)])

    for name in ("input_proj", "output_proj"):
        leaves |= dense(name, flat[f"{name}.weight"], flat[f"{name}.bias"])
    weights, biases = (
        np.split(stacked(f"self_attn.in_proj_{kind}"), 3, axis=1) for kind in ("weight", "bias")
    )
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        leaves |= dense(f"layers/{name}", weights[i], None if name == "k_proj" else biases[i])
    for name, other in (
        ("o_proj", "self_attn.out_proj"),
        ("up_proj", "linear1"),
        ("down_proj", "linear2"),
    ):
        leaves |= dense(f"layers/{name}", stacked(f"{other}.weight"), stacked(f"{other}.bias"))
    for name, other in (("attention_norm", "norm1"), ("mlp_norm", "norm2")):
        leaves[f"layers/{name}/scale"] = stacked(f"{other}.weight")
        leaves[f"layers/{name}/bias"] = stacked(f"{other}.bias")
    return nest(leaves)


def draw(seed: int, *shape: int) -> np.ndarray:
    """float32 N(0, 1)."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def both(connector: Connector, *, heads: int = HEADS) -> tuple[tuple, tuple]:
    """(tokens, gradients by path) of sum(tokens * weights), ours and the reference's."""
    latents, weights = draw(42, BATCH, *GRID, CHANNELS), draw(43, BATCH, GRID[0] * GRID[1], WIDTH)
    module = reference(connector.depth)
    module.zero_grad()
    wanted = module(to_torch(latents))
    (wanted * to_torch(weights)).sum().backward()
    gradients = {name: leaf.grad for name, leaf in module.named_parameters()}
    branch = VAEBranch(connector, WIDTH, heads, MAX_GRID)

    def loss(params):
        tokens = branch.apply({"params": params}, latents)
        return jnp.sum(tokens * weights), tokens

    params = ours_of(module.state_dict(), connector.depth)
    found, tokens = fixtures.quick_jit(jax.grad(loss, has_aux=True))(params)
    theirs = flatten(ours_of(gradients, connector.depth))
    return (tokens, flatten(found)), (wanted.detach(), theirs)


@functools.cache
def measured(connector: Connector) -> tuple[tuple, tuple]:
    """`both`, once for the rows of a connector."""
    return both(connector)


def token_error(connector: Connector) -> float:
    (ours, _), (theirs, _) = measured(connector)
    return relative_l2(ours, theirs)


def worst_gradient(connector: Connector) -> float:
    (_, ours), (_, theirs) = measured(connector)
    assert ours.keys() == theirs.keys() and all(leaf.any() for leaf in theirs.values())
    return max(relative_l2(ours[path], theirs[path]) for path in ours)


def distillation_error(*, padding_counts: bool = False) -> float:
    """Value and gradient, three and five of six tokens being there."""
    tokens, features, weights = draw(44, 2, 6, WIDTH), draw(45, 2, 6, WIDTH), draw(46, 2)
    valid = np.arange(6) < np.array([[3], [5]])
    told = to_torch(tokens).requires_grad_()
    cosine = torch.nn.functional.cosine_similarity(told, to_torch(features), dim=-1)
    wanted = torch.stack(
        [(1 - row[:count]).mean() for row, count in zip(cosine, (3, 5), strict=True)]
    )
    (wanted * to_torch(weights)).sum().backward()

    def loss(tokens):
        seen = np.ones_like(valid) if padding_counts else valid
        found = distillation_loss(tokens, features, seen)
        return jnp.sum(found * weights), found

    gradient, found = jax.grad(loss, has_aux=True)(tokens)
    return max(relative_l2(found, wanted), relative_l2(gradient, told.grad))


def cases() -> list[Case]:
    """Tokens and gradients of the Simple ViTs; the linear layer is a row of the bridge's."""
    rows = []
    for connector in (Connector.VIT_2, Connector.VIT_6):
        name = f"connector / Simple ViT of {connector.depth} layers"
        rows += [
            Case(f"{name}: tokens", BLOCK, functools.partial(token_error, connector)),
            Case(
                f"{name}: gradient, worst leaf",
                GRADIENT,
                functools.partial(worst_gradient, connector),
            ),
        ]
    return [*rows, Case("connector / distillation", BLOCK, distillation_error)]


def _patched(place: object, name: str, replacement: object) -> float:
    with mock.patch.object(place, name, replacement):
        (ours, _), (theirs, _) = both(Connector.VIT_2)
    return relative_l2(ours, theirs)


def sabotage() -> list[Sabotage]:
    """The connector broken in one place each."""
    crop, gelu = vae_branch.centre_crop, nn.gelu

    def other_heads() -> float:
        (ours, _), (theirs, _) = both(Connector.VIT_2, heads=2 * HEADS)
        return relative_l2(ours, theirs)

    return [
        Sabotage(f"connector / {name}", BLOCK, measure)
        for name, measure in (
            (
                "crop off by one",
                lambda: _patched(
                    vae_branch, "centre_crop", lambda table, grid: crop(jnp.roll(table, 1, 1), grid)
                ),
            ),
            (
                "GELU by tanh",
                lambda: _patched(nn, "gelu", lambda x, approximate: gelu(x, approximate=True)),
            ),
            ("twice the heads", other_heads),
            ("padding in the distillation", lambda: distillation_error(padding_counts=True)),
        )
    ]
