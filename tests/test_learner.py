"Training with fastai's own tools around it: what breaks off, what schedules, what logs, what is exported."
import contextlib
import multiprocessing
import random
import warnings
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import shaken, two_classes
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.learner import load_learner
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, Normalize, RandomCrop, Resize, aug_transforms,
                               get_image_files, parent_label)
from matplotlib.patches import Rectangle
from PIL import Image

from fd_focus.bodies import create_body, toy_resnet
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning
from fd_focus.loss import FocusLoss
from fd_focus.toy import ToyBirds
from fd_focus.training import watch
from fd_focus.training.learner import FocusInterpretation, HeadAccuracy, focus_learner, history, look_at
from fd_focus.training.recipes import AverageWeights
from fd_focus.training.run import make_learner, train
from fd_focus.training.settings import Settings
from fd_focus.training.optimizer import fused_adamw, fused_sgd
from fd_focus.training.speed import CheckpointBody, CompileStep, HalfPrecision, resolve_amp, speed_up
from fd_focus.training.watch import StopOnNaN

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
    assert HalfPrecision not in kinds(speed_up(focus_learner(dls, "toy_resnet", pretrained=False)))
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    monkeypatch.setattr(learn.dls, "_device", torch.device("cuda"))
    assert HalfPrecision in kinds(speed_up(learn))
    assert speed_up(learn).mixed_precision.amp_mode.value == "bf16"


@pytest.mark.parametrize("capability, kind", [((7, 0), "fp16"), ((6, 1), "fp32")])
def test_a_gpu_without_bfloat16_takes_float16_where_it_has_units_for_it(monkeypatch, capability, kind):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **kwargs: False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert resolve_amp("auto", "cuda") == kind and resolve_amp("fp16", "cuda") == "fp16"
    with pytest.raises(ValueError, match="no bfloat16; use amp='fp16'"): resolve_amp("bf16", "cuda")


def test_a_search_for_a_rate_leaves_averaged_weights_alone(dls, tmp_path):
    learn = focus_learner(dls, "toy_resnet", pretrained=False, cbs=[AverageWeights()], path=tmp_path)
    before = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    with learn.no_bar(): learn.lr_find(num_it=20, show_plot=False, suggest_funcs=())
    assert all(tensor.equal(before[name]) for name, tensor in learn.model.state_dict().items())
    fit(learn)
    assert learn.average_weights.steps and learn.average_weights.swapped       # it works in the fit after that


PAIRS = [(fused_adamw, Adam), (partial(fused_sgd, mom=.9), partial(SGD, mom=.9, decouple_wd=False))]


@pytest.mark.parametrize("opts", PAIRS, ids=["adamw", "sgd"])
@pytest.mark.parametrize("decay_all", [False, True])
def test_pytorchs_optimiser_is_fastais(dls, opts, decay_all):
    "One cycle with two rates, a large decay, a frozen start; norms and biases decay only where they shall."
    ends = []
    for opt_func in opts:
        set_seed(0, reproducible=True)
        dls.train.rng.seed(0)
        learn = focus_learner(dls, "toy_resnet", pretrained=False, opt_func=opt_func, wd=.1, wd_bn_bias=decay_all)
        learn.freeze()
        fit(learn)
        learn.unfreeze()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, slice(1e-4, 1e-3))
        ends.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    torch.testing.assert_close(*ends, atol=1e-4, rtol=0)


def test_figures_that_do_not_exist_can_be_logged(tmp_path):
    "With MixUp, which blends two losses, the terms of the loss are no numbers."
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    _, table, _ = train(replace(SMALL, log="tensorboard", recipe="modern", mixup=.2), bar=False, out=tmp_path)
    assert len(table) == 2 and list((tmp_path / "tensorboard").rglob("events*"))


