"""Where weights come from: converted backbones, and everything that training has laid over them since."""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from wemmu_jax.conversion.bridge import BRIDGE_FILE, load_bridge_leaves, read_bridge_config
from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.conversion.safetensors_io import read_header, sha256_of
from wemmu_jax.conversion.weights import Weights
from wemmu_jax.files import read_object
from wemmu_jax.models.wemmu.config import BridgeConfig
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.training.checkpoints import Checkpoints, Sharding

_RUN_KEYS = ("init", "init_step", "fingerprint", "bridge")


class Origin:
    """A folder that `wemmu convert` wrote, or a workdir and what it started from."""

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
            self.run = read_object(self.folder / "run.json", keys=_RUN_KEYS)
            self.step = Checkpoints(self.folder).latest if step is None else step
            if self.step is None or not (self.folder / f"checkpoints/{self.step}").exists():
                which = "finished checkpoint" if step is None else f"checkpoint {step} any more"
                raise FileNotFoundError(f"no weights: {folder} has no {which}")
            self.parent = Origin(self.run["init"], step=self.run["init_step"])
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

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for the same weights at the root: the backbones', and a bridge's that was converted with them."""
        if self.parent is not None:
            return self.parent.fingerprint
        found = self.backbones.fingerprint
        if not self._converted_bridge.exists():
            return found
        return hashlib.sha256((found + sha256_of(self._converted_bridge)).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """Which weights these are, in few words: equal for copies, different after one more step or another run."""
        found = hashlib.sha256(self.fingerprint.encode())
        origin: Origin | None = self
        while origin is not None and origin.step is not None:
            # Holds the time at which the checkpoint was written.
            file = origin.folder / f"checkpoints/{origin.step}/_CHECKPOINT_METADATA"
            found.update(file.read_bytes() if file.exists() else str(origin.step).encode())
            origin = origin.parent
        step = "" if self.step is None else f"step {self.step}, "
        return f"{step}{found.hexdigest()[:12]}"

    @property
    def bridge(self) -> dict | None:
        """The bridge config that was trained, None before any training."""
        if self.run is not None:
            # What a run of an earlier version does not say is as it was then: the default.
            return BridgeConfig.from_dict(self.run["bridge"]).to_dict()
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

    def check(self, model: WeMMUModel) -> None:
        """Compares the shapes of all weights with those that the configs imply; reads no weights.

        Raises:
          ValueError: names every leaf that is missing, too many or of another shape.
        """
        key = jax.random.key(0)
        implied = jax.eval_shape(model.init_backbones, key)
        if self.bridge is not None:
            implied |= jax.eval_shape(model.init_bridge, key, implied["vlm"]["text"])
        wanted = {path: leaf.shape for path, leaf in flatten(implied).items()}
        found = {path: spec.shape for path, spec in self.backbones.specs.items()}
        found |= self._trained_shapes()
        wrong = [
            f"{path}: the configs imply {wanted.get(path)}, the weights have {found.get(path)}"
            for path in sorted(wanted.keys() | found.keys())
            if wanted.get(path) != found.get(path)
        ]
        if wrong:
            shown = wrong[:10] + [f"and {len(wrong) - 10} more"] * (len(wrong) > 10)
            raise ValueError(
                f"{self.folder}: configs and weights disagree:\n  " + "\n  ".join(shown)
            )

    def _trained_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.parent is not None:
            own = flatten(Checkpoints(self.folder).abstract_params(self.step))
            return self.parent._trained_shapes() | {path: leaf.shape for path, leaf in own.items()}
        if not self._converted_bridge.exists():
            return {}
        tensors = read_header(self._converted_bridge).tensors
        return {path: stored.shape for path, stored in tensors.items()}

    def trained(
        self, sharding: Sharding = None, *, without: Collection[str] = ()
    ) -> dict[str, jax.Array]:
        """Path -> leaf of everything that training changed so far; a later stage goes over an earlier one. Where
        the root was converted with a bridge, that is where it begins.

        Args:
          sharding: as in `Weights.load`.
          without: paths that are not wanted; a stage whose leaves later ones all replaced is not read at all.
        """
        if self.parent is None:
            file = self._converted_bridge
            leaves = load_bridge_leaves(file, sharding) if file.exists() else {}
        else:
            checkpoints = Checkpoints(self.folder)
            own = flatten(checkpoints.abstract_params(self.step)).keys()
            leaves = self.parent.trained(sharding, without={*without, *own})
            if own - set(without):
                leaves |= flatten(checkpoints.params(self.step, sharding))
        return {path: leaf for path, leaf in leaves.items() if path not in without}

    def load(self, *, dtype: Callable[[str], jnp.dtype], sharding: Sharding = None) -> dict:
        """The whole tree, trained leaves laid over the backbones.

        Args:
          dtype: path -> the type that the leaf is wanted in.
          sharding: as in `Weights.load`; every host reads only its own shards.
        """
        trained = self.trained(sharding)
        # One by one, so that a leaf's float32 form is gone before the next is cast.
        flat = {path: trained.pop(path).astype(dtype(path)) for path in list(trained)}
        weights = self.backbones
        for path in weights.specs.keys() - flat.keys():
            flat[path] = weights.load_leaf(path, dtype=dtype(path), sharding=sharding)
        return nest(flat)
