"Settings: checks of bad values, files, presets, flags; the table agrees with the methods it serves."
import inspect
import multiprocessing
import re
from argparse import ArgumentTypeError
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from hypothesis import given, settings as profile, strategies as st

from fd_focus.training.flags import make_parser, parse, parsed
from fd_focus.training.settings import (
    GROUPS, PRESETS, MethodSettings, Settings, check_settings, make_settings, method_arguments, read_settings, resolve,
    workers_to_spare, write_settings)


def command(
    out: str = "runs/train",   # 50 % of the folder
):
    "Do it."


PARSER = make_parser(command, GROUPS)


def test_the_method_group_is_focus_nets_constructor():
    from fd_focus.focus import FocusNet
    from fd_focus.methods import method_options
    group = {option.name: option for option in fields(MethodSettings) if option.name not in ("method", "options")}
    assert set(group) == set(method_options(FocusNet))
    defaults = {name: p.default for name, p in inspect.signature(FocusNet.__init__).parameters.items()}
    for name, option in group.items():       # the help says FocusNet's default in brackets
        said = re.search(r"\(([^()]+)\)$", option.metadata["help"])
        if name == "image_size": assert option.default == defaults[name]
        elif defaults[name] is not None: assert said[1] == str(defaults[name]), name


def test_names_are_said_once():
    names = [option.name for group in GROUPS.values() for option in fields(group)]
    assert len(names) == len(set(names)) and set(names) == set(Settings.__dataclass_fields__)
    for option in fields(Settings): assert option.metadata["help"]


@pytest.mark.parametrize("bad, message", [
    (dict(epochs=0), "epochs=0; train for at least 1"),
    (dict(bs=1), "batch norm needs at least 2"),
    (dict(lr=0.), "above 0"),
    (dict(lr=float("nan")), "above 0"),
    (dict(early_stop=-1), "or 0 for never"),
    (dict(workers=-1), "use 0 or more"),
    (dict(ema=.9), "belong to recipe='modern'"),
    (dict(mixup=.2, recipe="paper"), "belong to recipe='modern'"),
    (dict(input_size=32), "smaller than image_size=448"),
    (dict(balance=True, valid_pct=.1), "valid_pct, balance: for pictures"),
    (dict(data="photos", split="test", n_classes=3), "split, n_classes: for toy birds, not for data='photos'"),
    (dict(data="photos", balance=True, class_weights="balanced"), "class_weights counts them more: use one of the two"),
    (dict(data="photos", fit="stretch"), "fit='stretch' is none of 'squash', 'crop', 'pad'"),
    (dict(fit="pad"), "fit: for pictures in a folder"),
    (dict(class_weights="rare"), "class_weights='rare' is none of 'balanced'"),
    (dict(layer_decay=0.), "layer_decay=0.0; use a share above 0, such as 0.75"),
    (dict(layer_decay=1.5), "1: the whole body learns alike"),
    (dict(layer_decay=.75, recipe="paper"), "layer_decay is for recipe='one_cycle' or 'modern'"),
    (dict(arch_kwargs=dict(pretrained=True, depth=2)), "arch_kwargs: pretrained is a setting of its own"),
    (dict(recipe="cosine"), "recipe='cosine' is none of 'one_cycle', 'modern', 'paper'"),
    (dict(log="paper"), "log='paper' is none of"),
    (dict(amp="fp8"), "amp='fp8' is none of"),
    (dict(hybrid=1), "hybrid: 1 is no bool or nothing"),
    (dict(m=2.5), "m: 2.5 is no int or nothing"),
    (dict(options=dict(m=3)), "options: m is a setting of its own"),
    (dict(options="m=3"), "options: 'm=3' is no dict"),
    (dict(test_pct=1.), "test_pct=1.0; use a share between 0 and 1"),
    (dict(valid_pct=0), "valid_pct=0.0; use a share between 0 and 1"),
    (dict(epochs=True), "epochs: True is no int"),
    (dict(epochs=None), "None is no int")])
def test_bad_values(bad, message):
    with pytest.raises(ValueError, match=re.escape(message)): Settings(**bad)


