"What looks like nothing known: scores against scikit-learn, the choice, the model folder, and what every answer says."
import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import photograph, shaken, two_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.training.learner import focus_learner
from fd_focus.use.answer import explain
from fd_focus.use.app import about
from fd_focus.use.cli import fd_focus_predict
from fd_focus.use.commands import fd_focus_train
from fd_focus.use.features import Features  # noqa: F401 -- gives a classifier `learn_known`
from fd_focus.use.model_folder import add_known, load_focus, save_focus
from fd_focus.use.predict import FocusClassifier
from fd_focus.use.unknown import (Known, all_novelties, choose_known, compare_scores, energy, hidden_classes, limit_for,
                                  novelties, tell_apart)


def clusters(classes=6, each=12, n=16, seed=0, spread=.3):
    "Features about a direction a class, labels, and logits of a head that has learned them."
    chance = np.random.default_rng(seed)
    centres, labels = np.random.default_rng(9).normal(size=(classes, n)), np.arange(classes * each) % classes
    features = centres[labels] + spread * chance.normal(size=(len(labels), n))
    return features.astype(np.float32), labels, features @ centres.T


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=60), st.lists(st.integers(-5, 5), min_size=1, max_size=40),
       st.floats(.1, 1))
@settings(max_examples=60, deadline=None)
def test_measured_as_scikit_learn_does(known, unknown, share):
    found, known, unknown = tell_apart(known, unknown, share), np.array(known), np.array(unknown)
    truth = np.repeat([0, 1], [len(known), len(unknown)])
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, [*known, *unknown]))
    fpr, tpr, _ = roc_curve(1 - truth, [*-known, *-unknown], drop_intermediate=False)
    assert found["fpr"] == pytest.approx(fpr[(tpr >= share - 1e-9).argmax()])
    limit = limit_for(known, share)
    assert (known <= limit).mean() >= share - 1e-9 and limit in known
    assert (known < limit).mean() < share + 1e-9                              # no smaller one will do


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan")])
def test_shares_that_make_no_sense(share):
    with pytest.raises(ValueError, match="use a number above 0, at most 1"): limit_for(np.ones(3), share)


def test_scores_are_larger_for_what_is_strange():
    (memory, _, _), (f, _, z), (far, _, _) = clusters(), clusters(seed=1), clusters(seed=2)
    far = np.abs(np.random.default_rng(3).normal(size=far.shape)).astype(np.float32)
    centres = np.random.default_rng(9).normal(size=(6, 16))
    table = compare_scores(memory, (f, z), (f, z), (far, far @ centres.T))
    assert set(table.score) == {"probability", "energy", *(f"{how} {k}" for how in ("neighbours", "both")
                                                           for k in (1, 5, 20))}
    assert (table.set_index("score").auroc[["neighbours 5", "both 5"]] > .95).all()
    assert energy(np.array([[1000., 1000]])) == pytest.approx(-1000 - np.log(2))         # no overflow
    assert set(novelties(f, z, memory[:3])) == {"probability", "energy", "neighbours 1", "neighbours 3"}


def test_hidden_classes_leave_memory_and_logits():
    "A class that only its own memory and logit could tell is found strange, and the others are not."
    (memory, labels, _), (f, truth, z) = clusters(), clusters(seed=1)
    guess = hidden_classes(memory, labels, f, z, truth)
    assert (guess > .9).all(), guess
    assert guess.equals(hidden_classes(memory, labels, f, z, truth))                    # nothing is left to chance
    hidden_classes(memory, labels, f[:40], z[:40], truth[:40] % 2, folds=5)             # fewer classes than folds
    with pytest.raises(ValueError, match="validation pictures of a single class"):
        hidden_classes(memory, labels, f, z, np.zeros(len(f), int))


