"MA-CNN: its losses, its groups and their start, where it looks, and what it refuses."
import random

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import masks_to_boxes

from fd_focus.bodies import create_body, toy_resnet
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.methods import METHODS
from fd_focus.rivals import macnn
from fd_focus.rivals.macnn import (ChannelGroups, ChannelPartsNet, channel_peaks, compactness, diversity,
                                   group_channels, mass_inside, object_box, part_maps, peaks_in_training)
from fd_focus.training.learner import focus_learner


def learner(seed=0, **options):
    set_seed(seed, reproducible=True)
    dls = FocusDataLoaders.from_toy(4, 2, n_classes=3, image_size=48, bs=6)
    return focus_learner(dls, "toy_resnet", "macnn", pretrained=False, cut="layer2", hidden=16, **options)


def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-3)
    return learn


def small(size=48, n_classes=3, **options):
    body, _ = create_body("toy_resnet", pretrained=False, cut="layer2")
    return ChannelPartsNet(body, n_classes, image_size=size, hidden=16, **options)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10 ** 6))
def test_losses_are_the_formulas(parts, h, w, seed):
    "Also where values are equal: these maps have few different ones."
    rng = np.random.default_rng(seed)
    maps = torch.from_numpy(rng.integers(0, 4, (2, parts, h, w))).float()
    dis, div = compactness(maps), diversity(maps, .3)
    for b in range(2):
        for i in range(parts):
            m = maps[b, i].numpy()
            ty, tx = np.unravel_index(m.argmax(), m.shape)
            y, x = np.mgrid[:h, :w]
            others = np.max([maps[b, k].numpy() for k in range(parts) if k != i], axis=0)
            assert dis[b, i].item() == pytest.approx((m * ((x - tx) ** 2 + (y - ty) ** 2)).sum())
            assert div[b, i].item() == pytest.approx((m * (others - np.float32(.3))).sum(), abs=1e-4)


def test_losses_refuse_other_shapes():
    for function in (compactness, diversity):
        with pytest.raises(ValueError, match="got shape \\(4, 5, 5\\)"): function(torch.rand(4, 5, 5))
    with pytest.raises(ValueError, match="P of 2 or more"): diversity(torch.rand(2, 1, 5, 5))


def test_the_losses_pull_the_right_way():
    "Steps along the gradient of Dis gather the map at its peak; those of Div part two maps that begin alike."
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 6, 6, requires_grad=True)
    for loss in (compactness, diversity):
        score = logits.detach().clone().requires_grad_()
        before = loss(score.flatten(2).softmax(2).view(1, 2, 6, 6)).sum()
        for _ in range(50):
            value = loss(score.flatten(2).softmax(2).view(1, 2, 6, 6)).sum()
            score = (score - torch.autograd.grad(value, score)[0]).detach().requires_grad_()
        assert value < .5 * before


def test_the_margin_moves_nothing():
    weights = torch.rand(2, 3, 8, requires_grad=True)
    maps = torch.rand(2, 8, 5, 5)
    grads = [torch.autograd.grad(diversity(part_maps(maps, weights), margin).sum(), weights)[0] for margin in (0., .5)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=0)


def test_maps_of_any_size_of_features():
    "Huge, tiny, negative and dead features give maps that sum to 1, and finite gradients."
    for maps in (torch.rand(2, 8, 4, 4) * 1e6, torch.rand(2, 8, 4, 4) * 1e-6, -torch.rand(2, 8, 4, 4),
                 torch.zeros(2, 8, 4, 4), torch.rand(2, 8, 1, 1)):
        weights = torch.rand(2, 3, 8, requires_grad=True)
        parts = part_maps(maps, weights)
        (compactness(parts) + diversity(parts)).sum().backward()
        torch.testing.assert_close(parts.sum((2, 3)), torch.ones(2, 3))
        assert weights.grad.isfinite().all()


def test_maps_stay_exact_under_autocast():
    net = small().train()
    x = torch.randn(2, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16): out = net(x)
    assert out["maps"].dtype == torch.float32 and out["hybrid"].dtype == torch.bfloat16
    torch.testing.assert_close(out["maps"].sum((2, 3)), torch.ones(2, 4))


