"What loaders refuse, leave out, draw and keep."
import copy
import gc
import inspect
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import set_seed
from fastai.vision.augment import CropPad, Resize
from fastai.vision.core import PILImage
from PIL import Image
from conftest import photograph, two_classes

from fd_focus.data.items import CropFlip, paper_transforms
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning, ReducedPictures, open_image
from fd_focus.data.tables import folder_table
from fd_focus.training.distributed import SharedDL
from fd_focus.training.learner import focus_learner
from fd_focus.training.run import Settings, make_learner
from fd_focus.use.predict import prepare

pytestmark = pytest.mark.usefixtures("no_memory_of_earlier_checks")


@pytest.fixture
def folder(tmp_path): return two_classes(tmp_path / "pictures")


def loaders(folder, **kwargs):
    return FocusDataLoaders.from_folder(folder, **dict(dict(image_size=32, bs=4, num_workers=0), **kwargs))


def test_batches_that_never_fill(folder):
    def of_table(**kwargs): return FocusDataLoaders.from_table(folder_table(folder), folder, image_size=32, **kwargs)
    for make in (lambda **kwargs: loaders(folder, **kwargs), of_table,
                 lambda **kwargs: loaders(folder, balance=True, **kwargs)):
        with pytest.raises(ValueError, match="bs=16 is more than the 12 training pictures; use a smaller batch"):
            make(bs=16)
        assert len(make(bs=12).train) == 1
    assert len(loaders(folder, bs=16, drop_last=False).train) == 1
    with pytest.raises(ValueError, match="bs=4 is more than the 3 training pictures"): loaders(folder, n=3)
    with pytest.raises(ValueError, match="bs=32 is more than the 6 training pictures"):
        FocusDataLoaders.from_toy(2, 1, n_classes=3)
    with pytest.raises(ValueError, match="bs=16 is more than the 12 training pictures; use a smaller batch"):
        make_learner(Settings(str(folder), arch="toy_resnet", image_size=32, bs=16))


def test_unknown_arguments_are_errors(folder):
    for make in (lambda: loaders(folder, colour="red"), lambda: FocusDataLoaders.from_toy(2, 2, colour="red"),
                 lambda: FocusDataLoaders.from_csv(folder / "no.csv", colour="red")):
        with pytest.raises((TypeError, FileNotFoundError), match="colour|no file"): make()
    with pytest.raises(TypeError, match="unknown argument wokers; a loader takes .*num_workers"):
        loaders(folder, wokers=2)


def test_signatures_name_their_arguments():
    for name in ("from_folder", "from_csv", "from_cub", "from_aircraft", "from_cars"):
        parameters = inspect.signature(getattr(FocusDataLoaders, name)).parameters
        assert {
            "valid_pct",
            "image_size",
            "resize",
            "squash",
            "on_bad_image",
            "on_duplicate",
            "balance",
            "bs",
            "num_workers",
        } <= set(parameters), name
        assert "table" not in parameters and "kwargs" not in parameters


def test_skipped_pictures_are_counted_and_written(folder, tmp_path):
    (folder / "a" / "text.jpg").write_text("nothing")
    (folder / "b" / "cut.jpg").write_bytes((folder / "b" / "01.jpg").read_bytes()[:200])
    with pytest.raises(ValueError, match="2 of 18 pictures cannot be read"): loaders(folder)
    with pytest.warns(DataWarning, match="2 of 18 pictures cannot be read and are left out:(.|\n)*text.jpg"):
        dls = loaders(folder, on_bad_image="skip")
    assert len(dls.train_ds) + len(dls.valid_ds) == 16 and {f.name for f in dls.skipped} == {"text.jpg", "cut.jpg"}
    written = pd.read_csv(dls.write_skipped(tmp_path))
    assert written.columns.tolist() == ["file", "why"] and len(written) == 2 and written.why.str.len().min() > 5
    for _ in dls.train: pass