def test_resuming_with_other_settings_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("fd_focus.training.run.stoppable", lambda learn: learn.added_cbs([Stop(training=False)]))
        with pytest.raises(KeyboardInterrupt): train(SMALL, bar=False, out=tmp_path)
    differs = r"checkpoint.pt is of a run with other settings: sigma=2.0 \(there: None\), lr=0.01 \(there: 0.004\)"
    with pytest.raises(ValueError, match=differs):
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
    assert learn.seen is None


def test_arguments_that_would_do_nothing_are_refused(dls):
    for where in (dict(weights="x.pth"), dict(cut="layer1"), dict(arch_kwargs=dict(widths=(8, 16)))):
        with pytest.raises(ValueError, match="weights, cut and arch_kwargs are for the name of an architecture"):
            focus_learner(dls, toy_resnet(), **where)
    with pytest.raises(ValueError, match="cannot be made with {'pretrained': True}"):
        focus_learner(dls, "toy_resnet", pretrained=False, arch_kwargs=dict(pretrained=True))
    with pytest.raises(ValueError, match="label_smoothing=0.2 is for the default loss"):
        focus_learner(dls, "toy_resnet", pretrained=False, loss_func=FocusLoss(), label_smoothing=.2)


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


@pytest.mark.parametrize("make", [lambda: CompileStep(backend="eager"), CheckpointBody])
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


class Poison(Callback):
    "A weight becomes infinite before one batch of training."
    def __init__(self, epoch, batch): self.at = epoch, batch
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == self.at: self.model.image_head.bias.data[0] = float("inf")


@pytest.mark.parametrize("every", [None, 4, 50])
def test_the_first_broken_batch_is_named(dls, every):
    "Read at once, as on a CPU, some batches later, or at the end of the epoch, as on a GPU."
    learn = focus_learner(dls, "toy_resnet", pretrained=False, cbs=[Poison(1, 1)])
    learn.remove_cb(StopOnNaN).add_cb(StopOnNaN(every))
    with pytest.raises(FloatingPointError, match="became (nan|inf) in epoch 2, batch 2, at learning rate 1.0e-03"):
        fit(learn, 3)


def test_a_broken_loss_ends_the_search_for_a_rate(dls, tmp_path):
    learn = focus_learner(dls, "toy_resnet", pretrained=False, cbs=[Poison(1, 2)], path=tmp_path)
    before = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=30, show_plot=False, suggest_funcs=())
    assert len(learn.recorder.losses) == len(dls.train) + 2             # the broken one is not among them
    assert all(tensor.equal(before[name]) for name, tensor in learn.model.state_dict().items())


def birds(folder):
    drawings = ToyBirds(images_per_class=6, n_classes=3, image_size=64)
    for i in range(len(drawings)):
        picture, label = drawings[i]
        (folder / f"class {label}").mkdir(exist_ok=True)
        picture.save(folder / f"class {label}" / f"{i}.png")
    return folder


