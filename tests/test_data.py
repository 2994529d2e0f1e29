"The official indexes of the benchmarks, pictures as they come, and what is wrong with a folder."
import gzip
import inspect
import os
import shutil
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.io import loadmat, savemat
from torchvision.io import ImageReadMode, decode_gif, decode_image, read_file

from fd_focus.data.loaders import (DataWarning, FocusDataLoaders, ReducedPictures, aircraft_table, bad_images, cars_table, check_apart, check_images, csv_table, cub_table, duplicate_images,
                           folder_table, open_image)
from fd_focus.training.run import Settings, make_learner


@pytest.fixture(autouse=True)
def no_memory_of_earlier_checks(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def photograph(seed=0, size=(64, 48)):
    "Soft random colours: nothing that JPEG distorts much, and no two alike."
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def test_cub_index(data, tmp_path):
    root = tmp_path / "CUB_200_2011"
    shutil.copytree(data / "cub_200_2011_index", root)
    (root / "parts" / "part_locs.txt").write_bytes(gzip.decompress((root / "parts" / "part_locs.txt.gz").read_bytes()))
    table = cub_table(tmp_path)
    assert len(table) == 11788 and dict(table.split.value_counts()) == {"train": 5994, "valid": 5794} and table.label.nunique() == 200
    first, last = table.iloc[0], table.iloc[-1]
    assert first.file == "images/001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"
    assert first.label == "001.Black_footed_Albatross" and first.split == "valid" and first.box.tolist() == [60, 27, 385, 331]
    assert first.parts.shape == (15, 3) and first.visible.dtype == bool
    # The beak (part 2) of the first bird, and a left eye (part 7) that does not show, as part_locs.txt has them.
    assert first.parts[1].tolist() == [312, 182, 0] and first.visible[1] and not first.visible[6]
    assert last.label == "200.Common_Yellowthroat" and last.file.startswith("images/200.Common_Yellowthroat/")
    # Every row against the raw files, read without pandas.
    lines = lambda name: [line.split() for line in (root / name).read_text().splitlines()]
    assert table.label.tolist() == [Path(name).parent.name for _, name in lines("images.txt")]
    assert (table.split == "train").tolist() == [flag == "1" for _, flag in lines("train_test_split.txt")]
    boxes = np.array(lines("bounding_boxes.txt"), float)[:, 1:]
    assert np.allclose(np.stack(table.box), np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    parts = np.array(lines("parts/part_locs.txt"), float).reshape(11788, 15, 5)
    assert np.allclose(np.stack(table.parts)[..., :2], parts[..., 2:4], atol=1e-3) and (np.stack(table.visible) == (parts[..., 4] == 1)).all()
    chosen = cub_table(tmp_path, valid_pct=0.1)
    assert len(chosen) == 5994 and set(chosen.file) <= set(table.file[table.split == "train"])
    assert chosen.groupby("label").split.nunique().eq(2).all()
    assert cub_table(tmp_path, valid_pct=0.1).equals(chosen) and not cub_table(tmp_path, valid_pct=0.1, seed=1).split.equals(chosen.split)
    with pytest.raises(FileNotFoundError, match="CUB_200_2011/images. CUB-200-2011: download=True"): FocusDataLoaders.from_cub(tmp_path)


def cars_with_labels(data, root):
    "torchvision's layout; the labels of the test half are not in the development data, so they are made up."
    (root / "devkit").mkdir(parents=True)
    for name in ("cars_meta.mat", "cars_train_annos.mat"): shutil.copy(data / "stanford_cars_devkit" / name, root / "devkit")
    rows = loadmat(data / "stanford_cars_devkit" / "cars_test_annos.mat")["annotations"]
    labelled = np.zeros(rows.shape, dtype=[*((n, "O") for n in rows.dtype.names), ("class", "O")])
    for name in rows.dtype.names: labelled[name] = rows[name]
    for i in range(rows.shape[1]): labelled["class"][0, i] = np.array([[i % 196 + 1]])
    savemat(root / "cars_test_annos_withlabels.mat", dict(annotations=labelled))


def test_cars_index(data, tmp_path):
    cars_with_labels(data, tmp_path / "stanford_cars")
    table = cars_table(tmp_path)
    assert dict(table.split.value_counts()) == {"train": 8144, "valid": 8041} and table.label.nunique() == 196
    first, last = table.iloc[0], table[table.split == "train"].iloc[-1]
    assert (first.file, first.label) == ("cars_train/00001.jpg", "Audi TTS Coupe 2012") and first.box.tolist() == [38, 115, 569, 375]
    assert last.file == "cars_train/08144.jpg"
    assert table[table.split == "valid"].iloc[0].box.tolist() == [29, 51, 246, 147]          # cars_test/00001.jpg
    boxes = np.stack(table.box)
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0
    with pytest.raises(FileNotFoundError, match="cars_test, .*cars_train. Stanford Cars is no longer at its source"): FocusDataLoaders.from_cars(tmp_path)
    # torchvision reads the same files: same order, same classes.
    from torchvision.datasets import StanfordCars
    for folder in ("cars_train", "cars_test"): (tmp_path / "stanford_cars" / folder).mkdir()
    for split, ours in (("train", "train"), ("test", "valid")):
        theirs, rows = StanfordCars(tmp_path, split=split), table[table.split == ours]
        assert [Path(file).relative_to(tmp_path / "stanford_cars").as_posix() for file, _ in theirs._samples] == rows.file.tolist()
        assert [theirs.classes[k].replace("/", "-") for _, k in theirs._samples] == rows.label.tolist()


def small_cub(root):
    "CUB's layout with two classes of three pictures."
    lists = dict(images="{i} {c}/{i}.jpg", image_class_labels="{i} {k}", train_test_split="{i} {t}", bounding_boxes="{i} 2.0 3.0 20.0 30.0")
    rows = [dict(i=i, k=1 + i % 2, c="ab"[i % 2], t=int(i < 4)) for i in range(6)]
    for row in rows:
        (root / "images" / row["c"]).mkdir(parents=True, exist_ok=True)
        photograph(row["i"]).save(root / "images" / row["c"] / f"{row['i']}.jpg")
    for name, line in lists.items(): (root / f"{name}.txt").write_text("".join(line.format(**row) + "\n" for row in rows))
    (root / "classes.txt").write_text("1 a\n2 b\n")


def test_cub_wherever_it_is_unpacked(tmp_path):
    "The archive holds a folder and a file, so that unpacking makes a folder around them."
    for root in ("plain", "one/CUB_200_2011", "two/CUB_200_2011/CUB_200_2011"): small_cub(tmp_path / root)
    for path in ("plain", "one", "one/CUB_200_2011", "two", "two/CUB_200_2011"):
        assert len(FocusDataLoaders.from_cub(tmp_path / path, image_size=32, bs=2, num_workers=0).train_ds) == 4


def test_official_split_as_csv(tmp_path):
    "As the tutorial on the paper's tables writes it for `fd_focus_train --data`."
    small_cub(tmp_path)
    official = cub_table(tmp_path)
    official.assign(split=official.split.replace("valid", "test"))[["file", "label", "split"]].to_csv(tmp_path / "split.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        dls = loaders(tmp_path, bs=2)
    assert dls.judged_by == "test" and dls.table[["file", "label", "split"]].reset_index(drop=True).equals(official[["file", "label", "split"]])


def test_cars_single_archive(tmp_path):
    dtype = [(n, "O") for n in ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")]
    rows = np.array([(f"car_ims/{i:06d}.jpg", 1 + i, 2, 30, 40, 1 + i % 2, int(i > 3)) for i in range(6)], dtype=dtype)
    savemat(tmp_path / "cars_annos.mat", dict(annotations=rows, class_names=np.array(["Ford F/150 2007", "Audi A4"], dtype=object)))
    table = cars_table(tmp_path)
    assert table.label.tolist() == ["Ford F-150 2007", "Audi A4"] * 3 and table.split.tolist() == ["train"] * 4 + ["valid"] * 2
    assert table.box[0].tolist() == [0, 1, 30, 40]
    (tmp_path / "car_ims").mkdir()
    for i in range(6): photograph(i).save(tmp_path / f"car_ims/{i:06d}.jpg")
    dls = FocusDataLoaders.from_cars(tmp_path, image_size=32, bs=2, num_workers=0)
    assert (len(dls.train_ds), len(dls.valid_ds), list(dls.vocab)) == (4, 2, ["Audi A4", "Ford F-150 2007"])
    # x 5..30 of 64 and y 1..40 of 48, squashed to 37, less 2.5 at the border
    assert np.allclose(dls.truth([table.file[4]])["box"], [[0, 0, 30 * 37 / 64 - 2.5, 40 * 37 / 48 - 2.5]], atol=1e-4)


def aircraft(root, counts=dict(trainval=6667, test=3333), classes=dict(variant=100, family=70, manufacturer=30)):
    "FGVC-Aircraft's layout: one list a level and split, classes that nest, numbers as file names."
    root = root / "fgvc-aircraft-2013b" / "data"
    (root / "images").mkdir(parents=True)
    number, boxes = 0, []
    for split, n in counts.items():
        rows = range(number, number := number + n)
        boxes += [f"{34309 + i:07d} {3 + i % 5} 10 60 40" for i in rows]
        for level, k in classes.items():
            (root / f"images_{level}_{split}.txt").write_text("".join(f"{34309 + i:07d} {level} {i % classes['variant'] * k // classes['variant']}/X\n" for i in rows))
    files = dict(variant="variants", family="families", manufacturer="manufacturers")
    for level, k in classes.items(): (root / f"{files[level]}.txt").write_text("".join(f"{level} {i}/X\n" for i in range(k)))
    (root / "images_box.txt").write_text("\n".join(boxes) + "\n")
    return root


@pytest.mark.parametrize("level,classes", [("variant", 100), ("family", 70), ("manufacturer", 30)])
def test_aircraft_counts(tmp_path, level, classes):
    from torchvision.datasets import FGVCAircraft
    aircraft(tmp_path)
    table = aircraft_table(tmp_path, level)
    assert dict(table.split.value_counts()) == {"train": 6667, "valid": 3333} and table.label.nunique() == classes
    assert table.file[0] == "fgvc-aircraft-2013b/data/images/0034309.jpg" and table.box[0].tolist() == [2, 9, 60, 40]
    for split, ours in (("trainval", "train"), ("test", "valid")):        # torchvision reads the same files
        theirs, rows = FGVCAircraft(tmp_path, split=split, annotation_level=level), table[table.split == ours]
        assert [str(Path(f).relative_to(tmp_path)) for f in theirs._image_files] == rows.file.tolist()
        assert [theirs.classes[k] for k in theirs._labels] == rows.label.tolist()
    assert len(aircraft_table(tmp_path, level, valid_pct=0.1)) == 6667


def test_aircraft_pictures(tmp_path):
    root = aircraft(tmp_path, dict(trainval=6, test=3), dict(variant=3, family=2, manufacturer=1))
    for i in range(9): photograph(i).save(root / "images" / f"{34309 + i:07d}.jpg")
    dls = FocusDataLoaders.from_aircraft(tmp_path, "variant", image_size=32, bs=2, num_workers=0)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (6, 3, 3) and dls.one_batch()[0].shape == (2, 3, 32, 32)
    assert len(FocusDataLoaders.from_aircraft(tmp_path / "fgvc-aircraft-2013b", image_size=32, bs=2).table) == 9
    with pytest.raises(ValueError, match="only one class, manufacturer 0/X"): FocusDataLoaders.from_aircraft(tmp_path, "manufacturer", image_size=32)


def test_downloads_are_asked_for_once(tmp_path, monkeypatch):
    "fastai's and torchvision's downloaders get the folder; nothing is fetched where the set is there, or without being asked."
    import torchvision
    import fd_focus.data.loaders
    calls = []
    monkeypatch.setattr(fd_focus.data.loaders, "untar_data", lambda url, archive, data: calls.append((url, data)))
    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", lambda root, split, download: calls.append((root, download)))
    with pytest.raises(FileNotFoundError): FocusDataLoaders.from_cub(tmp_path)
    with pytest.raises(FileNotFoundError): FocusDataLoaders.from_aircraft(tmp_path)
    assert calls == []
    with pytest.raises(FileNotFoundError): FocusDataLoaders.from_cub(tmp_path, download=True)
    with pytest.raises(FileNotFoundError): FocusDataLoaders.from_aircraft(tmp_path, download=True)
    assert calls == [("https://s3.amazonaws.com/fast-ai-imageclas/CUB_200_2011.tgz", tmp_path), (tmp_path, True)]
    monkeypatch.chdir(tmp_path)                                  # fastai would take a relative path from its own folder
    with pytest.raises(FileNotFoundError): FocusDataLoaders.from_cub("birds", download=True)
    assert calls.pop()[1] == tmp_path / "birds"
    aircraft(tmp_path, dict(trainval=2, test=1))
    with pytest.raises(ValueError, match="no such file"): FocusDataLoaders.from_aircraft(tmp_path, download=True)
    assert len(calls) == 2


def test_real_photographs(data):
    table = folder_table(data / "cars_sedan33")
    assert dict(table.split.value_counts()) == {"train": 924, "valid": 513} and table.label.nunique() == 33
    chosen = folder_table(data / "cars_sedan33", valid_pct=0.2)      # to choose on, the 513 left alone
    assert len(chosen) == 924 and set(chosen.file) == set(table.file[table.split == "train"]) and chosen.groupby("label").split.nunique().eq(2).all()


def test_real_photographs_hold_no_doubles(data):
    assert bad_images([data / "cars_sedan33" / f for f in folder_table(data / "cars_sedan33").file][::10]) == {}


# Pictures as they come, against torchvision's decoders (libjpeg, libpng, its own GIF reader)

def decoded(file, **kwargs): return decode_image(read_file(str(file)), mode=ImageReadMode.RGB, **kwargs).permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("mode,suffix", [("RGB", "jpg"), ("RGB", "png"), ("L", "jpg"), ("L", "png"), ("1", "png"), ("P", "png"), ("CMYK", "jpg")])
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
    rgba = decode_image(read_file(str(tmp_path / "x.png")), mode=ImageReadMode.RGB_ALPHA).permute(1, 2, 0).numpy().astype(float)
    alpha = rgba[..., 3:] / 255
    assert np.abs(np.asarray(open_image(tmp_path / "x.png")) - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1.5


@pytest.mark.parametrize("colour", [False, True])
def test_16_bit_against_reference(tmp_path, colour):
    deep = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    if colour:         # PIL writes no 48-bit PNG
        rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in deep)
        chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    else: Image.fromarray(deep).save(tmp_path / "x.png")
    reference = decode_image(read_file(str(tmp_path / "x.png"))).permute(1, 2, 0).numpy().astype(float) / 257
    assert np.abs(np.asarray(open_image(tmp_path / "x.png")) - reference).max() <= 1       # of 255


def test_float_tiff(tmp_path):
    values = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(48, 64)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    assert np.abs(np.asarray(open_image(tmp_path / "x.tiff"))[..., 0] / 255 - values).max() < .003


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("min_side", [None, 100])
def test_exif_against_reference(tmp_path, orientation, min_side):
    image = photograph(size=(640, 480)); exif = image.getexif(); exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    reference = decoded(tmp_path / "x.jpg", apply_exif_orientation=True)
    pixels = open_image(tmp_path / "x.jpg", min_side=min_side)
    assert pixels.size == tuple(n // (4 if min_side else 1) for n in reference.shape[1::-1])
    difference = np.abs(np.asarray(pixels.resize((64, 64))).astype(int) - np.asarray(Image.fromarray(reference.astype(np.uint8)).resize((64, 64))))
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
            with pytest.raises(ValueError, match=f"{name} cannot be read as a picture: .*raise PIL.Image.MAX_IMAGE_PIXELS"): open_image(tmp_path / name)
            assert "MAX_IMAGE_PIXELS" in bad_images([tmp_path / name])[tmp_path / name]


def test_large_jpeg_is_decoded_small_instead_of_refused(tmp_path, monkeypatch):
    photograph(size=(1200, 900)).save(tmp_path / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert open_image(tmp_path / "x.jpg", min_side=300).size == (600, 450)
        with pytest.raises(ValueError, match="1200x900 pixels are more than 1 million"): open_image(tmp_path / "x.jpg")


def test_truncation_is_found_wherever_it_is(tmp_path):
    for progressive in (False, True):
        photograph(size=(640, 480)).save(tmp_path / "x.jpg", progressive=progressive, quality=95)
        whole = (tmp_path / "x.jpg").read_bytes()
        files = []
        for share in (.02, .3, .6, .9, .99):
            files.append(tmp_path / f"{share}.jpg")
            files[-1].write_bytes(whole[:int(len(whole) * share)])
        assert set(bad_images(files)) == set(files)


# What is wrong with a folder

@pytest.fixture
def folder(tmp_path):
    "Two classes of eight different pictures."
    root = tmp_path / "pictures"
    for i in range(16):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        photograph(i).save(root / "ab"[i % 2] / f"{i:02d}.jpg")
    return root


def loaders(folder, **kwargs): return FocusDataLoaders.from_folder(folder, **dict(dict(image_size=32, bs=4, num_workers=0), **kwargs))


def test_halves_are_known_by_other_names_too(folder):
    for train, other, judged in (("Training", "Test", "test"), ("train", "validation", "valid"), ("TRAIN", "Val", "valid"), ("train", "testing", "test")):
        root = folder.parent / f"{train}-{other}"
        for i, half in enumerate((train, other)):
            shutil.copytree(folder, root / half, ignore=lambda place, names: [n for n in names if n.endswith(".jpg") and int(n[:2]) // 2 % 2 == i])
        table = folder_table(root)
        assert set(table.label) == {"a", "b"} and table.attrs["judged_by"] == judged
        assert all(file.startswith(f"{train}/" if split == "train" else f"{other}/") for file, split in zip(table.file, table.split)) and len(table) == 16
    shutil.copytree(folder, root / "valid")
    assert folder_table(root).attrs["judged_by"] == "valid" and len(folder_table(root)) == 24       # the test half is left for later


def test_classes_one_level_deeper(folder):
    high = folder.parent / "high"
    shutil.copytree(folder, high / "birds")
    with pytest.raises(ValueError, match="only one class, birds, .*: a, b. If .*: give .*high/birds$"): folder_table(high)
    with pytest.raises(ValueError, match="one level deeper"): loaders(high)
    shutil.copytree(folder, high / "mammals")                               # folders in class folders are all right
    assert set(folder_table(high).label) == {"birds", "mammals"}
    halves = folder.parent / "halves"
    for name in ("train", "holdout"): shutil.copytree(folder, halves / name)
    with pytest.raises(ValueError, match=r"train in .*halves: named like halves .* \(a, b\).* train and valid .* give .*halves/train$"): folder_table(halves)
    (halves / "holdout").rename(halves / "Validate")
    (halves / "train").rename(halves / "test")
    with pytest.raises(ValueError, match="test in .*named like halves"): folder_table(halves)
    photograph(50).save(halves / "test" / "x.jpg")                          # pictures of its own: a class
    assert set(folder_table(halves).label) == {"test", "Validate"}
    for name in ("train", "valid"): shutil.copytree(folder, folder.parent / "two" / name / "birds")
    with pytest.raises(ValueError, match="only one class, birds, .*move them up, into .*two/train, .*two/valid"): folder_table(folder.parent / "two")
    only = folder.parent / "only"
    shutil.copytree(folder / "a", only / "a")                               # one class and nothing below it: no folders to name
    with pytest.raises(ValueError, match="only one class, a; a classifier needs at least 2"): loaders(only)


def test_batches_that_never_fill(folder):
    for make in (lambda **kwargs: loaders(folder, **kwargs), lambda **kwargs: FocusDataLoaders.from_table(folder_table(folder), folder, image_size=32, **kwargs),
                 lambda **kwargs: loaders(folder, balance=True, **kwargs)):
        with pytest.raises(ValueError, match="bs=16 is more than the 12 training pictures; use a smaller batch"): make(bs=16)
        assert len(make(bs=12).train) == 1
    assert len(loaders(folder, bs=16, drop_last=False).train) == 1
    with pytest.raises(ValueError, match="bs=4 is more than the 3 training pictures"): loaders(folder, n=3)
    with pytest.raises(ValueError, match="bs=32 is more than the 6 training pictures"): FocusDataLoaders.from_toy(2, 1, n_classes=3)
    with pytest.raises(ValueError, match="bs=16 is more than the 12 training pictures; use a smaller batch"):
        make_learner(Settings(str(folder), arch="toy_resnet", image_size=32, bs=16))


def test_unread_kinds_are_counted(folder):
    for i, name in enumerate(["x.HEIC", "y.heic", "deep/z.avif", ".hidden.heic", "notes.txt", "box.xml"]):
        (folder / "ab"[i % 2] / name).parent.mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / name).write_text("")
    with pytest.warns(DataWarning, match=r"^3 files in class folders of .*pictures are left out: .avif 1, .heic 2; convert them to JPEG or PNG$"): folder_table(folder)
    photograph(77).save(folder / "a" / "more.jfif", "JPEG")
    with pytest.warns(DataWarning): assert "a/more.jfif" in set(folder_table(folder).file)


def test_hidden_folders_are_no_data(folder):
    before = folder_table(folder)
    for place in ("a/.thumbnails", "a/deep/.cache", "a/__MACOSX", "__MACOSX/a", ".trash"):
        (folder / place).mkdir(parents=True)
        photograph(60).save(folder / place / "0.jpg")
    photograph(61).save(folder / "._loose.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert folder_table(folder).equals(before)
        before.to_csv(folder / "split.csv", index=False)
        assert folder_table(folder).equals(before)


def test_what_valid_pct_leaves_out(folder):
    rows = folder_table(folder).drop(columns="split")
    with_half = lambda name: rows.assign(split=[name if i % 4 == 0 else "train" for i in range(16)]).to_csv(folder / "split.csv", index=False)
    for name in ("valid", "val"):
        with_half(name)
        with pytest.warns(DataWarning, match="valid_pct=0.5 .* leaves out the 4 of the validation half; leave valid_pct away"):
            assert len(folder_table(folder, .5)) == 12
    for name in ("test", "train"):
        with_half(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)
            assert len(folder_table(folder, .5)) == {"test": 12, "train": 16}[name]
    (folder / "split.csv").unlink()
    for half in ("train", "valid", "test"): shutil.copytree(folder, folder.parent / "halves" / half)
    with pytest.warns(DataWarning, match="leaves out the 16 of the validation half"): folder_table(folder.parent / "halves", .5)
    shutil.rmtree(folder.parent / "halves" / "valid")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        folder_table(folder.parent / "halves", .5)


def test_pictures_that_a_csv_does_not_list(folder):
    rows = folder_table(folder)
    rows[2:].to_csv(folder / "split.csv", index=False)
    for read in (lambda: folder_table(folder), lambda: csv_table(folder / "split.csv")):
        with pytest.warns(DataWarning, match="split.csv does not list 2 of the pictures in .*, which are left out, such as a/00.jpg"): assert len(read()) == 14
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        rows[2:].to_csv(folder / "part.csv", index=False)                       # any other CSV may be about a part
        csv_table(folder / "part.csv")
        halves = np.resize(["train", "valid", "test"], 16)                      # listed, though the test half is for later
        rows.assign(split=halves).to_csv(folder / "split.csv", index=False)
        folder_table(folder)
        rows.assign(file=[f"./{f}" if i % 2 else str(folder / f) for i, f in enumerate(rows.file)]).to_csv(folder / "split.csv", index=False)
        assert len(folder_table(folder)) == 16


def test_blanks_in_a_csv(folder):
    rows = folder_table(folder)
    text = "file, label, split, x0, y0, x1, y1\n" + "".join(f"{r.file} , {r.label}\t, {r.split} , 1, 2, 30, 40\n" for r in rows.itertuples())
    (folder / "split.csv").write_text(text)
    table = folder_table(folder)
    assert table[["file", "label", "split"]].equals(rows) and table.box[0].tolist() == [1, 2, 30, 40]
    (folder / "split.csv").write_text('file,label,split\na/00.jpg, "crow, black", train\nb/01.jpg,jay ,train\n')
    with pytest.warns(DataWarning): assert csv_table(folder / "split.csv").label.tolist() == ["crow, black", "jay"]
    for label in ("  ", " \t "):
        (folder / "named.csv").write_text(f"file,label\na/00.jpg,a\nb/01.jpg,{label}\n")
        with pytest.raises(ValueError, match="line 3 has no file or no label"): csv_table(folder / "named.csv")
    (folder / "named.csv").write_text("file,label\na/00.jpg,a\na/00.jpg ,b\n")
    with pytest.raises(ValueError, match="a/00.jpg on lines 2, 3"): csv_table(folder / "named.csv")
    (folder / "named.csv").write_text("file,label,split\na/00.jpg,a,\nb/01.jpg,b,\n")
    with pytest.raises(ValueError, match=r"unknown split \(none\)"): csv_table(folder / "named.csv")


def test_a_file_instead_of_its_folder(folder):
    folder_table(folder).to_csv(folder / "split.csv", index=False)
    for read in (folder_table, FocusDataLoaders.from_folder):
        with pytest.raises(ValueError, match="split.csv is a file: give the folder that holds it"): read(folder / "split.csv")
        with pytest.raises(FileNotFoundError, match="no folder .*nowhere"): read(folder / "nowhere")


def test_unknown_arguments_are_errors(folder):
    for make in (lambda: loaders(folder, colour="red"), lambda: FocusDataLoaders.from_toy(2, 2, colour="red"),
                 lambda: FocusDataLoaders.from_csv(folder / "no.csv", colour="red")):
        with pytest.raises((TypeError, FileNotFoundError), match="colour|no file"): make()
    with pytest.raises(TypeError, match="unknown argument wokers; a loader takes .*num_workers"): loaders(folder, wokers=2)


def test_signatures_name_their_arguments():
    for name in ("from_folder", "from_csv", "from_cub", "from_aircraft", "from_cars"):
        parameters = inspect.signature(getattr(FocusDataLoaders, name)).parameters
        assert {"valid_pct", "image_size", "resize", "squash", "on_bad_image", "on_duplicate", "balance", "bs", "num_workers"} <= set(parameters), name
        assert "table" not in parameters and "kwargs" not in parameters


def test_skipped_pictures_are_counted_and_written(folder, tmp_path):
    (folder / "a" / "text.jpg").write_text("nothing")
    (folder / "b" / "cut.jpg").write_bytes((folder / "b" / "01.jpg").read_bytes()[:200])
    with pytest.raises(ValueError, match="2 of 18 pictures cannot be read"): loaders(folder)
    with pytest.warns(DataWarning, match="2 of 18 pictures cannot be read and are left out:(.|\n)*text.jpg"): dls = loaders(folder, on_bad_image="skip")
    assert len(dls.train_ds) + len(dls.valid_ds) == 16 and {f.name for f in dls.skipped} == {"text.jpg", "cut.jpg"}
    written = pd.read_csv(dls.write_skipped(tmp_path))
    assert written.columns.tolist() == ["file", "why"] and len(written) == 2 and written.why.str.len().min() > 5
    for _ in dls.train: pass


def test_check_goes_on_where_it_was_interrupted(folder, monkeypatch):
    import fd_focus.data.loaders
    files = sorted(folder.rglob("*.jpg"))
    seen = []
    def decode(file, *args):
        seen.append(file)
        if len(seen) == 10: raise KeyboardInterrupt
        return Image.open(file)
    monkeypatch.setattr(fd_focus.data.loaders, "_decode", decode)
    with pytest.raises(KeyboardInterrupt): check_images(files)
    looked = []
    monkeypatch.setattr(fd_focus.data.loaders, "_decode", lambda file, *args: looked.append(file) or Image.open(file))
    assert len(check_images(files)[1]) == 16 and 0 < len(looked) < 16


def test_cache_that_cannot_be_used(folder, monkeypatch, tmp_path):
    files = sorted(folder.rglob("*.jpg"))
    for bad in ("file", "broken"):
        home = tmp_path / bad
        if bad == "file": home.write_text("")
        else: (home / "fd_focus").mkdir(parents=True); (home / "fd_focus" / "checked.sqlite").write_text("no database" * 100)
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        assert len(check_images(files)[1]) == 16


def test_duplicates(folder):
    for to, source in {"b/copy.jpg": "a/00.jpg", "a/again.jpg": "a/02.jpg", "b/same.jpg": "b/03.jpg"}.items():
        jpeg = (folder / source).read_bytes()
        (folder / to).write_bytes(jpeg[:2] + b"\xff\xfe\x00\x08a copy" + jpeg[2:])      # a comment: other bytes, the same pixels
    table = pd.DataFrame(dict(file=[p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.*"))]))
    table["label"] = table.file.str[0]
    table["split"] = np.where(table.file.isin(["a/again.jpg", "a/04.jpg", "b/05.jpg"]), "valid", "train")
    with pytest.warns(DataWarning) as said: dls = FocusDataLoaders.from_table(table, folder, image_size=32, bs=4, num_workers=0)
    message = str(said[0].message)
    assert "1 picture under two labels and 1 picture in both training and validation" in message
    assert "a/00.jpg (a, train), b/copy.jpg (b, train)" in message and "a/02.jpg (a, train), a/again.jpg (a, valid)" in message
    assert len(dls.table) == 19 and dls.duplicates.problem.value_counts().to_dict() == {"two labels": 2, "train and valid": 2}
    with pytest.warns(DataWarning, match="3 files are left out"): dls = FocusDataLoaders.from_table(table, folder, image_size=32, bs=4, num_workers=0, on_duplicate="drop")
    assert set(table.file) - set(dls.table.file) == {"a/00.jpg", "b/copy.jpg", "a/02.jpg"} and len(dls.skipped) == 3
    assert len(dls.valid_ds) == 3
    with pytest.raises(ValueError, match="on_duplicate='keep'; use 'warn' or 'drop'"): loaders(folder, on_duplicate="keep")


def test_many_duplicates_are_counted_not_all_named(tmp_path):
    (tmp_path / "a").mkdir(); (tmp_path / "b").mkdir()
    for i in range(14):
        photograph(i).save(tmp_path / "a" / f"{i}.png")
        shutil.copy(tmp_path / "a" / f"{i}.png", tmp_path / "b" / f"{i}.png")
    with pytest.warns(DataWarning, match="14 pictures under two labels(.|\n)*and 4 more"): loaders(tmp_path)
    with pytest.warns(DataWarning), pytest.raises(ValueError, match="classes of which no picture is left: a, b"): loaders(tmp_path, on_duplicate="drop")


def test_no_warning_where_nothing_is_wrong(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        loaders(folder)


def test_loose_pictures_are_named(folder):
    photograph(99).save(folder / "loose.jpg")
    with pytest.warns(DataWarning, match="1 pictures in .* lie in no class folder and are left out: loose.jpg"): folder_table(folder)


def test_what_lies_beside_the_halves_is_told(folder):
    "A class folder or picture beside train/ and test/; the test half itself is left for later, without a word."
    place = folder.parent / "halves"
    for half in ("train", "valid", "Test"): shutil.copytree(folder, place / half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = folder_table(place)
    shutil.copytree(folder / "a", place / "c")
    photograph(50).save(place / "loose.jpg")
    n = len(list((folder / "a").iterdir())) + 1
    with pytest.warns(DataWarning, match=f"^{n} pictures in .*halves lie beside its halves Test, train, valid and are left out: c/00.jpg"): beside = folder_table(place)
    assert beside.equals(alone)


def test_classes_at_fault_are_named(folder):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="class folders without pictures: empty"): loaders(folder)
    (folder / "empty").rmdir()
    rows = folder_table(folder)
    rows.assign(split=np.where(rows.label == "b", "valid", "train")).to_csv(folder / "split.csv", index=False)
    with pytest.raises(ValueError, match="classes without training pictures: b"): loaders(folder)
    rows.assign(label="a").to_csv(folder / "split.csv", index=False)
    with pytest.raises(ValueError, match="only one class, a"): loaders(folder)


def test_boxes_of_a_csv(folder):
    rows = folder_table(folder)[["file", "label"]].assign(x0=8, y0=6, x1=40, y1=30).astype({"x0": float})
    rows.loc[3, ["x0", "y0", "x1", "y1"]] = None
    rows.to_csv(folder / "boxes.csv", index=False)
    dls = FocusDataLoaders.from_csv(folder / "boxes.csv", image_size=48, resize=48, bs=4, num_workers=0)
    known = [f for f in dls.valid_ds.items if f != rows.file[3]]
    assert np.allclose(dls.truth(known)["box"], [[6, 6, 30, 30]] * len(known))
    assert np.isnan(dls.truth([rows.file[3]])["box"]).all()
    assert len(dls.show_batch("train", max_n=4).axes) == 4
    rows.assign(x1=8).to_csv(folder / "boxes.csv", index=False)
    with pytest.raises(ValueError, match="the box on line 2 is empty"): csv_table(folder / "boxes.csv")


def test_show_batch_without_boxes(folder):
    import matplotlib.pyplot as plt
    dls = loaders(folder)
    assert [ax.get_title() for ax in dls.show_batch("valid", max_n=2).axes] == [dls.table.label[f] for f in dls.valid_ds.items[:2]]
    figure, axes = plt.subplots(1, 3)
    assert dls.show_batch(max_n=3, axes=axes) is figure
    with pytest.raises(ValueError, match="2 axes for 3 pictures"): dls.show_batch(max_n=3, axes=axes[:2])
    plt.close("all")


def test_balanced_loader_keeps_seed_and_validation(folder):
    for i in range(8, 40): photograph(100 + i).save(folder / "a" / f"{i}.jpg")
    epochs = []
    for _ in range(2):
        dls = loaders(folder, balance=True)
        dls.train.rng.seed(5)
        epochs.append([dls.train.get_idxs() for _ in range(30)])
    assert epochs[0] == epochs[1] and epochs[0][0] != epochs[0][1]
    share = np.mean([dls.table.label.iloc[dls.train_ds.splits[0][i]] == "b" for epoch in epochs[0] for i in epoch])
    assert .45 < share < .55
    assert len(dls.train.get_idxs()) == len(dls.train_ds)
    plain = loaders(folder)
    assert sorted(plain.train.get_idxs()) == list(range(len(plain.train_ds)))


def test_pictures_are_not_kept_in_memory(tmp_path):
    "300 pictures of 512x512 would be 236 MB; a second epoch over them needs next to nothing more than the first."
    import resource
    for i in range(300):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        photograph(i, (512, 512)).save(tmp_path / "ab"[i % 2] / f"{i}.jpg")
    dls = FocusDataLoaders.from_folder(tmp_path, image_size=224, resize=512, bs=8, num_workers=0)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peaks = []
    for _ in range(2):
        for _ in dls.train: pass
        peaks.append(peak())
    assert peaks[1] - peaks[0] < 40, peaks


def test_kept_pictures_are_bounded_and_never_stale(tmp_path, monkeypatch):
    files, keep = [tmp_path / f"{i}.jpg" for i in range(40)], tmp_path / "kept"
    for i, file in enumerate(files): photograph(i, (320, 240)).save(file, quality=95)
    kept = ReducedPictures(keep, min_side=60)
    first = [np.asarray(kept(file)).astype(int) for file in files[:4]]
    assert len(list(keep.iterdir())) == 4 and first[0].shape == (60, 80, 3)
    opened = []
    import fd_focus.data.loaders
    decode = fd_focus.data.loaders._decode
    monkeypatch.setattr(fd_focus.data.loaders, "_decode", lambda file, *args: opened.append(file) or decode(file, *args))
    assert all(np.abs(np.asarray(kept(file)) - pixels).mean() < 2 for file, pixels in zip(files, first)) and not set(opened) & set(files)
    photograph(99, (320, 240)).save(files[0], quality=94)                       # changed: decoded anew
    assert np.abs(np.asarray(kept(files[0])) - first[0]).mean() > 5
    for place in keep.iterdir(): place.write_text("damaged")                    # damaged: decoded anew
    assert np.abs(np.asarray(kept(files[1])) - first[1]).mean() < 2
    photograph(5, (100, 100)).save(tmp_path / "small.jpg")                      # small: not kept
    before = len(list(keep.iterdir()))
    kept(tmp_path / "small.jpg")
    assert len(list(keep.iterdir())) == before
    bounded = ReducedPictures(tmp_path / "bounded", min_side=60, gigabytes=1e-5)     # 10 kB: looked at after every 16 pictures
    for file in files: bounded(file)
    assert 10_000 <= bounded.used() < 10_000 + 16 * 8_000
    with pytest.raises(ValueError, match="cannot be read as a picture"): (tmp_path / "bad.jpg").write_text("x"); kept(tmp_path / "bad.jpg")


@pytest.mark.filterwarnings("ignore::fd_focus.data.loaders.DataWarning")        # of a validation half that valid_pct leaves out
def test_what_accuracy_is_judged_by(folder, tmp_path):
    "A test half is told from a validation half and from a share of the training pictures, so that nothing is chosen on it."
    by = lambda **kwargs: loaders(folder, **kwargs).judged_by
    table = folder_table(folder).drop(columns="split")
    assert by() == by(valid_pct=.5) == "train"
    for halves, judged in ((["train", "test"], "test"), (["train", "valid"], "valid"), (["train", "val"], "valid")):
        table.assign(split=[halves[i % 2] for i in range(len(table))]).to_csv(folder / "split.csv", index=False)
        assert by() == judged and by(valid_pct=.5) == "train"
    settings = Settings(str(folder), arch="toy_resnet", image_size=32, bs=4, m=2, l=2, keep_best=True)
    table.assign(split=["train" if i % 2 else "test" for i in range(len(table))]).to_csv(folder / "split.csv", index=False)
    with pytest.raises(ValueError, match="keep_best choose the epoch on them; use valid_pct"): make_learner(settings)
    make_learner(replace(settings, valid_pct=.5))


def test_a_class_may_be_called_none(folder):
    table = folder_table(folder)
    table.assign(label=table.label.replace(table.label[0], "None")).to_csv(folder / "named.csv", index=False)
    assert "None" in set(csv_table(folder / "named.csv").label)
    table.assign(label=table.label.replace(table.label[0], "")).to_csv(folder / "named.csv", index=False)
    with pytest.raises(ValueError, match="has no file or no label"): csv_table(folder / "named.csv")


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_images_as_items(tmp_path, kind):
    "An open PIL image, read or not, means the same as its file."
    for k in range(8):
        file = tmp_path / f"birds/{'ab'[k % 2]}/{k}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(k).save(file)
    dls = FocusDataLoaders.from_folder(tmp_path / "birds", image_size=32, bs=2)
    item = dls.valid_ds.items[0]
    path = tmp_path / "birds" / item
    with Image.open(path) as still_a_file: lazy = dls.test_dl([still_a_file]).one_batch()[0]
    for same in (lazy, dls.test_dl([open_image(path)]).one_batch()[0], dls.test_dl([np.asarray(Image.open(path))]).one_batch()[0]):
        assert np.array_equal(same, dls.test_dl([item]).one_batch()[0])


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


def test_a_turned_tiff_keeps_its_boxes(tmp_path):
    "Size and truth of a TIFF that its EXIF turns are those of the same pixels as PNG."
    exif = Image.Exif()
    exif[0x112] = 6
    rows = []
    for i in range(8):
        for kind in ("tif", "png"):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (50, 150, 3), dtype=np.uint8)).save(tmp_path / f"{i}.{kind}", exif=exif)
            rows.append(dict(file=f"{i}.{kind}", label="ab"[i % 2], split="train" if i < 4 else "valid", box=np.array([0, 0, 25, 75], np.float32)))
    dls = FocusDataLoaders.from_table(pd.DataFrame(rows), tmp_path, image_size=32, bs=4, num_workers=0, on_duplicate="warn")
    boxes = dls.truth(list(dls.valid_ds.items))["box"]
    assert np.allclose(boxes, boxes[0])


def test_links_are_followed_and_circles_end(folder):
    away = folder.parent / "away"
    shutil.copytree(folder / "a", away)
    (folder / "a" / "more").symlink_to(away)
    (folder / "a" / "circle").symlink_to(folder / "a")
    assert (folder_table(folder).label == "a").sum() == 2 * len(list(away.iterdir()))


def test_names_that_are_no_utf8(folder, tmp_path, monkeypatch):
    "As an old archive leaves them: checked, remembered, loaded, and kept reduced."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = next((folder / "a").iterdir())
    odd = Path(os.fsdecode(os.fsencode(file.parent) + b"/caf\xe9.jpg"))
    file.rename(odd)
    for _ in range(2): dls = loaders(folder)                                     # the second time from what was remembered
    assert len(dls.train.one_batch()[0]) and any(str(item).endswith(odd.name) for item in [*dls.train_ds.items, *dls.valid_ds.items])
    photograph(50).resize((400, 300)).save(odd)
    kept = ReducedPictures(tmp_path / "kept", 60)
    assert kept(odd).size == kept(odd).size and len(list((tmp_path / "kept").glob("*.jpg"))) == 1


def test_a_cache_that_is_deleted_in_between_is_made_anew(folder, tmp_path):
    photograph(50).resize((400, 300)).save(tmp_path / "large.jpg")
    kept = ReducedPictures(tmp_path / "kept", 60)
    shutil.rmtree(tmp_path / "kept")
    kept(tmp_path / "large.jpg")
    assert len(list((tmp_path / "kept").glob("*.jpg"))) == 1


def test_a_folder_to_be_written_is_no_class(folder):
    for what in (folder / "runs" / "train", folder, folder / "kept"):
        with pytest.raises(ValueError, match="lies among the class folders of .* and would be taken for one; give a folder elsewhere"): check_apart(what, folder, "--out")
    check_apart(folder / ".kept", folder, "cache"); check_apart(folder.parent / "kept", folder, "cache")
    with pytest.raises(ValueError, match="^cache .*kept lies among the class folders"): FocusDataLoaders.from_folder(folder, image_size=32, bs=4, num_workers=0, cache=folder / "kept")
    halves = folder.parent / "halves"
    for half in ("train", "test"): shutil.copytree(folder, halves / half)
    check_apart(halves / "runs", halves, "--out")                                # train/ and test/ say what the classes are