def test_duplicates(folder):
    for to, source in {"b/copy.jpg": "a/00.jpg", "a/again.jpg": "a/02.jpg", "b/same.jpg": "b/03.jpg"}.items():
        jpeg = (folder / source).read_bytes()
        # a comment: other bytes, the same pixels
        (folder / to).write_bytes(jpeg[:2] + b"\xff\xfe\x00\x08a copy" + jpeg[2:])
    table = pd.DataFrame(dict(file=[p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.*"))]))
    table["label"] = table.file.str[0]
    table["split"] = np.where(table.file.isin(["a/again.jpg", "a/04.jpg", "b/05.jpg"]), "valid", "train")
    with pytest.warns(DataWarning) as said:
        dls = FocusDataLoaders.from_table(table, folder, image_size=32, bs=4, num_workers=0)
    message = str(said[0].message)
    assert "1 picture under two labels and 1 picture in both training and validation" in message
    assert (
        "a/00.jpg (a, train), b/copy.jpg (b, train)" in message
        and "a/02.jpg (a, train), a/again.jpg (a, valid)" in message
    )
    assert len(dls.table) == 19 and dls.duplicates.problem.value_counts().to_dict() == {
        "two labels": 2,
        "train and valid": 2,
    }
    with pytest.warns(DataWarning, match="3 files are left out"):
        dls = FocusDataLoaders.from_table(table, folder, image_size=32, bs=4, num_workers=0, on_duplicate="drop")
    assert set(table.file) - set(dls.table.file) == {"a/00.jpg", "b/copy.jpg", "a/02.jpg"} and len(dls.skipped) == 3
    assert len(dls.valid_ds) == 3
    with pytest.raises(ValueError, match="on_duplicate='keep'; use 'warn' or 'drop'"):
        loaders(folder, on_duplicate="keep")


def test_many_duplicates_are_counted_not_all_named(tmp_path):
    (tmp_path / "a").mkdir(); (tmp_path / "b").mkdir()
    for i in range(14):
        photograph(i).save(tmp_path / "a" / f"{i}.png")
        shutil.copy(tmp_path / "a" / f"{i}.png", tmp_path / "b" / f"{i}.png")
    with pytest.warns(DataWarning, match="14 pictures under two labels(.|\n)*and 4 more"): loaders(tmp_path)
    with pytest.warns(DataWarning), pytest.raises(ValueError, match="classes of which no picture is left: a, b"):
        loaders(tmp_path, on_duplicate="drop")


def test_no_warning_where_nothing_is_wrong(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        loaders(folder)


def test_classes_at_fault_are_named(folder):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="class folders without pictures: empty"): loaders(folder)
    (folder / "empty").rmdir()
    rows = folder_table(folder)
    rows.assign(split=np.where(rows.label == "b", "valid", "train")).to_csv(folder / "split.csv", index=False)
    with pytest.raises(ValueError, match="classes without training pictures: b"): loaders(folder)
    rows.assign(label="a").to_csv(folder / "split.csv", index=False)
    with pytest.raises(ValueError, match="only one class, a"): loaders(folder)


def test_show_batch_without_boxes(folder):
    import matplotlib.pyplot as plt
    dls = loaders(folder)
    assert [ax.get_title() for ax in dls.show_batch("valid", max_n=2).axes] == [
        dls.table.label[f] for f in dls.valid_ds.items[:2]
    ]
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


# of a validation half that valid_pct leaves out
@pytest.mark.filterwarnings("ignore::fd_focus.data.pictures.DataWarning")
def test_what_accuracy_is_judged_by(folder, tmp_path):
    "A test half is told from a validation half and from a share of training, so that nothing is chosen on it."
    by = lambda **kwargs: loaders(folder, **kwargs).judged_by
    table = folder_table(folder).drop(columns="split")
    assert by() == by(valid_pct=.5) == "train"
    for halves, judged in ((["train", "test"], "test"), (["train", "valid"], "valid"), (["train", "val"], "valid")):
        table.assign(split=[halves[i % 2] for i in range(len(table))]).to_csv(folder / "split.csv", index=False)
        assert by() == judged and by(valid_pct=.5) == "train"
    settings = Settings(str(folder), arch="toy_resnet", image_size=32, bs=4, m=2, l=2, keep_best=True)
    table.assign(split=["train" if i % 2 else "test" for i in range(len(table))]).to_csv(
        folder / "split.csv", index=False
    )
    with pytest.raises(ValueError, match="keep_best would choose on them; use valid_pct"): make_learner(settings)
    make_learner(replace(settings, valid_pct=.5))


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
    for same in (lazy, dls.test_dl([open_image(path)]).one_batch()[0],
                 dls.test_dl([np.asarray(Image.open(path))]).one_batch()[0]):
        assert np.array_equal(same, dls.test_dl([item]).one_batch()[0])


@pytest.fixture
def shelf(folder):
    "Four pictures as a telephone, a microscope and an image editor leave them, beside the classes."
    exif = Image.Exif()
    exif[0x0112] = 3
    half = np.zeros((60, 60, 3), np.uint8)
    half[:30] = 255
    place = folder.parent / "shelf"
    place.mkdir()
    Image.fromarray(half).save(place / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint16) * 1000, (64, 1))).save(place / "sixteen.png")
    Image.new("RGBA", (60, 60), (0, 0, 0, 0)).save(place / "clear.png")
    return place


def test_a_path_means_the_same_as_its_text(folder, shelf, monkeypatch):
    "fastai alone would open a Path itself: not turned, not rescaled, on black."
    dls = loaders(folder)
    monkeypatch.chdir(shelf.parent)
    for name in ("turned.jpg", "sixteen.png", "clear.png"):
        want = dls.test_dl([open_image(shelf / name)]).one_batch()[0]
        for item in (str(shelf / name), shelf / name, f"shelf/{name}", Path("shelf", name), f"./shelf/../shelf/{name}"):
            assert np.array_equal(want, dls.test_dl([item]).one_batch()[0]), item
    for first, second in ((shelf / "clear.png", Image.open(shelf / "turned.jpg")),
                          (Image.open(shelf / "turned.jpg"), str(shelf / "clear.png"))):
        assert dls.test_dl([first, second]).one_batch()[0].shape == (2, 3, 32, 32)
    listed = dls.valid_ds.items[0]
    for item in (listed, Path(listed), folder / listed, f"pictures/{listed}", Path("pictures", listed), f"./{listed}"):
        batch = dls.test_dl([item], with_labels=True).one_batch()
        assert dls.vocab[batch[1][0]] == dls.table.label[listed], item


def test_files_that_are_not_listed(folder, shelf, monkeypatch):
    folder_table(folder).assign(x0=1, y0=2, x1=30, y1=40).to_csv(folder / "split.csv", index=False)
    dls = loaders(folder)
    for make in (lambda: dls.test_dl([shelf / "clear.png"], with_labels=True).one_batch(),
                 lambda: dls.truth([shelf / "clear.png"]),
                 lambda: dls.show_batch("valid", items=[shelf / "clear.png"])):
        with pytest.raises(ValueError, match="clear.png is not in the table"): make()
    for item in ("none.png", Path("none.png"), folder / "none.png"):
        with pytest.raises(FileNotFoundError, match="no file .*none.png, neither in .*pictures nor in "):
            dls.test_dl([item])
    listed = dls.valid_ds.items[0]
    for item in (Path(listed), folder / listed):
        assert np.array_equal(dls.truth([item])["box"], dls.truth([listed])["box"])
    Image.new("RGB", (60, 60)).save(folder / "both.png")                 # the data folder first; and it is told
    Image.new("RGB", (60, 60), "white").save(shelf / "both.png")
    monkeypatch.chdir(shelf)
    with pytest.warns(DataWarning, match="both.png could be .*pictures/both.png or .*shelf/both.png; the first"):
        assert float(dls.test_dl(["both.png"]).one_batch()[0].max()) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        dls.test_dl([shelf / "both.png"])
        monkeypatch.chdir(folder)
        dls.test_dl(["both.png", listed])


def test_names_that_are_no_utf8(folder, tmp_path, monkeypatch):
    "As an old archive leaves them: checked, remembered, loaded, and kept reduced."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = next((folder / "a").iterdir())
    odd = Path(os.fsdecode(os.fsencode(file.parent) + b"/caf\xe9.jpg"))
    file.rename(odd)
    # the second time from what was remembered
    for _ in range(2): dls = loaders(folder)
    assert len(dls.train.one_batch()[0]) and any(
        str(item).endswith(odd.name) for item in [*dls.train_ds.items, *dls.valid_ds.items]
    )
    photograph(50).resize((400, 300)).save(odd)
    kept = ReducedPictures(tmp_path / "kept", 60)
    assert kept(odd).size == kept(odd).size and len(list((tmp_path / "kept").glob("*.jpg"))) == 1


def test_arguments_that_contradict_each_other(folder, tmp_path):
    with pytest.raises(ValueError, match="on_bad_image='ignore'; use 'error' or 'skip'"):
        loaders(folder, on_bad_image="ignore")
    with pytest.raises(ValueError, match="give one or the other"): loaders(folder, item_tfms=[Resize(64)], squash=False)
    with pytest.raises(ValueError, match="do not begin with a Resize"):
        loaders(folder, item_tfms=[CropPad(32)], cache=tmp_path / "kept")
    with pytest.raises(ValueError, match="resize=30 is smaller than image_size=32"): loaders(folder, resize=30)


def test_without_the_check(folder, monkeypatch):
    "No picture is opened before training; what is wrong with one is known when its turn comes."
    (folder / "a" / "text.jpg").write_text("nothing")
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, **kw: opened.append(str(file)) or real(file, **kw))
    dls = loaders(folder, check=False)
    files = len(dls.train_ds) + len(dls.valid_ds)
    assert (files, dls.skipped, len(dls.duplicates)) == (17, {}, 0)
    assert len(opened) <= 2                   # fastai reads one to set up
    with pytest.raises(ValueError, match="text.jpg cannot be read"):
        for item in [*dls.train_ds.items, *dls.valid_ds.items]: dls.photograph(item)
    for more in (dict(on_bad_image="skip"), dict(on_duplicate="drop")):
        with pytest.raises(ValueError, match="check=False opens no picture"): loaders(folder, check=False, **more)