def test_groups_do_not_depend_on_the_order_of_pictures():
    generator = torch.Generator().manual_seed(1)
    planted = torch.arange(40) % 4
    peaks = torch.rand(20, 4, 2, generator=generator)[:, planted] * 13
    peaks = peaks + .5 * torch.randn(20, 40, 2, generator=generator)
    same = planted[:, None] == planted
    for one in (peaks, peaks.flip(0)):
        found = group_channels(one)
        assert (found[:, None] == found).equal(same)


@pytest.mark.parametrize("n", [4, 5, 9])
def test_no_group_is_empty(n):
    for peaks in (torch.zeros(3, n, 2), torch.rand(1, n, 2), torch.tensor([[[0., 0.]] * (n - 1) + [[9., 9.]]])):
        assert group_channels(peaks).unique().tolist() == [0, 1, 2, 3]


def test_groups_said_at_the_start():
    f = ChannelGroups(10, 2, hidden=8)
    groups = torch.arange(10) % 2
    assert not f.started
    f.start(groups)
    said = f(torch.randn(6, 10))
    assert f.started and said.argmax(1).equal(groups.expand(6, -1))
    assert said.amin(1).max() < .1 < .9 < said.amax(1).min()
    again = ChannelGroups(10, 2, hidden=8)
    again.load_state_dict(f.state_dict())
    assert again.started and again.groups.equal(groups)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10 ** 6))
def test_the_object_is_inside_the_picture_and_its_box(h, w, seed):
    maps = torch.from_numpy(np.random.default_rng(seed).random((3, 2, h, w), dtype=np.float32) ** 6)
    size = (10 * h, 7 * w)
    box = object_box(maps, size)[:, 0]
    assert (box[:, :2] >= 0).all() and (box[:, 2] <= size[1]).all() and (box[:, 3] <= size[0]).all()
    response = maps.mean(1)
    tight = masks_to_boxes(response >= .5 * response.amax((1, 2), keepdim=True)) + torch.tensor([0., 0, 1, 1])
    tight = tight * torch.tensor([7., 10, 7, 10])
    assert (box[:, :2] <= tight[:, :2] + 1e-3).all() and (box[:, 2:] >= tight[:, 2:] - 1e-3).all()
    longer = (tight[:, 2:] - tight[:, :2]).amax(1)
    assert ((box[:, 2:] - box[:, :2]).amax(1) <= longer + 1e-3).all()


def test_a_dead_picture_is_all_object():
    assert object_box(torch.zeros(1, 4, 5, 5), (50, 50)).tolist() == [[[0., 0., 50., 50.]]]


def test_mass_inside_counts_cells():
    maps = torch.rand(2, 3, 5, 4)
    maps = maps / maps.sum((2, 3), keepdim=True)
    boxes = torch.tensor([10., 0., 30., 20.]).expand(2, 3, 4)                  # columns 1 and 2, rows 0 and 1
    torch.testing.assert_close(mass_inside(maps, boxes, (50, 40)), maps[:, :, :2, 1:3].sum((2, 3)))


@pytest.mark.parametrize("size, shape", [((48, 80), (48, 80)), (48, (96, 120)), ((50, 61), (73, 90))])
def test_looks_inside_pictures_of_any_shape(size, shape):
    net = small(size).eval()
    x = torch.randn(3, 3, *shape)
    with torch.no_grad(): look = net.look(x)
    assert look.boxes.shape == (3, 5, 4) and look.scores.shape == (3, 5) and look.attention.shape == (3, *net.map_size)
    assert (look.boxes[..., :2] >= 0).all() and (look.boxes[..., :2] < look.boxes[..., 2:]).all()
    assert (look.boxes[..., 2] <= shape[1] + 1e-3).all() and (look.boxes[..., 3] <= shape[0] + 1e-3).all()
    assert (look.scores >= 0).all() and (look.scores <= 1 + 1e-5).all()
    assert {name: tuple(head.shape) for name, head in look.heads.items()} == dict(
        image=(3, 3), part=(3, 4, 3), crop=(3, 5, 3), hybrid=(3, 3))


