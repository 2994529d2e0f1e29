"Pictures as they come, against torchvision's decoders, and what a check of them finds."
import shutil
import struct
import warnings
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torchvision.io import ImageReadMode, decode_gif, decode_image, read_file
from conftest import photograph, two_classes

from fd_focus.data.pictures import (ReducedPictures, bad_images, check_images, duplicate_images, open_image,
                                    upright_size)
from fd_focus.data.tables import folder_table

pytestmark = pytest.mark.usefixtures("no_memory_of_earlier_checks")


def decoded(file, **kwargs):
    return decode_image(read_file(str(file)), mode=ImageReadMode.RGB, **kwargs).permute(1, 2, 0).numpy().astype(int)


@pytest.fixture
def folder(tmp_path): return two_classes(tmp_path / "pictures")


@pytest.mark.parametrize("mode,suffix", [("RGB", "jpg"), ("RGB", "png"), ("L", "jpg"), ("L", "png"), ("1", "png"),
                                         ("P", "png"), ("CMYK", "jpg")])
def test_modes_against_reference(tmp_path, mode, suffix):
    file = tmp_path / f"x.{suffix}"
    photograph().convert(mode).save(file)
    assert Image.open(file).mode == mode
    pixels = np.asarray(open_image(file)).astype(int)
    assert pixels.shape == (48, 64, 3) and np.abs(pixels - decoded(file)).max() <= (2 if suffix == "jpg" else 0)