def test_unchecked_pictures_leave_no_list_of_what_was_seen(folder, tmp_path):
    from fd_focus.use.seen import note_seen, unseen
    dls = loaders(folder)
    assert note_seen(dls, tmp_path) and unseen(pd.DataFrame(dict(file=[folder / "a" / "00.jpg"])), tmp_path)[1]
    unchecked = loaders(folder, check=False)
    assert note_seen(unchecked, tmp_path) is None and not (tmp_path / "seen.csv").exists()
    assert "keeps no list of the pictures" in unseen(pd.DataFrame(dict(file=[folder / "a" / "00.jpg"])), tmp_path)[1]


def test_pictures_that_are_not_there(tmp_path):
    (tmp_path / "sheet.csv").write_text("file,label,split\na.jpg,x,train\nb.jpg,y,test\n")
    with pytest.raises(ValueError, match="a.jpg: no such file"): FocusDataLoaders.from_csv(tmp_path / "sheet.csv")


def test_a_class_of_which_no_picture_can_be_read(folder):
    (folder / "finch").mkdir()
    (folder / "finch" / "a.jpg").write_text("")
    with pytest.warns(DataWarning), pytest.raises(ValueError, match="classes of which no picture is left: finch"):
        loaders(folder, on_bad_image="skip")


def test_a_second_epoch_reads_what_was_kept(tmp_path, monkeypatch):
    for i in range(8):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        photograph(i, (1600, 1200)).save(tmp_path / "ab"[i % 2] / f"{i}.jpg", quality=90)
    dls = FocusDataLoaders.from_folder(tmp_path, image_size=224, bs=2, num_workers=0, cache=tmp_path / ".kept")
    once, opened, real = dls.valid.one_batch()[0], [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, **kw: opened.append(str(file)) or real(file, **kw))
    again = dls.valid.one_batch()[0]
    assert opened and all(".kept" in file for file in opened)
    assert (once - again).abs().mean() < 1.5 / 255


