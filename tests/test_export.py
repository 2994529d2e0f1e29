"Exported graphs answer as the network does, and a comparison that should fail does."
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shaken
from PIL import Image

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.methods import METHODS, Method
from fd_focus.training.learner import focus_learner
from fd_focus.use import export
from fd_focus.use.cli import fd_focus_export
from fd_focus.use.export import check_parity, export_model, run_exported, toy_images
from fd_focus.use.model_folder import load_focus, save_focus
from fd_focus.use.predict import FocusClassifier, FocusPipeline, fold_batch_norm


@pytest.fixture(scope="module")
def dls(): return FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2)


def learner(dls, settle=True, **kwargs):
    torch.manual_seed(0)
    learn = focus_learner(dls, kwargs.pop("arch", "toy_resnet"), pretrained=False, **kwargs)
    if settle: shaken(learn.model)
    return learn


@pytest.fixture(scope="module")
def saved(dls, tmp_path_factory): return save_focus(learner(dls), tmp_path_factory.mktemp("saved") / "model")


def loaded(dls, tmp_path, arch="toy_resnet", **kwargs):
    return load_focus(save_focus(learner(dls, arch=arch, **kwargs), tmp_path / "model"))


def agrees(net, file, **kwargs):
    parity = check_parity(net, run_exported(file), **kwargs)
    assert parity.ok and parity.images == 64 if not kwargs else parity.ok, parity
    return parity


CASES = [
    dict(answer="ensemble", fusion="mean", crop_norm="separate"),
    dict(attention="single", l=3),
    dict(method="plain"),
    dict(answer="adaptive"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            dict(),
            dict(fusion="mean", hybrid=False),
            dict(l=0, m=5, sigma=0.0),
            dict(method="random_regions"),
        )
    ),
]


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_onnx_of_every_kind_of_net(dls, tmp_path, kwargs):
    net = loaded(dls, tmp_path, **kwargs)
    file = export_model(net, tmp_path / "model.onnx")
    parity = agrees(net, file)
    assert parity.same_boxes == 64 and parity.ties == 0
    import onnx
    model = onnx.load(file)
    onnx.checker.check_model(model)
    outputs = list(FocusPipeline(net).outputs)
    assert ("boxes" in outputs) == (kwargs.get("method") != "plain")
    assert ("looked_again" in outputs) == (getattr(net, "answer", None) == "adaptive")
    assert [i.name for i in model.graph.input] == ["image"] and [o.name for o in model.graph.output] == outputs
    branches = [part.g for node in model.graph.node if node.op_type == "If" for part in node.attribute]
    domains = {node.domain for graph in (model.graph, *branches) for node in graph.node}
    assert not model.functions and domains == {""}                                    # nothing but ONNX's own operators
    assert all(
        dims.dim[0].dim_param
        for dims in [model.graph.input[0].type.tensor_type.shape, model.graph.output[0].type.tensor_type.shape]
    )
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["classes"] == net.classes and (
        about["input_size"],
        about["resize"],
        about["squash"],
        about["min_side"],
    ) == ([64, 64], [64, 64], True, 64)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model.onnx"}                 # one file, weights inside


