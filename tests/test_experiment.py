"An experiment that is killed goes on; what it keeps is enough to compute its statistics again."
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

from fd_focus.data.pictures import DataWarning
from fd_focus.evidence.comparison import (macro_intervals, macro_scores, paired_difference, plot_results,
                                          read_predictions, read_rows, summarise)
from fd_focus.evidence.experiment import PlannedRun, _same, keep_predictions, load_plan, run_experiment
from fd_focus.evidence.folds import join_folds
from fd_focus.training.run import train
from fd_focus.training.settings import Settings
from fd_focus.use.commands import fd_focus_experiment

RESULTS = Path(__file__).parent.parent / "results"
PLAN = """
base: {arch: toy_resnet, pretrained: false, image_size: 48, epochs: 1, bs: 8, n_classes: 3, images_per_class: 8}
variants:
  plain: {method: plain}
  focus: {}
seeds: [0, 1]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "plan.yaml").write_text(PLAN)
    return tmp_path / "mine"


def test_killed_and_started_again(folder, begin):
    first, _ = begin("fd_focus_experiment", folder)
    while not (folder / "rows.csv").is_file() and first.is_alive(): time.sleep(.02)          # one run is finished
    if sys.platform != "win32":                                   # there is no such lock on Windows
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(BlockingIOError, match=f"process {first.pid} on .* works on"): run_experiment(folder)
        with pytest.raises(SystemExit, match=f"fd_focus: process {first.pid} on"): fd_focus_experiment(str(folder))
    first.kill(); first.join()
    before = read_rows(folder)
    assert 1 <= len(before) < 4 and (before.status == "ok").all()
    for run in zip(before.data, before.variant, before.seed): assert len(read_predictions(folder, *run)["answer"])
    said = []
    after = run_experiment(folder, say=said.append)
    assert len(said) == 4 - len(before) and len(after) == 4 and (after.status == "ok").all()
    again = read_rows(folder)
    pd.testing.assert_frame_equal(again.loc[: len(before) - 1, before.columns], before)    # left alone
    kept = read_predictions(folder, "default", "focus", 1)
    accuracy = again.query("variant == 'focus' and seed == 1").accuracy.iloc[0]
    assert np.isclose((kept["answer"].argmax(1) == kept["target"]).mean(), accuracy)
    table = summarise(folder)
    assert np.isclose(table.gain[1], table.accuracy[1] - table.accuracy[0])
    assert plot_results(folder)
    keep_predictions(folder, load_plan(folder)[3], dict(kept, files=kept["files"][::-1]))
    with pytest.raises(ValueError, match="focus, seed 1 judged other pictures than plain, seed 0"): summarise(folder)


def test_a_changed_plan_runs_what_changed(folder):
    run_experiment(folder, say=lambda line: None)
    plan = yaml.safe_load(PLAN)
    plan["variants"] = {"plain": {"method": "plain"}, "focus": {"l": 1}}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    before, said = read_predictions(folder, "default", "focus", 0), []
    rows = run_experiment(folder, say=said.append)
    assert len(rows) == 4 and len(said) == 2 and all("focus" in line for line in said)
    assert not np.array_equal(read_predictions(folder, "default", "focus", 0)["answer"], before["answer"])


def test_results_elsewhere_have_their_plan(folder, tmp_path):
    (file := tmp_path / "trial.yaml").write_text(PLAN.replace("[0, 1]", "[0]"))
    quiet = lambda line: None
    run_experiment(file, say=quiet)
    assert len(read_rows(tmp_path / "trial")) == 2
    assert (tmp_path / "trial" / "plan.yaml").read_text() == file.read_text()
    with pytest.raises(ValueError, match="has another plan"): run_experiment(file, folder, quiet)
    with pytest.raises(ValueError, match="is a file; name a folder"): run_experiment(file, tmp_path / "rows.csv", quiet)
    with pytest.raises(ValueError, match="need a folder"): run_experiment(load_plan(file))


@pytest.mark.parametrize("text, told", [
    ("variants: {a: {colour: red}}\nseeds: [0]", "unknown setting colour"),
    ("variants: {a: {epoch: 3}}\nseeds: [0]", r"did you mean epochs\?"),
    ("variants: {a: {}}", "has no seeds"),
    ("just text", "holds no plan"),
    ("a: [1", "is not YAML"),
    ("variants: {a: {}}\nseeds: [0]\nepochs: 3\n7: 1", "unknown keys 7, epochs"),
    ("variants: [plain]\nseeds: [0]", r"variants is \['plain'\]; write it like variants: {"),
    ("variants: {a: {}}\nseeds: 3", r"seeds is 3; write it like seeds: \[0, 1, 2\]"),
    ("variants: {a: 3}\nseeds: [0]", "variants, a is 3; write its settings like"),
    ("variants: {a: {}}\nseeds: [x]", "seeds are whole numbers, not 'x'"),
    ("data: my_photos\nvariants: {a: {}}\nseeds: [0]", "data is 'my_photos'; write it like data: {mine: {data"),
    ("variants: {a: {}}\nseeds: []", "seeds is empty"),
    ("variants: {a: {}}\nseeds: [0]\nretired: [b]", r"retired is \['b'\]; write it like"),
    ("data: {a/b: {}, a: {}}\nvariants: {c: {}, b/c: {}}\nseeds: [0]", "can't be told apart"),
])
def test_bad_plans(tmp_path, text, told):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=told): load_plan(tmp_path / "bad.yaml")


def test_names_that_yaml_reads_as_something_else(tmp_path):
    plan = "variants: {2: {l: 2}, off: {hybrid: false}}\nseeds: [0]\nretired: {gone: {colour: red}}"
    (tmp_path / "plan.yaml").write_text(plan)
    assert [run.variant for run in load_plan(tmp_path)] == ["2", "False"]


def test_odd_names_keep_their_predictions(tmp_path):
    keys = [("d", "lr 1", 0), ("d", "lr_1", 0), ("d", "a/0", 1), ("d", "a", 0), ("d", "50 %: ä", 0)]
    for number, key in enumerate(keys):
        found = dict(answer=np.full((2, 3), number), target=np.arange(2))
        keep_predictions(tmp_path, PlannedRun(*key, Settings()), found)
    for number, key in enumerate(keys):
        kept = read_predictions(tmp_path, *key)
        assert sorted(kept) == ["answer", "target"] and (kept["answer"] == number).all()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no plan"): load_plan(tmp_path)
    with pytest.raises(FileNotFoundError, match="run fd_focus_experiment"): summarise(tmp_path)
    with pytest.raises(ValueError, match="measure='luck' is none of accuracy, macro_accuracy, cross_entropy"):
        summarise(RESULTS / "cars_lr", measure="luck")
    with pytest.raises(ValueError, match="head='third' is none of answer"): summarise(RESULTS / "cars_lr", head="third")
    with pytest.raises(ValueError, match=r"must both be \(seeds, pictures\)"):
        paired_difference(np.ones((2, 3)), np.ones((2, 4)))


def test_the_command_ends_with_a_sentence(tmp_path, command):
    (tmp_path / "bad.yaml").write_text("variants: {a: {epoch: 3}}\nseeds: [0]")
    run = command("fd_focus_experiment", tmp_path / "bad.yaml")
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "unknown setting epoch (did you mean epochs?)" in run.stderr


ROW = dict(data="default", variant="plain", seed=0, accuracy=.5, status="ok", settings="{}", seconds=1.,
           images_per_second=1., predict_seconds=1., multiply_adds=1)


@pytest.mark.parametrize("change, told", [
    ({}, None),
    (dict(status="failed: no", accuracy=float("nan"), seconds=None), None),
    (lambda file: file.write_bytes(b""), "rows.csv is no table"),
    (lambda file: file.write_bytes(b"\xff\xfe\x00data"), "rows.csv is no table"),
    (lambda file: file.write_text('a,b\n1,2,3\n1,2,3,4\n'), "rows.csv is no table"),
    (lambda file: file.write_text("name,value\nx,3\n"), "rows.csv has no column data, variant, seed, status"),
    (dict(multiply_adds=None), "rows.csv has no column multiply_adds; is it of another program or version"),
    (dict(accuracy="good"), "rows.csv: column accuracy holds 'good', no number"),
    (dict(seed="first"), "rows.csv: column seed holds 'first', no number"),
    (dict(settings="{epochs: 3"), "rows.csv: column settings of default, plain, seed 0 holds no JSON"),
    (dict(settings=float("nan")), "rows.csv: column settings of default, plain, seed 0 holds no JSON"),
])
def test_tables_of_something_else(folder, change, told):
    file = folder / "rows.csv"
    if callable(change): change(file)
    else:
        row = {name: value for name, value in (ROW | change).items() if value is not None}
        pd.DataFrame([row]).to_csv(file, index=False)
    if told is None: read_rows(folder); return
    for read in (summarise, run_experiment):
        before = file.read_bytes()
        with pytest.raises(ValueError, match=told): read(folder)
        assert file.read_bytes() == before


@pytest.mark.parametrize("content, told", [
    (b"", "is damaged"), (b"PK\x03\x04 cut", "is damaged"), (b"text", "is damaged"),
    (dict(answer=np.array(["a", None])), "is damaged"),
    (dict(answer=np.ones((2, 3))), "has no files, target of default, plain, seed 0"),
])
def test_predictions_of_something_else(folder, content, told):
    pd.DataFrame([ROW]).to_csv(folder / "rows.csv", index=False)
    file = folder / "predictions.npz"
    if isinstance(content, bytes): file.write_bytes(content)
    else: np.savez(file, **{f"default/plain/0/{name}": array for name, array in content.items()})
    with pytest.raises(ValueError, match=f"predictions.npz {told}"): summarise(folder)


@pytest.mark.parametrize("question", sorted(path.parent.name for path in RESULTS.glob("*/plan.yaml")))
def test_results_of_the_repository(question):
    "Every row belongs to the plan or is retired, has its predictions, and would not be run again."
    folder = RESULTS / question
    rows, runs = read_rows(folder), {run.key: run for run in load_plan(folder)}
    retired = yaml.safe_load((folder / "plan.yaml").read_text()).get("retired", {})
    assert (rows.status == "ok").all() and rows.accuracy.between(0, 1).all()
    assert (folder / "NOTES.md").is_file()
    assert any(variant.startswith("plain") for _, variant, _ in runs)
    keys = list(zip(rows.data, rows.variant, rows.seed))
    assert len(set(keys)) == len(keys)
    for key, row in zip(keys, rows.itertuples()):
        kept = read_predictions(folder, *key)
        draws_anew = row.variant == "random regions"          # these rows looked elsewhere each time
        tolerance = .06 if draws_anew else 1.1 / len(kept["target"])      # half precision: one picture
        assert abs((kept["answer"].argmax(1) == kept["target"]).mean() - row.accuracy) <= tolerance
        if key in runs: assert _same(row.settings, runs[key].settings), json.loads(row.settings)
        else: assert row.variant in retired
    assert len(summarise(folder, rows.variant[0])) == len(rows.groupby(["data", "variant"]))


def test_uneven_classes_get_their_columns(folder):
    "Macro accuracy and F1 are scikit-learn's, and a gain can be one of macro accuracy; even sets stay as they are."
    rng, lines = np.random.default_rng(0), []
    for data, counts in dict(even=[9, 9, 9], uneven=[20, 4, 4]).items():
        target = np.repeat(np.arange(3), counts)
        for variant in ("plain", "focus"):
            run = PlannedRun(data, variant, 0, Settings())
            files, answer = np.array([f"{i}.jpg" for i in range(len(target))]), rng.dirichlet(np.ones(3), len(target))
            keep_predictions(folder, run, dict(files=files, target=target, answer=answer))
            lines.append(ROW | dict(data=data, variant=variant))
    pd.DataFrame(lines).to_csv(folder / "rows.csv", index=False)
    table = summarise(folder).set_index(["data", "variant"])
    said = {v: read_predictions(folder, "uneven", v, 0)["answer"].argmax(1) for v in ("plain", "focus")}
    balanced = {v: 100 * balanced_accuracy_score(target, answers) for v, answers in said.items()}
    assert table.macro_accuracy["uneven", "focus"] == pytest.approx(balanced["focus"])
    f1 = f1_score(target, said["plain"], average="macro")
    assert table.macro_f1["uneven", "plain"] == pytest.approx(100 * f1)
    assert table.macro_accuracy["even"].isna().all() and list(table.columns[:3]) == ["seeds", "accuracy", "sd"]
    macro = summarise(folder, measure="macro_accuracy").set_index(["data", "variant"])
    assert macro.gain["uneven", "focus"] == pytest.approx(balanced["focus"] - balanced["plain"])
    assert "macro_f1" not in macro.loc["even"].dropna(axis=1)


@pytest.mark.parametrize("named", [np.arange(5), np.array(["wren", "crow", "rook", "daw", "pie"])])
def test_macro_scores_and_their_intervals(named):
    rng = np.random.default_rng(1)
    labels = named[np.repeat(np.arange(4), [1, 6, 30, 60])]          # nothing shows the fifth class
    answers = np.where(rng.random(len(labels)) < .6, labels, named[rng.integers(0, 5, len(labels))])
    scores, ends = macro_scores(labels, answers), macro_intervals(labels, answers)
    by_class = [(answers == labels)[labels == c].mean() for c in named[:4]]
    assert scores["macro_accuracy"] == pytest.approx(np.mean(by_class))
    for name, (low, high) in ends.items(): assert 0 <= low < scores[name] < high <= 1
    assert ends == macro_intervals(labels, answers) and macro_intervals(labels, labels)["macro_f1"] == (1, 1)
    rows = [np.flatnonzero(labels == c) for c in named[:4]]          # drawn one by one
    drawn = [np.concatenate([rng.choice(own, len(own)) for own in rows]) for _ in range(400)]
    theirs = np.quantile([macro_scores(labels[i], answers[i])["macro_f1"] for i in drawn], [.025, .975])
    assert np.abs(theirs - ends["macro_f1"]).max() < .05             # ours is a little wider


def test_interval_narrows_with_pictures():
    rng = np.random.default_rng(0)
    widths = []
    for pictures in (100, 400, 1600):
        ours, rival = rng.random((8, pictures)) < .9, rng.random((8, pictures)) < .85
        _, low, high = paired_difference(ours, rival, n=1000)
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]


def test_answers_of_one_training_share_its_heads(tmp_path, monkeypatch):
    trained = []
    def counted(settings, **kwargs):
        trained.append(settings.method)
        return train(settings, **kwargs)
    monkeypatch.setattr("fd_focus.evidence.experiment.train", counted)
    toy = "arch: toy_resnet, image_size: 64, n_classes: 3, images_per_class: 6, valid_per_class: 3, epochs: 1, bs: 6"
    (tmp_path / "plan.yaml").write_text(
        f"base: {{{toy}}}\nseeds: [0]\n"
        "variants: {one: {m: 2, l: 2, answer: image}, all: {m: 2, l: 2, answer: ensemble}, plain: {method: plain}}")
    rows = run_experiment(tmp_path, say=lambda line: None)
    assert (rows.status == "ok").all() and trained == ["focus", "plain"]
    one, both = (read_predictions(tmp_path, "default", name, 0) for name in ("one", "all"))
    assert set(both) == {"files", "target", "answer"} and {"image", "region", "ensemble"} <= set(one)
    assert (one["answer"] == one["image"]).all() and (both["answer"] == one["ensemble"]).all()
    for choice in ("look_again: 10%, answer: adaptive", "preset: photos, look_again: 0.1"):
        (tmp_path / "plan.yaml").write_text(f"base: {{{toy}}}\nvariants: {{a: {{{choice}}}}}\nseeds: [0]")
        with pytest.raises(ValueError, match="look_again would choose on the pictures that judge"): load_plan(tmp_path)


def test_methods_under_one_recipe_are_a_plan(tmp_path):
    "Flags make the plan; what contradicts itself is told before anything runs."
    asked = dict(out=str(tmp_path / "rivals"), methods=["plain", "bilinear"], seeds="0", arch="toy_resnet",
                 image_size=48, n_classes=3, images_per_class=8, valid_per_class=4, epochs=1, bs=8)
    fd_focus_experiment(None, **asked)
    rows = pd.read_csv(tmp_path / "rivals/rows.csv")
    assert list(rows.variant) == ["plain", "bilinear"] and (rows.status == "ok").all()
    assert {"plan.yaml", "cost.png", "predictions.npz"} <= {file.name for file in (tmp_path / "rivals").iterdir()}
    for wrong, said in ((dict(methods=None), "give a plan, or --methods"), (dict(out=None), "give --out"),
                        (dict(epochs=2), "is another plan"), (dict(methods=["nobody"]), "is none of"),
                        (dict(seeds="a"), "give whole numbers")):
        with pytest.raises(SystemExit, match=said): fd_focus_experiment(None, **asked | wrong)
    with pytest.raises(SystemExit, match="write it into the plan"): fd_focus_experiment(str(tmp_path / "rivals"), lr=.1)
    failing = asked | dict(out=str(tmp_path / "failing"), methods=["plain"], bs=2000)
    with pytest.raises(SystemExit, match="every run failed, the first one: ValueError: bs=2000 is more than"):
        fd_focus_experiment(None, **failing)
    fd_focus_experiment(None, **failing | dict(bs=8))          # a plan that gave nothing may be mended


def test_folds_judge_all_pictures_and_name_labels_that_look_wrong(tmp_path, capsys):
    photos = tmp_path / "photos"
    for kind, colour in dict(red=(190, 60, 60), green=(60, 190, 60), blue=(60, 60, 190)).items():
        (photos / kind).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).normal(colour, 60, (48, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(photos / kind / f"{kind}{i}.png")
    (photos / "red/red0.png").rename(photos / "blue/red0.png")
    asked = dict(out=str(tmp_path / "folds"), methods=["probe"], data=str(photos), arch="toy_resnet", image_size=48,
                 pretrained=False, epochs=1, bs=8, workers=0, folds=3, rival="probe")
    with pytest.warns(DataWarning, match="random weights"): fd_focus_experiment(None, **asked)
    assert "1 picture may be labelled wrongly, says probe" in capsys.readouterr().out
    wrong = pd.read_csv(tmp_path / "folds/out_of_fold/labels.csv")
    said = [(Path(line.file).name, line.label, line.suggested) for line in wrong.itertuples()]
    assert said == [("red0.png", "blue", "red")]
    assert (tmp_path / "folds/out_of_fold/labels.png").exists()
    joined = read_predictions(tmp_path / "folds/out_of_fold", "default", "probe", 0)
    assert len(set(joined["files"].tolist())) == len(joined["files"]) == 24
    one = pd.read_csv(tmp_path / "folds/out_of_fold/rows.csv")
    assert json.loads(one.settings[0])["fold"] is None and one.accuracy[0] == (joined["answer"].argmax(1) ==
                                                                             joined["target"]).mean()
    kept = (tmp_path / "folds/out_of_fold/predictions.npz").read_bytes()
    rows = pd.read_csv(tmp_path / "folds/rows.csv")
    rows[rows.data != "default, fold 2 of 3"].to_csv(tmp_path / "folds/rows.csv", index=False)
    with pytest.raises(ValueError, match="probe, seed 0 lacks fold 2 of 3: run the plan again"):
        join_folds(tmp_path / "folds")
    assert (tmp_path / "folds/out_of_fold/predictions.npz").read_bytes() == kept      # what was there stays
    rows.assign(data=[name.replace("3 of 3", "3 of 4") for name in rows.data]).to_csv(tmp_path / "folds/rows.csv")
    with pytest.raises(ValueError, match="has 3 folds and 4: give each a folder of its own"):
        join_folds(tmp_path / "folds")
    with pytest.raises(SystemExit, match="fold and valid_pct are given by the folds"):
        fd_focus_experiment(None, **asked | dict(out=str(tmp_path / "other"), valid_pct=.5))
