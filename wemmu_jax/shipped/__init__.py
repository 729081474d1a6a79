"""What comes with the package: backbones of the tiny preset, trained by `wemmu miniworld pretrain`."""

import pathlib

# Hugging Face folders below `vlm` and `sana`, and their model card.
BACKBONES = pathlib.Path(__file__).parent / "huggingface"
