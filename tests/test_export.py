"Model folders: nothing is lost, nothing runs, and what is wrong is named."
import inspect
import io
import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import shaken
from PIL import Image

from fd_focus.use.cli import fd_focus_export
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.use.model_folder import (FocusPipeline, _check_arch, check_parity, export_model, fold_batch_norm, judges, load_focus, push_to_hub, run_exported, save_focus, toy_images,
                             write_card)
from fd_focus.training.learner import focus_learner
from fd_focus.model import FocusNet, PlainNet, create_body, toy_resnet
from fd_focus.use.predict import FocusClassifier


@pytest.fixture(scope="module")
def dls(): return FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2)


def learner(dls, settle=True, **kwargs):
    torch.manual_seed(0)
    learn = focus_learner(dls, kwargs.pop("arch", "toy_resnet"), pretrained=False, **kwargs)
    if settle: shaken(learn.model)
    return learn


@pytest.fixture(scope="module")
def saved(dls, tmp_path_factory): return save_focus(learner(dls), tmp_path_factory.mktemp("saved") / "model", "toy_resnet", metrics=dict(accuracy=.875))


@pytest.fixture
def folder(saved, tmp_path): return shutil.copytree(saved, tmp_path / "model")


def change(folder, drop=(), **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


OTHER = dict(region_size=30, second_region_size=24, zoom_size=40, m=8, l=2, iou_threshold=.5, sigma=0., attention="single", fusion="sum", order="place",
             hybrid=False, crop_norm="separate", crop_grad=False, answer="ensemble")


def test_every_argument_survives(dls, tmp_path):
    "One model a value away from every default, and both models answer alike after loading."
    defaults = {n: p.default for n, p in inspect.signature(FocusNet.__init__).parameters.items() if p.default is not inspect.Parameter.empty}
    assert set(defaults) == set(OTHER) | {"image_size"}, "a new argument of FocusNet: give it a value here"
    x = torch.rand(2, 3, 64, 64)
    for kwargs in ({name: value} for name, value in OTHER.items()):
        if set(kwargs) == {"fusion"}: kwargs["l"] = 3
        learn = learner(dls, net_kwargs=kwargs)
        net = load_focus(save_focus(learn, tmp_path / next(iter(kwargs)), "toy_resnet"))
        assert {name: net.arguments[name] for name in kwargs} == {n: (v, v) if n.endswith("_size") else v for n, v in kwargs.items()}
        with torch.no_grad(): assert torch.allclose(net(x), learn.model(x), atol=1e-5)
    net = load_focus(save_focus(learner(dls, net_kwargs=OTHER), tmp_path / "all", "toy_resnet"))
    assert not net.training and net.hybrid_head is None and net.suppresses.shape == (16, 16) and net.grid[0, 2] == 30


def test_plain_and_custom_body(dls, tmp_path):
    learn = learner(dls, plain=True)
    net = load_focus(save_focus(learn, tmp_path / "plain", "toy_resnet"))
    x = torch.rand(1, 3, 64, 64)
    assert isinstance(net, PlainNet) and torch.allclose(net(x), learn.model(x), atol=1e-5)
    learn = learner(dls, arch=toy_resnet((8, 16)))
    folder = save_focus(learn, tmp_path / "own", "my own body")
    with pytest.raises(ValueError, match="config.json: arch='my own body' is no model of torchvision"): load_focus(folder)
    net = load_focus(folder, body=toy_resnet((8, 16)))
    assert net.n_features == 16
    with pytest.raises(ValueError, match="does not fit its config.json"): load_focus(folder, body=toy_resnet((8, 20)))


def test_old_call_and_what_the_config_holds(saved):
    config = json.loads((saved / "config.json").read_text())
    assert {"arch", "classes", "image_size", "region_size", "zoom_size", "m", "l", "mean", "std", "versions", "metrics"} <= set(config)
    assert "temperature" not in config and config["metrics"] == dict(accuracy=.875) and {"torch", "fd_focus"} <= set(config["versions"])
    assert config["mean"] == [.485, .456, .406]
    assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_folder_of_before(folder):
    "Folders written before a key existed still load."
    change(folder, drop=("arguments", "sha256", "resize", "input_size", "squash", "order", "crop_grad"))
    assert load_focus(folder).l == 4


@pytest.mark.parametrize("values,message", [
    (dict(classes=["a", "a", "b"]), "classes is .'a', 'a', 'b'., but should be a list of two or more different names"),
    (dict(classes="abc"), "classes is 'abc', but should be"), (dict(image_size=[64, 1e9]), "image_size is .64, 1000000000.0., but should be 1 to 8192"),
    (dict(image_size=-1), "image_size is -1, but"), (dict(std=[1, 0, 1]), "std is .1, 0, 1., but should be three numbers above 0"),
    (dict(mean=[1, None, 1]), "mean is"), (dict(arch=["resnet50"]), "arch is"), (dict(arch="os.system"), "'os.system' is no model of torchvision"),
    (dict(arch="hf_hub:somebody/model"), "is no model of torchvision"), (dict(arch="../model"), "is no model of torchvision"),
    (dict(cut="layer9"), "config.json: cut='layer9' is none of the body's layers"), (dict(m="6"), "m is '6', but should be int"), (dict(l=True), "l is True, but should be int"),
    (dict(sigma="wide"), "sigma is 'wide', but should be int or float"), (dict(fusion="vote"), "fusion='vote' is none of"), (dict(l=9), "l=9 regions are to be used of m=6"),
    (dict(m=99), "config.json: m=99 regions, but"), (dict(region_size=70), "region_size=.* does not fit"), (dict(temperature=0), "temperature is 0, but should be a number above 0"),
    (dict(threshold=95), "threshold is 95, but should be a number from 0 to 1, or 2: no answer is sure"), (dict(threshold=1.5), "threshold is 1.5"), (dict(threshold=True), "threshold is True"),
    (dict(judged_by="eye"), "judged_by is 'eye', but should be 'valid', 'test' or 'train'"), (dict(judged_by=["test"]), "judged_by is"), (dict(squash="yes"), "squash is 'yes'"), (dict(plain=1), "plain is 1, but should be true or false"),
    (dict(format="onnx"), "is not of fd_focus"), (dict(l=2), "does not fit its config.json.*hybrid_head"), (dict(arch="resnet18", m=4), "does not fit its config.json"),
    (dict(classes=["a", "b"]), "tells 3 classes apart, but config.json names 2"), (dict(sha256="0"), "its sha256 differs"),
    *((dict(metrics=dict(accuracy=value)), "metrics is .'accuracy': .*, but should be a table, its accuracy a number or null") for value in ("0.9", [.9], True, float("nan"))),
    (dict(plain=True), "does not fit its config.json.*Unexpected"), (dict(arguments=["lens"], lens=3), "uses lens, which this version does not know: pip install --upgrade")])
def test_foreign_values(folder, values, message):
    change(folder, **values)
    with pytest.raises(ValueError, match=message) as caught: load_focus(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("threshold", [0, .5, 1, 1., 2, 2.])
def test_thresholds_of_now_and_before(folder, threshold):
    change(folder, threshold=threshold)
    assert load_focus(folder).config["threshold"] == threshold


@pytest.mark.parametrize("by,word", [("test", "test"), ("valid", "validation"), ("train", "validation"), (None, "validation")])
def test_which_pictures_judged(dls, tmp_path, by, word, monkeypatch):
    "The learner's data say it; those of plain fastai, and folders of before, say nothing."
    learn = learner(dls)
    assert learn.dls.judged_by == "valid"
    monkeypatch.delattr(learn.dls, "judged_by") if by is None else monkeypatch.setattr(learn.dls, "judged_by", by)
    folder = save_focus(learn, tmp_path / "model", "toy_resnet", metrics=dict(accuracy=.5))
    assert load_focus(folder).config.get("judged_by") == by
    assert f"Accuracy on {word} pictures: **50.0 %**." in (folder / "README.md").read_text() and judges(load_focus(folder).config) == word


# The name of the body

@pytest.mark.parametrize("arch,cut", [("toy_resnet", None), ("toy_resnet", "layer2"), ("resnet18", "layer3"), ("mobilenet_v2", 7), ("densenet121", None), ("googlenet", None),
                                      ("swin_t", None), ("regnet_y_400mf", None), ("mobilenetv3_small_050", None), ("convnextv2_atto", None)])
def test_a_right_name_is_taken(arch, cut):
    "As it was built, without numbers or a download, and without a step of the random numbers; RegNet cannot be built without numbers."
    if arch in ("mobilenetv3_small_050", "convnextv2_atto"): pytest.importorskip("timm")
    body = create_body(arch, pretrained=False, cut=cut)[0]
    state = torch.get_rng_state()
    _check_arch(body, arch, cut)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arch,cut,other,message", [
    ("toy_resnet", None, ("resnet18", None), r"arch='resnet18', cut=None makes another body than the network has \(layer4: a layer instead of none\); give the arch and cut it was made with"),
    ("resnet18", "layer3", ("resnet18", None), "cut=None makes another body than the network has .layer4: a layer instead of none"),
    ("resnet18", None, ("resnet18", "layer3"), "cut='layer3' makes another body than the network has .layer4: none instead of a layer"),
    ("resnet18", None, ("resnet34", None), r"layer1.2.conv1.weight: \(64, 64, 3, 3\) instead of none"), ("resnet50", None, ("wide_resnet50_2", None), r"\(128, 64, 1, 1\) instead of \(64, 64, 1, 1\)"),
    ("resnet18", 4, ("resnet18", 3), "maxpool: none instead of a layer"),                                        # a pooling has no weights
    ("resnet18", None, ("resnet18", "layer9"), "cut='layer9' is none of the body's layers"), ("resnet18", None, ("mobilenet_v2", None), "0: a layer instead of none")])