@pytest.mark.parametrize(
    "arch,fusion",
    [
        ("resnet18", "mean"),
        pytest.param("mobilenet_v2", "concat", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", "concat", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", "concat", marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_050", "concat", marks=pytest.mark.slow),
    ],
)
def test_onnx_of_real_bodies(tmp_path, arch, fusion):
    dls = FocusDataLoaders.from_toy(2, 1, image_size=96, n_classes=3, bs=2)
    net = loaded(dls, tmp_path, arch, fusion=fusion, answer="ensemble")
    agrees(net, export_model(net, tmp_path / "model.onnx"))


def test_onnx_with_photographs(data, tmp_path):
    "A MobileNetV2 with ImageNet weights at 224 on 64 photographs of cars."
    files = sorted((data / "cars_sedan33").rglob("*.jpg"))[::22][:64]
    dls = FocusDataLoaders.from_toy(2, 1, image_size=224, n_classes=3, bs=2)
    learn = learner(
        dls, arch="mobilenet_v2", weights=data / "weights" / "mobilenet_v2_imagenet_features.pth", settle=False
    )
    net = load_focus(save_focus(learn, tmp_path / "model"))
    classifier = FocusClassifier(net, "cpu")
    parity = agrees(
        net, export_model(net, tmp_path / "model.onnx"), images=torch.stack([classifier.pixels(file) for file in files])
    )
    assert parity.images == 64 and parity.same_class == 64


def test_torch_export(dls, tmp_path):
    net = loaded(dls, tmp_path, answer="ensemble", crop_norm="separate")
    agrees(net, export_model(net, tmp_path / "model.pt2", "torch-export"))
    extra = {"classes": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["classes"]) == net.classes


@pytest.mark.parametrize("kwargs", [dict(fusion="mean"), pytest.param(dict(crop_norm="separate", attention="single"),
                                                                      marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("format", export.FORMATS)
def test_adaptive_for_nobody_some_everybody(tmp_path, format, kwargs):
    "Batches in which nobody, some, and all look again, of one picture and of sixteen; crops are reduced."
    dls = FocusDataLoaders.from_toy(2, 1, image_size=128, n_classes=3, bs=2)
    learn = learner(dls, image_size=64, answer="adaptive", m=4, l=2, **kwargs)
    net = load_focus(save_focus(learn, tmp_path / "model", temperature=1.5))
    pipeline, birds = FocusPipeline(net), toy_images((128, 128), 40)
    with torch.no_grad():
        confidence = net.look((birds - pipeline.mean) / pipeline.std).heads["image"].softmax(1).amax(1)
    order = confidence.argsort()
    net.look_again_below = float(confidence[order[18:20]].mean())          # 19 of 40 are below
    run = run_exported(export_model(net, tmp_path / f"model{export.FORMATS[format]}", format))
    for rows, unsure in ((order[:16], 16), (order[12:28], 7), (order[-16:], 0), (order[:1], 1), (order[-1:], 0)):
        parity = check_parity(net, run, birds[rows], bs=len(rows))
        assert parity.ok and parity.looked_again == unsure and parity.ties == 0, parity
        found = run(birds[rows])                                           # the whole batch at once
        with torch.no_grad(): want = dict(zip(pipeline.outputs, pipeline(birds[rows])))
        assert torch.equal(found["looked_again"], want["looked_again"])
        assert torch.allclose(found["probabilities"], want["probabilities"], atol=1e-5)


def test_parity_of_who_looks_again(dls, tmp_path):
    "A wrong choice is an error, one that hangs on the last digits a tie."
    net = loaded(dls, tmp_path, answer="adaptive")
    pipeline, birds = FocusPipeline(net), toy_images((64, 64), 8)
    def run(image):
        with torch.no_grad(): return dict(zip(pipeline.outputs, pipeline(image)))
    with torch.no_grad():
        confidence = net.look((birds - pipeline.mean) / pipeline.std).heads["image"].softmax(1).amax(1)
    def flipped(image):
        "As an answer that thinks the first bird sure, or unsure, where it is the other."
        found, first = run(image), (image == birds[0]).flatten(1).all(1)
        return found | dict(looked_again=found["looked_again"] ^ first)

    for distance, ok in ((5e-5, True), (-5e-5, True), (.001, False), (-.001, False)):
        net.look_again_below = confidence[0].item() + distance
        assert check_parity(net, run, birds).ok
        parity = check_parity(net, flipped, birds)
        assert parity.ok == ok and parity.same_looks == 7 and parity.ties == ok, parity
    net.look_again_below = 0.
    assert check_parity(net, run, birds).looked_again == 0


def test_input_larger_than_the_first_look(tmp_path):
    "The graph reduces the picture for the first look and crops from the picture itself; temperature is inside."
    dls = FocusDataLoaders.from_toy(2, 1, image_size=96, n_classes=3, bs=2)
    learn = learner(dls, image_size=64)
    net = load_focus(save_focus(learn, tmp_path / "model", temperature=2.5))
    run = run_exported(export_model(net, tmp_path / "model.onnx"))
    assert check_parity(net, run).ok
    x = toy_images((96, 96), 2)
    with torch.no_grad():
        want = (
            net((x - torch.tensor(net.stats[0])[:, None, None]) / torch.tensor(net.stats[1])[:, None, None]) / 2.5
        ).softmax(-1)
    assert torch.allclose(run(x)["probabilities"], want, atol=1e-4) and run(x)["boxes"].max() > 64


@pytest.mark.parametrize(
    "prepared",
    [
        dict(),
        dict(squash=False, resize=[80, 72]),
        dict(min_side=None),
        dict(squash=False, input_size=[64, 64], resize=[65, 90], min_side=90),
    ],
    ids=str,
)
@pytest.mark.parametrize("size,orientation", [((640, 410), 1), ((300, 777), 6), ((50, 70), 3)])
def test_without_this_library(saved, tmp_path, prepared, size, orientation):
    "The program that the notebook shows needs PIL, NumPy and ONNX Runtime alone, and answers as the library does."
    pytest.importorskip("onnxruntime")
    cells = json.loads((Path(__file__).parents[1] / "nbs" / "64_export.ipynb").read_text(encoding="utf-8"))["cells"]
    program = next(
        "".join(cell["source"]) for cell in cells if "def answer(graph, file)" in "".join(cell["source"])
    ).split("photograph = ")[0]
    assert "torch" not in program and "fd_focus" not in program
    shown = dict(json=json, np=np)
    exec(program, shown)
    y, x = np.mgrid[0:size[1], 0:size[0]]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(
        np.stack([x * 255 / size[0], y * 255 / size[1], 128 + 90 * np.sin(x / 40) * np.cos(y / 30)], -1).astype(
            np.uint8
        )
    ).save(tmp_path / "x.jpg", exif=exif)
    net = load_focus(saved)
    net.about |= prepared
    label, probability, boxes = shown["answer"](export_model(net, tmp_path / "x.onnx"), tmp_path / "x.jpg")
    want = FocusClassifier(net, "cpu").predict(tmp_path / "x.jpg")
    assert (
        label == want.label
        and abs(probability - want.probability) < 2e-3
        and np.abs(boxes - want.boxes.numpy()).max() < 0.01
    )


def test_parity_fails_where_it_should(dls, tmp_path):
    net = loaded(dls, tmp_path)
    pipeline = FocusPipeline(net)
    def run(image):
        with torch.no_grad(): return dict(zip(pipeline.outputs, pipeline(image)))
    birds = toy_images((64, 64), 8)

    def differ(name, change):
        return check_parity(net, lambda image: (found := run(image)) | {name: change(found[name])}, birds)
    assert check_parity(net, run).ok
    assert not differ("probabilities", lambda p: p + torch.tensor([2e-4, -2e-4, 0])).ok
    assert not differ("probabilities", lambda p: p.roll(1, 1)).ok
    assert not differ("boxes", lambda b: b + 1).ok
    assert not differ("boxes", lambda b: b.flip(1)).ok                        # the right boxes in another order
    assert differ("boxes", lambda b: b + .001).ok
    other = load_focus(save_focus(learner(dls, sigma=2.), tmp_path / "other"))
    assert not check_parity(other, run, birds).ok


def test_ties_are_told_from_errors(dls, tmp_path):
    "On one colour many cells have the same attention but for rounding: any may be first, but no place off the grid."
    net = loaded(dls, tmp_path, l=1, m=1, sigma=0., answer="hybrid")
    pipeline = FocusPipeline(net)
    image = torch.full((1, 3, 64, 64), .5)
    with torch.no_grad():
        probabilities, boxes, scores, attention = pipeline(image)
        noisy = pipeline(image + 1e-5 * torch.randn(64, 3, 64, 64))[1][:, 0]
    def answer(box):
        return lambda x: dict(probabilities=probabilities, boxes=box, scores=scores, attention=attention)

    others = noisy[(noisy - boxes[0, 0]).abs().amax(1) > 1]
    if len(others):
        parity = check_parity(net, answer(others[:1][None]), image)
        assert parity.ok and parity.ties == 1
    assert not check_parity(net, answer(boxes + 3), image).ok
    far = attention.flatten().argmin()
    assert not check_parity(net, answer(net.grid[far][None, None]), image).ok


def test_what_cannot_be_exported(dls, tmp_path, monkeypatch):
    net = loaded(dls, tmp_path)
    monkeypatch.setattr(Method, "deterministic", False)
    with pytest.raises(ValueError, match="the method 'focus' answers differently each time"):
        export_model(net, tmp_path / "model.onnx")
    monkeypatch.undo()
    net = loaded(dls, tmp_path)
    with pytest.raises(ValueError, match="format='tflite'; use 'onnx' or 'torch-export'"):
        export_model(net, tmp_path / "model.tflite", "tflite")
    for opset in (11, 99):
        with pytest.raises(
            ValueError, match=f"opset={opset} cannot be had: the exporter wrote version 18; use opset=18"
        ):
            export_model(net, tmp_path / "model.onnx", opset=opset)
        assert {p.name for p in tmp_path.iterdir()} == {"model"}
    for name in ("onnx", "onnxscript"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, name, None)
            with pytest.raises(ValueError, match="pip install 'fd_focus.export.'"):
                export_model(net, tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="running an ONNX file needs onnxruntime"):
        run_exported(tmp_path / "model.onnx")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small file system")
@pytest.mark.parametrize("format", export.FORMATS)
def test_full_disk(saved, tmp_path, format):
    "An error with a message, and nothing half written; when there is room again, it works."
    disk, name = tmp_path / "disk", f"model{export.FORMATS[format]}"
    disk.mkdir()
    size = 1000 * (sum(file.stat().st_size for file in saved.iterdir()) // 2000)         # the weights do not fit
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        with pytest.raises(OSError, match=f"No space left on device: '{disk / name}'"):
            export_model(load_focus(saved), disk / name, format)
        with pytest.raises(SystemExit, match=f"fd_focus: No space left on device: {disk}"):
            fd_focus_export(model=str(saved), format=format, out=str(disk / name), n=2)
        assert not list(disk.iterdir())
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert export_model(load_focus(saved), disk / name, format).stat().st_size > size
    finally: subprocess.run(["umount", "-l", disk], check=True)


# Faster answers

@pytest.mark.parametrize(
    "arch,left,kwargs",
    [
        ("toy_resnet", 0, {}),
        ("toy_resnet", 0, dict(crop_norm="separate")),
        pytest.param("mobilenet_v2", 0, {}, marks=pytest.mark.slow),
        pytest.param("densenet121", 62, dict(crop_norm="separate"), marks=pytest.mark.slow),
    ],
)
def test_folding_changes_no_answer(tmp_path, arch, left, kwargs):
    "Batch norms that follow a convolution are folded, also in the body for crops; DenseNet's come before theirs."
    torch.manual_seed(0)
    net = shaken(METHODS["focus"].from_arch(arch, 3, pretrained=False, image_size=96, m=4, l=2, **kwargs))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    folded, x = fold_batch_norm(net), torch.rand(2, 3, 96, 96)
    count = lambda net: sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    assert count(net) > count(folded.body) == left and (
        count(folded.crop_body) == left if "crop_norm" in kwargs else folded.crop_body is None
    )
    with torch.no_grad(): ours, theirs = net.look(x), folded.look(x)
    assert torch.allclose(ours.answer.softmax(1), theirs.answer.softmax(1), atol=1e-4) and torch.equal(
        ours.boxes, theirs.boxes
    )
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()
    )  # the original is as it was


def test_folding_leaves_what_it_cannot_trace():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 8, 3, 4), torch.nn.BatchNorm2d(8)
        def forward(self, x): return self.norm(self.conv(x)) if float(x.mean()) > -1e9 else x
    net = fold_batch_norm(METHODS["focus"](Odd(), 3, image_size=64))
    assert isinstance(net.body, Odd) and net(torch.rand(1, 3, 64, 64)).shape == (1, 3)


# The command

def test_command(saved, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fd_focus_export(model=str(saved))
    assert (
        "model.onnx: " in (told := capsys.readouterr().out)
        and "64 pictures: 64 with the same class, 64 with the same boxes" in told
    )
    fd_focus_export(
        model=str(saved), format="torch-export", out="deep/birds.pt2", images=[str(data / "cars_sedan33")], n=3
    )
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


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_one_export_to_a_file_at_a_time(saved, tmp_path):
    file = tmp_path / "model.onnx"
    script = ("import sys, time; from fd_focus.training.checkpoint import alone\n"
              "with alone(sys.argv[1]): print('held', flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, file], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit, match=f"fd_focus: process {other.pid} on .* works on {file}"):
            fd_focus_export(model=str(saved), out=str(file), n=2)
        other.kill()
    fd_focus_export(model=str(saved), out=str(file), n=2)
    assert list(tmp_path.iterdir()) == [file]


def test_command_reads_a_list(saved, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("".join(f"{file}\n" for file in sorted((data / "cars_sedan33").rglob("*.jpg"))[:3]))
    )
    fd_focus_export(model=str(saved), images=["-"], n=2)
    assert "2 pictures: 2 with the same class" in capsys.readouterr().out


def test_command_without_pictures(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(SystemExit) as end: fd_focus_export(model=str(saved), images=["-"])
    assert "--images -: no pictures to compare on" in end.value.code and not list(tmp_path.iterdir())


def test_command_keeps_no_graph_that_differs(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export,
        "run_exported",
        lambda file: (
            lambda image, run=run_exported(file): (
                (out := run(image)) | dict(probabilities=out["probabilities"].roll(1, 1))
            )
        ),
    )
    with pytest.raises(SystemExit) as end: fd_focus_export(model=str(saved), out=str(tmp_path / "model.onnx"), n=4)
    assert "does not answer as PyTorch does: 4 pictures: 0 with the same class" in end.value.code and not list(
        tmp_path.iterdir()
    )