def test_gif_against_reference(tmp_path):
    photograph().convert("P").save(tmp_path / "x.gif")
    reference = decode_gif(read_file(str(tmp_path / "x.gif"))).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.gif")), reference)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_against_reference(tmp_path, mode):
    image = photograph().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "x.png")
    rgba = (
        decode_image(read_file(str(tmp_path / "x.png")), mode=ImageReadMode.RGB_ALPHA)
        .permute(1, 2, 0)
        .numpy()
        .astype(float)
    )
    alpha = rgba[..., 3:] / 255
    assert np.abs(np.asarray(open_image(tmp_path / "x.png")) - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1.5


@pytest.mark.parametrize("colour", [False, True])
def test_16_bit_against_reference(tmp_path, colour):
    deep = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    if colour:         # PIL writes no 48-bit PNG
        rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in deep)
        chunk = lambda kind, body: (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
        (tmp_path / "x.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b"")
        )
    else: Image.fromarray(deep).save(tmp_path / "x.png")
    reference = decode_image(read_file(str(tmp_path / "x.png"))).permute(1, 2, 0).numpy().astype(float) / 257
    assert np.abs(np.asarray(open_image(tmp_path / "x.png")) - reference).max() <= 1       # of 255


def test_float_tiff(tmp_path):
    values = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(48, 64)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    assert np.abs(np.asarray(open_image(tmp_path / "x.tiff"))[..., 0] / 255 - values).max() < .003
    Image.fromarray(np.float32([[0, 2, 5]])).save(tmp_path / "above_one.tiff")          # the largest becomes white
    assert np.asarray(open_image(tmp_path / "above_one.tiff"))[0, :, 0].tolist() == [0, 102, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("min_side", [None, 100])
def test_exif_against_reference(tmp_path, orientation, min_side):
    image = photograph(size=(640, 480)); exif = image.getexif(); exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    reference = decoded(tmp_path / "x.jpg", apply_exif_orientation=True)
    pixels = open_image(tmp_path / "x.jpg", min_side=min_side)
    assert pixels.size == tuple(n // (4 if min_side else 1) for n in reference.shape[1::-1])
    with Image.open(tmp_path / "x.jpg") as opened:
        assert upright_size(tmp_path / "x.jpg") == upright_size(opened) == reference.shape[1::-1]
    difference = np.abs(
        np.asarray(pixels.resize((64, 64))).astype(int)
        - np.asarray(Image.fromarray(reference.astype(np.uint8)).resize((64, 64)))
    )
    assert difference.max() <= 6 and difference.mean() < 1


def test_reduced_decoding_never_goes_below_what_is_needed(tmp_path):
    for size in ((1024, 1024), (1023, 1023), (4096, 600), (700, 5000), (100, 100)):
        photograph(size=size).save(tmp_path / "x.jpg")
        reduced = open_image(tmp_path / "x.jpg", min_side=512).size
        assert min(reduced) >= min(512, *size) and max(reduced) <= max(size)
        assert reduced == ((512, 512) if size == (1024, 1024) else size)


def test_bombs_are_refused_and_named(tmp_path):
    Image.new("1", (10000, 10000)).save(tmp_path / "large.png")       # above PIL's limit
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")        # above twice that, where PIL itself refuses
    for name in ("large.png", "bomb.png"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(
                ValueError, match=f"{name} cannot be read as a picture: .*raise PIL.Image.MAX_IMAGE_PIXELS"
            ):
                open_image(tmp_path / name)
            assert "MAX_IMAGE_PIXELS" in bad_images([tmp_path / name])[tmp_path / name]


def test_large_jpeg_is_decoded_small_instead_of_refused(tmp_path, monkeypatch):
    photograph(size=(1200, 900)).save(tmp_path / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert open_image(tmp_path / "x.jpg", min_side=300).size == (600, 450)
        with pytest.raises(ValueError, match="1200x900 pixels are more than 1 million"): open_image(tmp_path / "x.jpg")


def test_an_odd_entry_beside_the_orientation_costs_nothing(tmp_path):
    "ImageOps.exif_transpose writes all entries anew, and fails where one is of a type that it should not be."
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        entries = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0) + struct.pack("<HHI4s", 0x128, 1, 1, b"\2\0\0\0")
        image.save(tmp_path / "odd.png", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + b"\0" * 4)
        exif = Image.Exif()
        exif[0x112] = orientation
        image.save(tmp_path / "plain.png", exif=exif)
        odd, plain = (open_image(tmp_path / name) for name in ("odd.png", "plain.png"))
        assert (np.asarray(odd) == np.asarray(plain)).all()
        assert (np.asarray(open_image(odd)) == np.asarray(odd)).all()             # and not turned again


def test_truncation_is_found_wherever_it_is(tmp_path):
    for progressive in (False, True):
        photograph(size=(640, 480)).save(tmp_path / "x.jpg", progressive=progressive, quality=95)
        whole = (tmp_path / "x.jpg").read_bytes()
        files = []
        for share in (.02, .3, .6, .9, .99):
            files.append(tmp_path / f"{share}.jpg")
            files[-1].write_bytes(whole[:int(len(whole) * share)])
        assert set(bad_images(files)) == set(files)


def test_check_goes_on_where_it_was_interrupted(folder, monkeypatch):
    import fd_focus.data.pictures
    files = sorted(folder.rglob("*.jpg"))
    seen = []
    def decode(file, *args):
        seen.append(file)
        if len(seen) == 10: raise KeyboardInterrupt
        return Image.open(file)
    monkeypatch.setattr(fd_focus.data.pictures, "_decode", decode)
    with pytest.raises(KeyboardInterrupt): check_images(files)
    looked = []
    monkeypatch.setattr(fd_focus.data.pictures, "_decode", lambda file, *args: looked.append(file) or Image.open(file))
    assert len(check_images(files)[1]) == 16 and 0 < len(looked) < 16


def test_cache_that_cannot_be_used(folder, monkeypatch, tmp_path):
    files = sorted(folder.rglob("*.jpg"))
    for bad in ("file", "broken"):
        home = tmp_path / bad
        if bad == "file": home.write_text("")
        else:
            (home / "fd_focus").mkdir(parents=True)
            (home / "fd_focus" / "checked.sqlite").write_text("no database" * 100)
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        assert len(check_images(files)[1]) == 16


def test_real_photographs_hold_no_doubles(data):
    assert bad_images([data / "cars_sedan33" / f for f in folder_table(data / "cars_sedan33").file][::10]) == {}


def test_kept_pictures_are_bounded_and_never_stale(tmp_path, monkeypatch):
    files, keep = [tmp_path / f"{i}.jpg" for i in range(40)], tmp_path / "kept"
    for i, file in enumerate(files): photograph(i, (320, 240)).save(file, quality=95)
    kept = ReducedPictures(keep, min_side=60)
    first = [np.asarray(kept(file)).astype(int) for file in files[:4]]
    assert len(list(keep.iterdir())) == 4 and first[0].shape == (60, 80, 3)
    opened = []
    import fd_focus.data.pictures
    decode = fd_focus.data.pictures._decode
    monkeypatch.setattr(
        fd_focus.data.pictures, "_decode", lambda file, *args: opened.append(file) or decode(file, *args)
    )
    assert all(np.abs(np.asarray(kept(file)) - pixels).mean() < 2 for file, pixels in zip(files, first)) and not set(
        opened
    ) & set(files)
    photograph(99, (320, 240)).save(files[0], quality=94)                       # changed: decoded anew
    assert np.abs(np.asarray(kept(files[0])) - first[0]).mean() > 5
    for place in keep.iterdir(): place.write_text("damaged")                    # damaged: decoded anew
    assert np.abs(np.asarray(kept(files[1])) - first[1]).mean() < 2
    photograph(5, (100, 100)).save(tmp_path / "small.jpg")                      # small: not kept
    before = len(list(keep.iterdir()))
    kept(tmp_path / "small.jpg")
    assert len(list(keep.iterdir())) == before
    # 10 kB: looked at after every 16 pictures
    bounded = ReducedPictures(tmp_path / "bounded", min_side=60, gigabytes=1e-5)
    for file in files: bounded(file)
    assert 10_000 <= bounded.used() < 10_000 + 16 * 8_000
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        (tmp_path / "bad.jpg").write_text("x")
        kept(tmp_path / "bad.jpg")


def test_a_cache_that_is_deleted_in_between_is_made_anew(folder, tmp_path):
    photograph(50).resize((400, 300)).save(tmp_path / "large.jpg")
    kept = ReducedPictures(tmp_path / "kept", 60)
    shutil.rmtree(tmp_path / "kept")
    kept(tmp_path / "large.jpg")
    assert len(list((tmp_path / "kept").glob("*.jpg"))) == 1


def test_pictures_that_differ_in_one_small_mark_are_no_doubles(tmp_path):
    "An eighth of the size, at which fingerprints are taken, does not show it."
    canvas = np.full((160, 160, 3), 120, np.uint8)
    files = [tmp_path / "g.jpg", tmp_path / "h.jpg"]
    Image.fromarray(canvas).save(files[0], quality=75)
    canvas[80:82, 80:82] = [[[150] * 3, [90] * 3], [[90] * 3, [150] * 3]]
    Image.fromarray(canvas).save(files[1], quality=75)
    assert len(set(check_images(files)[1].values())) == 1
    assert duplicate_images(
        pd.DataFrame(dict(file=["g.jpg", "h.jpg"], label=["x", "y"], split="train")), tmp_path
    ).empty


def test_the_same_pixels_in_both_splits(tmp_path):
    "Three files with one picture under one label; only what is in both splits is named."
    for name, seed in zip("abcd", (3, 3, 4, 4)): photograph(seed).save(tmp_path / f"{name}.jpg", comment=name.encode())
    table = pd.DataFrame(
        dict(file=[f"{name}.jpg" for name in "abcd"], label="jay", split=["train", "valid", "train", "train"])
    )
    found = duplicate_images(table, tmp_path)
    assert found.file.tolist() == ["a.jpg", "b.jpg"] and set(found.problem) == {"train and valid"}
