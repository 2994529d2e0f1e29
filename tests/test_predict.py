"A model folder answers as the learner did, whatever the picture comes as."
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import shaken
from fastai.vision.augment import RandomCrop, Resize
from PIL import Image, ImageOps

from fd_focus.bodies import IMAGENET_STATS
from fd_focus.focus import FocusNet
from fd_focus.use.cli import fd_focus_predict
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning
from fd_focus.use.model_folder import save_focus
from fd_focus.methods import METHODS, Look, Method, register
from fd_focus.training.learner import focus_learner
from fd_focus.use.answer import cut_zooms, draw_heat, explain
from fd_focus.use.files import Rows, find_pictures, predict_files
from fd_focus.use.pipeline import FocusPipeline
from fd_focus.use.predict import FocusClassifier, Prediction, draw_prediction, open_any, prepare
from fd_focus.toy import ToyBirds

SIZES = ((90, 70), (64, 120), (77, 77))    # of the original pictures, width and height


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    "Thirty birds of three classes as files of several shapes and kinds."
    folder, drawn = tmp_path_factory.mktemp("birds"), ToyBirds(images_per_class=10, n_classes=3, image_size=80)
    for i in range(len(drawn)):
        image, label = drawn[i]
        (folder / drawn.classes[label]).mkdir(exist_ok=True)
        image = image.resize(SIZES[i % 3]).convert(("RGB", "L", "CMYK", "RGB")[i % 4])
        image.save(folder / drawn.classes[label] / f"{i:02d}.jpg", quality=95)
    return folder


def make(dls, folder, arch="toy_resnet", extras=(), **kwargs):
    torch.manual_seed(0)
    learn = focus_learner(dls, arch, pretrained=False, **dict(preset=None) | kwargs)
    shaken(learn.model)
    return learn, save_focus(learn, folder, **dict(extras))


def expected(learn, dl):
    with learn.no_bar(): return learn.get_preds(dl=dl)[0]


@pytest.mark.parametrize("squash", [True, False, "pad"])
def test_files_as_in_validation(birds, tmp_path, squash):
    dls = FocusDataLoaders.from_folder(birds, image_size=64, squash=squash, bs=4, num_workers=0)
    learn, folder = make(dls, tmp_path / "model")
    items = list(dls.valid_ds.items)
    want = expected(learn, dls.test_dl(items))
    found = FocusClassifier.load(folder, "cpu").predict([birds / item for item in items], bs=4)
    assert torch.allclose(torch.stack([f.probabilities for f in found]), want, atol=1e-4)
    assert want.std(0).max() > .01                       # the pictures do differ
    assert [f.label for f in found] == [dls.vocab[i] for i in want.argmax(1)]


def test_large_photographs_as_in_validation(birds, tmp_path):
    "Validation decodes large JPEGs at reduced scale, turned ones too; the boxes lie on the full picture all the same."
    folder = tmp_path / "large"
    for i, file in enumerate(sorted(birds.rglob("*.jpg"))):
        image = Image.open(file).convert("RGB")
        image = image.resize((image.width * 8, image.height * 6 + i))
        image.getexif()[274] = 6 if i % 2 else 1
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        image.save(folder / file.parent.name / file.name, exif=image.getexif())
    dls = FocusDataLoaders.from_folder(folder, image_size=64, bs=4, num_workers=0)
    learn, model = make(dls, tmp_path / "model")
    items = list(dls.valid_ds.items)
    assert any(dls.valid_ds.tfms[0][0](item).width < 400 for item in items)
    found = FocusClassifier.load(model, "cpu").predict([folder / item for item in items])
    assert torch.allclose(torch.stack([f.probabilities for f in found]), expected(learn, dls.test_dl(items)), atol=1e-4)
    for item, f in zip(items, found):
        width, height = ImageOps.exif_transpose(Image.open(folder / item)).size
        seen = torch.tensor([4, 4, 68, 68]) / 73 * torch.tensor([width, height] * 2)
        assert f.size == (height, width) and torch.allclose(f.view, seen, atol=.01)
        assert f.boxes.max() > 300


def test_toy_items_as_in_validation(tmp_path):
    dls = FocusDataLoaders.from_toy(4, 4, image_size=64, n_classes=3, bs=8)
    learn, folder = make(dls, tmp_path / "model", answer="ensemble", fusion="mean")
    items = list(dls.valid_ds.items)
    read = dls.valid_ds.tfms[0][0]
    found = FocusClassifier.load(folder, "cpu").predict([read(item) for item in items])
    assert torch.allclose(torch.stack([f.probabilities for f in found]), expected(learn, dls.test_dl(items)), atol=1e-4)


def test_other_transforms(birds, tmp_path):
    "fastai's own transforms, own statistics, a first look smaller than the input."
    from fastai.data.transforms import Normalize

    dls = FocusDataLoaders.from_folder(
        birds,
        image_size=96,
        bs=4,
        num_workers=0,
        item_tfms=[Resize((120, 110)), RandomCrop(96)],
        batch_tfms=[Normalize.from_stats([0.4, 0.5, 0.6], [0.3, 0.2, 0.1])],
    )
    learn, folder = make(dls, tmp_path / "model", image_size=64)
    config = json.loads((folder / "config.json").read_text())
    assert (config["resize"], config["input_size"], config["image_size"], config["squash"]) == (
        [120, 110],
        [96, 96],
        [64, 64],
        False,
    )
    items = list(dls.valid_ds.items)
    found = FocusClassifier.load(folder, "cpu").predict([birds / item for item in items])
    assert torch.allclose(torch.stack([f.probabilities for f in found]), expected(learn, dls.test_dl(items)), atol=1e-4)


def test_transforms_that_cannot_be_recorded(birds, tmp_path):
    from fastai.vision.augment import RandomResizedCrop
    dls = FocusDataLoaders.from_folder(birds, image_size=64, bs=4, num_workers=0, item_tfms=[RandomResizedCrop(64)])
    with pytest.warns(UserWarning, match="RandomResizedCrop, which a model folder cannot record"):
        make(dls, tmp_path / "model")


@pytest.fixture(scope="module")
def model(birds, tmp_path_factory):
    dls = FocusDataLoaders.from_folder(birds, image_size=64, bs=4, num_workers=0)
    return make(dls, tmp_path_factory.mktemp("model"))[1]


