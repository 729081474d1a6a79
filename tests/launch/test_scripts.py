"""The launch scripts: read by shellcheck, dry, and run against programs that play the cluster's part."""

import os
import pathlib
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest

from tests.launch.jobset import check_jobset, load_yaml

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ("stages", "local", "slurm", "tpu", "gke")
WORDS = ("configs/tiny.py", "the weights", "runs", '--config.data.sources=[{"name": "it\'s"}]')
VARIABLES = {
    "local": {},
    "stages": {"JAX_PLATFORMS": "cpu"},
    "slurm": {},
    "tpu": {"NAME": "w", "ZONE": "z", "TYPE": "v5p-256", "SETUP": "cd /repo"},
    "gke": {
        "NAME": "w",
        "IMAGE": "image:1",
        "ACCELERATOR": "tpu-v5p-slice",
        "TOPOLOGY": "4x4x8",
        "CLAIM": "c",
    },
}


def words_of(script: str) -> tuple[str, ...]:
    return ("2", *WORDS) if script == "local" else WORDS


def fake(folder: pathlib.Path, name: str, body: str) -> None:
    """A program that notes how it was called, in `calls`, and then does `body`."""
    path = folder / name
    path.write_text(
        f'#!/usr/bin/env bash\nhere={shlex.quote(str(folder))}\necho "{name} $*" >>"$here/calls"\n'
        f"number=$(grep -c '^{name} ' \"$here/calls\")\n{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def calls(folder: pathlib.Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def command(script: str, folder: pathlib.Path, *words: str, **variables: str) -> dict:
    """What `subprocess` needs to run a script with the programs of `folder`."""
    path = f"{folder}:{os.environ['PATH']}"
    known = {"PATH": path, "HOME": str(folder), "POLL": "0.01", **VARIABLES[script], **variables}
    return {
        "args": [str(ROOT / f"launch/{script}.sh"), *words],
        "cwd": folder,
        "env": {key: value for key, value in known.items() if value},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def ran(script: str, folder: pathlib.Path, *words: str, **variables: str):
    return subprocess.run(**command(script, folder, *words, **variables), timeout=60, check=False)


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


# Saves for a while after SIGTERM, as training does; `ready` is there once it can be told.
SAVES = """trap 'sleep 0.3; echo "$JAX_PROCESS_ID" >>"$here/saved"; exit 75' TERM
echo >>"$here/ready"
while true; do sleep 0.05; done"""


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


# -- slurm.sh


@pytest.mark.parametrize(
    ("code", "restarts", "queued"),
    [(0, "0", False), (2, "0", False), (75, "0", True), (134, "3", True), (75, "20", False)],
)
def test_slurm_is_queued_again(code, restarts, queued, tmp_path):
    fake(tmp_path, "srun", f'echo "$JAX_PLATFORMS"; exit {code}')
    fake(tmp_path, "scontrol", "")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts, "SLURM_SUBMIT_DIR": "/repo"}
    found = ran("slurm", tmp_path, *WORDS, **slurm)
    assert found.returncode == (0 if queued else code) and found.stdout == "cuda\n"
    first, *rest = calls(tmp_path)
    assert first.startswith("srun --kill-on-bad-exit=1 /repo/launch/stages.sh configs/tiny.py the")
    assert rest == (["scontrol requeue 7"] if queued else [])


@pytest.mark.parametrize(("who", "mended"), [("task 3", True), ("tasks 0-2", True), ("", False)])
def test_slurm_is_not_queued_again_for_an_error_of_some(who, mended, tmp_path):
    """Those that waited for the one with the error are killed, and srun ends with the highest code of all."""
    told = f"echo 'srun: error: n1: {who}: Exited with exit code 2' >&2" if who else "true"
    fake(tmp_path, "srun", f"echo said; {told}; echo 'exit code 2' >&2; exit 137")
    fake(tmp_path, "scontrol", "")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0", "SLURM_SUBMIT_DIR": "/repo"}
    found = ran("slurm", tmp_path, *WORDS, **slurm)
    assert found.returncode == (2 if mended else 0) and found.stdout == "said\n"
    assert found.stderr.endswith("exit code 2\n")
    assert ("scontrol requeue 7" in calls(tmp_path)) is not mended


def test_slurm_waits_for_what_it_stops(tmp_path):
    fake(tmp_path, "srun", SAVES.replace("exit 75", "echo bye >&2; exit 2"))
    how = command("slurm", tmp_path, *WORDS, SLURM_SUBMIT_DIR="/repo")
    process = subprocess.Popen(**how, start_new_session=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2 and error.endswith("bye\n") and (tmp_path / "saved").exists()


def test_slurm_asks_for_a_process_on_each_gpu(tmp_path):
    lines = ran("slurm", tmp_path, "--dry-run", *WORDS).stdout.splitlines()
    flags = dict(
        line.split()[1].split("=")
        for line in lines
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert flags["--ntasks-per-node"] == flags["--gpus-per-node"]
    assert flags["--signal"].startswith("TERM@") and "#SBATCH --requeue" in lines


# -- tpu.sh


def looks(*states: str) -> str:
    """What `describe` says one time after the other, as gcloud does: an error is one word, and its code 1."""
    return f"""describe)
  echo . >>"$here/looks"
  states=({" ".join(states)})
  state=${{states[$(wc -l <"$here/looks") - 1]}}
  case $state in
    NOT_FOUND | UNAUTHENTICATED) echo "ERROR: (gcloud) $state: w" >&2; exit 1 ;;
    *) echo "$state" ;;
  esac ;;"""


def test_tpu_asks_again_after_a_preemption(tmp_path):
    """Suspended, deleted, created, waited for; trained on until preempted; and the same once more, to the end."""
    states = [
        "SUSPENDED",
        "NOT_FOUND",
        "WAITING_FOR_RESOURCES",
        "ACTIVE",
        "FAILED",
        "NOT_FOUND",
        "ACTIVE",
    ]
    body = f"""case $4 in
{looks(*states)}
ssh)
  echo . >>"$here/trained"
  if [ "$(wc -l <"$here/trained")" -eq 1 ]; then echo "wemmu ended with 75"; echo "wemmu ended with 134"
  else echo "wemmu ended with 0"; fi ;;
esac"""
    fake(tmp_path, "gcloud", body)
    found = ran("tpu", tmp_path, *WORDS)
    assert found.returncode == 0, found.stderr
    did = [call.split()[4] for call in calls(tmp_path)]
    once = ["describe", "delete", "describe", "create", "describe"]
    assert did == [*once, "describe", "ssh", *once, "ssh", "delete"]
    assert "stopped (134 75 ); going on" in found.stderr


def test_tpu_that_fails_and_fails(tmp_path):
    """The fifth stays, for somebody to look at."""
    states = [*["NOT_FOUND", "FAILED"] * 4, "NOT_FOUND", "WAITING_FOR_RESOURCES", "FAILED"]
    fake(tmp_path, "gcloud", f"case $4 in {looks(*states, 'FAILED')} esac")
    found = ran("tpu", tmp_path, *WORDS)
    assert found.returncode == 1 and "w failed five times and is still there" in found.stderr
    did = [call.split()[4] for call in calls(tmp_path)]
    again = ["describe", "create", "describe", "delete"]
    assert did == [*again * 4, "describe", "create", *["describe"] * 3]


def test_tpu_that_gives_no_answer_may_be_there(tmp_path):
    """A second one cannot be made beside it, and the run goes on when the login is renewed."""
    states = ["ACTIVE", "UNAUTHENTICATED", "UNAUTHENTICATED", "ACTIVE"]
    body = f"""case $4 in
{looks(*states)}
create) exit 1 ;;
ssh) echo "wemmu ended with $([ -e "$here/again" ] && echo 0 || echo 75)"; touch "$here/again" ;;
esac"""
    fake(tmp_path, "gcloud", body)
    found = ran("tpu", tmp_path, *WORDS)
    assert found.returncode == 0, found.stderr
    did = [call.split()[4] for call in calls(tmp_path)]
    assert did == ["describe", "ssh", "describe", "describe", "describe", "ssh", "delete"]
    assert found.stderr.count("UNAUTHENTICATED: w\ntpu.sh: no word of w; asking again") == 2


def test_tpu_where_gcloud_does_not_work(tmp_path):
    fake(tmp_path, "gcloud", f"case $4 in {looks('UNAUTHENTICATED')} esac")
    found = ran("tpu", tmp_path, *WORDS)
    assert found.returncode == 1 and "UNAUTHENTICATED" in found.stderr
    assert [call.split()[4] for call in calls(tmp_path)] == ["describe"]


def test_tpu_that_was_made_though_it_failed(tmp_path):
    body = f"""case $4 in
{looks("NOT_FOUND", "ACTIVE")}
create) exit 1 ;;
ssh) echo "wemmu ended with 0" ;;
delete) [ "$(grep -c delete "$here/calls")" -gt 2 ] ;;
esac"""
    fake(tmp_path, "gcloud", body)
    assert ran("tpu", tmp_path, *WORDS).returncode == 0
    did = [call.split()[4] for call in calls(tmp_path)]
    assert did == ["describe", "create", "describe", "ssh", *["delete"] * 3]


def test_tpu_that_cannot_be_made(tmp_path):
    fake(tmp_path, "gcloud", f"case $4 in {looks(*['NOT_FOUND'] * 9)} create) exit 1 ;; esac")
    found = ran("tpu", tmp_path, *WORDS)
    assert found.returncode == 1 and "gave up; w cannot be made" in found.stderr
    assert [call.split()[4] for call in calls(tmp_path)] == ["describe", "create"] * 5


def test_tpu_stops_at_an_error(tmp_path):
    fake(
        tmp_path,
        "gcloud",
        'case $4 in describe) echo ACTIVE ;; ssh) echo "wemmu ended with 2" ;; esac',
    )
    found = ran("tpu", tmp_path, *WORDS)
    assert found.returncode == 2 and "w is still there" in found.stderr
    assert [call.split()[4] for call in calls(tmp_path)] == ["describe", "ssh"]


def test_tpu_commands(tmp_path):
    dry = ran("tpu", tmp_path, "--dry-run", *WORDS, SLICES="2", SPOT="1").stdout
    create, describe, train, delete = map(shlex.split, dry.splitlines())
    for line in (create, describe, train, delete):
        assert line[:4] == ["gcloud", "compute", "tpus", "queued-resources"]
        assert line[5] == "w" and "--zone=z" in line
    assert {
        "--node-count=2",
        "--node-prefix=w",
        "--spot",
        "--runtime-version=v2-alpha-tpuv5",
    } <= set(create)
    assert {"--node=all", "--worker=all", "--batch-size=all"} <= set(train)
    [remote] = [word.removeprefix("--command=") for word in train if word.startswith("--command=")]
    # What the host's shell will make of it.
    body = (
        'shift 2; printf "%s\\n" "$JAX_PLATFORMS" "$WEMMU_JOIN_TIMEOUT" "$@" >"$here/host"; exit 75'
    )
    fake(tmp_path, "flock", body)
    remote = remote.replace("cd /repo", "true")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    host = subprocess.run(["bash", "-c", remote], env=env, capture_output=True, text=True)
    assert host.stdout == "wemmu ended with 75\n"
    expected = ["tpu", "1800", "/tmp/wemmu.lock", "launch/stages.sh", *WORDS]
    assert (tmp_path / "host").read_text().splitlines() == expected


def test_tpu_of_no_known_kind(tmp_path):
    found = ran("tpu", tmp_path, *WORDS, TYPE="tpu7x-16")
    assert found.returncode == 2 and "expected v4-N, v5p-N" in found.stderr


# -- gke.sh


@pytest.mark.parametrize(
    ("topology", "slices", "hosts", "spot"),
    [("4x4x8", "1", 32, "1"), ("16x16", "2", 64, ""), ("2x2x1", "1", 1, "")],
)
def test_gke_job_set(topology, slices, hosts, spot, tmp_path):
    fake(tmp_path, "kubectl", 'cat >"$here/applied"')
    how = {"TOPOLOGY": topology, "SLICES": slices, "SPOT": spot}
    assert ran("gke", tmp_path, *WORDS, **how).returncode == 0
    assert calls(tmp_path) == ["kubectl apply -f -"]
    dry = ran("gke", tmp_path, "--dry-run", *WORDS, **how).stdout
    assert dry == "# kubectl apply -f -\n" + (tmp_path / "applied").read_text()
    pods, pod = check_jobset(load_yaml(dry))
    assert pods == (int(slices), hosts)
    [container] = pod["containers"]
    assert container["command"] == ["launch/stages.sh", *WORDS]
    assert {one["name"]: one["value"] for one in container["env"]} == {
        "JAX_PLATFORMS": "tpu",
        "WEMMU_JOIN_TIMEOUT": "1800",
    }
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": topology,
        **({"cloud.google.com/gke-spot": "true"} if spot else {}),
    }


@pytest.mark.parametrize("topology", ["v5p-256", "3x3", "4"])
def test_gke_topology_that_is_none(topology, tmp_path):
    found = ran("gke", tmp_path, "--dry-run", *WORDS, TOPOLOGY=topology)
    assert found.returncode == 2 and f"TOPOLOGY={topology}; expected chips" in found.stderr
    assert not found.stdout