def test_the_callers_loaders_stay_as_they_are(tmp_path):
    "Random states, transforms and order; each learner normalises for its own body, and knows loaders that do not."
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      item_tfms=RandomCrop(40))
    dls = block.dataloaders(two_classes(tmp_path), bs=4, num_workers=0)          # fastai's: its size is in a batch
    np.random.seed(0)
    def states():
        return random.getstate(), dls.train.rng.getstate(), np.random.get_state()[1].tolist(), dls.after_batch.fs
    before = states()
    first, second = (focus_learner(dls, body, pretrained=False, cut="layer2") for body in ("toy_resnet", "resnet18"))
    assert states() == before and first.dls.vocab == dls.vocab
    assert first.model.image_size == second.model.image_size == (40, 40)
    for learn in (first, second):
        assert sum(isinstance(t, Normalize) for t in learn.dls.after_batch.fs) == 1
        with learn.no_bar(): found, same = learn.get_preds(), learn.get_preds(dl=dls.test_dl(dls.valid_ds.items))
        assert torch.allclose(found[0], same[0], atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        fit(first); fit(second)


@pytest.mark.parametrize("factor,said", [(torch.inf, "the last step of epoch 1 left weights that are no numbers, at"),
                                         (3e38, "the validation loss became nan after epoch 1, at learning rate")])
def test_a_last_step_that_diverges_is_no_end(dls, factor, said):
    class Leap(Callback):
        def after_step(self):
            if self.iter == self.n_iter - 1: self.model.body[0].weight.data.mul_(factor)
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    with pytest.raises(FloatingPointError, match=said): fit(learn, cbs=[Leap()])


def test_losses_come_over_once(dls, monkeypatch):
    "Those of earlier epochs are not moved again."
    moved, stack = [], torch.stack
    def watched(tensors, *args, **kwargs):
        if len(tensors) and tensors[0].ndim == 0 and tensors[0].is_floating_point(): moved.append(len(tensors))
        return stack(tensors, *args, **kwargs)
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    monkeypatch.setattr("fd_focus.training.learner.torch.stack", watched)
    fit(learn, 3)
    assert moved == [len(dls.train)] * 3 and len(learn.recorder.losses) == 3 * len(dls.train)


def test_a_log_has_lines(dls, capsys):
    "What is no terminal gets the table, and no bar."
    learn = focus_learner(dls, "toy_resnet", pretrained=False, metrics=[])
    learn.fit(2); learn.get_preds(); learn.lr_find(num_it=3, show_plot=False)
    said = capsys.readouterr().out
    assert "\r" not in said
    lines = [line.split() for line in said.splitlines()]
    assert lines[0] == "epoch train loss valid loss accuracy time".split() and len(lines) == 3
    assert [line[0] for line in lines[1:]] == ["1", "2"]


def test_a_long_run_begins_with_a_forecast(dls, capsys, monkeypatch):
    "Once, after a few batches, from what these took; a run of a minute has none."
    told = []
    monkeypatch.setattr(watch, "forecast", lambda *given: told.append(given) or "it takes long")
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    learn.fit(3, 1e-3)
    (batch, batches, epochs, (used, there)), = told
    assert 0 < batch < 5 and (batches, epochs) == (learn.dls.train.n // learn.dls.train.bs, 3) and .1 < used < there
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("it takes long") == 1 and lines.index("it takes long") == 1      # below the heading
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert len(told) == 1


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])       # forkserver: Python 3.14's
def test_the_same_crops_whoever_opens_the_pictures(tmp_path, request, start):
    "With 0, 1 and 2 workers, crops, flips, transforms of the batch and the order are the same; so are the weights."
    before = multiprocessing.get_start_method(allow_none=True)
    request.addfinalizer(lambda: multiprocessing.set_start_method(before, force=True))
    multiprocessing.set_start_method(start, force=True)
    folder, seen = two_classes(tmp_path), []
    for workers in (0, 1, 2):
        set_seed(0, reproducible=True)
        dls = FocusDataLoaders.from_folder(folder, image_size=32, crop_scale=.3, balance=True, bs=4,
                                           batch_tfms=aug_transforms(size=32), num_workers=workers)
        epochs = [x for _ in range(2) for x, _ in dls.train]
        learn = fit(focus_learner(dls, "toy_resnet", pretrained=False, cut="layer2"))
        seen.append([*epochs, *learn.model.state_dict().values(), torch.tensor(learn.recorder.values)])
    for again in seen[1:]: assert all(map(torch.equal, seen[0], again))
    assert not torch.equal(seen[0][0], seen[0][len(dls.train)])


def test_any_image_dataloaders_will_do(tmp_path):
    "Loaders that normalise already are used as they are; a body that was made for other figures gets a warning."
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(64))
    dls = block.dataloaders(birds(tmp_path), bs=6)
    learn = fit(focus_learner(dls, "toy_resnet", pretrained=False))
    assert learn.model.image_size == (64, 64) and np.isfinite(learn.recorder.values[-1][0])
    with learn.no_bar(): assert len(learn.get_preds()[0]) == len(dls.valid_ds)
    dls = learn.dls
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert focus_learner(dls, "toy_resnet", pretrained=False).dls is dls
    with pytest.warns(DataWarning, match="mean .0.485.* but tf_efficientnet_lite0 was made for .0.5"):
        focus_learner(dls, "tf_efficientnet_lite0", pretrained=False, image_size=96, m=2, l=2)
    assert sum(isinstance(t, Normalize) for t in dls.after_batch.fs) == 1


