"""Pictures that a command writes: PNG with the settings in their metadata, whole or not at all."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wemmu_jax.files import replacing

if TYPE_CHECKING:
    from PIL import Image

_OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
NAME_BYTES = 255  # of a file or folder, on every file system in use


def targets(out: str, names: Sequence[str], *, overwrite: bool) -> list[pathlib.Path]:
    """Where pictures go: `out` itself if it names a PNG, else `names` in the folder `out`.

    Raises:
      FileExistsError: one is there already, and `overwrite` is off.
      ValueError: several pictures for one file, a format other than PNG, or no file can be written there.
    """
    path = pathlib.Path(out)
    suffix = "" if os.path.isdir(path) else path.suffix.lower()
    if suffix in _OTHER_FORMATS:
        raise ValueError(f"--out {out}: pictures are written as PNG; give a folder or FILE.png")
    if suffix == ".png" and len(names) != 1:
        raise ValueError(f"--out {out}: {len(names)} pictures need a folder")
    paths = [path] if suffix == ".png" else [path / name for name in names]
    if path not in paths and os.path.isfile(path):
        raise FileExistsError(f"--out {out}: is a file; expected a folder or FILE.png")
    for one in paths:
        check_target(one, name="--out")
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{', '.join(there)}: there already; choose another --out, or give --overwrite"
        )
    return paths


def check_target(path: pathlib.Path, *, name: str) -> None:
    """Raises ValueError, led by `name`, if no file can be written at `path`: better than after drawing."""
    for part in path.parts:
        try:
            size = len(part.encode())
        except UnicodeEncodeError:
            raise ValueError(f"{name}: expected Unicode text, found {part!r}") from None
        if size > NAME_BYTES or "\0" in part:
            raise ValueError(
                f"{name}: expected names of at most {NAME_BYTES} bytes and no NUL, found {part!r}"
            )
    # Not the methods of `Path`, which raise for some of the paths that are to be named here.
    if os.path.isdir(path):
        raise ValueError(f"{name}: {path} is a folder; expected a file")
    nearest = next(folder for folder in path.parents if os.path.lexists(folder))
    if not os.path.isdir(nearest):
        raise ValueError(f"{name}: {nearest} is a file; {path} needs it as a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: {nearest} cannot be written to")


def file_name(number: int, text: str, seed: int) -> str:
    """A picture's name in a folder: '000-a-red-circle-seed0.png'."""
    words = re.findall(r"\w+", text.lower())
    slug = "-".join(words)[:40].strip("-")
    return "-".join(filter(None, [f"{number:03}", slug, f"seed{seed}.png"]))


def save(image: "Image.Image", path: pathlib.Path, settings: Mapping[str, str]) -> None:
    """Writes `image` as PNG with `settings` as its text chunks; it appears whole, under its name, or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in settings.items():
        info.add_text(name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def settings_of(path: pathlib.Path) -> dict[str, str]:
    """The text chunks of a PNG.

    Raises:
      ValueError: it is no PNG.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return {name: str(value) for name, value in getattr(image, "text", {}).items()}
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture") from None
