"""The peer: torch's DataLoader, webdataset, Pillow, and transformers' image processor and tokenizer, as a PyTorch user
puts them together, giving the tensors that our pipeline gives. Used by `data_pipeline`."""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.prompts import RECONSTRUCTION_PROMPT
from wemmu_jax.data.tasks import Task

TEXT_LENGTH = 128

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Tools:
    """Processor and tokenizer with the settings that give our tensors; sizes of the target, for ViT and DC-AE."""

    processor: object
    tokenizer: object
    target: Size
    vit: Size
    vae: Size

    @classmethod
    def load(cls, vlm: pathlib.Path, bucket: Bucket, vit: Size, vae: Size) -> "Tools":
        """From the VLM's folder."""
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        processor = Qwen2VLImageProcessorPil(do_resize=False)
        tokenizer = AutoTokenizer.from_pretrained(vlm)
        return cls(processor, tokenizer, (bucket.height, bucket.width), vit, vae)


def batches(
    tools: Tools, tars: Mapping[Task, str], tasks: list[Task], *, rows: int, processes: int
) -> Iterator[int]:
    """Rows of each batch, which has one task; `tasks` take turns. Every task has a loader and processes of its own."""
    import torch
    import webdataset

    def loader(task: Task):
        data = webdataset.WebDataset(
            tars[task], shardshuffle=False, resampled=True, nodesplitter=webdataset.split_by_node
        )
        data = data.shuffle(100).map(functools.partial(make_row, tools, task))
        return iter(torch.utils.data.DataLoader(data, batch_size=rows, num_workers=processes))

    loaders = {task: loader(task) for task in tasks}
    while True:
        for task in tasks:
            yield len(next(loaders[task])["target"])


def make_row(tools: Tools, task: Task, sample: Mapping[str, bytes]) -> dict:
    """A sample as torch tensors."""
    import torch

    image = _decode(sample["jpg"])
    row = {"target": torch.from_numpy(pillow_cover(image, *tools.target))}
    text = RECONSTRUCTION_PROMPT if task is Task.REC else sample["txt"].decode()
    content, length = [{"type": "text", "text": text}], TEXT_LENGTH
    if task is not Task.T2I:
        source = image if task is Task.REC else _decode(sample["source.jpg"])
        pixels = tools.processor(images=pillow_cover(source, *tools.vit), return_tensors="pt")
        row["patches"] = pixels["pixel_values"]
        row["source_pixels"] = torch.from_numpy(pillow_cover(source, *tools.vae))
        content.insert(0, {"type": "image"})
    prompt = tools.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    if task is not Task.T2I:
        tokens = 2 * int(pixels["image_grid_thw"].prod()) // 4  # for the ViT's and for the DC-AE's
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens)
        length += tokens
    prompt += "<|vision_start|>"
    ids = tools.tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return row | {"tokens": ids["input_ids"][0], "valid": ids["attention_mask"][0]}


def pillow_cover(image: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8[height, width, 3]: scaled to cover the size and cropped at the centre by Pillow."""
    scale = max(height / image.height, width / image.width)
    tall, wide = min(height / scale, image.height), min(width / scale, image.width)
    top, left = (image.height - tall) / 2, (image.width - wide) / 2
    box = (left, top, left + wide, top + tall)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