@pytest.mark.parametrize("squash", [True, False, "pad"])
def test_boxes_lie_on_the_original(model, squash):
    "Each box, cut from the original and enlarged, is what the network cut from its own input."
    classifier = FocusClassifier.load(model, "cpu")
    classifier.squash = squash
    y, x = np.mgrid[0:300, 0:400]
    smooth = Image.fromarray(np.stack([x * 255 / 400, y * 255 / 300, (x + y) * 255 / 700], -1).astype(np.uint8))
    found = classifier.predict(smooth)
    seen, view = prepare(smooth, classifier.resize, classifier.input_size, squash)
    with torch.no_grad():
        boxes = classifier.pipeline(torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None].float() / 255)[1][0]
    assert len(found.boxes) == 4 and found.size == (300, 400)
    if squash == "pad":            # a region that lies in the border as well is cut off at the picture's edge
        view, ends = torch.tensor(view), torch.tensor([0, 0, 400, 300])
        edges = (ends - view[:2].repeat(2)) * torch.tensor(classifier.input_size[::-1]).repeat(2) / \
            (view[2:] - view[:2]).repeat(2)
        boxes = torch.cat([boxes[:, :2].maximum(edges[:2]), boxes[:, 2:].minimum(edges[2:])], 1)
        assert (found.boxes >= 0).all() and (found.boxes <= ends[2:].repeat(2)).all()
    for ours, theirs in zip(found.boxes.tolist(), boxes.tolist()):
        a = np.asarray(smooth.crop([round(v) for v in ours]), float).mean((0, 1))
        b = np.asarray(seen.crop([round(v) for v in theirs]), float).mean((0, 1))
        assert np.abs(a - b).max() < 4, (a, b)             # of 255: corners were rounded to pixels
    inside = found.boxes
    assert (inside[:, :2] >= found.view[:2] - .01).all() and (inside[:, 2:] <= found.view[2:] + .01).all()


def test_kinds_of_pictures(model, birds):
    classifier = FocusClassifier.load(model, "cpu")
    file = sorted(birds.rglob("*.jpg"))[0]
    image = Image.open(file).convert("RGB")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    want = classifier.predict(file)
    assert (
        isinstance(want, Prediction)
        and abs(want.probabilities.sum() - 1) < 1e-5
        and want.top5[0] == (want.label, want.probability)
    )
    kinds = [str(file), image, array, tensor, tensor / 255, file.read_bytes(), io.BytesIO(file.read_bytes())]
    for found in (
        [classifier.predict(kind) for kind in kinds]
        + classifier.predict(kinds[:5])
        + classifier.predict(tensor[None])
        + classifier.predict(array[None])
    ):
        assert torch.allclose(found.probabilities, want.probabilities, atol=1e-5) and torch.equal(
            found.boxes, want.boxes
        )
    wide = [
        array.astype(np.uint16) * 257,
        torch.from_numpy(array.astype(np.uint16) * 257).permute(2, 0, 1),
        tensor.bfloat16() / 255,
        tensor.half() / 255,
    ]
    for kind, tolerance in zip(wide, (1e-5, 1e-5, .1, .1)):                 # half precision has 8 and 11 bits of 8
        assert torch.allclose(classifier.predict(kind).probabilities, want.probabilities, atol=tolerance)
    grey = np.asarray(image.convert("L"))
    assert torch.equal(
        classifier.predict(grey).probabilities, classifier.predict(np.stack([grey] * 3, -1)).probabilities
    )
    turned = image.rotate(90, expand=True)
    turned.getexif()[0x112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "png", exif=turned.getexif())
    assert classifier.predict(buffer.getvalue()).size == (image.height, image.width)


