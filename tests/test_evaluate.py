"fd_focus_evaluate as a user types it."
import json
import os
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import shaken, two_classes
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from fd_focus.evidence.comparison import multiply_adds
from fd_focus.use.cli import fd_focus_evaluate, fd_focus_train
from fd_focus.use.evaluate import evaluate, labelled_pictures
from fd_focus.use.predict import FocusClassifier
from fd_focus.use.compare import compare_runs
from fd_focus.use.report import _aside, introduction
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning
from fd_focus.use.model_folder import save_focus
from fd_focus.training.learner import focus_learner
from fd_focus.training.run import make_learner, train
from fd_focus.training.settings import Settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    dls = FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2)
    learn = focus_learner(dls, "toy_resnet", pretrained=False, preset=None)
    shaken(learn.model)
    save_focus(learn, folder / "model")
    learn.model.answer = "adaptive"
    save_focus(learn, folder / "choosy")
    save_focus(focus_learner(dls, "toy_resnet", "plain", pretrained=False), folder / "plain")
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
    assert list(rows.columns) == ["file", "label", "answer", "probability", "sure", "looked_again", "error"]
    assert "looked again" not in said and rows.looked_again.isna().all()      # and treats all pictures alike
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
        ("rows.xlsx", "ends like another kind of file, but rows are text: call it .csv or .jsonl"),
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


@pytest.fixture
def pictures(model, tmp_path):
    "Nine grey pictures, and what they are."
    for k in range(9): grey(tmp_path / "photos" / model[1][k % 3] / f"{k}.png", 28 * k)
    return labelled_pictures(tmp_path / "photos", model[1])


def at(model, limit, name="choosy"):
    classifier = FocusClassifier.load(model[0].with_name(name), "cpu")
    if limit is not None: classifier.pipeline.net.look_again_below = limit
    return classifier


def test_the_cost_is_that_of_the_looks(model, pictures):
    "One look costs what the network with answer='image' costs, two what answer='ensemble' costs; the rest is a share."
    once, twice = at(model, 0), at(model, 2.)
    limit = sorted(found.probability for found in once.predict(list(pictures.file)))[3]      # three are less sure
    once.pipeline.net.answer, twice.pipeline.net.answer = "image", "ensemble"
    costs = [multiply_adds(one.pipeline.net, 64) for one in (once, twice)]
    for below, share in ((0, 0), (limit, 3 / 9), (2., 1)):
        found = evaluate(at(model, below), pictures)
        assert found.looked_again == pytest.approx(share) and found.rows.looked_again.sum() == round(9 * share)
        assert found.cost == pytest.approx(costs[0] + share * (costs[1] - costs[0])) and found.one_look == costs[0]
        times = f"{found.cost / costs[0]:.2f}"
        assert f"{100 * share:.0f} % of the pictures looked again: an answer costs {times} times one look" in str(found)
    assert costs[1] > 1.5 * costs[0]


@pytest.mark.parametrize("name", ["model", "plain"])
def test_the_cost_of_a_model_that_treats_all_alike(model, pictures, name):
    classifier = at(model, None, name)
    found = evaluate(classifier, pictures)
    assert (found.looked_again, found.one_look) == (None, None) and "looked again" not in str(found)
    assert found.cost == multiply_adds(classifier.pipeline.net, 64) > 1e6
    assert f"an answer costs {found.cost / 1e6:.1f} million multiply-adds" in str(found)


def test_the_share_is_of_the_pictures_that_were_answered(model, pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    bad = pd.DataFrame(dict(file=[str(tmp_path / "bad.png")], label=model[1][:1]))
    found = evaluate(at(model, 2.), pd.concat([pictures, bad]))
    assert found.looked_again == 1 and len(found.rows) == 10 and found.rows.looked_again.iloc[-1] is None


def test_the_command_says_who_looked_again(model, pictures, tmp_path, capsys):
    fd_focus_evaluate(model=str(model[0].with_name("choosy")), folder=str(tmp_path / "photos"),
                      out=str(tmp_path / "rows.csv"), device="cpu")
    share = pd.read_csv(tmp_path / "rows.csv").looked_again.mean()
    assert f"{100 * share:.0f} % of the pictures looked again: an answer costs" in capsys.readouterr().out


@pytest.mark.parametrize("known, given", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_an_accent_in_another_form_makes_no_other_class(tmp_path, known, given):
    "A Mac's archive on Linux, or a model of before labels were brought into one form."
    known, given = (unicodedata.normalize(form, "mésange") for form in (known, given))
    grey(tmp_path / given / "x.png", 9)
    assert list(labelled_pictures(tmp_path, [known, "crow"]).label) == [known]
    (tmp_path / "split.csv").write_text(f"file,label\n{known}/x.png,{given}\n", encoding="utf-8")
    found = labelled_pictures(tmp_path, [known, "crow"])
    assert list(found.label) == [known] and Path(found.file[0]).is_file()


def test_labels_of_a_table_are_those_of_the_model(model, pictures):
    with pytest.raises(ValueError, match="the table has pictures of jay, which the model does not know"):
        evaluate(at(model, 0), pictures.assign(label="jay"))


@pytest.fixture(scope="module")
def few_of_b(tmp_path_factory):
    "Photographs: 6 of a and 2 of b to learn from, 2 of a and 1 of b to judge by."
    folder, judges = tmp_path_factory.mktemp("few"), {"a/00.jpg", "a/02.jpg", "b/01.jpg"}
    for file in sorted(two_classes(folder / "all").rglob("*.jpg")):
        name = file.relative_to(folder / "all").as_posix()
        if name[0] == "b" and name > "b/05.jpg": continue
        place = folder / "photos" / ("valid" if name in judges else "train") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
    return folder / "photos"


def test_uneven_classes_are_counted_alike(few_of_b, tmp_path, capsys):
    fd_focus_train(data=str(few_of_b), arch="toy_resnet", method="plain", image_size=64, epochs=1, bs=4,
                   class_weights="balanced", out=str(tmp_path / "run"), examples=0)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "run/summary.json").read_text())
    answers = pd.read_csv(tmp_path / "run/answers.csv")
    macro = balanced_accuracy_score(answers.label, answers.answer)
    assert found["macro_accuracy"] == pytest.approx(macro) and "training pictures a class" not in said
    assert f"where all count alike, {100 * macro:.1f} % are right" in said
    assert f"every class counting alike {100 * macro:.1f} %" in (tmp_path / "run/model/README.md").read_text()
    assert f"{100 * macro:.1f} %" in compare_runs([tmp_path / "run"]) and "macro F1" in compare_runs([tmp_path / "run"])
    fd_focus_evaluate(model=str(tmp_path / "run/model"), folder=str(few_of_b), split="valid", seen=True, device="cpu")
    assert f"every class alike: macro accuracy {100 * macro:.1f} %" in capsys.readouterr().out


