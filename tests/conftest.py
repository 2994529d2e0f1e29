"Shared by all tests: `--slow`, and the development data named by FD_FOCUS_DATA."
import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; run with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture
def data():
    "The folder of photographs, indexes and weights; tests that need it are skipped without."
    folder = os.environ.get("FD_FOCUS_DATA")
    if not folder: pytest.skip("FD_FOCUS_DATA is not set")
    return Path(folder)


def shaken(net, seed=0):
    "Random heads and batch norm statistics, so that a picture matters."
    torch.manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"): tensor.uniform_(.5, 2)
        elif name.endswith("running_mean"): tensor.normal_(0, .2)
        elif "head" in name: tensor.normal_(0, .3)
    return net.eval()