def test_bad_pictures(model, tmp_path):
    classifier = FocusClassifier.load(model, "cpu")
    (tmp_path / "text.jpg").write_text("no picture")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)).save(whole, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:2000])
    for source, message in (
        (tmp_path / "text.jpg", "text.jpg cannot be read as a picture"),
        (tmp_path / "cut.jpg", "cut.jpg cannot be read.*truncated"),
        (tmp_path, "cannot be read as a picture.*Is a directory"),
        (np.zeros((4, 4, 7)), "shape .4, 4, 7.; give an array"),
        (torch.full((3, 8, 8), 9.0), "give 0 to 1"),
        (torch.full((3, 8, 8), float("nan")), "give 0 to 1"),
        (None, "give a path"),
        (np.zeros((9, 9, 3), np.int32), "a picture of int32; give uint8"),
        (np.zeros((9, 9, 3), bool), "a picture of bool"),
        (torch.zeros(3, 9, 9, dtype=torch.complex64), "a picture of complex64"),
        (io.StringIO("no picture"), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message): classifier.predict(source)
    with pytest.raises(FileNotFoundError, match="no file .*gone.jpg"): classifier.predict(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="bs=0"): classifier.predict([], bs=0)


def test_streams_that_cannot_go_back(model, birds):
    "A pipe is read once; the model asks twice, for the picture and for its size."
    file = sorted(birds.rglob("*.jpg"))[0]
    classifier = FocusClassifier.load(model, "cpu")
    assert classifier.min_side
    want = classifier.predict(file)
    def piped(mode="rb"):
        reading, writing = os.pipe()
        threading.Thread(target=lambda: open(writing, "wb").write(file.read_bytes())).start()
        return open(reading, mode, **({} if "b" in mode else dict(encoding="latin1")))

    class Bare:  # as of an HTTP client: it reads, and that is all
        def read(self, *args): return file.read_bytes()
    for stream in (piped(), Bare()):
        found = classifier.predict(stream)
        assert torch.equal(found.probabilities, want.probabilities) and found.size == want.size
    with pytest.raises(ValueError, match="open it with 'rb'"): classifier.predict(piped("r"))


def test_a_device_that_is_not_there(model):
    for name in ("gpu", "abacus", "cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device='{name}' cannot be used here; use 'cpu'"):
            FocusClassifier.load(model, name)


def test_augmentations_that_leave_validation_alone(birds, tmp_path, recwarn):
    "fastai's usual recipe: flips and warps on the batch, which validation does not pass through."
    from fastai.vision.augment import Flip, aug_transforms

    dls = FocusDataLoaders.from_folder(
        birds, image_size=64, bs=4, num_workers=0, item_tfms=[Resize(64)], batch_tfms=aug_transforms()
    )
    assert any(type(transform) is Flip for transform in dls.valid.after_batch.fs)
    learn, folder = make(dls, tmp_path / "model")
    assert not [w for w in recwarn if "cannot record" in str(w.message)]
    items = list(dls.valid_ds.items)
    found = FocusClassifier.load(folder, "cpu").predict([birds / item for item in items])
    assert torch.allclose(torch.stack([f.probabilities for f in found]), expected(learn, dls.test_dl(items)), atol=1e-4)
    sized = FocusDataLoaders.from_folder(
        birds, image_size=64, bs=4, num_workers=0, item_tfms=[Resize(80)], batch_tfms=aug_transforms(size=64)
    )
    with pytest.warns(UserWarning, match="Flip, which a model folder cannot record"): make(sized, tmp_path / "sized")


def test_temperature_and_threshold(birds, tmp_path):
    dls = FocusDataLoaders.from_folder(birds, image_size=64, bs=4, num_workers=0)
    learn, plain = make(dls, tmp_path / "plain")
    hot = save_focus(learn, tmp_path / "hot", temperature=3., threshold=.4)
    file = sorted(birds.rglob("*.jpg"))[0]
    cold, warm = (FocusClassifier.load(folder, "cpu").predict(file) for folder in (plain, hot))
    assert torch.allclose((cold.probabilities.log() / 3).softmax(-1), warm.probabilities, atol=1e-5)
    assert cold.sure is None and warm.sure is (warm.probability >= .4) and warm.label == cold.label
    for threshold, sure in ((0., True), (2., False)):                         # 2: no answer is sure, however probable
        folder = save_focus(learn, tmp_path / f"{threshold}", temperature=1e-3, threshold=threshold)
        found = FocusClassifier.load(folder, "cpu").predict(file)
        assert found.sure is sure and found.probability == 1
        assert ("not sure" in repr(found)) is not sure


def test_plain_model(birds, tmp_path):
    dls = FocusDataLoaders.from_folder(birds, image_size=64, bs=4, num_workers=0)
    learn, folder = make(dls, tmp_path / "model", method="plain")
    items = list(dls.valid_ds.items)
    found = FocusClassifier.load(folder, "cpu").predict([birds / item for item in items])
    assert torch.allclose(torch.stack([f.probabilities for f in found]), expected(learn, dls.test_dl(items)), atol=1e-4)
    assert found[0].boxes.shape == (0, 4) and found[0].scores.shape == (0,)
    look = learn.see(items)[1]
    assert torch.allclose(torch.stack([f.attention for f in found]), look.attention, atol=1e-3)   # of its own answer
    assert found[0].source == birds / items[0] and found[0].model["method"] == "plain"
    json.dumps(found[0].as_dict())
    assert draw_prediction(birds / items[0], found[0]).size == found[0].size[::-1]


@pytest.fixture(scope="module")
def choosy(birds, tmp_path_factory):
    "A model that looks again at about half of the birds, and where it does not at all, or always."
    dls = FocusDataLoaders.from_folder(birds, image_size=64, bs=4, num_workers=0)
    place = tmp_path_factory.mktemp("choosy")
    learn, folder = make(dls, place / "image", m=4, l=2, answer="image")
    files = sorted(birds.rglob("*.jpg"))
    first = sorted(found.probability for found in FocusClassifier.load(folder, "cpu").predict(files))
    for name, answer, limit in (("ensemble", "ensemble", .9), ("never", "adaptive", 0), ("always", "adaptive", 2.),
                                ("half", "adaptive", (first[14] + first[15]) / 2)):
        learn.model.answer, learn.model.look_again_below = answer, limit
        save_focus(learn, place / name)
    return place


def ask_all(choosy, name, files, **kwargs): return FocusClassifier.load(choosy / name, "cpu").predict(files, **kwargs)


def test_a_mixed_batch_answers_as_picture_by_picture(choosy, birds):
    "And each as the network that always looks once, or always twice."
    files = sorted(birds.rglob("*.jpg"))
    once, twice, mixed, alone = (ask_all(choosy, name, files, bs=bs)
                                 for name, bs in (("image", 16), ("ensemble", 16), ("half", 16), ("half", 1)))
    assert sum(found.looked_again for found in mixed) == 15
    limit = json.loads((choosy / "half" / "config.json").read_text())["look_again_below"]
    for first, both, found, single in zip(once, twice, mixed, alone, strict=True):
        assert first.looked_again is None and both.looked_again is None
        assert found.looked_again is single.looked_again is (first.probability < limit)
        assert torch.allclose(found.probabilities, single.probabilities, atol=1e-5)
        assert torch.allclose(found.probabilities, (both if found.looked_again else first).probabilities, atol=1e-5)
        assert torch.equal(found.boxes, single.boxes) and found.boxes.shape == (2, 4)   # of one look too
        assert found.attention is not None and found.as_dict()["looked_again"] is found.looked_again
        assert (", looked again, " if found.looked_again else ", one look, ") in repr(found)
    changed = max((a.probabilities - b.probabilities).abs().max() for a, b in zip(once, twice))
    assert changed > 1e-3                              # the second look does say something else


@pytest.mark.parametrize("name, like, looked", [("never", "image", False), ("always", "ensemble", True)])
def test_at_its_ends_the_limit_is_one_look_or_two(choosy, birds, name, like, looked):
    files = sorted(birds.rglob("*.jpg"))[:8]
    for found, want in zip(ask_all(choosy, name, files), ask_all(choosy, like, files), strict=True):
        assert found.looked_again is looked and torch.allclose(found.probabilities, want.probabilities, atol=1e-6)


def test_only_the_unsure_pictures_of_a_batch_are_passed_again(choosy, birds, monkeypatch):
    classifier, passed = FocusClassifier.load(choosy / "half", "cpu"), []
    net, look = classifier.pipeline.net, classifier.pipeline.net.second_look
    monkeypatch.setattr(net, "second_look", lambda x, boxes: passed.append(len(x)) or look(x, boxes))
    found = classifier.predict(sorted(birds.rglob("*.jpg")), bs=10)
    assert passed == [n for n in (sum(one.looked_again for one in found[i:i + 10]) for i in (0, 10, 20)) if n]


def test_the_limit_is_of_the_first_look_as_it_was_trained(choosy, birds, tmp_path):
    "A temperature changes what is reported, and not who looks again."
    shutil.copytree(choosy / "half", tmp_path / "hot")
    config = json.loads((tmp_path / "hot/config.json").read_text())
    (tmp_path / "hot/config.json").write_text(json.dumps(config | dict(temperature=3.)))
    files = sorted(birds.rglob("*.jpg"))
    for hot, cold in zip(FocusClassifier.load(tmp_path / "hot", "cpu").predict(files), ask_all(choosy, "half", files)):
        assert hot.looked_again is cold.looked_again
        assert torch.allclose((cold.probabilities.log() / 3).softmax(-1), hot.probabilities, atol=1e-5)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_say_who_looked_again(ask, choosy, birds, tmp_path, kind):
    (tmp_path / "bad.jpg").write_text("no picture")
    out, files = tmp_path / f"rows.{kind}", sorted(birds.rglob("*.jpg"))
    run = ask(choosy / "half", birds, tmp_path / "bad.jpg", "--out", out, "--regions", tmp_path / "seen", "--bs", 7)
    said = r"31 pictures in [\d.]+ s, 15 looked again \(50 %\), 1 failed: see the last column; drawings in .*seen"
    assert re.fullmatch(said, run.stderr.splitlines()[-1])
    want = [found.looked_again for found in ask_all(choosy, "half", files)]
    if kind == "csv":
        table = pd.read_csv(out, keep_default_na=False)
        assert list(table.columns[:6]) == ["file", "label", "probability", "sure", "known", "looked_again"]
        assert list(table.looked_again) == [str(looked) for looked in want] + [""] and table.error.iloc[-1]
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["looked_again"] for row in rows[:-1]] == want and "looked_again" not in rows[-1]
    assert len(list((tmp_path / "seen").rglob("*.jpg"))) == 30             # also where one look was enough


