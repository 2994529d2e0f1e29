"The bench command, its file, the measuring itself, and the scripts beside the notebooks."
import importlib
import inspect
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import fd_focus.focus
from fd_focus.bodies import toy_resnet
from fd_focus.evidence.bench import SECTIONS, SIZES, bars, bench, bench_steps, report
from fd_focus.evidence.epochs import bench_files, in_memory, write_pictures
from fd_focus.evidence.timing import (Clock, bench_answers, bench_step, body_inputs, floor_step, machine, make_net,
                                      one_staged, prediction, some_unsure, stages, training_step)
from fd_focus.loss import FocusLoss
from fd_focus.methods import METHODS, Method
from fd_focus.training.run import versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nbs"))
from bench.growth import bench_growth          # the scripts beside the notebooks
from bench.loops import bench_loops, sliced_crops, with_loops


@pytest.fixture
def run(command): return partial(command, "fd_focus_bench")


def test_command_writes_a_file_and_keeps_other_sections(run, tmp_path):
    file = tmp_path / "deep" / "bench.json"
    first = run("--quick", "--only", "reading,answers", "--out", str(file), "--threads", "1")
    assert first.returncode == 0, first.stderr
    assert "looked at again ÷ one look" in first.stdout
    saved = json.loads(file.read_text())
    assert saved["quick"] and saved["machine"]["threads"] == 1
    assert {"reading", "answers"} <= set(saved) and "step" not in saved
    other = run("--quick", "--only", "step", "--out", str(file), "--threads", "2")
    assert other.returncode == 1 and json.loads(file.read_text()) == saved
    assert "bench.json has answers, reading of another machine, device or number of threads" in other.stderr
    second = run("--quick", "--only", "step", "--out", str(file), "--threads", "1")
    assert second.returncode == 0, second.stderr
    both = json.loads(file.read_text())
    assert both["answers"] == saved["answers"] and len(both["bars"]) == 4
    assert [p.name for p in file.parent.iterdir()] == ["bench.json"]


def test_command_explains_bad_input(run):
    for args, message in ((("--only", "colour"), "no section colour; there are " + ", ".join(SECTIONS)),
                          (("--threads", "0"), "threads=0; use 1 or more")):
        done = run(*args)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', '{"a": 1}', '{"machine": 3, "quick": true}', "\udcff",
                                  '{"machine": {}, "quick": false, "step": {"rows": [{"arch": "x"}]}}'])
def test_a_file_of_something_else_stays(tmp_path, text):
    file = tmp_path / "bench.json"
    file.write_text(text, errors="surrogateescape")
    before = file.read_bytes()
    with pytest.raises(ValueError, match="bench.json is no result of this version of fd_focus_bench"):
        bench(file, only=("reading",), quick=True)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_full_run_measures_what_the_bars_ask_for():
    step = {k: v.default for k, v in inspect.signature(bench_step).parameters.items()}
    assert (step["arch"], step["image_size"], step["batch"]) == ("resnet50", 448, 16)
    batches = inspect.signature(bench_steps).parameters["batches"].default
    assert (batches[0], batches[-1]) == (16, 128) and "step" not in SIZES["cuda"]
    assert set(SIZES["cpu"]["step"]) == {"batches"}             # smaller on a CPU, but the same network and picture
    growth = {k: v.default for k, v in inspect.signature(bench_growth).parameters.items()}
    assert (growth["batches"][0], growth["batches"][-1], growth["classes"][-1]) == (1, 64, 10_000)
    assert (growth["image_sizes"][0], growth["image_sizes"][-1], growth["regions"][-1]) == (224, 896, 16)


