"PartNet: its formula and proposals against loops, what bad input gets, and what training does between epochs."
import math

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fd_focus.bodies import create_body
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.loss import FocusLoss
from fd_focus.methods import METHODS
from fd_focus.rivals.partnet import (BOX_SHAPES, PartNet, box_grid, part_detection_probability, peak_cells,
                                     peak_histogram, pooling_weights, square_cells)
from fd_focus.training.learner import focus_learner
from fd_focus.zoom import first_view, zoom


def body(): return create_body("toy_resnet", pretrained=False, cut="layer2")[0]     # stride 8


def net(size=48, **options):
    torch.manual_seed(0)
    return PartNet(body(), 3, size, **dict(hidden=16) | options)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(2, 5), st.integers(1, 4), st.floats(.1, 8), st.integers(0, 99))
def test_probability_is_the_formula(regions, classes, parts, scale, seed):
    "In double precision, with the sums written out; and what it promises."
    draw = np.random.default_rng(seed)
    says, likes = (scale * draw.standard_normal((2, regions, k + 1)) for k in (classes, parts))
    phi = softmax(says)[..., :-1]
    psi = softmax(softmax(likes)[..., :-1].transpose(0, 2, 1)).transpose(0, 2, 1)
    expected = sum(phi[:, r, :, None] * psi[:, r, None, :] for r in range(regions)).mean(2)
    p = part_detection_probability(torch.tensor(says), torch.tensor(likes))
    np.testing.assert_allclose(p, expected, atol=1e-6)                # float32
    assert p.min() >= 0 and p.sum(1).max() < 1 + 1e-6
    order = torch.randperm(regions)
    torch.testing.assert_close(part_detection_probability(torch.tensor(says)[:, order], torch.tensor(likes)[:, order]),
                               p, atol=1e-6, rtol=0)


def test_probability_keeps_its_precision_and_sends_gradients():
    says, likes = torch.randn(2, 30, 5, requires_grad=True), torch.randn(2, 30, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16): p = part_detection_probability(says, likes)
    assert p.dtype == torch.float32 and p.equal(part_detection_probability(says, likes))
    p.log().sum().backward()
    for logits in (says, likes): assert (logits.grad.abs().sum((0, 1)) > 0).all()      # background's too
    with pytest.raises(ValueError, match=r"logits must be \(B,R,C\+1\) and \(B,R,P\+1\), got \(2, 30, 5\) and"):
        part_detection_probability(says, likes[:, :29])


def released(maps, size, truncate):
    "Cells named by the loops of the released code, for squares of `size` cells; it keeps the maximum in an int."
    keep = math.trunc if truncate else float
    n, h, w = maps.shape
    histogram, cells = np.zeros((h, w)), []
    for channel in maps:
        best, place = 0, (0, 0)
        for y in range(h):
            for x in range(w):
                if channel[y, x] > best: best, place = keep(channel[y, x]), (y, x)
        histogram[place] += 1
    for top in range(0, h, size):
        for left in range(0, w, size):
            for score in (histogram, maps.sum(0)):
                best, place = 0, (0, 0)
                for y in range(top, top + size):
                    for x in range(left, left + size):
                        if best < score[y, x]: best, place = keep(score[y, x]), (y, x)
                if best: break
            cells.append(place[0] * w + place[1])
    return histogram, cells


