"""What a user calls: pictures from text, edits, compositions, reconstructions, answers.

model = WeMMU.load(path)
model.generate(["a red circle"], height=512, width=512, seed=0)[0].save("circle.png")
"""

import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from wemmu_jax.data.prompts import RECONSTRUCTION_PROMPT
from wemmu_jax.diffusion import guidance as guides
from wemmu_jax.diffusion.guidance import PAPER, Guidance, Scales
from wemmu_jax.diffusion.solvers import Solver
from wemmu_jax.files import read_object
from wemmu_jax.inference.requests import (
    BranchInputs,
    DrawingRequest,
    Picture,
    RequestEncoder,
    opened_picture,
    whole_number,
)
from wemmu_jax.inference.sampling import Canvas, Sampler, SolverSettings
from wemmu_jax.models.qwen2_5_vl.decode import Sampling
from wemmu_jax.models.wemmu.batch import PromptBatch, Sources
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.rng import Stream, stream_key
from wemmu_jax.sharding.processes import on_host
from wemmu_jax.training.origin import Origin

# JAX takes a seed as 32 bits.
SEEDS = 2**32
SHIFT = 3.0  # of Sana, and where a scheduler's config says nothing


@dataclasses.dataclass(frozen=True)
class WeMMU:
    """A model with its weights, ready for requests.

    Attributes:
      model: the parts.
      params: the whole parameter tree.
      requests: sizes, tokenizer and picture preprocessing.
      batch_size: how many pictures are drawn at a time; which pictures they are does not depend on it.
      solver: how the flow is integrated.
      shift: moves the solver's times towards noise; `flow_shift` of the DiT's scheduler, Sana's 3.
      scales: of guidance, for requests that name none; those of the file sana/guidance.json, else the paper's.
      identity: which weights these are, see `Origin.identity`; empty for weights that come from memory.
    """

    model: WeMMUModel
    params: Mapping
    requests: RequestEncoder
    batch_size: int = 4
    solver: Solver = Solver.DPM_SOLVER_PP
    shift: float = SHIFT
    scales: Scales = PAPER
    identity: str = ""

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
        origin.check(bare.model)
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
        bare = cls.from_params(model, {}, origin.backbones_folder)
        return dataclasses.replace(bare, identity=origin.identity)

    @classmethod
    def from_params(
        cls, model: WeMMUModel, params: Mapping, backbones: str | pathlib.Path
    ) -> "WeMMU":
        """A model around weights that are in memory; `backbones` is the converted folder with the tokenizer."""
        requests = RequestEncoder.load(backbones, model.config)
        sana = pathlib.Path(backbones) / "sana"
        scales = Scales.read(sana / "guidance.json")
        return cls(model, params, requests, shift=_flow_shift(sana), scales=scales)

    @property
    def default_size(self) -> int:
        """Side in pixels of the pictures that the DiT was made for."""
        return self.requests.default_size

    # -- pictures

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int = 20,
        guidance: float | None = None,
    ) -> list[Image.Image]:
        """Text to image (paper, Eq. 5). Picture i is number i under `seed`.

        Args:
          prompts: one caption or several; an empty one draws unconditionally.
          height, width: pixels, multiples of the autoencoder's ratio; the DiT's own size by default.
          seed: the same seed gives the same pictures.
          steps: of the solver.
          guidance: scale; 1 is the plain conditional. The model's own (`scales`) by default, here and below.

        Raises:
          ValueError: a size that cannot be drawn, or a prompt past 512 tokens.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        size = self.requests.output_size((), height, width)
        requests = [DrawingRequest(prompt) for prompt in prompts]
        scale = guides.request_guidance(_or(guidance, self.scales.generate))
        return self.draw(requests, size=size, guidance=scale, seed=seed, steps=steps)

    def edit(
        self,
        image: Picture,
        instruction: str,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int = 20,
        image_guidance: float | None = None,
        edit_guidance: float | None = None,
    ) -> Image.Image:
        """Edits one picture (Eq. 6); its size is the bucket nearest to the source unless one is given."""
        source = opened_picture(image)
        size = self.requests.output_size((source,), height, width)
        guidance = guides.edit_guidance(
            image=_or(image_guidance, self.scales.image), edit=_or(edit_guidance, self.scales.edit)
        )
        request = DrawingRequest(instruction, (source,))
        return self.draw([request], size=size, guidance=guidance, seed=seed, steps=steps)[0]

    def compose(
        self,
        images: Sequence[Picture],
        instruction: str,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int = 20,
        guidance: float | None = None,
    ) -> Image.Image:
        """One picture out of several (Eq. 7); its size is the bucket nearest to the first unless one is given."""
        sources = tuple(opened_picture(image) for image in images)
        if len(sources) < 2:
            raise ValueError(f"compose needs at least 2 pictures, found {len(sources)}")
        size = self.requests.output_size(sources, height, width)
        scale = guides.request_guidance(_or(guidance, self.scales.compose))
        request = DrawingRequest(instruction, sources)
        return self.draw([request], size=size, guidance=scale, seed=seed, steps=steps)[0]

    def reconstruct(
        self,
        image: Picture,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int = 20,
        guidance: float | None = None,
    ) -> Image.Image:
        """The same picture again: the reconstruction branch of Eq. 6 alone."""
        source = opened_picture(image)
        size = self.requests.output_size((source,), height, width)
        scale = guides.request_guidance(_or(guidance, self.scales.reconstruct))
        request = DrawingRequest(RECONSTRUCTION_PROMPT, (source,))
        return self.draw([request], size=size, guidance=scale, seed=seed, steps=steps)[0]

    def draw(
        self,
        requests: Sequence[DrawingRequest],
        *,
        size: tuple[int, int],
        guidance: Guidance,
        seed: int = 0,
        steps: int = 20,
    ) -> list[Image.Image]:
        """One picture for each request: what the methods above do, for many requests at once.

        Args:
          requests: with any sources; those whose sources are alike are drawn together. Picture i is number i under
            `seed`.
          size: (height, width) of all pictures.
          guidance: how the branches are weighed.
          seed, steps: as in `generate`.

        Raises:
          ValueError: as `generate`, and for guidance that is not finite.
        """
        if not requests:
            raise ValueError("no prompts")
        if not all(math.isfinite(weight) for _, weight in guidance.weights):
            raise ValueError("guidance: expected finite scales")
        seed, steps = _checked_seed(seed), whole_number("steps", steps)
        rows = self.requests.sized(requests, size)
        canvas = Canvas(*size, self.model.config.query_grid(*size), rows.shapes.tokens)
        settings = SolverSettings(steps=steps, shift=self.shift, solver=self.solver)
        pictures: dict[int, Image.Image] = {}
        for numbers in self.requests.alike(requests, size, self.batch_size):
            chunk = [requests[number] for number in numbers]
            branches = [
                self.with_latents(self.requests.branch(branch, chunk, size, rows))
                for branch in guidance.branches
            ]
            pixels = self._sampler(
                self.params,
                branches,
                guidance=guidance,
                canvas=canvas,
                settings=settings,
                seed=seed,
                numbers=jnp.asarray(numbers, jnp.uint32),
            )
            pictures |= zip(numbers, map(Image.fromarray, on_host(pixels)), strict=True)
        return [pictures[number] for number in range(len(requests))]

    def check(
        self,
        instruction: str,
        images: Sequence[Picture] = (),
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[int, int]:
        """Raises what drawing this request would raise, without drawing it; (height, width) of its picture."""
        sources = tuple(opened_picture(image) for image in images)
        size = self.requests.output_size(sources, height, width)
        self.requests.sized([DrawingRequest(instruction, sources)], size)
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
        seed = _checked_seed(seed)
        prompt, packed = self.requests.chat(question, images)
        embeds = self._sampler.embed(
            self.params["vlm"], prompt.tokens[None], prompt.feature_index[None], packed
        )
        prompts = self.requests.rows.prompts
        answer = self._sampler.answer(
            self.model.text,
            self.params["vlm"]["text"],
            embeds,
            jnp.asarray(prompt.position_ids[:, None]),
            jnp.asarray(prompt.valid[None]),
            jnp.asarray([prompt.next_position]),
            max_new_tokens=max_new_tokens,
            eos_ids=prompts.eos_ids,
            sampling=Sampling(temperature=temperature, top_p=top_p),
            key=stream_key(seed, Stream.SAMPLER),
        )
        return prompts.decode(np.asarray(answer.tokens[0, : int(answer.lengths[0])]))

    def check_chat(self, question: str, images: Sequence[Picture] = ()) -> None:
        """Raises what answering would raise about the question and its pictures, without answering."""
        self.requests.chat(question, images)

    # -- details

    @property
    def _sampler(self) -> Sampler:
        return _compiled(self.model)

    def with_latents(self, inputs: BranchInputs) -> tuple[PromptBatch, Sources | None]:
        """The same with the source pictures' latents."""
        if inputs.images is None:
            return inputs.prompt, None
        # One at a time, so that one program serves any number of them.
        latents = tuple(
            jnp.concatenate([self._sampler.encode(self.params, one[None]) for one in pixels])
            for pixels in inputs.pixels
        )
        return inputs.prompt, Sources(inputs.images, inputs.place, latents)


def _or(scale: float | None, default: float) -> float:
    return default if scale is None else scale


def _flow_shift(sana: pathlib.Path) -> float:
    file = sana / "scheduler/scheduler_config.json"
    shift = read_object(file).get("flow_shift", SHIFT) if file.exists() else SHIFT
    if type(shift) not in (int, float) or not 0 < shift < math.inf:
        raise ValueError(f"{file}: flow_shift: expected a finite number above 0, found {shift!r}")
    return float(shift)


def _checked_seed(seed: int) -> int:
    seed = whole_number("seed", seed)
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed: expected 0 to {SEEDS - 1}, found {seed}")
    return seed


@functools.lru_cache(maxsize=4)
def _compiled(model: WeMMUModel) -> Sampler:
    """Kept beyond one `WeMMU`: training wraps its new weights in a new one each time that it draws samples."""
    return Sampler(model)