def test_a_wrong_name_is_refused(arch, cut, other, message):
    with pytest.raises(ValueError, match=message): _check_arch(create_body(arch, pretrained=False, cut=cut)[0], *other)


def test_a_refused_name_leaves_the_folder_alone(dls, folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for arch, cut in (("resnet18", None), ("toy_resnet", 4)):
        with pytest.raises(ValueError, match="makes another body than the network has"): save_focus(learner(dls), folder, arch, cut)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_body_of_ones_own_has_a_name_of_ones_own(dls, tmp_path):
    "A function that makes the model: any name that nobody else has, and a warning of what loading will need."
    def mine(): return torchvision.models.squeezenet1_1(weights=None)
    learn = learner(dls, arch=mine)
    with pytest.warns(UserWarning, match=r"arch='mine' is no model of torchvision.*load_focus\(folder, body=...\)"): folder = save_focus(learn, tmp_path / "mine", "mine")
    assert load_focus(folder, body=create_body(mine, pretrained=False)[0]).n_features == 512
    with pytest.raises(ValueError, match="toy_resnet.*or another name for a body of your own"): save_focus(learner(dls, arch=toy_resnet((8, 16))), tmp_path / "toy", "toy_resnet")


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
    assert "lacks image_size, mean, std" in message()
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
    for name in ("config.py", "model.py", "modeling_fd_focus.py", "__init__.py", "sitecustomize.py", "toy_resnet.py", "json.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')")
    def refuse(*args, **kwargs): raise AssertionError("a pickle was opened")
    class Refuse(pickle.Unpickler):                        # libraries subclass it when they are imported
        __init__ = load = refuse
    for name, value in dict(load=refuse, loads=refuse, Unpickler=Refuse).items(): monkeypatch.setattr(pickle, name, value)
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
    folder = save_focus(learner(dls), tmp_path / "model", "toy_resnet", None, dict(accuracy=.8754), picture=tmp_path / "regions.png",
                        settings=dict(data="/home/somebody/secret/birds", epochs=3, cut=None))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: fd_focus\n") and "**87.5 %**" in card and "toy_resnet, 3 classes" in card
    assert "![Regions and attention](regions.png)" in card and (folder / "regions.png").is_file()
    assert "| epochs | 3 |" in card and "| data | birds |" in card and "| cut |" not in card
    assert "somebody" not in card + (folder / "config.json").read_text()
    assert all(name in card for name in load_focus(folder).classes) and "FocusClassifier.load" in card
    code = card.split("```python\n")[1].split("```")[0]
    Image.new("RGB", (80, 80)).save(tmp_path / "photograph.jpg")
    exec(code.replace("this/folder", str(folder)).replace("photograph.jpg", str(tmp_path / "photograph.jpg")), {})


def test_a_card_shows_no_picture_of_an_earlier_model(dls, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "regions.png")
    folder = save_focus(learner(dls), tmp_path / "model", "toy_resnet", picture=tmp_path / "regions.png")
    save_focus(learner(dls, plain=True), folder, "toy_resnet")
    assert "regions.png" not in (folder / "README.md").read_text() and not (folder / "regions.png").exists()


def test_a_card_is_utf8_whatever_the_machine_writes(folder, monkeypatch):
    change(folder, classes=["Blaumeise", "Käuzchen", "鷹"])
    monkeypatch.setattr("pathlib.Path.write_text", lambda path, text, encoding="ascii", **kwargs: path.write_bytes(text.encode(encoding)))
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, encoding="ascii", **kwargs: path.read_bytes().decode(encoding))
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
    assert asked == [("somebody/birds", "v1", ["config.json", "model.safetensors"])]
    with pytest.raises(FileNotFoundError, match="no model folder nobody/birds, and the Hugging Face hub did not give it: 404 Not Found$"): load_focus("nobody/birds")
    asked.clear()
    (tmp_path / "runs").mkdir()
    for name in ("runs/birds", tmp_path / "birds", "birds", "a/b/c"):        # meant as places on this machine
        with pytest.raises(FileNotFoundError, match="no model folder"): load_focus(name)
    assert not asked
    assert push_to_hub(folder, "somebody/birds", commit_message="first") == "https://hub/somebody/birds"
    assert sent[0][1]["private"] is True and sent[1]["allow_patterns"] == ["config.json", "model.safetensors", "README.md", "regions.png"]
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"): push_to_hub(folder, "somebody/birds")
    assert len(sent) == 2
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"): load_focus("somebody/birds")


