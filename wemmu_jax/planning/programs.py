"""The programs of a stage, compiled for a TPU that is not there, each once: texts and memory stay on disk."""

import concurrent.futures
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from wemmu_jax.data.buckets import Bucket
from wemmu_jax.models.wemmu.config import WeMMUConfig
from wemmu_jax.models.wemmu.published import published_wemmu
from wemmu_jax.ops.programs import compiler_options
from wemmu_jax.planning.chips import GIB
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.topology import topology_devices
from wemmu_jax.training.abstract import AbstractRun
from wemmu_jax.training.curriculum import Stage, load_config
from wemmu_jax.training.origin import Origin


class Key(NamedTuple):
    """Which program: `accumulate` has an arity and a bucket, `encode target` and `encode source` a bucket, `update`
    and `zero` neither."""

    name: str
    arity: int | None = None
    bucket: Bucket | None = None

    def __str__(self) -> str:
        arity = "" if self.arity is None else f", {self.arity} sources"
        bucket = "" if self.bucket is None else f", {self.bucket.height}x{self.bucket.width}"
        return self.name + arity + bucket


@dataclasses.dataclass(frozen=True)
class Setting:
    """A stage on a topology. It can be sent to another process.

    Attributes:
      config: of the stage.
      sizes: of the model, its bridge that of the config.
      topology, slices: as `topology_devices` takes them.
      text_length: of the prompts' texts, padded.
      draft: compiled with the least effort, in a fifth of the time. What that changes is in docs/plan.md.
    """

    config: ml_collections.ConfigDict
    sizes: WeMMUConfig
    topology: str
    slices: int
    text_length: int
    draft: bool = False

    @classmethod
    def of(
        cls,
        spec: str,
        overrides: Mapping[str, Any],
        *,
        topology: str,
        slices: int = 1,
        init: str | None = None,
        text_length: int | None = None,
        draft: bool = False,
    ) -> "Setting":
        """`spec` and `overrides` as `load_config` takes them; sizes from the folder `init`, or the config's, or those
        of the paper's backbones; the config's longest text length by default, to which the longest of many rows pads
        most micro-batches, and which takes the most memory.

        Raises:
          ValueError, FileNotFoundError: the config or the folder is not usable.
        """
        config = load_config(spec, dict(overrides))
        bridge, init = Stage.from_config(config).bridge, init or config.init
        sizes = published_wemmu(bridge)
        if init:
            sizes = WeMMUConfig.from_folder(Origin(init).backbones_folder, bridge)
        lengths = config.data.text_lengths
        if text_length is not None and text_length not in lengths:
            raise ValueError(f"texts are padded to one of {tuple(lengths)}, not to {text_length}")
        return cls(config, sizes, topology, slices, text_length or max(lengths), draft)

    def changed(self, values: Mapping[str, Any]) -> "Setting":
        """The same with other values of the config."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(values)
        return dataclasses.replace(self, config=config)

    @property
    def devices(self) -> list[jax.Device]:
        """Those of the topology, in the order of the mesh."""
        return list(self.mesh.devices.flat)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Of the topology's devices."""
        devices = topology_devices(self.topology, slices=self.slices)
        return make_mesh(**self.config.mesh, devices=devices)

    @functools.cached_property
    def run(self) -> AbstractRun:
        """What training would run. The seed is a constant of the programs: stages that differ in nothing else share
        them."""
        config = self.config.copy_and_resolve_references()
        config.seed = 0
        return AbstractRun.of(config, self.sizes, self.mesh)

    def lower(self, key: Key) -> jax.stages.Lowered:
        """Lowers one program."""
        run = self.run
        match key.name:
            case "accumulate":
                batch = run.batch(key.bucket, arity=key.arity, text_length=self.text_length)
                return run.accumulate(batch)
            case "encode target":
                return run.encode(run.pixels(key.bucket, arity=0).target)
            case "encode source":
                return run.encode(run.pixels(key.bucket, arity=1).sources[0])
            case "update":
                return run.update()
            case "zero":
                return run.trainer.zero_gradients.lower()
        raise ValueError(f"no program {key.name!r}")

    def fingerprint(self, lowered: jax.stages.Lowered) -> str:
        """Equal for programs that the compiler turns into the same."""
        versions = [jax.__version__, importlib.metadata.version("libtpu")]
        options = compiler_options(self.devices[0].device_kind)
        said = [self.topology, str(self.slices), *versions, str(options), lowered.as_text()]
        said += [f"{name}={os.environ[name]}" for name in _FLAGS if os.environ.get(name)]
        if self.draft:
            said.append("draft")
        return hashlib.sha256("\n".join(said).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler makes of a program.

    Attributes:
      text: optimised HLO; empty if the program is too large.
      seconds: that compiling took when it was done.
      memory: `arguments`, `outputs`, `aliased` (outputs that take over arguments), `temporaries`, `host`: bytes a chip.
      too_large: the compiler's complaint, or empty.
    """

    text: str
    seconds: float
    memory: Mapping[str, int]
    too_large: str = ""

    @property
    def beside_arguments(self) -> int:
        """Bytes that the program needs on top of what it is given."""
        memory = self.memory
        return memory["temporaries"] + memory["outputs"] - memory["aliased"]


_MEMORY = {
    "arguments": "argument_size_in_bytes",
    "outputs": "output_size_in_bytes",
    "aliased": "alias_size_in_bytes",
    "temporaries": "temp_size_in_bytes",
    "host": "host_temp_size_in_bytes",
}
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # which the compiler reads beside its options
_LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}


def compile_program(lowered: jax.stages.Lowered, *, draft: bool) -> Compiled:
    """Compiles for the devices that the arguments lie on.

    Raises:
      ValueError: the compiler fails, and not for a device's main memory.
    """
    start = time.perf_counter()
    try:
        result = lowered.compile(compiler_options=_LEAST_EFFORT if draft else None)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        needed = re.search(r"\(([\d.]+)([BKMGT])\)|Used ([\d.]+)([BKMGT])", message)
        # A core's own memories run full as well: a kernel's fault, and not that of a stage that is too large.
        in_main_memory = "RESOURCE_EXHAUSTED" in message and re.search(r"\bhbm\b", message, re.I)
        if not (needed and in_main_memory):
            raise ValueError(f"the compiler fails: {message.splitlines()[0]}") from error
        found = [part for part in needed.groups() if part]
        memory = dict.fromkeys(_MEMORY, 0) | {
            "temporaries": int(float(found[0]) * _UNITS[found[1]])
        }
        return Compiled("", time.perf_counter() - start, memory, message.splitlines()[0])
    seconds = time.perf_counter() - start
    analysis = result.memory_analysis()
    memory = {name: getattr(analysis, field) for name, field in _MEMORY.items()}
    return Compiled(result.as_text(), seconds, memory)


class Library:
    """Compiled programs on disk, by fingerprint."""

    def __init__(self, folder: str | pathlib.Path):
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, fingerprint: str) -> bool:
        return self._file(fingerprint).exists()

    def get(self, fingerprint: str) -> Compiled:
        """Raises ValueError naming the file if it is damaged."""
        file = self._file(fingerprint)
        try:
            return Compiled(**json.loads(gzip.decompress(file.read_bytes())))
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); delete it") from error

    def put(self, fingerprint: str, compiled: Compiled) -> None:
        """Keeps it; in one step, because several processes may."""
        file = self._file(fingerprint)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode(), 6))
        os.replace(partial, file)

    def compile(
        self, setting: Setting, keys: Sequence[Key], *, processes: int = 1
    ) -> dict[Key, Compiled]:
        """Every program of `keys`; only those that are not known yet are compiled, one line printed for each."""
        lowered = {key: setting.lower(key) for key in keys}
        prints = {key: setting.fingerprint(program) for key, program in lowered.items()}
        missing: dict[str, Key] = {}
        for key, name in prints.items():
            if name not in self:
                missing.setdefault(name, key)
        if processes > 1 and len(missing) > 1:
            bare = dataclasses.replace(setting)  # without its devices, which stay in this process
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
                jobs = [
                    pool.submit(_compile_into, self._folder, bare, key, name)
                    for name, key in missing.items()
                ]
                try:
                    for job in concurrent.futures.as_completed(jobs):
                        print(job.result(), flush=True)
                except concurrent.futures.process.BrokenProcessPool as error:
                    raise ValueError(
                        "a process that compiled was killed, as one is that finds no memory; try --processes 1"
                    ) from error
        else:
            for name, key in missing.items():
                print(self._add(setting, key, lowered[key], name), flush=True)
        return {key: self.get(name) for key, name in prints.items()}

    def _add(
        self, setting: Setting, key: Key, lowered: jax.stages.Lowered, fingerprint: str
    ) -> str:
        try:
            compiled = compile_program(lowered, draft=setting.draft)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        self.put(fingerprint, compiled)
        too_large = " (too large)" if compiled.too_large else ""
        return f"compiled {key} in {compiled.seconds:.0f} s{too_large}"

    def _file(self, fingerprint: str) -> pathlib.Path:
        return self._folder / f"{fingerprint}.json.gz"


def _compile_into(folder: pathlib.Path, setting: Setting, key: Key, fingerprint: str) -> str:
    lowered = setting.lower(key)
    if setting.fingerprint(lowered) != fingerprint:
        raise RuntimeError(f"another process lowers {key} to another program; try --processes 1")
    return Library(folder)._add(setting, key, lowered, fingerprint)
