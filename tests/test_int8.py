"Graphs in 8 bits and of OpenVINO: what comes back out is whole, and what cannot be is refused."
import json

import numpy as np
import onnx
import pytest
import torch
from conftest import photograph, shaken

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.training.learner import focus_learner
from fd_focus.use.cli import fd_focus_export
from fd_focus.use.export import check_parity, export_model, run_exported, toy_images
from fd_focus.use.int8 import Moved, _closed, _opened, calibration_files, compare_exported, quantise
from fd_focus.use.model_folder import load_focus, save_focus
from fd_focus.use.openvino import run_openvino, to_openvino
from fd_focus.use.pipeline import fold_batch_norm

KINDS = dict(plain=dict(method="plain"), again={})


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    "Name -> a network with shaken heads, at 64 pixels; `again` looks again at half of the toy birds."
    dls, made = FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2), {}
    for name, options in KINDS.items():
        torch.manual_seed(0)
        learn = focus_learner(dls, "toy_resnet", pretrained=False, **options)
        shaken(learn.model)
        made[name] = load_focus(folder := save_focus(learn, tmp_path_factory.mktemp(name) / "model"))
        made[name].folder = str(folder)
    birds, net = toy_images((64, 64), 16), made["again"]
    net.look_again_below = 2.
    run = net.look((birds - torch.tensor(net.stats[0]).view(3, 1, 1)) / torch.tensor(net.stats[1]).view(3, 1, 1))
    net.look_again_below = run.heads["image"].softmax(1).amax(1).sort().values[7:9].mean().item()
    return made