def test_a_model_that_was_asked_about_nothing_readable_says_no_share(ask, choosy, tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    run = ask(choosy / "half", tmp_path / "bad.jpg")
    assert run.returncode == 1
    assert re.fullmatch(r"1 picture in [\d.]+ s, 1 failed: see the last column", run.stderr.splitlines()[-1])


class Alone(Method):
    "Boxes without scores."
    def __init__(self, body, n_classes, image_size=448):
        super().__init__(body, n_classes, image_size)
        self.head = torch.nn.Linear(self.n_features, n_classes)
    def look(self, x):
        boxes = torch.tensor([[[0., 0, 16, 16], [8, 8, 24, 24]]], device=x.device).expand(len(x), -1, -1)
        return Look(self.head(self.body(x).mean((2, 3))), boxes=boxes)
    def forward(self, x, target=None):
        logits = self.look(x).answer
        return {"image": logits} if self.training else logits


def test_boxes_without_scores(birds, tmp_path, monkeypatch):
    "A method of one's own may show boxes alone: rows and drawings have what there is."
    monkeypatch.setattr(METHODS, "places", dict(METHODS.places))
    register("alone", Alone)
    dls = FocusDataLoaders.from_folder(birds, image_size=64, bs=4, num_workers=0)
    classifier = FocusClassifier.load(make(dls, tmp_path / "model", method="alone")[1], "cpu")
    file = sorted(birds.rglob("*.jpg"))[0]
    found = classifier.predict(file)
    assert classifier.pipeline.outputs == ("probabilities", "boxes") and classifier.pipeline.n_boxes == 2
    assert found.boxes.shape == (2, 4) and found.scores.isnan().all() and found.attention is None
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["scores"] == [None, None]
    text = io.StringIO()
    predict_files(classifier, [str(file)], Rows(text, "csv", 3, 2))
    assert pd.read_csv(io.StringIO(text.getvalue())).score_1.isna().all()
    shown = explain(classifier, file).to_html()
    assert ">Zoom 2</figcaption>" in shown and ">Attention" not in shown


def test_stream_holds_little(model):
    "A thousand pictures that count how many of them are alive."
    alive, most, lock = set(), [0], threading.Lock()
    class Counted(np.ndarray):
        def __del__(self):
            with lock: alive.discard(id(self))
    def pictures():
        for i in range(200):
            picture = np.full((8, 8, 3), i, np.uint8).view(Counted)
            with lock: alive.add(id(picture)); most[0] = max(most[0], len(alive))
            yield picture
            del picture
    classifier, n = FocusClassifier.load(model, "cpu"), 0
    for _, found in classifier.stream(pictures(), bs=4):
        assert isinstance(found, Prediction); n += 1
    assert n == 200 and most[0] <= 20, most


def test_bf16_gives_nearly_the_same(model, birds):
    files = sorted(birds.rglob("*.jpg"))
    full, half = (FocusClassifier.load(model, "cpu", amp=amp).predict(files) for amp in ("auto", "bf16"))
    assert all(one.probabilities.dtype == one.boxes.dtype == torch.float32 for one in half)
    gaps = [float((a.probabilities - b.probabilities).abs().max()) for a, b in zip(full, half)]
    assert 0 < max(gaps) < .05                                              # it did compute with 8 bits of mantissa
    assert sum(a.label == b.label for a, b in zip(full, half)) >= len(files) - 3


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"random_regions", "mixed_regions"}))
def test_every_method_answers_in_bf16_and_says_what_it_shows(name):
    torch.manual_seed(0)
    net = METHODS[name].from_arch("toy_resnet", 3, pretrained=False, image_size=64).eval()
    pipeline = FocusPipeline(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): found = pipeline(torch.rand(2, 3, 64, 64))
    assert len(found) == len(pipeline.outputs) and found[0].dtype == torch.float32
    assert torch.allclose(found[0].sum(1), torch.ones(2), atol=1e-3)
    boxes = dict(zip(pipeline.outputs, found)).get("boxes")
    assert pipeline.n_boxes == (0 if boxes is None else boxes.shape[1])


def test_drawing(model, birds):
    classifier = FocusClassifier.load(model, "cpu")
    image = Image.fromarray(np.full((300, 400, 3), 100, np.uint8))
    found = classifier.predict(image)
    drawn = np.asarray(draw_prediction(image, found))
    assert drawn.shape == (300, 400, 3)
    x, y = [int(v) for v in found.boxes[0, :2].round()]
    assert (drawn[y + 1, x + 5] == [255, 0, 0]).all()                       # the best region is red and on top
    assert (drawn[2, 2] == 50).all()                                        # not seen
    assert draw_prediction(image, found, longest=100).size == (100, 75)


