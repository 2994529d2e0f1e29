"Model folders: nothing is lost, nothing runs, and what is wrong is named."
import io
import json
import os
import pickle
import re
import shutil
import struct
import types
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import shaken
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from fd_focus.bodies import create_body, feature_shape, toy_resnet
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.methods import METHODS, Method, method_options, register
from fd_focus.training.learner import focus_learner
from fd_focus.evidence.calibration import Calibration
from fd_focus.training.settings import Settings
from fd_focus.use.config import add_metrics, as_json, check_config, judges, rests_on, write_card
from fd_focus.use.model_folder import _check_arch, _sketch, load_focus, push_to_hub, save_focus
from fd_focus.use.weights import _at_most
from fd_focus.use.predict import FocusClassifier, FocusPipeline


@pytest.fixture(scope="module")
def dls(): return FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2)


def learner(dls, settle=True, **kwargs):
    torch.manual_seed(0)
    learn = focus_learner(dls, kwargs.pop("arch", "toy_resnet"), pretrained=False, **dict(preset=None) | kwargs)
    if settle: shaken(learn.model)
    return learn


@pytest.fixture(scope="module")
def saved(dls, tmp_path_factory):
    return save_focus(learner(dls), tmp_path_factory.mktemp("saved") / "model", metrics=dict(accuracy=.875))


@pytest.fixture
def folder(saved, tmp_path): return shutil.copytree(saved, tmp_path / "model")


def change(folder, drop=(), options=None, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    if isinstance(options, dict): config["options"] |= options
    elif options is not None: config["options"] = options
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


OTHER = dict(
    region_size=30,
    zoom_size=40,
    m=8,
    l=2,
    iou_threshold=0.5,
    sigma=0.0,
    attention="single",
    fusion="mean",
    hybrid=False,
    crop_norm="separate",
    answer="ensemble",
    look_again_below=0.5,
)


def test_every_argument_survives(dls, tmp_path):
    "One model a value away from every default, and both models answer alike, bit for bit, after loading."
    assert set(method_options(METHODS["focus"])) == set(OTHER) | {"image_size"}, (
        "a new argument of FocusNet: give it a value here"
    )
    x = torch.rand(2, 3, 64, 64)
    for kwargs in ({name: value} for name, value in OTHER.items()):
        learn = learner(dls, **kwargs)
        net = load_focus(save_focus(learn, tmp_path / next(iter(kwargs))))
        for name, value in kwargs.items():
            assert net.config()[name] == ([value] * 2 if name.endswith("_size") else value)
        with torch.no_grad(): assert torch.equal(net(x), learn.model(x))
    net = load_focus(save_focus(learner(dls, **OTHER), tmp_path / "all"))
    assert not net.training and net.hybrid_head is None and net.suppresses.shape == (16, 16) and net.grid[0, 2] == 30


@pytest.mark.parametrize(
    "kwargs", [dict(m=4, l=2), dict(m=4, l=2, crop_norm="separate"), dict(method="plain")], ids=str
)
def test_bit_for_bit(dls, tmp_path, kwargs):
    learn = learner(dls, **kwargs)
    net, x = load_focus(save_focus(learn, tmp_path / "model")), torch.rand(2, 3, 64, 64)
    assert type(net) is type(learn.model) and net.config() == learn.model.config()
    for name, tensor in learn.model.state_dict().items(): assert torch.equal(net.state_dict()[name], tensor), name
    with torch.no_grad(): assert torch.equal(net(x), learn.model(x))
    if "crop_norm" in kwargs:
        assert (
            net.crop_body.conv1.weight is net.body.conv1.weight
            and net.crop_body.bn1.running_mean is not net.body.bn1.running_mean
        )


class Wrapped(nn.parallel.DistributedDataParallel):
    "As DDP looks from outside, without a process group."
    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, Wrapped, lambda net: Wrapped(torch.compile(net)), nn.DataParallel],
    ids=["compiled", "ddp", "both", "dp"],
)
def test_wrapped_networks_are_unwrapped(dls, tmp_path, wrap):
    learn, x = learner(dls, m=4, l=2), torch.rand(2, 3, 64, 64)
    with torch.no_grad(): want = learn.model(x)
    learn.model = wrap(learn.model)
    with torch.no_grad(): assert torch.equal(load_focus(save_focus(learn, tmp_path / "model"))(x), want)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_body_has_its_own_names(dls, tmp_path, in_place):
    learn, x = learner(dls, m=4, l=2), torch.rand(2, 3, 64, 64)
    with torch.no_grad(): want = learn.model(x)
    if in_place: learn.model.body.compile()
    else: learn.model.body = torch.compile(learn.model.body)
    with torch.no_grad(): assert torch.equal(load_focus(save_focus(learn, tmp_path / "model"))(x), want)


class Shared(nn.Module):
    "Uses one layer twice, and one tensor under two names."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.c, self.d = self.b, nn.Conv2d(8, 8, 3, 1, 1)
        self.d.bias = self.b.bias
    def forward(self, x): return self.norm(self.d(self.c(self.b(self.a(x)).relu()).relu()))


@pytest.mark.parametrize("method", ["plain", "focus"])
def test_tensors_with_several_names(dls, tmp_path, method):
    learn = learner(dls, arch=Shared(), method=method)
    with pytest.warns(UserWarning, match="will need its code"): folder = save_focus(learn, tmp_path / "model")
    net, x = load_focus(folder, body=Shared()), torch.rand(2, 3, 64, 64)
    assert net.body.c.weight is net.body.b.weight and net.body.d.bias is net.body.b.bias
    with torch.no_grad(): assert torch.equal(net(x), learn.model(x))


def test_a_body_of_ones_own(dls, tmp_path):
    learn, x = learner(dls, arch=toy_resnet((8, 16))), torch.rand(2, 3, 64, 64)
    for name in ("my own body", None):
        with pytest.warns(UserWarning, match="will need its code"): folder = save_focus(learn, tmp_path / "own", name)
        with pytest.raises(
            ValueError,
            match=f"config.json: {name or 'Sequential'} is a body of its author's own: load_focus.folder, body=",
        ):
            load_focus(folder)
        net = load_focus(folder, body=toy_resnet((8, 16)))
        with torch.no_grad(): assert net.n_features == 16 and torch.equal(net(x), learn.model(x))
    with pytest.raises(ValueError, match="does not fit its config.json"): load_focus(folder, body=toy_resnet((8, 20)))


class Mine(Method):
    "The least that a method of one's own is."
    def __init__(self, body, n_classes, image_size=448, power: float = 1.):
        super().__init__(body, n_classes, image_size)
        self.power, self.head = power, nn.Linear(self.n_features, n_classes)
    def forward(self, x, target=None):
        logits = self.head(self.body(x).amax((2, 3)) ** self.power)
        return {"image": logits} if self.training else logits


