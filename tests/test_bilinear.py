"Bilinear CNN: its feature against an independent reference, what the recipe's two stages leave alone, bad input."
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fd_focus.bodies import create_body
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.rivals.bilinear import BilinearNet, bilinear_feature, evidence_map
from fd_focus.training.learner import focus_learner


def toy_body(): return create_body("toy_resnet", pretrained=False, cut="layer2")[0]


def learner(**options):
    set_seed(0, reproducible=True)
    dls = FocusDataLoaders.from_toy(6, 3, n_classes=3, image_size=48, bs=6)
    return focus_learner(dls, "toy_resnet", "bilinear", pretrained=False, cut="layer2", **options)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10 ** 6))
def test_the_feature_is_the_formula(b, n, h, w, seed):
    maps = torch.randn(b, n, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.einsum("bihw,bjhw->bij", maps, maps) / (h * w)
    y = (x.sign() * x.abs().sqrt()).flatten(1)
    z = y / y.norm(dim=1, keepdim=True)
    found = bilinear_feature(maps)
    assert found.shape == (b, n * n) and found.dtype == torch.float32
    # The small number under the root counts most where x is nearly 0: there up to its root, 1e-4.
    torch.testing.assert_close(found, z.float(), atol=1.1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-6, 1., 1e6])
def test_the_size_of_the_features_does_not_matter(size):
    maps = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bilinear_feature(size * maps), bilinear_feature(maps), atol=1e-5, rtol=0)
    torch.testing.assert_close(bilinear_feature(maps).norm(dim=1), torch.ones(2))


def test_nothing_seen_is_no_trouble():
    "A picture without any feature has the feature 0, and finite gradients."
    maps = torch.zeros(2, 4, 3, 3)
    maps[1] = 1.
    maps.requires_grad_()
    feature = bilinear_feature(maps)
    assert not feature[0].any() and torch.allclose(feature[1], torch.full((16,), .25))
    (feature * torch.randn(2, 16)).sum().backward()
    assert maps.grad.isfinite().all()
    assert not evidence_map(maps, feature, torch.randn(2, 16))[0].any()


def test_the_gradient_is_that_of_the_formula():
    maps = (torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + .5).requires_grad_()
    weight = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    (bilinear_feature(maps) * weight).sum().backward()
    found, maps.grad = maps.grad, None
    x = torch.einsum("bihw,bjhw->bij", maps, maps).flatten(1)
    (F.normalize(x.sqrt()) * weight).sum().backward()
    torch.testing.assert_close(found, maps.grad, atol=1e-5, rtol=1e-4)


def test_products_are_taken_in_float32_whatever_the_precision():
    maps = 300 * torch.rand(2, 4, 8, 8)             # sums of squares above float16's 65504
    with torch.autocast("cpu", torch.bfloat16):
        assert bilinear_feature(maps).equal(bilinear_feature(maps.float()))
    half = bilinear_feature(maps.half())
    assert half.dtype == torch.float32 and half.isfinite().all()
    torch.testing.assert_close(half, bilinear_feature(maps), atol=1e-3, rtol=0)


def test_evidence_adds_up_to_the_score():
    net = BilinearNet(toy_body(), 7, (48, 80), features=20).eval()
    x = torch.randn(3, 3, 48, 80)
    with torch.no_grad(): look = net.look(x)
    assert look.attention.shape == (3, *net.map_size) and net.map_size[0] != net.map_size[1]
    best = look.answer.argmax(1)
    score = look.answer[range(3), best] - net.image_head.bias[best]
    torch.testing.assert_close(look.attention.mean((1, 2)), score, atol=1e-3, rtol=1e-3)


class Weights(Callback):
    "The state of the body and of the head after each training batch."
    order = 60
    def before_fit(self): self.of_body, self.of_head = [], []
    def after_batch(self):
        if not self.training: return
        for kept, part in ((self.of_body, self.model.body), (self.of_head, self.model.image_head)):
            kept.append(torch.cat([t.detach().flatten().double() for t in part.state_dict().values()]))


@pytest.mark.parametrize("fit", ["fit_one_cycle", "fit_paper", "fit_modern"])
def test_the_body_rests_and_then_trains_in_every_recipe(fit):
    import fd_focus.training.recipes  # noqa: F401 -- patches the recipes in
    learn, watch = learner(head_first=.5), Weights()
    with learn.no_bar(), learn.no_logging():
        learn.unfreeze()
        for _ in range(2):                          # a second fit finds gradients and momentum of the first
            getattr(learn, fit)(2, cbs=watch)
            moved = [not a.equal(b) for a, b in zip(watch.of_body, watch.of_body[1:])]
            assert moved == [False] * 2 + [True] * 3
            assert all(not a.equal(b) for a, b in zip(watch.of_head, watch.of_head[1:]))
    assert not learn.model.resting


def test_a_fit_of_one_epoch_trains_the_body_too():
    learn, watch = learner(head_first=.4), Weights()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, cbs=watch)
    assert watch.of_body[0].equal(watch.of_body[1]) and not watch.of_body[1].equal(watch.of_body[2])


def test_a_fit_that_ends_early_leaves_no_resting_body():
    class Stop(Callback):
        def after_batch(self):
            if self.training: raise KeyboardInterrupt
    learn = learner(head_first=.9)
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
    assert not learn.model.resting


def test_nobody_rests_while_a_rate_is_looked_for():
    learn, watch = learner(head_first=.9), Weights()
    learn.add_cb(watch)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=4, show_plot=False)
    assert not watch.of_body[0].equal(watch.of_body[1])
    with learn.no_bar(): learn.get_preds()
    assert not learn.model.resting


@pytest.mark.parametrize("options, message", [
    (dict(features=0), "features=0; use at least 1"),
    (dict(head_first=1), "head_first=1 is a share; use 0 or more, less than 1"),
    (dict(head_first=-.1), "head_first=-0.1 is a share"),
    (dict(scale=0), "scale=0; use a number above 0"),
    (dict(n_classes=300_000), "use fewer features"),
])
def test_bad_input_is_told_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        BilinearNet(toy_body(), **dict(n_classes=3, image_size=48) | options)


def test_a_wide_body_is_reduced_and_a_narrow_one_is_not():
    assert isinstance(BilinearNet(toy_body(), 3, 48, features=64).reduce, nn.Identity)
    reduced = BilinearNet(toy_body(), 3, 48, features=63)
    assert reduced.reduce.weight.shape == (63, 64, 1, 1) and reduced.image_head.in_features == 63 ** 2
    assert reduced.config() == dict(image_size=[48, 48], features=63, head_first=.4, scale=63 ** .5)
