"""The launch scripts, run against programs that play the cluster's part."""

import os
import pathlib
import shlex
import stat
import subprocess

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


# Saves for a while after SIGTERM, as training does; `ready` is there once it can be told.
SAVES = """trap 'sleep 0.3; echo "$JAX_PROCESS_ID" >>"$here/saved"; exit 75' TERM
echo >>"$here/ready"
while true; do sleep 0.05; done"""
