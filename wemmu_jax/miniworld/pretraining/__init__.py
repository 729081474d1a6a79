"""Trains the tiny preset's backbones on miniworld, each by itself, with the project's own modules."""
