"Shared by all tests: `--slow`, `--gpu`, and the development data named by FD_FOCUS_DATA."
import atexit
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--gpu", action="store_true", help="run the tests marked gpu, and no others, on a GPU")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; run with --slow")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; run with --gpu")
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background job would ignore it
    if not config.getoption("--gpu"): os.environ["CUDA_VISIBLE_DEVICES"] = ""     # figures are compared to the last bit


def pytest_collection_modifyitems(config, items):
    slow, gpu = config.getoption("--slow"), config.getoption("--gpu")
    for item in items:
        if "slow" in item.keywords and not slow: item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if ("gpu" in item.keywords) != gpu:
            item.add_marker(pytest.mark.skip(reason="for a CPU" if gpu else "for a GPU; run with --gpu"))


@pytest.fixture
def data():
    "The folder of photographs, indexes and weights; tests that need it are skipped without."
    folder = os.environ.get("FD_FOCUS_DATA")
    if not folder: pytest.skip("FD_FOCUS_DATA is not set")
    return Path(folder)


@pytest.fixture
def no_memory_of_earlier_checks(monkeypatch, tmp_path_factory):
    "What a check of pictures remembers goes into a folder of the test's own."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def photograph(seed=0, size=(64, 48)):
    "Soft random colours: nothing that JPEG distorts much, and no two alike."
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def two_classes(root):
    "Class folders a and b with eight different pictures each."
    for i in range(16):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        photograph(i).save(root / "ab"[i % 2] / f"{i:02d}.jpg")
    return root


HEAVY = ["fd_focus.training.run", "fd_focus.training.distributed", "fd_focus.use.model_folder", "fd_focus.use.answer",
         "fd_focus.evidence.bench"]


@pytest.fixture(scope="module")
def processes(request):
    """`processes(function, *args)` starts one; the heavy imports are done once, in the server that forks them.
    At the end whatever still runs is killed."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"      # tiny tensors: a second thread costs more than it gives
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*HEAVY, request.module.__name__])
    running = []
    def start(function, *args):
        running.append(context.Process(target=function, args=args))
        running[-1].start()
        return running[-1]
    yield start
    for process in running:
        if process.is_alive(): process.kill()
    if before is None: del os.environ["OMP_NUM_THREADS"]
    else: os.environ["OMP_NUM_THREADS"] = before


def as_typed(name, words, where, environment):
    "What the installed command `name` does; it reads and writes files in `where`."
    from fd_focus.use import cli
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(("in", "out", "err")):
        os.dup2(os.open(where / file, os.O_RDONLY if file == "in" else os.O_WRONLY), number)
    sys.stdin, sys.argv = open(0), [name, *words]
    try: getattr(cli, name)()
    finally: atexit._run_exitfuncs()         # as an interpreter does at its end, and a forked process does not


@pytest.fixture(scope="module")
def begin(processes, tmp_path_factory):
    """`begin(name, *words)` starts an installed command in a process of its own, without the seconds of its imports;
    gives the process, and the folder with what it says, in `out` and `err`. `test_cli.py` starts some for real."""
    def begin(name, *words, stdin="", **environment):
        where = tmp_path_factory.mktemp("command")
        for file, text in dict({"in": stdin}, out="", err="").items():
            (where / file).write_text(text, errors="surrogateescape")
        return processes(as_typed, name, list(map(str, words)), where, os.environ | environment), where
    return begin


@pytest.fixture(scope="module")
def command(begin):
    "`command(name, *words)` runs one to its end, and gives what `subprocess.run` gives."
    def command(name, *words, **kwargs):
        process, where = begin(name, *words, **kwargs)
        process.join(600)
        said = ((where / file).read_text(errors="surrogateescape") for file in ("out", "err"))
        return subprocess.CompletedProcess(words, process.exitcode, *said)
    return command


@pytest.fixture(scope="module")
def learn():
    "An untrained network on twelve validation birds of three classes, in batches of five."
    from fd_focus.data.loaders import FocusDataLoaders       # slow to import
    from fd_focus.training.learner import focus_learner
    torch.manual_seed(0)
    dls = FocusDataLoaders.from_toy(4, 4, n_classes=3, bs=5)
    return focus_learner(dls, "toy_resnet", pretrained=False)


def shaken(net, seed=0):
    "Random heads and batch norm statistics, so that a picture matters."
    torch.manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"): tensor.uniform_(.5, 2)
        elif name.endswith("running_mean"): tensor.normal_(0, .2)
        elif "head" in name: tensor.normal_(0, .3)
    return net.eval()


@pytest.fixture
def two_processes(processes):
    "`two_processes(function, name, out)`: the function of (name, rank, port, out) in two that train together."
    def run(function, name, out):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = [processes(function, name, rank, port, str(out)) for rank in (0, 1)]
        for process in group: process.join(120)
        assert [process.exitcode for process in group] == [0, 0]
    return run
