"""This project beside transformers and diffusers on torch; see `__main__.py`."""
