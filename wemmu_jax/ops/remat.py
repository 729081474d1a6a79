"""Rematerialisation by name: what a stack of layers keeps between the forward and the backward pass.

Layers give names to what is dear to compute again (`jax.ad_checkpoint.checkpoint_name`):

    input             of the layer
    q k v             of every attention, after norm and rotation
    attended          what attention returns, and with the splash kernel the log of its softmax's sum
    out               of attention's last layer
    gate up           of every MLP; in Sana `up` alone, before the convolution, which is done again sooner than saved
"""

from collections.abc import Callable

import flax.linen as nn
import jax

_policies = jax.checkpoint_policies

_KEEP_ALL = ("none", "unrolled")
_NAMED = ("q", "k", "v", "attended", "out", "gate", "up")

# name -> what the backward pass finds saved; None saves nothing but the layer's inputs.
_SAVEABLE: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "named": _policies.save_only_these_names(*_NAMED),
    "without_up": _policies.save_only_these_names(*_NAMED[:-1]),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        # 8 KB a token and layer of the expert. The products' results would be 53, and take longer on their way to the
        # host and back than to be computed again.
        names_which_can_be_offloaded=["input", "attended"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat(module_class: type[nn.Module], policy: str) -> type[nn.Module]:
    """`module_class` with its `__call__` recomputed in the backward pass, to be put under `nn.scan`.

    Args:
      module_class: a layer; the values and the gradients stay those of the plain class.
      policy: "none" and "unrolled" keep everything, "full" keeps a layer's inputs alone, "dots" keeps the products of
        activations and weights (matmuls without batch dimensions) as well, "named" what has one of the names above
        instead, so that neither attention nor MLP runs again; "without_up" all of them but `up`, two fifths of what
        "named" keeps of the expert's layers and one of their products; "offload" keeps a layer's inputs and what
        attention returned, both in the host's memory.

    Raises:
      ValueError: `policy` is not one of these.
    """
    if policy in _KEEP_ALL:
        return module_class
    if policy not in _SAVEABLE:
        known = ", ".join([*_KEEP_ALL, *_SAVEABLE])
        raise ValueError(f"unknown remat policy {policy!r}; the known ones are {known}")
    # prevent_cse guards against XLA undoing the recomputation, which cannot happen across a scan's steps.
    return nn.remat(module_class, policy=_SAVEABLE[policy], prevent_cse=False)


def unroll(policy: str, layers: int) -> int:
    """How many of `layers` one turn of their loop runs: all with "unrolled", which then keeps what it keeps where it
    was computed, instead of copying it into the loop's arrays and out again. That is faster on a CPU, and compiles for
    as much longer as there are layers."""
    return layers if policy == "unrolled" else 1
