"""Rematerialisation by name: what a stack of layers keeps between the forward and the backward pass."""

from collections.abc import Callable

import flax.linen as nn
import jax

# name -> what the backward pass finds saved; None saves nothing but the layer's inputs.
_SAVEABLE: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(module_class: type[nn.Module], policy: str) -> type[nn.Module]:
    """`module_class` with its `__call__` recomputed in the backward pass, to be put under `nn.scan`.

    Args:
      module_class: a layer; the values and the gradients stay those of the plain class.
      policy: "none" keeps everything, "full" keeps a layer's inputs alone, "dots" keeps the products of
        activations and weights (matmuls without batch dimensions) as well.

    Raises:
      ValueError: `policy` is not one of these.
    """
    if policy == "none":
        return module_class
    if policy not in _SAVEABLE:
        known = ", ".join(["none", *_SAVEABLE])
        raise ValueError(f"unknown remat policy {policy!r}; the known ones are {known}")
    # prevent_cse guards against XLA undoing the recomputation, which cannot happen across a scan's steps.
    return nn.remat(module_class, policy=_SAVEABLE[policy], prevent_cse=False)
