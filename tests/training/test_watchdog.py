"""A process that is stuck ends; one that is not, and one that is done, does not."""

import pathlib
import subprocess
import sys
import threading
import time
import types
from unittest import mock

from wemmu_jax.training import loop, watchdog
from wemmu_jax.training.watchdog import Watchdog

ROOT = pathlib.Path(__file__).parents[2]


def test_a_process_that_is_stuck_ends_and_says_where():
    """In a lock that nobody opens; a `finally` or a handler of SIGTERM would never run."""
    code = (
        "import threading\n"
        "from wemmu_jax.training.watchdog import Watchdog\n"
        "def read_from_storage_that_hangs():\n"
        "    lock = threading.Lock(); lock.acquire(); lock.acquire()\n"
        "with Watchdog(limit=0.5):\n"
        "    read_from_storage_that_hangs()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 75 and not ended.stdout
    assert "nothing has come to its end for 0.5 s" in ended.stderr
    assert "in read_from_storage_that_hangs" in ended.stderr


def test_a_process_that_moves_is_left_alone(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: ended.set())
    with Watchdog(limit=2) as dog:
        [watching] = [t for t in threading.enumerate() if t.name == "watchdog"]
        for _ in range(15):
            time.sleep(0.2)
            dog.moved()
    watching.join(timeout=60)
    assert not watching.is_alive() and not ended.is_set()
    assert capfd.readouterr() == ("", "")


def test_a_run_moves_with_its_steps_checkpoints_and_what_it_looks_at(monkeypatch):
    """Of two steps, with a checkpoint after the second, for which outcomes are waited for. `_step` and `_look` say
    themselves how they get on."""
    told = []
    every = types.SimpleNamespace(validate=0, sample=0, checkpoint=2, log=0)
    run = mock.MagicMock()
    run.stage.optimizer.steps, run.config.every, run.held_out = 2, every, None
    monkeypatch.setattr(
        loop, "_step", lambda run, state, step, *_: told.append(f"step {step}") or (state, step)
    )
    monkeypatch.setattr(loop, "_report", lambda *_, **__: told.append("report"))
    monkeypatch.setattr(loop, "_look", lambda *_: told.append("look"))
    state = types.SimpleNamespace(step=0)
    checkpoints = types.SimpleNamespace(save=lambda state: told.append("save"))
    stop = types.SimpleNamespace(after=lambda step: False)
    dog = types.SimpleNamespace(moved=lambda: told.append("moved"))
    loop._run_steps(run, state, checkpoints, mock.MagicMock(), None, stop, None, None, dog)
    first = ["look", "step 1", "look"]
    second = ["step 2", "report", "moved", "report", "moved", "save", "moved", "look"]
    assert told[: len(first + second)] == first + second
