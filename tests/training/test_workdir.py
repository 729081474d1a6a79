"""What a run refuses to start in, and to start from; nothing is changed by a run that was refused."""

import contextlib
import errno
import functools
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import pytest
from orbax.checkpoint._src.multihost import multihost
from orbax.checkpoint.experimental.v1._src.synchronization import multihost as v1_multihost

from tests.training.conftest import last_state, write_converted
from tests.training.test_resume import assert_same_bits
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.tasks import Task
from wemmu_jax.files import read_object, write_json
from wemmu_jax.miniworld.sources import MiniworldSource
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.training import checkpoints, run
from wemmu_jax.training.checkpoints import Checkpoints, differences, only_run
from wemmu_jax.training.loop import train
from wemmu_jax.training.origin import Origin
from wemmu_jax.training.run import prepare

EMA = {"optimizer.ema": 0.9}


def tree_of(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def refused(config, workdir, error, match) -> str:
    """Expects `train` to refuse, and all files to be as they were."""
    before = tree_of(workdir) if workdir.is_dir() else None
    with pytest.raises(error, match=match) as raised:
        train(config, workdir)
    assert (tree_of(workdir) if workdir.is_dir() else None) == before
    return str(raised.value)


@pytest.fixture
def copy_of_stage1(stage1, tmp_path):
    """A workdir to be damaged."""
    return pathlib.Path(shutil.copytree(stage1[1], tmp_path / "copy"))


def test_a_workdir_of_another_config(stage1, config_of):
    config = config_of("stage1", **EMA, **{"optimizer.learning_rate": 0.5, "seed": 7})
    text = refused(config, stage1[1], ValueError, "belongs to another config")
    assert "optimizer.learning_rate: 0.004 there, 0.5 here" in text
    assert "seed: 1 there, 7 here" in text
    assert text.count(" there, ") == 2


def test_what_changes_no_sample_may_change(copy_of_stage1, stage1, config_of, monkeypatch, capsys):
    """As when fewer chips are to be had than before."""
    before = last_state(stage1[0], copy_of_stage1)
    devices = jax.devices()[:2]
    monkeypatch.setattr(run, "make_mesh", functools.partial(make_mesh, devices=devices))
    changes = {
        "mesh.fsdp": 2,
        "data.workers": 1,
        "data.threads": 1,
        "model.attention": "xla",
        "model.remat": "none",
        "every.log": 3,
        "keep_checkpoints": 2,
    }
    config = config_of("stage1", **EMA, **changes)
    train(config, copy_of_stage1)
    said = capsys.readouterr().err
    assert f"{copy_of_stage1} goes on with another config" in said
    assert "mesh.fsdp: 1 there, 2 here" in said and "numbers differ by rounding" in said
    assert said.count(" there, ") == len(changes)
    assert read_object(copy_of_stage1 / "config.json") == json.loads(config.to_json())
    assert_same_bits(before, last_state(stage1[0], copy_of_stage1))
    train(config, copy_of_stage1)
    assert " there, " not in capsys.readouterr().err


def test_data_that_hold_other_records_by_now(copy_of_stage1, config_of):
    file = copy_of_stage1 / "run.json"
    begun = read_object(file)
    assert len(begun["data"]) > 2 and all(" records, " in one for one in begun["data"].values())
    write_json(file, {**begun, "data": {**begun["data"], "1": "photos: 3 records, abc"}})
    config = config_of("stage1", **EMA)
    # A run that is finished draws nothing any more.
    train(config, copy_of_stage1)
    last = copy_of_stage1 / "checkpoints/6"
    last.rename(last.with_name("5"))
    text = refused(config, copy_of_stage1, ValueError, "held other records when the run began")
    last.with_name("5").rename(last)
    assert "1: 'photos: 3 records, abc' there, " in text and text.count(" there, ") == 1
    assert f"--init {copy_of_stage1}" in text and f"take data out of {file}" in text
    # As the run of an earlier version, and whoever did as the message says.
    write_json(file, {key: value for key, value in begun.items() if key != "data"})
    train(config, copy_of_stage1)
    assert read_object(file) == begun


def test_a_data_set_with_a_dot_in_its_name_is_compared_too():
    def sets(size):
        source = MiniworldSource("caption", seed=0, size=size, split="train")
        data = types.SimpleNamespace(feeds=[Feed("cc12m.v2", Task.T2I, source)])
        return run.data_identities(types.SimpleNamespace(data=data, held_out=None))

    [line] = differences(sets(3), sets(4))
    assert "cc12m.v2: 3 records" in line and "cc12m.v2: 4 records" in line


def test_a_folder_in_other_use(config_of, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    refused(config_of("stage1"), tmp_path, ValueError, "is not empty and is no workdir")
    refused(config_of("stage1"), tmp_path / "photo.jpg", ValueError, "is a file")


def test_a_workdir_that_was_killed_while_it_was_claimed(tmp_path, config_of, converted):
    from wemmu_jax.training.checkpoints import check_workdir

    (tmp_path / "run.json").write_text("{}")
    check_workdir(tmp_path, config_of("stage1"))


def test_no_weights(config_of, tmp_path):
    workdir = tmp_path / "run"
    config = config_of("stage1")
    config.init = ""
    refused(config, workdir, FileNotFoundError, "no weights to start from: give --init")
    refused(
        config_of("stage1", tmp_path / "nowhere"), workdir, FileNotFoundError, "is not a folder"
    )
    (tmp_path / "empty").mkdir()
    refused(
        config_of("stage1", tmp_path / "empty"),
        workdir,
        FileNotFoundError,
        "neither a converted folder",
    )
    (tmp_path / "begun").mkdir()
    begun = {"init": "", "init_step": None, "fingerprint": "", "bridge": {}}
    (tmp_path / "begun/run.json").write_text(json.dumps(begun))
    refused(
        config_of("stage2", tmp_path / "begun"),
        workdir,
        FileNotFoundError,
        "no finished checkpoint",
    )
    (tmp_path / "begun/run.json").write_text('{"init": ""}')
    refused(
        config_of("stage2", tmp_path / "begun"),
        workdir,
        ValueError,
        "an object without init_step, fingerprint, bridge",
    )
    assert not workdir.exists()


def test_weights_that_disagree_with_their_configs(converted, config_of, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(converted, folder)
    path = folder / "vlm/config.json"
    hf = json.loads(path.read_text())
    path.write_text(json.dumps({**hf, "intermediate_size": hf["intermediate_size"] + 8}))
    message = r"vlm/text/layers/mlp/down_proj/kernel: the configs imply \(.*\), the weights have"
    workdir = tmp_path / "run"
    refused(config_of("stage1", folder), workdir, ValueError, message)
    assert not workdir.exists()


def test_a_stage_whose_leaves_were_all_replaced_is_not_read(stage2, monkeypatch):
    """Stage 2 trains all that stage 1 did, and at the real size each of them is 18 GB."""
    read = []
    params = Checkpoints.params
    monkeypatch.setattr(
        Checkpoints, "params", lambda self, *a: read.append(self._folder) or params(self, *a)
    )
    Origin(stage2[1]).trained()
    assert [folder.parent.name for folder in read] == ["stage2"]


def test_another_bridge_than_the_stage_before(stage1, config_of, tmp_path):
    config = config_of("stage2", stage1[1], **{"model.bridge.vae_stream": "expert"})
    text = refused(config, tmp_path / "run", ValueError, "was trained with another bridge")
    assert "vae_stream: 'frozen' there, 'expert' here" in text and text.count(" there, ") == 1


def test_a_run_of_an_earlier_version_had_the_defaults_of_what_it_does_not_say(copy_of_stage1):
    file = copy_of_stage1 / "run.json"
    run = read_object(file)
    del run["bridge"]["noise_scale"]
    write_json(file, run)
    assert Origin(copy_of_stage1).bridge == {**run["bridge"], "noise_scale": 1.0}


@pytest.mark.parametrize(
    "lost", ["params/manifest.ocdbt", "params/d", "optimizer", "params/_METADATA"]
)
def test_half_a_checkpoint(lost, copy_of_stage1, config_of):
    target = copy_of_stage1 / "checkpoints/6" / lost
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    text = refused(
        config_of("stage1", **EMA), copy_of_stage1, ValueError, "checkpoint .*/6 is not whole"
    )
    assert lost.split("/")[0] in text and "remove the folder" in text


def test_a_checkpoint_that_is_damaged(copy_of_stage1, config_of):
    for file in (copy_of_stage1 / "checkpoints/6/params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(config_of("stage1", **EMA), copy_of_stage1, ValueError, "checkpoint .*/6 is ")


def test_a_checkpoint_of_another_optimizer(copy_of_stage1, config_of):
    """As a version leaves it whose config says the same and whose optimizer keeps other things."""
    config = config_of("stage1", **EMA, **{"optimizer.method": "adamw"})
    file = copy_of_stage1 / "config.json"
    kept = json.loads(file.read_text())
    kept["optimizer"]["method"] = "adamw"
    file.write_text(json.dumps(kept))
    refused(config, copy_of_stage1, ValueError, "checkpoint .*/6 is of another version")


def test_storage_that_fails_for_the_moment_damages_no_checkpoint(copy_of_stage1, monkeypatch):
    def away(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints.ocp, "load_checkpointables", away)
    with pytest.raises(OSError, match="Input/output error"):
        Checkpoints(copy_of_stage1).params(6)


def test_a_checkpoint_that_was_never_finished_is_passed_over(copy_of_stage1):
    """As a kill leaves it: under Orbax's temporary name."""
    newest = copy_of_stage1 / "checkpoints/6"
    newest.rename(newest.with_name("6.orbax-checkpoint-tmp"))
    assert Checkpoints(copy_of_stage1).latest is None
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        Origin(copy_of_stage1)


def test_other_backbones_than_those_trained_on(stage1, config_of, tmp_path):
    other = write_converted(tmp_path, seed=1)
    copy = pathlib.Path(shutil.copytree(stage1[1], tmp_path / "stage1"))
    run = json.loads((copy / "run.json").read_text())
    config = json.loads((copy / "config.json").read_text())
    (copy / "run.json").write_text(json.dumps({**run, "init": str(other)}))
    with pytest.raises(ValueError, match=r"was trained on weights .* holds"):
        Origin(copy)
    # The same to resume: the folder that the run started from holds other weights by now.
    (copy / "run.json").write_text(json.dumps({**run, "init": str(other)}))
    (copy / "config.json").write_text(json.dumps({**config, "init": str(other)}))
    text = refused(
        config_of("stage1", other, **EMA), copy, ValueError, "started from other weights"
    )
    assert "fingerprint" in text


def test_the_stage_before_has_moved_on(stage1, stage2, config_of, tmp_path):
    """A resumed run, and its weights, go back to the checkpoint that the run started from."""
    first = pathlib.Path(shutil.copytree(stage1[1], tmp_path / "stage1"))
    second = pathlib.Path(shutil.copytree(stage2[1], tmp_path / "stage2"))
    run = json.loads((second / "run.json").read_text())
    assert run["init_step"] == 6
    (second / "run.json").write_text(json.dumps({**run, "init": str(first)}))
    (first / "checkpoints/6").rename(first / "checkpoints/9")
    with pytest.raises(FileNotFoundError, match="has no checkpoint 6 any more"):
        Origin(second)


def test_a_run_goes_on_from_where_it_began_though_the_stage_before_has_moved_on(
    stage1, stage2, config_of, tmp_path
):
    first = pathlib.Path(shutil.copytree(stage1[1], tmp_path / "stage1"))
    second = pathlib.Path(shutil.copytree(stage2[1], tmp_path / "stage2"))
    for name in ("run.json", "config.json"):
        told = json.loads((second / name).read_text())
        (second / name).write_text(json.dumps({**told, "init": str(first)}))
    shutil.copytree(first / "checkpoints/6", first / "checkpoints/9")
    assert Origin(first).step == 9
    train(config_of("stage2", first, **{"data.bad_share": 0.5}), second)  # which changes no sample


def test_no_process_waits_in_orbax_while_another_may_fail(stage1, config_of, monkeypatch):
    """One that failed tells so in `exchange`, where no other would ever come from a barrier of Orbax."""
    checking, checked, waits = [], [], []

    @contextlib.contextmanager
    def together(what):
        checking.append(what)
        yield
        checking.clear()

    def spied(module):
        sync = module.sync_global_processes
        return lambda *a, **k: waits.append(bool(checking)) or sync(*a, **k)

    monkeypatch.setattr(run, "together", together)
    monkeypatch.setattr(multihost, "sync_global_processes", spied(multihost))
    monkeypatch.setattr(v1_multihost, "sync_global_processes", spied(v1_multihost))
    prepare_data = run.prepare_data
    monkeypatch.setattr(
        run, "prepare_data", lambda *a: checked.extend(checking) or prepare_data(*a)
    )
    prepare(config_of("stage2", stage1[1]))
    assert checked == ["preparing the run"]
    assert waits and not any(waits)


def test_two_runs_in_one_workdir(copy_of_stage1, stage1, config_of):
    config = config_of("stage1", **EMA)
    with only_run(copy_of_stage1):
        refused(config, copy_of_stage1, ValueError, "another run is at work here")
    with only_run(copy_of_stage1):
        pass
    # The lock of a process that was killed is gone with it.
    code = (
        "import os, pathlib, signal, sys; from wemmu_jax.training.checkpoints import only_run\n"
        "with only_run(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(copy_of_stage1)], check=False)
    assert killed.returncode == -9
    with only_run(copy_of_stage1):
        pass
    assert int(last_state(stage1[0], copy_of_stage1).step) == 6


def test_sizes_that_the_devices_do_not_divide(config_of, monkeypatch):
    """With the mesh that a run really makes: all devices."""
    monkeypatch.setattr(run, "make_mesh", make_mesh)
    with pytest.raises(
        ValueError, match=r"batch.rows=12 does not divide over 8 devices.*\[8, 16\]"
    ):
        prepare(config_of("stage1", **{"batch.rows": 12}))
    with pytest.raises(
        ValueError, match=r"validation_rows=4 does not divide over 8 devices.*\[8\]"
    ):
        prepare(config_of("stage1", validation_rows=4))
