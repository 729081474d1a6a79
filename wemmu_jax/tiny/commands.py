"""`wemmu miniworld pretrain`: a backbone trained, and written as a Hugging Face folder."""

import json
import pathlib

from wemmu_jax.conversion.backbones import DC_AE, VLM
from wemmu_jax.miniworld.conversations import corpus
from wemmu_jax.tiny import dc_ae, sana, vlm
from wemmu_jax.tiny.backbones import write_configs
from wemmu_jax.tiny.loop import pretrain

_RECIPES = {"vlm": vlm, "dc-ae": dc_ae, "sana": sana}


def pretrain_backbone(
    name: str, root: pathlib.Path, workdir: pathlib.Path, *, seed: int, steps: int | None
) -> None:
    """Trains `vlm`, `dc-ae` or `sana` and writes its part of ROOT/vlm and ROOT/sana; `sana` needs the others there.

    Raises:
      ValueError, FloatingPointError, InterruptedError: see `pretrain`.
      FileNotFoundError: a backbone that this one needs is missing.
    """
    if not (root / "vlm/config.json").exists():
        write_configs(root, corpus())
    if name == "sana":
        _check_there(root)
    module = _RECIPES[name]
    recipe = module.recipe(root, seed=seed, steps=steps or module.STEPS)
    params, scores = pretrain(recipe, workdir)
    module.save(params, root)
    print(json.dumps({"backbone": name, "folder": str(root), **scores}, indent=2))


def _check_there(root: pathlib.Path) -> None:
    """The DiT learns on the latents of the trained DC-AE and from the words of the trained VLM."""
    for name, backbone in (("vlm", VLM), ("dc-ae", DC_AE)):
        file = root / backbone.folder / f"{backbone.stem}.safetensors"
        if not file.exists():
            raise FileNotFoundError(f"{file}: missing; run `wemmu miniworld pretrain {name}` first")