@pytest.mark.parametrize("share", [.95, .5])
def test_the_choice_lets_so_many_pass(share):
    (memory, labels, _), (f, truth, z) = clusters(spread=.8), clusters(seed=1, spread=.8)
    known = choose_known(memory, labels, f, z, truth, share)
    passed = (known.novelty(f, z) <= known.limit).mean()
    assert share <= passed < share + 2 / len(f) and known.score in ("neighbours", "both") and known.pictures == len(f)
    both = all_novelties(f, z, known.memory.astype(np.float32), (f, z))
    assert np.allclose(known.novelty(f, z), both[f"{known.score} {known.k}"], atol=1e-4)
    assert np.isfinite(known.novelty(np.full((1, 16), np.nan), np.full((1, 6), np.nan))).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    dls = FocusDataLoaders.from_toy(4, 2, n_classes=3, image_size=64, bs=6)
    learn = focus_learner(dls, "toy_resnet", preset="photos", pretrained=False, cut="layer2")
    shaken(learn.model)
    return save_focus(learn, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("photographs")
    for i in range(12): photograph(i, (90 + i, 70)).save(place / f"{i:02d}.png")
    return sorted(map(str, place.glob("*.png")))


@pytest.fixture(scope="module")
def table_of(folder, files):
    names = load_focus(folder).classes
    return pd.DataFrame(dict(file=files, split=["train"] * 6 + ["valid"] * 6, label=[names[i % 3] for i in range(12)]))


@pytest.fixture
def told(folder, table_of, tmp_path):
    "A copy of the folder that can tell."
    shutil.copytree(folder, tmp_path / "told")
    add_known(tmp_path / "told", FocusClassifier.load(folder, "cpu").learn_known(table_of))
    return tmp_path / "told"


def test_a_folder_without_them_answers_as_ever(folder, told, files):
    before, after = (FocusClassifier.load(one, "cpu").predict(files) for one in (folder, told))
    assert all(one.known is None and one.novelty is None and one.as_dict()["known"] is None for one in before)
    for one, other in zip(before, after): assert torch.allclose(one.probabilities, other.probabilities, atol=1e-5)
    assert {one.known for one in after} <= {True, False} and all(one.known for one in after[6:])     # they chose it
    assert all(one.inner is None for one in after)


def test_one_a_batch_and_a_stream_say_the_same(told, files):
    classifier = FocusClassifier.load(told, "cpu")
    batch = [one.novelty for one in classifier.predict(files)]
    assert [classifier.predict(file).novelty for file in files] == pytest.approx(batch, abs=1e-3)
    assert explain(classifier, files[0]).prediction.novelty == pytest.approx(batch[0], abs=1e-3)


def test_the_folder_keeps_half_precision_and_its_checksum(told):
    known = load_focus(told).known
    assert known.memory.dtype == np.float16 and known.memory.shape == (6, load_focus(told).n_features)
    config = json.loads((told / "config.json").read_text())["known"]
    assert config["limit"] == known.limit and config["pictures"] == 6 and len(config["sha256"]) == 64


@pytest.mark.parametrize("damage, words", [
    (lambda f, c: (f / "known.safetensors").unlink(), "no known.safetensors in"),
    (lambda f, c: (f / "known.safetensors").write_bytes(b"no"), "is damaged, cut short, or no safetensors file"),
    (lambda f, c: c["known"].update(sha256="0" * 64), "is not the file that config.json was written with"),
    (lambda f, c: c["known"].update(k=99), "should hold features: 99 or more of"),
    (lambda f, c: c["known"].update(score="magic"), "known is .* but should be a table: score"),
    (lambda f, c: c["known"].update(limit=None), "known is .* but should be a table: score"),
    (lambda f, c: c["known"].update(spread=[[0, 1]]), "known is .* but should be a table: score"),
])
def test_damaged_folders(told, damage, words):
    config = json.loads((told / "config.json").read_text())
    damage(told, config)
    (told / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, FileNotFoundError), match=words): load_focus(told)


def test_a_new_model_forgets_the_old_ones_memory(told):
    dls = FocusDataLoaders.from_toy(2, 2, n_classes=2, image_size=64, bs=4)
    save_focus(focus_learner(dls, "toy_resnet", preset=None, pretrained=False, m=2, l=1), told)
    assert load_focus(told).known is None and not (told / "known.safetensors").exists()


def test_labels_and_splits_that_are_wrong(folder, table_of):
    classifier = FocusClassifier.load(folder, "cpu")
    with pytest.raises(ValueError, match="no pictures of split 'valid'"):
        classifier.learn_known(table_of[table_of.split == "train"])
    with pytest.raises(ValueError, match="the model does not know 'dodo'"):
        classifier.learn_known(table_of.assign(label="dodo"))


def test_rows_cards_and_the_app_say_so(told, files, tmp_path, capsys):
    config = json.loads((told / "config.json").read_text())
    config["known"]["limit"] = -1e5                                        # everything is strange
    (told / "config.json").write_text(json.dumps(config))
    fd_focus_predict(str(told), files[:2], out=str(tmp_path / "rows.csv"), device="cpu")
    assert "2 like nothing known (100 %)" in capsys.readouterr().err
    assert pd.read_csv(tmp_path / "rows.csv").known.tolist() == [False, False]
    fd_focus_predict(str(told), files[:2], out=str(tmp_path / "rows.jsonl"), device="cpu")
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["known"] is False
    fd_focus_predict(str(told), files[:1], format="text", device="cpu")
    assert "(looks like nothing I know)" in capsys.readouterr().out
    classifier = FocusClassifier.load(told, "cpu")
    why = explain(classifier, files[0])
    assert why.verdict == "strange" and why.headline().startswith("Looks like nothing I know; most like ")
    assert "95 % of 6 validation pictures of known classes do not look so strange" in why.text()
    assert 'data-verdict="strange"' in why.to_html() and why.image().width == 1352
    assert "nothing it knows" in about(classifier) and "like nothing it knows" in repr(why.prediction)
    assert "It says which pictures look like nothing it knows" in (told / "README.md").read_text()


def test_a_known_object_is_shared_and_not_copied():
    known = Known("neighbours", .1, 1, np.ones((2, 3), np.float16))
    assert copy.deepcopy(known) is known


def test_a_training_can_store_what_tells_the_unknown(tmp_path, capsys, monkeypatch):
    two_classes(tmp_path / "photos")
    asked = dict(method="plain", arch="toy_resnet", pretrained=False, image_size=48, epochs=1, bs=4, workers=0,
                 unknown=True)
    fd_focus_train(data=str(tmp_path / "photos"), out=str(tmp_path / "run"), examples=0, **asked)
    assert "it tells pictures like nothing it knows" in capsys.readouterr().out
    classifier = FocusClassifier.load(tmp_path / "run/model")
    assert classifier.predict(photograph(99)).known in (True, False)
    def broken(*args, **kwargs): raise ValueError("a class too few")
    monkeypatch.setattr(FocusClassifier, "learn_known", broken)
    fd_focus_train(data=str(tmp_path / "photos"), out=str(tmp_path / "again"), examples=0, **asked)
    assert "--unknown: left out, a class too few" in capsys.readouterr().out
    assert (tmp_path / "again/summary.json").exists()          # the run is kept
    with pytest.raises(SystemExit, match="unknown: for pictures in a folder"): fd_focus_train(**asked)
