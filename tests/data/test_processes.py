"""Processes that work for another: they end with it, and are started again when they are killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image

from tests.data.conftest import write_json
from wemmu_jax.cli.main import main
from wemmu_jax.data import indexing
from wemmu_jax.data.formats import rows as rows_format
from wemmu_jax.data.processes import each

WORKERS = """
from tests.data.test_pipeline import batches
read = batches().iterate(0, workers=2, prefetch=2)
next(read)
"""
EACH = """
import time
from wemmu_jax.data.processes import each
done = each(time.sleep, [(0,), (60,), (60,)], 2)
next(done)
"""


def alive(session):
    """The processes of a session, but for those that nobody has fetched yet."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("work", [WORKERS, EACH], ids=["workers", "each"])
def test_processes_end_with_one_that_is_killed(work):
    command = [
        sys.executable,
        "-c",
        f"{work}\nprint('ready', flush=True)\nimport time\ntime.sleep(60)",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == b"ready\n"
        assert len(alive(process.pid)) >= 3
        process.kill()
        process.wait()
        ends = time.monotonic() + 10
        try:
            while alive(process.pid) and time.monotonic() < ends:
                time.sleep(0.1)
            assert alive(process.pid) == []
        finally:
            for left in alive(process.pid):
                os.kill(left, signal.SIGKILL)


def killed_once(folder, number):
    mark = folder / str(number)
    if number % 3 == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_what_a_killed_process_had_to_do_is_done_again(tmp_path):
    jobs = [(tmp_path, number) for number in range(6)]
    assert sorted(each(killed_once, jobs, 2)) == list(range(6))
    assert len(list(tmp_path.iterdir())) == 2


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_command_whose_processes_are_killed_over_and_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows_format, "CHUNK", 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": f"number {n}"} for n in range(2)]
    write_json(tmp_path / "captions.jsonl", rows, lines=True)
    spec = tmp_path / "sets.yaml"
    entry = {"name": "a", "tasks": ["T2I"], "type": "folder", "folder": str(tmp_path)}
    spec.write_text(yaml.safe_dump(entry))
    words = ["data", "index", str(spec), "--processes"]
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_build_part", killed)
        assert main([*words, "2"]) == 2
    assert "a: worker processes were killed 5 times" in capsys.readouterr().err
    assert main([*words, "0"]) == 0 and "a: 2 records" in capsys.readouterr().out
