"The commands as a user types them: what they write, and what they say of bad input."
import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from fd_focus.toy import ToyBirds
from fd_focus.training.run import make_learner
from fd_focus.training.settings import Settings
from fd_focus.use import cli
from fd_focus.use.cli import fd_focus_train
from fd_focus.use.commands import command as command_of
from fd_focus.use.model_folder import load_focus, preparation, save_focus

BIN = Path(sys.executable).parent
TINY = ["--arch", "toy_resnet", "--image_size", "64", "--epochs", "1", "--bs", "4"]
TOY = dict(arch="toy_resnet", image_size=48, epochs=1, bs=8, n_classes=3, images_per_class=8, valid_per_class=4,
           examples=0)


def installed(name, *args):
    "The command itself, which takes seconds to start."
    return subprocess.run([BIN / name, *map(str, args)], capture_output=True, text=True)


def fails(*args, name="fd_focus_train"):
    "What a command says as it ends with an error; in this process, which has imported everything."
    with mock.patch.object(sys, "argv", [name, *map(str, args)]), redirect_stderr(io.StringIO()) as said:
        with pytest.raises(SystemExit) as end: getattr(cli, name)()
    assert end.value.code not in (0, None)
    return f"{end.value.code}\n{said.getvalue()}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Eighteen birds of three classes, as class folders."
    folder = tmp_path_factory.mktemp("birds")
    birds = ToyBirds(images_per_class=6, n_classes=3, image_size=80)
    for i in range(len(birds)):
        image, label = birds[i]
        (folder / birds.classes[label]).mkdir(exist_ok=True)
        image.save(folder / birds.classes[label] / f"{i:02d}.png")
    return folder


COMMANDS = ["fd_focus_" + name for name in "train compare experiment predict evaluate export bench app".split()]


