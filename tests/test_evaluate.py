"fd_focus_evaluate as a user types it."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import shaken
from PIL import Image

from fd_focus.use.cli import fd_focus_evaluate
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning
from fd_focus.use.model_folder import save_focus
from fd_focus.training.learner import focus_learner


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    dls = FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2)
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    shaken(learn.model)
    save_focus(learn, folder / "model")
    return folder / "model", list(dls.vocab)


def grey(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((50, 70, 3), value, np.uint8)).save(file)


def test_rows_and_words(model, tmp_path, capsys):
    folder, classes = model
    for k, name in enumerate(classes):
        for value in (20, 120, 220): grey(tmp_path / "photos/test" / name / f"{value + k}.png", value + k)
        grey(tmp_path / "photos/train" / name / "seen.png", 9)
    fd_focus_evaluate(
        model=str(folder),
        folder=str(tmp_path / "photos"),
        split="test",
        out=str(tmp_path / "new/rows.csv"),
        device="cpu",
    )
    said, rows = capsys.readouterr().out, pd.read_csv(tmp_path / "new/rows.csv")
    assert len(rows) == 9 and not rows.file.str.contains("seen").any() and rows.error.isna().all()
    assert f"{100 * (rows.label == rows.answer).mean():.1f} % of 9 pictures right" in said
    assert "sure of" not in said            # the model has no threshold
    (tmp_path / "photos/test" / classes[0] / "bad.png").write_bytes(b"x")
    fd_focus_evaluate(model=str(folder), folder=str(tmp_path / "photos"), split="test", device="cpu")
    said = capsys.readouterr().out
    assert (
        f"{100 * (rows.label == rows.answer).sum() / 10:.1f} % of 10 pictures right" in said
        and "1 could not be read and count as wrong: " in said
    )


@pytest.mark.parametrize(
    "layout, split, message",
    [
        ("gone", None, "no folder"),
        ("photos", "test", "holds train"),
        ("photos", None, "has pictures of train, which the model does not know"),
        ("empty", None, "it holds nothing"),
    ],
)
def test_bad_input(model, tmp_path, layout, split, message):
    folder, classes = model
    grey(tmp_path / "photos/train" / classes[0] / "a.png", 9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as end:
        fd_focus_evaluate(model=str(folder), folder=str(tmp_path / layout), split=split, device="cpu")
    assert message in str(end.value.code)


def test_split_csv_without_its_columns(model, tmp_path):
    (tmp_path / "split.csv").write_text("file,label\na.png,x\n")
    for split, message in (
        ("test", "has no rows of split 'test'; it has no splits"),
        (None, "has pictures of x, which the model does not know"),
    ):
        with pytest.raises(SystemExit) as end:
            fd_focus_evaluate(model=str(model[0]), folder=str(tmp_path), split=split, device="cpu")
        assert message in str(end.value.code)


def test_what_training_reads_is_judged(model, tmp_path, capsys):
    "A table with a mark at its beginning and blanks, hidden folders, formats that are not read: as for training."
    folder, classes = model
    grey(tmp_path / "a.png", 9)
    (tmp_path / "split.csv").write_text(f"\ufefffile,label,split\na.png , {classes[0]} ,test\n", encoding="utf-8")
    fd_focus_evaluate(model=str(folder), folder=str(tmp_path), split="test", device="cpu")
    assert "of 1 pictures right" in capsys.readouterr().out
    for place in ("", ".thumbnails", "__MACOSX"): grey(tmp_path / "photos" / classes[0] / place / "b.png", 9)
    (tmp_path / "photos" / classes[0] / "c.heic").write_bytes(b"x")
    with pytest.warns(DataWarning, match="1 files in class folders of .* are left out: .heic 1"):
        fd_focus_evaluate(model=str(folder), folder=str(tmp_path / "photos"), device="cpu")
    assert "of 1 pictures right" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    run = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-c",
            "import sys; sys.argv = ['fd_focus_evaluate', '--help']\n"
            "from fd_focus.use.cli import fd_focus_evaluate; fd_focus_evaluate()",
        ],
        capture_output=True,
        text=True,
    )
    assert not {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines() if "|" in line} & {
        "torch",
        "fastai",
        "pandas",
    }


def test_the_table_of_labels_is_not_overwritten(model, tmp_path):
    folder, classes = model
    for k in range(len(classes)): grey(tmp_path / f"{k}.png", 40 * k)
    pd.DataFrame(dict(file=[f"{k}.png" for k in range(len(classes))], label=classes, split="test")).to_csv(
        tmp_path / "split.csv", index=False
    )
    before = (tmp_path / "split.csv").read_bytes()
    for out, message in (
        ("split.csv", "would overwrite what is to be read"),
        ("0.png", "ends like a picture"),
        ("", "is a folder; give a file in it"),
    ):
        with pytest.raises(SystemExit) as end:
            fd_focus_evaluate(model=str(folder), folder=str(tmp_path), out=str(tmp_path / out), device="cpu")
        assert message in str(end.value.code)
    assert (tmp_path / "split.csv").read_bytes() == before


def test_names_that_are_no_utf8_get_their_rows(model, tmp_path):
    folder, classes = model
    grey(tmp_path / "photos" / classes[0] / os.fsdecode(b"caf\xe9.png"), 90)
    run = subprocess.run([Path(sys.executable).parent / "fd_focus_evaluate", str(folder), str(tmp_path / "photos"),
                          "--out", str(tmp_path / "rows.csv"), "--device", "cpu"], capture_output=True)
    assert run.returncode == 0, run.stderr
    assert b"of 1 pictures right" in run.stdout and b"caf\xe9.png" in (tmp_path / "rows.csv").read_bytes()
