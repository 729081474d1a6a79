"""What comes with the package: the tiny preset, trained. See `wemmu miniworld pretrain` and `launch/stages.sh`."""

import pathlib

_HERE = pathlib.Path(__file__).parent
# Backbones as Hugging Face folders below `vlm` and `sana`, and their model card.
BACKBONES = _HERE / "huggingface"
# The whole model after stage 4, as `wemmu convert --bridge` writes it.
MODEL = _HERE / "wemmu"