def test_stages_leave_nothing_behind():
    net, clock, focus = make_net("toy_resnet", 64, 4), Clock(), fd_focus.focus
    functions = focus.attention_map, focus.propose_from_table, focus.zoom
    with pytest.raises(RuntimeError):
        with stages(net, clock): raise RuntimeError
    assert (focus.attention_map, focus.propose_from_table, focus.zoom) == functions
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("slow", ["attention", "propose", "zoom", "loss", "optimiser"])
def test_a_slow_stage_shows_where_it_is(slow, monkeypatch):
    "A wait put into one stage appears in that stage and in no other."
    focus = fd_focus.focus
    place = dict(attention=(focus, "attention_map"), propose=(focus, "propose_from_table"), zoom=(focus, "zoom"),
                 loss=(FocusLoss, "forward"), optimiser=(torch.optim.AdamW, "step"))[slow]
    whole, now = getattr(*place), [0.]
    def waiting(*args, **kwargs):
        now[0] += .3
        return whole(*args, **kwargs)
    monkeypatch.setattr(*place, waiting)
    net, clock = make_net("toy_resnet", 64, 4), Clock()
    step = training_step(net, 2, clock=clock)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])       # a clock that only the waiting moves
    seconds = one_staged(net, step, clock)
    assert {name for name, value in seconds.items() if value} == {slow, "whole"}
    assert seconds[slow] == seconds["whole"] == .3


def test_floor_has_gradients_for_the_whole_body_and_leaves_none():
    net, seen = make_net("toy_resnet", 64, 4), []
    for p in net.body.parameters(): p.register_post_accumulate_grad_hook(lambda p: seen.append(id(p)))
    floor_step(net, 2)()
    assert set(seen) == {id(p) for p in net.body.parameters()}
    assert all(p.grad is None for p in net.body.parameters())


def test_bodies_of_their_own_for_crops_are_part_of_the_floor():
    net = make_net("toy_resnet", 64, 4, crop_norm="separate", m=3, l=2)
    assert body_inputs(net, 2, train=True) == [(0, (2, 3, 64, 64)), (1, (6, 3, 32, 32))]
    assert body_inputs(net, 2, train=False) == [(0, (2, 3, 64, 64)), (1, (4, 3, 32, 32))]
    floor_step(net, 2)()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class TwoLooks(Method):
    "A method of one's own with two bodies and a head that has no name here."
    def __init__(self, body, n_classes, image_size=64):
        super().__init__(body, n_classes, image_size)
        self.second, self.says = toy_resnet((8, 16, 32)), torch.nn.Linear(self.n_features + 32, n_classes)
    @property
    def bodies(self): return [self.body, self.second]
    def forward(self, x, target=None):
        small = torch.nn.functional.avg_pool2d(x, 2)
        logits = self.says(torch.cat([self.body(x).mean((2, 3)), self.second(small).mean((2, 3))], 1))
        return {"both": logits} if self.training else logits


def test_any_method_has_a_floor_and_stages():
    found = bench_step("toy_resnet", 64, 4, 3, repeats=2, method=TwoLooks)
    assert found["inputs"] == [(0, (4, 3, 64, 64)), (1, (4, 3, 32, 32))]
    names = [row["stage"] for row in found["stages"]]
    assert names == ["body, 64×64", "body, 32×32", "heads", "loss", "backward", "optimiser", "rest"]
    assert found["locating"]["median"] == 0


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_of_the_library_can_be_timed(method):
    found = bench_step("toy_resnet", 96, 2, 3, repeats=1, method=method)
    net = make_net("toy_resnet", 96, 3, "cpu", method)
    assert found["ratio"]["median"] > 0 and found["inputs"][0] == (0, (2, 3, 96, 96))
    prediction(net, 2)()
    floor_step(net, 2, train=False)()


def test_loops_choose_the_same_regions_and_are_put_back():
    "NTS-Net with NumPy and slices: the same boxes, the same crops up to their edges, and nothing replaced afterwards."
    nts = importlib.import_module("fd_focus.rivals.nts")
    functions = nts.propose_from_table, nts.padded_crops
    net = make_net("toy_resnet", 96, 3, method="nts")
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with with_loops(net), torch.no_grad(): looped = net.eval().examine(x)
    with torch.no_grad(): assert looped.boxes.equal(net.examine(x).boxes)
    boxes = torch.tensor([[[-10., 20., 14., 44.], [30., 30., 54., 54.]]]).expand(2, -1, -1)
    ours, theirs = (crop(x, boxes, (24, 24)) for crop in (nts.padded_crops, sliced_crops))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)        # as large as the box: the pixels themselves
    with pytest.raises(RuntimeError), with_loops(net): raise RuntimeError
    assert (nts.propose_from_table, nts.padded_crops) == functions


