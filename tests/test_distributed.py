"Two processes on the CPU train as one does: each sees half of the pictures, the figures are those of all of them."
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from fd_focus.training.checkpoint import read_checkpoint
from fd_focus.training.run import make_learner
from fd_focus.training.settings import Settings
from fd_focus.use.commands import fd_focus_train

BIN = Path(sys.executable).parent
NET = dict(arch="toy_resnet", image_size=48, bs=8)


def gratings(folder, train, valid, noise=80):
    "Stripes across, along and aslant, under noise: learnt in a few epochs, the same after a flip. Pictures a class."
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:48, :48]
    for split, count in (("train", train), ("valid", valid)):
        for name, angle in (("across", np.pi / 2), ("along", 0.), ("aslant", np.pi / 4)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                a = angle + rng.normal(0, .15)
                waves = np.sin(rng.uniform(.5, .9) * (x * np.cos(a) + y * np.sin(a)) + rng.uniform(0, 6))
                pixels = 128 + 60 * waves[..., None] * rng.uniform(.5, 1, 3) + rng.normal(0, noise, (48, 48, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{i:02d}.png")
    return str(folder)


def note_shares(folder):
    "Every process writes down which pictures it was dealt, pass by pass."
    from fd_focus.training.distributed import SharedDL
    deal = SharedDL.get_idxs
    def noted(self):
        dealt = deal(self)
        line = json.dumps(["train" if self.dl.shuffle else "valid", dealt])
        with open(Path(folder) / f"{self.rank}.jsonl", "a") as file: file.write(line + "\n")
        return dealt
    SharedDL.get_idxs = noted


def work(kwargs, environment, log, shares):
    "One of the processes, as torchrun would start it."
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.environ.update(environment)
    if shares: note_shares(shares)
    fd_focus_train(**kwargs)


def work_twice(kwargs, environment, log, shares):
    "Two trainings in one process, the second on the first one's group."
    work(kwargs, environment, log, shares)
    fd_focus_train(**kwargs | dict(out=kwargs["out"] + " again"))


@pytest.fixture(scope="module")
def start(processes):
    "Starts processes that train together."
    def start(out, n=2, shares=None, work=work, **kwargs):
        out.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meet = dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        def place(rank): return dict(meet, RANK=str(rank), LOCAL_RANK=str(rank)) if n > 1 else {}
        kwargs["out"] = str(out)
        return [processes(work, kwargs, place(rank), f"{out}.{rank}.log", shares) for rank in range(n)]
    return start


@pytest.fixture(scope="module")
def finish(start):
    "Runs to the end; the exit statuses, and what the first process said."
    def finish(out, *args, **kwargs):
        group = start(out, *args, **kwargs)
        for process in group: process.join(600)
        return [process.exitcode for process in group], Path(f"{out}.0.log").read_text()
    return finish


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    "Settings of a run on 120 pictures, judged by 60: with one process, five seeds end at 100 % right."
    return dict(NET, data=gratings(tmp_path_factory.mktemp("easy") / "data", 40, 20, noise=40), epochs=6)


@pytest.fixture(scope="module")
def two(finish, easy, tmp_path_factory):
    "The run of two processes, and which pictures each was dealt."
    folder = tmp_path_factory.mktemp("two")
    statuses, said = finish(folder / "run", 2, str(folder), **easy)
    assert statuses == [0, 0], said
    return folder


def summary(out): return json.loads((out / "summary.json").read_text())


def test_each_sees_one_half(two):
    first, second = ([json.loads(line) for line in (two / f"{rank}.jsonl").read_text().splitlines()] for rank in (0, 1))
    assert len(first) == len(second) == 12              # six passes over either set
    for (kind, mine), (_, yours) in zip(first, second):
        assert len(mine) == len(yours) == (60 if kind == "train" else 30)
        assert sorted(mine + yours) == list(range(120 if kind == "train" else 60))
    orders = [tuple(mine) for kind, mine in first if kind == "train"]
    assert len(set(orders)) == 6                        # shuffled anew each time


def test_says_that_it_is_not_calibrated(two):
    said, config = (two / "run.0.log").read_text(), json.loads((two / "run/model/config.json").read_text())
    assert said.count("not calibrated: each of several processes sees a share") == 1
    assert "temperature" not in config and "threshold" not in config


def test_same_accuracy_as_one(two, easy, finish, tmp_path):
    alone = {}
    for seed in (0, 1):
        statuses, said = finish(tmp_path / f"{seed}", 1, seed=seed, **easy)
        assert statuses == [0], said
        alone[seed] = summary(tmp_path / f"{seed}")
    together = summary(two / "run")
    assert (together["processes"], alone[0]["processes"]) == (2, 1)
    assert min(together["accuracy"], alone[0]["accuracy"], alone[1]["accuracy"]) > .9      # chance is 1/3
    assert "right" not in (two / "run.1.log").read_text()      # one speaks


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    "Nine pictures for validation, which two cannot share equally: the second process's last batch only fills up."
    return dict(NET, data=gratings(tmp_path_factory.mktemp("odd") / "data", 12, 3))


def test_figures_are_those_of_all_pictures(odd, finish, tmp_path):
    "What two processes report of 9 pictures, one finds again with the weights they left."
    statuses, said = finish(tmp_path / "run", epochs=2, preset="none", **odd)
    assert statuses == [0, 0], said
    learn = make_learner(Settings(**odd))
    learn.model.load_state_dict(load_file(tmp_path / "run/model/model.safetensors"))
    with learn.no_bar(), learn.no_logging(): found = learn.validate()
    reported = pd.read_csv(tmp_path / "run/metrics.csv").iloc[-1]
    columns = ["valid_loss", "accuracy", "image_accuracy", "region_accuracy", "ensemble_accuracy"]
    assert list(found)[:5] == pytest.approx([reported[name] for name in columns], abs=1e-5)
    assert (9 * reported.accuracy) % 1 == pytest.approx(0, abs=1e-6) and summary(tmp_path / "run")["valid_images"] == 9


def boundary(out, epoch):
    file = out / "checkpoint.pt"
    return file.exists() and read_checkpoint(file)["epoch"] >= epoch


def test_killed_and_resumed_together(two, easy, start, finish, tmp_path):
    out = tmp_path / "run"
    group = start(out, **easy)
    while not boundary(out, 2): time.sleep(.01)
    for process in group: process.kill()      # one may have ended by itself, of the other's death
    for process in group: process.join()
    assert len(read_checkpoint(out / "checkpoint.pt")["random"]) == 2
    statuses, said = finish(out, resume=True)
    assert statuses == [0, 0], said
    first, second = load_file(two / "run/model/model.safetensors"), load_file(out / "model/model.safetensors")
    assert all(first[name].equal(second[name]) for name in first)
    assert (two / "run/metrics.csv").read_bytes() == (out / "metrics.csv").read_bytes()


def test_ctrl_c_in_one_stops_both_and_one_goes_on(easy, start, finish, tmp_path):
    out = tmp_path / "run"
    group = start(out, **easy)
    while not boundary(out, 1): time.sleep(.01)
    os.kill(group[1].pid, signal.SIGINT)
    for process in group: process.join(600)
    assert [process.exitcode for process in group] == [130, 130]
    assert "stopped" in Path(f"{out}.0.log").read_text() and "Go on with" not in Path(f"{out}.1.log").read_text()
    statuses, said = finish(out, 1, resume=True)
    assert statuses == [0] and "the checkpoint is of 2 process(es), now there are 1" in said
    assert summary(out)["epochs_trained"] == 6


def test_checkpointing_together(odd, finish, tmp_path):
    "The network is wrapped while the option takes its hands off the body."
    statuses, said = finish(tmp_path / "run", epochs=1, checkpointing=True, **odd)
    assert statuses == [0, 0], said


def test_batches_that_cannot_be_shared(easy, finish, tmp_path):
    statuses, said = finish(tmp_path / "run", **easy | dict(bs=9))
    assert statuses == [1, 1] and "bs=9 cannot be shared by 2 processes; use a multiple of 2, at least 4" in said


def test_two_trainings_in_one_process(odd, finish, tmp_path):
    statuses, said = finish(tmp_path / "run", work=work_twice, epochs=1, **odd)
    assert statuses == [0, 0], said
    first, second = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "run again"))
    assert all(first[name].equal(second[name]) for name in first)


def test_the_group_ends_before_the_interpreter(odd, tmp_path):
    "Its threads would outlive it otherwise, and now and then abort the process. Also after an error."
    script = ("import atexit, sys, torch; from fd_focus.use.commands import fd_focus_train\n"
              "atexit.register(lambda: print('group', torch.distributed.is_initialized(), flush=True))\n"    # runs last
              "fd_focus_train(data=sys.argv[1], out=sys.argv[2], arch='toy_resnet', image_size=48, epochs=1, bs=8)\n"
              "print('group', torch.distributed.is_initialized(), flush=True)\nraise SystemExit(3)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-c", script, odd["data"], tmp_path / "run"]
    group = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env=os.environ | meet | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in (0, 1)]
    said = [process.communicate() for process in group]
    assert [process.returncode for process in group] == [3, 3], said
    assert said[0][0].splitlines()[-2:] == ["group True", "group False"], said


def test_torchrun(odd, tmp_path):
    "The command as it is typed."
    words = ["--data", odd["data"], "--arch", "toy_resnet", "--image_size", "48", "--epochs", "1", "--bs", "8",
             "--out", tmp_path / "run"]
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", BIN / "fd_focus_train", *words]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("of 9 validation pictures right") == 1 and summary(tmp_path / "run")["processes"] == 2


def test_more_processes_than_gpus(monkeypatch):
    from fd_focus.training.run import make_learner
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items(): monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="process 2 has no GPU: there is 1. Start one process a GPU"):
        make_learner(Settings(arch="toy_resnet", image_size=48))
