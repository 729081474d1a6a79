"""Every kind of picture file that a camera, scanner or paint program leaves, and those that are broken."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from wemmu_jax.data.pictures import cover, lazy_picture, open_picture, picture_size, shown_whole
from wemmu_jax.data.records import Picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def quarters(height=40, width=60):
    """Red, green over blue, white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, GREEN
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = BLUE, WHITE
    return Image.fromarray(pixels)


def corners(image):
    pixels = np.asarray(image).astype(int)
    return np.array([pixels[3, 3], pixels[3, -4], pixels[-4, 3], pixels[-4, -4]])


PLAIN = np.array([RED, GREEN, BLUE, WHITE])


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (saved(quarters()), 0),
        (saved(quarters(), "JPEG", quality=95, subsampling=0), 6),
        (saved(quarters(), "WEBP", lossless=True), 0),
        (saved(quarters().convert("CMYK"), "JPEG", quality=95), 8),
        (saved(quarters().quantize(8)), 0),
        (saved(quarters().convert("RGBA")), 0),
        (saved(quarters().quantize(8), "GIF"), 0),
    ],
    ids=["png", "jpeg", "webp", "cmyk", "palette", "rgba", "gif"],
)
def test_colour_kinds(data, tolerance):
    image = open_picture(data, name="it")
    assert image.mode == "RGB" and image.size == (60, 40)
    assert np.abs(corners(image) - PLAIN).max() <= tolerance
    assert picture_size(data, name="it") == (40, 60)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(form):
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    image = open_picture(saved(Image.fromarray(values), form), name="it")
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert image.mode == "RGB"


def test_32_bit_grey_that_holds_16_bits_is_16_bit_grey():
    values = np.array([[0, 256, 32768, 65535]], np.int32)
    image = open_picture(saved(Image.fromarray(values), "TIFF"), name="it")
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_one_bit_and_grey():
    for mode in ("1", "L"):
        image = open_picture(saved(Image.new(mode, (4, 4), 255)), name="it")
        assert (np.asarray(image) == 255).all() and image.mode == "RGB"


def test_transparency_shows_white():
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert (
        np.abs(np.asarray(open_picture(saved(half), name="it"))[0, 0] - (255, 127, 127)).max() <= 1
    )
    grey = Image.new("LA", (8, 8), (10, 0))
    assert (np.asarray(open_picture(saved(grey), name="it")) == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9])
    assert (np.asarray(open_picture(saved(palette, transparency=0), name="it")) == 255).all()


# What a camera that is held so does to a picture.
HELD = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_exif_rotation(form, orientation):
    """What a viewer shows is the same picture whichever way the camera was held."""
    stored = quarters().transpose(HELD[orientation]) if orientation in HELD else quarters()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = saved(stored, form, exif=exif, **options.get(form, {}))
    image = open_picture(data, name="it")
    assert image.size == (60, 40) and np.abs(corners(image) - PLAIN).max() <= 6
    assert picture_size(data, name="it") == (40, 60)


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "WEBP"])
def test_rotation_by_xmp(form):
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    options = {"tiffinfo": {700: xmp}} if form == "TIFF" else {"xmp": xmp}
    data = saved(quarters().transpose(HELD[6]), form, quality=95, **options)
    assert open_picture(data, name="it").size == (60, 40)
    assert picture_size(data, name="it") == (40, 60)


