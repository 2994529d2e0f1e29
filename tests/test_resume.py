"A run that is killed, stopped or out of room goes on as if nothing had happened."
import json
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from fastai.callback.core import Callback
from safetensors.torch import load_file

from fd_focus.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fd_focus.training.machine import alone, put, put_bytes
from fd_focus.training.run import make_learner, train
from fd_focus.training.settings import Settings
from fd_focus.use.commands import fd_focus_train
from fd_focus.toy import ToyBirds

TINY = dict(arch="toy_resnet", image_size=48, epochs=4, bs=8, n_classes=4, images_per_class=10)


def test_what_another_optimiser_remembered_is_refused(tmp_path):
    "A checkpoint that names no optimiser has one of fastai's."
    train(Settings(**TINY | dict(epochs=1)), bar=False, out=tmp_path)
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    del state["facts"]["optimizer"]
    write_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match="of another training; optimizer: Optimizer in it, AdamW now"):
        train(Settings(**TINY | dict(epochs=1)), bar=False, out=tmp_path, resume=True)


def work(kwargs, log, tweak, argument):
    "In a process of its own: `fd_focus_train(**kwargs)`, its words in the file `log`."
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    if tweak: tweak(argument)
    fd_focus_train(**kwargs)


def slow_writing(epoch):
    "The checkpoint after `epoch` epochs is never finished: half of it, and then nothing for a long time."
    import io
    import fd_focus.training.checkpoint as module
    save = module.torch.save
    def half(state, stream):
        whole = io.BytesIO()
        save(state, whole)
        if state["epoch"] < epoch: return stream.write(whole.getvalue())
        stream.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        stream.flush()
        time.sleep(600)
    module.torch.save = half


def waiting(epochs):
    "After so many epochs it waits in the second batch, to be killed there however busy the machine is."
    from fastai.learner import Learner
    one_batch = Learner.one_batch
    def wait(self, i, b):
        if self.model.training and (self.epoch, i) == (epochs, 1): time.sleep(600)
        return one_batch(self, i, b)
    Learner.one_batch = wait


def small_files(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fake_wandb(file):
    "A stand-in that writes down what it is told."
    import types
    class Settings(dict):
        def update(self, other, **kwargs): super().update({k: str(v) for k, v in other.items()})
    told, module = [], types.ModuleType("wandb")
    def log(values, step=None):
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) or hasattr(v, "item")}
        told.append(numbers | dict(step=step))
        Path(file).write_text(json.dumps(dict(told=told, project=module.project, config=module.given)))
    def init(project, group, dir, config):
        module.project, module.given = project, config
        module.run = types.SimpleNamespace(step=0, summary={})
    module.init, module.log, module.run, module.config = init, log, None, Settings()
    module.watch = lambda *args, **kwargs: None
    sys.modules["wandb"] = module


@pytest.fixture(scope="module")
def start(processes):
    "Starts `work`."
    def start(out, tweak=None, argument=None, **kwargs):
        out.parent.mkdir(parents=True, exist_ok=True)
        return processes(work, {**kwargs, "out": str(out)}, str(out) + ".log", tweak, argument)
    return start


@pytest.fixture(scope="module")
def finish(start):
    "Runs to the end and gives the exit status and what was said."
    def finish(out, *args, **kwargs):
        process = start(out, *args, **kwargs)
        process.join(600)
        return process.exitcode, Path(str(out) + ".log").read_text()
    return finish


@pytest.fixture(scope="module")
def whole(finish, tmp_path_factory):
    "The undisturbed run."
    out = tmp_path_factory.mktemp("whole") / "run"
    status, said = finish(out, **TINY)
    assert status == 0, said
    return out


def wait_for(condition, process, seconds=600):
    end = time.monotonic() + seconds
    while not condition() and process.is_alive():
        assert time.monotonic() < end
        time.sleep(.005)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def same(a, b):
    "Weights and the table of two finished runs agree to the last bit."
    first, second = load_file(a / "model/model.safetensors"), load_file(b / "model/model.safetensors")
    assert list(first) == list(second) and all(first[name].equal(second[name]) for name in first)
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    return True


