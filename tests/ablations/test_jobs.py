"""Jobs on real processes: order, resume, what goes wrong, and SIGTERM."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from wemmu_jax.ablations.jobs import Job, JobFailed, Ledger, run_jobs


def write(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text + "\n")


def fail(text: str) -> None:
    raise ValueError(text)


def die() -> None:
    os._exit(3)


def sleep(path: str) -> None:
    write(path, "begun")
    time.sleep(60)
    write(path, "never")


def silent(_: str) -> None: ...


def noted(tmp_path, name, *needs):
    return Job(name, needs, write, {"path": str(tmp_path / "log"), "text": name})


def lines(tmp_path) -> list[str]:
    file = tmp_path / "log"
    return file.read_text().split() if file.exists() else []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_comes_after_what_it_needs_and_is_done_once(tmp_path, processes):
    jobs = [
        noted(tmp_path, "last", "left", "right"),
        noted(tmp_path, "left", "first"),
        noted(tmp_path, "right", "first"),
        noted(tmp_path, "first"),
    ]
    ledger = Ledger(tmp_path / "jobs")
    run_jobs(jobs, ledger, processes=processes, say=silent)
    found = lines(tmp_path)
    assert found[0] == "first" and found[-1] == "last" and sorted(found[1:3]) == ["left", "right"]
    assert all(ledger.seconds(job.name) is not None for job in jobs)
    run_jobs(jobs, ledger, processes=processes, say=silent)
    assert len(lines(tmp_path)) == 4


def test_a_failure_is_named_and_the_rest_can_be_done_later(tmp_path):
    ledger = Ledger(tmp_path / "jobs")
    first, last = noted(tmp_path, "first"), noted(tmp_path, "last", "bad")
    bad = Job("bad", ("first",), fail, {"text": "no such luck"})
    with pytest.raises(JobFailed, match=r"(?s)^bad: .*ValueError: no such luck"):
        run_jobs([first, bad, last], ledger, processes=1, say=silent)
    assert lines(tmp_path) == ["first"] and ledger.seconds("bad") is None
    mended = noted(tmp_path, "bad", "first")
    run_jobs([first, mended, last], ledger, processes=1, say=silent)
    assert lines(tmp_path) == ["first", "bad", "last"]


def test_what_was_made_from_something_else_is_not_taken_for_done(tmp_path):
    ledger, job = Ledger(tmp_path / "jobs"), noted(tmp_path, "one")
    run_jobs([job], ledger, processes=1, say=silent)
    other = dataclasses.replace(job, made_from="other backbones")
    with pytest.raises(ValueError, match=r"one\.json: it is done, but with another"):
        run_jobs([noted(tmp_path, "two"), other], ledger, processes=1, say=silent)
    assert lines(tmp_path) == ["one"]


def test_a_process_that_dies_is_a_failure(tmp_path):
    with pytest.raises(JobFailed, match="died with exit code 3"):
        run_jobs([Job("dead", (), die, {})], Ledger(tmp_path), processes=1, say=silent)


def test_a_need_that_is_nobodys_job_is_named(tmp_path):
    with pytest.raises(ValueError, match="nobody's job: elsewhere"):
        run_jobs([noted(tmp_path, "one", "elsewhere")], Ledger(tmp_path), processes=1, say=silent)


def test_sigterm_ends_what_runs_and_notes_nothing(tmp_path):
    program = (
        "import pathlib, sys\n"
        "from tests.ablations.test_jobs import *\n"
        "if __name__ == '__main__':\n"
        f"    job = Job('long', (), sleep, dict(path={str(tmp_path / 'log')!r}))\n"
        f"    run_jobs([job], Ledger(pathlib.Path({str(tmp_path / 'jobs')!r})), processes=1, say=print)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while lines(tmp_path) != ["begun"]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "InterruptedError" in errors and process.returncode != 0
    assert lines(tmp_path) == ["begun"] and not (tmp_path / "jobs").exists()
