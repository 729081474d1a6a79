"""Properties of Qwen2.5-VL's preprocessing, of the packing of windows and of the vision transformer."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from wemmu_jax.conversion.memory import flatten
from wemmu_jax.conversion.qwen2_5_vl import vision_table
from wemmu_jax.models.qwen2_5_vl import vision_lanes
from wemmu_jax.models.qwen2_5_vl.config import VisionConfig, qwen2_5_vl_3b
from wemmu_jax.models.qwen2_5_vl.images import (
    PackedImages,
    pack_images,
    patchify,
    resize_rgb,
    slots_needed,
    smart_size,
)
from wemmu_jax.models.qwen2_5_vl.vision import VisionTransformer
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.rules import placed

REAL = qwen2_5_vl_3b().vision
TINY = VisionConfig(
    depth=3,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    in_channels=3,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=24,
    fullatt_block_indexes=(1,),
    out_hidden_size=12,
)
GRIDS = ((3, 6), (7, 4), (2, 5))


def random_patches(grid: tuple[int, int], *, seed: int = 0) -> np.ndarray:
    gh, gw = grid
    rng = np.random.default_rng([seed, gh, gw])
    image = rng.integers(0, 256, (gh * TINY.unit, gw * TINY.unit, 3), np.uint8)
    return patchify(image, TINY)


def packed(grids=GRIDS, **sizes) -> PackedImages:
    return pack_images([random_patches(grid) for grid in grids], grids, TINY, **sizes)


ROOMY = packed(slots=9, tokens=40)


@functools.cache
def model_and_params(remat: str = "none"):
    """Biases and norms are redrawn too: a test with zero biases would not see padding leak through them."""
    model = VisionTransformer(TINY, remat=remat)
    shapes = jax.eval_shape(model.init, jax.random.key(0), packed())["params"]
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return model, jax.tree.unflatten(structure, drawn)


@functools.cache
def jitted(remat: str = "none"):
    model, params = model_and_params(remat)
    return functools.partial(jax.jit(lambda p, images: model.apply({"params": p}, images)), params)


# Pictures ---------------------------------------------------------------------------------------------


def test_smart_size_is_the_references():
    rng = np.random.default_rng(0)
    bounds = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    sizes = [(1, 1), (1, 200), (14, 42), (28, 28), (42, 14), (4000, 20), (10_000, 9000)]
    sizes += [tuple(np.exp(rng.uniform(0, np.log(3000), 2)).astype(int)) for _ in range(300)]
    for height, width in sizes:
        if max(height, width) <= 200 * min(height, width):
            ours = smart_size(height, width, unit=28, **bounds)
            assert ours == smart_resize(height, width, factor=28, **bounds), (height, width)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(10_000, 20, "aspect ratio of at most 200, found 500"), (0, 5, "at least one pixel")],
)
def test_impossible_sizes_are_errors(height, width, message):
    with pytest.raises(ValueError, match=f"{height} x {width}.*{message}"):
        smart_size(height, width, unit=28, min_pixels=3136, max_pixels=10**6)


def test_a_resized_picture_is_contiguous_rgb():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    resized = resize_rgb(image, 28, 56)
    assert (resized.shape, resized.dtype) == ((28, 56, 3), np.uint8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((28, 28, 3), np.float32), r"expected uint8 \[H, W, 3\], found float32"),
        (np.zeros((28, 28, 4), np.uint8), r"found uint8 \[28, 28, 4\]"),
        (np.zeros((28, 28), np.uint8), r"found uint8 \[28, 28\]"),
        (np.zeros((28, 29, 3), np.uint8), r"multiples of 28, found 28 x 29"),
        (np.zeros((0, 28, 3), np.uint8), r"multiples of 28, found 0 x 28"),
    ],
)
def test_patchify_refuses_what_it_cannot_cut(image, message):
    with pytest.raises(ValueError, match=message):
        patchify(image, REAL)


# Packing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(18, 18), (37, 37), (1, 1), (4, 8), (5, 3), (2, 61), (73, 18)])
def test_packing_is_a_permutation_that_keeps_windows_together(grid):
    (gh, gw), merge, side = grid, REAL.spatial_merge_size, REAL.window_units
    count = gh * gw * merge**2
    numbered = np.arange(1, count + 1, dtype=np.float32)[:, None]
    slots = slots_needed(gh, gw, REAL) + 2
    images = pack_images([numbered], [grid], REAL, slots=slots, tokens=gh * gw + 3)

    seen = images.patches[images.segments >= 0, 0]
    np.testing.assert_array_equal(np.sort(seen), numbered[:, 0])
    assert not images.patches[images.segments < 0].any()
    # `order` finds the merge blocks in raster order, whole and in the processor's order inside.
    merged = images.patches.reshape(-1, merge**2)
    np.testing.assert_array_equal(merged[images.order[0, : gh * gw]].ravel(), numbered[:, 0])
    assert not images.order[0, gh * gw :].any()

    # A slot and a segment name exactly one window of the picture.
    rows, columns = (images.positions[0, ..., i] // (merge * side) for i in range(2))
    slot = np.broadcast_to(np.arange(slots)[:, None], rows.shape)
    valid = images.segments[0] >= 0
    ours = zip(slot[valid], images.segments[0][valid], strict=True)
    pairs = set(zip(ours, zip(rows[valid], columns[valid], strict=True), strict=True))
    windows = -(-gh // side) * -(-gw // side)
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == windows


def test_positions_are_rows_and_columns():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3 * TINY.unit, 5 * TINY.unit, 3), np.uint8)
    images = pack_images([patchify(image, TINY)], [(3, 5)], TINY)
    size = TINY.patch_size
    for row, column in itertools.product(range(6), range(10)):
        here = (images.positions == (row, column)).all(-1) & (images.segments >= 0)
        (patch,) = images.patches[here]
        cut = image[row * size : (row + 1) * size, column * size : (column + 1) * size]
        again = patchify(np.tile(cut, (2, 2, 1)), TINY)[0]
        np.testing.assert_array_equal(patch, again)


@pytest.mark.parametrize(("side", "most"), [(18, 22), (37, 88)])
def test_packing_wastes_little(side, most):
    """At 512 and 1024 px; padding stays within the 384 and 1408 tokens of the batch contract."""
    assert slots_needed(side, side, REAL) <= most


def test_packing_errors():
    patches = [random_patches((3, 6)), random_patches((7, 4))]
    with pytest.raises(ValueError, match=r"picture 1: expected 112 patches .* 7 x 4, found 72"):
        pack_images([patches[0], patches[0]], [(3, 6), (7, 4)], TINY)
    with pytest.raises(ValueError, match=r"slots: picture 1 needs 4, found room for 3"):
        pack_images(patches, [(3, 6), (7, 4)], TINY, slots=3)
    with pytest.raises(ValueError, match=r"tokens: picture 1 needs 28, found room for 20"):
        pack_images(patches, [(3, 6), (7, 4)], TINY, tokens=20)
    with pytest.raises(ValueError, match=r"a grid for each picture, found 0 and 0"):
        pack_images([], [], TINY)


# The model --------------------------------------------------------------------------------------------


def test_padding_changes_nothing_and_a_batch_equals_its_rows():
    exact = packed()
    batch, padded = jitted()(exact), jitted()(ROOMY)
    assert np.isfinite(padded).all()
    for i, (gh, gw) in enumerate(GRIDS):
        own = packed((GRIDS[i],), slots=exact.segments.shape[1], tokens=exact.order.shape[1])
        alone = jitted()(own)[0, : gh * gw]
        np.testing.assert_allclose(batch[i, : gh * gw], alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(padded[i, : gh * gw], alone, rtol=1e-5, atol=1e-5)


def test_what_lies_in_the_padding_does_not_matter():
    images = ROOMY
    noise = np.random.default_rng(0).standard_normal(images.patches.shape).astype(np.float32)
    free = (images.segments < 0)[..., None]
    dirty = images.replace(
        patches=np.where(free, noise, images.patches),
        positions=np.where(free, 7, images.positions).astype(np.int32),
    )
    clean, other = jitted()(images), jitted()(dirty)
    for i, (gh, gw) in enumerate(GRIDS):
        np.testing.assert_allclose(clean[i, : gh * gw], other[i, : gh * gw], rtol=1e-5, atol=1e-5)


@functools.cache
def jitted_gradient(remat: str = "none"):
    """Gradient of a squared error over the pictures' own tokens, as path -> leaf."""
    model, params = model_and_params(remat)
    target = np.random.default_rng(0).standard_normal(TINY.out_hidden_size).astype(np.float32)
    count = np.array([gh * gw for gh, gw in GRIDS])

    def loss(params, images):
        valid = jnp.arange(images.order.shape[1]) < count[:, None]
        error = jnp.square(model.apply({"params": params}, images) - target)
        return jnp.sum(error * valid[..., None])

    gradient = jax.jit(jax.grad(loss))
    return lambda images: flatten(gradient(params, images))


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_gradients_are_finite_and_the_same_with_remat(policy):
    plain = jitted_gradient()(ROOMY)
    for path, leaf in jitted_gradient(policy)(ROOMY).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
        np.testing.assert_allclose(leaf, plain[path], rtol=2e-4, atol=1e-4, err_msg=path)