def test_same_command_same_numbers(whole, finish, tmp_path):
    assert finish(tmp_path / "again", **TINY)[0] == 0
    assert same(whole, tmp_path / "again") and "time" not in pd.read_csv(whole / "metrics.csv")
    assert not (whole / "checkpoint.pt").exists()         # a finished run needs none
    status, said = finish(whole, resume=True)
    assert status == 0 and "is finished" in said


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_points(whole, start, finish, tmp_path, seed):
    rng, out, epochs = random.Random(seed), tmp_path / "run", []
    file, took = out / "checkpoint.pt", json.loads((whole / "summary.json").read_text())["seconds"]
    stamp = lambda: file.stat().st_mtime_ns if file.exists() else 0
    for attempt in range(3):
        before = stamp()
        process = start(out, resume=attempt > 0, **({} if attempt else TINY))
        wait_for(lambda before=before: stamp() != before, process)     # so every attempt gets on
        time.sleep(rng.random() * took / 4)
        if not file.exists(): break
        kill(process)
        epochs.append(read_checkpoint(file)["epoch"])
    assert len(epochs) >= 2 and epochs[0] < 4 and epochs == sorted(epochs)
    assert finish(out, resume=True)[0] == 0
    assert same(whole, out)
    assert not list(out.glob(".*part*"))


@pytest.mark.parametrize("settings", [dict(recipe="modern", ema=.9, mixup=.2, keep_best=True), pytest.param(
    dict(recipe="paper", method="random_regions"), marks=pytest.mark.slow), pytest.param(
    dict(layer_decay=.5, arch_kwargs=dict(widths=[8, 16])), marks=pytest.mark.slow)])
def test_every_recipe(start, finish, tmp_path, settings):
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**TINY, **settings}))
    config, out = str(tmp_path / "settings.yaml"), tmp_path / "run"
    status, said = finish(tmp_path / "whole", config=config)
    assert status == 0, said
    process = start(out, waiting, 2, config=config)
    wait_for(lambda: (out / "checkpoint.pt").exists() and read_checkpoint(out / "checkpoint.pt")["epoch"] == 2, process)
    kill(process)
    status, said = finish(out, resume=True)
    assert status == 0, said
    assert same(tmp_path / "whole", out)


class Stop(Callback):
    "Ends a fit after a number of batches, as a kill does."
    def __init__(self, batch): self.batch = batch
    def after_batch(self):
        if self.train_iter == self.batch: raise KeyboardInterrupt


def fit(settings, *cbs, epochs=None, learn=None):
    learn = learn or make_learner(settings)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs or settings.epochs, 1e-3, cbs=list(cbs))
    return learn


@pytest.mark.parametrize("accumulate", [2, 5])
def test_accumulated_gradients_end_with_the_epoch(tmp_path, accumulate):
    "Three batches an epoch and two, or five, to a step: nothing is carried over the boundary at which a run goes on."
    settings = Settings(**TINY | dict(epochs=3, images_per_class=7), accumulate=accumulate)
    undisturbed = fit(settings)
    with pytest.raises(KeyboardInterrupt): fit(settings, Checkpoint(tmp_path), Stop(5))
    assert read_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1
    resumed = fit(settings, Checkpoint(tmp_path, resume=True))
    first, second = undisturbed.model.state_dict(), resumed.model.state_dict()
    assert len(undisturbed.dls.train) == 3 and all(first[name].equal(second[name]) for name in first)
    assert not first["image_head.weight"].equal(make_learner(settings).model.state_dict()["image_head.weight"])


def test_an_interrupted_resumed_fit_leaves_no_epoch_out_of_the_next(tmp_path):
    settings = Settings(**TINY | dict(epochs=3))
    with pytest.raises(KeyboardInterrupt): fit(settings, Checkpoint(tmp_path), Stop(12))
    learn = make_learner(settings)
    with pytest.raises(KeyboardInterrupt): fit(settings, Checkpoint(tmp_path, resume=True), Stop(12), learn=learn)
    assert len(learn.recorder.values) == 2                        # it had gone on from there
    fit(settings, epochs=1, learn=learn)
    assert len(learn.recorder.values) == 1 and len(learn.recorder.lrs) == 5


def parts(out): return list(out.glob(".checkpoint.*.part.pt"))


