"""What happens to pictures on their way: blur and noise, and scenes wrong in one fact."""

import dataclasses

import numpy as np

from wemmu_jax.miniworld.scene import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    Object,
    Scene,
    choose,
)


def blurred_and_noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur of sigma 1 px, then white noise at 30 dB PSNR."""
    kernel = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    kernel /= kernel.sum()
    pixels = np.pad(image.astype(np.float64), ((4, 4), (4, 4), (0, 0)), mode="edge")
    for axis, length in enumerate(image.shape[:2]):
        pixels = sum(
            weight * np.take(pixels, np.arange(i, i + length), axis)
            for i, weight in enumerate(kernel)
        )
    pixels += rng.normal(0, 255 / 10 ** (30 / 20), image.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with exactly one thing wrong: a colour, a shape, a place, the background, an object too many or
    too few."""
    item = choose(rng, scene.objects)
    kinds = ["colour", "shape", "place", "background"]
    kinds += ["fewer"] * (len(scene.objects) > 1) + ["more"] * (len(scene.objects) < MAX_OBJECTS)
    match choose(rng, kinds):
        case "colour":
            colour = choose(rng, [name for name in COLOURS if name != item.colour])
            return scene.exchange(item, dataclasses.replace(item, colour=colour))
        case "shape":
            shape = choose(rng, [name for name in SHAPES if name != item.shape])
            return scene.exchange(item, dataclasses.replace(item, shape=shape))
        case "place":
            place = choose(rng, scene.free_places)
            return scene.exchange(item, dataclasses.replace(item, place=place))
        case "background":
            background = choose(rng, [name for name in BACKGROUNDS if name != scene.background])
            return dataclasses.replace(scene, background=background)
        case "fewer":
            return scene.without(item)
        case "more":
            place = choose(rng, scene.free_places)
            return scene.add(Object(choose(rng, SHAPES), choose(rng, COLOURS), place))
