"Training with fastai's own tools around it: what breaks off, what schedules, what logs, what is exported."
import contextlib
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed

from fd_focus.training.checkpoint import KeepBest
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.training.learner import AverageWeights, ImageFirst, focus_learner, history
from fd_focus.loss import FocusLoss
from fd_focus.model import toy_resnet
from fd_focus.training.run import Settings, train
from fd_focus.training.speed import BFloat16, CheckpointBody, CompileBody, FusedSGD, speed_up

SMALL = Settings(arch="toy_resnet", image_size=48, epochs=2, bs=8, n_classes=3, images_per_class=8, valid_per_class=3)


@pytest.fixture
def dls(): return FocusDataLoaders.from_toy(8, 2, n_classes=3, image_size=48, bs=4)


def fit(learn, epochs=1, how="fit", **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(epochs, 1e-3, **kwargs)
    return learn


class Stop(Callback):
    "Ctrl-C in the first batch of training, or of validation."
    order = 90
    def __init__(self, training=True): self.at = training
    def after_batch(self):
        if self.training == self.at: raise KeyboardInterrupt


def test_auto_is_the_precision_of_the_device_that_will_train(dls, monkeypatch):
    "A learner's network lies on the CPU until fastai moves it, in `before_fit`."
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **kwargs: True)
    kinds = lambda learn: {type(cb) for cb in learn.cbs}
    assert BFloat16 not in kinds(speed_up(focus_learner(dls, "toy_resnet", pretrained=False)))
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    monkeypatch.setattr(learn.dls, "_device", torch.device("cuda"))
    assert BFloat16 in kinds(speed_up(learn))


def test_a_search_for_a_rate_leaves_averaged_weights_alone(dls, tmp_path):
    learn = focus_learner(dls, "toy_resnet", pretrained=False, cbs=[AverageWeights()], path=tmp_path)
    before = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    with learn.no_bar(): learn.lr_find(num_it=20, show_plot=False, suggest_funcs=())
    assert all(tensor.equal(before[name]) for name, tensor in learn.model.state_dict().items())
    fit(learn)
    assert learn.average_weights.steps and learn.average_weights.swapped       # it works in the fit after that


@pytest.mark.parametrize("settings", [{}, dict(mom=.9), dict(mom=.9, decouple_wd=False)])
@pytest.mark.parametrize("how,cbs", [("fit", []), ("fit_one_cycle", []), ("fit", [ImageFirst(1)])])
def test_fused_sgd_is_sgd(dls, settings, how, cbs):
    "Also where a schedule moves the momentum, and where heads begin to learn later than the body."
    ends = []
    for opt_func in (SGD, FusedSGD):
        set_seed(0, reproducible=True)
        dls.train.rng.seed(0)
        learn = fit(focus_learner(dls, "toy_resnet", pretrained=False, opt_func=partial(opt_func, **settings)), 2, how, cbs=cbs)
        ends.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tracker", [lambda: KeepBest("image_accuracy"), lambda: SaveModelCallback(monitor="ensemble_accuracy")])
def test_trackers_wait_for_heads_that_do_not_learn_yet(dls, tmp_path, tracker):
    learn = fit(focus_learner(dls, "toy_resnet", pretrained=False, path=tmp_path), 2, cbs=[ImageFirst(1), tracker()])
    table = history(learn)
    assert math.isnan(table.image_accuracy[0]) and table.image_accuracy[1] >= 0


@pytest.mark.parametrize("settings", [dict(image_first=1), dict(recipe="modern", mixup=.2)])
def test_figures_that_do_not_exist_yet_can_be_logged(tmp_path, settings):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    _, table, _ = train(replace(SMALL, log="tensorboard", **settings), bar=False, out=tmp_path)
    assert len(table) == 2 and list((tmp_path / "tensorboard").rglob("events*"))


def test_resuming_with_other_settings_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("fd_focus.training.run.stoppable", lambda learn: learn.added_cbs([Stop(training=False)]))
        with pytest.raises(KeyboardInterrupt): train(SMALL, bar=False, out=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint.pt is of a run with other settings: lr=0.01 \(there: 0.004\), sigma=2.0 \(there: 1.0\)"):
        train(replace(SMALL, lr=1e-2, sigma=2.), bar=False, out=tmp_path, resume=True)
    _, table, _ = train(SMALL, bar=False, out=tmp_path, resume=True)
    assert len(table) == 2


def test_a_broken_off_mixup_gives_the_loss_back(dls):
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    with contextlib.suppress(KeyboardInterrupt): fit(learn, cbs=[MixUp(.3), Stop()])
    assert isinstance(learn.loss_func, FocusLoss)
    fit(learn, how="fit_modern", mixup=.3)


def test_a_broken_off_validation_keeps_no_batch(dls):
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    with contextlib.suppress(KeyboardInterrupt): fit(learn, cbs=[Stop(training=False)])
    assert not learn.model.keep_focus and learn.model.last_focus is None


def test_arguments_that_would_do_nothing_are_refused(dls):
    for where in (dict(weights="x.pth"), dict(cut="layer1")):
        with pytest.raises(ValueError, match="weights and cut are for the name of an architecture"): focus_learner(dls, toy_resnet(), **where)
    with pytest.raises(ValueError, match="label_smoothing=0.2 is for the default loss"): focus_learner(dls, "toy_resnet", pretrained=False, loss_func=FocusLoss(), label_smoothing=.2)


class OwnBody(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = toy_resnet()
    def forward(self, x): return self.net(x)


def test_a_body_that_is_no_sequential_is_checkpointed_as_a_whole(dls):
    ends = []
    for checkpointing in (False, True):
        set_seed(0, reproducible=True)
        dls.train.rng.seed(0)
        learn = fit(speed_up(focus_learner(dls, OwnBody()), checkpointing=checkpointing))
        assert "forward" not in vars(learn.model.body)
        ends.append(learn.model.state_dict())
    for name, tensor in ends[0].items(): torch.testing.assert_close(tensor, ends[1][name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [lambda: CompileBody(backend="eager"), CheckpointBody])
def test_a_trained_learner_is_exported(dls, tmp_path, monkeypatch, make):
    monkeypatch.setattr("fd_focus.training.speed._need_compiler", lambda device: None)
    learn = fit(focus_learner(dls, "toy_resnet", pretrained=False, cbs=[make()], path=tmp_path))
    learn.export("x.pkl")
    with contextlib.suppress(Warning): again = load_learner(tmp_path / "x.pkl")
    x = torch.rand(2, 3, 48, 48)
    with torch.no_grad(): assert again.model.eval()(x).equal(learn.model.eval()(x))


def test_a_history_that_is_lost_says_so(dls):
    "Every validation outside a fit empties fastai's Recorder."
    learn = fit(focus_learner(dls, "toy_resnet", pretrained=False), 2)
    assert len(history(learn)) == 2
    with learn.no_bar(), learn.no_logging(): learn.validate()
    with pytest.raises(ValueError, match="has forgotten the fit: take its history before"): history(learn)