def test_killed_while_writing_a_checkpoint(whole, start, finish, tmp_path):
    "Nobody else gets into the folder before that, and whoever comes after finds nothing in the way."
    out = tmp_path / "run"
    process = start(out, slow_writing, 2, **TINY)
    file = out / "checkpoint.pt"
    def half_written(): return read_checkpoint(file)["epoch"] == 1 and any(part.stat().st_size for part in parts(out))
    wait_for(lambda: file.exists() and half_written(), process)
    if sys.platform != "win32":
        for kwargs in (TINY, dict(resume=True)):
            assert f"process {process.pid} on {platform.node()} works on {out}" in fails(out=str(out), **kwargs)
        with pytest.raises(BlockingIOError): train(Settings(**TINY), out=out)
    kill(process)
    assert parts(out) and read_checkpoint(file)["epoch"] == 1
    assert finish(out, resume=True)[0] == 0
    assert same(whole, out) and not parts(out) and not (out / ".lock").exists()


def test_two_writers_of_one_file(tmp_path):
    "Each has a name of its own meanwhile; the last one to finish is right."
    file = tmp_path / ("long name " * 24 + ".txt")
    def write(part):
        part.write_text("first")
        put(file, lambda other: other.write_text("second"))
        assert part.read_text() == "first" and file.read_text() == "second"
    put(file, write)
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
    assert (file.stat().st_mode & 0o777) == (put_bytes(tmp_path / "x", lambda s: s.write(b"y")).stat().st_mode & 0o777)


def die_with_a_lock(folder):
    "In a process of its own; a child of it lives on."
    with alone(folder):
        if os.fork(): os._exit(0)
        time.sleep(60)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_lock_of_the_dead_holds_nobody(tmp_path, processes):
    "What a killed process, or another machine, has left in the file says nothing; children hold nothing."
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    (dead := processes(die_with_a_lock, tmp_path)).join()
    assert dead.exitcode == 0
    with alone(tmp_path): assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    assert not list(tmp_path.iterdir())


def test_full_disk(whole, start, finish, tmp_path):
    "A small file system where we may mount one, else a limit on the size of files."
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    mounted = sys.platform == "linux" and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        out = disk / "run"
        status, said = finish(out, *(() if mounted else (small_files, 2 << 20)), **TINY)
        assert status == 1 and "Traceback" not in said, said
        assert ("No space left on device" if mounted else "File too large") in said and "checkpoint.pt" in said
        assert f"fd_focus_train --resume --out {out}" in said
        assert read_checkpoint(out / "checkpoint.pt")["epoch"] == (1 if mounted else 0)
        assert not parts(out)
        if mounted: subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert finish(out, resume=True)[0] == 0
        assert same(whole, out)
    finally:
        if mounted: subprocess.run(["umount", "-l", str(disk)], check=True)