def photograph(file, size=(3600, 2700)):
    y, x = np.mgrid[0:size[1], 0:size[0]]
    Image.fromarray(np.stack([x * 255 / size[0], y * 255 / size[1], (x + y) % 256], -1).astype(np.uint8)).save(
        file, quality=80
    )
    return str(file)


@pytest.mark.parametrize(
    "size,longest,drawn",
    [((3600, 2700), 1600, (1600, 1200)), ((1900, 3000), 700, (443, 700)), ((6000, 900), 1600, (1600, 240))],
)
def test_a_large_photograph_is_drawn_as_it_was_read(model, tmp_path, monkeypatch, size, longest, drawn):
    "Of more pixels than PIL allows: predicted and drawn at reduced scale, its boxes where a drawing in full has them."
    exif, file = Image.Exif(), tmp_path / "x.jpg"
    exif[0x0112] = 8
    Image.open(photograph(file, size)).save(file, quality=80, exif=exif)
    classifier = FocusClassifier.load(model, "cpu")
    found, in_full = classifier.predict(file), ImageOps.exif_transpose(Image.open(file))
    want = draw_prediction(in_full, found, longest)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", size[0] * size[1] * 2 // 3)
    assert classifier.predict(file).size == found.size == size
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels are more than .*perhaps a decompression bomb"):
        draw_prediction(file, found)
    have = draw_prediction(file, found, longest)
    assert have.size == want.size == drawn[::-1]
    assert np.abs(np.asarray(have, float) - np.asarray(want)).mean() < 12, (
        "the picture differs"
    )  # of 255; the third colour is all edges
    frame = lambda image: (np.asarray(image) == [255, 0, 0]).all(-1)
    assert frame(have).sum() > 100 and (frame(have) == frame(want)).all()


def test_a_picture_that_cannot_be_drawn_keeps_its_answer(model, birds, tmp_path, monkeypatch):
    "Whatever goes wrong in drawing one picture is a word in its row; the others follow."
    files, classifier = [str(file) for file in sorted(birds.rglob("*.jpg"))[:4]], FocusClassifier.load(model, "cpu")
    want, explained = classifier.predict(files), Prediction.explained
    for number, error in enumerate(
        (ValueError("no place for a frame"), MemoryError(), FileNotFoundError("no file: it went away"), KeyError("x"))
    ):
        def draw(found, file, *args, bad=files[number], error=error, **kwargs):
            if file == bad: raise error
            return explained(found, file, *args, **kwargs)
        monkeypatch.setattr(Prediction, "explained", draw)
        for kind in ("jsonl", "csv"):
            text, seen = io.StringIO(), tmp_path / f"{number}{kind}"
            tally = predict_files(classifier, files, Rows(text, kind, 3, 4), regions=seen, bs=2)
            assert str(tally).endswith(", 1 failed: see the last column") and tally.answered == 4
            rows = (
                [json.loads(line) for line in text.getvalue().splitlines()]
                if kind == "jsonl"
                else pd.read_csv(io.StringIO(text.getvalue()), keep_default_na=False).to_dict("records")
            )
            assert [row["label"] for row in rows] == [found.label for found in want] and [
                row.get("error") or "" for row in rows
            ].count("") == 3
            assert (
                rows[number]["error"] == f"not drawn: {str(error) or 'MemoryError()'}"
                and len(list(seen.rglob("*.jpg"))) == 3
            )


def test_a_full_disk_ends_the_batch(model, birds, tmp_path, monkeypatch):
    "It would be in the way of every other drawing too."
    files, classifier = [str(file) for file in sorted(birds.rglob("*.jpg"))[:4]], FocusClassifier.load(model, "cpu")
    def full(image, file, *args, **kwargs): raise OSError(28, "No space left on device", str(file))
    monkeypatch.setattr(Image.Image, "save", full)
    text = io.StringIO()
    with pytest.raises(OSError, match="No space left"):
        predict_files(classifier, files, Rows(text, "jsonl", 3, 4), regions=tmp_path / "seen")
    assert not text.getvalue()


def test_an_error_without_words_has_its_name(model):
    text = io.StringIO()
    Rows(text, "jsonl", 3, 4).write("x.jpg", MemoryError())
    Rows(text, "csv", 3, 4, header=False).write("x.jpg", MemoryError())
    assert text.getvalue().splitlines() == [
        '{"file": "x.jpg", "error": "MemoryError()"}',
        "x.jpg" + "," * 18 + "MemoryError()",
    ]


# The command line

def starter(name, flags=()):
    script = Path(tempfile.gettempdir()) / f"start_{os.getpid()}" / name
    if not script.exists():
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"from fd_focus.use.cli import {name}\n{name}()\n")
    return [sys.executable, *flags, script]


def installed(name, *args, flags=()):
    "A console command, whether it is installed or not."
    return subprocess.run([*starter(name, flags), *map(str, args)], capture_output=True, text=True)


@pytest.fixture
def ask(command):
    return lambda *args, **kwargs: command("fd_focus_predict", *args, "--device", "cpu", **kwargs)


def test_help_imports_nothing_heavy():
    for name in ("fd_focus_predict", "fd_focus_export"):
        run = installed(name, "--help", flags=("-X", "importtime"))
        assert run.returncode == 0 and "usage" in run.stdout
        imported = {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines() if "|" in line}
        assert not imported & {"torch", "fastai", "matplotlib", "pandas", "onnx"}


def test_folder_to_csv(model, birds, tmp_path):
    classifier = FocusClassifier.load(model, "cpu")
    out, seen = tmp_path / "new" / "rows.csv", tmp_path / "seen"
    run = installed("fd_focus_predict", model, birds, "--out", out, "--regions", seen, "--bs", 7, "--device", "cpu")
    assert run.returncode == 0 and not run.stdout and "30 pictures" in run.stderr, run.stderr
    table = pd.read_csv(out)
    files = sorted(birds.rglob("*.jpg"))
    assert list(table.file) == [str(f) for f in files] and table.error.isna().all()
    assert table.sure.isna().all() and table.looked_again.isna().all() and "looked again" not in run.stderr
    assert list(table.columns) == [
        "file",
        "label",
        "probability",
        "sure",
        "known",
        "looked_again",
        "label_2",
        "probability_2",
        "label_3",
        "probability_3",
        "box_1",
        "score_1",
        "box_2",
        "score_2",
        "box_3",
        "score_3",
        "box_4",
        "score_4",
        "error",
    ]
    for row, found in zip(table.itertuples(), classifier.predict(files)):
        assert row.label == found.label and abs(row.probability - found.probability) < 1e-4
        assert (
            np.allclose([float(v) for v in row.box_1.split()], found.boxes[0], atol=0.06)
            and abs(row.score_1 - found.scores[0]) < 1e-3
        )
    drawn = [seen / f.relative_to("/") for f in files]
    assert all(Image.open(d).width == 1352 for d in drawn)                  # the whole card


