"The official indexes of the three benchmarks, read by two readers."
import gzip
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat
from conftest import photograph

from fd_focus.data.benchmarks import aircraft_table, cars_table, cub_table
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning
from fd_focus.evidence.localisation import BIRD_GROUPS

pytestmark = pytest.mark.usefixtures("no_memory_of_earlier_checks")


def loaders(folder, **kwargs):
    return FocusDataLoaders.from_folder(folder, **dict(dict(image_size=32, bs=4, num_workers=0), **kwargs))


def test_cub_index(data, tmp_path):
    root = tmp_path / "CUB_200_2011"
    shutil.copytree(data / "cub_200_2011_index", root)
    (root / "parts" / "part_locs.txt").write_bytes(gzip.decompress((root / "parts" / "part_locs.txt.gz").read_bytes()))
    table = cub_table(tmp_path)
    assert (
        len(table) == 11788
        and dict(table.split.value_counts()) == {"train": 5994, "valid": 5794}
        and table.label.nunique() == 200
    )
    first, last = table.iloc[0], table.iloc[-1]
    assert first.file == "images/001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"
    assert (
        first.label == "001.Black_footed_Albatross"
        and first.split == "valid"
        and first.box.tolist() == [60, 27, 385, 331]
    )
    assert first.parts.shape == (15, 3) and first.visible.dtype == bool
    # The beak (part 2) of the first bird, and a left eye (part 7) that does not show, as part_locs.txt has them.
    assert first.parts[1].tolist() == [312, 182, 0] and first.visible[1] and not first.visible[6]
    names = table.attrs["part_names"]
    assert names[1] == "beak" and names[6] == "left eye"
    assert set(names) == {part for parts in BIRD_GROUPS.values() for part in parts}
    assert last.label == "200.Common_Yellowthroat" and last.file.startswith("images/200.Common_Yellowthroat/")
    # Every row against the raw files, read without pandas.
    lines = lambda name: [line.split() for line in (root / name).read_text().splitlines()]
    assert table.label.tolist() == [Path(name).parent.name for _, name in lines("images.txt")]
    assert (table.split == "train").tolist() == [flag == "1" for _, flag in lines("train_test_split.txt")]
    boxes = np.array(lines("bounding_boxes.txt"), float)[:, 1:]
    assert np.allclose(np.stack(table.box), np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    parts = np.array(lines("parts/part_locs.txt"), float).reshape(11788, 15, 5)
    assert (
        np.allclose(np.stack(table.parts)[..., :2], parts[..., 2:4], atol=1e-3)
        and (np.stack(table.visible) == (parts[..., 4] == 1)).all()
    )
    chosen = cub_table(tmp_path, valid_pct=0.1)
    assert len(chosen) == 5994 and set(chosen.file) <= set(table.file[table.split == "train"])
    assert chosen.groupby("label").split.nunique().eq(2).all()
    assert cub_table(tmp_path, valid_pct=0.1).equals(chosen) and not cub_table(
        tmp_path, valid_pct=0.1, seed=1
    ).split.equals(chosen.split)
    with pytest.raises(FileNotFoundError, match="CUB_200_2011/images. CUB-200-2011: download=True"):
        FocusDataLoaders.from_cub(tmp_path)


def cars_with_labels(data, root):
    "torchvision's layout; the labels of the test half are not in the development data, so they are made up."
    (root / "devkit").mkdir(parents=True)
    for name in ("cars_meta.mat", "cars_train_annos.mat"):
        shutil.copy(data / "stanford_cars_devkit" / name, root / "devkit")
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
    assert (first.file, first.label) == ("cars_train/00001.jpg", "Audi TTS Coupe 2012") and first.box.tolist() == [
        38,
        115,
        569,
        375,
    ]
    assert last.file == "cars_train/08144.jpg"
    assert table[table.split == "valid"].iloc[0].box.tolist() == [29, 51, 246, 147]          # cars_test/00001.jpg
    boxes = np.stack(table.box)
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0
    with pytest.raises(FileNotFoundError, match="cars_test, .*cars_train. Stanford Cars is no longer at its source"):
        FocusDataLoaders.from_cars(tmp_path)
    # torchvision reads the same files: same order, same classes.
    from torchvision.datasets import StanfordCars
    for folder in ("cars_train", "cars_test"): (tmp_path / "stanford_cars" / folder).mkdir()
    for split, ours in (("train", "train"), ("test", "valid")):
        theirs, rows = StanfordCars(tmp_path, split=split), table[table.split == ours]
        assert [
            Path(file).relative_to(tmp_path / "stanford_cars").as_posix() for file, _ in theirs._samples
        ] == rows.file.tolist()
        assert [theirs.classes[k].replace("/", "-") for _, k in theirs._samples] == rows.label.tolist()


def small_cub(root):
    "CUB's layout with two classes of three pictures."
    lists = dict(
        images="{i} {c}/{i}.jpg",
        image_class_labels="{i} {k}",
        train_test_split="{i} {t}",
        bounding_boxes="{i} 2.0 3.0 20.0 30.0",
    )
    rows = [dict(i=i, k=1 + i % 2, c="ab"[i % 2], t=int(i < 4)) for i in range(6)]
    for row in rows:
        (root / "images" / row["c"]).mkdir(parents=True, exist_ok=True)
        photograph(row["i"]).save(root / "images" / row["c"] / f"{row['i']}.jpg")
    for name, line in lists.items():
        (root / f"{name}.txt").write_text("".join(line.format(**row) + "\n" for row in rows))
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
    official.assign(split=official.split.replace("valid", "test"))[["file", "label", "split"]].to_csv(
        tmp_path / "split.csv", index=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        dls = loaders(tmp_path, bs=2)
    assert dls.judged_by == "test" and dls.table[["file", "label", "split"]].reset_index(drop=True).equals(
        official[["file", "label", "split"]]
    )


def test_cars_single_archive(tmp_path):
    dtype = [(n, "O") for n in ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")]
    rows = np.array([(f"car_ims/{i:06d}.jpg", 1 + i, 2, 30, 40, 1 + i % 2, int(i > 3)) for i in range(6)], dtype=dtype)
    savemat(
        tmp_path / "cars_annos.mat",
        dict(annotations=rows, class_names=np.array(["Ford F/150 2007", "Audi A4"], dtype=object)),
    )
    table = cars_table(tmp_path)
    assert (
        table.label.tolist() == ["Ford F-150 2007", "Audi A4"] * 3
        and table.split.tolist() == ["train"] * 4 + ["valid"] * 2
    )
    assert table.box[0].tolist() == [0, 1, 30, 40]
    (tmp_path / "car_ims").mkdir()
    for i in range(6): photograph(i).save(tmp_path / f"car_ims/{i:06d}.jpg")
    dls = FocusDataLoaders.from_cars(tmp_path, image_size=32, bs=2, num_workers=0)
    assert (len(dls.train_ds), len(dls.valid_ds), list(dls.vocab)) == (4, 2, ["Audi A4", "Ford F-150 2007"])
    # x 5..30 of 64 and y 1..40 of 48, squashed to 37, less 2.5 at the border
    assert np.allclose(dls.truth([table.file[4]])["box"], [[0, 0, 30 * 37 / 64 - 2.5, 40 * 37 / 48 - 2.5]], atol=1e-4)


def aircraft(root, counts=None, classes=None):
    "FGVC-Aircraft's layout: one list a level and split, classes that nest, numbers as file names."
    counts = counts or dict(trainval=6667, test=3333)
    classes = classes or dict(variant=100, family=70, manufacturer=30)
    root = root / "fgvc-aircraft-2013b" / "data"
    (root / "images").mkdir(parents=True)
    number, boxes = 0, []
    for split, n in counts.items():
        rows = range(number, number := number + n)
        boxes += [f"{34309 + i:07d} {3 + i % 5} 10 60 40" for i in rows]
        for level, k in classes.items():
            (root / f"images_{level}_{split}.txt").write_text(
                "".join(f"{34309 + i:07d} {level} {i % classes['variant'] * k // classes['variant']}/X\n" for i in rows)
            )
    files = dict(variant="variants", family="families", manufacturer="manufacturers")
    for level, k in classes.items():
        (root / f"{files[level]}.txt").write_text("".join(f"{level} {i}/X\n" for i in range(k)))
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
    with pytest.raises(ValueError, match="only one class, manufacturer 0/X"):
        FocusDataLoaders.from_aircraft(tmp_path, "manufacturer", image_size=32)


@pytest.mark.parametrize("cache", [False, True])
def test_the_banner_below_an_aircraft_is_cut_off(tmp_path, cache):
    "The lowest 20 pixels are white here, and reach neither training nor validation, decoded whole or reduced."
    root = aircraft(tmp_path, dict(trainval=4, test=4), dict(variant=2))
    for i in range(8):
        pixels = np.full(((480, 400, 3) if i % 2 else (120, 100, 3)), 40 + i, np.uint8)
        pixels[-20:] = 255
        Image.fromarray(pixels).save(root / "images" / f"{34309 + i:07d}.jpg", quality=100, subsampling=0)
    dls = FocusDataLoaders.from_aircraft(tmp_path, image_size=32, bs=2, num_workers=0,
                                         cache=tmp_path / "kept" if cache else None)
    for _ in range(2): assert max(float(x.max()) for dl in dls.loaders for x, _ in dl) < .4
    item = dls.valid_ds.items[0]
    height = Image.open(tmp_path / item).height            # the box (2, 9, 60, 40) is placed in what is left
    assert np.allclose(dls.truth([item])["box"][0, 3], 40 * 37 / (height - 20) - 2.5, atol=1e-3)
    assert np.allclose(dls.pictures_with_truth("valid", [item])[2]["box"], dls.truth([item])["box"], atol=.6)
    assert "banner" in FocusDataLoaders.from_aircraft.__doc__
    photo = tmp_path / "mine.jpg"                           # another's photograph is not cut
    Image.fromarray(np.vstack([np.zeros((100, 99, 3), np.uint8), np.full((20, 99, 3), 255, np.uint8)])).save(photo)
    assert float(dls.test_dl([photo]).one_batch()[0].max()) > .9


@pytest.mark.parametrize("images, devkit, labels", [
    ("{0}", "devkit", "."), ("{0}/{0}", "car_devkit/devkit", "."),
    ("cars/{0}/{0}", "cars/car_devkit", "cars/car_devkit"),
    ("stanford_cars/{0}", "stanford_cars/devkit", "stanford_cars"),
])
def test_cars_as_they_are_packed(tmp_path, images, devkit, labels):
    kinds = [(n, "O") for n in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    rows = np.array([[(1, 1, 30, 30, i % 2 + 1, f"{i + 1:05d}.jpg") for i in range(4)]], dtype=kinds)
    for half in ("cars_train", "cars_test"):
        (tmp_path / images.format(half)).mkdir(parents=True)
        for i in range(4): photograph(len(half) * 10 + i).save(tmp_path / images.format(half) / f"{i + 1:05d}.jpg")
    (tmp_path / devkit).mkdir(parents=True)
    savemat(tmp_path / devkit / "cars_train_annos.mat", dict(annotations=rows))
    savemat(tmp_path / labels / "cars_test_annos_withlabels.mat", dict(annotations=rows))
    savemat(tmp_path / devkit / "cars_meta.mat", dict(class_names=np.array([["Acura RL", "BMW M3"]], dtype=object)))
    savemat(tmp_path / "cars_annos.mat", dict(annotations=rows))             # of other pictures, beside these
    dls = FocusDataLoaders.from_cars(tmp_path, image_size=32, bs=2, num_workers=0)
    assert (len(dls.train_ds), len(dls.valid_ds), list(dls.vocab)) == (4, 4, ["Acura RL", "BMW M3"])
    assert dls.table.file.iloc[0] == f"{images.format('cars_train')}/00001.jpg"


def test_aircraft_as_they_are_packed(tmp_path):
    root = aircraft(tmp_path / "fgvc-aircraft-2013b", dict(trainval=4, test=2), dict(variant=2))
    for i in range(6): photograph(i).save(root / "images" / f"{34309 + i:07d}.jpg")
    for path in (tmp_path, tmp_path / "fgvc-aircraft-2013b", root):
        dls = FocusDataLoaders.from_aircraft(path, image_size=32, bs=2, num_workers=0)
        assert (len(dls.train_ds), len(dls.valid_ds)) == (4, 2)


def test_downloads_are_asked_for_once(tmp_path, monkeypatch):
    "The downloaders get the folder; nothing is fetched where the set is there, or without being asked."
    import torchvision
    import fd_focus.data.benchmarks
    calls = []
    monkeypatch.setattr(fd_focus.data.benchmarks, "untar_data", lambda url, archive, data: calls.append((url, data)))
    monkeypatch.setattr(
        torchvision.datasets, "FGVCAircraft", lambda root, split, download: calls.append((root, download))
    )
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