def test_a_body_of_ones_own_is_not_frozen(dls):
    learn = focus_learner(dls, lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8)))
    learn.create_opt()
    assert learn.opt.frozen_idx == 0


def test_titles_say_what_is_right(dls):
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    titles = [ax.title for ax in learn.show_results(max_n=3).axes if ax.get_title()]
    assert len(titles) == 3
    for title in titles:
        true, said = title.get_text().split(" /\n")
        assert title.get_color() == ("green" if true == said else "red")
    with learn.no_bar(): worst = FocusInterpretation.from_learner(learn)
    titles = [ax.get_title() for ax in worst.plot_top_losses(2).axes if ax.get_title()]
    for title, loss in zip(titles, worst.top_losses(2)[0], strict=True): assert f"loss {loss:.2f}" in title
    plain = focus_learner(dls, "toy_resnet", "plain", pretrained=False)
    assert len(plain.show_results(max_n=2).axes) == 4         # pictures, and the class-activation maps below them
    assert plain.see(plain.dls.valid.one_batch())[1].boxes is None
    plt.close("all")


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("squash", [True, False, "pad"])
def test_a_picture_is_drawn_as_wide_as_it_is(tmp_path, monkeypatch, squash, shuffle):
    "Whatever the order: wide pictures are red, high ones blue. What was cropped or padded is a square."
    for i in range(24):
        file = tmp_path / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", [(80, 40), (40, 90)][i % 3 == 0], [(255 - i, 0, 0), (0, 0, 255 - i)][i % 3 == 0]).save(file)
    dls = FocusDataLoaders.from_folder(tmp_path, image_size=48, bs=4, num_workers=0, valid_pct=.4, squash=squash)
    learn, drawn = focus_learner(dls, "toy_resnet", pretrained=False), []
    monkeypatch.setattr("fd_focus.training.learner.plot_focus", lambda x, *args, **options: drawn.append((x, options)))
    own = learn.dls.test_dl(list(learn.dls.valid.items), with_labels=True)
    for ds_idx, dl in ((0, None), (1, None), (1, own)): learn.show_results(ds_idx, dl, shuffle=shuffle)
    assert "get_idxs" not in vars(own)
    with learn.no_bar(): FocusInterpretation.from_learner(learn).plot_top_losses(5)
    assert [len(x) for x, _ in drawn] == [4, 4, 4, 5]
    for x, options in drawn:
        blue = (x[:, 2] > x[:, 0] + .5).any(2).any(1)
        assert options["shapes"] == ([(90, 40) if one else (40, 80) for one in blue] if squash is True else None)


VARIANTS = [dict(attention="single"), dict(hybrid=False), dict(m=0, l=0), dict(answer="ensemble"),
            dict(answer="adaptive"), dict(fusion="mean", crop_norm="separate")]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_trains(dls, options):
    learn = fit(focus_learner(dls, "toy_resnet", pretrained=False, **options))
    assert np.isfinite(learn.recorder.values[-1][0])
    if options.get("hybrid") is False: assert "train_hybrid_loss" not in learn.recorder.metric_names


def test_half_precision_and_back(dls):
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    fit(learn.to_fp16())
    fit(learn.to_fp32())


class Kinds(HeadAccuracy):
    "Notes the type of what the image head has said."
    def accumulate(self, learn): self.found = learn.seen.heads["image"].dtype