# Export

def loaded(dls, tmp_path, arch="toy_resnet", **kwargs):
    return load_focus(save_focus(learner(dls, arch=arch, **kwargs), tmp_path / "model", arch))


def agrees(net, file, **kwargs):
    parity = check_parity(net, run_exported(file), **kwargs)
    assert parity.ok and parity.images == 64 if not kwargs else parity.ok, parity
    return parity


CASES = [dict(net_kwargs=dict(answer="ensemble", fusion="balanced", order="place", second_region_size=14, crop_norm="separate")), dict(net_kwargs=dict(fusion="attention", attention="single", l=3)), dict(plain=True),
         *(pytest.param(case, marks=pytest.mark.slow) for case in (dict(), dict(net_kwargs=dict(fusion="mean", hybrid=False)), dict(net_kwargs=dict(l=0, m=5, sigma=0.))))]


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_onnx_of_every_kind_of_net(dls, tmp_path, kwargs):
    net = loaded(dls, tmp_path, **kwargs)
    file = export_model(net, tmp_path / "model.onnx")
    parity = agrees(net, file)
    assert parity.same_boxes == 64 and parity.ties == 0
    import onnx
    model = onnx.load(file)
    onnx.checker.check_model(model)
    outputs = ["probabilities"] if kwargs.get("plain") else ["probabilities", "boxes", "scores", "attention"]
    assert [i.name for i in model.graph.input] == ["image"] and [o.name for o in model.graph.output] == outputs
    assert not model.functions and {node.domain for node in model.graph.node} == {""}      # nothing but ONNX's own operators
    assert all(dims.dim[0].dim_param for dims in [model.graph.input[0].type.tensor_type.shape, model.graph.output[0].type.tensor_type.shape])
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["classes"] == net.classes and (about["input_size"], about["resize"], about["squash"], about["min_side"]) == ([64, 64], [64, 64], True, 64)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model.onnx"}                 # one file, weights inside