@pytest.mark.parametrize("shape,size", [((40, 12, 12), 4), ((9, 8, 12), 2), ((64, 28, 28), 4)])
def test_proposals_are_those_of_the_loops(shape, size):
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 3
    histogram, cells = released(maps.double().numpy(), size, truncate=False)
    ours = peak_histogram(maps[None])
    np.testing.assert_array_equal(ours[0], histogram)
    table = square_cells(shape[1:], (shape[1] // size, shape[2] // size))
    assert peak_cells(maps[None], ours, table)[0].tolist() == cells
    wrong, _ = released(maps.double().numpy(), size, truncate=True)
    assert (wrong != histogram).any()


def test_a_channel_below_zero_has_a_peak_and_a_flat_one_has_none():
    maps = torch.zeros(1, 3, 2, 2)
    maps[0, 0] = torch.tensor([[-3., -2], [-1, -4]])
    maps[0, 1] = 5.
    assert peak_histogram(maps)[0].tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("map_size,squares", [((7, 7), (3, 3)), ((5, 11), (2, 5)), ((2, 3), (1, 1)), ((4, 4), (4, 4))])
def test_every_cell_lies_in_one_square(map_size, squares):
    table = square_cells(map_size, squares)
    assert table.shape == (math.prod(squares), math.prod(map_size)) and (table.sum(0) == 1).all() and table.any(1).all()


def test_boxes_are_the_same_shares_of_any_picture():
    assert len(BOX_SHAPES) == len(set(BOX_SHAPES)) == 28
    small, large = box_grid((56, 84), (7, 7)), box_grid((112, 168), (7, 7))
    torch.testing.assert_close(2 * small, large)
    assert small.min() >= 0 and (small[..., 2] <= 84).all() and (small[..., 3] <= 56).all()
    assert (small[..., 2:] - small[..., :2] > 0).all()


def test_bins_are_a_small_zoom_of_the_map():
    "Of boxes given in cells; on a ramp a bin inside the map holds the value at its middle."
    maps, boxes = torch.randn(2, 4, 9, 12), torch.tensor([[[0., 0, 12, 9], [2, 3, 11, 8]]]).expand(2, -1, -1)
    pool = pooling_weights(boxes * 8, (72, 96), (9, 12)).unflatten(2, (9, 108))
    pooled = torch.einsum("brkc,bnc->brnk", pool, maps.flatten(2)).unflatten(3, (3, 3))
    torch.testing.assert_close(pooled, zoom(maps, boxes, 3), atol=1e-5, rtol=0)
    ramp = (torch.arange(12) + .5).expand(9, 12).flatten()
    torch.testing.assert_close(pool[0, 1, 4] @ ramp, torch.tensor(6.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options,message", [
    (dict(size=8), "map has 1x1 cells, and part proposals need 2x2 or more; use a larger image_size, or cut"),
    (dict(size=8, squares=1), "map has 1x1 cells"),
    (dict(squares=7), r"squares=\(7, 7\) do not fit the body's map of 6x6"),
    (dict(squares=0), r"squares=\(0, 0\)"), (dict(parts=0), "parts=0; use a whole number, 1 or more"),
    (dict(parts=2.5), "parts=2.5"), (dict(hidden=-1), "hidden=-1"), (dict(channels=0), "channels=0"),
    (dict(singular_bound=.5), "singular_bound=0.5; use 1 or more, or None"),
    (dict(zoom_size=4000), "parts=3 crops of zoom_size"), (dict(zoom_size=0), "body cannot take an image of 0x0")])
def test_faults(options, message):
    with pytest.raises(ValueError, match=message): net(**options)


def test_sizes_of_all_kinds():
    for size, squares in ((48, (3, 3)), ((40, 88), (2, 5)), ([56, 112], (3, 7))):
        one = net(size)
        assert one.squares == squares
        assert METHODS["partnet"](body(), 3, **one.config()).config() == one.config()
    one = net(48, squares=[2, 3], parts=1, channels=8, singular_bound=None)
    assert one.eval().look(torch.randn(2, 3, 48, 48)).boxes.shape == (2, 1, 4) and one.callbacks() == []
    assert one.class_stream[0].in_features == 72


def test_larger_pictures_have_the_same_boxes_with_more_pixels():
    one, x = net((48, 40)).eval(), torch.randn(2, 3, 96, 60)
    with torch.no_grad(): small, large = one.look(first_view(x, (48, 40))), one.look(x)
    torch.testing.assert_close(small.boxes * torch.tensor([1.5, 2, 1.5, 2]), large.boxes)
    assert small.heads["regions"].equal(large.heads["regions"])
    with pytest.raises(ValueError, match="are smaller than image_size"): one(x[..., :30])


def test_loss_and_weights():
    "The regions' loss is summed over the classes, and no criterion of the user's touches it."
    one, x, y = net().train(), torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 1])
    outputs = one(x, y)
    terms = one.losses(outputs, y, lambda logits, target: 0 * logits.sum(1))
    expected = nn.functional.binary_cross_entropy(outputs["regions"], torch.eye(3)[y])
    torch.testing.assert_close(FocusLoss(lambda logits, target: 0 * logits.sum(), method=one)(outputs, y), 3 * expected)
    torch.testing.assert_close(terms["regions"].mean(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = one.losses(one(x, y), y, nn.CrossEntropyLoss(reduction="none"))
    assert half["regions"].dtype == torch.float32 and half["regions"].isfinite().all()
    sure = dict(outputs, regions=torch.eye(3)[y])                     # probabilities of 0 and 1
    assert one.losses(sure, y, nn.CrossEntropyLoss(reduction="none"))["regions"].abs().max() < 1e-6


def test_answer_is_finite_where_no_region_names_a_class():
    one = net().eval()
    with torch.no_grad(): one.class_stream[-1].bias[:-1] = -1e4
    assert one(torch.randn(2, 3, 48, 48)).isfinite().all()


def test_one_graph_without_host_waits():
    outputs = torch.compile(net().train(), backend="eager", fullgraph=True)(torch.rand(2, 3, 48, 48))
    assert set(outputs) == {"image", "regions", "part"}


def test_singular_values_are_clipped_between_epochs_alone(monkeypatch):
    set_seed(0)
    dls = FocusDataLoaders.from_toy(4, 2, n_classes=3, image_size=48, bs=6)
    learn = focus_learner(dls, "toy_resnet", "partnet", pretrained=False, cut="layer2", squares=1, hidden=8)
    calls, real = [], PartNet.clip_singular_values
    def counted(self): calls.append(learn.epoch); real(self)
    monkeypatch.setattr(PartNet, "clip_singular_values", counted)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-3)
        assert calls == [1, 2]
        learn.validate(); learn.get_preds(); learn.lr_find(num_it=5, show_plot=False)
    assert calls == [1, 2]
    learn.model.clip_singular_values()
    for stream in (learn.model.class_stream, learn.model.part_stream):
        values = torch.linalg.svdvals(stream[-1].weight.detach())
        assert values.min() > 1 / 1.5 - 1e-5 and values.max() < 1.5 + 1e-5


def test_certainty_is_never_more_than_one():
    "Sums of many regions are rounded, and binary cross entropy takes nothing above 1."
    generator = torch.Generator().manual_seed(0)
    for regions in (17, 49, 196):
        says = torch.full((64, regions, 6), -60.).index_fill(2, torch.tensor([2]), 60.)
        parts = torch.randn(64, regions, 4, generator=generator)
        p = part_detection_probability(says, parts)
        assert p.max() <= 1 and p[:, 2].min() > 1 - 1e-5
        unbounded = (says.softmax(2)[..., :-1] * parts.softmax(2)[..., :-1].softmax(1).mean(2, keepdim=True)).sum(1)
        if (unbounded > 1).any(): return
    raise AssertionError("no sum was rounded up: the test shows nothing")