def test_json_lines_stdin_and_bad_files(ask, model, birds, tmp_path):
    good = sorted(birds.rglob("*.jpg"))[:3]
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    listed = f"{good[0]}\n\n{tmp_path / 'text.jpg'}\n{tmp_path / 'gone.png'}\n{good[1]}\n"
    run = ask(
        model,
        "-",
        str(good[2].parent / "0[0-9].jpg"),
        tmp_path / "empty",
        f"{tmp_path}/*.tif",
        "--format",
        "jsonl",
        "--bs",
        2,
        stdin=listed,
    )
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 1 and "4 failed: see the last column" in run.stderr
    assert [row["file"] for row in rows[:4]] == [
        str(good[0]),
        str(tmp_path / "text.jpg"),
        str(tmp_path / "gone.png"),
        str(good[1]),
    ]
    assert "text.jpg cannot be read as a picture" in rows[1]["error"] and "no file" in rows[2]["error"]
    assert (
        "error" not in rows[0]
        and len(rows[0]["boxes"]) == 4
        and len(rows[0]["top5"]) == 3
        and rows[0]["label"] == rows[0]["top5"][0][0]
    )
    assert "Is a directory" in rows[-2]["error"] and "no file" in rows[-1]["error"]


def here(capsys, monkeypatch, *paths, stdin="", **kwargs):
    "The command in this process: exit status, standard output and error."
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    model, *paths = map(str, paths)
    try: fd_focus_predict(**dict(model=model, paths=paths, device="cpu") | kwargs)
    except SystemExit as end: status = end.code
    else: status = 0
    told = capsys.readouterr()
    if isinstance(status, str): status, told = 1, told._replace(err=told.err + status)
    return status, told.out.splitlines(), told.err


def test_processes_share_the_list(model, birds, tmp_path, capsys, monkeypatch):
    status, whole, _ = here(capsys, monkeypatch, model, birds)
    assert status == 0
    lines = [here(capsys, monkeypatch, model, birds, rank=rank, world=2)[1] for rank in (0, 1)]
    assert lines[0][0] == whole[0]                                            # one header in all
    assert len(lines[0]) == 16 and len(lines[1]) == 15
    names = [[line.split(",")[0] for line in part] for part in (lines[0][1:], lines[1])]
    assert set(names[0]).isdisjoint(names[1]) and sorted(names[0] + names[1]) == [
        line.split(",")[0] for line in whole[1:]
    ]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, told = here(capsys, monkeypatch, model, birds, out=str(tmp_path / "rows.jsonl"))
    assert (
        status == 0
        and [json.loads(line)["file"] for line in (tmp_path / "rows.rank1.jsonl").read_text().splitlines()] == names[1]
    )
    status, _, told = here(capsys, monkeypatch, model, "-")
    assert status == 1 and "cannot share a list on the standard input" in told
    for share, place in ((dict(rank=0), 0), (dict(world=2), 1)):  # what is not said comes from the environment
        status, lines, told = here(capsys, monkeypatch, model, birds, format="jsonl", **share)
        assert [json.loads(line)["file"] for line in lines] == names[place]


def test_a_picture_that_fails_does_not_end_the_other_processes(model, tmp_path, capsys, monkeypatch):
    "torchrun ends all where one has another status than 0; a share may also be empty."
    (tmp_path / "text.jpg").write_text("no picture")
    assert here(capsys, monkeypatch, model, tmp_path)[0] == 1
    assert here(capsys, monkeypatch, model, tmp_path, rank=0, world=2)[0] == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, word in (("0", "1 failed"), ("1", "no pictures were given")):
        monkeypatch.setenv("RANK", rank)
        status, _, told = here(capsys, monkeypatch, model, tmp_path)
        assert status == 0 and word in told
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert here(capsys, monkeypatch, model, tmp_path)[0] == 1


