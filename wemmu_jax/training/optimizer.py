"""Which parameters learn, and how: one ordered table of path patterns, then AdamW or Muon."""

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence

import jax
import optax
import optax.contrib
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wemmu_jax.conversion.memory import flatten, nest


@dataclasses.dataclass(frozen=True)
class FreezeRule:
    """Paths that match `pattern` (a regex for `re.match`) learn, or stay as they are.

    Raises:
      ValueError: the pattern is no regex, or `trainable` is neither True nor False.
    """

    pattern: str
    trainable: bool

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"trainable: {self.pattern!r} is no regex: {error}") from error
        # A text such as "false" would count as true.
        if not isinstance(self.trainable, bool):
            raise ValueError(
                f"trainable: {self.pattern!r} must have true or false; found {self.trainable!r}"
            )


def _rule(path: str, table: Sequence[FreezeRule]) -> FreezeRule:
    for rule in table:
        if re.match(rule.pattern, path):
            return rule
    raise ValueError(f"freezing table: no rule matches {path}")


def learns(path: str, table: Sequence[FreezeRule]) -> bool:
    """Whether the parameter learns: the first rule that matches decides.

    Raises:
      ValueError: no rule matches.
    """
    return _rule(path, table).trainable


def split(params: Mapping, table: Sequence[FreezeRule]) -> tuple[dict, dict]:
    """The trainable and the frozen tree; `merge` puts them together again.

    Raises:
      ValueError: a parameter that no rule matches, or a rule that decides nothing.
    """
    flat = flatten(params)
    rules = {path: _rule(path, table) for path in flat}
    if idle := [rule.pattern for rule in table if rule not in rules.values()]:
        raise ValueError(f"freezing table: {idle} decide for no parameter")
    trainable = nest({path: leaf for path, leaf in flat.items() if rules[path].trainable})
    frozen = nest({path: leaf for path, leaf in flat.items() if not rules[path].trainable})
    return trainable, frozen


def merge(first: Mapping, second: Mapping) -> dict:
    """Two trees without common leaves as one."""
    return nest({**flatten(first), **flatten(second)})


def decayed(params: Mapping) -> dict:
    """True for matrices; norms, biases and learned tables take no weight decay."""
    return nest({path: path.endswith("/kernel") for path in flatten(params)})


class Method(enum.StrEnum):
    """How a gradient becomes a step."""

    ADAMW = "adamw"  # the paper's
    MUON = "muon"  # for matrices, and Adam for all else: the tiny preset's, for it takes far fewer steps


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Linear warm-up and cosine decay to zero (paper, A.4).

    Attributes:
      learning_rate: peak.
      warmup: optimizer steps from 0 to the peak.
      steps: optimizer steps in all.
      b1, b2: decay of the moments.
      weight_decay: on matrices alone.
      clip: global norm of the gradient, or None.
      method: AdamW or Muon.
    """

    learning_rate: float
    warmup: int
    steps: int
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 1e-5
    clip: float | None = 1.0
    method: Method = Method.ADAMW

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warm-up of {self.warmup} steps does not fit in {self.steps} steps")

    def schedule(self) -> optax.Schedule:
        """Optimizer step, from 0 -> learning rate; no step is wasted at a rate of exactly zero."""
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / (self.warmup + 1),
            peak_value=self.learning_rate,
            warmup_steps=self.warmup,
            decay_steps=self.steps,
        )


def make_optimizer(
    config: OptimizerConfig, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Clipping, then the method. On a `mesh`, Muon's products are shared out by layers, see `_layers_apart`."""
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    if config.method is Method.ADAMW:
        return optax.chain(clip, _adamw(config))
    apart = optax.identity() if mesh is None else _layers_apart(mesh)
    return optax.chain(clip, apart, _muon(config))


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.adamw(
        config.schedule(),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon for matrices and Adam for all else, both with Nesterov's momentum."""
    return optax.contrib.muon(
        config.schedule(),
        weight_decay=config.weight_decay,
        weight_decay_mask=decayed,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,  # steps of AdamW's size, so that one learning rate serves both
    )


def _layers_apart(mesh: Mesh) -> optax.GradientTransformation:
    """Lays the layers of a stack on different devices, where their number allows it. Muon's twenty products of a
    matrix can take longer than its gradient; else every device would do them for all layers."""
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def lay(updates: Mapping, params: Mapping | None) -> dict:
        del params
        return nest({path: one(path, leaf) for path, leaf in flatten(updates).items()})

    def one(path: str, leaf: jax.Array) -> jax.Array:
        if path.endswith("/kernel") and leaf.ndim == 3 and leaf.shape[0] % mesh.size == 0:
            return jax.lax.with_sharding_constraint(leaf, place)
        return leaf

    return optax.stateless(lay)


def _matrices(params: Mapping) -> dict:
    """Which axes of a kernel are multiplied; None for what is no matrix. Stacked layers are a matrix each, a dense
    convolution is one of all that it sees at a place."""

    def of(
        path: str, leaf: jax.Array | optax.MaskedNode
    ) -> optax.contrib.MuonDimensionNumbers | None:
        shape = getattr(leaf, "shape", ())
        if not path.endswith("/kernel"):
            return None
        if len(shape) in (2, 3):
            return optax.contrib.MuonDimensionNumbers(-2, -1)
        if len(shape) == 4 and shape[2] > 1:
            return optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
        return None

    return nest({path: of(path, leaf) for path, leaf in flatten(params).items()})


def count_parameters(tree: Mapping) -> int:
    """Number of values in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