def test_a_part_is_where_its_channels_fire():
    "A body whose channels are the colours: each part's square lies on its own patch."
    class Colours(nn.Module):
        def forward(self, x): return nn.functional.avg_pool2d(x, 8)
    net = ChannelPartsNet(Colours(), 2, image_size=64, parts=3, part_size=32, hidden=4).eval()
    net.grouping.start(torch.arange(3))
    x, corners = torch.zeros(1, 3, 64, 64), [(8, 8), (40, 16), (24, 40)]       # x, y
    for colour, (left, top) in enumerate(corners): x[0, colour, top:top + 16, left:left + 8] = 1.
    with torch.no_grad(): look = net.look(x)
    for (left, top), (x0, y0, x1, y1) in zip(corners, look.boxes[0, :3].tolist()):
        assert x0 < left + 4 < x1 and y0 < top + 8 < y1
    assert look.boxes[0, 3].tolist() == [4., 8., 52., 56.] and (look.scores[0] > .9).all()


def test_cross_entropies_leave_the_grouping_nets_alone():
    net = small(parts=2).train()
    x, y = torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 0])
    terms = net.losses(net(x), y, nn.CrossEntropyLoss(reduction="none"))
    assert set(terms) == set(net.terms)
    sum(terms[name].sum() for name in ("image", "part", "crop", "hybrid")).backward()
    assert all(p.grad is None or not p.grad.any() for p in net.grouping.parameters())


def test_what_cannot_be_built():
    for options, message in ((dict(parts=1), "parts=1: channels are grouped into 2 parts or more"),
                             (dict(parts=40), "the body's map has 36 cells and 64 channels; use fewer parts"),
                             (dict(hidden=0), "hidden=0; use 1 or more"),
                             (dict(part_size=49), r"part_size=\(49, 49\) does not fit image_size=\(48, 48\)"),
                             (dict(zoom_size=4000), "use a smaller zoom_size or fewer parts")):
        body, _ = create_body("toy_resnet", pretrained=False, cut="layer2")
        with pytest.raises(ValueError, match=message): ChannelPartsNet(body, 3, **dict(image_size=48) | options)
    with pytest.raises(ValueError, match="has 1 cells and 128 channels; use fewer parts, a larger image_size"):
        ChannelPartsNet(toy_resnet(), 3, image_size=16)


def test_config_names_every_option():
    net = small((48, 64), parts=3, part_size=12, zoom_size=(24, 32))
    assert net.config() == dict(image_size=[48, 64], parts=3, part_size=[12, 12], zoom_size=[24, 32], hidden=16)
    assert METHODS["macnn"] is ChannelPartsNet and net.teacher({}) is None


def test_it_starts_once(monkeypatch):
    calls = []
    def counted(net, dls):
        calls.append(1)
        return peaks_in_training(net, dls)
    monkeypatch.setattr(macnn, "peaks_in_training", counted)
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        learn.get_preds()
        learn.validate()
        learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    assert not calls and not learn.model.grouping.started
    groups = fit(learn, 2).model.grouping.groups.clone()
    assert len(calls) == 1 and groups.unique().tolist() == [0, 1, 2, 3]
    fit(learn)
    assert len(calls) == 1 and learn.model.grouping.groups.equal(groups)


def test_the_start_leaves_no_trace():
    "Random numbers of Python, NumPy, PyTorch and the loader, the layers' modes, and batch norm's statistics."
    learn = learner()
    learn.model.train()
    learn.model.body.bn1.eval()
    def traces():
        state = [t.clone() for t in learn.model.state_dict().values()]
        return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
                learn.dls.train.rng.getstate(), [module.training for module in learn.model.modules()], state)
    before = traces()
    peaks = peaks_in_training(learn.model, learn.dls)
    after = traces()
    assert before[:-1] == after[:-1] and all(a.equal(b) for a, b in zip(before[-1], after[-1]))
    assert peaks.shape == (12, 64, 2) and peaks.min() >= 0 and peaks.max() <= 5
    assert len(peaks_in_training(learn.model, learn.dls, most=5)) == 5
    assert peaks_in_training(learn.model, learn.dls).equal(peaks)


def test_silent_channels_get_the_mean_place():
    maps = torch.zeros(2, 3, 3, 4)
    maps[0, 0, 2, 3] = 1.
    places = channel_peaks(maps)
    assert places[0].tolist() == [[3., 2.]] * 3 and places[1].tolist() == [[0., 0.]] * 3      # nobody speaks
