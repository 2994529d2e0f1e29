"Pictures as they come, against torchvision's decoders, and what a check of them finds."
import io
import os
import shutil
import struct
import subprocess
import threading
import warnings
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.io import ImageReadMode, decode_gif, decode_image, read_file
from conftest import photograph, two_classes

from fd_focus.data.pictures import (ReducedPictures, bad_images, check_images, duplicate_images, is_picture,
                                    open_image, upright_size)
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


def mean_colour(file): return np.asarray(open_image(file)).mean((0, 1)).round().astype(int).tolist()


def swapped_profile():
    "A profile whose red is sRGB's green, and the other way round."
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return srgb.replace(b"rXYZ", b"none").replace(b"gXYZ", b"rXYZ").replace(b"none", b"gXYZ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_profile_says_what_colours_mean(tmp_path, mode):
    red = Image.new("RGB", (8, 8), "red").convert(mode)
    if mode == "RGBA": red.putalpha(128)
    red.save(tmp_path / "x.png", icc_profile=swapped_profile())
    assert mean_colour(tmp_path / "x.png") == ([127, 255, 127] if mode == "RGBA" else [0, 255, 0])
    again = open_image(open_image(tmp_path / "x.png"))                    # a picture is converted once
    again.save(tmp_path / "again.png")                                   # and says nothing of a profile any more
    assert mean_colour(tmp_path / "again.png") == mean_colour(tmp_path / "x.png")


def test_a_profile_that_changes_nothing_or_fits_nothing_changes_nothing(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("RGB", "L", "CMYK"):
        for profile in (srgb, b"no profile", srgb[:200]):
            picture = photograph().convert(mode)
            picture.save(tmp_path / "plain.tif")
            picture.save(tmp_path / "with.tif", icc_profile=profile)
            plain, marked = (np.asarray(open_image(tmp_path / name)) for name in ("plain.tif", "with.tif"))
            assert (plain == marked).all()


@pytest.mark.parametrize("dtype,values,grey", [
    (np.uint16, [0, 2048, 4095], [0, 128, 255]), (np.uint16, [0, 32768, 65535], [0, 128, 255]),
    (np.uint16, [0, 100, 200], [0, 100, 200]), (np.int32, [0, 100, 200], [0, 100, 200]),
    (np.int32, [0, 2 ** 29, 2 ** 30], [0, 128, 255]), (np.int32, [-1000, 0, 1000], [0, 128, 255]),
    (np.int32, [0, 0, 0], [0, 0, 0]), (np.float32, [0, .5, 1], [0, 128, 255]), (np.float32, [0, .2, .4], [0, 51, 102]),
    (np.float32, [-1, 0, 1], [0, 128, 255]), (np.float32, [0, 1e-4, 2e-4], [0, 128, 255]),
    (np.float32, [0, np.nan, 1], [0, 0, 255]), (np.float32, [-np.inf, .5, np.inf], [0, 128, 255]),
    (np.float32, [np.nan] * 3, [0] * 3)])
def test_deep_pictures_are_neither_black_nor_white(tmp_path, dtype, values, grey):
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "x.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(open_image(tmp_path / "x.tif"))[0, :, 0].tolist() == grey


def test_different_dark_pictures_are_no_copies(tmp_path):
    files = [tmp_path / f"{i}.tif" for i in range(4)]
    for i, file in enumerate(files):
        Image.fromarray(np.random.default_rng(i).integers(0, 120, (40, 40)).astype(np.int32)).save(file)
    assert len(set(check_images(files)[1].values())) == 4


@pytest.mark.parametrize("program", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
                                     b"8BPS" + b"\0" * 60, b"SIMPLE  =                    T" + b" " * 51])
def test_formats_are_those_of_photographs(tmp_path, monkeypatch, program):
    "An EPS named .jpg would start Ghostscript."
    for name in ("x.jpg", "x"): (tmp_path / name).write_bytes(program)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program was started"))
    for read in (open_image, upright_size):
        why = "cannot identify image file .*read are AVIF, BMP"
        with pytest.raises(ValueError, match=why): read(tmp_path / "x.jpg")
    assert "read are AVIF" in bad_images([tmp_path / "x.jpg"])[tmp_path / "x.jpg"] and not is_picture(tmp_path / "x")


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_a_picture_is_known_by_its_content(tmp_path, kind):
    (tmp_path / "x").write_bytes(encoded(photograph(), kind))
    assert is_picture(tmp_path / "x") and open_image(tmp_path / "x").size == upright_size(tmp_path / "x") == (64, 48)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(photograph()).save(tmp_path / "x.heic")
    assert is_picture(tmp_path / "x.heic") and upright_size(tmp_path / "x.heic") == (64, 48)
    assert np.abs(np.asarray(open_image(tmp_path / "x.heic")).astype(int) - np.asarray(photograph())).mean() < 10


def test_what_would_keep_us_waiting_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for file in (tmp_path / "pipe.jpg", "/dev/zero"):
        with pytest.raises(ValueError, match="no regular file"): open_image(file)
        with pytest.raises(ValueError, match="no regular file"): upright_size(file)
    assert "no regular file" in bad_images([tmp_path / "pipe.jpg"])[tmp_path / "pipe.jpg"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_jpeg_beyond_twice_the_limit_is_decoded_small(tmp_path, monkeypatch):
    for kind in ("jpg", "png"): photograph(size=(1200, 900)).save(tmp_path / f"x.{kind}")
    photograph(size=(1200, 900)).save(tmp_path / "progressive.jpg", progressive=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    for source in (tmp_path / "x.jpg", io.BytesIO((tmp_path / "x.jpg").read_bytes()), tmp_path / "progressive.jpg"):
        assert open_image(source, 300).size == (600, 450)
        with pytest.raises(ValueError, match="1200x900 pixels are more than 0 million"): open_image(source)
    assert upright_size(tmp_path / "x.jpg") == (1200, 900) and bad_images([tmp_path / "x.jpg"]) == {}
    with pytest.raises(ValueError, match="Image size .* exceeds limit .* Shrink"): open_image(tmp_path / "x.png", 300)
    table = pd.DataFrame(dict(file=["x.jpg", "y.jpg"], label=["a", "b"], split="train"))
    shutil.copy(tmp_path / "x.jpg", tmp_path / "y.jpg")                   # too large to be compared in full
    assert len(duplicate_images(table, tmp_path)) == 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    assert open_image(tmp_path / "x.jpg", 100).size == (150, 113)
    with pytest.raises(ValueError, match="bomb"): open_image(tmp_path / "progressive.jpg", 100)     # held whole
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(ValueError, match="bomb"): open_image(tmp_path / "x.jpg", 100)               # 21 times as large


def test_an_app_may_ask_for_a_lower_limit(tmp_path):
    for kind in ("jpg", "png"): photograph(size=(1200, 900)).save(tmp_path / f"x.{kind}")
    for kind in ("jpg", "png"):
        assert open_image(tmp_path / f"x.{kind}", max_pixels=1_080_000).size == (1200, 900)
        with pytest.raises(ValueError, match="1200x900 pixels are more than 1 million"):
            open_image(tmp_path / f"x.{kind}", max_pixels=1_079_999)
    assert open_image(tmp_path / "x.jpg", 300, max_pixels=500_000).size == (600, 450)


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_picture_with_much_text_is_read_without_it(tmp_path, where):
    text = PngImagePlugin.PngInfo()
    text.add_text("document", "x" * 2_000_000, zip=True)
    data = encoded(photograph(), "PNG", pnginfo=text)
    if where == "after":
        start, plain = data.index(b"zTXt") - 4, encoded(photograph(), "PNG")
        chunk = data[start:start + 12 + int.from_bytes(data[start:start + 4])]
        data = plain[:-12] + chunk + plain[-12:]
    (tmp_path / "x.png").write_bytes(data)
    for source in (tmp_path / "x.png", io.BytesIO(data)):
        assert upright_size(source) == (64, 48) and (np.asarray(open_image(source)) == np.asarray(photograph())).all()
    assert bad_images([tmp_path / "x.png"]) == {} and is_picture(tmp_path / "x.png")


def test_first_and_second_reading_of_a_cached_picture_are_the_same(tmp_path):
    for kind, size in (("jpg", (640, 480)), ("png", (640, 480)), ("jpg", (100, 100))):
        photograph(size=size).save(tmp_path / f"x.{kind}")
        kept, full = ReducedPictures(tmp_path / "kept", 60), ReducedPictures(tmp_path / "full", 60, gigabytes=0)
        first, second, unkept = (np.asarray(read(tmp_path / f"x.{kind}")) for read in (kept, kept, full))
        assert (first == second).all() and (first == unkept).all()
    assert len(list((tmp_path / "kept").iterdir())) == 2 and not list((tmp_path / "full").iterdir())


def test_a_picture_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    photograph(size=(640, 480)).save(tmp_path / "x.jpg")
    def full(number): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    picture = ReducedPictures(tmp_path / "kept", 60)(tmp_path / "x.jpg")
    assert picture.size == (80, 60) and not list((tmp_path / "kept").iterdir())
    monkeypatch.undo()
    readers = [threading.Thread(target=ReducedPictures(tmp_path / "kept", 60), args=(tmp_path / "x.jpg",))
               for _ in range(4)]
    for reader in readers: reader.start()
    for reader in readers: reader.join()
    assert [file.suffix for file in (tmp_path / "kept").iterdir()] == [".jpg"]


def test_a_check_says_nothing_in_a_log(tmp_path, monkeypatch, capsys):
    "A bar would fill the log with carriage returns."
    files = [tmp_path / f"{i}.jpg" for i in range(600)]
    for file in files: file.write_bytes(b"x")
    monkeypatch.setattr("fd_focus.data.pictures._look", lambda file: (file.name, None))
    assert len(check_images(files)[1]) == 600 and capsys.readouterr() == ("", "")
