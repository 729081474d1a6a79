"""The launch scripts of Slurm, TPU queued resources and GKE, run against programs that play their part."""

import os
import shlex
import signal
import subprocess
import time

import pytest

from tests.launch.jobset import check_jobset, load_yaml
from tests.launch.programs import (
    SAVES,
    WORDS,
    calls,
    command,
    fake,
    ran,
)

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
