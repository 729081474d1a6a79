"""The processes of a run: how they find each other, and what they tell each other besides arrays.

One process is the normal case, for which nothing here does anything. Of several, each drives the devices of its own
machine, all run the same program, and the first alone writes what is not an array.
"""

import contextlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

# JAX has no public names for these two: what a cluster's environment says, and the store that all processes share.
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from wemmu_jax.errors import USER_ERRORS, passes
from wemmu_jax.sharding.meeting import meet

HEARTBEAT = 100  # seconds until a process that was killed is noticed by the others, which then end
SHUTDOWN = 60  # seconds that a process, at its end, waits for the others to end
_EXCHANGE = 3600  # seconds between the first and the last to arrive; weights take long to load
_VISIBLE = 90  # seconds until what one host writes is seen by all; NFS may remember for a minute what was not there
_calls = itertools.count()


def join(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    timeout: float,
) -> None:
    """Makes this process one of a run's; must come before anything else of JAX is used.

    What is not given is found out on TPU pods (queued resources and GKE), under Slurm and Open MPI. On any other
    machine, with nothing given, the process is alone.

    Args:
      coordinator: HOST:PORT of process 0, as every process can reach it; the port must be free.
      count: how many processes there are.
      index: which of them this is, from 0.
      timeout: seconds that all may take to come.

    Raises:
      ValueError: the three are not given together, do not fit each other, or the platform that JAX was told to use
        is not there.
      TimeoutError: a process never came, and those that did not are named; or one was lost right afterwards.
      OSError: process 0 cannot listen at the coordinator's port.
    """
    found = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, count, index, None, None, int(timeout)
    )
    coordinator, count, index, devices = found
    given = {"coordinator": coordinator, "processes": count, "process": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given):
        if missing:
            raise ValueError(
                f"several processes need --coordinator, --processes and --process; {', '.join(missing)} "
                "is not given, and nothing here says it"
            )
        if not 0 <= index < count:
            raise ValueError(f"--process must be 0 to {count - 1} of {count}; found {index}")
        meet(coordinator, count=count, index=index, timeout=timeout)
        # Programs that wait for each other across processes, several of them under way on a CPU's devices, may take the
        # threads that others wait for, and never end. It is read when the CPU's devices are first asked for.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            # Slurm has a process for each GPU; the environment may say otherwise.
            None if "JAX_LOCAL_DEVICE_IDS" in os.environ else devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    _check_platform()


def _check_platform() -> None:
    try:
        jax.devices()
    # The second, and without a word, where the platform's plugin is not installed.
    except (RuntimeError, AssertionError) as error:
        why = (str(error) or "JAX has no plugin for it").splitlines()[0]
        # All processes tell each other of their devices here.
        if jax.distributed.is_initialized() and "DEADLINE_EXCEEDED" in str(error):
            raise TimeoutError(f"a process was lost on the way: {why}") from error
        raise ValueError(
            f"JAX_PLATFORMS={jax.config.jax_platforms or ''} asks for a device that cannot be had here: {why}. Install "
            "its plugin (jax[tpu], jax[cuda13]) and look at its driver; JAX_PLATFORMS=cpu works anywhere"
        ) from error


def is_first() -> bool:
    """Whether this process writes what is not an array."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, in the first process."""
    if is_first():
        print(text, flush=True)


def exchange(value: Any) -> list[Any]:
    """What every process hands in, in their order. All must call it, and in the same order.

    Over the store that the coordinator keeps, so that no device waits.

    Args:
      value: anything that JSON holds.
    """
    count = jax.process_count()
    if count == 1:
        return [value]
    call, client = next(_calls), global_state.client
    client.key_value_set(f"wemmu/{call}/{jax.process_index()}", json.dumps(value))
    found = [
        client.blocking_key_value_get(f"wemmu/{call}/{index}", _EXCHANGE * 1000)
        for index in range(count)
    ]
    return [json.loads(text) for text in found]


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """All processes get through the block, or none does: where one fails, the others fail with its message.

    Must not hold anything that the others would wait in without a limit: no call of `exchange`, no program over devices
    of several processes, no arrays that Orbax reads.

    Raises:
      ValueError: another process failed; says which, in `what`, and how.
      ConnectionError: the same, and that one may go well when all start again.
    """
    try:
        yield
    except Exception as error:
        exchange(
            {"error": str(error), "final": isinstance(error, USER_ERRORS) and not passes(error)}
        )
        raise
    found = exchange(None)
    failed = [(index, one) for index, one in enumerate(found) if one is not None]
    # What somebody has to mend comes first, or all would start again for nothing.
    if failed := sorted(failed, key=lambda one: not one[1]["final"]):
        index, one = failed[0]
        kind = ValueError if one["final"] else ConnectionError
        raise kind(f"process {index} of {len(found)}, {what}: {one['error']}")


def on_host(array: jax.Array) -> np.ndarray:
    """The whole of an array whose parts may lie on the devices of several processes; all must call it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError, in all processes, if one does not see what the first has just written."""
    if jax.process_count() == 1:
        return
    flag = folder / exchange(f".seen-{time.time_ns()}")[0]
    if is_first():
        flag.touch()
    until = time.monotonic() + _VISIBLE
    while not (sees := flag.exists()) and time.monotonic() < until:
        time.sleep(0.5)
    blind = [str(index) for index, it_sees in enumerate(exchange(sees)) if not it_sees]
    if is_first():
        flag.unlink()
    if blind:
        raise ValueError(
            f"{folder} of process 0 is not that of {', '.join(blind)}; it must lie on storage that all hosts share"
        )
