"""What the tiny DiT is told of a scene before it reads captions."""

import numpy as np

from wemmu_jax.miniworld.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, Object, Scene
from wemmu_jax.tiny.sana import facts

NOTHING = 0
FIRST_COLOUR = 1 + len(SHAPES)
FIRST_PLACE = FIRST_COLOUR + 1 + len(COLOURS)
FIRST_BACKGROUND = FIRST_PLACE + len(PLACES)


def test_each_place_has_its_own_facts():
    scene = Scene(
        "olive", (Object("ring", "pink", "bottom centre"), Object("circle", "red", "centre"))
    )
    found = facts(scene)
    there = {
        PLACES.index("bottom centre"): ("ring", "pink"),
        PLACES.index("centre"): ("circle", "red"),
    }
    for number, (shape, colour, place, background) in enumerate(found.tolist()):
        wanted = there.get(number)
        assert shape == (1 + SHAPES.index(wanted[0]) if wanted else NOTHING)
        at = 1 + list(COLOURS).index(wanted[1]) if wanted else NOTHING
        assert colour == FIRST_COLOUR + at
        assert place == FIRST_PLACE + number
        assert background == FIRST_BACKGROUND + list(BACKGROUNDS).index("olive")
    assert np.asarray(found).shape == (9, 4)
