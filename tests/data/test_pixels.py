"""Bytes to pixels: every kind of image that data sets hold, and every kind that is refused."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes_on_disk import encoded, pictures

from flashdmd_ray.data.pixels import MAX_PIXELS, decode, image_facts
from flashdmd_ray.data.sample import BadSample


def picture(width=24, height=24):
    return pictures(1)[0][1].resize((width, height), Image.Resampling.BICUBIC)


def png_header(width, height):
    """A PNG that says it is this large, without any pixels."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    end = b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, end)
    )


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats_keep_every_pixel(format):
    image = picture().quantize(64).convert("RGB")  # GIF has no more colours
    assert np.array_equal(decode(encoded(image, format), (24, 24)), np.asarray(image))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_close(format):
    image = picture(96, 96)
    assert np.abs(decode(encoded(image, format, quality=95), (96, 96)).astype(int) - np.asarray(image)).mean() < 6


def test_an_image_is_cropped_around_its_centre_to_the_aspect_ratio():
    """Left to right: a third each of red, green, blue. A square crop sees green alone, a wide one all three."""
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste((0, 255, 0), (100, 0, 200, 100))
    wide.paste((0, 0, 255), (200, 0, 300, 100))
    square = decode(encoded(wide), (50, 50))
    assert np.array_equal(square[:, 3:-3], np.tile(np.array([0, 255, 0], np.uint8), (50, 44, 1)))
    assert square[..., 1].min() > 230  # the filter sees a little of what is beside the crop
    strip = decode(encoded(wide), (10, 30))
    assert strip.shape == (10, 30, 3)
    assert [strip[5, x].argmax() for x in (2, 15, 27)] == [0, 1, 2]


@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.tuples(st.integers(1, 64), st.integers(1, 64)))
@settings(max_examples=40, deadline=None)
def test_any_shape_fits_any_size(width, height, size):
    """A constant image stays that constant, whatever is cropped and resized."""
    for format in ("PNG", "JPEG"):
        pixels = decode(encoded(Image.new("RGB", (width, height), (200, 200, 200)), format), size)
        assert pixels.shape == (*size, 3)
        assert np.abs(pixels.astype(int) - 200).max() <= 2


def test_a_large_jpeg_read_small_is_what_a_full_read_gives():
    """Decoding at a fraction of the size is a shortcut, visible only as rounding."""
    photo = picture(1024, 1024)
    data = encoded(photo, "JPEG", quality=95)
    full = np.asarray(Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.LANCZOS))
    assert np.abs(decode(data, (64, 64)).astype(int) - full).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = picture(32, 16)
    stored = upright
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    assert image_facts(io.BytesIO(data), len(data)) == (32, 16, ())
    assert np.array_equal(decode(data, (16, 32)), np.asarray(upright))


def test_sixteen_bits_are_scaled_not_cut():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    pixels = decode(encoded(Image.fromarray(ramp)), (16, 16))
    assert np.array_equal(pixels, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


def test_gray_palette_and_one_bit_become_rgb():
    gray = picture().convert("L")
    assert np.array_equal(decode(encoded(gray), (24, 24))[..., 1], np.asarray(gray))
    palette = picture().quantize(16)
    assert np.array_equal(decode(encoded(palette), (24, 24)), np.asarray(palette.convert("RGB")))
    bits = gray.convert("1")
    assert np.array_equal(decode(encoded(bits), (24, 24))[..., 0], np.asarray(bits.convert("L")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (10, 20, 30, 255))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
        image.info["transparency"] = image.getpixel((0, 0))
        data = encoded(image, "PNG", transparency=image.getpixel((0, 0)))
    else:
        data = encoded(image.convert(mode))
    pixels = decode(data, (4, 4))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].max() < 60


def test_cmyk_is_converted():
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow: red
    assert decode(encoded(inks, "TIFF"), (8, 8))[4, 4].tolist() == [255, 0, 0]
    red = decode(encoded(inks, "JPEG", quality=100), (8, 8))[4, 4]
    assert red[0] > 250
    assert red[1:].max() < 5


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_the_content_decides_not_the_name(name):
    data = encoded(picture(), name)
    assert image_facts(io.BytesIO(data), len(data)) == (24, 24, ())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image file"),
        (b"<html>404</html>", "web page instead of the image"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC image, which is not read; convert it to JPEG, PNG or WebP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),
        (png_header(30_000, 30_000), "image above 89,478,485 pixels"),
        (png_header(9_500, 9_500), "image above 89,478,485 pixels"),
        (png_header(0, 10), "not an image"),
    ],
    ids=["empty", "html", "heic", "eps", "bomb", "just above the limit", "no pixels"],
)
def test_what_a_header_tells(data, reason):
    assert MAX_PIXELS < 9_500**2
    for judge in (lambda: image_facts(io.BytesIO(data), len(data)), lambda: decode(data, (8, 8))):
        with pytest.raises(BadSample, match=f"^{reason}$"):
            judge()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_cut_file_is_refused(format):
    """Cut anywhere in the second half, and a PNG with a flipped byte: never an image with a gray rest."""
    whole = encoded(picture(64, 64), format)
    for length in range(len(whole) // 2, len(whole) - 64, max(1, len(whole) // 7)):
        with pytest.raises(BadSample):
            decode(whole[:length], (64, 64))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_a_bad_sample_or_an_image(data):
    """No other error leaves the decoder, whatever the bytes."""
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"]))
    damaged = bytearray(WHOLE[format])
    for _ in range(data.draw(st.integers(1, 12))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadSample):
        assert decode(bytes(damaged), (8, 8)).shape == (8, 8, 3)


def test_more_than_sixteen_bits_are_refused():
    for mode in ("I", "F"):
        image = Image.new(mode, (4, 4), 100_000)
        with pytest.raises(BadSample, match="more than 16 bits"):
            decode(encoded(image, "TIFF"), (4, 4))


WHOLE = {name: encoded(picture(), name) for name in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM")}