def test_a_typo_does_not_empty_an_earlier_result(model, birds, tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.csv").write_text("earlier")
    for wrong in (dict(format="xml"), dict(bs=0), dict(workers=0), dict(rank=3, world=2)):
        assert here(capsys, monkeypatch, model, birds, **{"out": str(tmp_path / "rows.csv")} | wrong)[0] == 1
        assert [file.read_text() for file in tmp_path.iterdir()] == ["earlier"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_that_are_not_utf8(ask, model, birds, tmp_path, kind):
    "A name in Latin-1 goes in by a folder or a list, and comes out as it is: bytes in CSV, an escape in JSON."
    good = sorted(birds.rglob("*.jpg"))[0]
    names = [os.fsencode(tmp_path) + name for name in (b"/caf\xe9.jpg", b"/caf\xe9.txt", "/café.jpg".encode())]
    for name in (names[0], names[2]):
        with open(name, "wb") as file: file.write(good.read_bytes())
    listed = os.fsdecode(b"\n".join(names))
    run = ask(model, "-", tmp_path, "--format", kind, "--out", tmp_path / "rows", "--regions", tmp_path / "seen",
              stdin=listed)
    assert run.returncode == 1 and "5 pictures" in run.stderr and "1 failed" in run.stderr, run.stderr
    piped = os.fsencode(ask(model, "-", "--format", kind, stdin=listed).stdout)
    for data, wanted in (((tmp_path / "rows").read_bytes(), [*names, names[2], names[0]]), (piped, names)):
        lines = data.splitlines()[kind == "csv":]
        assert [
            line.split(b",")[0] if kind == "csv" else os.fsencode(json.loads(line.decode())["file"]) for line in lines
        ] == wanted


def test_drawings_are_no_pictures_to_ask_about(model, birds, tmp_path, capsys, monkeypatch):
    "The same command twice, with the regions below the pictures: by folder and by pattern."
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(sorted(birds.rglob("*.jpg"))[0].read_bytes())
    monkeypatch.chdir(tmp_path / "a")
    for path in (".", "..", "**/*.jpg", "*", "../*"):
        count = 2 if path.startswith("..") else 1
        for _ in range(2):
            status, lines, told = here(capsys, monkeypatch, model, path, regions="../a/seen")
            assert status == 0 and len(lines) == 1 + count, (path, lines)
    status, lines, _ = here(capsys, monkeypatch, model, "seen")               # unless that is what is asked
    assert len(lines) > 1


def test_pictures_of_the_same_name_have_drawings_of_their_own(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "below").mkdir()
    for size, place in (((70, 60), tmp_path), ((50, 90), tmp_path / "below")):
        Image.new("RGB", size).save(place / "x.jpg")
    monkeypatch.chdir(tmp_path / "below")
    assert here(capsys, monkeypatch, model, "x.jpg", "../x.jpg", regions="seen")[0] == 0
    assert sorted(tmp_path.glob("below/seen/**/*.jpg")) == sorted(
        [tmp_path / "below/seen/x.jpg", tmp_path / "below/seen" / (tmp_path / "x.jpg").relative_to("/")]
    )
    other = (tmp_path / "x.jpg").relative_to("/")
    assert Image.open("seen/x.jpg").size != Image.open(Path("seen") / other).size        # of another picture


def test_a_pattern_that_matches_folders(model, birds, capsys, monkeypatch):
    "Quoted, so that no shell has expanded it: the pictures below, each once."
    files = sorted(map(str, birds.rglob("*.jpg")))
    for pattern in ("*", "**", "**/*"):
        status, lines, told = here(capsys, monkeypatch, model, f"{birds}/{pattern}", format="jsonl")
        assert status == 0 and sorted(json.loads(line)["file"] for line in lines) == files


def test_bad_arguments(model, birds, tmp_path, capsys, monkeypatch):
    def message(*paths, **kwargs):
        status, _, told = here(capsys, monkeypatch, *paths, **kwargs)
        assert status == 1
        return told
    assert "no model folder" in message(tmp_path / "gone", birds)
    assert "no config.json in" in message(tmp_path, birds)
    assert "format='xml'" in message(model, birds, format="xml")
    assert "bs=0" in message(model, birds, bs=0)
    assert "workers=0" in message(model, birds, workers=0)
    assert "rank=2 of world=2" in message(model, birds, rank=2, world=2)
    assert "device='gpu' cannot be used here; use 'cpu'" in message(model, birds, device="gpu")
    assert "might be overwritten; give a new folder" in message(model, birds, regions="/")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in message(model, birds, out=str(tmp_path / "file" / "rows.csv"))
    assert "no pictures were given" in message(model, "-")


def test_reader_that_goes_away(model, birds):
    args = [*starter("fd_focus_predict"), str(model), *[str(birds)] * 60, "--device", "cpu", "--bs", "4"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline().startswith("file,label")
        run.stdout.close()
        assert "Traceback" not in run.stderr.read() and run.wait() == 1


@pytest.mark.slow
def test_ten_thousand_pictures_in_constant_memory(model, birds):
    "Peak memory after 10,000 pictures is that after 1,000, to a few MB, also with kept memory, as the command runs."
    code = (
        "import resource, sys, io; from pathlib import Path\n"
        "from fd_focus.use.predict import *; from fd_focus.use.files import *\n"
        "from fd_focus.training.machine import keep_memory\n"
        "keep_memory(); c = FocusClassifier.load(sys.argv[1], 'cpu')\n"
        "files = sorted(map(str, Path(sys.argv[2]).rglob('*.jpg'))); peak = {}\n"
        "class Sink(io.StringIO):\n    def write(self, text): pass\n"
        "for n in (1000, 10000):\n"
        "    assert predict_files(c, (files[i % 30] for i in range(n)), Rows(Sink(), 'csv', 3, 4)).answered == n\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code, model, birds], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, last = map(int, run.stdout.split())
    assert last - first < 40, (first, last)                                  # MB


def test_out_never_overwrites_what_is_to_be_read(model, birds, tmp_path):
    "A picture, or the list on the standard input."
    picture = shutil.copy(sorted(birds.rglob("*.jpg"))[0], tmp_path / "x.jpg")
    listed, before = tmp_path / "list.txt", picture.read_bytes()
    listed.write_text(f"{picture}\n")
    run = lambda *words, **kwargs: subprocess.run(
        [Path(sys.executable).parent / "fd_focus_predict", str(model), *map(str, words)],
        capture_output=True,
        text=True,
        **kwargs,
    )
    with open(listed) as stream: found = run("-", "--out", listed, stdin=stream)
    assert (
        found.returncode == 1
        and f"--out {listed} would overwrite what is to be read" in found.stderr
        and listed.read_text() == f"{picture}\n"
    )
    with pytest.raises(SystemExit) as end: fd_focus_predict(str(model), [str(picture)], out=str(picture))
    assert "ends like a picture" in end.value.code and picture.read_bytes() == before


def test_regions_never_overwrite_other_pictures(model, birds, tmp_path, monkeypatch):
    "Not those in the folder, and not each other: a.bmp and a.bmp.png would both become a.bmp.png."
    monkeypatch.chdir(tmp_path)
    first, second = (Image.open(file).convert("RGB") for file in sorted(birds.rglob("*.jpg"))[:2])
    for name in ("mine", "x"): Path(name).mkdir()
    first.save("mine/a.jpg"); first.save("a.bmp"); second.save("a.bmp.png")
    classifier, before = FocusClassifier.load(model, "cpu"), Path("mine/a.jpg").read_bytes()
    rows = lambda: Rows(io.StringIO(), "csv", 3, 4)
    with pytest.raises(ValueError, match="mine holds what is no drawing of an earlier run, such as mine/a.jpg"):
        predict_files(classifier, ["a.bmp"], rows(), Path("mine"))
    assert Path("mine/a.jpg").read_bytes() == before
    for _ in range(2):
        tally = predict_files(classifier, ["a.bmp", "a.bmp.png"], rows(), Path("seen"))    # again: over its drawings
        assert (tally.pictures, tally.failed) == (2, 0)
    assert sorted(file.name for file in Path("seen").glob("*.png")) == ["a.bmp.2.png", "a.bmp.png"]


@pytest.mark.parametrize("kind,value", [(1, b"\6\0\0\0"), (2, b"6\0\0\0"), (7, b"\6\0\0\0"), (3, b"\x09\0\0\0")])
def test_an_orientation_that_is_none_costs_nothing(model, tmp_path, kind, value):
    "Of another type than the standard says, or beyond its eight: the picture is read as it lies, and so is its size."
    entry = struct.pack("<HHI4s", 0x112, kind, 1, value)
    Image.new("RGB", (120, 80)).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0" * 8)
    assert FocusClassifier.load(model, "cpu").predict(tmp_path / "x.jpg").size == (80, 120)


def test_a_turned_tiff_has_the_size_of_what_is_shown(model, birds, tmp_path):
    "Pillow turns the size of a TIFF itself, but not that of other formats."
    classifier, image, exif = (
        FocusClassifier.load(model, "cpu"),
        Image.open(sorted(birds.rglob("*.jpg"))[0]).convert("RGB").resize((150, 60)),
        Image.Exif(),
    )
    exif[0x0112] = 6
    found = []
    for name in ("x.tif", "x.png", "x.jpg"):
        image.save(tmp_path / name, exif=exif)
        found.append(classifier.predict(tmp_path / name))
        assert found[-1].size == (150, 60)
    assert torch.allclose(found[0].boxes, found[1].boxes)


def test_pictures_behind_links_are_found_and_closed_folders_named(birds, tmp_path):
    "A link to a folder, one in a circle, and a folder that cannot be read."
    (tmp_path / "in").mkdir(); (tmp_path / "away").mkdir()
    for place in ("in", "away"): shutil.copy(sorted(birds.rglob("*.jpg"))[0], tmp_path / place / "x.jpg")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "away")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    found = list(find_pictures([str(tmp_path / "in")]))
    assert found == [str(tmp_path / "in" / "x.jpg"), str(tmp_path / "in" / "linked" / "x.jpg")]
    if os.geteuid() == 0: return           # whom no folder is closed to
    (tmp_path / "away").chmod(0)
    assert str(tmp_path / "in" / "linked") in list(find_pictures([str(tmp_path / "in")]))
    (tmp_path / "away").chmod(0o755)


def test_what_is_left_out_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("fd_focus.use.files.FORMATS", ["JPEG", "PNG"])
    monkeypatch.setattr("fd_focus.data.pictures.FORMATS", ["JPEG", "PNG"])
    for name in ("a.png", "b.jpg_large", "c"): Image.new("RGB", (40, 40)).save(tmp_path / name, "PNG")
    for name in ("d.heic", "e.HEIC", "f.txt", "g", ".hidden"): (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.warns(DataWarning) as told: found = list(find_pictures([str(tmp_path)]))
    assert [Path(name).name for name in found] == ["a.png", "b.jpg_large", "c"]
    assert len(told) == 1 and str(told[0].message) == (
        "left out, for they are no pictures that can be read: 2 .heic, 1 .txt, 1 without an ending "
        "(pip install 'fd_focus[heic]' reads HEIC)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(find_pictures([str(tmp_path / "*.png"), str(tmp_path / "d.heic")]))      # named ones get rows


def test_a_drawing_is_whole_or_not_there(birds, model, tmp_path, monkeypatch):
    from fd_focus.use.files import _draw
    file = str(sorted(birds.rglob("*.jpg"))[0])
    def full(number): raise OSError(28, "No space left on device")
    found = FocusClassifier.load(model, "cpu").predict(file)
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"): _draw(file, found, tmp_path / "seen", set())
    assert not [place for place in (tmp_path / "seen").rglob("*") if place.is_file()]
    assert _draw(file, found, tmp_path / "seen", set()) is None
    assert [place.suffix for place in (tmp_path / "seen").rglob("*") if place.is_file()] == [".jpg"]


def test_a_jpeg_beyond_pillows_limit_is_answered_and_an_app_may_ask_for_less(model, tmp_path, monkeypatch):
    Image.effect_noise((1200, 900), 40).convert("RGB").save(tmp_path / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    found = FocusClassifier.load(model, "cpu").predict(tmp_path / "x.jpg")
    assert found.size == (900, 1200) and draw_prediction(tmp_path / "x.jpg", found, longest=400).size == (400, 300)
    for source in (tmp_path / "x.jpg", (tmp_path / "x.jpg").read_bytes()):
        assert open_any(source, 200, max_pixels=100_000)[1] == (900, 1200)
        with pytest.raises(ValueError, match="1200x900 pixels are more than"): open_any(source, 200, max_pixels=50_000)


@pytest.mark.parametrize("squash", [True, False, "pad"])
def test_a_picture_one_pixel_wide_is_not_black(squash):
    for size in ((1, 500), (500, 1), (1, 1), (3, 700)):
        for side in (64, 98, 103, 206):         # 1 / 98 * 98 is a little less than 1
            seen, view = prepare(Image.new("RGB", size, (200, 100, 50)), (side, side), (side - 8, side - 8), squash)
            pixels = np.asarray(seen)
            there = pixels.max((0, 1)) if squash == "pad" else pixels.min((0, 1))        # on black, or nothing but it
            assert seen.size == (side - 8, side - 8) and there.tolist() == [200, 100, 50]
            assert (view[2:] > view[:2]).all()


def test_a_region_in_the_border_is_drawn_at_the_edge(model):
    "Of a long padded picture most regions lie in the border: boxes stay in the picture, and it can be drawn."
    classifier = FocusClassifier.load(model, "cpu")
    classifier.squash = "pad"
    for size in ((2000, 100), (30, 900), (1, 400)):
        found = classifier.predict(picture := Image.new("RGB", size, (90, 120, 60)))
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor(size).repeat(2)).all()
        assert (found.boxes[:, 2:] - found.boxes[:, :2] > 0).all() and len(found.boxes) == 4
        drawn = draw_prediction(picture, found)
        assert drawn.size == size and len(cut_zooms(picture, found)) == 4 and draw_heat(picture, found).size == size


def test_a_pipeline_is_made_while_others_use_the_network(monkeypatch):
    "What it shows is found out by a copy: the network itself answers as ever meanwhile."
    net = FocusNet.from_arch("toy_resnet", 3, pretrained=False, cut="layer2", image_size=64, m=2, l=2).eval()
    net.stats, seen, x = IMAGENET_STATS, [], torch.rand(1, 3, 64, 64)
    with torch.no_grad(): before = net(x)
    look = FocusNet.look
    def watched(self, images):
        if self is not net: seen.append(net(x))
        return look(self, images)
    monkeypatch.setattr(FocusNet, "look", watched)
    FocusPipeline(net)
    assert len(seen) == 1 and torch.equal(seen[0], before)