def test_numbers_and_paths_become_plain():
    s = Settings(data=Path("birds"), seed=np.int64(3), wd=np.float32(.5), lr=1)
    assert [type(v) for v in (s.data, s.seed, s.wd, s.lr)] == [str, int, float, float]
    yaml.safe_dump(asdict(s))


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown setting colour_of_sky, imagesize \(did you mean image_size\?\)"):
        check_settings(dict(imagesize=4, colour_of_sky="blue"))
    with pytest.raises(ValueError, match="unknown setting 3"): make_settings({3: 4})
    with pytest.raises(ValueError, match="unknown setting plain"): make_settings(dict(plain=True))


@pytest.mark.parametrize("text, message", [
    ("- epochs", "holds no settings"), ("epochs: [3", "is not YAML"), ("epochs: ten", "epochs: 'ten' is no int"),
    ("shade: red", "unknown setting shade"), ("lr: {a: 1}", "lr: ")])
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error: read_settings(file)
    assert str(error.value).startswith(str(file))


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no settings file gone.yaml"): read_settings("gone.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_settings(tmp_path / "empty.yaml") == {}
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not YAML"): read_settings(tmp_path / "bytes.yaml")
    mapped = Settings(options=dict(rank=3), head_weights=dict(image=.5), cut=7)
    for settings in (Settings(), mapped, resolve(Settings(data="birds"))):
        assert Settings(**read_settings(write_settings(settings, tmp_path / "new"))) == settings
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["settings.yaml"]


def test_presets():
    with pytest.raises(ValueError, match="preset='best' is not one of paper, photos or none"):
        make_settings(dict(preset="best"))
    for name in PRESETS:
        s = make_settings(dict(preset=name, data="birds", epochs=3, lr=1e-3))
        assert (s.epochs, resolve(s).lr, s.data) == (3, 1e-3, "birds")
        assert make_settings(asdict(s)) == s
    paper = resolve(make_settings(dict(preset="paper", data="birds")))
    assert (paper.recipe, paper.lr, paper.body_lr, paper.wd) == ("paper", .01, .1, 5e-4)
    assert (paper.epochs, paper.image_size) == (100, 448)
    assert paper.arch == "resnet50.IMAGENET1K_V1" and paper.pretrained and paper.m is None
    larger = make_settings(dict(preset="photos", image_size=320))
    assert (larger.input_size, larger.region_size, larger.zoom_size) == (640, 160, 228)
    rival = make_settings(dict(preset="photos", method="plain"))
    assert method_arguments(rival, ("image_size",)) == dict(image_size=224)
    assert make_settings(dict(preset="none")) == Settings()


def test_a_share_that_looks_again():
    assert make_settings(dict(preset="photos", look_again="12.5%")).look_again == .125
    with pytest.raises(ValueError, match="look_again=10.0; use a share from 0 to 1, or such as 10%"):
        Settings(answer="adaptive", look_again=10)
    with pytest.raises(ValueError, match="look_again is for answer='adaptive'"): Settings(look_again=.1)
    with pytest.raises(ValueError, match="look_again: 'few%' is no"): make_settings(dict(look_again="few%"))


def test_what_was_not_given():
    assert resolve(Settings()).workers == 0 and not resolve(Settings()).pretrained
    assert not resolve(Settings(data="birds", pretrained=False)).pretrained
    assert not resolve(Settings(data="birds", arch="toy_resnet")).pretrained
    assert resolve(Settings(data="birds", weights="w.pt")).pretrained is False
    assert resolve(Settings(pretrained=True)).body_lr == .1
    assert resolve(Settings(pretrained=True, body_lr=.5)).body_lr == .5
    assert resolve(Settings(recipe="paper", wd=0.)).wd == 0
    assert resolve(Settings(data="birds", workers=3)).workers == 3


@pytest.mark.parametrize("cores, processes, workers", [(1, 1, 0), (2, 1, 1), (16, 1, 15), (16, 4, 3), (64, 1, 16)])
def test_workers_to_spare(cores, processes, workers):
    with mock.patch("os.sched_getaffinity", return_value=set(range(cores)), create=True), \
         mock.patch.object(multiprocessing, "get_start_method", return_value="forkserver"):      # Python 3.14's
        assert workers_to_spare(processes) == workers


