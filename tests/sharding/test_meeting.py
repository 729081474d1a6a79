"""Processes that meet, and those that do not; as threads, which is all the same to a socket."""

import errno
import functools
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from wemmu_jax.cli.main import FAILED, TRY_AGAIN, main
from wemmu_jax.sharding import processes
from wemmu_jax.sharding.meeting import meet


@pytest.fixture
def port() -> int:
    """A free one."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def come(port: int, *members: tuple[int, int], timeout: float = 20) -> list[Exception | None]:
    """What `meet` raises for each (index, count), None where it returns."""
    found: list[Exception | None] = [None] * len(members)

    def member(place: int, index: int, count: int) -> None:
        try:
            meet(f"localhost:{port}", count=count, index=index, timeout=timeout)
        except Exception as error:
            found[place] = error

    threads = [
        threading.Thread(target=member, args=(place, *numbers))
        for place, numbers in enumerate(members)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_come_and_the_port_is_free_afterwards(port):
    for _ in range(2):
        assert come(port, (2, 3), (0, 3), (1, 3)) == [None] * 3
    socket.create_server(("", port)).close()


def test_one_is_enough_for_one(port):
    assert come(port, (0, 1)) == [None]


def test_all_that_came_learn_who_did_not(port):
    for error in come(port, (0, 5), (1, 5), (3, 5), timeout=1):
        assert isinstance(error, TimeoutError)
        assert str(error).startswith("3 of 5 processes came within 1 s; missing: 2, 4. Start all 5")


def test_process_0_never_comes(port):
    [error] = come(port, (1, 2), timeout=0.5)
    assert isinstance(error, TimeoutError)
    assert str(error) == (
        f"process 1 of 2 waited 0.5 s for process 0 at localhost:{port}, which never came"
    )


def test_processes_that_disagree(port):
    for error in come(port, (0, 2), (1, 3)):
        assert isinstance(error, ValueError)
        assert str(error) == "process 1 was told of 3 processes, process 0 of 2"


def test_two_of_the_same_number(port):
    for error in come(port, (0, 3), (1, 3), (1, 3)):
        assert isinstance(error, ValueError)
        assert str(error) == "two processes were started as number 1 of 3"


def test_one_that_was_killed_may_come_again_and_strangers_are_ignored(port):
    first = threading.Thread(target=come, args=(port, (0, 3)))
    first.start()
    for hello in (b'{"index": 1, "count": 3}\n', b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b""):
        _dial(port, hello).close()
    assert come(port, (1, 3), (2, 3)) == [None] * 2
    first.join()


def _dial(port: int, hello: bytes) -> socket.socket:
    while True:
        try:
            connection = socket.create_connection(("localhost", port))
            connection.sendall(hello)
            return connection
        except ConnectionRefusedError:
            time.sleep(0.05)


def test_a_port_that_is_taken(port):
    with socket.create_server(("", port)):
        [error] = come(port, (0, 2))
    assert f"process 0 cannot listen on port {port}" in str(error) and "free port" in str(error)


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":1", "host:0", "host:70000"])
def test_an_address_that_is_none(address):
    with pytest.raises(ValueError, match=r"must be HOST:PORT of process 0; found"):
        meet(address, count=2, index=0, timeout=1)


# -- as `wemmu train` says it


def said(capsys, *flags: str, code: int = FAILED) -> str:
    """What the command says before anything else of the run is looked at."""
    assert main(["train", "--config", "none.py:x", "--workdir", "nowhere", *flags]) == code
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("0", "wemmu train: 1 of 2 processes came within 1 s; missing: 1. Start all"),
        ("1", "wemmu train: process 1 of 2 waited 1 s for process 0 at localhost:"),
    ],
)
def test_who_never_came_may_come_next_time(index, expected, port, capsys, monkeypatch):
    """A spot node, or a container's image, may take longer than that: all start again."""
    monkeypatch.setenv("WEMMU_JOIN_TIMEOUT", "1")
    common = (f"--coordinator=localhost:{port}", "--processes=2")
    text = said(capsys, *common, f"--process={index}", code=TRY_AGAIN)
    assert text.startswith(expected) and text.count("\n") == 1