def test_ctrl_c_and_the_command_it_prints(whole, start, tmp_path, command):
    "Ctrl-C in an epoch, then what it says to type."
    out = tmp_path / "a run"
    process = start(out, **TINY)
    wait_for((out / "checkpoint.pt").exists, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(600)
    said = Path(f"{out}.log").read_text()
    assert process.exitcode == 130 and "Traceback" not in said, said
    assert "stopping at the end of this batch" in said
    assert re.search(r"stopped (after batch \d of 5|while validating) in epoch \d of 4", said)
    assert not parts(out)
    advice = said.strip().splitlines()[-1].strip()
    assert advice == f"fd_focus_train --resume --out '{out}'"
    assert command(*shlex.split(advice)).returncode == 0
    assert same(whole, out)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_change_nothing(whole, start, finish, tmp_path, workers):
    "Whoever opens the pictures, in a whole run or a resumed one; `whole` has no workers."
    out = tmp_path / "run"
    process = start(out, waiting, 2, workers=workers, **TINY)
    wait_for(lambda: (out / "checkpoint.pt").exists() and read_checkpoint(out / "checkpoint.pt")["epoch"] == 2, process)
    kill(process)
    assert finish(out, resume=True)[0] == 0
    assert same(whole, out)


def fails(**kwargs):
    with pytest.raises(SystemExit) as stop: fd_focus_train(**kwargs)
    assert stop.value.code not in (0, None)
    return str(stop.value)


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("birds")
    birds = ToyBirds(images_per_class=6, n_classes=3, image_size=48)
    for i in range(len(birds)):
        image, label = birds[i]
        (folder / birds.classes[label]).mkdir(exist_ok=True)
        image.save(folder / birds.classes[label] / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def unfinished(birds, tmp_path_factory):
    "A run on a copy of the birds, stopped before its report was written."
    folder = tmp_path_factory.mktemp("unfinished")
    shutil.copytree(birds, folder / "birds")
    settings = Settings(data=str(folder / "birds"), arch="toy_resnet", image_size=48, epochs=1, bs=4)
    train(settings, bar=False, out=folder / "run")
    return folder


def test_resume_what_cannot_be_resumed(unfinished, birds, tmp_path):
    assert "no checkpoint checkpoint.pt in" in fails(resume=True, out=str(tmp_path / "nowhere"))
    run, data = unfinished / "run", unfinished / "birds"
    said = fails(resume=True, out=str(run), epochs=9, method="plain")
    assert "epochs=9 (there: 1), method=plain (there: focus)" in said
    said = fails(out=str(run), arch="toy_resnet", image_size=48)
    assert "holds an unfinished run (1 of 1 epochs done)" in said and "--resume --out" in said
    victim = sorted(data.iterdir())[-1]
    next(victim.glob("*.png")).unlink()
    assert "of another training; training pictures: 15 in it, 14 now" in fails(resume=True, out=str(run))
    shutil.rmtree(victim)
    assert "classes: 3 in it, 2 now" in fails(resume=True, out=str(run))
    shutil.rmtree(data)
    shutil.copytree(birds, data)
    one = sorted((data / victim.name).iterdir())[0]
    one.rename(one.with_name("zz.png"))
    assert "names of the pictures" in fails(resume=True, out=str(run))
    one.with_name("zz.png").rename(one)
    pixels = one.read_bytes()
    shutil.copy(next((data / "..").glob("birds/*/00.png")), one)
    assert "another training; contents of the pictures: " in fails(resume=True, out=str(run))
    one.write_bytes(pixels)
    (tmp_path / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:-500])
    assert f"the checkpoint {tmp_path / 'checkpoint.pt'} is damaged" in fails(resume=True, out=str(tmp_path))


def test_exchanged_labels_are_another_training(birds, tmp_path):
    "The same files and classes, but every picture is called by the other name."
    files = sorted(birds.glob("*/*.png"))[:12]
    def write(names):
        rows = [f"{f.name},{names[i % 2]},{'train' if i < 8 else 'valid'}" for i, f in enumerate(files)]
        (tmp_path / "set/split.csv").write_text("\n".join(["file,label,split", *rows]))
    (tmp_path / "set").mkdir()
    for file in files: shutil.copy(file, tmp_path / "set")
    write("ab")
    settings = Settings(data=str(tmp_path / "set"), arch="toy_resnet", image_size=48, epochs=1, bs=4)
    train(settings, bar=False, out=tmp_path / "run")
    write("ba")
    assert "another training; labels of the pictures: " in fails(resume=True, out=str(tmp_path / "run"))


def test_what_was_asked_beside_the_settings_lasts(start, finish, tmp_path):
    out = tmp_path / "run"
    process = start(out, examples=0, **TINY)
    wait_for(lambda: (out / "checkpoint.pt").exists(), process)
    kill(process)
    assert finish(out, resume=True)[0] == 0 and not (out / "model/examples").exists()


def test_what_is_asked_with_resume_lasts_too(unfinished):
    "Also where no epoch is left to do."
    before = read_checkpoint((run := unfinished / "run") / "checkpoint.pt")
    settings = Settings(**before["settings"])
    train(settings, bar=False, out=run, resume=True, beside=dict(examples=0))
    train(settings, bar=False, out=run, resume=True)
    after = read_checkpoint(run / "checkpoint.pt")
    assert (before["beside"], after["beside"]) == ({}, dict(examples=0)) and before["seconds"] <= after["seconds"]
    assert all(before["model"][name].equal(after["model"][name]) for name in before["model"])


def test_files_that_are_no_checkpoint_of_ours(unfinished, tmp_path):
    file = tmp_path / "checkpoint.pt"
    state = read_checkpoint(unfinished / "run/checkpoint.pt")
    for other in (state | dict(format="fd_focus checkpoint 1"), {k: v for k, v in state.items() if k != "beside"}, [1]):
        torch.save(other, file)
        assert "is no checkpoint of this version of fd_focus" in fails(resume=True, out=str(tmp_path))
    torch.save(dict(state, more=Path("x")), file)         # what a person can put into any file
    said = fails(resume=True, out=str(tmp_path))
    assert "it holds more than tensors and plain values" in said and "weights_only" not in said
    torch.save(dict(state, settings=state["settings"] | dict(colour="red")), file)
    assert "colour" in fails(resume=True, out=str(tmp_path))


def test_flags_win_over_the_file(finish, tmp_path):
    config = tmp_path / "settings.yaml"
    written = {**TINY, "epochs": 3, "lr": 1e-3, "sigma": 2., "keep_best": True, "out": str(tmp_path / "elsewhere")}
    config.write_text(yaml.safe_dump(written))
    status, said = finish(tmp_path / "run", config=str(config), epochs=2)
    assert status == 0, said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    recorded = yaml.safe_load((tmp_path / "run/settings.yaml").read_text())
    assert recorded == summary["settings"] and set(recorded) == set(Settings.__dataclass_fields__)
    assert (recorded["epochs"], recorded["lr"], recorded["sigma"], recorded["bs"]) == (2, 1e-3, 2., 8)
    table = pd.read_csv(tmp_path / "run/metrics.csv")
    assert summary["weights_of_epoch"] == table.accuracy.argmax() + 1 and summary["accuracy"] == table.accuracy.max()
    assert f"weights of epoch {summary['weights_of_epoch']} of 2" in said and not (tmp_path / "elsewhere").exists()


def test_a_failed_start_leaves_a_finished_run_alone(whole):
    before = (whole / "settings.yaml").read_text()
    assert "no folder nowhere" in fails(data="nowhere", out=str(whole))
    assert (whole / "settings.yaml").read_text() == before


def test_bad_settings(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("epochs: 3\ncolour_of_sky: blue\nimagesize: 4\n")
    said = fails(config=str(config), out=str(tmp_path / "run"))
    assert f"{config}: unknown setting colour_of_sky, imagesize (did you mean image_size?)" in said
    assert "no settings file" in fails(config=str(tmp_path / "gone.yaml"), out=str(tmp_path / "run"))
    assert "log='paper' is none of" in fails(log="paper", out=str(tmp_path / "run"), **TINY)
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_tensorboard(whole, finish, tmp_path):
    status, said = finish(tmp_path / "run", log="tensorboard", **TINY)
    assert status == 0, said
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events, table = EventAccumulator(str(tmp_path / "run/tensorboard")), pd.read_csv(tmp_path / "run/metrics.csv")
    events.Reload()
    assert {"train_loss", "valid_loss", "accuracy", "image_accuracy", "lr_0", "lr_1"} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("accuracy")] == pytest.approx(list(table.accuracy))
    assert [e.step for e in events.Scalars("accuracy")] == [5, 10, 15, 20]
    assert same(whole, tmp_path / "run")          # who watches changes nothing


def test_wandb(whole, finish, tmp_path):
    status, said = finish(tmp_path / "run", fake_wandb, str(tmp_path / "told.json"), log="wandb", **TINY)
    assert status == 0, said
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["project"] == "fd_focus" and told["config"]["epochs"] == 4
    accuracy = json.loads((tmp_path / "run/summary.json").read_text())["accuracy"]
    assert any(row.get("accuracy") == pytest.approx(accuracy) for row in told["told"])
    assert sum("train_loss" in row for row in told["told"]) >= 20
    assert same(whole, tmp_path / "run")


def test_missing_logger(tmp_path):
    try: import wandb   # noqa: F401
    except ImportError: assert "pip install wandb" in fails(log="wandb", out=str(tmp_path / "run"), **TINY)
    else: pytest.skip("wandb is installed")
