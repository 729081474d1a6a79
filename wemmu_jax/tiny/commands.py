"""`wemmu miniworld pretrain`: a backbone trained, and written as a Hugging Face folder."""

import json
import pathlib

import jax
import jax.numpy as jnp

from wemmu_jax.conversion.backbones import DC_AE, DIT, VLM
from wemmu_jax.miniworld.conversations import corpus
from wemmu_jax.tiny import dc_ae, sana, vlm
from wemmu_jax.tiny.backbones import write_configs
from wemmu_jax.tiny.card import describe, write_card
from wemmu_jax.tiny.loop import pretrain

_RECIPES = {"vlm": (vlm, VLM), "dc-ae": (dc_ae, DC_AE), "sana": (sana, DIT)}


def pretrain_backbone(
    name: str, root: pathlib.Path, workdir: pathlib.Path, *, seed: int, steps: int | None
) -> None:
    """Trains `vlm`, `dc-ae` or `sana` and writes its part of ROOT/vlm and ROOT/sana; `sana` needs the DC-AE there.

    Raises:
      ValueError, FloatingPointError, InterruptedError: see `pretrain`.
      FileNotFoundError: a backbone that this one needs is missing.
    """
    if not (root / "vlm/config.json").exists():
        write_configs(root, corpus())
    if name == "sana":
        _check_there(root / DC_AE.folder / f"{DC_AE.stem}.safetensors", needs="dc-ae")
    module, backbone = _RECIPES[name]
    recipe = module.recipe(root, seed=seed, steps=steps or module.STEPS)
    params = pretrain(recipe, workdir)
    # What is shipped is what is scored.
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    scores = recipe.evaluate(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored))
    written = module.save(stored, root)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(written))
    command = f"wemmu miniworld pretrain {name} --seed {seed}"
    command += f" --steps {steps}" if steps else ""
    description = describe(recipe, workdir, command, parameters=parameters, scores=scores)
    write_card(root, root / backbone.folder, description)
    print(json.dumps({**description, "folder": str(root)}, indent=2))


def _check_there(file: pathlib.Path, *, needs: str) -> None:
    if not file.exists():
        raise FileNotFoundError(f"{file}: missing; run `wemmu miniworld pretrain {needs}` first")
