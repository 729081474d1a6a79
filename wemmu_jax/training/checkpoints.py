"""The workdir of a run and its checkpoints.

A workdir holds `config.json` (the resolved config), `run.json` (where the run started from, and on which data) and
`checkpoints/STEP/`, Orbax checkpoints of the trainable side alone; frozen weights stay in the converted folder,
which `run.json` names together with its fingerprint.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import ml_collections
from orbax.checkpoint import v1 as ocp

import wemmu_jax
from wemmu_jax.errors import passes
from wemmu_jax.files import read_object, write_json
from wemmu_jax.models.wemmu.config import BridgeConfig
from wemmu_jax.sharding.processes import exchange, is_first, together
from wemmu_jax.training.state import TrainState

Sharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding | None] | None

PARAMS, EMA, REST = "params", "ema", "optimizer"
# Beginnings of `differences`' lines for keys that do not change what is computed, but how, or what is kept of it.
_MAY_DIFFER = (
    *("mesh.", "data.workers:", "data.threads:", "model.attention:", "model.remat:"),
    *("every.", "keep_checkpoints:", "data.bad_share:"),
)
_CHUNK = 1 << 24


def check_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Changes nothing.

    Raises:
      ValueError: the workdir belongs to another config, whose differing keys are named, or is in other use. Keys
        that only a step's rounding hangs on (the mesh's, kernels') may differ.
    """
    path = workdir / "config.json"
    if path.exists():
        other = differences(_begun_with(path), json.loads(config.to_json()))
        if other := [line for line in other if not line.startswith(_MAY_DIFFER)]:
            raise ValueError(
                f"{workdir} belongs to another config:\n  " + "\n  ".join(other) + "\n"
                "Give this run a workdir of its own, or the same config to resume."
            )
    elif workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file; expected a folder, or a name that is free")
    elif workdir.exists() and {file.name for file in workdir.iterdir()} - {"run.json"}:
        raise ValueError(f"{workdir} is not empty and is no workdir (it has no config.json)")


def _begun_with(path: pathlib.Path) -> dict:
    """A run's config. What the bridge of an earlier version does not say is as it was then: the default."""
    config = read_object(path, keys=["model"])
    config["model"]["bridge"] = BridgeConfig.from_dict(config["model"]["bridge"]).to_dict()
    return config


def claim_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict, run: dict) -> None:
    """Makes the workdir this run's, or checks that it is.

    Args:
      workdir: the folder.
      config: the resolved config.
      run: where the run starts from: `init`, `init_step`, `fingerprint`, `bridge`; `data`, what its data sets hold.

    Raises:
      ValueError: as `check_workdir`, or the weights that the run started from, or its data, are others by now.
    """
    check_workdir(workdir, config)
    if (workdir / "config.json").exists():
        begun = read_object(workdir / "run.json")
        begun["bridge"] = BridgeConfig.from_dict(begun["bridge"]).to_dict()
        # A run of an earlier version does not say what its data sets held.
        data = differences({"data": run["data"], **begun}["data"], run["data"])
        if other := differences(begun | {"data": {}}, run | {"data": {}}):
            raise ValueError(f"{workdir} started from other weights:\n  " + "\n  ".join(other))
        if data and Checkpoints(workdir).latest != config.optimizer.steps:
            raise ValueError(
                f"{workdir}: its data sets held other records when the run began:\n  "
                + "\n  ".join(data)
                + "\nThe samples to come would not be those that were to come. Bring the data back as they were "
                "(`wemmu data index` reads again what a disk failed to give; a renewed index is gone when its folder "
                "is), or begin a run on these data in a workdir of its own with "
                f"--init {workdir}. To go on all the same, take data out of {workdir}/run.json"
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "run.json", run)
    write_json(workdir / "config.json", json.loads(config.to_json()))


def begun_at(workdir: pathlib.Path) -> int | None:
    """Which checkpoint of another workdir a run started from, which may have saved others since. None for a run that
    has not begun, or that started from a converted folder."""
    file = workdir / "run.json"
    return read_object(file).get("init_step") if file.exists() else None