def test_bench_of_loops_covers_step_and_answer():
    found = bench_loops("toy_resnet", 96, 2, 3, repeats=1)
    assert found["threads"] == torch.get_num_threads()
    for what in ("step", "answer"):
        assert set(found[what]["times"]) == {"focus", "nts", "nts with loops"}
        assert found[what]["ratios"]["nts"]["median"] == 1 and found[what]["ratios"]["nts with loops"]["median"] > 0


def test_bars_follow_the_numbers():
    good = dict(arch="a", image_size=1, batch=1, ratio=dict(median=1.05), locating=dict(median=.02))
    bad = good | dict(ratio=dict(median=1.051), locating=dict(median=.021))
    assert [b["met"] for b in bars(dict(step=dict(rows=[good, bad])))] == [True, True, False, False]
    def epoch(device, value): return bars(dict(epoch=dict(arch="a", device=device, ratio=dict(median=value))))[0]["met"]
    assert [epoch("cpu", 1.1), epoch("cpu", 1.11), epoch("cuda", 1.15), epoch("cuda", 1.16)] == [True, False] * 2
    def files(value): return bars(dict(files=dict(arch="a", allowed=dict(median=value))))[0]["met"]
    assert files(1.2) and not files(1.21)


def test_an_adaptive_net_looks_again_at_the_share_and_no_more():
    net, seen = make_net("toy_resnet", 64, 4, answer="adaptive", l=2).eval(), []
    net.body.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad(): some_unsure(net, 10, .2)(torch.rand(10, 3, 64, 64))
    assert seen == [10, 4]                                  # two pictures of two regions
    found = bench_answers("toy_resnet", 64, 10, 4, repeats=1)
    names = ["one look", "adaptive", "two looks", "floor of two looks"]
    assert list(found["times"]) == list(found["memory_mb"]) == names


def test_an_epoch_in_memory_takes_the_steps_that_the_bare_loop_takes():
    learn, seen = in_memory("toy_resnet", 64, 8, 3), []
    assert [len(dl) for dl in learn.dls.loaders] == [3, 1]
    learn.model.register_forward_pre_hook(lambda module, args: seen.append((module.training, len(args[0]))))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-5)
    assert [n for training, n in seen if training] == [8] * 3


def test_pictures_of_a_folder_are_copied_whatever_its_classes(tmp_path):
    made, taken = tmp_path / "made", tmp_path / "taken"
    write_pictures(made, 6, classes=2)
    write_pictures(taken, 4, data=made, classes=2)
    files = sorted(p.relative_to(taken).as_posix()[:-4] for p in taken.rglob("*.jpg"))
    assert files == ["train/0/0", "train/0/2", "train/1/1", "train/1/3", "valid/0/4", "valid/1/5"]
    assert {p.read_bytes() for p in taken.rglob("*.jpg")} < {p.read_bytes() for p in made.rglob("*.jpg")}
    with pytest.raises(ValueError, match="made has 8 JPEG files, but 12 are needed; name a larger folder, or none"):
        write_pictures(tmp_path / "more", 8, data=made)


def test_training_from_files_is_measured_beside_its_parts(tmp_path):
    write_pictures(tmp_path / "photographs", 20)
    found = bench_files(str(tmp_path / "photographs"), "toy_resnet", 96, 4, 8, repeats=1)
    assert found["data"] and found["pictures"] == 8 and found["allowed"]["median"] > 0
    names = [row["what"] for row in found["rows"]]
    assert names == ["fd_focus", "NavigatorNet", "bare loop", "its loader alone", "our loader alone", "step alone"]
    assert all(row["per_second"] > 0 for row in found["rows"])


def test_a_report_says_which_bars_are_met():
    here = dict(machine=machine(), quick=False, bars=[dict(what="a ÷ b", value=1.3, bar="≤ 1.2", met=False)])
    text = report(here)
    assert "not met" in text and ("On a CPU smaller" in text) == (here["machine"]["gpu"] is None)


def test_a_package_without_metadata_can_be_measured(monkeypatch):
    "A checkout on PYTHONPATH, or a copy in a bundle."
    import importlib.metadata

    import fd_focus
    def none(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "distribution", none)
    assert machine()["versions"]["fd_focus"] == fd_focus.__version__
    assert json.loads(json.dumps(versions()))["torch"] == torch.__version__
