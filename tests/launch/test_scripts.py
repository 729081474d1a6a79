"""What all launch scripts have in common, and those of one machine; read by shellcheck, dry, and run."""

import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.launch.programs import (
    ROOT,
    SAVES,
    SCRIPTS,
    VARIABLES,
    WORDS,
    calls,
    command,
    fake,
    ran,
    words_of,
)


def test_shellcheck():
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    assert [script.stem for script in scripts] == sorted(SCRIPTS)
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    found = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert all(os.access(script, os.X_OK) for script in scripts)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_does_nothing(script, tmp_path):
    for name in ("wemmu", "gcloud", "kubectl", "srun", "scontrol"):
        fake(tmp_path, name, "exit 1")
    found = ran(script, tmp_path, "--dry-run", *words_of(script))
    assert found.returncode == 0 and found.stderr == "" and not calls(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "wemmu",
        "gcloud",
        "kubectl",
        "srun",
        "scontrol",
    }
    assert "configs/tiny.py" in found.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_said(script, tmp_path):
    few = ran(script, tmp_path, *words_of(script)[:-2])
    assert few.returncode == 2 and f"launch/{script}.sh" in few.stderr and not few.stdout
    for name in VARIABLES[script]:
        found = ran(script, tmp_path, *words_of(script), **{name: ""})
        assert found.returncode == 2 and f"{name}=" in found.stderr
    if script == "local":
        assert ran(script, tmp_path, "two", *WORDS).returncode == 2


# -- stages.sh


def test_stages_follow_each_other(tmp_path):
    fake(tmp_path, "wemmu", 'printf \'%s\\n\' "$@" >>"$here/words"')
    assert ran("stages", tmp_path, *WORDS).returncode == 0
    words = (tmp_path / "words").read_text().splitlines()
    stages = [words[i : i + 8] for i in range(0, len(words), 8)]
    inits = ["the weights", "runs/stage1", "runs/stage2", "runs/stage3"]
    for number, (init, found) in enumerate(zip(inits, stages, strict=True), 1):
        stage = f"stage{number}"
        expected = ["train", "--config", f"configs/tiny.py:{stage}", "--init", init]
        assert found == [*expected, "--workdir", f"runs/{stage}", WORDS[3]]
    dry = ran("stages", tmp_path, "--dry-run", *WORDS, WEMMU="python -m wemmu_jax").stdout
    lines = [shlex.split(line) for line in dry.splitlines()]
    assert [line[3:] for line in lines] == stages and lines[0][:3] == ["python", "-m", "wemmu_jax"]


def test_a_stage_that_fails_is_the_last(tmp_path):
    fake(tmp_path, "wemmu", '[ "$number" -lt 2 ] || exit 75')
    assert ran("stages", tmp_path, *WORDS).returncode == 75
    assert len(calls(tmp_path)) == 2


def stopped(script: str, folder: pathlib.Path, *words: str, ready: int) -> tuple[int, str]:
    """(exit code, stderr) of a script that gets SIGTERM once `ready` programs run."""
    process = subprocess.Popen(**command(script, folder, *words))
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if (folder / "ready").exists() and (folder / "ready").read_text().count("\n") == ready:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    return process.returncode, error


def test_sigterm_is_handed_on_and_waited_for(tmp_path):
    fake(tmp_path, "wemmu", SAVES)
    assert stopped("stages", tmp_path, *WORDS, ready=1)[0] == 75
    assert (tmp_path / "saved").exists() and len(calls(tmp_path)) == 1


# -- local.sh


def test_local_starts_every_process_and_starts_again(tmp_path):
    """Process 1 is stopped in stage 1, and dies in it the next time; then all goes well."""
    body = """echo "process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"
echo . >>"$here/tries$JAX_PROCESS_ID"
case $JAX_PROCESS_ID$(wc -l <"$here/tries$JAX_PROCESS_ID") in 11) exit 75 ;; 12) kill -9 $$ ;; esac"""
    fake(tmp_path, "wemmu", body)
    found = ran("local", tmp_path, *words_of("local"), PORT="1234")
    assert found.returncode == 0, found.stderr
    starts = re.findall(r"stopped with (\d+); starting again", found.stderr)
    assert starts == ["75", "137"]
    assert set(found.stdout.splitlines()) == {"process 0 of 2 at localhost:1234"}
    other = (tmp_path / "runs/process-1.log").read_text()
    assert other.count("process 1 of 2 at localhost:1234") == 6


@pytest.mark.parametrize(("told", "platform"), [("", "cuda"), ("cpu", "cpu")])
def test_local_asks_for_gpus_unless_told_otherwise(told, platform, tmp_path):
    fake(tmp_path, "wemmu", 'echo "$JAX_PLATFORMS"')
    found = ran("local", tmp_path, *words_of("local"), JAX_PLATFORMS=told)
    assert set(found.stdout.split()) == {platform}
    dry = ran("local", tmp_path, "--dry-run", *words_of("local"), JAX_PLATFORMS=told).stdout
    assert dry.count(f"JAX_PLATFORMS={platform} ") == 2 * 4


def test_local_speaks_into_a_socket_too(tmp_path):
    """As services are started; a socket cannot be opened by its name."""
    fake(tmp_path, "wemmu", "echo here")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        how = command("local", tmp_path, *words_of("local")) | {"stdout": theirs}
        process = subprocess.Popen(**how)
        assert process.wait(timeout=30) == 0, process.stderr.read()
        assert ours.recv(1000) == b"here\n" * 4


def test_local_does_not_repeat_an_error_and_gives_up(tmp_path):
    fake(tmp_path, "wemmu", "exit 2")
    assert ran("local", tmp_path, *words_of("local")).returncode == 2
    assert len(calls(tmp_path)) == 2
    fake(tmp_path, "wemmu", "exit 134")
    found = ran("local", tmp_path, *words_of("local"), RESTARTS="1")
    assert found.returncode == 134 and "gave up after 1 restarts" in found.stderr
    assert len(calls(tmp_path)) == 2 + 4


def test_local_stops_all(tmp_path):
    fake(tmp_path, "wemmu", SAVES)
    code, error = stopped("local", tmp_path, *words_of("local"), ready=2)
    assert code == 75 and "starting again" not in error
    assert sorted((tmp_path / "saved").read_text().split()) == ["0", "1"]
    assert len(calls(tmp_path)) == 2
