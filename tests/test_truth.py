"Boxes and parts through the loaders' transforms."

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from conftest import two_classes

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
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (50, 150, 3), dtype=np.uint8)).save(tmp_path / f"{i}.{kind}", exif=exif)
            rows.append(dict(file=f"{i}.{kind}", label="ab"[i % 2], split="train" if i < 4 else "valid", box=np.array([0, 0, 25, 75], np.float32)))
    dls = FocusDataLoaders.from_table(pd.DataFrame(rows), tmp_path, image_size=32, bs=4, num_workers=0, on_duplicate="warn")
    boxes = dls.truth(list(dls.valid_ds.items))["box"]
    assert np.allclose(boxes, boxes[0])
