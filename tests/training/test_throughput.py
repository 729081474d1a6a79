"""How speeds are counted, and what a profiled run leaves."""

import re
import types

import jax
import numpy as np
import pytest

from tests.training.conftest import watched
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.models.wemmu.config import BridgeConfig, Connector, Pathway, VAEStream
from wemmu_jax.models.wemmu.published import published_wemmu
from wemmu_jax.planning.chips import CHIPS, peak_flops
from wemmu_jax.planning.flops import Learns, sample_flops
from wemmu_jax.training import loop, throughput
from wemmu_jax.training.metrics import Progress
from wemmu_jax.training.profile import Profiler
from wemmu_jax.training.throughput import ASIDE, Stopwatch, Work, row_work

LEARNS = Learns(dit=False, branch=True)
GRID = 18 * 18  # tokens of a 512 x 512 picture
KIND = "TPU v5"


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved: `clock.now += seconds`."""
    hand = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: hand.now)
    return hand


def micro_batch(prompts: list[int], arity: int, dtype=np.uint8):
    """What is read of one: rows with prompts of so many tokens, padded to 2000."""
    valid = np.arange(2000) < np.array(prompts)[:, None]
    arrays = {"valid": valid, "target": np.zeros((len(prompts), 1), dtype)}
    return types.SimpleNamespace(arrays=arrays, bucket=Bucket(512, 512), arity=arity)


def test_speeds_and_where_the_time_goes(clock):
    stopwatch = Stopwatch(batch=16, start=4)
    clock.now += 100  # the first step compiles
    first = stopwatch.lap(5, Work(1000, 4.0))
    assert first["samples_per_second"] == pytest.approx(16 / 100)
    for step, pause in ((6, 0.0), (7, 50.0)):
        with stopwatch.timed("data"):
            clock.now += 1
        with stopwatch.timed(ASIDE):
            clock.now += pause
        with stopwatch.timed("device"):
            clock.now += 2
        clock.now += 1
        found = stopwatch.lap(step, Work(1000, 4.0))
        assert found == pytest.approx(
            {
                "step_seconds": 4.0,
                "data_seconds": 1.0,
                "device_seconds": 2.0,
                "steps_per_second": 0.25,
                "samples_per_second": 4.0,
                "tokens_per_second": 250.0,
                "model_teraflops_per_second": 1.0 / jax.device_count(),
            }
        )


def test_speeds_follow_the_last_laps(clock):
    stopwatch = Stopwatch(batch=1, start=0)
    for step in range(1, 2 * throughput.WINDOW + 2):
        clock.now += 10 if step <= throughput.WINDOW + 1 else 2
        found = stopwatch.lap(step, Work())
    assert found["steps_per_second"] == pytest.approx(0.5)
    # Every tenth step is reported, as where the tiny backbones are trained.
    clock.now += 20
    assert stopwatch.lap(step + 10, Work())["step_seconds"] == pytest.approx(2.0)


def test_steps_that_bring_a_shape_are_slow_by_compiling(clock):
    """Also those of the end of an epoch's shapes, hours later; the first steps stand alone until there is another."""
    stopwatch, speeds = Stopwatch(batch=1, start=0), []
    for step, (shape, seconds) in enumerate(
        [("a", 100), ("b", 50), ("a", 2), ("c", 90), ("b", 2), ("c", 5)], 1
    ):
        stopwatch.see(shape)
        clock.now += seconds
        found = stopwatch.lap(step, Work())
        assert found["step_seconds"] == seconds
        speeds.append(found["steps_per_second"])
    assert speeds == pytest.approx([1 / 100, 1 / 50, 1 / 2, 1 / 2, 1 / 2, 3 / 9])


def test_mfu_is_the_share_of_the_peak(clock, monkeypatch, tmp_path, capsys):
    devices = [types.SimpleNamespace(device_kind=KIND)] * 2
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    progress = Progress(tmp_path, steps=9, batch=16, start=0, writes=True)
    clock.now += 4
    with progress.stopwatch.timed("data"):
        clock.now += 1
    work = Work(tokens=10, teraflops=0.4 * 2 * 5 * CHIPS[KIND].peak / 1e12)
    progress.step(1, {"loss": 1.0, "gradient_norm": 1.0}, line=True, work=work)
    progress.close()
    assert re.search(r"3\.2 samples/s  MFU 40\.0%  data 20%  0:00:40 left", capsys.readouterr().out)


def test_peaks():
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H100 80GB HBM3")
    assert peak_flops("NVIDIA H200 NVL") < peak_flops("NVIDIA H200")
    assert peak_flops("cpu") is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_work_of_rows_without_their_padding():
    config = published_wemmu(BridgeConfig())
    found = row_work(config, LEARNS, micro_batch([40, 200], arity=0))
    assert found["tokens"].tolist() == [40 + GRID, 200 + GRID]
    for row, text in enumerate((40, 200)):
        expected = sample_flops(config, Bucket(512, 512), arity=0, text=text, learns=LEARNS)
        assert found["teraflops"][row] == pytest.approx(sum(expected.values()) / 1e12)


def test_work_of_sources_and_of_cached_latents():
    config = published_wemmu(BridgeConfig())
    prompt = 50 + 2 * GRID  # ViT and VAE tokens
    whole = row_work(config, LEARNS, micro_batch([prompt], arity=1))
    cached = row_work(config, LEARNS, micro_batch([prompt], arity=1, dtype=np.float16))
    parts = sample_flops(config, Bucket(512, 512), arity=1, text=50, learns=LEARNS)
    assert whole["tokens"].tolist() == [prompt + GRID]
    assert whole["teraflops"][0] == pytest.approx(sum(parts.values()) / 1e12)
    saved = whole["teraflops"][0] - cached["teraflops"][0]
    assert saved == pytest.approx(parts["DC-AE encode"] / 1e12, rel=1e-4)
    beside = published_wemmu(BridgeConfig(vae_stream=VAEStream.EXPERT))
    assert row_work(beside, LEARNS, micro_batch([50 + GRID], arity=1))["tokens"] == prompt + GRID


def test_tokens_that_no_layer_reads_are_not_counted():
    no_vae = BridgeConfig(vae_stream=VAEStream.EXPERT, connector=Connector.NONE)
    straight = BridgeConfig(pathway=Pathway.VIT, connector=Connector.NONE)
    for bridge, tokens in ((no_vae, 50 + 2 * GRID), (straight, GRID)):
        found = row_work(published_wemmu(bridge), LEARNS, micro_batch([50 + GRID], arity=1))
        assert found["tokens"] == tokens


def test_a_profiled_run_says_where_its_trace_lies(config_of, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(loop.train.__kwdefaults__, "profile", True)
    config = config_of("stage1", **{"batch.micro_batches": 1, "data.mixture.Rec": 0.0})
    watched(config, tmp_path / "run")
    [line] = [line for line in capsys.readouterr().out.splitlines() if "profile of" in line]
    assert line.startswith(f"profile of steps 4 to 6: {tmp_path / 'run/profile'};")
    [trace] = (tmp_path / "run/profile").rglob("*.trace.json.gz")
    assert trace.stat().st_size > 1000


def test_a_run_too_short_to_profile(tmp_path):
    assert Profiler(tmp_path, start=2, steps=6).last == 6
    with pytest.raises(ValueError, match=r"nothing to profile: 3 steps warm up, .* 3 to 6"):
        Profiler(tmp_path, start=3, steps=6)
