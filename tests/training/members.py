"""Real processes of `wemmu train`, as a pod has them: each with its own devices, all on this machine."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[2]
# Seconds after which a test gives up; the machine may be busy.
PATIENCE = 900


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """As `tests/conftest.py` and `quick()` set up this process, for another of `devices` devices."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": str(ROOT),
    }


def start(
    words: Sequence[Sequence[str]],
    *,
    devices: int,
    variables: Mapping[str, str] | None = None,
    unset: Sequence[str] = (),
) -> list[subprocess.Popen]:
    """A process of `wemmu` for each list of words, told of each other."""
    port = free_port()
    env = environment(devices) | dict(variables or {})
    flags = [f"--coordinator=localhost:{port}", f"--processes={len(words)}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "wemmu_jax", *own, *flags, f"--process={index}"],
            cwd=ROOT,
            env={name: value for name, value in env.items() if name not in unset},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, own in enumerate(words)
    ]


def ended(members: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each, once all have ended; without what Gloo says of its ranks."""
    found = []
    try:
        for member in members:
            out, error = member.communicate(timeout=PATIENCE)
            lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
            found.append((member.returncode, "\n".join(lines), error))
    finally:
        for member in members:
            member.kill()
    return found


def train_words(config, workdir: pathlib.Path, **changes) -> list[str]:
    """`wemmu train` with a config of `config_of`, whose difference to the file's is given key by key."""
    from wemmu_jax.training.checkpoints import differences
    from wemmu_jax.training.curriculum import load_config

    stage = config.name.split()[-1]
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    base = json.loads(load_config(f"configs/tiny.py:{stage}").to_json())
    keys = [line.split(":")[0] for line in differences(base, json.loads(config.to_json()))]
    values = {key: _text(config, key) for key in keys if key != "init"}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    common = ["train", "--config", f"configs/tiny.py:{stage}", "--workdir", str(workdir)]
    return [*common, "--init", config.init, *overrides]


def _text(config, key: str) -> str:
    for part in key.split("."):
        config = config[part]
    return config if isinstance(config, str) else json.dumps(config)


def metrics(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """Step -> what the run wrote about it; a line that is being written is left out."""
    path, found = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.setdefault(row["step"], {}).update(row)
    return found


def wait_for(file: pathlib.Path, members: Sequence[subprocess.Popen]) -> None:
    """Returns once a run has written `file`, or a process has ended."""
    until = time.monotonic() + PATIENCE
    while not file.exists() and all(member.poll() is None for member in members):
        assert time.monotonic() < until
        time.sleep(0.05)