def test_pictures_put_aside_are_seen_by_nobody(folder):
    alone, dls = loaders(folder), loaders(folder, test_pct=.25)
    seen = {str(item) for dataset in (dls.train_ds, dls.valid_ds) for item in dataset.items}
    assert len(dls.aside) and not seen & set(dls.aside.file) and set(dls.aside.label) == set(dls.vocab)
    assert seen | set(dls.aside.file) == {str(item) for ds in (alone.train_ds, alone.valid_ds) for item in ds.items}
    assert not len(alone.aside)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 90), (90, 2)])
def test_a_picture_one_pixel_wide_has_that_pixel(size):
    "At any side, also where rounding would leave none; in validation it is what prediction sees."
    picture = PILImage.create(np.random.default_rng(0).integers(50, 256, (*size[::-1], 3), dtype=np.uint8))
    for side in (7, 43, 49, 86, 224, 448):
        for split, crop_scale in ((0, None), *[(0, .2)] * 20, (1, None)):      # crops are drawn by lot
            seen = picture
            for transform in paper_transforms(side, squash=False, crop_scale=crop_scale):
                seen = transform(seen, split_idx=split)
            assert seen.size == (side, side) and np.asarray(seen).min() >= 50
        resize = round(side * 8 / 7)
        want, _ = prepare(picture, (resize, resize), (side, side), squash=False)
        assert np.array_equal(np.asarray(seen), np.asarray(want))