def test_asking_a_model_needs_no_fastai(folder, tmp_path):
    "Predict, judge and export import none of it, nor what only drawing needs."
    torch.manual_seed(0)
    settings = Settings(data=str(folder), arch="toy_resnet", image_size=64, bs=4, epochs=1, workers=0)
    model = save_focus(make_learner(settings), tmp_path / "model")
    code = (
        "import sys\n"
        "from fd_focus.use.cli import fd_focus_evaluate, fd_focus_export, fd_focus_predict\n"
        "model, data, out = sys.argv[1:]\n"
        "fd_focus_predict(model=model, paths=[data], device='cpu')\n"
        "assert not {'fastai', 'matplotlib', 'scipy', 'timm'} & set(sys.modules), sorted(sys.modules)\n"
        "fd_focus_evaluate(model=model, folder=data, device='cpu')\n"
        "fd_focus_export(model=model, format='torch-export', out=out)\n"
        "assert 'fastai' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code, model, folder, tmp_path / "model.pt2"], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("file,label,") and (tmp_path / "model.pt2").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    "What takes seconds is imported after the words are read; so help comes at once."
    run = subprocess.run([sys.executable, "-X", "importtime", BIN / name, "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and f"usage: {name}" in run.stdout and "--import" in run.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines() if "|" in line}
    assert not imported & {"torch", "fastai", "matplotlib", "pandas", "numpy"}


def test_comparing_runs_needs_no_torch():
    code = "import sys, fd_focus.use.compare; print({'torch', 'fastai', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_train_method_and_plain(folder, tmp_path, command):
    for method, start in (("focus", installed), ("plain", command)):
        out = tmp_path / method
        extra = ["--method", "plain", "--examples", 0] if method == "plain" else ["--m=4", "--l", 2]
        run = start("fd_focus_train", "--data", folder, *TINY, "--out", out, *extra)
        assert run.returncode == 0, run.stderr
        assert f"{method}: " in run.stdout
        first = run.stdout.splitlines()
        assert first[0].endswith(": 3 classes, 15 training and 3 validation pictures")
        assert first[1].startswith(f"toy_resnet from random weights; method {method}: 64 pixels")
        assert all(len(line) <= 80 for line in first if line.lstrip().startswith(("epoch", "1 ")))
        summary = json.loads((out / "summary.json").read_text())
        assert 0 <= summary["accuracy"] <= 1 and summary["settings"]["method"] == method and summary["seconds"] > 0
        assert set(summary["settings"]) == set(Settings.__dataclass_fields__)
        assert {"torch", "fastai", "fd_focus"} <= set(summary["versions"])
        files = {"summary.json", "settings.yaml", "metrics.csv", "curves.png", "regions.png", "answers.csv", "model"}
        assert {p.name for p in out.iterdir()} == files
        assert len(list((out / "model/examples").glob("*.jpg"))) == (0 if method == "plain" else 3)
        model = load_focus(out / "model")
        assert model.classes == sorted(p.name for p in folder.iterdir())
        assert model(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    run = command("fd_focus_compare", tmp_path / "focus", tmp_path / "plain")
    heading, ours, rival, difference = run.stdout.splitlines()
    assert run.returncode == 0 and "95 % interval" in heading and "points" in difference
    assert "on the same 3 pictures, at 0." in difference      # plain costs a part of the first one


def test_a_finished_run_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("runs/train", "runs/train2"):
        fd_focus_train(**TOY)
        assert Path(place, "summary.json").is_file()
    with pytest.raises(SystemExit, match="runs/train holds a finished run: give another --out"):
        fd_focus_train(**TOY, out="runs/train")
    fd_focus_train(**TOY | dict(method="plain"), out="runs/train", overwrite=True)
    assert json.loads(Path("runs/train/summary.json").read_text())["settings"]["method"] == "plain"


def test_who_answers_is_chosen_on_validation_pictures_alone(tmp_path):
    "The head that is best there, unless a flag has named one; test pictures choose nothing."
    found = {}
    for name, more in dict(free=dict(), named=dict(answer="hybrid"), judged=dict(split="test")).items():
        fd_focus_train(**TOY, **more, out=str(tmp_path / name))
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())
        kept = json.loads((tmp_path / name / "model/config.json").read_text())["options"]["answer"]
        assert kept == found[name].get("answer", "hybrid")
    assert "answer" not in found["named"] and "answer" not in found["judged"]
    free = found["free"]
    heads = [free["accuracy"], free["image_accuracy"], free["ensemble_accuracy"]]
    assert free["accuracy"] == max(heads)


MINE = """
from torch import nn
from fd_focus.methods import Method, register

class Mine(Method):
    def __init__(self, body, n_classes, image_size=448, rank=4):
        super().__init__(body, n_classes, image_size)
        self.rank = rank
        self.head = nn.Sequential(nn.Linear(self.n_features, rank), nn.Linear(rank, n_classes))
    def forward(self, x, target=None):
        logits = self.head(self.body(x).amax((2, 3)))
        return {"image": logits} if self.training else logits

register("mine_alone", Mine)
"""


def test_a_method_of_ones_own(folder, tmp_path, monkeypatch, command):
    "--import makes it known; every command with its model wants it again, and nothing else runs code of a folder."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_module.py").write_text(MINE)
    train = ["--data", folder, *TINY, "--method", "mine_alone", "--out", "run"]
    assert "method='mine_alone' is none of" in fails(*train)
    assert "--import gone: No module named 'gone'" in fails("--import", "gone", *train)
    run = command("fd_focus_train", "--import", "my_module", *train, "--options", "rank=2")
    assert run.returncode == 0, run.stderr
    assert "mine_alone: " in run.stdout
    assert json.loads(Path("run/model/config.json").read_text())["options"]["rank"] == 2
    picture = next(folder.rglob("*.png"))
    asked = command("fd_focus_predict", "--import", "my_module.py", "run/model", picture, "--device", "cpu")
    assert asked.returncode == 0 and str(picture) in asked.stdout, asked.stderr
    assert "mine_alone" in fails("run/model", picture, "--device", "cpu", name="fd_focus_predict")


def test_flags_win_over_the_file_and_both_over_the_preset(tmp_path, command):
    "Also a flag that says what is the default anyway, or is cut short."
    config, out = tmp_path / "mine.yaml", tmp_path / "run"
    written = dict(bs=8, m=3, sigma=2, epochs=3, arch="toy_resnet", images_per_class=8, valid_per_class=2, out=str(out))
    config.write_text(json.dumps(written))          # which is YAML
    run = command("fd_focus_train", "--preset", "photos", "--config", config, "--image-size=48", "--ep", 1, "--bs=32",
                  "--no-hybrid")
    assert run.returncode == 0, run.stderr
    settings = json.loads((out / "summary.json").read_text())["settings"]
    names = ("bs", "m", "sigma", "epochs", "image_size", "input_size", "region_size", "l", "fusion", "hybrid")
    assert [settings[name] for name in names] == [32, 3, 2., 1, 48, 96, 24, 2, "mean", False]


def test_one_process_under_torchrun_is_calibrated(tmp_path, monkeypatch, capsys):
    "It sees all validation pictures, whoever started it."
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0").items(): monkeypatch.setenv(name, value)
    fd_focus_train(**TOY, out=str(tmp_path / "run"))
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["temperature"] > 0 and "threshold" in config and "not calibrated" not in capsys.readouterr().out


@pytest.mark.parametrize("split, warned", [("valid", False), ("test", True)])
def test_says_which_pictures_judged(tmp_path, capsys, split, warned):
    fd_focus_train(**TOY, split=split, out=str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert f"of 12 {dict(valid='validation', test='test')[split]} pictures right" in said
    assert ("fitted on these test pictures" in said) == warned
    assert said.splitlines()[-1].startswith("waited for pictures ")
    assert sum(json.loads((tmp_path / "run/summary.json").read_text())["shares"].values()) == pytest.approx(1, abs=.01)


def test_flags_of_another_program_are_not_read(monkeypatch, capsys):
    "A notebook's kernel has arguments too: `--f=...` would have begun `fusion`, and `--epochs=7` been a flag."
    from fd_focus.use import commands
    asked = []
    monkeypatch.setattr(commands, "_train", lambda *args: asked.append(args[0]))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "--epochs=7", "--fusion=mean"])
    fd_focus_train()
    fd_focus_train(bs=8)
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    with pytest.raises(SystemExit, match="say what to learn: --data FOLDER"): fd_focus_train()
    from_random = dict(preset="none")      # what `toy` gets, for want of weights
    assert asked == [dict(epochs=7, fusion="mean") | from_random, dict(bs=8) | from_random]


def test_folder_settings_reach_the_data(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "birds")
    kind = next((tmp_path / "birds").iterdir())
    (kind / "broken.png").write_bytes(b"no picture")
    base = Settings(data=str(tmp_path / "birds"), arch="toy_resnet", image_size=64, bs=4, epochs=1, workers=0)
    with pytest.raises(ValueError, match="broken.png"): make_learner(base)
    dls = make_learner(replace(base, on_bad_image="skip", valid_pct=.5, balance=True, cache=str(tmp_path / "kept"))).dls
    assert len(dls.valid_ds) == 9 and [Path(f).name for f in dls.skipped] == ["broken.png"]
    assert type(dls.train).__name__ == "BalancedDL"
    for fit, squash in dict(squash=True, crop=False, pad="pad").items():
        learn = make_learner(replace(base, on_bad_image="skip", fit=fit))
        assert preparation(learn.dls, (64, 64))["squash"] == learn.dls.geometry[1] == squash
    assert len(make_learner(replace(base, data="toy", valid_per_class=3)).dls.valid_ds) == 36


def test_bad_arguments(folder, tmp_path):
    out = ["--out", tmp_path / "run"]
    assert "no folder" in fails("--data", tmp_path / "nowhere", *TINY, *out)
    assert "is no model of torchvision" in fails("--data", folder, *TINY, "--arch", "resnet81", *out)
    assert "does not fit image_size" in fails("--data", folder, *TINY, "--region_size", 100, *out)
    wrong = fails("--data", folder, *TINY, "--method", "fokus", *out)
    assert "method='fokus' is none of plain, focus" in wrong and "(did you mean focus?)" in wrong
    assert "takes no m; it takes image_size" in fails("--data", folder, *TINY, "--method", "plain", "--m", 3, *out)
    assert "cuts no regions" in fails("--data", folder, *TINY, "--method", "plain", "--input_size", 128, *out)
    assert "head_weights names bogus" in fails("--data", folder, *TINY, "--head_weights", "bogus=1", *out)
    assert "preset='best' is not one of" in fails("--preset", "best", *TINY, *out)
    assert "l=4 regions are to be used of m=2" in fails("--data", folder, *TINY, "--m", 2, *out)
    assert "examples=-1; use a number" in fails("--data", folder, *TINY, "--examples", -1, *out)
    assert "valid_pct=2.0; use a share" in fails("--data", folder, *TINY, "--valid_pct", 2, *out)
    assert "unrecognized arguments" in fails("--data", folder, "--colour", "red")
    assert "--epohcs (did you mean --epochs?)" in fails("--data", folder, "--epohcs", 3)
    assert "cells" in fails("--data", folder, *TINY, "--m", 50, *out)
    small = ["--arch", "squeezenet1_1", "--image_size", 8, "--no-pretrained"]
    assert "32x32 would do: give it as image_size" in fails("--data", folder, *TINY, *small, *out)
    assert "epochs=0" in fails("--data", folder, *TINY, "--epochs", 0, *out)


def test_bad_folders(tmp_path):
    picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    assert "no pictures in" in fails("--data", tmp_path, *TINY)
    for i in range(4):
        (tmp_path / "only").mkdir(exist_ok=True)
        picture.save(tmp_path / "only" / f"{i}.png")
    assert "only one class, only" in fails("--data", tmp_path, *TINY)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    assert "cut.jpg" in fails("--data", tmp_path, *TINY)
    (tmp_path / "other" / "cut.jpg").unlink()
    picture.save(tmp_path / "other" / "a.png")
    (tmp_path / "split.csv").write_text("file,label,split\nonly/0.png,only,train\nother/a.png,other,test\n")
    assert "classes without training pictures: other" in fails("--data", tmp_path, *TINY)


def test_an_error_is_a_sentence(tmp_path, command):
    "In a process of its own: no traceback, and the status tells."
    run = command("fd_focus_train", "--data", tmp_path / "nowhere")
    assert run.returncode == 1 and run.stderr.startswith(f"fd_focus: no folder {tmp_path / 'nowhere'}"), run.stderr
    assert "Traceback" not in run.stderr and not run.stdout


def test_without_a_network_the_advice_is_to_name_weights(folder, tmp_path):
    with mock.patch("torch.hub.load_state_dict_from_url", side_effect=URLError("no network")), \
         mock.patch("torchvision.models._api.load_state_dict_from_url", side_effect=URLError("no network")):
        said = fails("--data", folder, *TINY, "--arch", "resnet18", "--out", tmp_path / "run")
    assert "the download failed (no network)" in said and "--weights" in said and "--no-pretrained" in said


def test_out_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in fails("--data", folder, *TINY, "--out", tmp_path / "file" / "run")


def test_weights_that_do_not_fit(folder, tmp_path):
    from fd_focus.bodies import create_body
    body, _ = create_body("toy_resnet", pretrained=False)
    state = body.state_dict()
    state["fc.weight"] = torch.zeros(3, 128)
    torch.save(state, tmp_path / "good.pth")
    assert create_body("toy_resnet", weights=tmp_path / "good.pth")[0].conv1.weight.equal(body.conv1.weight)
    state["layer9.weight"] = state.pop("conv1.weight")
    torch.save(state, tmp_path / "bad.pth")
    message = fails("--data", folder, *TINY, "--weights", tmp_path / "bad.pth", "--out", tmp_path / "run")
    assert "missing: conv1.weight" in message and "unexpected: layer9.weight" in message and "fc." not in message
    (tmp_path / "text.pth").write_text("no weights")
    assert "no state dict that can be read safely" in fails("--data", folder, *TINY, "--weights", tmp_path / "text.pth")
    assert "no weights file" in fails("--data", folder, *TINY, "--weights", tmp_path / "gone.pth")


def test_a_run_among_its_own_class_folders_is_refused(folder, tmp_path, monkeypatch):
    "`--data .` with the default --out would make runs/ a class of the next run."
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "photos"))
    with pytest.raises(SystemExit) as end: fd_focus_train(data=".", arch="toy_resnet", image_size=64, bs=4, epochs=1)
    assert "lies among the class folders of" in end.value.code and not Path("runs").exists()


