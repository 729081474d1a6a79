"""The tiny preset: its backbones, small numbers on the same road as the 8B model, and how they are trained."""
