"""What WeMMU adds to its backbones, as switches. Every open question of the paper is one field here."""

import dataclasses
import enum
import math
import pathlib
from typing import Any

from wemmu_jax.files import read_config
from wemmu_jax.models.dc_ae.config import DCAEConfig
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from wemmu_jax.models.sana.config import SanaConfig


class QueryKind(enum.StrEnum):
    """What the generation expert starts from (paper, 4.3.1)."""

    NOISY = "noisy"  # fresh N(0, I) for every sample
    NOISY_SCALED = "noisy_scaled"  # the same with a learned scale for each channel (3.2)
    LEARNABLE_FIXED = "learnable_fixed"  # a fixed number of learned queries
    LEARNABLE_DYNAMIC = "learnable_dynamic"  # the centre crop of a learned table

    @property
    def noisy(self) -> bool:
        """Whether they are drawn for every sample."""
        return self in (QueryKind.NOISY, QueryKind.NOISY_SCALED)


class Connector(enum.StrEnum):
    """How DC-AE features become tokens (paper, 4.3.2 and A.2)."""

    LINEAR = "linear"
    NONE = "none"
    VIT_2 = "vit_2"
    VIT_6 = "vit_6"
    VIT_6_DISTILLED = "vit_6_distilled"

    @property
    def depth(self) -> int:
        """Transformer layers of the connector."""
        return {"vit_2": 2, "vit_6": 6, "vit_6_distilled": 6}.get(self.value, 0)


class VAEStream(enum.StrEnum):
    """Where the VAE tokens run."""

    FROZEN = "frozen"  # in the frozen LLM, after their picture's ViT tokens
    EXPERT = "expert"  # in the generation expert, before the queries (as in BAGEL)


class Pathway(enum.StrEnum):
    """What the Position MLP reads (paper, 4.3.2)."""

    EXPERT = "expert"  # the generation expert's queries
    VIT = "vit"  # the source's ViT features themselves; there is neither an expert nor any text


