"""From requests to the arrays that the model reads: sizes, prompts and pixels. On the host; needs no weights.

B requests of one call, n source pictures of each, S source tokens.
"""

import dataclasses
import functools
import math
import operator
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from wemmu_jax.data import records as data
from wemmu_jax.data.buckets import make_buckets, nearest
from wemmu_jax.data.pictures import cover, open_picture, shown_whole, upright_rgb
from wemmu_jax.data.prompts import RECONSTRUCTION_PROMPT, UNCONDITIONAL_PROMPT
from wemmu_jax.diffusion.guidance import Branch
from wemmu_jax.models.qwen2_5_vl.images import resize_rgb, smart_size
from wemmu_jax.models.qwen2_5_vl.prompt import PaddedPrompt
from wemmu_jax.models.wemmu.batch import PackedImages, PromptBatch
from wemmu_jax.models.wemmu.config import Pathway, WeMMUConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder, prompt_batch, read_sample_size

# Prompts are padded to one of these, and pictures to a multiple of this, so that few programs are compiled.
TEXT_LENGTHS = (128, 256, 512)
TOKEN_MULTIPLE = 64

Picture = Image.Image | str | pathlib.Path
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class DrawingRequest:
    """A text with its source pictures, upright and in RGB."""

    text: str
    sources: tuple[Image.Image, ...] = ()


@dataclasses.dataclass(frozen=True)
class BranchInputs:
    """What the VLM is given in one guidance branch.

    Attributes:
      prompt: B rows.
      images: [B * n, ...] for the ViT; None where rows have no pictures, as the next.
      place: int32[B, n * S], as in `Sources`.
      pixels: for the DC-AE: n lists of B pictures uint8[32 gh, 32 gw, 3].
    """

    prompt: PromptBatch
    images: PackedImages | None = None
    place: np.ndarray | None = None
    pixels: tuple[list[np.ndarray], ...] = ()