def test_heads_side_by_side_give_the_same(monkeypatch):
    by_heads, gradient = np.asarray(jitted()(ROOMY)), jitted_gradient()(ROOMY)
    monkeypatch.setattr(vision_lanes, "current_platform", lambda: "tpu")
    assert vision_lanes.lies_in_lanes(REAL)
    assert not vision_lanes.lies_in_lanes(TINY), "its halves fill no vector of 128"
    monkeypatch.setattr(vision_lanes, "LANES", TINY.hidden_size // 2)
    calls = []
    plain = vision_lanes.window_attention
    monkeypatch.setattr(
        vision_lanes, "window_attention", lambda *a, **k: calls.append(0) or plain(*a, **k)
    )
    model, params = model_and_params()
    side_by_side = jax.jit(lambda p, images: model.apply({"params": p}, images))(params, ROOMY)
    assert calls
    for i, (gh, gw) in enumerate(GRIDS):
        own = slice(gh * gw)
        np.testing.assert_allclose(side_by_side[i, own], by_heads[i, own], rtol=1e-5, atol=1e-5)
    for path, leaf in jitted_gradient.__wrapped__()(ROOMY).items():
        np.testing.assert_allclose(leaf, gradient[path], rtol=2e-4, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("tensor", [1, 2])
def test_heads_that_devices_share_do_not_lie_side_by_side(tensor, monkeypatch):
    monkeypatch.setattr(vision_lanes, "current_platform", lambda: "tpu")
    mesh = make_mesh(data=1, fsdp=1, sequence=1, tensor=tensor, devices=jax.devices()[:tensor])
    with placed(mesh):
        assert vision_lanes.lies_in_lanes(REAL) == (tensor == 1)


def test_a_picture_of_nothing_but_padding_stays_finite():
    nothing = ROOMY.replace(segments=np.full_like(ROOMY.segments, -1))
    assert np.isfinite(jitted()(nothing)).all()
    assert all(np.isfinite(leaf).all() for leaf in jitted_gradient()(nothing).values())


def test_bfloat16_stays_close():
    _, params = model_and_params()
    low = VisionTransformer(TINY, dtype=jnp.bfloat16)
    exact = np.asarray(jitted()(packed()))
    rounded = jax.jit(lambda p, x: low.apply({"params": p}, x))(params, packed())
    assert rounded.dtype == jnp.bfloat16
    difference = np.asarray(rounded, np.float32) - exact
    assert np.linalg.norm(difference) < 0.03 * np.linalg.norm(exact)


def test_the_table_fills_the_real_model():
    """The published 3B's vision transformer, leaf by leaf, without allocating it."""
    images = jax.eval_shape(lambda: pack_images([np.zeros((64, 1176))], [(4, 4)], REAL))
    shapes = jax.eval_shape(VisionTransformer(REAL).init, jax.random.key(0), images)["params"]
    ours = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    assert ours == {entry.target: entry.target_shape for entry in vision_table(REAL)}
    assert sum(np.prod(shape) for shape in ours.values()) == 668_684_288
