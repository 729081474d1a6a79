"""The published backbones that the paper joins."""

from wemmu_jax.models.dc_ae.config import DCAEConfig
from wemmu_jax.models.qwen2_5_vl.config import qwen2_5_vl_3b
from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig


def published_wemmu(bridge: BridgeConfig) -> WeMMUConfig:
    """Qwen2.5-VL-3B, Sana 1.5 1.6B and its DC-AE f32c32 around `bridge`: 8.56 B parameters."""
    return WeMMUConfig(vlm=qwen2_5_vl_3b(), dit=SanaConfig(), dc_ae=DCAEConfig(), bridge=bridge)
