"""Folders of images: what is read, what is converted and recorded, and what is refused."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from nelbo.data.images import images
from nelbo.data.sources import open_path
from nelbo.errors import InputRefused


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder_of(folder: Path, count: int = 12, shape: tuple[int, ...] = (6, 5)) -> Path:
    for i in range(count):
        Image.fromarray(noise(*shape, seed=i)).save(folder / f"{i:02}.png")
    return folder


def every(data) -> dict[int, np.ndarray]:
    """Examples by their position in the listing."""
    found = {}
    for part in ("train", "validation", "test"):
        found |= dict(zip(data.rows[part].tolist(), getattr(data, part).numpy(), strict=True))
    return found


def png(width: int, height: int, depth: int, colour: int, raw: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_png(values: np.ndarray) -> bytes:
    """16-bit grey (H, W) or RGB (H, W, 3)."""
    rows = [b"\0" + row.astype(">u2").tobytes() for row in values]
    colour = 0 if values.ndim == 2 else 2
    return png(values.shape[1], values.shape[0], 16, colour, b"".join(rows))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_pixels_come_through_unchanged(tmp_path, shape):
    data = images(folder_of(tmp_path, shape=shape))
    assert data.levels == 256 and data.train.dtype == torch.uint8
    for i, pixels in every(data).items():
        expected = noise(*shape, seed=i)
        expected = expected[None] if len(shape) == 2 else np.moveaxis(expected, 2, 0)
        assert np.array_equal(pixels, expected)
    assert data.record["conversions"] == {} and data.record["warnings"] == []
    assert len(data.train) + len(data.validation) + len(data.test) == 12


@pytest.mark.parametrize("ending", ["bmp", "webp", "tiff", "tif", "PNG"])
def test_lossless_formats(tmp_path, ending):
    folder_of(tmp_path, shape=(6, 5, 3))
    pixels = noise(6, 5, 3, seed=99)
    form = {"tif": "tiff"}.get(ending, ending.lower())
    extra = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"zz.{ending}", format=form, **extra)
    assert np.array_equal(every(images(tmp_path))[12], np.moveaxis(pixels, 2, 0))


def test_jpeg(tmp_path):
    folder_of(tmp_path, shape=(16, 16, 3))
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    Image.fromarray(flat).save(tmp_path / "zz.jpg", quality=95)
    found = every(images(tmp_path))[12].astype(int)
    assert np.abs(found - np.array([200, 100, 50])[:, None, None]).max() <= 4


def test_subfolders_links_and_other_files(tmp_path):
    (tmp_path / "a").mkdir()
    folder_of(tmp_path / "a")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "linked.png").symlink_to(folder_of(tmp_path / "a") / "00.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    data = images(tmp_path)
    assert data.record["examples"] == 13
    assert data.record["warnings"] == ["1 file(s) with other suffixes left alone"]
    parts = [{row.numpy().tobytes() for row in p} for p in (data.train, data.test)]
    assert not parts[0] & parts[1]


def test_names_do_not_matter_for_the_split(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    first.mkdir(), second.mkdir()
    folder_of(first)
    for i, path in enumerate(sorted(first.iterdir(), reverse=True)):
        (second / f"x{i:02}.png").write_bytes(path.read_bytes())
    a, b = images(first), images(second)
    assert torch.equal(a.test, b.test) and torch.equal(a.train, b.train)
    assert a.record["sha256"] == b.record["sha256"]
    smaller = images(first, size=3)
    assert torch.equal(smaller.rows["test"], a.rows["test"])


def test_a_copy_in_another_format_stays_with_its_original(tmp_path):
    folder_of(tmp_path, count=20)
    for i in range(20):
        Image.fromarray(noise(6, 5, seed=i)).save(tmp_path / f"{i:02}.bmp")
    data = images(tmp_path)
    test = {row.numpy().tobytes() for row in data.test}
    train = {row.numpy().tobytes() for row in data.train}
    assert not test & train and len(data.test) == 4


def test_centre_crop_and_antialiased_resize(tmp_path):
    """A wide image of fine stripes: the middle square is kept, stripes become their mean."""
    stripes = np.zeros((64, 128), np.uint8)
    stripes[:, 1::2] = 255
    stripes[:, :32], stripes[:, 96:] = 0, 255
    folder_of(tmp_path, shape=(64, 128))
    Image.fromarray(stripes).save(tmp_path / "zz.png")
    data = images(tmp_path, size=8)
    shrunk = every(data)[12].astype(int)
    assert data.shape() == (1, 8, 8)
    assert np.abs(shrunk[..., 1:-1] - 127.5).max() < 4
    assert data.record["conversions"] == {"cropped or shrunk": 13}
    assert images(tmp_path, size=(4, 8)).shape() == (1, 4, 8)


def test_enlarging_is_pointed_out(tmp_path):
    data = images(folder_of(tmp_path), size=16)
    assert data.record["warnings"] == ["12 image(s): enlarged"]


def test_exif_orientation(tmp_path):
    folder_of(tmp_path, shape=(6, 5))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(5, 6, seed=50)
    Image.fromarray(pixels).save(tmp_path / "zz.png", exif=exif)
    data = images(tmp_path)
    assert np.array_equal(every(data)[12][0], np.rot90(pixels, -1))
    assert data.record["conversions"] == {"turned by EXIF orientation": 1}


def test_transparency_is_flattened_on_black_and_hidden_colours_do_not_show(tmp_path):
    folder_of(tmp_path, shape=(6, 5, 3))
    pixels = np.full((6, 5, 4), (200, 100, 50, 255), np.uint8)
    pixels[:3, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "zz.png")
    data = images(tmp_path)
    found = every(data)[12]
    assert (found[:, :3] == 0).all() and found[:, 4, 2].tolist() == [200, 100, 50]
    assert data.record["warnings"] == ["1 image(s): transparency flattened on black"]


def test_grey_with_alpha_stays_grey(tmp_path):
    folder_of(tmp_path)
    Image.merge("LA", [Image.new("L", (5, 6), 77), Image.new("L", (5, 6), 255)]).save(
        tmp_path / "zz.png"
    )
    data = images(tmp_path)
    assert data.shape() == (1, 6, 5) and (every(data)[12] == 77).all()
    assert data.record["conversions"] == {"opaque alpha channel dropped": 1}


@pytest.mark.parametrize(("mode", "ending"), [("P", "png"), ("CMYK", "tiff"), ("1", "png")])
def test_other_kinds_are_converted_and_counted(tmp_path, mode, ending):
    folder_of(tmp_path, shape=(6, 5, 3))
    Image.new("RGB", (5, 6), (255, 0, 0)).convert(mode).save(tmp_path / f"zz.{ending}")
    data = images(tmp_path)
    names = {"P": "palette to RGB", "CMYK": "CMYK to RGB", "1": "1 bit to levels 0 and 255"}
    assert data.record["conversions"][names[mode]] == 1
    if mode != "1":
        assert every(data)[12][:, 0, 0].tolist() == [255, 0, 0]


def test_mixed_grey_and_colour_becomes_colour_or_what_is_asked(tmp_path):
    folder_of(tmp_path)
    Image.fromarray(noise(6, 5, 3, seed=70)).save(tmp_path / "zz.png")
    data = images(tmp_path)
    assert data.shape() == (3, 6, 5) and data.record["conversions"] == {"grey to RGB": 12}
    grey = images(tmp_path, channels=1)
    assert grey.shape() == (1, 6, 5) and grey.record["conversions"] == {"RGB to grey": 1}
    colour = images(tmp_path, channels=3)
    assert torch.equal(colour.train, data.train)
    with pytest.raises(InputRefused, match="channels 2"):
        images(tmp_path, channels=2)


def test_grey_in_three_channels_is_pointed_out(tmp_path):
    data = images(folder_of(tmp_path), channels=3)
    assert any("channels=1 would do" in note for note in data.record["warnings"])


def test_empty_folder(tmp_path):
    with pytest.raises(InputRefused, match=rf"{tmp_path.name}: holds no images; put"):
        images(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputRefused, match="no images among 1 file"):
        open_path(tmp_path)


def test_a_file_or_nothing_given_as_folder(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(InputRefused, match="00.png: is not a folder"):
        images(tmp_path / "00.png")
    with pytest.raises(InputRefused, match="nowhere: does not exist"):
        images(tmp_path / "nowhere")


def jpeg_bytes() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(file, "JPEG")
    return file.getvalue()


BAD = {
    "text": b"this is text, not an image",
    "empty": b"",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "truncated JPEG": jpeg_bytes()[:-400],
    "truncated PNG": png(64, 64, 8, 0, noise(64, 65).tobytes())[:-2000],
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_files_are_named(tmp_path, content):
    folder_of(tmp_path, shape=(64, 64, 3))
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(InputRefused, match="bad.png: (cannot be decoded|is empty)"):
        images(tmp_path)
    data = images(tmp_path, skip_bad=1)
    assert data.record["skipped"] == ["bad.png"] and data.record["examples"] == 12
    assert any("bad.png" in note for note in data.record["warnings"])
    (tmp_path / "worse.png").write_bytes(content)
    with pytest.raises(InputRefused, match="worse.png"):
        images(tmp_path, skip_bad=1)


def test_the_truncated_jpeg_is_one_that_verify_accepts():
    """The check at load is needed: Pillow's own verification passes this file."""
    Image.open(io.BytesIO(BAD["truncated JPEG"])).verify()


