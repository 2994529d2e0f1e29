"NTS-Net: its formulas against the released code's way of writing them, what belongs to whom, and bad input."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fd_focus.bodies import create_body, toy_resnet
from fd_focus.loss import FocusLoss
from fd_focus.regions import propose_from_table, suppression_table
from fd_focus.rivals.nts import (LEVELS, Navigator, NavigatorNet, anchor_boxes, anchor_shapes, best_at, padded_crops,
                                 ranking_loss)


def small(**options):
    torch.manual_seed(0)
    body, _ = create_body("toy_resnet", pretrained=False, cut="layer2")
    return NavigatorNet(body, 3, **(dict(image_size=48) | options))


def looped(scores, losses, margin):
    "The hinge, pair by pair."
    return [sum(max(0., margin - s[i] + s[j]) for i in range(len(s)) for j in range(len(s)) if t[j] > t[i])
            for s, t in zip(scores.tolist(), losses.tolist())]


@pytest.mark.parametrize("m", [2, 3, 6, 9])
@pytest.mark.parametrize("margin", [.25, 1., 3.])
def test_ranking_loss_is_the_sum_over_pairs(m, margin):
    draw = torch.Generator().manual_seed(m)
    scores, losses = 2 * torch.randn(7, m, generator=draw), torch.rand(7, m, generator=draw).mul(4).round()  # with ties
    expected = torch.tensor(looped(scores, losses, margin))
    torch.testing.assert_close(ranking_loss(scores, losses, margin), expected, atol=1e-4, rtol=1e-5)


def test_ranking_loss_knows_only_the_order():
    draw = torch.Generator().manual_seed(0)
    scores, losses = torch.randn(4, 6, generator=draw), torch.rand(4, 6, generator=draw)
    found = ranking_loss(scores, losses)
    torch.testing.assert_close(ranking_loss(scores + 5, losses ** 3), found, atol=1e-4, rtol=0)
    order = torch.randperm(6, generator=draw)
    torch.testing.assert_close(ranking_loss(scores[:, order], losses[:, order]), found, atol=1e-5, rtol=0)
    assert ranking_loss(-2 * losses.argsort().argsort().float(), losses).sum() == 0     # in order, a margin apart
    torch.testing.assert_close(ranking_loss(torch.zeros(1, 6), losses[:1]), torch.tensor([15.]))


def test_ranking_loss_pulls_by_rank():
    "From equal scores, the gradient of a region is the number of those it should beat less those that should beat it."
    scores = torch.zeros(1, 4, requires_grad=True)
    ranking_loss(scores, torch.tensor([[.2, .1, .9, .4]])).sum().backward()
    assert scores.grad.tolist() == [[-1., -3., 3., 1.]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ranking_loss_of_half_precision_is_single(dtype):
    scores = torch.randn(3, 6).to(dtype)
    found = ranking_loss(scores, torch.rand(3, 6).to(dtype))
    assert found.dtype is torch.float32 and found.isfinite().all()


@pytest.mark.parametrize("scores,losses", [((2, 3), (2, 4)), ((3,), (3,)), ((2, 3), (3,)), ((1, 3), (2, 3))])
def test_ranking_loss_refuses_other_shapes(scores, losses):
    with pytest.raises(ValueError, match="scores and losses must both be"):
        ranking_loss(torch.zeros(scores), torch.zeros(losses))


def test_anchors_keep_their_share_of_the_image():
    torch.testing.assert_close(anchor_boxes(224, 14) * 2, anchor_boxes(448, 14))
    wide, square = anchor_boxes((448, 896), 14), anchor_boxes(448, 14)
    torch.testing.assert_close(wide, square * torch.tensor([2., 1., 2., 1.]))


@pytest.mark.parametrize("image_size,map_size", [(448, 14), (48, 6), (96, 3), (224, 13), ((96, 160), (5, 9)),
                                                 (448, 28)])
def test_as_many_anchors_as_scores(image_size, map_size):
    height, width = (map_size, map_size) if isinstance(map_size, int) else map_size
    levels = Navigator(4, 8)(torch.randn(2, 4, height, width))
    boxes = anchor_boxes(image_size, map_size)
    assert sum(level[0].numel() for level in levels) == len(boxes)
    image = torch.tensor([image_size] * 2 if isinstance(image_size, int) else image_size[::-1]).float()
    inside = torch.minimum(boxes.clamp(min=0), image.repeat(2))
    assert ((inside[:, 2:] - inside[:, :2]) > .05 * image).all()            # each shows something of the picture
    best = best_at(levels)
    highest = torch.cat([level.flatten(1) for level in levels], 1).amax(1)
    assert best.shape == (2, height, width) and best.amax((1, 2)).equal(highest)


def test_scores_lie_where_their_anchors_do():
    "Of each level and shape, in the very order of the anchors."
    boxes, sizes, start = anchor_boxes(448, 14), (14, 7, 4), 0
    for level, n in enumerate(sizes):
        shapes = anchor_shapes(level, (448, 448))
        for channel, (height, width) in enumerate(shapes):
            place = boxes[start + channel * n * n:start + (channel + 1) * n * n]
            torch.testing.assert_close(place[:, 3] - place[:, 1], torch.full((n * n,), height), atol=1e-3, rtol=0)
            torch.testing.assert_close(place[:, 2] - place[:, 0], torch.full((n * n,), width), atol=1e-3, rtol=0)
        start += len(shapes) * n * n
    assert start == len(boxes) and len(LEVELS) == 3


def iou(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.maximum(high - low, 0))
    return shared / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)