def test_what_a_run_says_of_its_losses_and_of_few_cells(few_of_b):
    def said(**options):
        s = Settings(data=str(few_of_b), arch="toy_resnet", epochs=1, bs=4, workers=0, pretrained=False, **options)
        return "\n".join(introduction(make_learner(s), s))
    assert "train loss adds up the losses of all heads" in (small := said(image_size=64))
    assert "regions are placed on 4 x 4 cells only: a larger --image_size" in small
    assert "cells only" not in said(image_size=96)
    plain = said(image_size=64, method="plain")
    assert "cells only" not in plain and "adds up" not in plain


def test_class_weights_reach_the_loss_or_are_refused(few_of_b):
    s = Settings(data=str(few_of_b), arch="toy_resnet", image_size=64, epochs=1, bs=4, workers=0, pretrained=False,
                 class_weights="balanced", method="plain")
    learn = make_learner(s)
    assert torch.allclose(learn.loss_func.weight, torch.tensor([8 / (2 * 6), 8 / (2 * 2)]))
    said = introduction(learn, replace(s, class_weights=None))
    assert said[1].startswith("2 to 6 training pictures a class (--class_weights balanced")
    for method, told in dict(probe="this head is computed without one", boost="a loss of its own").items():
        with pytest.raises(ValueError, match=told): train(replace(s, method=method), bar=False)
    with pytest.raises(ValueError, match="use one of the two"): replace(s, balance=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run that put pictures aside, and the folder that it was trained on."
    folder = tmp_path_factory.mktemp("seen")
    two_classes(folder / "photos")
    fd_focus_train(data=str(folder / "photos"), test_pct=.25, arch="toy_resnet", image_size=64, epochs=1, bs=4,
                   out=str(folder / "run"), examples=0)
    return folder / "run", folder / "photos"


def test_pictures_put_aside_are_judged_once(trained):
    found = json.loads((trained[0] / "summary.json").read_text())
    seen = pd.read_csv(trained[0] / "model" / "seen.csv")
    assert found["test_images"] == 6 and len(seen) == 10 and set(seen.split) == {"train", "valid"}
    assert found["test_interval"][0] <= found["test_accuracy"] <= found["test_interval"][1]


def test_a_training_that_opens_no_picture_beforehand(trained, tmp_path, capsys):
    "It ends, goes on when it was stopped, and its model says that it has no list of what it was trained on."
    fd_focus_train(data=str(trained[1]), check=False, test_pct=.25, arch="toy_resnet", image_size=64, epochs=1, bs=4,
                   out=str(tmp_path / "run"), examples=0)
    model = tmp_path / "run" / "model"
    assert "of the 6 pictures put aside are right" in capsys.readouterr().out and not (model / "seen.csv").exists()
    fd_focus_evaluate(model=str(model), folder=str(trained[1]))
    said = capsys.readouterr().out
    assert "keeps no list of the pictures it was trained on" in said and "of 16 pictures right" in said


def test_pictures_put_aside_that_cannot_be_read_lose_no_run(trained, tmp_path, capsys):
    dls = FocusDataLoaders.from_folder(trained[1], image_size=64, bs=4, num_workers=0, test_pct=.25)
    dls.aside = dls.aside.assign(file="gone.jpg")
    assert _aside(SimpleNamespace(dls=dls), trained[0] / "model") is None
    assert "the pictures put aside judge nothing: none of the 6 pictures could be answered" in capsys.readouterr().out


def test_what_a_model_has_seen_does_not_judge_it(trained, tmp_path, capsys):
    (run, photos), rows = trained, tmp_path / "rows.csv"
    fd_focus_evaluate(model=str(run / "model"), folder=str(photos), out=str(rows))
    said = capsys.readouterr().out
    assert "trained on 8 of these 16 pictures, and 2 chose its settings: they are left out" in said
    right = json.loads((run / "summary.json").read_text())["test_accuracy"]
    assert f"{100 * right:.1f} % of 6 pictures right" in said and len(pd.read_csv(rows)) == 6
    fd_focus_evaluate(model=str(run / "model"), folder=str(photos), seen=True)
    assert "of 16 pictures right" in capsys.readouterr().out
    for picture in pd.read_csv(rows).file: Path(picture).rename(tmp_path / f"{len(list(tmp_path.iterdir()))}.jpg")
    fd_focus_evaluate(model=str(run / "model"), folder=str(photos))
    assert "how well it remembers them" in (said := capsys.readouterr().out) and "of 10 pictures right" in said
