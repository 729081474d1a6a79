"""What a user calls: pictures from text, edits, compositions, reconstructions, answers.

model = WeMMU.load(path)
model.generate(["a red circle"], height=512, width=512, seed=0)[0].save("circle.png")
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from wemmu_jax.data.buckets import make_buckets, nearest
from wemmu_jax.data.pictures import cover, open_picture, upright_rgb
from wemmu_jax.data.prompts import RECONSTRUCTION_PROMPT
from wemmu_jax.diffusion import guidance as guides
from wemmu_jax.diffusion.guidance import Branch, Guidance
from wemmu_jax.diffusion.solvers import Solver
from wemmu_jax.inference.sampling import Canvas, Sampler, SolverSettings
from wemmu_jax.models.qwen2_5_vl.decode import Sampling, generate
from wemmu_jax.models.qwen2_5_vl.images import resize_rgb, smart_size
from wemmu_jax.models.qwen2_5_vl.prompt import Prompt
from wemmu_jax.models.wemmu.batch import PromptBatch, Sources
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder, prompt_batch
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.rng import Stream, stream_key
from wemmu_jax.training.checkpoints import Origin

TEXT_LENGTHS = (
    128,
    256,
    512,
)  # prompts are padded to one of these, so that few programs are compiled
TOKEN_MULTIPLE = 64

Picture = Image.Image | str | pathlib.Path


@dataclasses.dataclass(frozen=True)
class WeMMU:
    """A model with its weights, ready for requests.

    Attributes:
      model: the parts.
      params: the whole parameter tree.
      encoder: tokenizer and picture preprocessing.
      default_size: side in pixels of the pictures that the DiT was made for.
      batch_size: how many pictures are drawn at a time; which pictures they are does not depend on it.
      solver: how the flow is integrated.
      shift: moves the solver's times towards noise; Sana's 3.
    """

    model: WeMMUModel
    params: Mapping
    encoder: RowEncoder
    default_size: int
    batch_size: int = 4
    solver: Solver = Solver.DPM_SOLVER_PP
    shift: float = 3.0

    @classmethod
    def load(cls, path: str | pathlib.Path, *, dtype=jnp.bfloat16) -> "WeMMU":
        """Reads what `wemmu convert` or training wrote.

        Converted backbones have no trained bridge: `chat` works, pictures will be noise, and a line on stderr
        says so.

        Args:
          path: a converted folder or a training workdir.
          dtype: type of the weights in memory and of the large products.

        Raises:
          FileNotFoundError: there are no weights at `path`.
          ValueError: they are damaged or do not fit their configs.
        """
        origin = Origin(path)
        bare = cls._bare(origin, dtype)
        params = origin.load(dtype=lambda _: dtype)
        if origin.bridge is None:
            print(f"{path}: no trained bridge here; drawing one from seed 0", file=sys.stderr)
            fresh = bare.model.init_bridge(stream_key(0, Stream.INIT), params["vlm"]["text"])
            params |= jax.tree.map(lambda leaf: leaf.astype(dtype), fresh)
        return dataclasses.replace(bare, params=params)

    @classmethod
    def without_weights(cls, path: str | pathlib.Path, *, dtype=jnp.bfloat16) -> "WeMMU":
        """As `load`, but its weights are left where they are: good for `check` and `check_chat` alone."""
        return cls._bare(Origin(path), dtype)

    @classmethod
    def _bare(cls, origin: Origin, dtype) -> "WeMMU":
        bridge = BridgeConfig.from_dict(origin.bridge or {})
        config = WeMMUConfig.from_folder(origin.backbones_folder, bridge)
        model = WeMMUModel(config, dtype=jnp.dtype(dtype))
        return cls.from_params(model, {}, origin.backbones_folder)

    @classmethod
    def from_params(
        cls, model: WeMMUModel, params: Mapping, backbones: str | pathlib.Path
    ) -> "WeMMU":
        """A model around weights that are in memory; `backbones` is the converted folder with the tokenizer."""
        dit = json.loads((pathlib.Path(backbones) / "sana/transformer/config.json").read_text())
        encoder = RowEncoder.load(backbones, model.config)
        return cls(model, params, encoder, dit["sample_size"] * model.config.dc_ae.ratio)

    # -- pictures

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int = 20,
        guidance: float = 4.0,
    ) -> list[Image.Image]:
        """Text to image (paper, Eq. 5). Picture i is number i under `seed`.

        Args:
          prompts: one caption or several; an empty one draws unconditionally.
          height, width: pixels, multiples of the autoencoder's ratio; the DiT's own size by default.
          seed: the same seed gives the same pictures.
          steps: of the solver.
          guidance: scale; 1 is the plain conditional.

        Raises:
          ValueError: a size that cannot be drawn, or a prompt past 512 tokens.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        size = self._output_size((), height, width)
        requests = [(prompt, ()) for prompt in prompts]
        return self._draw(requests, size, guides.request_guidance(guidance), seed, steps)

    def edit(
        self,
        image: Picture,
        instruction: str,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int = 20,
        image_guidance: float = 2.0,
        edit_guidance: float = 3.0,
    ) -> Image.Image:
        """Edits one picture (Eq. 6); its size is the bucket nearest to the source unless one is given."""
        source = _opened(image)
        size = self._output_size((source,), height, width)
        guidance = guides.edit_guidance(image=image_guidance, edit=edit_guidance)
        return self._draw([(instruction, (source,))], size, guidance, seed, steps)[0]

    def compose(
        self,
        images: Sequence[Picture],
        instruction: str,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int = 20,
        guidance: float = 3.0,
    ) -> Image.Image:
        """One picture out of several (Eq. 7); its size is the bucket nearest to the first unless one is given."""
        sources = tuple(_opened(image) for image in images)
        if len(sources) < 2:
            raise ValueError(f"compose needs at least 2 pictures, found {len(sources)}")
        size = self._output_size(sources, height, width)
        scale = guides.request_guidance(guidance)
        return self._draw([(instruction, sources)], size, scale, seed, steps)[0]

    def reconstruct(
        self,
        image: Picture,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int = 20,
        guidance: float = 2.0,
    ) -> Image.Image:
        """The same picture again: the reconstruction branch of Eq. 6 alone."""
        source = _opened(image)
        size = self._output_size((source,), height, width)
        scale = guides.request_guidance(guidance)
        return self._draw([(RECONSTRUCTION_PROMPT, (source,))], size, scale, seed, steps)[0]

    def check(
        self,
        instruction: str,
        images: Sequence[Picture] = (),
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[int, int]:
        """Raises what drawing this request would raise, without drawing it; (height, width) of its picture."""
        sources = tuple(_opened(image) for image in images)
        size = self._output_size(sources, height, width)
        self._encoder_for([(instruction, sources)], size)
        return size

    # -- words

    def chat(
        self,
        question: str,
        *,
        images: Sequence[Picture] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """What the frozen VLM answers, pictures before the question; greedy at temperature 0."""
        encoder, prompt, pixels = self._chat_prompt(question, images)
        room = len(pixels) * encoder.shapes.tokens
        padded = encoder.prompts.pad(prompt, _text_length(prompt.text_tokens) + room)
        packed = encoder.pack(pixels) if pixels else None
        embeds = self._embed(
            self.params["vlm"], padded.tokens[None], padded.feature_index[None], packed
        )
        answer = generate(
            self.model.text,
            self.params["vlm"]["text"],
            embeds,
            jnp.asarray(padded.position_ids[:, None]),
            jnp.asarray(padded.valid[None]),
            jnp.asarray([prompt.next_position]),
            max_new_tokens=max_new_tokens,
            eos_ids=encoder.prompts.eos_ids,
            sampling=Sampling(temperature=temperature, top_p=top_p),
            key=stream_key(seed, Stream.SAMPLER),
        )
        return encoder.prompts.decode(np.asarray(answer.tokens[0, : int(answer.lengths[0])]))

    def check_chat(self, question: str, images: Sequence[Picture] = ()) -> None:
        """Raises what answering would raise about the question and its pictures, without answering."""
        self._chat_prompt(question, images)

    # -- details

    @functools.cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.model)

    @functools.cached_property
    def _embed(self):
        return jax.jit(self.model.embed_prompt)

    def _chat_prompt(
        self, question: str, images: Sequence[Picture]
    ) -> tuple[RowEncoder, Prompt, list[np.ndarray]]:
        """The encoder for pictures of these sizes, the prompt, and the pictures as the ViT reads them."""
        vision = self.model.config.vlm.vision
        low, high = self.encoder.pixel_limits
        opened = [_opened(image) for image in images]
        sizes = [
            smart_size(i.height, i.width, unit=vision.unit, min_pixels=low, max_pixels=high)
            for i in opened
        ]
        grids = [(height // vision.unit, width // vision.unit) for height, width in sizes]
        encoder = self.encoder.sized(grids, multiple=TOKEN_MULTIPLE)
        prompt = encoder.prompts.encode_user(
            question,
            grids,
            vae_tokens=False,
            source_tokens=encoder.shapes.tokens,
            open_image=False,
        )
        pixels = [resize_rgb(i, *size) for i, size in zip(opened, sizes, strict=True)]
        return encoder, prompt, pixels

    def _output_size(
        self, sources: Sequence[Image.Image], height: int | None, width: int | None
    ) -> tuple[int, int]:
        """What is asked for; else the bucket nearest to the first source, or the DiT's own size."""
        if sources and (height is None) != (width is None):
            raise ValueError("give both height and width, or neither")
        if sources and height is None:
            return self._bucket(sources[0], self.default_size)
        default = self.default_size
        return default if height is None else height, default if width is None else width

    def _bucket(self, source: Image.Image, base: int) -> tuple[int, int]:
        buckets = make_buckets(base, multiple=self.model.config.dc_ae.ratio)
        bucket = nearest(buckets, source.height, source.width)
        return bucket.height, bucket.width

    def _source_grids(
        self, sources: Sequence[Image.Image], size: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """Each source keeps its aspect and takes about as many tokens as the output, as in training."""
        ratio = self.model.config.dc_ae.ratio
        base = max(1, round(math.sqrt(size[0] * size[1]) / ratio)) * ratio
        return [self.model.config.source_grid(*self._bucket(image, base)) for image in sources]

    def _draw(
        self,
        requests: Sequence[tuple[str, tuple[Image.Image, ...]]],
        size: tuple[int, int],
        guidance: Guidance,
        seed: int,
        steps: int,
    ) -> list[Image.Image]:
        """One picture for each (text, source pictures); all requests have the same number of sources."""
        if not requests:
            raise ValueError("no prompts")
        encoder = self._encoder_for(requests, size)
        canvas = Canvas(*size, self.model.config.query_grid(*size), encoder.shapes.tokens)
        settings = SolverSettings(steps=steps, shift=self.shift, solver=self.solver)
        pictures: list[Image.Image] = []
        for start in range(0, len(requests), self.batch_size):
            chunk = list(requests[start : start + self.batch_size])
            branches = [self._branch(branch, chunk, size, encoder) for branch in guidance.branches]
            pixels = self._sampler(
                self.params,
                branches,
                guidance=guidance,
                canvas=canvas,
                settings=settings,
                seed=seed,
                numbers=jnp.arange(start, start + len(chunk), dtype=jnp.uint32),
            )
            pictures += [Image.fromarray(picture) for picture in np.asarray(pixels)]
        return pictures

    def _encoder_for(
        self, requests: Sequence[tuple[str, tuple[Image.Image, ...]]], size: tuple[int, int]
    ) -> RowEncoder:
        """The encoder padded for these requests, once it is known that all of them can be drawn."""
        query_grid = self.model.config.query_grid(*size)  # first: it checks the size
        grids = [self._source_grids(images, size) for _, images in requests]
        every = [query_grid, *(grid for own in grids for grid in own)]
        encoder = self.encoder.sized(every, multiple=TOKEN_MULTIPLE)
        for (text, _), own in zip(requests, grids, strict=True):
            encoder.prompt(text, own, overflow="error")
        return encoder

    def _branch(
        self,
        branch: Branch,
        requests: Sequence[tuple[str, tuple[Image.Image, ...]]],
        size: tuple[int, int],
        encoder: RowEncoder,
    ) -> tuple[PromptBatch, Sources | None]:
        """The prompts and pictures of one guidance branch."""
        if branch is Branch.NOTHING:
            requests = [("", ())] * len(requests)
        elif branch is Branch.SOURCE:
            requests = [(RECONSTRUCTION_PROMPT, images) for _, images in requests]
        pictures = [images for _, images in requests]
        grids = [self._source_grids(images, size) for images in pictures]
        prompts = [
            encoder.prompt(text, own, overflow="error")
            for (text, _), own in zip(requests, grids, strict=True)
        ]
        length = max(_text_length(prompt.text_tokens) for prompt in prompts)
        count = len(pictures[0])
        rows = [encoder.prompt_row(prompt, text_length=length, sources=count) for prompt in prompts]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if not count:
            return prompt_batch(arrays), None
        sizes = [[encoder.source_sizes(grid) for grid in own] for own in grids]
        packed = encoder.pack(
            [
                cover(image, *vit)
                for images, own in zip(pictures, sizes, strict=True)
                for image, (vit, _) in zip(images, own, strict=True)
            ]
        )
        latents = tuple(
            jnp.concatenate(
                [
                    self._sampler.encode(self.params, cover(images[j], *own[j][1])[None])
                    for images, own in zip(pictures, sizes, strict=True)
                ]
            )
            for j in range(count)
        )
        return prompt_batch(arrays), Sources(packed, arrays["place"], latents)


def _text_length(tokens: int) -> int:
    return next(length for length in TEXT_LENGTHS if length >= tokens)


def _opened(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return upright_rgb(image, name="picture")
    return open_picture(image, name=str(image))