def numpy_picks(scores, boxes, m):
    "One picture's greedy suppression, with a sorted list and a loop."
    left, picks = list(np.argsort(-scores, kind="stable")), []
    while left and len(picks) < m:
        best = left.pop(0)
        picks.append(int(best))
        left = [i for i in left if iou(boxes[i], boxes[best]) <= .25]
    return picks


def test_proposals_are_those_of_a_loop():
    net = small()
    assert torch.equal(net.suppresses, suppression_table(net.anchors))
    scores = torch.randn(5, len(net.anchors), generator=torch.Generator().manual_seed(0))
    expected = [numpy_picks(row, net.anchors.double().numpy(), 6) for row in scores.numpy()]
    assert propose_from_table(scores, net.suppresses, 6).tolist() == expected


def test_crops_of_a_padded_picture():
    "Against zeros around the picture, a slice and an enlargement, as released."
    picture = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    pads = F.pad(picture, (20, 20, 20, 20))
    for x0, y0, x1, y1 in ((-10, -12, 14, 20), (50, 30, 70, 50), (4, 6, 20, 18)):
        expected = F.interpolate(pads[:, :, y0 + 20:y1 + 20, x0 + 20:x1 + 20], scale_factor=2., mode="bilinear")
        box = torch.tensor([x0, y0, x1, y1]).expand(2, 1, 4).float()
        found = padded_crops(picture, box, (2 * (y1 - y0), 2 * (x1 - x0)))[:, 0]
        torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5, rtol=0)
    far = torch.tensor([100., 100., 120., 120.]).expand(2, 1, 4)
    assert not padded_crops(picture, far, (8, 8)).any()
    assert padded_crops(picture.half(), box, (8, 8)).dtype is torch.float16
    assert padded_crops(picture, box[:, :0], (8, 8)).shape == (2, 0, 3, 8, 8)


def test_the_navigator_learns_from_the_order_alone():
    net, x, y = small(dropout=0.).train(), torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 0])
    terms = net.losses(net(x, y), y, nn.CrossEntropyLoss(reduction="none"))
    terms["rank"].sum().backward(retain_graph=True)
    moved = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"navigator"}
    net.zero_grad()
    (terms["image"] + terms["region"] + terms["hybrid"]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in net.navigator.parameters())


