"""Storage that fails while a checkpoint is read or written."""

import errno
import os
import pathlib

import jax
import numpy as np
import pytest

from wemmu_jax.training import checkpoints
from wemmu_jax.training.checkpoints import Checkpoints
from wemmu_jax.training.state import TrainState


def state_of(step: int) -> TrainState:
    """A small state, other values for every step."""
    values = np.random.default_rng(step).random((2, 30_000)).astype(np.float32)
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
    with pytest.raises(ValueError, match="checkpoint .*/1 is damaged: params cannot be read"):
        written.params(1)
