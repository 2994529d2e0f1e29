"An experiment that is killed goes on; what it keeps is enough to compute its statistics again."
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fd_focus.evidence.experiment import load_plan, paired_difference, summarise

BIN = Path(sys.executable).parent
PLAN = """
base: {arch: toy_resnet, image_size: 48, epochs: 1, bs: 8, n_classes: 3, images_per_class: 8}
variants:
  plain: {plain: true}
  focus: {}
seeds: [0, 1]
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "plan.yaml"


def test_killed_and_started_again(plan, tmp_path):
    csv = tmp_path / "results.csv"
    args = [BIN / "fd_focus_experiment", plan, "--out", csv]
    first = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not csv.is_file() and first.poll() is None: time.sleep(.02)      # one row is there: the others are not finished
    first.send_signal(signal.SIGKILL); first.communicate()
    before = pd.read_csv(csv)
    assert 1 <= len(before) < 4 and (before.status == "ok").all()
    second = subprocess.run(args, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    after = pd.read_csv(csv)
    assert len(after) == 4 and (after.status == "ok").all()
    pd.testing.assert_frame_equal(after.loc[: len(before) - 1, before.columns], before)     # finished rows were left alone
    assert second.stdout.count(" seed ") == 4 - len(before) and "gain" in second.stdout
    kept = np.load(csv.with_suffix("") / "default--focus--1.npz")
    assert np.isclose((kept["answer"].argmax(1) == kept["target"]).mean(), after.query("variant == 'focus' and seed == 1").accuracy.iloc[0])
    table = summarise(csv)
    assert np.isclose(table.gain[1], table.accuracy[1] - table.accuracy[0])
    np.savez(csv.with_suffix("") / "default--focus--1.npz", **dict(kept, files=kept["files"][::-1]))
    with pytest.raises(ValueError, match="focus, seed 1 judged other pictures than plain, seed 0"): summarise(csv)


def test_bad_plans_end_with_a_sentence(tmp_path):
    (tmp_path / "bad.yaml").write_text("variants: {a: {epoch: 3}}\nseeds: [0]")
    run = subprocess.run([BIN / "fd_focus_experiment", tmp_path / "bad.yaml", "--out", tmp_path / "r.csv"], capture_output=True, text=True)
    assert run.returncode != 0 and "unknown setting epoch (did you mean epochs?)" in run.stderr and "Traceback" not in run.stderr


def test_committed_plans_can_be_read():
    folder = Path(__file__).parent.parent / "nbs" / "tutorials" / "results"
    plans = sorted(folder.glob("*.yaml"))
    assert plans
    for plan in plans: assert any(run.variant.startswith("plain") for run in load_plan(plan))


def test_interval_narrows_with_pictures():
    rng = np.random.default_rng(0)
    widths = []
    for pictures in (100, 400, 1600):
        ours, rival = rng.random((8, pictures)) < .9, rng.random((8, pictures)) < .85
        _, low, high = paired_difference(ours, rival, n=1000)
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]