@pytest.mark.parametrize("arch,fusion", [("resnet18", "mean"), pytest.param("mobilenet_v2", "concat", marks=pytest.mark.slow),
                                         pytest.param("mobilenet_v2", "sum", marks=pytest.mark.slow), pytest.param("convnext_tiny", "concat", marks=pytest.mark.slow),
                                         pytest.param("efficientnet_b0", "concat", marks=pytest.mark.slow), pytest.param("mobilenetv3_small_050", "concat", marks=pytest.mark.slow)])
def test_onnx_of_real_bodies(tmp_path, arch, fusion):
    dls = FocusDataLoaders.from_toy(2, 1, image_size=96, n_classes=3, bs=2)
    net = loaded(dls, tmp_path, arch, net_kwargs=dict(fusion=fusion, answer="ensemble"))
    agrees(net, export_model(net, tmp_path / "model.onnx"))


def test_onnx_with_photographs(data, tmp_path):
    "A MobileNetV2 with ImageNet weights at 224 on 64 photographs of cars."
    files = sorted((data / "cars_sedan33").rglob("*.jpg"))[::22][:64]
    dls = FocusDataLoaders.from_toy(2, 1, image_size=224, n_classes=3, bs=2)
    learn = learner(dls, arch="mobilenet_v2", weights=data / "weights" / "mobilenet_v2_imagenet_features.pth", settle=False)
    net = load_focus(save_focus(learn, tmp_path / "model", "mobilenet_v2"))
    classifier = FocusClassifier(net, "cpu")
    parity = agrees(net, export_model(net, tmp_path / "model.onnx"), images=torch.stack([classifier.pixels(file) for file in files]))
    assert parity.images == 64 and parity.same_class == 64


