"""`launch/local.sh` with real training: four stages on two processes, one of which is stopped on the way."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tests.training.conftest import config_of, converted  # noqa: F401 fixtures
from tests.training.members import (
    PATIENCE,
    ROOT,
    environment,
    free_port,
    metrics,
    train_words,
    wait_for,
)
from wemmu_jax.data.tasks import STAGE_TASKS, Task
from wemmu_jax.training.checkpoints import Checkpoints

STEPS = 12


@pytest.mark.slow
def test_four_stages_on_two_processes(config_of, tmp_path):  # noqa: F811
    changes = {f"data.mixture.{task.value}": 0.0 for task in STAGE_TASKS if task is not Task.T2I}
    changes |= {"optimizer.steps": STEPS, "batch.micro_batches": 1}
    words = train_words(config_of("stage1", **changes), tmp_path)
    overrides = [word for word in words if word.startswith("--config.")]
    # Stage 1 has none of these anyway.
    overrides += ["--config.data.mixture.S-Edit=0.0", "--config.data.mixture.M-Edit=0.0"]
    script = [
        str(ROOT / "launch/local.sh"),
        "2",
        "configs/tiny.py",
        words[words.index("--init") + 1],
        str(tmp_path),
    ]
    process = subprocess.Popen(
        [*script, *overrides],
        cwd=ROOT,
        env=environment(1) | {"WEMMU": f"{sys.executable} -m wemmu_jax", "PORT": str(free_port())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(tmp_path / "stage2/run_description.json", [process])
    os.kill(_pid_of(process.pid, "--workdir", str(tmp_path / "stage2")), signal.SIGTERM)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert "stopped with 75; starting again" in out
    for stage in ("stage1", "stage2", "stage3", "stage4"):
        assert Checkpoints(tmp_path / stage).latest == STEPS
        assert set(range(1, STEPS + 1)) <= set(metrics(tmp_path / stage))
        described = json.loads((tmp_path / stage / "run_description.json").read_text())
        assert "2 processes" in described["devices"]


def _pid_of(ancestor: int, *words: str) -> int:
    """A process below `ancestor` that was started with these words."""
    below, found = {ancestor}, []
    for entry in sorted(pathlib.Path("/proc").iterdir(), key=lambda path: path.name.zfill(9)):
        if entry.name.isdecimal() and (entry / "stat").exists():
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in below:
                below.add(int(entry.name))
                line = (entry / "cmdline").read_bytes().decode().split("\0")
                if set(words) <= set(line) and not line[0].endswith("sh"):
                    found.append(int(entry.name))
    return found[-1]
