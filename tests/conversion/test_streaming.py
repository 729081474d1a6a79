"""Peak memory of a conversion, and what a killed one leaves behind. Each runs in a process of its own."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.conversion.conftest import BF16, Models, edit_json
from wemmu_jax.conversion.backbones import VLM
from wemmu_jax.conversion.convert import convert
from wemmu_jax.conversion.safetensors_io import Spec, write_file
from wemmu_jax.conversion.weights import Weights

MIB = 1 << 20

MEASURE = """
import sys
from wemmu_jax.conversion.convert import convert
from wemmu_jax.conversion.export import export_backbones
from wemmu_jax.models.qwen2_5_vl.prompt import PromptEncoder

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

vlm, sana, out = sys.argv[1:]
PromptEncoder.load(vlm)  # what a tokenizer takes has nothing to do with the weights
start = status("VmRSS")
convert(vlm, sana, out)
print(status("VmHWM") - start)
export_backbones(out, out + "-back")
print(status("VmHWM") - start)
"""

# Reads slowly enough to be killed at a chosen moment.
STALL = """
import sys, time
from wemmu_jax.conversion import convert, weights
from wemmu_jax.conversion.safetensors_io import Stored

def stalling(function, calls):
    left = iter(range(calls))
    def call(*args, **kwargs):
        if next(left, None) is None:
            print("now", flush=True)
            time.sleep(600)
        return function(*args, **kwargs)
    return call

vlm, sana, out, where = sys.argv[1:]
if where == "reading":
    Stored.read = stalling(Stored.read, 40)
elif where == "before the index":
    weights.write_text = stalling(weights.write_text, 0)
else:
    weights.write_text = stalling(weights.write_text, 1)
convert.convert(vlm, sana, out)
"""


def large_vlm(small: Models, folder, layers: int):
    """A Qwen2.5-VL folder of 13 MiB a layer whose file is itself written a tensor at a time."""
    shutil.copytree(small.vlm, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "layer_types": None}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    edit_json(
        folder / "config.json",
        lambda c: [
            c["text_config"].update(**sizes, **heads, rope_parameters=rope),
            c["vision_config"].update(out_hidden_size=512),
        ],
    )
    config = json.loads((folder / "config.json").read_text())
    entries = {n: e for e in VLM.rows(config, None).table for n in e.sources()}
    specs = {name: Spec(BF16, entry.shape) for name, entry in entries.items()}

    def values(name):
        yield np.full(specs[name].shape, sum(map(ord, name)) % 251, BF16)

    write_file(folder / "model.safetensors", specs, values, metadata={"format": "pt"})
    return folder


def measure(small: Models, root, layers: int) -> tuple[int, int, int]:
    """Peak memory above the start in bytes, of convert and of both ways; and the largest leaf."""
    vlm, out = large_vlm(small, root / f"vlm-{layers}", layers), root / f"out-{layers}"
    arguments = [sys.executable, "-c", MEASURE, str(vlm), str(small.sana), str(out)]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    largest = max(s.dtype.itemsize * s.size for s in Weights.open(out).specs.values())
    converting, both = map(int, output.split())
    return converting, both, largest


@pytest.mark.parametrize("layers", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_peak_memory(tied, tmp_path, layers):
    few = measure(tied, tmp_path, layers)
    many = measure(tied, tmp_path, 2 * layers)
    for converting, both, largest in (few, many):
        assert both <= 2.2 * largest + (512 << 20)
        # What streaming means: a few tensors of 4 MiB and a buffer, whatever the stack's size.
        assert converting <= both <= 60 * MIB
    assert many[2] == 2 * few[2] == 2 * layers * 4 * MIB
    assert abs(many[1] - few[1]) <= 20 * MIB


@pytest.mark.parametrize("where", ["reading", "before the index", "before wemmu.json"])
def test_killed_conversion_leaves_nothing_that_loads(tied, tmp_path, where):
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", STALL, str(tied.vlm), str(tied.sana), str(out), where]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith("out.partial-")
    assert list(leftover.rglob("*.safetensors"))
    for folder in (out, leftover):
        with pytest.raises((ValueError, FileNotFoundError)):
            Weights.open(folder)
    convert(str(tied.vlm), str(tied.sana), str(out))
    Weights.open(out).verify()
    assert list(tmp_path.iterdir()) == [out]