def test_metrics_see_the_network_in_its_precision(dls):
    learn = focus_learner(dls, "toy_resnet", pretrained=False, metrics=[kinds := Kinds("image")])
    fit(speed_up(learn, amp="bf16"))
    assert kinds.found == torch.bfloat16 and "precision" not in vars(learn)
    fit(speed_up(learn, amp="fp32"))
    assert kinds.found == torch.float32


@pytest.mark.parametrize("method", ["focus", "plain"])
def test_a_compiled_network_shows_its_heads(dls, method):
    "torch.compile wraps the network; what is looked at is the network itself."
    learn = focus_learner(dls, "toy_resnet", method, pretrained=False)
    learn.model = torch.compile(learn.model, backend="eager")
    table = history(fit(learn))
    assert not table.isna().any(axis=None)


def test_options_that_nobody_knows_are_refused(dls):
    with pytest.raises(TypeError, match="fusoin"): focus_learner(dls, "toy_resnet", pretrained=False, fusoin="mean")
    with pytest.raises(ValueError, match="no pretrained weights"): focus_learner(dls, "toy_resnet")


@pytest.fixture(scope="module")
def choosy():
    "An untrained network with shaken heads, told to look again at half of twelve birds; batches of five."
    torch.manual_seed(0)
    dls = FocusDataLoaders.from_toy(4, 4, n_classes=3, image_size=64, bs=5)
    learn = focus_learner(dls, "toy_resnet", pretrained=False, answer="adaptive")
    net = shaken(learn.model)
    look = look_at(learn, torch.cat([x for x, _ in learn.dls.valid]))
    net.look_again_below = look.heads["image"].softmax(1).amax(1).sort().values[5:7].mean().item()
    return learn


def one_by_one(learn):
    "(N,C) probabilities of the validation pictures, each alone, and (N,) who looked again."
    with torch.no_grad(): looks = [learn.model.eval().look(x[None]).cpu() for xb, _ in learn.dls.valid for x in xb]
    return torch.cat([look.answer.softmax(1) for look in looks]), torch.cat([look.looked_again for look in looks])


def truth(learn): return torch.cat([y for _, y in learn.dls.valid]).as_subclass(torch.Tensor)


def test_a_mixed_batch_is_answered_as_picture_by_picture(choosy):
    want, again = one_by_one(choosy)
    with choosy.no_bar(): found, targets = choosy.get_preds()
    assert again.sum() == 6 and len({tuple(part.tolist()) for part in again.split(5)}) > 1
    assert torch.allclose(found, want, atol=1e-5) and torch.equal(targets.as_subclass(torch.Tensor), truth(choosy))


@pytest.mark.parametrize("limit, answer", [(0, "image"), (2., "ensemble")])
def test_at_its_ends_the_limit_is_a_plain_answer(choosy, monkeypatch, limit, answer):
    monkeypatch.setattr(choosy.model, "look_again_below", limit)
    with choosy.no_bar(): found = choosy.get_preds()[0]
    monkeypatch.setattr(choosy.model, "answer", answer)
    with choosy.no_bar(): assert torch.allclose(found, choosy.get_preds()[0], atol=1e-6)


def test_validation_counts_the_answers(choosy):
    found, _ = one_by_one(choosy)
    right = found.argmax(1) == truth(choosy)
    with choosy.no_bar(): assert choosy.validate()[1] == pytest.approx(right.float().mean().item())


def test_tta_averages_the_answers(choosy):
    "fastai's: the mean over augmented pictures, each of which may ask for a second look, mixed with the plain answer."
    want, _ = one_by_one(choosy)
    with choosy.no_bar():
        set_seed(0)
        (augmented, plain), _ = choosy.tta(n=3, beta=None)
        set_seed(0)
        mixed, _ = choosy.tta(n=3, beta=.25)
    assert torch.allclose(plain, want, atol=1e-5) and not torch.allclose(augmented, want, atol=1e-3)
    assert torch.allclose(augmented.sum(1), torch.ones(12), atol=1e-5)
    assert torch.allclose(mixed, torch.lerp(augmented, plain, .25), atol=1e-5)