@pytest.mark.parametrize("size", [(300, 100), (101, 333), (57, 58), (64, 64), (1, 60_000), (60_000, 1)])
def test_a_padded_picture_is_whole_on_black(size):
    "In validation to the bit what prediction sees; a long one needs no memory for its square."
    picture = PILImage.create(np.random.default_rng(0).integers(50, 256, (*size[::-1], 3), dtype=np.uint8))
    for split in (1, 0, 0):
        seen = paper_transforms(112, 128, "pad")[0](picture, split_idx=split)
        rows, columns = (np.asarray(seen).max((1 - axis, 2)) > 0 for axis in (0, 1))
        inner = [max(1, round(128 * side / max(size))) for side in size]
        assert seen.size == (128, 128) and [columns.sum(), rows.sum()] == inner
        if split: assert abs(columns.argmax() - (128 - inner[0]) / 2) < 1 > abs(rows.argmax() - (128 - inner[1]) / 2)
        for transform in paper_transforms(112, 128, "pad")[1:] if split else (): seen = transform(seen, split_idx=1)
        if split: assert np.array_equal(seen, prepare(picture, (128, 128), (112, 112), "pad")[0])


def epoch(dls, workers):
    "Every batch of a training epoch from the same random state."
    set_seed(0)
    dl = dls.train.new(num_workers=workers)
    dl.rng.seed(0)
    return [x for x, _ in dl]


@pytest.mark.parametrize("kwargs", [dict(), dict(squash=False), dict(squash="pad"), dict(crop_scale=.3)],
                         ids=["paper", "shape kept", "padded", "parts"])
def test_kept_in_memory_training_sees_the_same(folder, kwargs):
    plain, kept = loaders(folder, **kwargs), loaders(folder, cache="ram", **kwargs)
    for workers in (0, 2, 0):                     # two processes fill the memory that all of them share
        for a, b in zip(epoch(plain, workers), epoch(kept, workers), strict=True): assert torch.equal(a, b)
    assert int(kept.reader.end[0]) > 0 and (kept.reader.known[:, 0] > 0).sum() == len(kept.train_ds)
    assert np.array_equal(kept.photograph(kept.valid_ds.items[0]), plain.photograph(plain.valid_ds.items[0]))


def test_memory_that_is_full_leaves_the_rest_to_the_files(folder):
    kept = loaders(folder, cache="ram", cache_gb=5e-6)          # one picture of 37x37 pixels
    for a, b in zip(epoch(loaders(folder), 0), epoch(kept, 0), strict=True): assert torch.equal(a, b)
    assert 0 < (kept.reader.known[:, 0] > 0).sum() < len(kept.table)


