"""Conversion in memory, for models small enough to hold: what tests and the tiny preset use."""

from collections.abc import Mapping, Sequence

import numpy as np

from wemmu_jax.conversion.table import Entry


def nest(flat: Mapping[str, object]) -> dict:
    """{'a/b': x} -> {'a': {'b': x}}."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def flatten(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """{'a': {'b': x}} -> {'a/b': x}; the inverse of `nest`."""
    flat: dict[str, object] = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            flat.update(flatten(node, f"{prefix}{name}/"))
        else:
            flat[f"{prefix}{name}"] = node
    return flat


def params_from_tensors(tensors: Mapping[str, np.ndarray], table: Sequence[Entry]) -> dict:
    """Reference tensors (name -> array) as our nested parameter dict.

    Raises:
      ValueError: tensors are missing, left over, or of another shape than the table says; all are named.
    """
    wanted = {name: entry for entry in table for name in entry.sources()}
    faults = [f"missing: {name} {wanted[name].shape}" for name in wanted if name not in tensors]
    faults += [f"not in the table: {name}" for name in tensors if name not in wanted]
    faults += [
        f"shape of {name}: expected {entry.shape}, found {tuple(tensors[name].shape)}"
        for name, entry in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != entry.shape
    ]
    if faults:
        raise ValueError("tensors do not fit the table:\n  " + "\n  ".join(faults))
    flat = {}
    for entry in table:
        parts = [entry.layout.to_ours(tensors[name]) for name in entry.sources()]
        flat[entry.target] = (
            np.ascontiguousarray(parts[0]) if entry.stack is None else np.stack(parts)
        )
    return nest(flat)