def test_truncation_is_refused_even_where_pillow_was_made_tolerant(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    folder_of(tmp_path, shape=(64, 64, 3))
    (tmp_path / "bad.jpg").write_bytes(BAD["truncated JPEG"])
    with pytest.raises(InputRefused, match="bad.jpg: cannot be decoded"):
        images(tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_broken_link_among_images(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputRefused, match="gone.png: is a link to nothing"):
        images(tmp_path)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_16_bit_png(tmp_path, shape):
    folder_of(tmp_path, shape=shape)
    values = np.random.default_rng(1).integers(0, 65536, shape).astype(np.uint16)
    (tmp_path / "zz.png").write_bytes(deep_png(values))
    with pytest.raises(InputRefused, match="zz.png: has 16 bits.*65,536 levels to 256.*reduction"):
        images(tmp_path)
    data = images(tmp_path, reduce_16bit=True)
    expected = (values >> 8).astype(np.uint8)
    expected = expected[None] if len(shape) == 2 else np.moveaxis(expected, 2, 0)
    assert np.array_equal(every(data)[12], expected)
    assert data.record["conversions"] == {"16 bits reduced to the upper 8": 1}


def test_16_bit_tiff_and_float_tiff(tmp_path):
    folder_of(tmp_path)
    path = tmp_path / "zz.tiff"
    Image.fromarray(noise(6, 5).astype(np.uint16) * 257).save(path)
    with pytest.raises(InputRefused, match="zz.tiff: has 16 bits"):
        images(tmp_path)
    assert np.array_equal(every(images(tmp_path, reduce_16bit=True))[12][0], noise(6, 5))
    Image.fromarray(noise(6, 5).astype(np.float32)).save(path)
    with pytest.raises(InputRefused, match="zz.tiff: has pixels of type F"):
        images(tmp_path)


@pytest.mark.parametrize("side", [9_000, 10_000, 20_000])
def test_decompression_bomb(tmp_path, side):
    """81 Mpx: our limit; 100 Mpx: Pillow warns; 400 Mpx: Pillow raises. No pixel is decoded."""
    folder_of(tmp_path)
    (tmp_path / "bomb.png").write_bytes(png(side, side, 8, 0, b""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputRefused, match="bomb.png: .*bomb"):
            images(tmp_path)


def test_mixed_sizes(tmp_path):
    folder_of(tmp_path)
    Image.fromarray(noise(7, 9)).save(tmp_path / "zz.png")
    with pytest.raises(
        InputRefused, match=r"zz.png: is 9 x 7 pixels, but .*00.png is 5 x 6.*--size"
    ):
        images(tmp_path)
    assert images(tmp_path, size=4).shape() == (1, 4, 4)


def test_constant_and_too_few_images(tmp_path):
    for i in range(12):
        Image.new("L", (5, 6), 9).save(tmp_path / f"{i}.png")
    with pytest.raises(InputRefused, match="constant"):
        images(tmp_path)
    for i in range(3, 12):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(InputRefused, match="3 example.*too few"):
        images(tmp_path)


def test_memory_limit_and_size(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(InputRefused, match="12 images.*declares 360 bytes"):
        images(tmp_path, limit=300, cache="ram")
    with pytest.raises(InputRefused, match="size 0"):
        images(tmp_path, size=0)