def test_interpretation_reads_the_answers(choosy):
    want, _ = one_by_one(choosy)
    losses, targets = -want[range(12), truth(choosy)].log(), truth(choosy)
    with choosy.no_bar(): worst = FocusInterpretation.from_learner(choosy)
    found, rows = worst.top_losses()
    assert torch.allclose(found, losses[rows], atol=1e-4) and torch.equal(found, found.sort(descending=True).values)
    assert worst.confusion_matrix().trace() == (want.argmax(1) == targets).sum()
    figure = worst.plot_top_losses(3)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    for title, row in zip(titles, rows[:3], strict=True): assert f"p {want[row].max():.2f}" in title
    boxes = [patch for ax in figure.axes for patch in ax.patches if isinstance(patch, Rectangle)]
    assert len(boxes) >= 3 * 2                            # also of pictures for which one look was enough
    plt.close("all")


def test_a_gpu_may_choose_its_kernels_unless_asked_not_to(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for wanted in (False, True):
        make_learner(replace(SMALL, deterministic=wanted))
        assert torch.backends.cudnn.deterministic == wanted and torch.backends.cudnn.benchmark != wanted


def test_every_head_is_asked_where_somebody_chooses(tmp_path):
    "Otherwise after the last epoch only; the answer and the image head are judged in every one."
    settings = replace(SMALL, epochs=3, answer="ensemble", m=4, l=2)
    gaps = lambda **more: train(replace(settings, **more), bar=False)[1].region_accuracy.isna().tolist()
    assert gaps() == [True, True, False] and gaps(heads_every=2) == [True, False, False]
    assert gaps(keep_best=True) == gaps(heads_every=1) == [False, False, False]
    table = train(settings, bar=False)[1]
    assert table[["accuracy", "image_accuracy", "ensemble_accuracy"]].notna().all(axis=None)


def test_fewer_regions_are_cropped_in_between(dls, monkeypatch):
    cropped = []
    learn = focus_learner(dls, "toy_resnet", pretrained=False, preset=None, m=6, l=1)
    second = type(learn.model).second_look
    def noted(self, x, boxes):
        if not self.training: cropped.append(boxes.shape[1])
        return second(self, x, boxes)
    monkeypatch.setattr(type(learn.model), "second_look", noted)
    fit(learn, 2)
    n = len(dls.valid)
    assert cropped == [1] * n + [6] * n


def test_a_batch_is_plain_inside_the_network(dls):
    seen = []
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    learn.model.register_forward_pre_hook(lambda net, args: seen.extend(map(type, args)))
    fit(learn)
    with learn.no_bar(): learn.get_preds()
    assert set(seen) == {torch.Tensor}


def test_a_preset_asks_a_transformer_for_a_zoom_it_can_take():
    "Preset photos zooms to 5/7 of the first look, 160 of 224 pixels, which is no multiple of a patch of 14."
    pytest.importorskip("timm")
    dls = FocusDataLoaders.from_toy(4, 2, n_classes=2, image_size=112, bs=4)
    body, _ = create_body("vit_small_patch14_dinov2", pretrained=False, depth=1, embed_dim=48, num_heads=3)
    assert focus_learner(dls, body).model.zoom_size == (84, 84)                       # 80 is asked for
    with pytest.raises(ValueError, match="84x84 would do"): focus_learner(dls, body, zoom_size=80)


def test_no_search_for_the_fastest_convolution_in_validation(dls, monkeypatch):
    "Adaptive answers crop another number of pictures in each batch, and cuDNN would search anew for each."
    class Watch(Callback):
        def before_batch(self): found.append((self.training, torch.backends.cudnn.benchmark))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    learn, found = focus_learner(dls, "toy_resnet", pretrained=False, cbs=[Watch()]), []
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    learn.get_preds()
    assert set(found) == {(True, True), (False, False)} and torch.backends.cudnn.benchmark
