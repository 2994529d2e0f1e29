"A frozen body's head: against scikit-learn, one pass whatever is asked, resumed, shared, and what is bad input."
import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from fd_focus.bodies import toy_resnet
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning
from fd_focus.methods import bare
from fd_focus.rivals.probe import (STRENGTHS, NearestNet, ProbeNet, as_for_validation, class_means, fit_linear,
                                   neighbours_vote, untrained)
from fd_focus.training.checkpoint import read_checkpoint
from fd_focus.training.learner import focus_learner, history
from fd_focus.training.run import train
from fd_focus.training.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:the body has random weights")
SMALL = dict(data="toy", arch="toy_resnet", cut="layer2", image_size=48, n_classes=3, images_per_class=6, bs=4,
             valid_per_class=3)


def learner(method, seed=0, bs=6, **options):
    set_seed(seed, reproducible=True)
    dls = FocusDataLoaders.from_toy(6, 3, n_classes=3, image_size=48, mark_size=2., bs=bs)
    return focus_learner(dls, "toy_resnet", method, pretrained=False, cut="layer2", **options)


def fit(learn, epochs=1, *cbs, how="fit_one_cycle", **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(epochs, cbs=list(cbs), **kwargs)
    return learn


def blobs(n=40, features=6, classes=4, seed=0):
    chance = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.randn(n, features, generator=chance) + 2 * F.one_hot(labels, features), labels


def same(a, b): return all(part.equal(b.state_dict()[name]) for name, part in a.state_dict().items())


@pytest.mark.parametrize("classes", [2, 4])
def test_the_head_is_scikit_learns(classes):
    features, labels = blobs(classes=classes)
    features = features * torch.tensor([1., 10, .1, 5, 1, 0]) + 3          # of all sizes; the last one never changes
    weight, bias, strength = fit_linear(features, labels)
    assert weight.shape == (classes, 6) and bias.shape == (classes,) and strength in STRENGTHS
    scaled = (features - features.mean(0)) / features.std(0, correction=0).clamp_min(1e-6)
    theirs = LogisticRegression(C=strength, max_iter=1000).fit(scaled.numpy(), labels.numpy())
    probabilities = (features @ weight.T + bias).softmax(1)
    torch.testing.assert_close(probabilities.double(), torch.tensor(theirs.predict_proba(scaled.numpy())).double(),
                               atol=2e-3, rtol=0)


def test_the_strength_follows_the_noise():
    "Features that say nothing are trusted least, features that say it all are trusted more."
    features, labels = blobs(60)
    noise = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    assert fit_linear(noise, labels)[2] < fit_linear(features, labels)[2]


def test_a_rare_class_makes_fewer_folds():
    features, labels = blobs(21)
    labels[:] = torch.tensor([0] * 10 + [1] * 9 + [2] * 2)
    assert fit_linear(features, labels)[0].shape == (3, 6)
    labels[-1] = 0
    with pytest.raises(ValueError, match="class number 2 has 1 training picture"): fit_linear(features, labels)
    labels[-2:] = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="class number 2 has 0 training picture"): fit_linear(features, labels)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 15), st.floats(.02, 5), st.integers(0, 10 ** 6))
def test_the_vote_is_scikit_learns(n, k, temperature, seed):
    features, labels = blobs(n, classes=3, seed=seed)
    new, _ = blobs(4, classes=2, seed=seed + 1)
    votes = neighbours_vote(new, F.normalize(features), labels, 3, k, temperature)
    assert votes.shape == (4, 3) and votes.dtype == torch.float32
    torch.testing.assert_close(votes.sum(1), torch.ones(4), atol=1e-5, rtol=0)
    weigh = lambda distance: np.exp((1 - distance) / temperature)
    theirs = KNeighborsClassifier(min(k, n), metric="cosine", weights=weigh).fit(features, labels)
    torch.testing.assert_close(votes[:, theirs.classes_].double(), torch.tensor(theirs.predict_proba(new)).double(),
                               atol=1e-4, rtol=0)


