"Boxes and parts through the loaders' transforms."
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import two_classes
from fastai.vision.augment import FlipItem, RandomCrop, Resize, ResizeMethod
from PIL import Image

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.tables import csv_table, folder_table

pytestmark = pytest.mark.usefixtures("no_memory_of_earlier_checks")


@pytest.fixture
def folder(tmp_path): return two_classes(tmp_path / "pictures")


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


def test_a_turned_tiff_keeps_its_boxes(tmp_path):
    "Size and truth of a TIFF that its EXIF turns are those of the same pixels as PNG."
    exif = Image.Exif()
    exif[0x112] = 6
    rows = []
    for i in range(8):
        for kind in ("tif", "png"):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (50, 150, 3), dtype=np.uint8)).save(
                tmp_path / f"{i}.{kind}", exif=exif
            )
            rows.append(
                dict(
                    file=f"{i}.{kind}",
                    label="ab"[i % 2],
                    split="train" if i < 4 else "valid",
                    box=np.array([0, 0, 25, 75], np.float32),
                )
            )
    dls = FocusDataLoaders.from_table(
        pd.DataFrame(rows), tmp_path, image_size=32, bs=4, num_workers=0, on_duplicate="warn"
    )
    boxes = dls.truth(list(dls.valid_ds.items))["box"]
    assert np.allclose(boxes, boxes[0])


@pytest.fixture
def red_boxes(tmp_path):
    "A table of black pictures of odd sizes, one stored on its side, with a red box each; its middle is part 0."
    exif, rows = Image.Exif(), []
    exif[0x112] = 6
    for i, (w, h) in enumerate([(300, 120), (90, 200), (128, 128), (301, 77), (1610, 1203), (200, 100)] * 2):
        canvas = np.zeros((h, w, 3), np.uint8)
        x0, y0, x1, y1 = w // 3, h // 4, w // 2, h // 2
        canvas[y0:y1, x0:x1] = (255, 0, 0)
        canvas[..., 1] = 10 * i                               # no two pictures are the same
        picture, turned = Image.fromarray(canvas), i % 6 == 5
        if turned: picture = picture.transpose(Image.Transpose.ROTATE_90)
        picture.save(tmp_path / f"{i}.jpg", quality=98, subsampling=0, **({"exif": exif} if turned else {}))
        parts = np.array([[(x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2], [w - 1, h - 1, 1]], np.float32)
        rows.append((f"{i}.jpg", "even" if i % 2 else "odd", "train" if i < 6 else "valid",
                     np.array([x0, y0, x1, y1], np.float32), parts))
    return pd.DataFrame(rows, columns=["file", "label", "split", "box", "parts"])


def in_step(x, found, tolerance=2):
    "Where the red is must be where the truth says, to two pixels (JPEG, interpolation)."
    for picture, box, parts in zip(x, found["box"], found["parts"]):
        rows, columns = (picture[0] > .5).nonzero().T
        if not len(rows) or np.isnan(box).any():        # cropped away, or all but a sliver
            assert np.isnan(box).any() or min(box[2:] - box[:2]) <= tolerance, box
            continue
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(seen - box).max() <= tolerance, (seen, box)
        if box.min() > 0 and box.max() < 112:           # whole in the picture: its middle is where the part is
            assert np.abs((seen[:2] + seen[2:]) / 2 - parts[0, :2]).max() <= tolerance, (seen, box, parts)


@pytest.mark.parametrize("kwargs", [
    dict(), dict(squash=False), dict(squash="pad"), dict(item_tfms=[RandomCrop(110), Resize(112), FlipItem()]),
    dict(item_tfms=[Resize(112, ResizeMethod.Pad, "zeros")])], ids=["paper", "shape kept", "whole", "own", "padded"])
def test_truth_against_pixels(red_boxes, tmp_path, kwargs):
    dls = FocusDataLoaders.from_table(red_boxes, tmp_path, image_size=112, bs=6, num_workers=0, **kwargs)
    items, found = dls.valid_ds.items, dls.truth(dls.valid_ds.items)
    in_step(dls.valid.one_batch()[0].as_subclass(torch.Tensor), found)
    in_step(*dls.pictures_with_truth("valid", items)[::2])
    if "item_tfms" in kwargs: return
    for _ in range(5): in_step(*dls.pictures_with_truth("train", dls.train_ds.items)[::2])
    assert found["visible"].tolist() == [[True, False]] * 6       # the picture's corner is cropped away


@pytest.mark.parametrize("squash", [True, False, "pad"])
def test_the_closed_form_against_fastais_transforms(red_boxes, tmp_path, squash):
    dls = FocusDataLoaders.from_table(red_boxes, tmp_path, image_size=112, bs=6, num_workers=0, squash=squash)
    quick, dls.geometry = dls.truth(dls.valid_ds.items), None
    for name, values in dls.truth(dls.valid_ds.items).items():      # a kept shape is rounded to whole pixels
        assert np.abs(values.astype(float) - quick[name]).max() < (1e-3 if squash is True else 1), name


def test_a_table_without_boxes_says_so(folder):
    dls = FocusDataLoaders.from_folder(folder, image_size=32, bs=4, num_workers=0)
    for ask in (lambda: dls.truth(["a/00.jpg"]), dls.pictures_with_truth):
        with pytest.raises(ValueError, match="know no boxes: localisation needs a table with a column 'box'"): ask()


@pytest.mark.parametrize("squash", [True, False, "pad"])
def test_points_of_a_csv_against_pixels(red_boxes, tmp_path, squash):
    "The middle of each red box, given in a parts.csv, is the middle of the red that the network sees."
    rows = red_boxes.assign(split=red_boxes.split.replace("valid", "test"))
    rows[["file", "label", "split"]].to_csv(tmp_path / "split.csv", index=False)
    points = [(row.file, name, *point[:2]) for row in rows.itertuples()
              for name, point in zip(("red", "edge"), row.parts) if name == "red" or row.file != "7.jpg"]
    pd.DataFrame(points, columns=["file", "part", "x", "y"]).to_csv(tmp_path / "parts.csv", index=False)
    dls = FocusDataLoaders.from_folder(tmp_path, image_size=112, squash=squash, bs=6, num_workers=0)
    x, found = dls.valid.one_batch()[0].as_subclass(torch.Tensor), dls.truth(dls.valid_ds.items)
    assert dls.table.attrs["part_names"] == ["edge", "red"] and np.isnan(found["box"]).all()
    for picture, (_, red), visible in zip(x, found["parts"], found["visible"]):
        rows, columns = (picture[0] > .5).nonzero().T
        if not len(rows): assert not visible[1]; continue
        seen = np.array([columns.min() + columns.max() + 1, rows.min() + rows.max() + 1]) / 2
        if columns.min() > 0 and rows.min() > 0: assert np.abs(seen - red[:2]).max() <= 2 and visible[1]
        assert not visible[0] and red[2] == 0                      # the corner is cropped away