def test_a_banner_is_cut_off_once(folder):
    table = folder_table(folder)
    table.attrs["banner"] = 3
    plain, kept = (FocusDataLoaders.from_table(table, folder, image_size=32, bs=4, num_workers=0, cache=cache)
                   for cache in (None, "ram"))
    for _ in range(2):
        for a, b in zip(epoch(plain, 0), epoch(kept, 0), strict=True): assert torch.equal(a, b)


def test_crops_of_a_batch_are_its_pictures_own(folder):
    dls = loaders(folder, image_size=24, resize=64, bs=12)
    crop = next(t for t in dls.train.after_batch.fs if isinstance(t, CropFlip))
    epoch(dls, 0)
    assert len({tuple(at) for at in crop.at.tolist()}) > 6 and 0 < crop.flip.sum() < 12
    assert crop.at.min() >= 0 and crop.at.max() <= 40
    dls.valid.one_batch()
    assert (crop.at == 20).all() and not crop.flip.any()


def helpers(): return {process.pid for process in multiprocessing.active_children()}


def seeded(folder, workers, **kwargs):
    "Loaders with harder crops, of classes that are drawn equally often; the same order and crops each time."
    dls = loaders(folder, **dict(dict(crop_scale=.3, balance=True, num_workers=workers), **kwargs))
    for dl in dls.loaders: dl.rng.seed(7)
    return dls


def seen(dl, seed=0):
    "What an epoch shows."
    torch.manual_seed(seed)                        # crops and flips of a batch are drawn in the program itself
    return torch.cat([x for x, _ in dl])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_stay_and_change_nothing(folder, workers):
    "Epoch after epoch, in training and validation; the numbers that training draws are the same ones too."
    alone, helped, before = seeded(folder, 0), seeded(folder, workers), helpers()
    first = None
    for epoch in range(3):
        for a, b in zip(alone.loaders, helped.loaders):
            one, other = ((seen(dl, epoch), torch.rand(1)) for dl in (a, b))
            assert all(map(torch.equal, one, other)) and len(one[0])
        first = first or helpers() - before
        assert helpers() - before == first and len(first) == 2 * workers
    for dl in helped.loaders: dl.crew.end()
    assert helpers() == before


def broken_off(dl):
    for _ in dl: break


def interrupted(dl):
    with pytest.raises(KeyboardInterrupt):
        for _ in dl: signal.raise_signal(signal.SIGINT)


def in_a_transform(dl):
    with pytest.raises(RuntimeError, match="too large"):
        for _ in dl: raise RuntimeError("too large")


@pytest.mark.parametrize("end", [broken_off, interrupted, in_a_transform])
def test_an_epoch_that_ends_early_ends_its_workers(folder, end):
    "And the next one shows what it would show without workers."
    alone, helped, before = seeded(folder, 0).train, seeded(folder, 2).train, helpers()
    for early in (True, False, True):              # with fresh workers, and with those of an epoch before
        if early:
            broken_off(alone)
            end(helped)
            assert helpers() == before
        assert torch.equal(seen(alone), seen(helped)) and len(helpers() - before) == 2
    helped.crew.end()


def test_a_picture_that_is_gone_is_named_and_leaves_nothing_behind(folder):
    dl, before = seeded(folder, 2, balance=False).train, helpers()
    file = folder / str(dl.dataset.items[0])
    assert len(seen(dl)) == 12
    picture = file.read_bytes()
    file.unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=file.name) as error: seen(dl)
        assert helpers() == before, error          # which still refers to all that was under way
    file.write_bytes(picture)
    assert len(seen(dl)) == 12
    dl.crew.end()


def test_one_loop_inside_another(folder):
    alone, helped, before = seeded(folder, 0).train, seeded(folder, 1).train, helpers()
    def pairs(dl):
        torch.manual_seed(0)
        return [(x, y) for x, _ in dl for y, _ in dl]
    for a, b in zip(pairs(alone), pairs(helped), strict=True): assert all(map(torch.equal, a, b))
    assert len(helpers() - before) == 1
    helped.crew.end()


