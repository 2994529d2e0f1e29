"What every method promises, whatever it is: those in METHODS, and a small one of one's own. A new name is a new row."
import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn

from fd_focus.bodies import create_body
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.loss import FocusLoss
from fd_focus.methods import METHODS, Look, Method, bare, method_name, method_options, register
from fd_focus.training.checkpoint import Checkpoint, read_checkpoint
from fd_focus.training.learner import focus_learner, history
from fd_focus.training.settings import Settings
from fd_focus.use.export import check_parity, export_model, run_exported
from fd_focus.use.model_folder import load_focus, save_focus
from fd_focus.use.predict import FocusClassifier


class Mine(Method):
    "A method of one's own is an `__init__` and a `forward`."
    def __init__(self, body, n_classes, image_size=448):
        super().__init__(body, n_classes, image_size)
        self.head = nn.Linear(self.n_features, n_classes)

    def forward(self, x, target=None):
        logits = self.head(self.body(x).amax((2, 3)))
        return {"image": logits} if self.training else logits


register("mine", Mine)
C, SIZE = 3, 48


def learner(name: str, seed: int = 0):
    "Everything in it follows from the name and the seed."
    set_seed(seed, reproducible=True)
    dls = FocusDataLoaders.from_toy(4, 3, n_classes=C, image_size=SIZE, mark_size=2., bs=6)
    dls.train.rng.seed(seed)
    return focus_learner(dls, "toy_resnet", name, pretrained=False, cut="layer2")


def fit(learn, *cbs, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 4e-3, cbs=list(cbs))
    return learn


def same(a, b) -> bool:
    "Do two networks have the same weights and statistics, to the last bit?"
    first, second = bare(a).state_dict(), bare(b).state_dict()
    return list(first) == list(second) and all(tensor.cpu().equal(second[key].cpu()) for key, tensor in first.items())


@pytest.fixture(scope="module", params=list(METHODS))
def name(request): return request.param


@pytest.fixture(scope="module")
def learn(name):
    "A learner that has trained for two epochs."
    return fit(learner(name))


@pytest.fixture(scope="module")
def net(learn): return learn.model


@pytest.fixture(scope="module")
def folder(learn, tmp_path_factory): return save_focus(learn, tmp_path_factory.mktemp("model"))


@pytest.fixture
def x():
    "Eight pictures as the network sees them."
    return torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)


def ask(net, x, what="__call__"):
    net.eval()
    with torch.no_grad(): return getattr(net, what)(x)


def test_found_by_its_name(name, net):
    assert method_name(net) == name and isinstance(net, Method) and METHODS[name] is type(net)
    options = {o: 1 for o in method_options(type(net)) if o in Settings.__dataclass_fields__}
    assert "image_size" in options and Settings(method=name).method == name


def test_shapes(net, x):
    outputs = copy.deepcopy(net).train()(x, torch.arange(8) % C)
    assert type(outputs) is dict and outputs
    for out, part in outputs.items():
        assert part.shape[0] == 8
        if out in net.heads: assert part.shape[-1] == C and part.ndim in (2, 3)
    assert ask(net, x).shape == (8, C)
    for look in (ask(net, x, "look"), ask(net, x, "examine")):
        assert isinstance(look, Look) and look.answer.shape == (8, C)
        for logits in look.heads.values(): assert logits.shape[0] == 8 and logits.shape[-1] == C
        if look.boxes is not None:
            assert look.boxes.shape == (8, look.boxes.shape[1], 4) and look.scores.shape == look.boxes.shape[:2]
            assert look.boxes.min() >= 0 and look.boxes.max() <= SIZE
        if look.attention is not None: assert look.attention.ndim == 3 and len(look.attention) == 8
    assert set(net.heads) <= set(look.heads)


