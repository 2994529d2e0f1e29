"Features as arrays: those of the heads, of any method, whatever cannot be read; and the file that a command writes."
import subprocess
import sys

import numpy as np
import pytest
import torch
import test_contract  # noqa: F401 -- registers the method "mine"
from conftest import photograph, shaken

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning
from fd_focus.training.learner import focus_learner
from fd_focus.use.cli import fd_focus_predict
from fd_focus.use.features import Features, mean_features, nearest
from fd_focus.use.model_folder import save_focus
from fd_focus.use.predict import FocusClassifier

SMALL = dict(pretrained=False, cut="layer2")


@pytest.fixture(scope="module")
def dls(): return FocusDataLoaders.from_toy(4, 2, n_classes=3, image_size=64, bs=6)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(9): photograph(i, (90 + i, 70)).save(folder / f"{i}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def folder(dls, tmp_path_factory):
    "Of a network that looks again where it is unsure, and has seen nothing."
    learn = focus_learner(dls, "toy_resnet", preset="photos", **SMALL)
    shaken(learn.model)
    learn.model.look_again_below = .4
    return save_focus(learn, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def classifier(folder): return FocusClassifier.load(folder, "cpu", fold=False)


def inputs(classifier, files):
    pipeline = classifier.pipeline
    return (torch.stack([classifier.pixels(file) for file in files]) - pipeline.mean) / pipeline.std


@torch.no_grad()
def test_they_are_what_the_heads_get(classifier, files):
    found, net = classifier.features(files, regions=True, bs=4), classifier.pipeline.net
    image, logits, _, _, boxes = net.first_look(x := inputs(classifier, files), net.l)
    assert np.allclose(found.image, image, atol=1e-4) and np.allclose(found.logits, logits, atol=1e-4)
    assert np.allclose(found.regions, net.second_look(x, boxes), atol=1e-4)
    assert found.image.dtype == found.regions.dtype == found.probability.dtype == np.float32
    answers = classifier.predict(files)
    assert found.labels == [answer.label for answer in answers] and found.sources == files
    assert np.allclose(found.boxes, [answer.boxes.tolist() for answer in answers], atol=.1)
    assert answers[0].inner is None and classifier.keeps == ""              # asking changes nothing for others


@pytest.mark.parametrize("answer", ["image", "hybrid", "adaptive"])
def test_regions_whatever_answers(dls, files, tmp_path, answer):
    learn = focus_learner(dls, "toy_resnet", preset=None, m=3, l=2, answer=answer, **SMALL)
    found = FocusClassifier.load(save_focus(learn, tmp_path / "m"), "cpu").features(files[:2], regions=True)
    assert found.regions.shape == (2, 3 if answer == "image" else 2, learn.model.n_features)
    assert found.boxes.shape == (*found.regions.shape[:2], 4)


@pytest.mark.parametrize("method", ["bilinear", "partnet", "racnn", "knn"])
def test_other_methods_give_the_pooled_map(dls, files, tmp_path, method):
    options = dict(remembered=4) if method == "knn" else {}
    learn = focus_learner(dls, "toy_resnet", method, preset=None, pretrained=False, **options)
    if method == "knn": learn.model.memory.normal_()
    shaken(learn.model)
    classifier = FocusClassifier.load(save_focus(learn, tmp_path / "m"), "cpu", fold=False)
    found, net = classifier.features(files[:2]), classifier.pipeline.net
    with torch.no_grad(): pooled = net.body(inputs(classifier, files[:2])).mean((2, 3))
    assert np.allclose(found.image, pooled, atol=1e-4)


def test_a_method_of_ones_own(dls, files, tmp_path):
    classifier = FocusClassifier.load(save_focus(focus_learner(dls, "toy_resnet", "mine", **SMALL), tmp_path / "m"),
                                      "cpu")
    found = classifier.features(files)
    assert found.image.shape == (9, classifier.pipeline.net.n_features) and found.regions is None
    with pytest.raises(ValueError, match="Mine has no features of regions: ask for those of the image alone"):
        classifier.features(files, regions=True)


def test_what_cannot_be_read_has_no_row(classifier, files, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    asked = [files[0], tmp_path / "page.jpg", files[1], "gone.jpg"]
    with pytest.warns(DataWarning, match="2 of 4 pictures have no features, see `failed`; the first: .*page.jpg"):
        found = classifier.features(asked, bs=2)
    assert found.sources == files[:2] and [source for source, _ in found.failed] == asked[1::2]
    assert "2 pictures" in repr(found) and "2 failed" in repr(found)
    with pytest.raises(ValueError, match="page.jpg"): classifier.features(asked, on_error="raise")
    with pytest.raises(ValueError, match=r"no pictures to take features of \(none of 1 could be read"):
        classifier.features("gone.jpg")
    with pytest.raises(ValueError, match=r"no pictures to take features of \(none\)"): classifier.features([])


def test_one_picture_a_batch_or_a_stream(classifier, files):
    whole = classifier.features(files).image
    one = classifier.features(files[0]).image
    assert one.shape == (1, whole.shape[1]) and np.allclose(one, whole[:1], atol=1e-4)
    assert np.allclose(classifier.features(iter(files), bs=2).image, whole, atol=1e-4)
    with open(files[0], "rb") as stream: assert np.allclose(classifier.features(stream).image, one, atol=1e-4)
    pixels = np.zeros((2, 80, 90, 3), np.uint8)
    assert len(classifier.features(pixels)) == 2 and len(classifier.features(pixels[0])) == 1


def test_neighbours():
    memory = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    index, cosine = nearest(3 * memory[:5], memory, 2)
    assert index[:, 0].tolist() == [0, 1, 2, 3, 4] and np.allclose(cosine[:, 0], 1) and (cosine[:, 1] < 1).all()
    assert nearest(memory[7], memory, 30)[0].shape == (1, 30)
    for k in (0, 31):
        with pytest.raises(ValueError, match=f"k={k}; there are 30 to choose from"): nearest(memory, memory, k)


def test_means_of_classes():
    names, means = mean_features(np.array([[2., 0], [0, 1], [0, 5]]), ["b", "a", "a"])
    assert names == ["a", "b"] and np.allclose(means, [[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="2 features, but 1 labels"): mean_features(np.eye(2), ["a"])


def test_a_file_of_arrays_and_pictures_without_names(tmp_path):
    found = Features([np.zeros(3), "a.png"], ["x", "y"], np.ones(2), np.eye(2), np.eye(2), np.ones((2, 3, 2)),
                     np.ones((2, 3, 4)))
    stored = np.load(found.save(tmp_path / "f.npz"))
    assert stored["names"].tolist() == ["picture 0", "a.png"] and stored["boxes"].shape == (2, 3, 4)


def test_the_command_writes_what_python_gets(folder, classifier, files, tmp_path, capsys):
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(SystemExit):                                     # one failed
        fd_focus_predict(str(folder), [str(files[0].parent), str(tmp_path / "page.jpg")], out=str(tmp_path / "r.csv"),
                         features=str(tmp_path / "new" / "f.npz"), device="cpu")
    stored = np.load(tmp_path / "new" / "f.npz")
    assert stored["names"].tolist() == [str(file) for file in files] and "f.npz" in capsys.readouterr().err
    assert np.allclose(stored["features"], classifier.features(files).image, atol=1e-3)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["f.npz"]


def test_names_of_any_bytes(folder, files, tmp_path):
    name = "caf\udce9.png"
    try: (tmp_path / name).write_bytes(files[0].read_bytes())
    except (OSError, UnicodeError): pytest.skip("this disk takes no such name")
    fd_focus_predict(str(folder), [str(tmp_path)], out=str(tmp_path / "r.csv"), features=str(tmp_path / "f.npz"),
                     device="cpu")
    assert np.load(tmp_path / "f.npz")["names"].tolist() == [str(tmp_path / name)]


@pytest.mark.parametrize("options, words", [
    (dict(features="f.csv"), "--features f.csv: name a file that ends in .npz"),
    (dict(features="folder.npz"), "--features folder.npz: name a file that ends in .npz"),
    (dict(features="f.npz", resume=True), "--resume asks only about the rest"),
    (dict(features="closed/f.npz"), "closed"),
])
def test_bad_destinations_come_before_work(folder, files, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "closed").write_text("a file where a folder should be")
    monkeypatch.setattr(FocusClassifier, "stream", None)                # work would fail otherwise
    with pytest.raises(SystemExit) as end: fd_focus_predict(str(folder), [str(files[0])], out="r.csv", **options)
    assert words in str(end.value) and not (tmp_path / "r.csv").exists()


def test_help_tells_of_features():
    code = "from fd_focus.use.cli import fd_focus_predict; fd_focus_predict()"
    run = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert "--features str" in run.stdout and "mean maps of the first" in run.stdout