def test_idle_workers_that_are_gone_are_replaced(folder):
    "Ctrl-C in a terminal reaches all processes, also those that wait for the next epoch."
    alone, helped, before = seeded(folder, 0).train, seeded(folder, 2).train, helpers()
    assert torch.equal(seen(alone), seen(helped))
    for pid in helpers() - before: os.kill(pid, signal.SIGINT)
    while helpers() != before: time.sleep(.01)
    assert torch.equal(seen(alone), seen(helped))
    helped.crew.end()


def test_workers_know_whether_it_is_training(folder):
    "`learn.tta` has a validation loader do what training does, and back again."
    shown = []
    for workers in (0, 1):
        dl = seeded(folder, workers).valid
        with dl.dataset.set_split_idx(0): training = seen(dl)
        shown.append([training, seen(dl)])
        if workers: dl.crew.end()
    assert all(map(torch.equal, *shown)) and not torch.equal(*shown[0])


def test_only_loaders_that_train_keep_workers(folder, tmp_path):
    "Not those that are made for one use; and neither a file nor a copy takes workers along."
    learn, before = focus_learner(seeded(folder, 1), "toy_resnet", pretrained=False, cut="layer2"), helpers()
    dls = learn.dls
    with learn.no_bar(), learn.no_logging():
        learn.get_preds()
        learn.get_preds(dl=dls.test_dl(list(dls.valid_ds.items)))
        assert helpers() == before
        learn.fit(1)
        learn.lr_find(num_it=3, show_plot=False)
        kept = helpers() - before
        assert len(kept) == 1                      # of validation; `lr_find` broke training off
        copied = copy.copy(dls.valid)
        assert torch.equal(seen(copied), seen(dls.valid)) and len(helpers() - before) == 2
        copied.crew.end()
        learn.export(tmp_path / "learner.pkl")
        assert helpers() - before == kept
        learn.fit(1)
    assert len(helpers() - before) == 2
    del learn, dls, copied
    gc.collect()
    assert helpers() == before


class OneOf(SharedDL):
    "As if it were one of several processes."
    def _broadcast(self, t, rank): return t


def test_shares_of_several_processes_have_the_dealers_workers(folder):
    before = helpers()
    def shares(workers):
        dls = [seeded(folder, workers).train for _ in range(2)]
        found = [seen(OneOf(dl, rank, 2, device=dl.device)) for _ in range(2) for rank, dl in enumerate(dls)]
        assert len(helpers() - before) == 2 * workers
        for dl in dls: _ = dl.crew and dl.crew.end()
        return found
    assert all(map(torch.equal, shares(0), shares(1)))


WITH_WORKERS = """if True:
    import sys, time
    from multiprocessing import active_children
    from fd_focus.data.loaders import FocusDataLoaders
    dls = FocusDataLoaders.from_folder(sys.argv[1], image_size=32, bs=4, num_workers=2)
    list(dls.train)
    print(*(process.pid for process in active_children()), flush=True)
    time.sleep(float(sys.argv[2]))"""


@pytest.mark.parametrize("sleep", [0, 60], ids=["ends", "killed"])
def test_workers_end_with_their_program(folder, sleep):
    command = [sys.executable, "-W", "ignore", "-c", WITH_WORKERS, str(folder), str(sleep)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        pids = [int(pid) for pid in program.stdout.readline().split()]
        if sleep: program.kill()
        assert program.wait(60) == -9 * bool(sleep) and len(pids) == 2
    deadline = time.monotonic() + 60               # they look every five seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(.1)


def test_workers_leave_alone_what_was_thrown_away(tmp_path, capfd):
    "A worker inherits the garbage of its program, loaders with workers among it, and must not end those."
    def dls(): return FocusDataLoaders.from_folder(two_classes(tmp_path), .5, image_size=32, bs=4, num_workers=1)
    def collect(*args):
        sys.unraisablehook = sys.__unraisablehook__       # pytest's would keep it to itself
        gc.collect()
    gc.collect(); gc.disable()
    try:
        old, new = dls(), dls()
        list(old.train)
        old.train.itself = old.train         # a cycle, which only a collection takes away
        del old
        new.train.wif = collect
        assert len(list(new.train)) == 2
    finally: gc.enable()
    assert "child process" not in capfd.readouterr().err
