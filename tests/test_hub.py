"What a stranger loads from a hub, and reads on a card."
import types

import pandas as pd
import pytest
import torch
import yaml

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.training.learner import focus_learner
from fd_focus.use.cli import _check_model
from fd_focus.use.evaluate import Evaluation
from fd_focus.use.hub import describe_model
from fd_focus.use.model_folder import hub_name, load_focus, save_focus
from fd_focus.use.predict import FocusClassifier


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    dls = FocusDataLoaders.from_toy(1, 1, image_size=64, n_classes=2, bs=2)
    return save_focus(focus_learner(dls, "toy_resnet", method="plain", pretrained=False), tmp_path / "model")


def found(name="wren"):
    rows = pd.DataFrame(dict(file=["1.jpg", "2.jpg"], label=["tit", name], answer=["tit", "tit"], error=["", ""],
                             probability=[.9, .8], sure=[True, False], looked_again=[False, True]))
    confused = pd.DataFrame([(name, "tit", 1, 1)], columns=["is", "taken_for", "count", "of"])
    return Evaluation(rows, .5, (.1, .9), .5, 1., .12, confused, 1e9, 4e8, .5)


def parts(card):
    head, text = card.read_text(encoding="utf-8").removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(head), text


def test_a_card_for_strangers(folder):
    before = parts(folder / "README.md")[1]
    head, text = parts(describe_model(folder, found(), "Our garden: 2024", "CC BY 4.0", "For gardens.", "apache-2.0"))
    assert head["library_name"] == "fd_focus" and head["license"] == "apache-2.0" and "plain" in head["tags"]
    result = head["model-index"][0]["results"][0]
    assert result["metrics"][0] == dict(type="accuracy", value=.5, name="Accuracy")
    assert result["dataset"] == dict(name="Our garden: 2024", type="imagefolder")
    for words in ("For gardens.", "Licence of the data: CC BY 4.0.", "95 % interval 10.0 to 90.0",
                  "| wren | tit | 1 of 1 |", "50 % of the pictures looked again"):
        assert words in text, (words, text)
    assert text.startswith(before.rstrip("\n")) and load_focus(folder)


def test_a_second_call_replaces_the_first(folder):
    describe_model(folder, found(), "Old data", "old licence", licence="mit")
    head, text = parts(describe_model(folder))
    assert "Old data" not in text and text.count("## Training data") == 1 and text.count("Not said by its author.") == 3
    assert "license" not in head and "model-index" not in head


def test_names_mean_nothing_to_markdown(folder):
    text = parts(describe_model(folder, found("<b>|wren\n# x")))[1]
    assert "\n# x" not in text and r"\|wren" in text


def test_no_card_no_model(folder, tmp_path):
    (folder / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="no README.md"): describe_model(folder)
    with pytest.raises(FileNotFoundError, match="config.json"): describe_model(tmp_path / "nowhere")


def test_from_pretrained(folder, monkeypatch):
    asked, hub = [], types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, revision=None, **kwargs: asked.append((name, revision)) or str(folder)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", hub)
    for name in ("hf_hub:me/birds@v1", "hf-hub:me/birds"):          # wherever a folder is asked for
        _check_model(name)
        assert FocusClassifier.load(name, device="cpu").classes == load_focus(folder).classes
    with pytest.raises(FileNotFoundError, match="no model folder"): _check_model("hf_hub:birds")
    assert asked == [("me/birds", "v1"), ("me/birds", None)]
    asked.clear()
    for name, revision in (("hf_hub:me/birds@v1", None), ("me/birds", None), ("hf-hub:me/birds@v1", "main")):
        assert FocusClassifier.from_pretrained(name, revision, device="cpu").classes == load_focus(folder).classes
    assert asked == [("me/birds", "v1"), ("me/birds", None), ("me/birds", "main")]
    assert FocusClassifier.from_pretrained(folder).classes and len(asked) == 3
    with pytest.raises(FileNotFoundError, match="no model folder"): FocusClassifier.from_pretrained("./nowhere/at/all")
    assert hub_name("plain/name") == ("plain/name", None)
