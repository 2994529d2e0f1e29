"The official indexes of the benchmarks, and pictures as they come."
import gzip
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from fd_focus.data import aircraft_table, cars_table, cub_table, folder_table, open_image


def test_cub_index(data, tmp_path):
    root = tmp_path / "CUB_200_2011"
    shutil.copytree(data / "cub_200_2011_index", root)
    (root / "parts" / "part_locs.txt").write_bytes(gzip.decompress((root / "parts" / "part_locs.txt.gz").read_bytes()))
    table = cub_table(tmp_path)
    assert len(table) == 11788 and dict(table.split.value_counts()) == {"train": 5994, "valid": 5794} and table.label.nunique() == 200
    first = table.iloc[0]
    assert first.file == "images/001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"
    assert first.label == "001.Black_footed_Albatross" and first.split == "valid" and first.box.tolist() == [60, 27, 385, 331]
    assert first.parts.shape == (15, 3) and first.visible.dtype == bool
    chosen = cub_table(tmp_path, valid_pct=0.1)
    assert len(chosen) == 5994 and set(chosen.file) <= set(table.file[table.split == "train"])
    assert chosen.groupby("label").split.nunique().eq(2).all()


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
    first = table.iloc[0]
    assert (first.file, first.label) == ("cars_train/00001.jpg", "Audi TTS Coupe 2012") and first.box.tolist() == [38, 115, 569, 375]


def test_cars_single_archive(tmp_path):
    dtype = [(n, "O") for n in ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")]
    rows = np.array([("car_ims/000001.jpg", 1, 2, 30, 40, 1, 0), ("car_ims/000002.jpg", 5, 6, 30, 40, 2, 1)], dtype=dtype)
    savemat(tmp_path / "cars_annos.mat", dict(annotations=rows, class_names=np.array(["Ford F/150 2007", "Audi A4"], dtype=object)))
    table = cars_table(tmp_path)
    assert table.label.tolist() == ["Ford F-150 2007", "Audi A4"] and table.split.tolist() == ["train", "valid"]
    assert table.box[0].tolist() == [0, 1, 30, 40]


def test_aircraft(tmp_path):
    root = tmp_path / "fgvc-aircraft-2013b" / "data"
    (root / "images").mkdir(parents=True)
    for level, names in dict(variant=("707-320", "A300B4"), family=("Boeing 707", "A300"), manufacturer=("Boeing", "Airbus")).items():
        (root / f"images_{level}_trainval.txt").write_text(f"1025794 {names[0]}\n1340192 {names[1]}\n")
        (root / f"images_{level}_test.txt").write_text(f"0034309 {names[0]}\n")
    (root / "images_box.txt").write_text("1025794 3 144 998 431\n1340192 1 1 5 5\n0034309 2 2 9 9\n")
    table = aircraft_table(tmp_path, "family")
    assert table.label.tolist() == ["Boeing 707", "A300", "Boeing 707"] and table.split.tolist() == ["train", "train", "valid"]
    assert table.file[0] == "fgvc-aircraft-2013b/data/images/1025794.jpg" and table.box[0].tolist() == [2, 143, 998, 431]


def test_real_photographs(data):
    table = folder_table(data / "cars_sedan33")
    assert dict(table.split.value_counts()) == {"train": 924, "valid": 513} and table.label.nunique() == 33


@pytest.mark.parametrize("mode,suffix", [("L", "jpg"), ("P", "gif"), ("CMYK", "jpg"), ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("I;16", "png"), ("F", "tiff")])
def test_modes(tmp_path, mode, suffix):
    "A left half that is dark and a right half that is bright stay so, in every mode."
    grey = np.zeros((20, 40), np.uint8); grey[:, 20:] = 255
    image = {"I;16": lambda: Image.fromarray(grey.astype(np.uint16) * 257), "F": lambda: Image.fromarray(grey.astype(np.float32) / 255)}.get(
        mode, lambda: Image.fromarray(grey).convert("RGB" if mode in ("RGBA", "CMYK", "P") else "L").convert(mode))()
    image.save(tmp_path / f"x.{suffix}")
    pixels = np.asarray(open_image(tmp_path / f"x.{suffix}")).astype(int)
    assert pixels.shape == (20, 40, 3) and pixels[:, :15].max() < 20 and pixels[:, 25:].min() > 235


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif(tmp_path, orientation):
    grey = np.zeros((20, 40), np.uint8); grey[:10, :20] = 255
    image = Image.fromarray(grey); exif = image.getexif(); exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    operation = {2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
                 6: [Image.Transpose.ROTATE_270], 7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_90]}.get(orientation, [])
    reference = image
    for step in operation: reference = reference.transpose(step)
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.png"))[..., 0], np.asarray(reference))