def test_label_smoothing_leaves_the_ranking_alone():
    net, x, y = small(dropout=0.).train(), torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 0])
    outputs, terms = net(x, y), []
    for smoothing in (0., .3):
        loss = FocusLoss(label_smoothing=smoothing, method=net)
        loss(outputs, y)
        terms.append(loss.terms)
    assert terms[0]["rank"] == terms[1]["rank"] and terms[0]["region"] != terms[1]["region"]


def test_scores_are_single_under_mixed_precision():
    "And the proposals those of single precision, if the maps are."
    net, maps = small(), torch.randn(2, 64, 6, 6)
    with torch.autocast("cpu", torch.bfloat16): mixed = net.navigator(maps)
    assert all(level.equal(single) and level.dtype is torch.float32
               for level, single in zip(mixed, net.navigator(maps)))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net.train()(torch.randn(4, 3, 48, 48))
        loss = FocusLoss(method=net)(outputs, torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert outputs["scores"].dtype is torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_an_answer_is_the_same_each_time():
    net, x = small().train(), torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        assert not net(x)["hybrid"].equal(net(x)["hybrid"])             # dropout
        assert net.eval()(x).equal(net(x))


def test_crops_pass_through_the_body_beside_the_pictures():
    net, seen = small(m=5, l=2), []
    net.body.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        net.train()(torch.rand(2, 3, 48, 48))
        net.eval()(torch.rand(2, 3, 48, 48))
    assert seen == [(2, 3, 48, 48), (10, 3, 24, 24), (2, 3, 48, 48), (4, 3, 24, 24)]


def test_without_regions_in_the_answer():
    net, x = small(l=0).eval(), torch.rand(2, 3, 48, 48)
    with torch.no_grad(): look, more = net.look(x), net.examine(x)
    assert look.boxes.shape == (2, 6, 4) and set(look.heads) == {"image", "hybrid"}
    assert more.heads["region"].shape == (2, 6, 3) and look.answer.allclose(more.answer, atol=1e-5)


def test_pictures_that_are_not_square_and_larger():
    net = small(image_size=(48, 72), zoom_size=(24, 30), l=3).eval()
    with torch.no_grad(): look = net.examine(torch.rand(2, 3, 120, 180))
    assert look.boxes[..., 0::2].max() <= 180 and look.boxes[..., 1::2].max() <= 120 and look.boxes.min() >= 0
    assert look.boxes[..., 2].max() > 72 and ((look.boxes[..., 2:] - look.boxes[..., :2]) > 0).all()
    with pytest.raises(ValueError, match="smaller than image_size"): net(torch.rand(1, 3, 40, 72))


def test_exports_with_a_free_batch():
    net, x = small().eval(), torch.rand(3, 3, 48, 48)
    free = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(net, (x,), dynamic_shapes=free)
    with torch.no_grad(): assert torch.allclose(program.module()(x[:2]), net(x[:2]), atol=1e-4)


@pytest.mark.parametrize("options,message", [
    (dict(m=1, l=1), "m=1 regions; the navigator learns from pairs"),
    (dict(m=2, l=3), "l=3 regions are to be used of m=2"), (dict(hidden=0), "hidden=0"),
    (dict(m=4000), "use 2 to 306"), (dict(l=-1), "l must be from 0 to m"), (dict(margin=0), "margin=0"),
    (dict(margin=math.nan), "margin=nan"), (dict(dropout=1.), "dropout=1.0; use 0 or more"),
    (dict(iou_threshold=1.5), "iou_threshold=1.5; use 0 to 1"), (dict(zoom_size=5000), "use a smaller zoom_size or m"),
    (dict(image_size=16), "the body's map has 2x2 cells, and three levels of anchors need 3x3"),
    (dict(image_size=(16, 48)), "the body's map has 2x6 cells"), (dict(image_size=400), "and 10000 is the most")])
def test_faults(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


def test_a_long_row_of_cells():
    net = NavigatorNet(toy_resnet((8, 16, 32)), 2, image_size=(48, 320), m=3, l=1).eval()
    with torch.no_grad(): assert net(torch.rand(1, 3, 48, 320)).shape == (1, 2)