def bomb():
    """A PNG of a few bytes that says that it is 60,000 pixels square."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"dir/x\.png: empty"),
        (b"no picture at all", r"dir/x\.png: not a picture"),
        (b"<html>404</html>", r"dir/x\.png: not a picture"),
        (saved(quarters(200, 300), "JPEG")[:1500], r"dir/x\.png: cannot be decoded"),
        (saved(quarters(200, 300))[:-30], r"dir/x\.png: cannot be decoded"),
        (bomb(), r"dir/x\.png: .*(60000x60000|3600000000) pixels"),
        (saved(Image.new("RGB", (9500, 9500))), r"dir/x\.png: 9500x9500 pixels"),
        (saved(Image.new("F", (4, 4)), "TIFF"), r"dir/x\.png: floating-point"),
        (saved(Image.new("I", (4, 4), 65536), "TIFF"), r"dir/x\.png: integer .* to 65536 have no"),
        (saved(Image.new("I", (4, 4), -1), "TIFF"), r"dir/x\.png: integer pixels from -1 to"),
    ],
    ids=[
        *["empty", "text", "html", "cut jpeg", "cut png", "bomb", "large"],
        *["float", "32 bits", "negative"],
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_pictures_are_one_clear_error(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_picture(data, name="dir/x.png")
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_picture(tmp_path / "x.png", name="dir/x.png")


def test_a_flipped_byte_never_gives_another_error():
    """Whatever bytes come, the outcome is a picture or a ValueError."""
    rng = np.random.default_rng(0)
    kinds = [saved(quarters(), form) for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")]
    outcomes = set()
    for data in kinds * 40:
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            broken[place] = rng.integers(256)
        for read in (open_picture, picture_size):
            try:
                read(bytes(broken), name="it")
                outcomes.add("picture")
            except ValueError:
                outcomes.add("error")
    assert outcomes == {"picture", "error"}


def test_no_such_file():
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        open_picture("/nowhere.png", name="nowhere")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (20, 10_000), (10_000, 20), (333, 517)])
@pytest.mark.parametrize("wanted", [(64, 64), (32, 128), (1036, 504), (1, 1)])
def test_any_size_covers_any_size(size, wanted):
    image = Image.new("RGB", size[::-1], (10, 200, 30))
    pixels = cover(open_picture(saved(image), name="it"), *wanted)
    assert pixels.shape == (*wanted, 3) and pixels.dtype == np.uint8
    assert (pixels == (10, 200, 30)).all(), "no border comes in"


def test_cover_crops_the_centre_and_no_more_than_needed():
    ramp = np.arange(200, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (100, 200, 3)).copy())
    square = cover(image, 100, 100)
    assert np.array_equal(square, np.asarray(image)[:, 50:150])
    assert np.array_equal(cover(image, 100, 200), np.asarray(image))
    half = cover(image, 50, 100).astype(int)[0, :, 0]
    assert np.abs(half[2:-2] - (2 * np.arange(100) + 0.5)[2:-2]).max() <= 1


def test_shrinking_is_antialiased():
    """A one-pixel checkerboard shrinks to grey, not to stripes."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = cover(Image.fromarray(np.stack([board] * 3, -1)), 60, 60)
    assert np.abs(small.astype(int) - 127).max() <= 3


def test_a_picture_is_read_once():
    parts = [saved(quarters())]
    picture = lazy_picture(parts.pop, (40, 60), name="a.png")
    assert (picture.height, picture.width) == (40, 60)
    first = picture.load(28, 28)
    assert np.array_equal(picture.load(28, 28), first) and picture.load(32, 64).shape == (32, 64, 3)


@pytest.mark.parametrize(
    ("size", "asked", "inside"),
    [
        ((40, 60), (40, 64), (slice(0, 40), slice(0, 64))),  # 6% cropped
        ((40, 60), (48, 48), (slice(8, 40), slice(0, 48))),
        ((60, 40), (48, 48), (slice(0, 48), slice(8, 40))),
        ((10, 3000), (32, 64), (slice(15, 16), slice(0, 64))),
    ],
)
def test_pictures_of_a_composition_are_whole(size, asked, inside):
    data = saved(Image.new("RGB", size[::-1], RED))
    picture = lazy_picture(lambda: data, size, name="a.png", identity=(1, 2))
    whole = shown_whole(picture)
    pixels = whole.load(*asked)
    assert pixels.shape == (*asked, 3) and (pixels[inside] == RED).all()
    rest = np.ones(asked, bool)
    rest[inside] = False
    assert (pixels[rest] == WHITE).all()
    assert (whole.height, whole.width) == size and whole.identity != picture.identity


def test_a_drawn_picture_fills_every_size():
    drawn = Picture(None, None, lambda height, width: np.zeros((height, width, 3), np.uint8))
    assert shown_whole(drawn) is drawn