def test_who_gets_a_gradient(name, x):
    "Every parameter that is not at rest, from the sum of the losses."
    learn = learner(name)
    net, y = learn.model.train(), torch.arange(8) % C
    terms = net.losses(net(x, y), y, nn.CrossEntropyLoss(reduction="none"))
    assert set(net.terms) <= set(terms) and all(term.shape == (8,) for term in terms.values())
    loss = FocusLoss(method=net)(net(x, y), y)
    assert loss.ndim == 0 and torch.isfinite(loss)
    loss.backward()
    rests = getattr(net, "at_rest", ())               # what waits for its turn, such as boosting's members
    without = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    without = [key for key in without if not key.startswith(rests)]
    broken = [key for key, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert not without and not broken


def test_an_answer_does_not_depend_on_its_batch(net, x):
    together = ask(net, x)
    alone = torch.cat([ask(net, picture[None]) for picture in x])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_looking_is_answering(net, x):
    for what in ("look", "examine"):
        torch.testing.assert_close(ask(net, x, what).answer, ask(net, x), atol=1e-5, rtol=0)


def test_the_config_builds_it_again(name, net, x):
    body, _ = create_body("toy_resnet", pretrained=False, cut="layer2")
    again = METHODS[name](body, C, **json.loads(json.dumps(net.config())))
    again.load_state_dict(net.state_dict())
    assert ask(again, x).equal(ask(net, x)) and again.config() == net.config()


def test_the_folder_gives_it_back(learn, net, folder, x):
    loaded = load_focus(folder)
    assert type(loaded) is type(net) and not loaded.training and same(loaded, net)
    assert ask(loaded, x).equal(ask(net, x)) and loaded.classes == list(learn.dls.vocab)


def test_a_compiled_network_is_saved_and_judged(name, tmp_path):
    "Nothing of the wrapping gets into the folder, and each head has its accuracy."
    learn = learner(name)
    learn.model = torch.compile(learn.model, backend="eager")
    table = history(fit(learn, epochs=1))
    assert not table.isna().any(axis=None) and {f"{head}_accuracy" for head in bare(learn.model).heads} <= set(table)
    assert same(load_focus(save_focus(learn, tmp_path)), learn.model)


def test_the_exported_graph_says_the_same(net, folder, tmp_path):
    if not net.deterministic: pytest.skip("chance answers with it")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    loaded = load_focus(folder)
    run = run_exported(export_model(loaded, tmp_path / "net.onnx"), threads=1)
    parity = check_parity(loaded, run, torch.rand(9, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    assert parity.ok, parity


def test_it_predicts(net, folder):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    classifier = FocusClassifier.load(folder, device="cpu")
    said = classifier.predict(Image.fromarray(pixels))
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in load_focus(folder).stats)
    seen = (classifier.pixels(Image.fromarray(pixels)) - mean) / std
    expected = ask(net, seen[None]).softmax(1)[0]
    torch.testing.assert_close(said.probabilities, expected, atol=1e-4, rtol=0)      # its batch norm is folded
    assert said.label == classifier.classes[int(said.probabilities.argmax())]


class Kill(Callback):
    "Raises what Ctrl-C raises, in the last epoch: the second one, but a frozen body has only one."
    order = 90
    def after_batch(self):
        if self.training and self.epoch == self.n_epoch - 1: raise KeyboardInterrupt


def test_a_killed_run_goes_on(name, learn, net, tmp_path):
    with pytest.raises(KeyboardInterrupt): fit(learner(name), Checkpoint(tmp_path), Kill())
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["epoch"] == state["epochs"] - 1
    assert same(fit(learner(name, seed=7), Checkpoint(tmp_path, resume=True)).model, net)


def together(name, rank, port, out):
    "One of two processes that train together, as torchrun would start it."
    from fd_focus.training.distributed import sharing
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    learn = learner(name)
    with sharing(learn), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 4e-3)
    table = history(learn).iloc[-1].to_dict()
    torch.save(dict(model=bare(learn.model).state_dict(), table=table), Path(out) / f"{rank}.pt")


def test_two_processes_train_one_network(name, two_processes, tmp_path):
    two_processes(together, name, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert all(first["model"][key].equal(second["model"][key]) for key in first["model"])
    assert first["table"] == second["table"] and all(map(np.isfinite, first["table"].values()))
