"""What parity is measured with: random reference models without constant parameters, and relative L2 error."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import torch

from wemmu_jax.conversion.memory import params_from_tensors
from wemmu_jax.conversion.table import Entry

BLOCK = 1e-5  # tolerance of one block
MODEL = 5e-5  # tolerance of a whole model
GRADIENT = 1e-4  # tolerance of the gradient of one leaf


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the parity table: `measure()` returns the relative L2 error, which must not pass `tolerance`."""

    name: str
    tolerance: float
    measure: Callable[[], float]
    slow: bool = False


@dataclasses.dataclass(frozen=True)
class Sabotage:
    """One row of the sabotage table: the port is broken on purpose; `measure()` must be >= 10 x `tolerance`."""

    name: str
    tolerance: float
    measure: Callable[[], float]
    slow: bool = False


def relative_l2(ours, reference) -> float:
    """||ours - reference|| / ||reference|| over all elements, in float64. Shapes must be equal."""
    ours = np.asarray(ours, np.float64)
    if isinstance(reference, torch.Tensor):
        reference = reference.detach().numpy()
    reference = np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise AssertionError(f"shapes differ: ours {ours.shape}, reference {reference.shape}")
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@torch.no_grad()
def randomise(module: torch.nn.Module, *, seed: int, gain: float = 1.0) -> torch.nn.Module:
    """Redraws every parameter so that none is constant: norms 1 + 0.2 N, biases and tables 0.2 N, matrices
    gain * N / sqrt(fan in). With gain 1 unit inputs give scores of about unit spread, so that attention is far
    from uniform. Returns the module in eval mode, float32."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "embed_tokens" in name:
            parameter.copy_(noise)
        elif parameter.ndim >= 2 and "table" not in name:
            fan_in = parameter[0].numel()
            parameter.copy_(gain * noise / fan_in**0.5)
        elif name.endswith("bias") or parameter.ndim >= 2:
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(1 + 0.2 * noise)
    return module.eval().float()


def converted(module: torch.nn.Module, table: Sequence[Entry]) -> dict:
    """The module's parameters as our tree of float32 jax arrays, through the real conversion table."""
    tensors: Mapping[str, np.ndarray] = {
        name: tensor.detach().numpy() for name, tensor in module.state_dict().items()
    }
    return jax.tree.map(jax.numpy.asarray, params_from_tensors(tensors, table))


def to_torch(array) -> torch.Tensor:
    """A torch tensor with a copy of `array`."""
    return torch.from_numpy(np.array(array))
