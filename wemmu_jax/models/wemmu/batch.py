"""What goes into the model, as arrays of static shape. The host packs them, see `inputs.py`.

B batch, L prompt tokens, n source pictures a row, S tokens of a source (padded), C latent channels.
"""

import flax.struct
import jax

from wemmu_jax.models.qwen2_5_vl.images import PackedImages


@flax.struct.dataclass
class PromptBatch:
    """Prompts padded on the right.

    Attributes:
      tokens: int32[B, L].
      feature_index: int32[B, L]; -1 for text, else which of the row's features stands here: the ViT tokens
        of all its pictures (n * S), then, where VAE tokens run in the LLM, the VAE tokens of all of them.
      position_ids: int32[3, B, L], M-RoPE: time, row, column.
      valid: bool[B, L].
      next_position: int32[B], the first position id after the prompt.
    """

    tokens: jax.Array
    feature_index: jax.Array
    position_ids: jax.Array
    valid: jax.Array
    next_position: jax.Array


@flax.struct.dataclass
class Sources:
    """The source pictures of a batch, n of them in every row.

    Attributes:
      images: what the ViT reads, [B * n, ...], row by row.
      place: int32[B, n * S], where in the prompt each ViT token stands; -1 for padding.
      latents: for each of the n pictures float32[B, gh, gw, C], what the DC-AE made of it.
    """

    images: PackedImages
    place: jax.Array
    latents: tuple[jax.Array, ...]
