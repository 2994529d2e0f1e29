"Many pictures and processes through Ray: nothing lost, nothing twice, whatever is killed; the same rows and weights."
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.training.learner import focus_learner
from fd_focus.use.cli import fd_focus_predict
from fd_focus.use.files import Tally
from fd_focus.use.model_folder import save_focus
from fd_focus.use.predict import FocusClassifier
from fd_focus.use.scale import _each_once, _Store, _unasked, cluster, finished, predict_on_ray, rows_schema, rows_table

pytest.importorskip("ray", reason="pip install 'fd_focus[ray]'")
pq, psutil = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("psutil")
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    dls = FocusDataLoaders.from_toy(images_per_class=4, valid_per_class=2, n_classes=3, image_size=64, bs=8)
    learn = focus_learner(dls, "toy_resnet", pretrained=False, m=4, l=2, answer="image")
    return save_focus(learn, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def classifier(model): return FocusClassifier.load(model, "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Forty pictures, one of them with a name that is no UTF-8, and a file that is no picture."
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    names = [f"{i:02d}.png" for i in range(39)] + [os.fsdecode(b"caf\xe9.png")]
    for name in names: Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_text("no picture")
    return folder


def names_in(folder): return sorted(str(file) for file in folder.iterdir())


def table_of(out): return pq.read_table(out).to_pandas().sort_values("file", ignore_index=True)


def assert_same(rows, expected):
    "The same answers; figures differ in the last digit where a process has another number of threads."
    assert list(rows) == list(expected)
    plain = ["file", "label", "sure", "known", "looked_again", "error"]
    assert rows[plain].equals(expected[plain])
    assert np.allclose(rows.probability, expected.probability, atol=1e-5, equal_nan=True)
    for mine, theirs in zip(rows.to_dict("records"), expected.to_dict("records")):
        if isinstance(mine["error"], str): assert mine["boxes"] is None and mine["top5"] is None; continue
        assert [one["label"] for one in mine["top5"]] == [one["label"] for one in theirs["top5"]]
        assert np.allclose(np.stack(mine["boxes"]), np.stack(theirs["boxes"]), atol=.11)
        assert np.allclose(list(mine["scores"]), list(theirs["scores"]), atol=2e-3)


def test_columns_do_not_depend_on_the_pictures(classifier, photos):
    schema = rows_schema(classifier)
    broken = rows_table([("gone.jpg", FileNotFoundError("no file gone.jpg"))], schema)
    good = rows_table(classifier.stream([str(photos / "00.png")]), schema)
    assert broken.schema.equals(good.schema) and broken["error"].to_pylist() == ["no file gone.jpg"]
    row = good.to_pylist()[0]
    found = classifier.predict(photos / "00.png").as_dict()
    assert [[one["label"], one["probability"]] for one in row.pop("top5")] == found.pop("top5")
    assert row == dict(file=str(photos / "00.png"), error=None) | found


def test_goes_on_with_what_files_hold(classifier, photos, tmp_path):
    schema, names = rows_schema(classifier), names_in(photos)
    store = _Store(tmp_path, rows=4)
    for part in (names[:4], [*names[4:6], str(photos / "broken.jpg")]):
        store.add(rows_table(classifier.stream(part), schema))
    store.write()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["answers-000000.parquet", "answers-000001.parquet"]
    done, tally = finished(tmp_path, schema), Tally()
    assert list(_unasked(names, done, tally)) == names[6:] and tally.before == 6      # the broken one is tried again
    assert len(pq.read_table(tmp_path)) == 6 and finished(tmp_path, schema).tolist() == done.tolist()
    _Store(tmp_path, rows=1).add(rows_table([("x", ValueError("broken"))], schema))
    assert (tmp_path / "answers-000002.parquet").exists()
    finished(tmp_path, schema)
    assert not (tmp_path / "answers-000002.parquet").exists()                         # nothing was left in it


def test_answers_of_another_model_are_left_alone(classifier, tmp_path):
    schema = rows_schema(classifier)
    _Store(tmp_path, rows=1).add(rows_table([("x", ValueError("broken"))], schema))
    before = (tmp_path / "answers-000000.parquet").read_bytes()
    with pytest.raises(ValueError, match="has answers of another model, or none"):
        finished(tmp_path, schema.with_metadata(dict(fd_focus="other")))
    assert (tmp_path / "answers-000000.parquet").read_bytes() == before


def test_nothing_twice_and_nothing_missing(classifier):
    rows = rows_table([(name, ValueError("broken")) for name in "abb"], rows_schema(classifier))
    found = [table["file"].to_pylist() for table in _each_once(iter([rows[:2], rows]), list("abb"))]
    assert found == [["a", "b"], ["b"]]                           # b is listed twice, a once
    with pytest.raises(RuntimeError, match="1 answers are missing, such as that of c"):
        list(_each_once(iter([rows]), list("abbc")))


@pytest.mark.parametrize("flags, said", [
    (dict(), "needs a folder"), (dict(out="rows.csv"), "needs a folder"), (dict(out="rows", regions="r"), "--regions"),
    (dict(out="rows", format="text", csv_safe=True), "--format, --csv_safe"), (dict(out="rows", rank=0), "--rank"),
    (dict(out="rows", ray=False, actors=2), "give --ray as well"), (dict(out="rows", actors=-1), "actors=-1"),
    (dict(out="rows", device="cuda:1"), "device='cuda:1'")])
def test_flags_that_make_no_sense(flags, said, model, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end: fd_focus_predict(str(model), [str(photos)], **dict(ray=True) | flags)
    assert said in str(end.value) and not list(tmp_path.iterdir())


def test_no_head_node(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConnectionError, match="no head node .* RAY_ADDRESS=127.0.0.1:1: start it there"):
        with cluster(): pass


@pytest.mark.slow
def test_rows_are_those_of_one_process(model, classifier, photos, tmp_path):
    names = names_in(photos)
    tally = predict_on_ray(model, names, tmp_path / "rows", actors=2, bs=2, device="cpu")
    assert (tally.pictures, tally.failed, tally.answered) == (41, 1, 40)
    expected = rows_table(classifier.stream(names), rows_schema(classifier)).to_pandas()
    assert_same(table_of(tmp_path / "rows"), expected.sort_values("file", ignore_index=True))
    tally = predict_on_ray(model, names, tmp_path / "rows", actors=1, device="cpu")    # started again
    assert (tally.pictures, tally.before) == (1, 40) and len(table_of(tmp_path / "rows")) == 41


@pytest.fixture
def many(photos, tmp_path):
    "So many names that a run takes a while."
    (tmp_path / "many").mkdir()
    for copy in range(200):
        for file in photos.glob("?[0-9].png"): os.symlink(file, tmp_path / "many" / f"{copy}-{file.name}")
    return tmp_path / "many"


def started(model, pictures, out, **environment):
    words = ["--ray", "--actors", "2", "--bs", "4", "--device", "cpu", "--out", str(out)]
    command = [BIN / "fd_focus_predict", model, pictures, *words]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def actors_below(process):
    "Processes that have answered something."
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try: found += [child] if "_Actor" in " ".join(child.cmdline()) else []
        except psutil.Error: pass
    return found


def wait_for_work(process, seconds=8):
    "Until both actors are there, and some seconds of work done."
    while len(found := actors_below(process)) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(.2)
    while any("__init__" in " ".join(actor.cmdline()) for actor in found): time.sleep(.2)
    time.sleep(seconds)
    return found


@pytest.mark.slow
def test_a_killed_actor_loses_and_doubles_nothing(model, many, tmp_path):
    run = started(model, many, tmp_path / "rows")
    wait_for_work(run, .5)[0].kill()
    said = run.communicate(timeout=300)[1]
    assert run.returncode == 0, said
    rows = table_of(tmp_path / "rows")
    assert list(rows.file) == names_in(many) and rows.error.isna().all()


@pytest.mark.slow
def test_stopped_and_started_again(model, many, tmp_path):
    run = started(model, many, tmp_path / "rows")
    wait_for_work(run, 2)
    run.send_signal(signal.SIGINT)
    assert "stopped" in run.communicate(timeout=100)[1] and run.returncode == 130
    kept = len(table_of(tmp_path / "rows"))
    assert 0 < kept < len(names_in(many))
    run = started(model, many, tmp_path / "rows")
    said = run.communicate(timeout=300)[1]
    assert f"{len(names_in(many)) - kept} pictures in" in said and f"{kept} more answered before" in said
    assert list(table_of(tmp_path / "rows").file) == names_in(many)


@pytest.mark.slow
def test_two_processes_train_as_under_torchrun(tmp_path):
    words = "--data toy --arch toy_resnet --image_size 48 --images_per_class 8 --n_classes 3 --epochs 2 --bs 8".split()
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", BIN / "fd_focus_train", *words]
    for name, command in dict(a=torchrun, b=[BIN / "fd_focus_train", *words, "--ray", "2"]).items():
        run = subprocess.run([*command, "--out", tmp_path / name], capture_output=True, text=True, env=one_thread)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("validation pictures right") == 1, run.stdout       # one speaks, and once
    first, second = (load_file(tmp_path / name / "model/model.safetensors") for name in "ab")
    assert all(first[name].equal(second[name]) for name in first)
    assert (tmp_path / "a/metrics.csv").read_bytes() == (tmp_path / "b/metrics.csv").read_bytes()
    assert json.loads((tmp_path / "b/summary.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_head_node_that_goes_away(model, many, tmp_path):
    "Its token is our own: Ray may ask for one."
    ours = dict(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
    command = [BIN / "ray", "start", "--head", "--block", "--port", "0", "--num-cpus", "2", "--include-dashboard=false"]
    with open(tmp_path / "head.log", "w") as log:
        head = subprocess.Popen(command, env=os.environ | ours, stdout=log, stderr=log, start_new_session=True)
    try:
        while not (found := re.search("address='(.+)'", (tmp_path / "head.log").read_text())):
            assert head.poll() is None, (tmp_path / "head.log").read_text()
            time.sleep(.2)
        run = started(model, many, tmp_path / "rows", RAY_ADDRESS=found[1], **ours)
        wait_for_work(head, .5)
        next(one for one in psutil.Process(head.pid).children() if one.name() == "gcs_server").kill()
        said = run.communicate(timeout=200)[1]
        assert run.returncode == 1 and f"head node of the Ray cluster at {found[1]} has gone: start it again" in said
    finally:
        group = [*psutil.Process(head.pid).children(recursive=True), head] if head.poll() is None else []
        for process in group: process.kill()