def test_torch_export(dls, tmp_path):
    net = loaded(dls, tmp_path, net_kwargs=dict(answer="ensemble", crop_norm="separate"))
    agrees(net, export_model(net, tmp_path / "model.pt2", "torch-export"))
    extra = {"classes": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["classes"]) == net.classes


def test_input_larger_than_the_first_look(tmp_path):
    "The graph reduces the picture for the first look and crops from the picture itself; temperature is inside."
    dls = FocusDataLoaders.from_toy(2, 1, image_size=96, n_classes=3, bs=2)
    learn = learner(dls, image_size=64)
    net = load_focus(save_focus(learn, tmp_path / "model", "toy_resnet", temperature=2.5))
    run = run_exported(export_model(net, tmp_path / "model.onnx"))
    assert check_parity(net, run).ok
    x = toy_images((96, 96), 2)
    with torch.no_grad(): want = (net((x - torch.tensor(net.stats[0])[:, None, None]) / torch.tensor(net.stats[1])[:, None, None]) / 2.5).softmax(-1)
    assert torch.allclose(run(x)["probabilities"], want, atol=1e-4) and run(x)["boxes"].max() > 64


@pytest.mark.parametrize("prepared", [dict(), dict(squash=False, resize=[80, 72]), dict(min_side=None), dict(squash=False, input_size=[64, 64], resize=[65, 90], min_side=90)], ids=str)
@pytest.mark.parametrize("size,orientation", [((640, 410), 1), ((300, 777), 6), ((50, 70), 3)])
def test_without_this_library(saved, tmp_path, prepared, size, orientation):
    "The program that notebook 90 shows needs PIL, NumPy and ONNX Runtime alone, and answers as the library does."
    pytest.importorskip("onnxruntime")
    cells = json.loads((Path(__file__).parents[1] / "nbs" / "90_export.ipynb").read_text(encoding="utf-8"))["cells"]
    program = next("".join(cell["source"]) for cell in cells if "def answer(graph, file)" in "".join(cell["source"])).split("photograph = ")[0]
    assert "torch" not in program and "fd_focus" not in program
    shown = dict(json=json, np=np)
    exec(program, shown)
    y, x = np.mgrid[0:size[1], 0:size[0]]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.stack([x * 255 / size[0], y * 255 / size[1], 128 + 90 * np.sin(x / 40) * np.cos(y / 30)], -1).astype(np.uint8)).save(tmp_path / "x.jpg", exif=exif)
    net = load_focus(saved)
    net.config |= prepared
    label, probability, boxes = shown["answer"](export_model(net, tmp_path / "x.onnx"), tmp_path / "x.jpg")
    want = FocusClassifier(net, "cpu").predict(tmp_path / "x.jpg")
    assert label == want.label and abs(probability - want.probability) < 2e-3 and np.abs(boxes - want.boxes.numpy()).max() < .01