@pytest.fixture(scope="module")
def graphs(nets, tmp_path_factory):
    place = tmp_path_factory.mktemp("graphs")
    return {name: export_model(fold_batch_norm(net), place / f"{name}.onnx") for name, net in nets.items()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    place = tmp_path_factory.mktemp("photos")
    (place / "deep").mkdir()
    for i in range(24): photograph(i).save(place / ("deep" if i % 2 else "") / f"{i:02d}.jpg")
    return place


@pytest.mark.parametrize("name", KINDS)
def test_a_graph_in_8_bits(name, graphs, tmp_path):
    "Its body is in 8 bits, in a branch too; inputs, outputs, metadata and answers are those of the graph it is from."
    birds = toy_images((64, 64), 16)
    small, was = quantise(graphs[name], tmp_path / "small.onnx", birds), onnx.load(graphs[name])
    onnx.checker.check_model(model := onnx.load(small))
    assert [part.name for part in model.graph.output] == [part.name for part in was.graph.output]
    assert {part.key: part.value for part in model.metadata_props} == {p.key: p.value for p in was.metadata_props}
    branches = [part.g for node in model.graph.node for part in node.attribute if node.op_type == "If"]
    assert bool(branches) == (name == "again")
    for graph in [model.graph] + [branch for branch in branches if len(branch.node) > 1]:
        made = {out: node.op_type for node in graph.node for out in node.output}
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        assert convolutions and all(made[name] == "DequantizeLinear" for node in convolutions for name in node.input)
        assert not any(node.op_type in ("Gemm", "MatMul") and made.get(name) == "DequantizeLinear"
                       for node in graph.node for name in node.input)
    run = run_exported(small)
    moved = compare_exported(run_exported(graphs[name]), run, birds)
    assert moved.same_class >= 13 and moved.probability < .1, moved
    if name == "again": assert 0 < int(run(birds)["looked_again"].sum()) < 16
    assert run(birds[:1])["probabilities"].shape == (1, 3)


def test_opened_and_closed_is_the_same(graphs):
    "Node by node, weight by weight, where no quantiser has been between."
    was = onnx.load(graphs["again"])
    back = _closed(_opened(was), was)
    def content(model):
        return {node.name: (node.op_type, tuple(node.input), tuple(node.output)) for node in model.graph.node}
    assert content(back) == content(was)


def test_a_transformer_is_refused(tmp_path):
    from onnx import TensorProto, helper, numpy_helper
    weights = [numpy_helper.from_array(np.zeros(shape, np.float32), name)
               for name, shape in (("conv", (4, 3, 2, 2)), ("linear", (16, 64)))]
    nodes = [helper.make_node("Conv", ["image", "conv"], ["maps"], strides=[2, 2]),
             helper.make_node("MatMul", ["maps", "linear"], ["probabilities"])]
    shapes = dict(image=[1, 3, 32, 32], probabilities=[1, 4, 16, 64])
    ends = {name: [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in shapes.items()}
    onnx.save(helper.make_model(helper.make_graph(nodes, "net", *ends.values(), weights)), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="4 % of the weights are in convolutions.*leave a transformer in 32 bits"):
        quantise(tmp_path / "net.onnx", tmp_path / "small.onnx", [])
    assert not (tmp_path / "small.onnx").exists()


def test_a_folder_to_calibrate_on(photos, tmp_path):
    calibrating, judging = calibration_files(photos)
    assert (len(calibrating), len(judging)) == (16, 8) and not set(calibrating) & set(judging)
    assert calibration_files(photos) == (calibrating, judging)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"): calibration_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has 0 pictures: give at least 24"): calibration_files(tmp_path)


def test_what_has_moved_is_seen():
    def run(image): return dict(probabilities=torch.tensor([[.75, .25]]), boxes=torch.tensor([[[0., 0, 8, 8]]]))
    def other(image): return dict(probabilities=torch.tensor([[.25, .75]]), boxes=torch.tensor([[[4., 0, 12, 8]]]))
    assert compare_exported(run, other, [torch.zeros(3, 8, 8)]) == Moved(1, 0, .5, pytest.approx(1 / 3), 4.)
    with pytest.raises(ValueError, match="no pictures"): compare_exported(run, run, [])


def test_command(nets, photos, tmp_path, monkeypatch, capsys):
    "It says what 8 bits have changed, and the file does; the program beside it can read that file."
    monkeypatch.chdir(tmp_path)
    fd_focus_export(model=nets["plain"].folder, int8=str(photos), n=2)
    said = capsys.readouterr().out
    assert "in 8 bits, calibrated on 16 pictures; of others, " in said and " of 8 get the same class" in said
    about = {part.key: json.loads(part.value) for part in onnx.load("model.onnx").metadata_props}
    assert about["int8"]["images"] == 8 and about["int8"]["calibrated"] == 16 and about["classes"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.classes.json", "model.onnx", "preprocess.py"]
    other = dict(int8=str(photos), format="openvino")
    for wrong, word in ((dict(int8="nowhere"), "no folder nowhere"), (other, "leave out --format openvino")):
        with pytest.raises(SystemExit, match=word): fd_focus_export(model=nets["again"].folder, **wrong)


@pytest.mark.parametrize("name", ["plain", "again"])
def test_openvino(name, nets, graphs, tmp_path):
    pytest.importorskip("openvino")
    file = to_openvino(graphs[name], tmp_path / "net.xml")
    assert sorted(part.name for part in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    parity = check_parity(nets[name], run_openvino(file), toy_images((64, 64), 16))
    assert parity.ok, parity
    with pytest.raises(ValueError, match="ends in .xml"): to_openvino(graphs[name], tmp_path / "net.onnx")


@pytest.mark.slow
def test_openvino_command(nets, tmp_path, capsys):
    pytest.importorskip("openvino")
    fd_focus_export(model=nets["again"].folder, format="openvino", out=str(tmp_path / "deep" / "net.xml"), n=4)
    assert "4 with the same class" in capsys.readouterr().out
    assert sorted(f.name for f in (tmp_path / "deep").iterdir()) == ["net.bin", "net.classes.json", "net.xml"]


def test_without_openvino(graphs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ValueError, match=r"pip install 'fd_focus\[openvino\]'"):
        to_openvino(graphs["plain"], tmp_path / "net.xml")
