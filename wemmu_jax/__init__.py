"""WeMMU in JAX: noisy query tokens between Qwen2.5-VL and Sana, trained in four stages."""

import importlib.metadata
from typing import Any

__all__ = ["WeMMU", "__version__"]

__version__ = importlib.metadata.version("wemmu-jax")


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: `wemmu --help` must not wait for jax.
    if name == "WeMMU":
        from wemmu_jax.inference.pipeline import WeMMU

        return WeMMU
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