def test_parity_fails_where_it_should(dls, tmp_path):
    net = loaded(dls, tmp_path)
    pipeline = FocusPipeline(net)
    def run(image):
        with torch.no_grad(): return dict(zip(pipeline.outputs, pipeline(image)))
    birds = toy_images((64, 64), 8)
    def differ(name, change): return check_parity(net, lambda image: (found := run(image)) | {name: change(found[name])}, birds)
    assert check_parity(net, run).ok
    assert not differ("probabilities", lambda p: p + torch.tensor([2e-4, -2e-4, 0])).ok
    assert not differ("probabilities", lambda p: p.roll(1, 1)).ok
    assert not differ("boxes", lambda b: b + 1).ok
    assert not differ("boxes", lambda b: b.flip(1)).ok                        # the right boxes in another order
    assert differ("boxes", lambda b: b + .001).ok
    other = load_focus(save_focus(learner(dls, net_kwargs=dict(sigma=2.)), tmp_path / "other", "toy_resnet"))
    assert not check_parity(other, run, birds).ok


def test_ties_are_told_from_errors(dls, tmp_path):
    "On one colour the attention is the same everywhere but for rounding: any cell may be first, but a place off the grid may not."
    net = loaded(dls, tmp_path, net_kwargs=dict(l=1, m=1, sigma=0.))
    pipeline = FocusPipeline(net)
    image = torch.full((1, 3, 64, 64), .5)
    with torch.no_grad(): probabilities, boxes, scores, attention = pipeline(image)
    near = (attention.flatten() - scores[0, 0]).abs() <= 1e-5 * scores.abs().max().clamp_min(1)
    other = next(i for i in near.nonzero().flatten().tolist() if (net.grid[i] - boxes[0, 0]).abs().max() > 1) if near.sum() > 1 else None
    answer = lambda box: (lambda x: dict(probabilities=probabilities, boxes=box, scores=scores, attention=attention))
    if other is not None:
        parity = check_parity(net, answer(net.grid[other][None, None]), image)
        assert parity.ok and parity.ties == 1
    assert not check_parity(net, answer(boxes + 3), image).ok
    far = attention.flatten().argmin()
    assert not check_parity(net, answer(net.grid[far][None, None]), image).ok


def test_what_cannot_be_exported(dls, tmp_path, monkeypatch):
    net = loaded(dls, tmp_path, net_kwargs=dict(attention="random"))
    with pytest.raises(ValueError, match="attention='random' looks somewhere else each time"): export_model(net, tmp_path / "model.onnx")
    net = loaded(dls, tmp_path)
    with pytest.raises(ValueError, match="format='tflite'; use 'onnx' or 'torch-export'"): export_model(net, tmp_path / "model.tflite", "tflite")
    for opset in (11, 99):
        with pytest.raises(ValueError, match=f"opset={opset} cannot be had: the exporter wrote version 18; use opset=18"): export_model(net, tmp_path / "model.onnx", opset=opset)
        assert {p.name for p in tmp_path.iterdir()} == {"model"}
    for name in ("onnx", "onnxscript"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, name, None)
            with pytest.raises(ValueError, match="pip install 'fd_focus.use.model_folder.'"): export_model(net, tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="running an ONNX file needs onnxruntime"): run_exported(tmp_path / "model.onnx")