def test_a_vote_is_whole_in_half_precision():
    features, labels = blobs()
    whole = neighbours_vote(features, F.normalize(features), labels, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert neighbours_vote(features, F.normalize(features), labels, 4).equal(whole)


def test_an_empty_memory_says_nothing():
    net = NearestNet(toy_resnet((8, 16)), 3, image_size=48).eval()
    with torch.no_grad(): said = net(torch.randn(2, 3, 48, 48)).softmax(1)
    torch.testing.assert_close(said, torch.full((2, 3), 1 / 3))


def test_class_means_ignore_the_lengths_of_classes():
    features, labels = blobs()
    means = class_means(F.normalize(features), labels, 4)
    torch.testing.assert_close(means.sum(0), torch.zeros(6), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="class number 4 has no training picture"): class_means(features, labels, 5)


@pytest.mark.parametrize("method", ["probe", "knn"])
def test_one_pass_whatever_is_asked(method):
    learn = learner(method)
    before = copy.deepcopy(learn.model.body.state_dict())
    fit(learn, 7)
    table = history(learn)
    assert len(table) == 1 and table.notna().all(axis=None) and not learn.model.body.training
    assert all(part.equal(before[name]) for name, part in learn.model.body.state_dict().items())
    assert same(fit(learner(method), 2, how="fit_paper").model.image_head, learn.model.image_head)
    for name, part in fit(learner(method, bs=4)).model.state_dict().items():
        torch.testing.assert_close(part, learn.model.state_dict()[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["probe", "knn"])
def test_the_training_loss_is_of_the_head(method):
    learn = fit(learner(method))
    net, loader = learn.model.eval(), as_for_validation(learn.dls)
    plain = lambda batch: [part.as_subclass(torch.Tensor) for part in batch]
    with torch.no_grad():
        losses = torch.cat([F.cross_entropy(net(x), y, reduction="none") for x, y in map(plain, loader)])
    assert len(losses) == 18 and abs(losses.mean() - history(learn).train_loss[0]) < 1e-4


def test_the_pass_takes_pictures_as_validation_does(tmp_path):
    "Whole, in order, the last batch too, from a folder with random crops and flips."
    from conftest import two_classes
    dls = FocusDataLoaders.from_folder(two_classes(tmp_path), valid_pct=.25, image_size=32, bs=5, crop_scale=.2,
                                       num_workers=0, balance=True)
    first, second = (torch.cat([x for x, _ in as_for_validation(dls)]) for _ in range(2))
    assert len(first) == len(dls.train_ds) and first.equal(second)
    items = list(dls.train_ds.items)
    assert first.equal(torch.cat([x for x, *_ in dls.test_dl(items)]))


def test_others_datasets():
    "fastai's loaders of PyTorch datasets know no items."
    from fastai.data.core import DataLoaders
    x, y = torch.randn(12, 3, 48, 48), torch.arange(12) % 3
    loader = lambda shuffle: torch.utils.data.TensorDataset(x, y)
    dls = DataLoaders.from_dsets(loader(True), loader(False), bs=4, num_workers=0)
    dls.c, dls.vocab = 3, list("abc")
    learn = focus_learner(dls, toy_resnet((8, 16)), "knn", image_size=48)
    fit(learn)
    assert learn.model.remembered == 12 and learn.model.labels.tolist() == y.tolist()


@pytest.mark.parametrize("kwargs", [dict(ema=.9), dict(mixup=.4)])
def test_what_needs_steps_is_refused(kwargs):
    with pytest.raises(ValueError, match="a frozen body takes no steps"):
        fit(learner("probe"), 1, how="fit_modern", **kwargs)


def test_a_random_body_is_told():
    with pytest.warns(DataWarning, match="the body has random weights"): fit(learner("probe"))
    body = toy_resnet((8, 16))
    assert untrained(body)
    body.bn1.bias.data.fill_(.1)
    assert not untrained(body) and not untrained(torch.nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize("cls, wrong, told", [
    (ProbeNet, dict(folds=1), "folds=1; use at least 2"), (NearestNet, dict(k=0), "k=0; use at least 1"),
    (NearestNet, dict(temperature=0), "temperature=0; use a number above 0"),
    (NearestNet, dict(remembered=-1), "remembered=-1; leave it to the learner")])
def test_bad_options(cls, wrong, told):
    with pytest.raises(ValueError, match=told): cls(toy_resnet((8, 16)), 3, image_size=48, **wrong)


def test_a_search_for_a_rate_leaves_it_alone():
    learn = fit(learner("probe"))
    head = copy.deepcopy(learn.model.image_head)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert same(learn.model.image_head, head)
    assert learn.get_preds()[0].shape == (9, 3)


class Stop(Callback):
    "Ctrl-C in the middle of the pass, or once the head is there."
    order = 90
    def __init__(self, when): self.when = when
    def after_batch(self):
        if self.when == "pass" and self.training and self.iter == 2: raise KeyboardInterrupt
    def after_validate(self):
        if self.when == "validation": raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["probe", "knn"])
@pytest.mark.parametrize("when", ["pass", "validation"])
def test_a_killed_run_goes_on(method, when, tmp_path, monkeypatch):
    "With several epochs in its settings, of which it needs one."
    whole = Settings(method=method, epochs=3, valid_every=0, **SMALL)
    expected, table, _ = train(whole, bar=False)
    from fd_focus.training import run
    monkeypatch.setattr(run, "_callbacks", lambda s, out: [Stop(when)])
    with pytest.raises(KeyboardInterrupt): train(whole, bar=False, out=tmp_path)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 0
    learn, again, summary = train(whole, bar=False, out=tmp_path, resume=True)
    assert same(learn.model, expected.model) and again.equals(table) and summary["epochs_trained"] == 1
    finished, once_more, _ = train(whole, bar=False, out=tmp_path, resume=True)     # nothing is left to do
    assert same(finished.model, expected.model) and once_more.equals(table)


@pytest.mark.parametrize("options", [dict(amp="bf16"), dict(accumulate=2), dict(checkpointing=True)])
def test_with_options_of_the_machine(options):
    plain = train(Settings(method="probe", epochs=1, **SMALL), bar=False)[0].model
    learn, table, _ = train(Settings(method="probe", epochs=1, **SMALL, **options), bar=False)
    x = next(iter(learn.dls.valid))[0]
    with torch.no_grad(): said, expected = learn.model.eval()(x).softmax(1), plain.eval()(x).softmax(1)
    assert table.notna().all(axis=None)
    torch.testing.assert_close(said, expected, atol=.1 if "amp" in options else 1e-5, rtol=0)


def together(method, rank, port, out):
    "One of two processes with 18 pictures in batches of 4: nine each, and of 7 one takes a fourth that fills up."
    from fd_focus.training.distributed import sharing
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    learn = learner(method, bs=4)
    with sharing(learn): fit(learn)
    torch.save(dict(model=bare(learn.model).state_dict(), table=history(learn).iloc[-1].to_dict()),
               Path(out) / f"{rank}.pt")


@pytest.mark.parametrize("method", ["probe", "knn"])
def test_two_processes_share_the_pass(method, two_processes, tmp_path):
    two_processes(together, method, tmp_path)
    alone = fit(learner(method, bs=4)).model.state_dict()
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=False)["model"]
        for name, part in alone.items(): torch.testing.assert_close(shared[name], part, atol=1e-4, rtol=1e-3)