@dataclasses.dataclass(frozen=True)
class RequestEncoder:
    """Knows which sizes a model can draw, and how it reads prompts and pictures.

    Attributes:
      config: of the composed model.
      rows: tokenizer and picture preprocessing.
      default_size: side in pixels of the pictures that the DiT was made for.
    """

    config: WeMMUConfig
    rows: RowEncoder
    default_size: int

    @classmethod
    def load(cls, backbones: str | pathlib.Path, config: WeMMUConfig) -> "RequestEncoder":
        """Reads the tokenizer and the DiT's size from a converted folder; raises as `RowEncoder.load`."""
        dit = pathlib.Path(backbones) / "sana/transformer/config.json"
        rows = RowEncoder.load(backbones, config)
        return cls(config, rows, read_sample_size(dit) * config.dc_ae.ratio)

    # -- drawing

    def output_size(
        self, sources: Sequence[Image.Image], height: int | None, width: int | None
    ) -> Size:
        """What is asked for; else the bucket nearest to the first source, or the DiT's own size."""
        if sources and (height is None) != (width is None):
            raise ValueError("give both height and width, or neither")
        if sources and height is None:
            return self._bucket(sources[0], self.default_size)
        default = self.default_size
        return (
            default if height is None else whole_number("height", height),
            default if width is None else whole_number("width", width),
        )

    def sized(self, requests: Sequence[DrawingRequest], size: Size) -> RowEncoder:
        """The encoder padded for these requests.

        Raises:
          ValueError: one of them cannot be drawn.
        """
        query_grid = self.config.query_grid(*size)  # first: it checks the size
        grids = [self._source_grids(request.sources, size) for request in requests]
        every = [query_grid, *(grid for own in grids for grid in own)]
        if self.config.bridge.pathway is Pathway.VIT and len(set(every)) > 1:
            raise ValueError(
                f"pathway=vit draws a source on the grid of the output, {query_grid}; found {grids}"
            )
        rows = self.rows.sized(every, multiple=TOKEN_MULTIPLE)
        for request, own in zip(requests, grids, strict=True):
            rows.prompt(request.text, own, overflow="error")
        return rows

    def alike(self, requests: Sequence[DrawingRequest], size: Size, most: int) -> list[list[int]]:
        """The requests' numbers, at most `most` together and those together whose sources lie on the same grids."""
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            grids = tuple(self._source_grids(request.sources, size))
            groups.setdefault(grids, []).append(number)
        return [
            group[start : start + most]
            for group in groups.values()
            for start in range(0, len(group), most)
        ]

    def branch(
        self, branch: Branch, requests: Sequence[DrawingRequest], size: Size, rows: RowEncoder
    ) -> BranchInputs:
        """One guidance branch of requests that are `alike`, encoded by `sized`."""
        if branch is Branch.NOTHING:
            requests = [DrawingRequest(UNCONDITIONAL_PROMPT)] * len(requests)
        elif branch is Branch.SOURCE:
            requests = [DrawingRequest(RECONSTRUCTION_PROMPT, r.sources) for r in requests]
        grids = [self._source_grids(request.sources, size) for request in requests]
        prompts = [
            rows.prompt(request.text, own, overflow="error")
            for request, own in zip(requests, grids, strict=True)
        ]
        length = max(text_length(prompt.text_tokens) for prompt in prompts)
        count = len(requests[0].sources)
        encoded = [rows.prompt_row(prompt, text_length=length, sources=count) for prompt in prompts]
        arrays = {name: np.stack([row[name] for row in encoded]) for name in encoded[0]}
        if not count:
            return BranchInputs(prompt_batch(arrays))
        pairs = [
            [
                (source, *rows.source_sizes(grid))
                for source, grid in zip(_shown(request.sources), own, strict=True)
            ]
            for request, own in zip(requests, grids, strict=True)
        ]
        return BranchInputs(
            prompt_batch(arrays),
            images=rows.pack([source.load(*vit) for row in pairs for source, vit, _ in row]),
            place=arrays["place"],
            pixels=tuple([row[j][0].load(*row[j][2]) for row in pairs] for j in range(count)),
        )

    def _bucket(self, source: Image.Image, base: int) -> Size:
        buckets = make_buckets(base, multiple=self.config.dc_ae.ratio)
        bucket = nearest(buckets, source.height, source.width)
        return bucket.height, bucket.width

    def _source_grids(self, sources: Sequence[Image.Image], size: Size) -> list[tuple[int, int]]:
        """A source keeps its aspect and takes about as many tokens as the output; several lie on the grid of the output
        all, as in training, where a row has one grid."""
        if len(sources) > 1:
            return [self.config.source_grid(*size)] * len(sources)
        ratio = self.config.dc_ae.ratio
        base = max(1, round(math.sqrt(size[0] * size[1]) / ratio)) * ratio
        return [self.config.source_grid(*self._bucket(image, base)) for image in sources]

    # -- words

    def chat(
        self, question: str, images: Sequence[Picture]
    ) -> tuple[PaddedPrompt, PackedImages | None]:
        """A question after its pictures, and these as the ViT reads them.

        Raises:
          ValueError: it is too long, or one of the pictures is none or too narrow.
        """
        vision = self.config.vlm.vision
        low, high = self.rows.pixel_limits
        opened = [opened_picture(image) for image in images]
        sizes = [
            smart_size(i.height, i.width, unit=vision.unit, min_pixels=low, max_pixels=high)
            for i in opened
        ]
        grids = [(height // vision.unit, width // vision.unit) for height, width in sizes]
        rows = self.rows.sized(grids, multiple=TOKEN_MULTIPLE)
        tokens = rows.shapes.tokens
        prompt = rows.prompts.encode_user(
            question, grids, vae_tokens=False, source_tokens=tokens, open_image=False
        )
        length = text_length(prompt.text_tokens) + len(opened) * tokens
        pixels = [resize_rgb(i, *size) for i, size in zip(opened, sizes, strict=True)]
        return rows.prompts.pad(prompt, length), rows.pack(pixels) if pixels else None


def _shown(sources: Sequence[Image.Image]) -> list[data.Picture]:
    """As training shows the sources of an edit or of a composition."""
    pictures = [
        data.Picture(image.height, image.width, functools.partial(cover, image))
        for image in sources
    ]
    return pictures if len(pictures) == 1 else list(map(shown_whole, pictures))


def opened_picture(image: Picture) -> Image.Image:
    """A picture, or the file that it is in, upright and in RGB."""
    if isinstance(image, Image.Image):
        return upright_rgb(image, name="picture")
    if not isinstance(image, str | pathlib.Path):
        raise TypeError(f"picture: expected a PIL image or a path, found {type(image).__name__}")
    return open_picture(image, name=str(image))


def whole_number(name: str, value: int) -> int:
    """`value` as Python's int, whichever library's whole number it is."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, found {value!r}") from None


def text_length(tokens: int) -> int:
    """The static length that a prompt with `tokens` tokens of text is padded to."""
    return next(length for length in TEXT_LENGTHS if length >= tokens)