def test_no_workers_where_they_cannot_be_forked():
    with mock.patch.object(multiprocessing, "get_all_start_methods", return_value=["spawn"]):
        assert workers_to_spare() == 0


def test_both_spellings_and_short_ones():
    for words in (["--image_size", "64"], ["--image-size", "64"], ["--image-size=64"], ["--image_si=64"]):
        assert parse(PARSER, words) == dict(image_size=64)
    for word in ("--no-keep_best", "--no-keep-best", "--no_keep_best"):
        assert parse(PARSER, [word]) == dict(keep_best=False)
    assert parse(PARSER, ["--hybrid", "--pretrained", "--cut", "none"]) == dict(hybrid=True, pretrained=True, cut=None)


def test_mappings_add_up():
    typed = parse(PARSER, ["--options", "rank=8", "kind=a-b=c", "--options", "deep={x: [1, 2]}"])
    assert typed == dict(options=dict(rank=8, kind="a-b=c", deep=dict(x=[1, 2])))
    for word in ("rank", "=3"):
        with pytest.raises(ArgumentTypeError, match="is no name=value"): parsed("options", word, dict | None)


@pytest.mark.parametrize("words, message", [
    (["--epochs", "ten"], "argument --epochs: epochs: 'ten' is no int"),
    (["--colour", "red"], "unrecognized arguments: --colour"),
    (["--amp", "fp8"], "amp='fp8' is none of 'auto', 'fp32', 'bf16'"),
    (["--head_weights", "region"], "'region' is no name=value"),
    (["--epochs"], "expected one argument")])
def test_bad_flags(words, message, capsys):
    with pytest.raises(SystemExit) as stop: parse(PARSER, words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_names_every_setting():
    said = PARSER.format_help()
    for name in Settings.__dataclass_fields__: assert f"--{name}" in said
    for heading in GROUPS: assert f"\n{heading}:\n" in said
    assert "50 % of the folder" in said.replace("\n", " ")


MAYBE = st.none()
ANY = dict(epochs=st.integers(1, 99), lr=st.floats(1e-6, 1), m=MAYBE | st.integers(0, 9), hybrid=MAYBE | st.booleans(),
           keep_best=st.booleans(), wd=MAYBE | st.floats(0, 1), amp=st.sampled_from(["auto", "fp32", "bf16"]),
           cut=MAYBE | st.integers(-5, 5) | st.sampled_from(["layer2", "features"]),
           options=MAYBE | st.dictionaries(st.sampled_from(["rank", "depth"]), st.integers(), min_size=1))


@profile(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=ANY))
def test_flags_say_what_python_says(values):
    "Typed as words, values come back as they were; so they do through a file."
    words = []
    for name, value in values.items():
        if isinstance(value, bool): words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict): words += [f"--{name}", *(f"{key}={v}" for key, v in value.items())]
        elif value is not None or name in ("cut", "m", "wd"): words.append(f"--{name}={value}")
    spoken = {name: value for name, value in values.items() if value is not None or name in ("cut", "m", "wd")}
    assert parse(PARSER, words) == spoken
    assert make_settings(yaml.safe_load(yaml.safe_dump(values))) == Settings(**values)
    assert replace(Settings(**values)) == Settings(**values)


def test_arguments_of_the_body_are_a_table(tmp_path):
    typed = parse(PARSER, "--arch_kwargs drop_path_rate=0.1 depth=2 --layer_decay 0.75".split())
    typed.pop("out", None)
    s = make_settings(typed)
    assert (s.arch_kwargs, s.layer_decay) == (dict(drop_path_rate=.1, depth=2), .75)
    assert Settings(**read_settings(write_settings(s, tmp_path))) == s == resolve(s).__class__(**asdict(s))


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    file = tmp_path / "settings.yaml"
    for was, now in (("true", "default"), ("false", None)):
        file.write_text(f"compile_body: {was}\nepochs: 3")
        assert Settings(**read_settings(file)).compile == now
    file.write_text("compile_body: perhaps")
    with pytest.raises(ValueError, match="compile_body: 'perhaps' is no bool"): read_settings(file)
