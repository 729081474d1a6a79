"""Storage that fails while a checkpoint is read or written."""

import contextlib
import errno
import os
import pathlib
import resource
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from wemmu_jax.training import checkpoints
from wemmu_jax.training.checkpoints import Checkpoints
from wemmu_jax.training.state import TrainState


def state_of(step: int) -> TrainState:
    """A state of two megabytes, other values for every step."""
    values = np.random.default_rng(step).random((2, 300_000)).astype(np.float32)
    params, moments = ({"a": jax.numpy.array(row)} for row in values)
    return TrainState(step=jax.numpy.int32(step), params=params, opt_state=moments, ema=None)


@pytest.fixture
def written(tmp_path) -> Checkpoints:
    """A checkpoint of step 1, to be read."""
    writer = Checkpoints(tmp_path, keep=2)
    writer.save(state_of(1))
    writer.close()
    return Checkpoints(tmp_path)


def fail(monkeypatch, cause: Exception) -> None:
    """Has Orbax fail to read, for this reason, and tell so as it does."""

    def load(*_, **__):
        try:
            raise cause
        except Exception as error:
            raise KeyError("incompatible handler") from error

    monkeypatch.setattr(checkpoints.ocp, "load_checkpointables", load)


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (ValueError("UNKNOWN: Failed to read: Input/output error [os_error_code='5']"), OSError),
        (ValueError("UNKNOWN: Connection timed out [os_error_code='110']"), TimeoutError),
        (TimeoutError("barrier"), TimeoutError),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: a peer is lost"), jax.errors.JaxRuntimeError),
        (MemoryError(), MemoryError),
    ],
)
def test_what_is_no_damage_is_told_as_it_is(cause, kind, written, monkeypatch):
    fail(monkeypatch, cause)
    with pytest.raises(kind) as raised:
        written.params(1)
    assert kind is not OSError or raised.value.errno == errno.EIO


def test_a_part_that_cannot_be_read_now_is_not_damaged(written, monkeypatch):
    fail(monkeypatch, ValueError("UNAVAILABLE: what of it, nobody says"))

    def away(self, *_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))

    monkeypatch.setattr(pathlib.Path, "open", away)
    with pytest.raises(OSError, match="Stale file handle"):
        written.params(1)


def test_a_part_that_can_be_read_and_not_understood_is_damaged(written, monkeypatch):
    fail(monkeypatch, ValueError("DATA_LOSS: no such file [os_error_code='2']"))
    with pytest.raises(ValueError, match=r"checkpoint .*/1 is damaged: params cannot be read"):
        written.params(1)


# -- writing


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Half a megabyte is the most that a file may have, so that no part of `state_of` can be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def failed(tmp_path) -> Iterator[Checkpoints]:
    """Step 1 was written, and step 2 failed in the background."""
    writer = Checkpoints(tmp_path, keep=2)
    writer.save(state_of(1))
    writer.save(state_of(1))
    with full_disk():
        writer.save(state_of(2))
        with pytest.raises(ValueError, match="File too large"):
            writer._saving.result()
    yield writer
    writer.close()


def steps(workdir: pathlib.Path) -> list[str]:
    """What there is among the checkpoints."""
    return sorted(file.name for file in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("step", [2, 3], ids=["the same step", "a later one"])
def test_a_save_that_failed_is_made_up_for_by_the_next(step, failed, tmp_path, capfd):
    """At once, and what was left of it is removed: it may be what fills the disk."""
    failed.save(state_of(step))
    assert steps(tmp_path) == ["1", str(step)]
    said = capfd.readouterr().err
    assert said.count("a checkpoint could not be written, so another is: process 0: ") == 1
    found = Checkpoints(tmp_path).params(step)
    assert np.array_equal(found["a"], state_of(step).params["a"])
    # And then as always.
    failed.save(state_of(4))
    failed.close()
    assert steps(tmp_path) == [str(step), "4"] and not capfd.readouterr().err


def test_a_save_that_fails_again_is_an_error(failed, tmp_path):
    with full_disk(), pytest.raises(ValueError, match="File too large"):
        failed.save(state_of(3))
    # The loop tries once more before it gives up.
    failed.save(state_of(3))
    failed.close()
    assert Checkpoints(tmp_path).latest == 3


def test_a_save_that_failed_in_another_process_is_made_up_for_by_all(tmp_path, monkeypatch, capfd):
    writer = Checkpoints(tmp_path, keep=2)
    writer.save(state_of(1))
    monkeypatch.setattr(checkpoints, "exchange", lambda mine: [mine, "no space left"])
    writer.save(state_of(2))
    assert steps(tmp_path) == ["1", "2"]
    assert "another is: process 1: no space left" in capfd.readouterr().err
    writer.close()