def test_command(saved, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fd_focus_export(model=str(saved))
    assert "model.onnx: " in (told := capsys.readouterr().out) and "64 pictures: 64 with the same class, 64 with the same boxes" in told
    fd_focus_export(model=str(saved), format="torch-export", out="deep/birds.pt2", images=[str(data / "cars_sedan33")], n=3)
    assert "3 pictures: 3 with the same class" in capsys.readouterr().out
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {"model.onnx", "deep", "deep/birds.pt2"}
    def message(**kwargs):
        with pytest.raises(SystemExit) as end: fd_focus_export(**dict(model=str(saved)) | kwargs)
        return end.value.code
    assert "no model folder" in message(model="gone")
    assert "format='tflite'" in message(format="tflite")
    assert "ends in .onnx" in message(out="model.bin")
    assert "no file gone.jpg" in message(images=["gone.jpg"])
    assert "n=0" in message(n=0)
    assert "opset=18 is for format 'onnx'" in message(format="torch-export", opset=18)


def test_command_reads_a_list(saved, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{file}\n" for file in sorted((data / "cars_sedan33").rglob("*.jpg"))[:3])))
    fd_focus_export(model=str(saved), images=["-"], n=2)
    assert "2 pictures: 2 with the same class" in capsys.readouterr().out


def test_command_without_pictures(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(SystemExit) as end: fd_focus_export(model=str(saved), images=["-"])
    assert "--images -: no pictures to compare on" in end.value.code and not list(tmp_path.iterdir())


def test_command_keeps_no_graph_that_differs(saved, tmp_path, monkeypatch):
    import fd_focus.use.model_folder
    monkeypatch.setattr(fd_focus.use.model_folder, "run_exported", lambda file: (lambda image, run=run_exported(file): (out := run(image)) | dict(probabilities=out["probabilities"].roll(1, 1))))
    with pytest.raises(SystemExit) as end: fd_focus_export(model=str(saved), out=str(tmp_path / "model.onnx"), n=4)
    assert "does not answer as PyTorch does: 4 pictures: 0 with the same class" in end.value.code and not list(tmp_path.iterdir())


# Faster answers

@pytest.mark.parametrize("arch,left,kwargs", [("toy_resnet", 0, {}), ("toy_resnet", 0, dict(crop_norm="separate")),
    pytest.param("mobilenet_v2", 0, {}, marks=pytest.mark.slow), pytest.param("densenet121", 62, dict(crop_norm="separate"), marks=pytest.mark.slow)])
def test_folding_changes_no_answer(tmp_path, arch, left, kwargs):
    "Where a batch norm follows a convolution it is folded, for crops with statistics of their own too; DenseNet's come before theirs and stay."
    torch.manual_seed(0)
    net = shaken(FocusNet.from_arch(arch, 3, pretrained=False, image_size=96, m=4, l=2, **kwargs))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    folded, x = fold_batch_norm(net), torch.rand(2, 3, 96, 96)
    count = lambda net: sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    assert count(net) > count(folded.body) == left and (count(folded.crop_body) == left if "crop_norm" in kwargs else folded.crop_body is None)
    with torch.no_grad(): ours, theirs = net.focus(x), folded.focus(x)
    assert torch.allclose(ours.answer.softmax(1), theirs.answer.softmax(1), atol=1e-4) and torch.equal(ours.boxes, theirs.boxes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())     # the original is as it was


def test_folding_leaves_what_it_cannot_trace():
    class Odd(torch.nn.Module):
        def __init__(self): super().__init__(); self.conv, self.norm = torch.nn.Conv2d(3, 8, 3, 4), torch.nn.BatchNorm2d(8)
        def forward(self, x): return self.norm(self.conv(x)) if float(x.mean()) > -1e9 else x
    net = fold_batch_norm(FocusNet(Odd(), 3, image_size=64))
    assert isinstance(net.body, Odd) and net(torch.rand(1, 3, 64, 64)).shape == (1, 3)
