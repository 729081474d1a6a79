"""Named random streams."""

import jax
import numpy as np

from wemmu_jax.rng import Stream, per_sample, stream_key

NUMBERS = np.arange(8, dtype=np.uint32)


def draw(key):
    return jax.random.normal(key, (64,))


def test_the_documented_formula():
    key = jax.random.fold_in(jax.random.key(11), int(Stream.FLOW_TIME))
    expected = [draw(jax.random.fold_in(key, number)) for number in NUMBERS]
    found = per_sample(stream_key(11, Stream.FLOW_TIME), NUMBERS, draw)
    np.testing.assert_array_equal(found, np.stack(expected))


def test_streams_and_seeds_are_independent():
    keys = [stream_key(seed, stream) for seed in (0, 1) for stream in Stream]
    rows = np.stack([np.asarray(per_sample(key, NUMBERS, draw)).ravel() for key in keys])
    others = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(others).max() < 0.2


def test_stream_ids_never_change():
    names = ["INIT", "QUERY_NOISE", "FLOW_NOISE", "FLOW_TIME", "NEGATIVES", "SAMPLER"]
    assert [(stream.name, stream.value) for stream in Stream] == list(
        zip(names, range(6), strict=True)
    )


def test_a_root_key_serves_as_well_as_its_seed():
    by_key = stream_key(jax.random.key(5), Stream.SAMPLER)
    np.testing.assert_array_equal(draw(by_key), draw(stream_key(5, Stream.SAMPLER)))


def test_same_numbers_under_jit_and_in_any_order():
    whole = np.asarray(per_sample(stream_key(0, Stream.QUERY_NOISE), NUMBERS, draw))

    def traced(seed, numbers):
        return per_sample(stream_key(seed, Stream.QUERY_NOISE), numbers, draw)

    order = np.array([5, 0, 3], np.uint32)
    np.testing.assert_array_equal(jax.jit(traced)(0, order), whole[order])