def test_a_method_of_ones_own(dls, tmp_path, monkeypatch):
    "It goes by its name, and nothing is imported to find it."
    with pytest.raises(ValueError, match="Mine has no name by which it could be built again: register"):
        save_focus(learner(dls, method=Mine), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(METHODS, "places", dict(METHODS.places))
    register("mine", Mine)
    learn, x = learner(dls, method="mine", power=2.), torch.rand(2, 3, 64, 64)
    folder = save_focus(learn, tmp_path / "model")
    net = load_focus(folder)
    assert type(net) is Mine and net.power == 2. and FocusPipeline(net).outputs == ("probabilities",)
    with torch.no_grad(): assert torch.equal(net(x), learn.model(x))
    change(folder, options=dict(power="strong"))
    with pytest.raises(ValueError, match="power is 'strong', but should be int or float"): load_focus(folder)
    monkeypatch.delitem(METHODS.places, "mine")
    with pytest.raises(
        ValueError,
        match="config.json: its method 'mine' is none of plain, focus.*: import the module that registers it",
    ):
        load_focus(folder)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("evil", "evil:Mine", "fd_focus.methods:PlainNet"):
        change(folder, method=name)
        with pytest.raises(ValueError, match="is none of plain, focus"): load_focus(folder)
    assert not (tmp_path / "ran").exists()


def test_arguments_of_an_architecture(tmp_path):
    pytest.importorskip("timm")
    dls = FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2)
    body, _ = create_body("resnet18", pretrained=False, output_stride=16)
    learn, x = focus_learner(dls, body, method="plain", pretrained=False), torch.rand(2, 3, 64, 64)
    folder = save_focus(learn, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["arch_kwargs"] == dict(output_stride=16)
    with torch.no_grad(): assert torch.equal(load_focus(folder)(x), learn.model.eval()(x))
    for kwargs in (
        dict(checkpoint_path="x.pth"),
        dict(pretrained_cfg={}),
        dict(weights="x.pth"),
        dict(pretrained=True),
    ):
        change(folder, arch_kwargs=kwargs)
        with pytest.raises(ValueError, match="arch_kwargs is .*none may name a file of weights"): load_focus(folder)
    change(folder, arch_kwargs=dict(telescope=3))
    with pytest.raises(ValueError, match="config.json: .*telescope"): load_focus(folder)


def test_what_the_config_holds(dls, saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    assert {
        "method",
        "arch",
        "cut",
        "arch_kwargs",
        "classes",
        "image_size",
        "options",
        "input_size",
        "mean",
        "std",
        "versions",
        "metrics",
    } <= set(config)
    assert (
        "temperature" not in config
        and config["metrics"] == dict(accuracy=0.875)
        and {"torch", "fd_focus"} <= set(config["versions"])
    )
    assert config["mean"] == [.485, .456, .406] and config["options"]["region_size"] == [22, 22]
    assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for words in (("toy_resnet", "layer2"), (), ("toy_resnet",)):           # asked for once, and no more
        folder = save_focus(learner(dls, cut="layer2"), tmp_path / "cut", *words)
        config = json.loads((folder / "config.json").read_text())
        assert (config["arch"], config["cut"]) == ("toy_resnet", "layer2") and load_focus(folder).n_features == 64


def test_folder_with_the_least(folder):
    "What is not needed may be missing."
    change(folder, drop=("sha256", "resize", "input_size", "squash", "cut", "arch_kwargs", "metrics", "versions"))
    assert load_focus(folder).l == 4


@pytest.mark.parametrize(
    "values,message",
    [
        (
            dict(classes=["a", "a", "b"]),
            "classes is .'a', 'a', 'b'., but should be a list of two or more different names",
        ),
        (dict(classes="abc"), "classes is 'abc', but should be"),
        (dict(image_size=[64, 1e9]), "image_size is .64, 1000000000.0., but should be 1 to 8192"),
        (dict(image_size=-1), "image_size is -1, but"),
        (dict(image_size=[96, 96]), r"image_size is \[96, 96\], but \[64, 64\] among the options"),
        (dict(std=[1, 0, 1]), "std is .1, 0, 1., but should be three numbers above 0"),
        (dict(mean=[1, None, 1]), "mean is"),
        (dict(arch=["resnet50"]), "arch is"),
        (dict(arch="os.system"), "'os.system' is no model of torchvision"),
        (dict(arch="hf_hub:somebody/model"), "is no model of torchvision"),
        (dict(arch="../model"), "is no model of torchvision"),
        (dict(cut="layer9"), "config.json: cut='layer9' is none of the body's layers"),
        (dict(arch_kwargs=[1]), "arch_kwargs is"),
        (dict(arch_kwargs=dict(widths="many")), "config.json: "),
        (dict(arch_kwargs=dict(lens=3)), "config.json: .*lens"),
        (dict(temperature=0), "temperature is 0, but should be a number above 0"),
        (dict(threshold=95), "threshold is 95, but should be a number from 0 to 1, or 2: no answer is sure"),
        (dict(threshold=1.5), "threshold is 1.5"),
        (dict(threshold=True), "threshold is True"),
        (dict(judged_by="eye"), "judged_by is 'eye', but should be 'valid', 'test' or 'train'"),
        (dict(judged_by=["test"]), "judged_by is"),
        (dict(squash="yes"), "squash is 'yes', but should be true, false or 'pad'"),
        *((dict(banner=value), "banner is .*, but should be a number of pixels")
          for value in (-1, 20.5, True, "20", None, 10**9)),
        *((dict(evidence=value), "evidence is .*, but should be a table of whole numbers right <= of <= pictures")
          for value in (
              57, [57, 63], {}, dict(right=57, of=63), dict(right=64, of=63, pictures=80, wanted=.95),
              dict(right=57, of=81, pictures=80, wanted=.95), dict(right=-1, of=63, pictures=80, wanted=.95),
              dict(right="57", of=63, pictures=80, wanted=.95), dict(right=True, of=63, pictures=80, wanted=.95),
              dict(right=57, of=63, pictures=80, wanted=95), dict(right=57, of=63, pictures=80, wanted="<b>"),
              dict(right=57., of=63, pictures=80, wanted=.95), dict(right=1, of=1, pictures=10**99, wanted=.95))),
        *((dict(metrics=value), "metrics is .*, but should be a table")
          for value in (dict(test_accuracy="<b>"), dict(test_interval=[.5]), dict(test_interval=[".5", 1]),
                        dict(test_images="many"), dict(valid_images=1.5), dict(test_interval=.5))),
        (dict(method=1), "method is 1, but should be the name of a method"),
        (dict(method="plainer"), "its method 'plainer' is none of plain, focus"),
        (dict(own_body=1), "own_body is 1, but should be true or false"),
        (dict(own_body=True), "is a body of its author's own"),
        (dict(format="onnx"), "is not of fd_focus"),
        (dict(arch="resnet18", options=dict(m=4)), "does not fit its config.json"),
        (dict(classes=["a", "b"]), "tells 3 classes apart, but config.json names 2"),
        (dict(sha256="0"), "its sha256 differs"),
        *(
            (
                dict(metrics=dict(accuracy=value)),
                "metrics is .'accuracy': .*, but should be a table, its accuracy a number or null",
            )
            for value in ("0.9", [0.9], True)
        ),
        (dict(method="plain", options=[]), "options is .., but should be a table"),
        (dict(method="plain"), "uses .*region_size.*, which this version does not know"),
        *(
            (dict(options=options), message)
            for options, message in (
                (dict(m="6"), "m is '6', but should be int"),
                (dict(l=True), "l is True, but should be int"),
                (dict(sigma="wide"), "sigma is 'wide', but should be int or float"),
                (dict(fusion="vote"), "fusion='vote' is none of"),
                (dict(l=9), "l=9 regions are to be used of m=6"),
                (dict(m=99), "config.json: m=99 regions, but"),
                (dict(m=None), "config.json: "),
                (dict(region_size=70), "region_size=.* does not fit"),
                (dict(region_size="large"), "region_size is 'large', but should be 1 to 8192"),
                (dict(l=2), "hybrid_head.weight is .* instead of"),
                (dict(lens=3), "uses lens, which this version does not know: install a newer fd_focus"),
            )
        ),
    ],
)
def test_foreign_values(folder, values, message):
    change(folder, **values)
    with pytest.raises(ValueError, match=message) as caught: load_focus(folder)
    assert str(folder) in str(caught.value)


# What a config of a few bytes could do

@pytest.mark.parametrize("values, message", [
    (dict(image_size=8192), "image_size is 8192, but should be .* at most 4 million in all"),
    (dict(image_size=[8192, 8192]), "image_size is .8192, 8192., but should be"),
    (dict(input_size=[8192, 8192]), "input_size is .8192, 8192., but should be .* at most 17 million in all"),
    (dict(resize=8192), "resize is 8192, but"),
    (dict(image_size=[2048, 2048], options=dict(image_size=[2048, 2048])), "the body's map has 16384 cells, and 3600"),
    (dict(options=dict(zoom_size=[2048, 2048])), "l=4 regions of zoom_size=.2048, 2048. have more than 8 million"),
    (dict(options=dict(zoom_size=8192)), "zoom_size is 8192, but should be"),
    (dict(options=dict(m=10**9, l=10**9)), "m=1000000000 regions, but"),
    (dict(arch_kwargs=dict(widths=[10**9] * 3)), "arch_kwargs is"),
    (dict(arch_kwargs=dict(widths=[8] * 10**5)), "arch_kwargs is"),
    (dict(arch_kwargs=dict(widths=[8192, 8192, 8192])), "asks for a network far larger than its weights"),
    (dict(classes=[str(i) for i in range(10**5)]), "tells 3 classes apart, but config.json names 100000"),
], ids=str)
def test_a_config_takes_no_memory(folder, values, message, monkeypatch):
    "Refused before anything is allocated for it: weights are not read, and no tensor of 100 MB is made."
    change(folder, **values)
    def refuse(*args): raise AssertionError("the weights were read")
    monkeypatch.setattr("fd_focus.use.weights.load_file", refuse)
    made, empty = [], torch.empty
    def watched(*args, **kwargs):
        if (tensor := empty(*args, **kwargs)).device.type != "meta": made.append(tensor.numel())
        return tensor
    monkeypatch.setattr(torch, "empty", watched)
    with pytest.raises(ValueError, match=message) as caught: load_focus(folder)
    assert str(folder) in str(caught.value) and max(made, default=0) < 25_000_000


def header(file, table):
    text = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def test_a_header_that_claims_gigabytes(folder, monkeypatch):
    weights = folder / "model.safetensors"
    size = 4 * 10**8 * 20
    table = {"image_head.weight": dict(dtype="F32", shape=[10**8, 20], data_offsets=[0, size])}
    start = header(weights, table)
    with pytest.raises(ValueError, match="model.safetensors is damaged, cut short"): load_focus(folder)
    with open(weights, "rb+") as stream: stream.truncate(start + size)          # a file of holes
    def refuse(*args): raise AssertionError("the weights were read")
    monkeypatch.setattr("fd_focus.use.weights.load_file", refuse)
    monkeypatch.setattr("fd_focus.use.weights._sha256", refuse)
    with pytest.raises(ValueError, match="model.safetensors does not fit its config.json: no "): load_focus(folder)
    header(weights, {"x": dict(dtype="F32", shape=[2**62, 2**62], data_offsets=[0, 4])})
    with pytest.raises(ValueError, match="model.safetensors is damaged"): load_focus(folder)


def test_a_large_text_is_no_config(folder):
    with open(folder / "config.json", "ab") as stream: stream.truncate(2**34)
    with pytest.raises(ValueError, match="config.json has 17180 MB, but such a file has 16 MB"): load_focus(folder)


def test_a_network_is_sketched_without_memory(dls, saved):
    config = json.loads((saved / "config.json").read_text())
    sketch = _sketch(config, None, 1_000_000)
    assert {t.device.type for t in sketch.parameters()} == {"meta"} and sketch.map_size == (4, 4)
    assert {b.device.type for b in sketch.buffers(recurse=False)} == {"cpu"}           # its grid and its table
    with _at_most(1000): pass
    nn.Linear(100, 100)                                      # the limit has gone with its block
    with pytest.raises(ValueError, match="far larger than its weights"), _at_most(1000): nn.Linear(100, 100)


class Tabled(Method):
    "Keeps a table that no file holds, and a tensor that is no buffer, from memory that it asks for itself."
    def __init__(self, body, n_classes, image_size=448):
        super().__init__(body, n_classes, image_size)
        self.head = nn.Linear(self.n_features, n_classes)
        self.register_buffer("table", torch.arange(1., n_classes + 1), persistent=False)
        self.scale = [torch.empty(1).fill_(2.)]
    def forward(self, x, target=None):
        logits = self.head(self.body(x).mean((2, 3))) * self.table * self.scale[0]
        return dict(image=logits) if self.training else logits


def test_what_no_file_holds_is_computed(dls, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS.places, "tabled", Tabled)
    learn, x = learner(dls, method="tabled"), torch.rand(2, 3, 64, 64)
    net = load_focus(save_focus(learn, tmp_path / "model"))
    assert net.table.tolist() == [1, 2, 3] and net.scale[0].tolist() == [2]
    with torch.no_grad(): assert torch.equal(net(x), learn.model.eval()(x))


def test_loading_draws_no_random_numbers_and_can_go_on_learning(saved):
    before = torch.get_rng_state()
    net = load_focus(saved)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.is_leaf and p.requires_grad and type(p) is nn.Parameter for p in net.parameters())
    net.train()(torch.rand(2, 3, 64, 64))["image"].sum().backward()
    assert net.body.conv1.weight.grad is not None and not any(b.requires_grad for b in net.buffers())


def test_what_is_loaded_does_not_hang_on_its_file(saved, tmp_path):
    net, want = load_focus(folder := shutil.copytree(saved, tmp_path / "model")), load_focus(saved).state_dict()
    with open(folder / "model.safetensors", "rb+") as file: file.write(b"\0" * 10_000_000)
    assert all(torch.equal(tensor, want[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("arch", ["regnet_y_400mf", "swin_t", "googlenet"])
def test_architectures_that_need_numbers_load_too(dls, tmp_path, arch):
    learn, x = learner(dls, arch=arch, method="plain"), torch.rand(2, 3, 64, 64)
    net = load_focus(save_focus(learn, tmp_path / "model"))
    with torch.no_grad(): assert torch.equal(net(x), learn.model.eval()(x))


class Spy(nn.Module):
    "Notes on which device it was asked; with a tensor of its own it works on that device alone."
    seen = []
    def __init__(self, own=False):
        super().__init__()
        self.conv, self.own = nn.Conv2d(3, 8, 8, 8), torch.ones(1) if own else 1.
        self.same = self.conv
    def forward(self, x):
        self.seen.append(x.device.type)
        return self.conv(x) * self.own


def test_a_dry_run_takes_no_memory(monkeypatch):
    monkeypatch.setattr(Spy, "seen", [])
    body = Spy()
    assert feature_shape(body, (8192, 8192)) == (8, 1024, 1024) and body.seen == ["meta"]
    assert feature_shape(body.half(), (64, 32)) == (8, 8, 4) and body.conv.weight.device.type == "cpu"
    body.seen.clear()
    assert feature_shape(Spy(own=True), (64, 32)) == (8, 8, 4) and body.seen == ["meta", "cpu"]


# Numbers that are none

@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["temperature", "a field of your own"])
def test_numbers_that_json_does_not_have(folder, text, field):
    written = (folder / "config.json").read_text()
    (folder / "config.json").write_text(written.replace("{", f'{{"{field}": {text}, ', 1))
    with pytest.raises(ValueError, match=f"config.json is not JSON: {text} is no number"): load_focus(folder)


@pytest.mark.parametrize("values, message", [
    (dict(temperature=1e-300), "temperature is 1e-300, but should be a number above 0: 0.001 to 1000"),
    (dict(temperature=-1), "temperature is -1"), (dict(temperature=1e300), "temperature is"),
    (dict(std=[1e-300, 1, 1]), "std is"), (dict(std=[-1, 1, 1]), "std is"), (dict(mean=[1e300, 0, 0]), "mean is"),
    (dict(temperature=float("nan")), "temperature is nan"), (dict(mean=[float("inf"), 0, 0]), "mean is"),
    (dict(std=[float("nan")] * 3), "std is"), (dict(threshold=float("nan")), "threshold is nan"),
    (dict(metrics=dict(accuracy=float("nan"))), "metrics is .'accuracy': nan"),
    (dict(look_again_below=float("nan")), "look_again_below is nan"),
], ids=str)
def test_numbers_that_give_no_answer(saved, values, message):
    config = json.loads((saved / "config.json").read_text()) | values
    with pytest.raises(ValueError, match=f"config.json: {message}"): check_config(config, "config.json")


@pytest.mark.parametrize("spoil, message", [
    (lambda t: t["body.conv1.weight"].view(-1).__setitem__(5, torch.nan), "has NaN or infinity in body.conv1.weight"),
    (lambda t: t["image_head.bias"].fill_(-torch.inf), "has NaN or infinity in image_head.bias"),
    (lambda t: t.update({"image_head.bias": torch.tensor([1e300] * 3, dtype=torch.float64)}),
     "has NaN or infinity in image_head.bias"),
    (lambda t: t["body.bn1.running_var"].fill_(-1), "has a negative variance in body.bn1.running_var"),
])
def test_weights_that_give_no_answer(folder, spoil, message):
    state = load_file(folder / "model.safetensors")
    spoil(state)
    save_file(state, folder / "model.safetensors")
    change(folder, drop=["sha256"])
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}/model.safetensors {message}"): load_focus(folder)


def test_a_diverged_network_is_not_saved(dls, folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    learn = learner(dls)
    with torch.no_grad(): learn.model.image_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="has NaN or infinity in image_head.weight"): save_focus(learn, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_mark_before_the_text(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    assert load_focus(folder).l == 4
    write_card(folder)


@pytest.mark.parametrize("threshold", [0, .5, 1, 1., 2, 2.])
def test_thresholds_of_now_and_before(folder, threshold):
    change(folder, threshold=threshold)
    assert load_focus(folder).about["threshold"] == threshold


@pytest.mark.parametrize(
    "by,word", [("test", "test"), ("valid", "validation"), ("train", "validation"), (None, "validation")]
)
def test_which_pictures_judged(dls, tmp_path, by, word, monkeypatch):
    "The learner's data say it; those of plain fastai, and folders of before, say nothing."
    learn = learner(dls)
    assert learn.dls.judged_by == "valid"
    monkeypatch.delattr(learn.dls, "judged_by") if by is None else monkeypatch.setattr(learn.dls, "judged_by", by)
    folder = save_focus(learn, tmp_path / "model", metrics=dict(accuracy=.5))
    about = load_focus(folder).about
    assert about.get("judged_by") == by and judges(about) == word
    assert f"Accuracy on {word} pictures: **50.0 %**." in (folder / "README.md").read_text()


CALIBRATION = Calibration(1.25, .8, .9, .75, .1, .05, sure_right=57, sure_of=63, right=72, pictures=80, wanted=.9)


def test_sure_says_what_it_rests_on(dls, tmp_path):
    folder = save_focus(learner(dls), tmp_path / "model", calibration=CALIBRATION)
    about, card = load_focus(folder).about, (folder / "README.md").read_text()
    assert (about["temperature"], about["threshold"]) == (1.25, .8)
    assert about["evidence"] == dict(right=57, of=63, pictures=80, wanted=.9)
    assert about["metrics"] == dict(accuracy=.9, valid_images=80)
    assert rests_on(about) == "right in 57 of 63 such validation pictures"
    assert "Answers that count as sure: from 80 % on (right in 57 of 63 such validation pictures)." in card
    assert "Accuracy on 80 validation pictures: **90.0 %**." in card
    change(folder, judged_by="test")
    assert rests_on(load_focus(folder).about) == "right in 57 of 63 such test pictures"
    change(folder, threshold=2)
    assert rests_on(load_focus(folder).about) == "80 test pictures could not promise 90 % for any limit"
    assert "Answers that count as sure: none (80 test pictures could not promise" in write_card(folder).read_text()
    change(folder, drop=["evidence"])                                        # a folder of before
    assert rests_on(load_focus(folder).about) == "" and "count as sure: none." in write_card(folder).read_text()
    change(folder, drop=["threshold"])
    assert rests_on(load_focus(folder).about) == "" and "count as sure" not in write_card(folder).read_text()
    with pytest.raises(ValueError, match="give calibration, or temperature and threshold"):
        save_focus(learner(dls), tmp_path / "other", threshold=.5, calibration=CALIBRATION)
    assert not (tmp_path / "other").exists()


def test_the_accuracy_is_known_from_training(dls, tmp_path):
    "From the last epoch; what is given, or calibrated, is believed more."
    learn = learner(dls, settle=False)
    def kept(**given): return load_focus(save_focus(learn, tmp_path / "model", **given)).about["metrics"]
    assert kept() == {}
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-4)
    values = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert kept() == dict(accuracy=values["accuracy"])
    assert f"pictures: **{100 * values['accuracy']:.1f} %**" in (tmp_path / "model" / "README.md").read_text()
    assert kept(metrics={}) == {} and kept(metrics=dict(accuracy=.5)) == dict(accuracy=.5)
    assert kept(calibration=CALIBRATION)["accuracy"] == .9
    learn.validate(0)                                                        # of training pictures: nothing to tell
    assert kept() == {}
    learn.metrics = []
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
    assert kept() == {}


def test_pictures_put_aside_are_added_later(folder):
    before = json.loads((folder / "config.json").read_text())
    card = add_metrics(folder, test_accuracy=np.float32(.5), test_interval=(.25, .75), test_images=40).read_text()
    assert ("Accuracy on 40 pictures that were put aside, on which nothing was trained or chosen: **50.0 %** "
            "(95 % interval 25.0 to 75.0).") in card and "Accuracy on validation pictures: **87.5 %**." in card
    after = json.loads((folder / "config.json").read_text())
    assert after == before | dict(metrics=dict(accuracy=.875, test_accuracy=.5, test_interval=[.25, .75],
                                               test_images=40))
    assert load_focus(folder).about == after
    for wrong in (float("nan"), "half", object()):
        with pytest.raises(ValueError, match="metrics is|test_accuracy is"): add_metrics(folder, test_accuracy=wrong)
        assert json.loads((folder / "config.json").read_text()) == after


def test_a_card_shows_the_settings_of_its_pictures(dls, tmp_path):
    "All settings are recorded; the card has those that made the model."
    from dataclasses import asdict
    for data, there, not_there in (
        ("birds", ("balance", "valid_pct"), ("mark_size", "clutter", "n_classes", "split", "workers", "cache", "log")),
        ("toy", ("mark_size", "clutter", "split"), ("balance", "on_duplicate", "workers", "channels_last")),
    ):
        settings = asdict(Settings(data=data, **(dict(valid_pct=.2) if data == "birds" else {})))
        folder = save_focus(learner(dls), tmp_path / "model", settings=settings)
        card = (folder / "README.md").read_text()
        for name in ("data", "arch", "lr", "epochs"): assert (f"| {name} |" in card) == (settings[name] is not None)
        for name in there: assert f"| {name} |" in card
        for name in not_there: assert f"| {name} |" not in card
        assert json.loads((folder / "config.json").read_text())["settings"] == settings


def test_a_card_tells_how_to_install_what_it_needs(folder):
    card = (folder / "README.md").read_text()
    assert "`pip install .` in a clone of [fd_focus](https://github.com/" in card and "pip install fd_focus" not in card


@pytest.mark.skipif(os.name != "posix", reason="rights are those of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_others_may_read_what_new_files_let_them(dls, tmp_path, mask):
    "Every file of the folder has the rights of a new file, also where it is written again."
    Image.new("RGB", (8, 8)).save(tmp_path / "regions.png")
    before = os.umask(mask)
    try:
        for _ in range(2): folder = save_focus(learner(dls), tmp_path / "model", picture=tmp_path / "regions.png")
        add_metrics(folder, test_images=3)
    finally: os.umask(before)
    files = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert files == dict.fromkeys(["README.md", "config.json", "model.safetensors", "regions.png"], 0o666 & ~mask)


@pytest.mark.parametrize("value, name", [
    (dict(metrics=dict(accuracy=.5, loss=float("nan"))), r"metrics.loss is nan"),
    (dict(metrics=dict(curve=[.5, np.float64("inf")])), r"metrics.curve\[1\] is inf"),
    (dict(settings=dict(lr=-np.inf)), "settings.lr is -inf"),
    (dict(settings=dict(callback=print)), "settings.callback is <built-in function print>"),
    (dict(metrics=dict(matrix=torch.tensor([[0., torch.nan]]))), r"metrics.matrix\[0\]\[1\] is nan"),
], ids=str)
def test_what_json_has_no_word_for_is_named_and_not_written(dls, folder, value, name):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=rf"config.json: {name}, which JSON has no word for"):
        save_focus(learner(dls), folder, **value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_numbers_of_other_libraries_are_written(dls, tmp_path):
    folder = save_focus(learner(dls), tmp_path / "model", temperature=torch.tensor(1.5), threshold=np.float32(.5),
                        metrics=dict(accuracy=np.float64(.25), sizes=(1, 2)), settings=dict(data=Path("birds")))
    about = load_focus(folder).about
    assert (about["temperature"], about["threshold"], about["settings"]) == (1.5, .5, dict(data="birds"))
    assert about["metrics"] == dict(accuracy=.25, sizes=[1, 2]) and as_json({1: {"a": None}}) == {"1": {"a": None}}


# The banner below each picture of a benchmark

def aircraft(dls, folder):
    "A model of pictures with a banner of 20 pixels below each."
    learn = learner(dls)
    learn.dls.table = learn.dls.table.copy()
    learn.dls.table.attrs["banner"] = 20
    return save_focus(learn, folder)


def test_a_banner_is_recorded_and_cut_where_the_user_says_so(dls, folder, tmp_path):
    "A photograph from elsewhere keeps its lowest pixels; one with a banner answers as without it, whatever its size."
    planes = aircraft(dls, tmp_path / "planes")
    assert json.loads((planes / "config.json").read_text())["banner"] == 20
    assert "banner" not in json.loads((folder / "config.json").read_text())
    rng = np.random.default_rng(0)
    for width, height in ((100, 90), (640, 500), (70, 20)):
        view = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
        with_banner = Image.new("RGB", (width, height + 20), "white")
        with_banner.paste(view)
        for name, picture in (("view", view), ("banner", with_banner)): picture.save(tmp_path / f"{name}.png")
        whole, cut = (FocusClassifier.load(planes, "cpu", banner=banner) for banner in (False, True))
        want, got = whole.predict(tmp_path / "view.png"), cut.predict(tmp_path / "banner.png")
        assert torch.allclose(want.probabilities, got.probabilities, atol=1e-6)
        assert torch.allclose(want.boxes, got.boxes) and torch.allclose(want.view, got.view)
        assert got.size == (height + 20, width)                              # of the file, as its boxes are
        assert not torch.equal(whole.pixels(with_banner), cut.pixels(with_banner))
        assert torch.equal(whole.pixels(view), FocusClassifier.load(folder, "cpu").pixels(view))
    large = Image.new("RGB", (1200, 920), "white")
    large.paste(Image.new("RGB", (1200, 900)))
    large.save(tmp_path / "large.jpg", quality=100, subsampling=0)           # decoded at reduced scale
    assert cut.pixels(tmp_path / "large.jpg").max() < .1 < whole.pixels(tmp_path / "large.jpg").max()
    with pytest.raises(ValueError, match="banner=True, but this model was trained on pictures without one"):
        FocusClassifier.load(folder, "cpu", banner=True)


# The name of the body

@pytest.mark.parametrize(
    "arch,cut",
    [
        ("toy_resnet", None),
        ("toy_resnet", "layer2"),
        ("resnet18", "layer3"),
        ("mobilenet_v2", 7),
        ("densenet121", None),
        ("googlenet", None),
        ("swin_t", None),
        ("regnet_y_400mf", None),
        ("mobilenetv3_small_050", None),
        ("convnextv2_atto", None),
    ],
)
def test_a_right_name_is_taken(arch, cut):
    "Built without numbers or a download, and without a step of the random numbers. (RegNet needs its numbers.)"
    if arch in ("mobilenetv3_small_050", "convnextv2_atto"): pytest.importorskip("timm")
    body = create_body(arch, pretrained=False, cut=cut)[0]
    state = torch.get_rng_state()
    _check_arch(body, arch, cut)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "arch,cut,other,message",
    [
        (
            "toy_resnet",
            None,
            ("resnet18", None),
            r"arch='resnet18', cut=None makes another body than the network has \(layer4: a layer instead of none",
        ),
        (
            "resnet18",
            "layer3",
            ("resnet18", None),
            "cut=None makes another body than the network has .layer4: a layer instead of none",
        ),
        (
            "resnet18",
            None,
            ("resnet18", "layer3"),
            "cut='layer3' makes another body than the network has .layer4: none instead of a layer",
        ),
        ("resnet18", None, ("resnet34", None), r"layer1.2.conv1.weight: \(64, 64, 3, 3\) instead of none"),
        ("resnet50", None, ("wide_resnet50_2", None), r"\(128, 64, 1, 1\) instead of \(64, 64, 1, 1\)"),
        ("resnet18", 4, ("resnet18", 3), "maxpool: none instead of a layer"),  # a pooling has no weights
        ("resnet18", None, ("resnet18", "layer9"), "cut='layer9' is none of the body's layers"),
        ("resnet18", None, ("mobilenet_v2", None), "0: a layer instead of none"),
    ],
)
def test_a_wrong_name_is_refused(arch, cut, other, message):
    with pytest.raises(ValueError, match=message): _check_arch(create_body(arch, pretrained=False, cut=cut)[0], *other)


def test_a_refused_name_leaves_the_folder_alone(dls, folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for arch, cut in (("resnet18", None), (None, 4)):
        with pytest.raises(ValueError, match="makes another body than the network has"):
            save_focus(learner(dls), folder, arch, cut)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_source_that_lies_is_found_out(dls, tmp_path):
    "A layer was exchanged after create_body: the folder would build another body."
    learn = learner(dls)
    learn.model.body.layer3 = nn.Conv2d(64, 128, 2, 2)
    with pytest.raises(ValueError, match="makes another body than the network has"):
        save_focus(learn, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_function_of_ones_own_has_a_name_of_ones_own(dls, tmp_path):
    "Any name that nobody else has, and a warning of what loading will need."
    def mine(): return torchvision.models.squeezenet1_1(weights=None)
    learn = learner(dls, arch=mine)
    with pytest.warns(UserWarning, match=r"arch='mine' is no model of torchvision.*load_focus\(folder, body=...\)"):
        folder = save_focus(learn, tmp_path / "mine", "mine")
    assert load_focus(folder, body=create_body(mine, pretrained=False)[0]).n_features == 512
    with pytest.raises(ValueError, match="toy_resnet.*or another name for a body of your own"):
        save_focus(learner(dls, arch=toy_resnet((8, 16))), tmp_path / "toy", "toy_resnet")
    bare = torchvision.models.squeezenet1_1(
        weights=None
    ).features  # a body without a source, but with a name that is known
    net = load_focus(save_focus(learner(dls, arch=bare), tmp_path / "known", "squeezenet1_1"))
    assert net.n_features == 512


def test_damaged_files(folder, tmp_path):
    weights, config = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()
    def message(error=ValueError):
        with pytest.raises(error) as caught: load_focus(folder)
        return str(caught.value)
    for n in (0, 7, 100, len(weights) // 2, len(weights) - 1):
        (folder / "model.safetensors").write_bytes(weights[:n])
        assert "model.safetensors is damaged, cut short, or no safetensors file" in message(), n
    for place in (len(weights) // 2, len(weights) - 1):      # one bit of one number
        (folder / "model.safetensors").write_bytes(weights[:place] + bytes([weights[place] ^ 64]) + weights[place + 1:])
        assert "its sha256 differs" in message()
    (folder / "model.safetensors").write_bytes(weights)
    for n in (0, 1, len(config) // 2, len(config) - 1):
        (folder / "config.json").write_text(config[:n])
        assert "config.json is not JSON" in message()
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is not JSON" in message()
    for text in ("[]", "7", "null", '{"model_type": "vit"}'):
        (folder / "config.json").write_text(text)
        assert "config.json is not of fd_focus" in message()
    (folder / "config.json").write_text('{"format": "fd_focus", "arch": "resnet50", "classes": ["a", "b"]}')
    assert "lacks image_size, mean, method, options, std" in message()
    (folder / "config.json").write_text("[" * 100_000)
    assert "config.json is not JSON" in message()
    (folder / "config.json").unlink()
    assert "no config.json in" in message(FileNotFoundError)
    assert "no model folder" in (shutil.rmtree(folder), message(FileNotFoundError))[1]
    folder.write_text("a file")
    assert "no model folder" in message(FileNotFoundError)


class Bomb:
    "Unpickling it leaves a mark."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return (open, (str(self.mark), "w"))


def test_planted_pickles_do_not_run(folder, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb).close()
    assert mark.exists()                                   # the bomb is live
    mark.unlink()
    archive = io.BytesIO()
    torch.save({"image_head.weight": torch.zeros(3, 128), "x": Bomb(mark)}, archive)
    for name in ("model.pth", "model.pkl", "export.pkl", "pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(bomb)
    for name in (
        "config.py",
        "model.py",
        "modeling_fd_focus.py",
        "__init__.py",
        "sitecustomize.py",
        "toy_resnet.py",
        "json.py",
    ):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')")
    def refuse(*args, **kwargs): raise AssertionError("a pickle was opened")
    class Refuse(pickle.Unpickler):                        # libraries subclass it when they are imported
        __init__ = load = refuse

    for name, value in dict(load=refuse, loads=refuse, Unpickler=Refuse).items():
        monkeypatch.setattr(pickle, name, value)
    with pytest.raises(AssertionError, match="a pickle was opened"): pickle.Unpickler(io.BytesIO(bomb))
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.chdir(folder)                              # nor is anything imported from there
    assert load_focus(folder).classes and load_focus(".").classes
    for content in (bomb, archive.getvalue()):
        good = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors file"): load_focus(folder)
        (folder / "model.safetensors").write_bytes(good)
        text = (folder / "config.json").read_bytes()
        (folder / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match="is not JSON"): load_focus(folder)
        (folder / "config.json").write_bytes(text)
    for arch in (f"__import__('pathlib').Path('{mark}').touch()", "builtins.exec", "timm.models.load"):
        change(folder, arch=arch)
        with pytest.raises(ValueError, match="is no model of torchvision"): load_focus(folder)
    change(folder, arch="toy_resnet", classes=[f"{{{{open('{mark}','w')}}}}", "{0.__class__}", "`x`"])
    write_card(folder)
    assert not mark.exists()


def test_card(dls, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "regions.png")
    folder = save_focus(
        learner(dls),
        tmp_path / "model",
        None,
        None,
        dict(accuracy=0.8754),
        picture=tmp_path / "regions.png",
        settings=dict(data="/home/somebody/secret/birds", epochs=3, cut=None),
    )
    card = (folder / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: fd_focus\n")
        and "**87.5 %**" in card
        and "toy_resnet, 3 classes" in card
        and "method `focus`" in card
    )
    assert "](regions.png)" in card and (folder / "regions.png").is_file()
    assert "| epochs | 3 |" in card and "| data | birds |" in card and "| cut |" not in card
    assert "somebody" not in card + (folder / "config.json").read_text()
    assert all(name in card for name in load_focus(folder).classes) and "FocusClassifier.load" in card
    code = card.split("```python\n")[1].split("```")[0]
    Image.new("RGB", (80, 80)).save(tmp_path / "photograph.jpg")
    exec(code.replace("this/folder", str(folder)).replace("photograph.jpg", str(tmp_path / "photograph.jpg")), {})


def test_a_card_says_what_it_was_given(folder):
    "Names with a meaning to Markdown, HTML, YAML or a terminal change nothing but themselves."
    evil = "a|b\n## Mine\n---\n`x` <script>alert(1)</script> ![i](https://e.example/i) \x1b[31m \u202e www.e.example"
    settings = {evil: evil, "data": "www.e.example", "note": "x_y_", "lr": .001, "arch": "tf_efficientnet.in1k"}
    change(folder, classes=["crow\n```\n# Not a heading", evil, "wren"], settings=settings, arch=evil, method=evil,
           versions=dict(fd_focus=evil))
    card = write_card(folder).read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == dict(library_name="fd_focus", pipeline_tag="image-classification",
                                         tags=["fine-grained-classification"])
    assert not re.search("[\x1b\u202e]", card)
    outside = re.sub(r"```.*?```", "", body, flags=re.S)                       # as a reader of Markdown sees it
    assert outside.count("\n#") == 3 and "\n---" not in outside                # Use it, Classes, Recipe
    plain = re.sub(r"`[^`\n]*`", "", outside)
    assert not re.search(r"<|!\[|e\.example|Mine", plain)
    rows = [row for row in outside.splitlines() if row.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows) and len(rows) == 1 + len(settings)
    assert "| lr | 0.001 |" in card and "| arch | tf_efficientnet.in1k |" in card and "| note | `x_y_` |" in card
    assert "| data | `www.e.example` |" in card


def test_a_card_needs_no_versions_and_takes_every_name(folder):
    change(folder, drop=["versions"], classes=["\udcff", "b", "c"])
    assert "# toy_resnet, 3 classes" in write_card(folder).read_text()


def test_a_card_shows_no_picture_of_an_earlier_model(dls, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "regions.png")
    folder = save_focus(learner(dls), tmp_path / "model", picture=tmp_path / "regions.png")
    save_focus(learner(dls, method="plain"), folder)
    assert "regions.png" not in (folder / "README.md").read_text() and not (folder / "regions.png").exists()


def test_a_card_is_utf8_whatever_the_machine_writes(folder, monkeypatch):
    change(folder, classes=["Blaumeise", "Käuzchen", "鷹"])
    monkeypatch.setattr(
        "pathlib.Path.write_text",
        lambda path, text, encoding="ascii", **kwargs: path.write_bytes(text.encode(encoding)),
    )
    monkeypatch.setattr(
        "pathlib.Path.read_text", lambda path, encoding="ascii", **kwargs: path.read_bytes().decode(encoding)
    )
    write_card(folder)
    assert "Käuzchen\n鷹" in (folder / "README.md").read_text(encoding="utf-8")


def test_hub(folder, tmp_path, monkeypatch):
    hub = types.ModuleType("huggingface_hub")
    asked, sent = [], []
    def snapshot_download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        if name != "somebody/birds": raise RuntimeError("404 Not Found\nmore of it")
        return str(folder)
    hub.snapshot_download = snapshot_download
    hub.create_repo = lambda repo_id, **kwargs: sent.append((repo_id, kwargs)) or f"https://hub/{repo_id}"
    hub.upload_folder = lambda **kwargs: sent.append(kwargs)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert load_focus("somebody/birds", revision="v1").classes == load_focus(folder).classes
    assert asked == [("somebody/birds", "v1", ["config.json", "model.safetensors", "known.safetensors"])]
    with pytest.raises(
        FileNotFoundError,
        match="no model folder nobody/birds, and the Hugging Face hub did not give it: 404 Not Found$",
    ):
        load_focus("nobody/birds")
    asked.clear()
    (tmp_path / "runs").mkdir()
    for name in ("runs/birds", tmp_path / "birds", "birds", "a/b/c"):        # meant as places on this machine
        with pytest.raises(FileNotFoundError, match="no model folder"): load_focus(name)
    assert not asked
    assert push_to_hub(folder, "somebody/birds", commit_message="first") == "https://hub/somebody/birds"
    assert sent[0][1]["private"] is True and sent[1]["commit_message"] == "first"
    assert sent[1]["allow_patterns"] == ["config.json", "model.safetensors", "known.safetensors", "README.md"]
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"): push_to_hub(folder, "somebody/birds")
    assert len(sent) == 2
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"): load_focus("somebody/birds")


@pytest.fixture
def hub(monkeypatch):
    "What a hub would receive: name -> bytes."
    module, received = types.ModuleType("huggingface_hub"), {}
    module.create_repo = lambda repo_id, **kwargs: f"https://hub/{repo_id}"
    def upload_folder(folder_path, allow_patterns, **kwargs):
        received.clear()
        received.update({file.name: file.read_bytes() for file in sorted(Path(folder_path).iterdir())
                         if any(fnmatch(file.name, pattern) for pattern in allow_patterns)})
    module.upload_folder = upload_folder
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", module)
    return received


def test_photographs_are_published_only_where_asked_for(folder, tmp_path, hub):
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn.png", exif=b"Exif\0\0secret place")
    write_card(folder, tmp_path / "drawn.png")
    (folder / "examples").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "examples/a.jpg")
    (folder / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="regions.png shows photographs of the validation set, so it stays here"):
        push_to_hub(folder, "somebody/birds")
    assert set(hub) == {"README.md", "config.json", "model.safetensors"} and b"regions.png" not in hub["README.md"]
    push_to_hub(folder, "somebody/birds", pictures=True)
    assert set(hub) == {"README.md", "config.json", "model.safetensors", "regions.png"}
    assert b"](regions.png)" in hub["README.md"] and b"secret place" not in hub["regions.png"]
    (folder / "regions.png").write_text("no picture")
    with pytest.raises(ValueError, match="regions.png cannot be read as a picture"):
        push_to_hub(folder, "somebody/birds", pictures=True)


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "regions.png"])
def test_a_link_is_not_published(folder, tmp_path, hub, name):
    Image.new("RGB", (8, 8)).save(folder / "regions.png")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name} is no file of this folder, but a link to .*secret"):
        push_to_hub(folder, "somebody/birds", pictures=True)
    assert not hub
    if name == "README.md": return
    assert load_focus(folder).l == 4                        # the hub's own cache is made of links


def adaptive(dls, limit, **kwargs): return learner(dls, m=4, l=2, answer="adaptive", look_again_below=limit, **kwargs)


def test_the_limit_stands_beside_the_temperature_and_comes_back(dls, tmp_path):
    "Set after training, as calibration does; a mixed batch answers alike, bit for bit."
    learn, x = adaptive(dls, .9), torch.rand(6, 3, 64, 64)
    with torch.no_grad(): sure = learn.model.look(x).heads["image"].softmax(1).amax(1)
    learn.model.look_again_below = sure.median().item() + 1e-6
    folder = save_focus(learn, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["look_again_below"] == learn.model.look_again_below and "look_again_below" not in config["options"]
    net = load_focus(folder)
    with torch.no_grad(): ours, theirs = net.look(x), learn.model.look(x)
    assert 0 < ours.looked_again.sum() < 6 and torch.equal(ours.looked_again, theirs.looked_again)
    assert torch.equal(ours.answer, theirs.answer) and net.config() == learn.model.config()


def test_an_old_folder_has_the_limit_among_its_options(dls, tmp_path):
    folder = save_focus(adaptive(dls, .9), tmp_path / "model")
    change(folder, drop=["look_again_below"], options=dict(look_again_below=.4))
    assert load_focus(folder).look_again_below == .4
    change(folder, look_again_below=.4)                   # in both places, alike
    assert load_focus(folder).look_again_below == .4
    change(folder, look_again_below=.7)
    with pytest.raises(ValueError, match="config.json: look_again_below is 0.7, but 0.4 among the options"):
        load_focus(folder)


@pytest.mark.parametrize("limit", [-.1, "0.9", True, None, [.9]], ids=str)
def test_a_limit_that_is_none(dls, tmp_path, limit):
    folder = save_focus(adaptive(dls, .9), tmp_path / "model")
    change(folder, look_again_below=limit)
    with pytest.raises(ValueError, match="look_again_below is .*, but should be a number from 0"): load_focus(folder)


def test_a_limit_that_would_do_nothing(dls, folder, tmp_path):
    "A network that treats all pictures alike has no use for one; its option of that name stays where it was."
    assert "look_again_below" in json.loads((folder / "config.json").read_text())["options"]
    for place in (folder, save_focus(learner(dls, method="plain"), tmp_path / "plain")):
        change(place, look_again_below=.9)
        with pytest.raises(ValueError, match="look_again_below is 0.9, but only answer='adaptive' looks again"):
            load_focus(place)


@pytest.mark.parametrize("limit, said", [
    (.873, "A second look: where its first look is less than 87.3 % sure."),
    (0, "A second look: never."), (2., "A second look: always.")])
def test_the_card_says_when_it_looks_again(dls, tmp_path, limit, said):
    folder = save_focus(adaptive(dls, limit), tmp_path / "model")
    assert said in (folder / "README.md").read_text() and load_focus(folder).look_again_below == limit


def test_the_card_of_others_says_nothing_of_it(folder): assert "second look" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("limit", [np.float64(.625), np.float32(.625), torch.tensor(.625)], ids=["64", "32", "tensor"])
def test_a_limit_of_another_library_is_a_number(dls, tmp_path, limit):
    learn = adaptive(dls, .9)
    learn.model.look_again_below = limit
    assert load_focus(save_focus(learn, tmp_path / "model")).look_again_below == .625


@pytest.mark.parametrize("limit", [None, "0.9", -1, True, float("nan")], ids=str)
def test_a_limit_that_is_none_is_not_saved(dls, tmp_path, limit):
    learn = adaptive(dls, .9)
    learn.model.look_again_below = limit
    with pytest.raises(ValueError, match="look_again_below is .*, (but should be a number|which JSON)"):
        save_focus(learn, tmp_path / "model")
    assert not (tmp_path / "model").exists()
