"""Checkpoints of a run, and how trained weights are laid over converted backbones.

A workdir holds `config.json` (the resolved config), `run.json` (where the run started from) and
`checkpoints/STEP/`, Orbax checkpoints of the trainable side alone; frozen weights stay in the converted folder,
which `run.json` names together with its fingerprint.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import ml_collections
from orbax.checkpoint import v1 as ocp

from wemmu_jax.conversion.bridge import BRIDGE_FILE, load_bridge_leaves, read_bridge_config
from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.conversion.safetensors_io import sha256_of
from wemmu_jax.conversion.weights import Weights
from wemmu_jax.training.state import TrainState

Sharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding | None] | None

PARAMS, EMA, REST = "params", "ema", "optimizer"


def write_json(path: pathlib.Path, value: dict) -> None:
    """Writes a file in one step, so that it is never seen half there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(partial, path)


def check_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Changes nothing.

    Raises:
      ValueError: the workdir belongs to another config, whose differing keys are named, or is in other use.
    """
    path = workdir / "config.json"
    if path.exists():
        other = differences(json.loads(path.read_text()), json.loads(config.to_json()))
        if other:
            raise ValueError(
                f"{workdir} belongs to another config:\n  " + "\n  ".join(other) + "\n"
                "Give this run a workdir of its own, or the same config to resume."
            )
    elif workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file; expected a folder, or a name that is free")
    elif workdir.exists() and {file.name for file in workdir.iterdir()} - {"run.json"}:
        raise ValueError(f"{workdir} is not empty and is no workdir (it has no config.json)")


def claim_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict, run: dict) -> None:
    """Makes the workdir this run's, or checks that it is.

    Args:
      workdir: the folder.
      config: the resolved config.
      run: where the run starts from: `init`, `init_step`, `fingerprint`, `bridge`.

    Raises:
      ValueError: as `check_workdir`, or the weights that the run started from are others by now.
    """
    check_workdir(workdir, config)
    if (workdir / "config.json").exists():
        if other := differences(json.loads((workdir / "run.json").read_text()), run):
            raise ValueError(f"{workdir} started from other weights:\n  " + "\n  ".join(other))
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "run.json", run)
    write_json(workdir / "config.json", json.loads(config.to_json()))


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir's lock, which the system drops when the process ends, however it ends.

    Raises:
      ValueError: another run holds it.
    """
    with (workdir / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{workdir}: another run is at work here") from None
        yield


def differences(theirs: Mapping, mine: Mapping) -> list[str]:
    """A line for each key of two nested dicts that is not the same in both."""
    return [
        f"{key}: {_get(theirs, key)!r} there, {_get(mine, key)!r} here"
        for key in sorted({*_keys(mine), *_keys(theirs)})
        if _get(mine, key) != _get(theirs, key)
    ]


def _keys(tree: Mapping, prefix: str = "") -> list[str]:
    return [
        key
        for name, node in tree.items()
        for key in (
            _keys(node, f"{prefix}{name}.") if isinstance(node, Mapping) else [prefix + name]
        )
    ]


def _get(tree: Mapping, key: str):
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree


class Checkpoints:
    """The Orbax checkpoints of a workdir; step n is the state after n optimizer steps."""

    def __init__(self, workdir: pathlib.Path, *, keep: int | None = None):
        policies = ocp.training.preservation_policies
        self._folder = (workdir / "checkpoints").absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.LatestN(keep) if keep else policies.PreserveAll(),
            cleanup_tmp_directories=keep is not None,
        )

    @property
    def latest(self) -> int | None:
        """The last committed step."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, state: TrainState) -> None:
        """Writes the state in the background; nothing is written twice."""
        step = int(state.step)
        if step == self.latest:
            return
        parts = {PARAMS: state.params, REST: {"opt_state": state.opt_state, "step": state.step}}
        if state.ema is not None:
            parts[EMA] = state.ema
        self._checkpointer.save_checkpointables_async(step, parts)

    def restore(self, abstract: TrainState) -> TrainState:
        """The latest state, in the shapes, types and shardings of `abstract`."""
        parts = {
            PARAMS: abstract.params,
            REST: {"opt_state": abstract.opt_state, "step": abstract.step},
        }
        if abstract.ema is not None:
            parts[EMA] = abstract.ema
        found = self._load(self.latest, parts)
        return TrainState(params=found[PARAMS], ema=found.get(EMA), **found[REST])

    def params(self, step: int, sharding: Sharding = None) -> dict:
        """The trained weights of a step, or their running mean where there is one."""
        folder = self._folder / str(step)
        name = EMA if (folder / EMA).exists() else PARAMS
        _check_whole(folder / name)
        abstract = ocp.pytree_metadata(folder, checkpointable_name=name).metadata

        def one(path, leaf) -> jax.ShapeDtypeStruct:
            spec = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            place = sharding and sharding("/".join(key.key for key in path), spec)
            place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return self._load(step, {name: jax.tree_util.tree_map_with_path(one, abstract)})[name]

    def _load(self, step: int, parts: dict) -> dict:
        where = self._folder / str(step)
        for name in parts:
            _check_whole(where / name)
        try:
            return self._checkpointer.load_checkpointables(step, parts)
        except Exception as error:  # Orbax names everything that it tried, on many lines
            raise ValueError(f"checkpoint {where} is damaged: {str(error)[:300]}") from error

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpointer.close()


def _check_whole(folder: pathlib.Path) -> None:
    """Raises ValueError naming what is missing of a part of a checkpoint, before Orbax stumbles over it."""
    wanted = ("_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_*/manifest.ocdbt")
    missing = [name for name in wanted if not any(folder.glob(name))]
    if missing:
        raise ValueError(
            f"checkpoint {folder.parent} is not whole: {folder.name} lacks {', '.join(missing)}; remove the "
            "folder to go on from the checkpoint before"
        )


class Origin:
    """Where weights come from: a folder that `wemmu convert` wrote, or a workdir and what it started from."""

    def __init__(self, folder: str | pathlib.Path, *, step: int | None = None):
        """`step`: of which checkpoint of a workdir; the latest by default.

        Raises:
          FileNotFoundError: there are no weights there.
          ValueError: they are not whole, or not those that training went on from.
        """
        self.folder = pathlib.Path(folder)
        self.step: int | None = None
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no weights: {folder} is not a folder")
        self.run: dict | None = None
        self.parent: Origin | None = None
        if (self.folder / "run.json").exists():
            self.run = json.loads((self.folder / "run.json").read_text())
            self.step = Checkpoints(self.folder).latest if step is None else step
            if self.step is None or not (self.folder / f"checkpoints/{self.step}").exists():
                which = "finished checkpoint" if step is None else f"checkpoint {step} any more"
                raise FileNotFoundError(f"no weights: {folder} has no {which}")
            self.parent = Origin(self.run["init"], step=self.run.get("init_step"))
            found = self.fingerprint
            if found != self.run["fingerprint"]:
                raise ValueError(
                    f"{self.folder} was trained on weights {self.run['fingerprint'][:12]}, but "
                    f"{self.backbones_folder} holds {found[:12]}"
                )
        elif not (self.folder / "wemmu.json").exists():
            raise FileNotFoundError(
                f"no weights: {folder} is neither a converted folder (wemmu.json) nor a training workdir "
                "(run.json)"
            )

    @property
    def backbones_folder(self) -> pathlib.Path:
        """The converted folder at the root."""
        return self.folder if self.parent is None else self.parent.backbones_folder

    @functools.cached_property
    def backbones(self) -> Weights:
        """The converted weights at the root."""
        return Weights.open(self.backbones_folder)

    @property
    def fingerprint(self) -> str:
        """The same for the same weights at the root: the backbones', and a bridge's that was converted with them."""
        if self.parent is not None:
            return self.parent.fingerprint
        found = self.backbones.fingerprint
        if not self._converted_bridge.exists():
            return found
        return hashlib.sha256((found + sha256_of(self._converted_bridge)).encode()).hexdigest()

    @property
    def bridge(self) -> dict | None:
        """The bridge config that was trained, None before any training."""
        if self.run is not None:
            return self.run["bridge"]
        if not self._converted_bridge.exists():
            return None
        return read_bridge_config(self._converted_bridge).to_dict()

    @property
    def _converted_bridge(self) -> pathlib.Path:
        return self.folder / BRIDGE_FILE

    def described(self) -> dict:
        """What a run that starts here writes down about it."""
        return {
            "init": str(self.folder.absolute()),
            "init_step": self.step,
            "fingerprint": self.fingerprint,
        }

    def trained(self, sharding: Sharding = None) -> dict[str, jax.Array]:
        """Path -> leaf of everything that training changed so far; a later stage goes over an earlier one. Where the
        root was converted with a bridge, that is where it begins."""
        if self.parent is None:
            file = self._converted_bridge
            return load_bridge_leaves(file, sharding) if file.exists() else {}
        own = Checkpoints(self.folder).params(self.step, sharding)
        return {**self.parent.trained(sharding), **flatten(own)}

    def load(self, *, dtype: Callable[[str], jnp.dtype], sharding: Sharding = None) -> dict:
        """The whole tree, trained leaves laid over the backbones.

        Args:
          dtype: path -> the type that the leaf is wanted in.
          sharding: as in `Weights.load`; every host reads only its own shards.
        """
        trained = self.trained(sharding)
        weights = self.backbones
        flat = {
            path: weights.load_leaf(path, dtype=dtype(path), sharding=sharding)
            for path in weights.specs
            if path not in trained
        }
        cast = {path: leaf.astype(dtype(path)) for path, leaf in trained.items()}
        return nest({**flat, **cast})
