"Recipes beside fastai's own callbacks, and what they leave on the learner."
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.training import run
from fd_focus.training.learner import focus_learner
from fd_focus.training.optimizer import fused_adamw
from fd_focus.training.recipes import AverageWeights, ValidateEvery
from fd_focus.training.run import make_learner
from fd_focus.training.settings import Settings, resolve
from fd_focus.training.watch import EpochParts


@pytest.fixture(scope="module")
def dls(): return FocusDataLoaders.from_toy(8, 2, n_classes=3, image_size=48, bs=4)


def fit(dls, how="fit_modern", cbs=None, options=None, **kwargs):
    learn = focus_learner(dls, "toy_resnet", pretrained=False, **(options or {}))
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(1, cbs=cbs, **kwargs)
    return learn


def test_steps_are_averaged_and_not_batches(dls):
    average = AverageWeights(.9)
    fit(dls, cbs=[GradientAccumulation(2 * dls.train.bs), average])
    assert average.steps == len(dls.train) // 2


def test_weights_that_nobody_judged_are_not_saved(dls):
    with pytest.raises(ValueError, match="use KeepBest"): fit(dls, ema=.9, cbs=SaveModelCallback("accuracy"))


@pytest.mark.parametrize("blend", [MixUp, CutMix])
def test_blended_classes_are_no_true_class(dls, blend):
    with pytest.raises(ValueError, match="attention='single' looks for one true class"):
        fit(dls, cbs=blend(), options=dict(attention="single"))


def test_mixup_trains_every_head(dls):
    torch.manual_seed(0)
    start = {name: p.clone() for name, p in focus_learner(dls, "toy_resnet", pretrained=False).model.named_parameters()}
    torch.manual_seed(0)
    mixed = dict(fit(dls, mixup=.2).model.named_parameters())
    for head in ("image_head", "region_head", "hybrid_head"):
        assert not mixed[f"{head}.weight"].equal(start[f"{head}.weight"])


class Stop(Callback):
    def before_batch(self): raise KeyboardInterrupt


def test_the_papers_optimiser_goes_with_its_fit(dls):
    learn = fit(dls, "fit_paper")
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
        assert learn.opt_func is fused_adamw and isinstance(learn.opt.opt, torch.optim.AdamW) and not learn.wd_bn_bias
        with pytest.raises(KeyboardInterrupt): learn.fit_paper(1, cbs=Stop())
    assert learn.opt_func is fused_adamw and learn.opt is None and not learn.wd_bn_bias


@pytest.mark.parametrize("how,lrs", [("fit_paper", [(1e-3, .01), (1e-3, .01), (1e-4, .001)]),
                                     ("fit_modern", [(1.6e-5, 1.6e-4), (4e-4, 4e-3)])])
def test_every_step_has_the_rate_of_the_recipe(dls, how, lrs):
    "Body and heads; two steps before the end of the paper's rate is a tenth, and modern warms up for a half."
    class Rates(Callback):
        order, rates = 99, []
        def before_step(self): self.rates.append(tuple(h["lr"] for h in self.opt.hypers))
    rates = Rates()
    rates.rates = []
    fit(dls, how, cbs=rates, **(dict(warm=.5) if how == "fit_modern" else {}))
    assert len(rates.rates) == 6
    places = (0, 2, 3) if how == "fit_paper" else (0, 3)
    for place, expected in zip(places, lrs): assert rates.rates[place] == pytest.approx(expected)


@pytest.mark.parametrize("recipe", ["one_cycle", "modern"])
def test_deep_layers_learn_faster(recipe):
    "Each layer at a share of the next one's rate, all through the schedule; after two steps it has moved by less."
    s = resolve(Settings(arch="toy_resnet", arch_kwargs=dict(widths=(8, 16, 32)), image_size=48, epochs=2, bs=8,
                         n_classes=4, images_per_class=4, recipe=recipe, layer_decay=.1, method="plain", wd=0.))
    learn, read = make_learner(s), ReadRates()
    before = [[p.detach().clone() for p in group] for group in learn.opt.param_lists]
    with learn.no_bar(), learn.no_logging(): run._fit(learn, s, [read, StopAfter(2)])
    moved = [max((p.detach() - old).abs().max().item() for p, old in zip(*pair))
             for pair in zip(learn.opt.param_lists, before)]
    assert len(moved) == 5 and all(low < high / 3 for low, high in zip(moved[:3], moved[1:4]))
    np.testing.assert_allclose(np.array(read.rates) / np.array(read.rates)[:, -1:], [[.001, .01, .1, 1, 1]] * 2)


class ReadRates(Callback):
    order = 70           # after the schedule
    def before_fit(self): self.rates = []
    def before_step(self): self.rates.append([h["lr"] for h in self.opt.hypers])


class StopAfter(Callback):
    def __init__(self, steps): self.steps = steps
    def after_batch(self):
        if self.training and self.train_iter == self.steps: raise CancelFitException


def test_a_validation_that_is_left_out_takes_no_time(dls):
    "Else the share of training that went into validation would hold the steps too."
    learn, parts = focus_learner(dls, "toy_resnet", pretrained=False), EpochParts()
    with learn.no_bar(), learn.no_logging(): learn.fit_modern(3, cbs=[ValidateEvery(0), parts])
    for epoch in parts.epochs[:2]:
        assert epoch["validation"] < .05 * epoch["whole"] and epoch["rest"] > -.05 * epoch["whole"]
    assert parts.epochs[2]["validation"] > max(epoch["validation"] for epoch in parts.epochs[:2])