def renew_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict, run: dict) -> None:
    """Writes down, and says, what is another than before in a run that goes on, see `check_workdir`; for whoever has
    claimed the workdir and holds its lock."""
    path, mine = workdir / "config.json", json.loads(config.to_json())
    if other := differences(_begun_with(path), mine):
        print(
            f"{workdir} goes on with another config:\n  "
            + "\n  ".join(other)
            + "\nThe samples and their noise "
            "stay the same; with another mesh or other kernels, numbers differ by rounding.",
            file=sys.stderr,
            flush=True,
        )
        write_json(path, mine)
    if "data" not in read_object(workdir / "run.json"):
        write_json(workdir / "run.json", run)


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


def code_version() -> str:
    """Of the package, and of its checkout, where it is one, the commit: `0.1.0 at 1a2b3c4`, or `1a2b3c4-dirty`."""
    file = pathlib.Path(__file__)
    # An environment may lie in another project's checkout.
    ours = ["git", "ls-files", "--error-unmatch", file.name]
    commit = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        for command in (ours, commit):
            done = subprocess.run(
                command, cwd=file.parent, capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return wemmu_jax.__version__
    return f"{wemmu_jax.__version__} at {done.stdout.strip()}"


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
        """`keep`: how many are kept; to write, which all processes begin together. Without it, to read alone."""
        self._folder = (workdir / "checkpoints").absolute()
        self._keep = keep
        self._failed = 0  # saves
        self._saving: ocp.AsyncResponse | None = None
        self._checkpointer = None if keep is None else self._open()

    def _open(self) -> ocp.training.Checkpointer:
        """What writes; waits for all processes, and removes what was left half written."""
        context = ocp.Context()
        # Names of their own: where one process failed before a barrier, they would not agree on how often it was used.
        context.multiprocessing.barrier_sync_key_prefix = f"after_{self._failed}"
        return ocp.training.Checkpointer(
            self._folder,
            context=context,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The last committed step, or, of one that writes, the step that is being written."""
        if self._checkpointer is not None:
            found = self._checkpointer.latest
            return None if found is None else found.step
        # Orbax would wait for all processes here, one of which may have failed. A step has its name once it is whole.
        steps = (int(file.name) for file in self._folder.glob("*") if file.name.isdecimal())
        return max(steps, default=None)

    def save(self, state: TrainState) -> None:
        """Writes the state in the background; nothing is written twice. All processes call it alike.

        What became of a save shows at the next one. If it failed, that is said on stderr, and the state of now is
        written while all wait for it.

        Raises:
          Exception: of Orbax or of the storage, when that fails too.
          ValueError, ConnectionError: it failed in another process, see `together`.
        """
        failed = self._last_failed()
        step = int(state.step)
        if step == self.latest:
            return
        parts = {PARAMS: state.params, REST: {"opt_state": state.opt_state, "step": state.step}}
        if state.ema is not None:
            parts[EMA] = state.ema
        self._saving = self._checkpointer.save_checkpointables_async(step, parts)
        if failed:
            # Those that wait in Orbax for one that has failed wait no longer than its limit.
            with together(f"saving step {step}"):
                self._saving.result()

    def _last_failed(self) -> bool:
        """Waits for the save before; if it failed in any process, all make ready for another."""
        saving, self._saving = self._saving, None
        if saving is None:
            return False
        error = None
        try:
            saving.result()
        except Exception as found:
            error = str(found) or type(found).__name__
        failed = {index: error for index, error in enumerate(exchange(error)) if error is not None}
        if not failed:
            return False
        if is_first():
            said = "; ".join(f"process {index}: {error}" for index, error in failed.items())
            print(f"a checkpoint could not be written, so another is: {said}", file=sys.stderr)
        with contextlib.suppress(Exception):  # the same error once more
            self._checkpointer.close()
        self._failed += 1
        self._checkpointer = self._open()
        return True

    def restore(self, abstract: TrainState) -> TrainState:
        """The latest state, in the shapes, types and shardings of `abstract`."""
        parts = {
            PARAMS: abstract.params,
            REST: {"opt_state": abstract.opt_state, "step": abstract.step},
        }
        if abstract.ema is not None:
            parts[EMA] = abstract.ema
        for name, part in parts.items():
            self._check_same(self.latest, name, part)
        found = self._load(self.latest, parts)
        return TrainState(params=found[PARAMS], ema=found.get(EMA), **found[REST])

    def params(self, step: int, sharding: Sharding = None) -> dict:
        """The trained weights of a step, or their running mean where there is one."""

        def one(path, leaf) -> jax.ShapeDtypeStruct:
            spec = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            place = sharding and sharding("/".join(key.key for key in path), spec)
            place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        abstract = jax.tree_util.tree_map_with_path(one, self.abstract_params(step))
        name = self._weights_of(step)
        return self._load(step, {name: abstract})[name]

    def abstract_params(self, step: int) -> dict:
        """The shapes and types of what `params` loads."""
        return self._abstract(step, self._weights_of(step))

    def _abstract(self, step: int, name: str) -> dict:
        where = self._folder / str(step)
        with _reading(where, [name]):
            return ocp.pytree_metadata(where, checkpointable_name=name).metadata

    def _check_same(self, step: int, name: str, mine: dict) -> None:
        """Raises ValueError if the part has other leaves than `mine`, as that of another version's optimizer has."""
        theirs, mine = _leaf_names(self._abstract(step, name)), _leaf_names(mine)
        if theirs != mine:
            raise ValueError(
                f"checkpoint {self._folder / str(step)} is of another version of this program: its {name} has "
                f"{_some(theirs - mine)}, which nothing here reads, and lacks {_some(mine - theirs)}; go on with that "
                "version, or begin anew in another workdir"
            )

    def _weights_of(self, step: int) -> str:
        return EMA if (self._folder / str(step) / EMA).exists() else PARAMS

    def _load(self, step: int, parts: dict) -> dict:
        where = self._folder / str(step)
        with _reading(where, parts):
            return ocp.load_checkpointables(where, parts)

    def close(self) -> None:
        """Waits for what is being written."""
        if self._checkpointer is not None:
            self._checkpointer.close()


def _leaf_names(tree: dict) -> set[str]:
    """Paths of leaves; a NamedTuple's are as Orbax keeps them, which knows dicts and sequences alone."""

    def name(key) -> str:
        return str(next(getattr(key, of) for of in ("key", "name", "idx") if hasattr(key, of)))

    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(map(name, path)) for path, _ in paths}


def _some(names: set[str]) -> str:
    """The first of them, and how many there are."""
    return f"{min(names)} ({len(names)} leaves)" if names else "nothing"


@contextlib.contextmanager
def _reading(where: pathlib.Path, parts: Iterable[str]) -> Iterator[None]:
    """For a block in which Orbax reads these parts of a checkpoint.

    Raises:
      ValueError: a part is not whole, or damaged. Without Orbax's own message, which names everything that it tried,
        on many lines.
      OSError, JaxRuntimeError, MemoryError: it may be as good as ever: storage failed for the moment, a process was
        waited for in vain, the device or the host has no memory left.
    """
    for name in parts:
        _check_whole(where / name)
    try:
        yield
    except Exception as error:
        if reason := _no_damage(error, [where / name for name in parts]):
            raise reason  # noqa: B904 one of the error's own causes, mostly
        raise ValueError(
            f"checkpoint {where} is damaged: {', '.join(parts)} cannot be read (--debug shows why); remove the "
            "folder to go on from the checkpoint before"
        ) from error


def _no_damage(error: BaseException, folders: Sequence[pathlib.Path]) -> BaseException | None:
    """What kept Orbax from reading these folders, if not what is in them."""
    cause: BaseException | None = error
    while cause is not None:  # Orbax raises a KeyError over whatever it was
        if passes(cause) or isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
            return cause
        # What reads the arrays knows no OSError: it raises a ValueError with the number in its text.
        if found := re.search(r"os_error_code='(\d+)'", str(cause)):
            number = int(found[1])
            if passes(told := OSError(number, os.strerror(number), str(folders[0]))):
                return told
        cause = cause.__cause__ or cause.__context__
    # A status without a number; or the storage is away for longer.
    try:
        for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
            with file.open("rb") as stream:
                while stream.read(_CHUNK):
                    pass
    except OSError as failed:
        if passes(failed):
            return failed
    return None


def _check_whole(folder: pathlib.Path) -> None:
    """Raises ValueError naming what is missing of a part of a checkpoint, before Orbax stumbles over it."""
    wanted = ("_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_*/manifest.ocdbt")
    missing = [name for name in wanted if not any(folder.glob(name))]
    if missing:
        raise ValueError(
            f"checkpoint {folder.parent} is not whole: {folder.name} lacks {', '.join(missing)}; remove the "
            "folder to go on from the checkpoint before"
        )
