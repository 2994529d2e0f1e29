"The bench command, its file, and the measuring itself."
import inspect
import json
import subprocess
import sys

import pytest
import torch

from fd_focus.evidence.bench import SECTIONS, Clock, bars, bench_growth, bench_step, floor_step, make_net, one_staged, stages, training_step


def run(*args, cwd):
    script = cwd / "fd_focus_bench.py"      # what the installed command is
    script.write_text("from fd_focus.use.cli import fd_focus_bench\nfd_focus_bench()\n")
    return subprocess.run([sys.executable, "-W", "ignore", str(script), *args], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_command_writes_a_file_and_keeps_other_sections(tmp_path):
    file = tmp_path / "deep" / "bench.json"
    first = run("--quick", "--only", "reading,prediction", "--out", str(file), "--threads", "1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "prediction ÷ body alone" in first.stdout
    saved = json.loads(file.read_text())
    assert saved["quick"] and saved["machine"]["threads"] == 1 and {"reading", "prediction"} <= set(saved) and "step" not in saved
    other = run("--quick", "--only", "step", "--out", str(file), "--threads", "2", cwd=tmp_path)
    assert other.returncode == 1 and "bench.json has prediction, reading of another machine, device or number of threads" in other.stderr and json.loads(file.read_text()) == saved
    second = run("--quick", "--only", "step", "--out", str(file), "--threads", "1", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    both = json.loads(file.read_text())
    assert both["prediction"] == saved["prediction"] and len(both["bars"]) == 3
    assert [p.name for p in file.parent.iterdir()] == ["bench.json"]


def test_command_explains_bad_input(tmp_path):
    for args, message in ((("--only", "colour"), "no section colour; there are " + ", ".join(SECTIONS)), (("--threads", "0"), "threads=0; use 1 or more")):
        done = run(*args, cwd=tmp_path)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_full_run_measures_what_the_bars_ask_for():
    step = {k: v.default for k, v in inspect.signature(bench_step).parameters.items()}
    assert (step["arch"], step["image_size"], step["batch"]) == ("resnet50", 448, 16)
    growth = {k: v.default for k, v in inspect.signature(bench_growth).parameters.items()}
    assert (growth["batches"][0], growth["batches"][-1], growth["classes"][-1]) == (1, 64, 10_000)
    assert (growth["image_sizes"][0], growth["image_sizes"][-1], growth["regions"][-1]) == (224, 896, 16)


def test_stages_leave_nothing_behind():
    import fd_focus.model as model
    net, clock = make_net("toy_resnet", 64, 4), Clock()
    functions = model.attention_map, model.propose_from_table, model.zoom
    with pytest.raises(RuntimeError):
        with stages(net, clock): raise RuntimeError
    assert (model.attention_map, model.propose_from_table, model.zoom) == functions
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("slow", ["attention", "propose", "zoom", "loss", "optimiser"])
def test_a_slow_stage_shows_where_it_is(slow, monkeypatch):
    "A wait put into one stage appears in that stage and in no other."
    import time

    import fd_focus.model as model
    from fd_focus.loss import FocusLoss
    from fd_focus.training.speed import FusedAdam
    place = dict(attention=(model, "attention_map"), propose=(model, "propose_from_table"), zoom=(model, "zoom"), loss=(FocusLoss, "forward"), optimiser=(FusedAdam, "step"))[slow]
    whole = getattr(*place)
    def waiting(*args, **kwargs):
        time.sleep(.3)
        return whole(*args, **kwargs)
    monkeypatch.setattr(*place, waiting)
    net, clock = make_net("toy_resnet", 64, 4), Clock()
    seconds = one_staged(net, training_step(net, 2, clock=clock), clock)
    assert seconds[slow] >= .3
    assert all(value < .3 for name, value in seconds.items() if name not in (slow, "whole", "backward", "image pass", "crops' pass"))


def test_floor_has_gradients_for_the_whole_body_and_leaves_none():
    net, seen = make_net("toy_resnet", 64, 4), []
    for p in net.body.parameters(): p.register_post_accumulate_grad_hook(lambda p: seen.append(id(p)))
    floor_step(net, 2, 6)()
    assert set(seen) == {id(p) for p in net.body.parameters()}
    assert all(p.grad is None for p in net.body.parameters())


def test_bars_follow_the_numbers():
    good = dict(arch="a", image_size=1, batch=1, ratio=dict(median=1.05), locating=dict(median=.02))
    bad = good | dict(ratio=dict(median=1.051), locating=dict(median=.021))
    assert [b["met"] for b in bars(dict(step=good))] == [True, True]
    assert [b["met"] for b in bars(dict(step=bad))] == [False, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_quick_run_on_a_gpu(tmp_path):
    done = run("--quick", "--device", "cuda", "--out", str(tmp_path / "b.json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b.json").read_text())["machine"]["gpu"]