@dataclasses.dataclass(frozen=True)
class BridgeConfig:
    """The bridge.

    Attributes:
      queries: what the expert starts from.
      noise_scale: standard deviation of noisy queries; the paper's is 1.
      connector: how VAE features become tokens.
      vae_stream: where these tokens run.
      pathway: what the Position MLP reads; `vit` shows what is lost between the ViT and the queries.
      fixed_grid: side of the square grid of `learnable_fixed` queries.
      max_grid: N, side of every learned table of positions (A.1).
      position_mlp_hidden: hidden width of the Position MLP (Table 1).
      connector_heads: heads of the Simple ViT connectors.
      distillation: weight of the cosine loss of `vit_6_distilled`.
      caption_template: the prompt around a caption in text to image; the paper gives no wording.

    Raises:
      ValueError: a size is not positive, the weight or the noise's scale is negative or not finite, or the template has
        no `{caption}` or several.
    """

    queries: QueryKind = QueryKind.NOISY
    noise_scale: float = 1.0
    connector: Connector = Connector.LINEAR
    vae_stream: VAEStream = VAEStream.FROZEN
    pathway: Pathway = Pathway.EXPERT
    fixed_grid: int = 18
    max_grid: int = 74
    position_mlp_hidden: int = 16384
    connector_heads: int = 16
    distillation: float = 1.0
    caption_template: str = "{caption}"

    def __post_init__(self) -> None:
        for name in ("fixed_grid", "max_grid", "position_mlp_hidden", "connector_heads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"bridge config: {name} must be a whole number above 0; found {value!r}"
                )
        for name in ("distillation", "noise_scale"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(
                    f"bridge config: {name} must be a finite number of at least 0; found {value!r}"
                )
        if self.caption_template.count("{caption}") != 1:
            raise ValueError(
                "bridge config: caption_template must have {caption} in it once; "
                f"found {self.caption_template!r}"
            )
        if self.pathway is Pathway.VIT and (self.queries, self.connector) != (
            QueryKind.NOISY,
            Connector.NONE,
        ):
            raise ValueError(
                "bridge config: pathway=vit has neither queries nor VAE tokens: it goes with queries=noisy and "
                f"connector=none; found queries={self.queries.value}, connector={self.connector.value}"
            )

        if self.noise_scale != 1 and (not self.queries.noisy or self.pathway is Pathway.VIT):
            raise ValueError(
                "bridge config: noise_scale is of noisy queries, and there are none: leave it at 1; "
                f"found {self.noise_scale!r}"
            )

    @property
    def vae_in_prompt(self) -> bool:
        """Whether VAE tokens stand in the prompt, after their picture's ViT tokens."""
        return self.vae_stream is VAEStream.FROZEN and self.connector is not Connector.NONE

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BridgeConfig":
        """The inverse of `to_dict`. Raises ValueError naming an unknown key or a value that is not a choice."""
        known = {field.name: field.type for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"bridge config: unknown keys {unknown}; known: {sorted(known)}")
        enums = {
            "queries": QueryKind,
            "connector": Connector,
            "vae_stream": VAEStream,
            "pathway": Pathway,
        }
        fixed = dict(values)
        for name, kind in enums.items():
            if name in fixed:
                try:
                    fixed[name] = kind(fixed[name])
                except ValueError:
                    choices = [member.value for member in kind]
                    raise ValueError(
                        f"bridge config: {name}={fixed[name]!r}; expected one of {choices}"
                    ) from None
        return cls(**fixed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: getattr(v, "value", v) for k, v in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class WeMMUConfig:
    """The composed model: three backbones and the bridge."""

    vlm: Qwen25VLConfig
    dit: SanaConfig
    dc_ae: DCAEConfig
    bridge: BridgeConfig

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, bridge: BridgeConfig) -> "WeMMUConfig":
        """Reads the backbones' configs from a converted folder.

        Raises:
          FileNotFoundError: a config file is missing.
          ValueError: the backbones do not fit each other.
        """
        folder = pathlib.Path(folder)
        return cls.from_parts(folder / "vlm", folder / "sana", bridge)

    @classmethod
    def from_parts(
        cls, vlm: pathlib.Path, sana: pathlib.Path, bridge: BridgeConfig
    ) -> "WeMMUConfig":
        """The same from the folder of a Qwen2.5-VL and that of a Sana pipeline."""
        return cls(
            vlm=read_config(vlm / "config.json", Qwen25VLConfig.from_hf),
            dit=read_config(sana / "transformer/config.json", SanaConfig.from_hf),
            dc_ae=read_config(sana / "vae/config.json", DCAEConfig.from_hf),
            bridge=bridge,
        )

    def __post_init__(self) -> None:
        if self.dit.in_channels != self.dc_ae.latent_channels:
            raise ValueError(
                f"the DiT reads {self.dit.in_channels} latent channels, the autoencoder writes "
                f"{self.dc_ae.latent_channels}"
            )
        if self.vlm.vision.out_hidden_size != self.vlm.text.hidden_size:
            raise ValueError(
                f"the ViT writes width {self.vlm.vision.out_hidden_size}, the LLM reads "
                f"{self.vlm.text.hidden_size}"
            )

        heads, width = self.bridge.connector_heads, self.vlm.text.hidden_size
        if self.bridge.connector.depth and width % heads:
            raise ValueError(
                f"bridge config: connector_heads={heads} does not divide the width {width}"
            )

    def source_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for a picture of `height` x `width` pixels: 18 x 18 at 512 px.

        One token for each merged ViT patch, 28 x 28 pixels in Qwen2.5-VL. A source picture is brought onto this
        grid once for the ViT and once for the DC-AE, so that both give the same number of tokens.

        Raises:
          ValueError: the grid passes the learned tables.
        """
        unit, limit = self.vlm.vision.unit, self.bridge.max_grid
        grid = max(1, round(height / unit)), max(1, round(width / unit))
        if max(grid) > limit:
            raise ValueError(
                f"{height} x {width} pixels need a grid of {grid[0]} x {grid[1]} tokens; the learned "
                f"tables end at {limit} ({limit * unit} pixels a side)"
            )
        return grid

    def query_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the queries for an output of `height` x `width` pixels.

        The same grid as a source of that size would have; learnable fixed queries keep their own.

        Raises:
          ValueError: the grid passes the learned tables, or a side is not a multiple of the autoencoder's ratio.
        """
        ratio = self.dc_ae.ratio
        if height % ratio or width % ratio or min(height, width) <= 0:
            near = [max(ratio, round(side / ratio) * ratio) for side in (height, width)]
            raise ValueError(
                f"height and width must be positive multiples of {ratio}, found {height} x {width}; "
                f"the nearest that works is {near[0]} x {near[1]}"
            )
        if self.bridge.queries is QueryKind.LEARNABLE_FIXED:
            return self.bridge.fixed_grid, self.bridge.fixed_grid
        return self.source_grid(height, width)
