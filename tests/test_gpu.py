"What a GPU must do as a CPU does, and what only a GPU does: `pytest --gpu tests/test_gpu.py`, or `make test-gpu`."
import json
import subprocess
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

from conftest import two_classes
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.evidence.localisation import localisation
from fd_focus.focus import FocusNet
from fd_focus.methods import METHODS, bare
from fd_focus.training.learner import focus_learner
from fd_focus.training.run import make_learner, train
from fd_focus.training.settings import Settings
from fd_focus.training.speed import HalfPrecision, peak_memory, speed_up
from fd_focus.use.model_folder import save_focus
from fd_focus.use.predict import FocusClassifier

pytestmark = pytest.mark.gpu
TINY = dict(arch="toy_resnet", image_size=64, epochs=2, bs=8, n_classes=4, images_per_class=10, valid_per_class=5)


@pytest.fixture(autouse=True)
def a_gpu():
    if not torch.cuda.is_available(): pytest.skip("PyTorch sees no GPU")


def birds(**kwargs):
    sizes = dict(images_per_class=8, valid_per_class=3, n_classes=4, image_size=64, bs=8)
    return FocusDataLoaders.from_toy(**sizes | kwargs)


def fit(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 4e-3, **kwargs)
    return learn


def weights(learn): return torch.cat([p.detach().flatten().cpu() for p in bare(learn.model).parameters()])


@contextmanager
def waits():
    "Texts of PyTorch's warnings of synchronisation while it is open; its announcement of itself is none."
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try: yield found
        finally: torch.cuda.set_sync_debug_mode("default")
    texts = [str(w.message) for w in caught]
    found += [text for text in texts if "synchroniz" in text.lower() and "debug mode is a prototype" not in text]


def test_training_waits_once_an_epoch():
    "Synchronisations from the first callback of a batch to the last; the loader's copy lies between."
    found = []
    class Begin(Callback):
        order = -1000
        def before_batch(self):
            if not self.training: return
            self.open = waits()
            self.now = self.open.__enter__()
    class End(Callback):
        order = 1000
        def after_batch(self):
            if not self.training: return
            self.learn.begin.open.__exit__(None, None, None)
            found.append(self.learn.begin.now)
    fit(speed_up(focus_learner(birds(), "toy_resnet", pretrained=False, cbs=[Begin(), End()])), 2)
    assert len(found) == 8 and sum(found, []) == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_is_used(name, tmp_path):
    "In bfloat16 by itself; the answers of its folder in float32 are a CPU's."
    set_seed(0)
    learn = fit(speed_up(focus_learner(birds(), "toy_resnet", name, pretrained=False)))
    assert any(isinstance(cb, HalfPrecision) for cb in learn.cbs) and weights(learn).isfinite().all()
    probabilities, targets = learn.get_preds()
    assert probabilities.isfinite().all() and len(probabilities) == 12
    pictures, look = learn.see(learn.dls.valid.one_batch()[0])
    assert look.answer.device.type == pictures.device.type == "cpu"
    save_focus(learn, tmp_path)
    photo = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    said = {amp: FocusClassifier.load(tmp_path, device, amp=amp).predict(photo).probabilities.cpu()
            for device, amp in (("cpu", "fp32"), ("cuda", "bf16"))}
    exact = FocusClassifier.load(tmp_path, "cuda", amp="fp32").predict(photo).probabilities.cpu()
    torch.testing.assert_close(exact, said["fp32"], atol=5e-3, rtol=0)       # convolutions round to TF32
    torch.testing.assert_close(said["bf16"], said["fp32"], atol=.1, rtol=0)


@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
def test_the_same_numbers_again(amp):
    ends = [weights(train(Settings(**TINY, amp=amp, deterministic=True), bar=False)[0]) for _ in range(2)]
    assert ends[0].isfinite().all() and ends[0].equal(ends[1])


class Kill(Callback):
    order = 90
    def after_batch(self):
        if self.training and self.epoch == 1: raise KeyboardInterrupt


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    settings = Settings(**TINY, deterministic=True)
    whole = weights(train(settings, bar=False, out=tmp_path / "whole")[0])
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("fd_focus.training.run._callbacks", lambda *_: [Kill()])
        train(settings, bar=False, out=tmp_path / "broken")
    assert weights(train(settings, bar=False, out=tmp_path / "broken", resume=True)[0]).equal(whole)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_learns_the_same(mode):
    losses = {}
    for compiled in (None, mode):
        learn = make_learner(Settings(**TINY, amp="fp32", deterministic=True, compile=compiled))
        losses[compiled] = torch.stack(fit(learn, 2).recorder.losses).cpu()
    torch.testing.assert_close(losses[mode], losses[None], atol=.1, rtol=0)      # regions soon differ


def test_one_wait_tells_who_looks_again():
    net = FocusNet.from_arch("toy_resnet", 4, pretrained=False, image_size=64, answer="adaptive").cuda().eval()
    x = torch.rand(8, 3, 64, 64, device="cuda")
    with torch.no_grad():
        net.look_again_below = float(net.look(x).heads["image"].softmax(1).amax(1).median())
        with waits() as found: look = net.look(x)
    assert 0 < look.looked_again.sum() < 8 and len(found) == 1, found


def test_workers_started_after_the_gpu(tmp_path):
    "They are forked from a process that uses CUDA, and must not touch it."
    torch.zeros(1, device="cuda")
    dls = FocusDataLoaders.from_folder(two_classes(tmp_path), .25, image_size=64, bs=4, num_workers=2, cache="ram")
    learn = fit(speed_up(focus_learner(dls, "toy_resnet", pretrained=False)), 3)
    assert dls.one_batch()[0].is_cuda and weights(learn).isfinite().all()


def test_checkpointing_saves_memory():
    def step(checkpointing):
        learn = speed_up(focus_learner(birds(bs=32), "resnet18", pretrained=False), checkpointing=checkpointing)
        return peak_memory(lambda: fit(learn), "cuda")
    assert step(True) < .8 * step(False)


def test_a_search_for_a_rate_and_regions_measured():
    learn = speed_up(focus_learner(birds(), "toy_resnet", pretrained=False))
    with learn.no_bar(): assert learn.lr_find(num_it=12, show_plot=False).valley > 0
    assert localisation(fit(learn)).value.notna().any()
    assert learn.tta(n=2)[0].isfinite().all()


def command(name, *args, cwd):
    script = cwd / f"{name}.py"
    script.write_text(f"from fd_focus.use.cli import {name}\n{name}()\n")
    call = [sys.executable, "-W", "ignore", script, *map(str, args)]
    done = subprocess.run(call, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_from_training_to_answers(tmp_path):
    pictures = two_classes(tmp_path / "pictures")
    command("fd_focus_train", "--data", pictures, "--arch", "toy_resnet", "--image_size", 64, "--epochs", 2, "--bs", 4,
            "--valid_pct", .25, "--preset", "photos", "--out", tmp_path / "run", cwd=tmp_path)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["device"] == "cuda" and (tmp_path / "run/regions.png").stat().st_size
    said = command("fd_focus_predict", tmp_path / "run/model", pictures, "--regions", tmp_path / "drawn", cwd=tmp_path)
    assert said.count(".jpg") >= 16 and len(list((tmp_path / "drawn").rglob("*.*"))) >= 16
    command("fd_focus_evaluate", tmp_path / "run/model", pictures, cwd=tmp_path)


def test_quick_bench(tmp_path):
    command("fd_focus_bench", "--quick", "--device", "cuda", "--out", tmp_path / "b.json", cwd=tmp_path)
    assert json.loads((tmp_path / "b.json").read_text())["machine"]["gpu"]