def test_how_long_all_may_take_is_a_number_of_seconds(capsys, monkeypatch):
    monkeypatch.setenv("WEMMU_JOIN_TIMEOUT", "soon")
    with pytest.raises(SystemExit):
        main(["train", "--config", "none.py:x", "--workdir", "nowhere"])
    assert "--join-timeout: expected a whole number, found 'soon'" in capsys.readouterr().err


def test_a_process_that_is_lost_once_all_have_met(monkeypatch):
    """JAX's own words for it, where one dies before its devices are known to the others."""

    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': DEADLINE_EXCEEDED: GetKeyValue()")

    monkeypatch.setattr(processes.jax, "devices", devices)
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(TimeoutError, match=r"lost on the way: .*DEADLINE_EXCEEDED"):
        processes.join(timeout=1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--processes=2"], "coordinator, process is not given, and nothing here says it"),
        (
            ["--coordinator=h:1", "--processes=2", "--process=2"],
            "--process must be 0 to 1 of 2; found 2",
        ),
        (
            ["--coordinator=h", "--processes=2", "--process=0"],
            "must be HOST:PORT of process 0; found 'h'",
        ),
    ],
)
def test_flags_that_do_not_fit(flags, expected, capsys):
    assert expected in said(capsys, *flags)


def test_flags_come_from_the_environment_too(capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(processes, "join", lambda *found, **how: seen.update(found=found, **how))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    said(capsys, "--process=3")
    assert seen == {"found": ("h:1", 4, 3), "timeout": 300}


@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_an_accelerator_that_is_not_there(platform, tmp_path):
    """In a process of its own, because JAX looks once."""
    words = ["train", "--config", "configs/tiny.py:stage1", "--workdir", str(tmp_path / "run")]
    found = subprocess.run(
        [sys.executable, "-m", "wemmu_jax", *words],
        env={**os.environ, "JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2 and not (tmp_path / "run").exists()
    last = found.stderr.splitlines()[-1]
    assert last.startswith(f"wemmu train: JAX_PLATFORMS={platform} asks for a device that cannot")
    assert "JAX_PLATFORMS=cpu works anywhere" in last and "Traceback" not in found.stderr


def test_slurm_says_it_all(capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(processes, "meet", lambda address, **how: seen.update(at=address, **how))
    monkeypatch.setattr(
        processes.jax.distributed,
        "initialize",
        lambda *found, **how: seen.update(devices=found[3], **how),
    )
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    for name, value in {
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_NODELIST": "node[007-008]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    said(capsys)
    assert seen["at"].startswith("node007:") and (seen["count"], seen["index"]) == (16, 9)
    assert seen["devices"] == [1] and seen["heartbeat_timeout_seconds"] == processes.HEARTBEAT


def test_alone_where_nothing_says_otherwise():
    assert functools.reduce(lambda value, _: processes.exchange(value)[0], range(2), "x") == "x"
    with processes.together("testing"):
        pass
    with pytest.raises(KeyError), processes.together("testing"):
        raise KeyError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("no such folder"), ValueError),
        (OSError(errno.EIO, "the disk"), ConnectionError),
        (KeyError("a bug"), ConnectionError),
    ],
    ids=["to be mended", "of the moment", "unknown"],
)
def test_an_error_of_one_is_raised_by_all(error, kind, monkeypatch):
    """Of three processes the last fails; as it sees that itself, and then as the first does."""
    told = []
    monkeypatch.setattr(processes, "exchange", lambda value: told.append(value) or [None] * 3)
    with pytest.raises(type(error)), processes.together("testing"):
        raise error
    monkeypatch.setattr(processes, "exchange", lambda value: [value, None, *told])
    said = f"^process 2 of 3, testing: {re.escape(str(error))}$"
    with pytest.raises(kind, match=said), processes.together("testing"):
        pass


def test_what_somebody_has_to_mend_comes_first(monkeypatch):
    found = [None, {"error": "the disk", "final": False}, {"error": "no key", "final": True}]
    monkeypatch.setattr(processes, "exchange", lambda value: found)
    with (
        pytest.raises(ValueError, match=r"^process 2 of 3, testing: no key$"),
        processes.together("testing"),
    ):
        pass