def test_who_looks_again_is_chosen_at_the_end(tmp_path, command):
    "On validation birds the limit is chosen, kept in the model, and the report has the accuracy that it gives."
    run = command("fd_focus_train", *TINY, "--data", "toy", "--n_classes", 3, "--images_per_class", 12, "--answer",
                  "adaptive", "--distill", 1, "--out", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    assert "of the validation pictures look again" in run.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["options"]["answer"] == "adaptive" and 0 <= summary["looked_again"] <= 1
    assert config["look_again_below"] != .9 and (tmp_path / "run" / "look_again.png").is_file()
    judged = command("fd_focus_train", *TINY, "--data", "toy", "--n_classes", 3, "--images_per_class", 12, "--answer",
                     "adaptive", "--split", "test", "--out", tmp_path / "judged")
    assert "test pictures judge, and choose nothing" in judged.stdout, judged.stderr


def test_every_command_prints_every_name(monkeypatch):
    "Also where the output is redirected, and has an encoding that lacks most characters."
    @command_of
    def say(word: str): print(word)
    for encoding, written in (("ascii", b"\\u5c71\\xe9 caf\xe9\n"), ("cp1252", b"\\u5c71\xe9 caf\xe9\n")):
        output = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
        monkeypatch.setattr(sys, "stdout", output)
        say("山é caf\udce9")
        output.flush()
        assert output.buffer.getvalue() == written
    assert all(hasattr(getattr(cli, name), "__wrapped__") for name in COMMANDS)      # made by `command` too


def test_errors_of_a_command_do_not_steer_the_terminal(tmp_path):
    said = fails("--data", tmp_path / "\x1b[2J\u202e", *TINY, "--out", tmp_path / "run")
    assert r"\x1b[2J\u202e" in said and "\x1b" not in said and "\u202e" not in said


def test_names_of_pictures_that_are_no_utf8_do_not_end_a_training(tmp_path):
    "Each epoch's checkpoint has a digest of them; those that are left out are listed at the end."
    from fd_focus.data.loaders import FocusDataLoaders
    from fd_focus.training.checkpoint import _digest
    assert _digest(["caf\udce9.png"]) != _digest(["caf\udce8.png"])
    dls = FocusDataLoaders.from_toy(2, 1, image_size=48, n_classes=3, bs=2, num_workers=0)
    dls.skipped = {Path("caf\udce9.png"): "caf\udce9.png cannot be read"}
    assert b"caf\xe9.png,caf\xe9.png cannot" in dls.write_skipped(tmp_path).read_bytes()
