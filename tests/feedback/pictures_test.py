"""Pixels of every mode are read as they look, and pictures that differ have labels of their own."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gendiff.feedback import render, samples
from gendiff.feedback.samples import SampleError

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 2**16, (8, 6), np.uint16)
COLOURS = RNG.integers(0, 2**16, (8, 6, 3), np.uint16)
EIGHT = RNG.integers(0, 256, (8, 6, 3), np.uint8)


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png16(pixels):
    """A PNG of colours of 16 bits, which Pillow reads but does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def drawn(found, row):
    picture = render.drawing(found).draw(row, True)
    return np.asarray(Image.open(io.BytesIO(picture.body)))


def test_greys_of_16_bits_have_hashes_of_their_own_and_show_the_upper_byte(tmp_path):
    scans = [WIDE, WIDE ^ 1, WIDE | 0x8000, np.full_like(WIDE, 300)]
    for i, scan in enumerate(scans):
        Image.fromarray(scan).save(tmp_path / f"{i}.png")
    found = samples.load(tmp_path)
    assert len(set(found.hashes)) == 4
    for i, scan in enumerate(scans):
        np.testing.assert_array_equal(found[i], scan)
        np.testing.assert_array_equal(drawn(found, i), (scan >> 8).astype(np.uint8))


def test_colours_of_16_bits_are_read_unless_they_differ_in_the_lower_bytes_only(tmp_path):
    (tmp_path / "a.png").write_bytes(png16(COLOURS))
    (tmp_path / "b.png").write_bytes(png16(COLOURS ^ 0x8000))
    (tmp_path / "copy.png").write_bytes(png16(COLOURS))
    found = samples.load(tmp_path)
    np.testing.assert_array_equal(found[0], (COLOURS >> 8).astype(np.uint8))
    assert found.hashes[0] == found.hashes[2] != found.hashes[1]
    (tmp_path / "b.png").write_bytes(png16(COLOURS ^ 1))
    with pytest.raises(SampleError, match=r"a\.png and .*b\.png: colours must have 8 bits .* got 16 bits"):
        samples.load(tmp_path)


def turned(image):
    image.getexif()[0x112] = 6  # the camera was held upright
    return image


@pytest.mark.parametrize(
    ("make", "suffix", "wanted"),
    [
        (lambda: Image.fromarray(EIGHT[..., 0] > 99), "png", np.repeat((EIGHT[..., :1] > 99) * np.uint8(255), 3, 2)),
        (lambda: Image.fromarray(EIGHT[..., :2], "LA"), "png", EIGHT[..., [0, 0, 0, 1]]),
        (lambda: Image.fromarray(EIGHT[..., 0]).convert("P"), "png", EIGHT[..., [0, 0, 0]]),
        (lambda: Image.fromarray(EIGHT), "bmp", EIGHT),
        (lambda: turned(Image.fromarray(EIGHT)), "PNG", np.rot90(EIGHT, -1)),
    ],
)
def test_every_mode_is_read_as_it_looks(tmp_path, make, suffix, wanted):
    image = make()
    image.save(tmp_path / f"a.{suffix}", exif=image.getexif())
    np.testing.assert_array_equal(samples.load(tmp_path)[0], wanted)


def test_webp_is_read(tmp_path):
    Image.fromarray(EIGHT).save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(samples.load(tmp_path)[0], EIGHT)


@pytest.mark.parametrize(
    ("name", "image", "options", "reason"),
    [
        (
            "a.png",
            Image.fromarray(EIGHT[..., 0].astype(np.float32)),
            {"format": "TIFF"},
            "its content must be PNG, JPEG, WebP or BMP, got another",
        ),
        (
            "a.png",
            Image.fromarray(EIGHT),
            {"save_all": True, "append_images": [Image.fromarray(EIGHT[::-1])]},
            "2 frames",
        ),
        (
            "a.webp",
            Image.fromarray(EIGHT),
            {"save_all": True, "append_images": [Image.fromarray(EIGHT[::-1])]},
            "frames",
        ),
    ],
)
def test_what_would_be_shown_in_part_is_refused(tmp_path, name, image, options, reason):
    image.save(tmp_path / name, **options)
    with pytest.raises(SampleError, match=rf"sample .*{name} must be a PNG, JPEG, WebP or BMP image.*{reason}"):
        samples.load(tmp_path)


def test_a_damaged_picture_is_named(tmp_path):
    whole = png16(COLOURS)
    for cut in (0, 7, 20, len(whole) - 30):
        (tmp_path / "a.png").write_bytes(whole[:cut])
        with pytest.raises(SampleError, match=r"sample .*a\.png must be a PNG"):
            samples.load(tmp_path)
