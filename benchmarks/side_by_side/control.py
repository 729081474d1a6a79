"""What a stack of layers cannot do without: its products and its attention, bare, in both libraries."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.side_by_side.inputs import normal
from benchmarks.side_by_side.pair import Pair
from benchmarks.side_by_side.timing import Side
from wemmu_jax.ops.programs import jit


@dataclasses.dataclass(frozen=True)
class Bare:
    """Layers of four products around an attention, then three of a gated MLP; no norm, no rotation, no gate.

    Attributes:
      width, inner: of the stream and inside the MLP.
      heads, key_heads, head_width: of the attention.
      batches: for each layer, in how many pieces the tokens are attended to.
      tokens: of all pieces.
      context: keys that are there before.
      causal: whether each sees those before it alone.
      backward: whether the weights' gradients are wanted.
    """

    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    batches: tuple[int, ...]
    tokens: int
    context: int = 0
    causal: bool = False
    backward: bool = False

    def sides(self, pair: Pair) -> tuple[Side, Side]:
        """(ours, torch's) on the same numbers."""
        weights = [self._weights(layer) for layer in range(len(self.batches))]
        x = normal(self.tokens, self.width, seed=90)
        cache = normal(2, self.context, self.key_heads, self.head_width, seed=91)
        dtype, device = pair.sizes.dtype, pair.sizes.device
        ours = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (weights, x, cache))
        theirs = jax.tree.map(lambda a: torch.from_numpy(a).to(device, pair.dtype), (x, cache))
        # As each library keeps them: torch's linear layers are transposed.
        linears = [
            {n: torch.from_numpy(w.T.copy()).to(device, pair.dtype) for n, w in layer.items()}
            for layer in weights
        ]
        for layer in linears:
            for weight in layer.values():
                weight.requires_grad_(self.backward)
        program = jit(self._forward_jax)
        if self.backward:
            program = jit(jax.grad(lambda *a: self._forward_jax(*a).astype(jnp.float32).sum()))
        run = functools.partial(self._run_torch, linears, *theirs)
        return Side(functools.partial(program, *ours)), Side(run)

    def _weights(self, layer: int) -> dict[str, np.ndarray]:
        attended, keys = self.heads * self.head_width, self.key_heads * self.head_width
        shapes = {
            "q": (self.width, attended),
            "k": (self.width, keys),
            "v": (self.width, keys),
            "o": (attended, self.width),
            "gate": (self.width, self.inner),
            "up": (self.width, self.inner),
            "down": (self.inner, self.width),
        }
        return {
            name: normal(*shape, seed=100 * layer + i) / np.float32(shape[0] ** 0.5)
            for i, (name, shape) in enumerate(shapes.items())
        }

    def _heads(self, x, batch: int, heads: int):
        return x.reshape(batch, -1, heads, self.head_width)

    def _forward_jax(self, weights, x, cache):
        for w, batch in zip(weights, self.batches, strict=True):
            key, value = (self._heads(x @ w[n], batch, self.key_heads) for n in "kv")
            if self.context:
                key = jnp.concatenate([cache[:1], key], axis=1)
                value = jnp.concatenate([cache[1:], value], axis=1)
            query = self._heads(x @ w["q"], batch, self.heads)
            mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
            x = mixed.reshape(self.tokens, -1) @ w["o"]
            x = (x @ w["gate"] + x @ w["up"]) @ w["down"]
        return x

    def _run_torch(self, linears, x, cache):
        if not self.backward:
            with torch.no_grad():
                return self._forward_torch(linears, x, cache)
        loss = self._forward_torch(linears, x, cache).float().sum()
        return torch.autograd.grad(loss, [w for layer in linears for w in layer.values()])

    def _forward_torch(self, linears, x, cache):
        linear = torch.nn.functional.linear
        for w, batch in zip(linears, self.batches, strict=True):
            key, value = (self._heads(linear(x, w[n]), batch, self.key_heads) for n in "kv")
            if self.context:
                key = torch.cat([cache[:1], key], dim=1)
                value = torch.cat([cache[1:], value], dim=1)
            query = self._heads(linear(x, w["q"]), batch, self.heads)
            mixed = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (query, key, value)),
                is_causal=self.causal,
                enable_gqa=self.heads != self.key_heads,
            )
            x = linear(mixed.transpose(1, 2).reshape(self.tokens, -1), w["o"])
            x = linear(linear(x, w["gate"]) + linear(x, w["up"]), w["down"])
        return x
