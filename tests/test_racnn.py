"RA-CNN: the released layer's rule, boxes within boxes, who learns from what, and when the warm-up ends."
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.mixup import MixUp
from fastai.torch_core import set_seed
from torch import nn

from fd_focus.bodies import create_body, toy_resnet
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.rivals.racnn import ProposalNet, ZoomInNet, box_gradient, nested, peak_square, scale_ranking_loss
from fd_focus.training.learner import focus_learner
from fd_focus.training.speed import CheckpointBody, HalfPrecision


def body(): return toy_resnet((8, 16))


def make(image_size=48, seed=0, **options):
    torch.manual_seed(seed)
    return ZoomInNet(body(), 3, image_size=image_size, **options)


def learner(cbs=(), **options):
    set_seed(0, reproducible=True)
    dls = FocusDataLoaders.from_toy(4, 2, n_classes=3, image_size=48, mark_size=2., bs=6)
    return focus_learner(dls, "toy_resnet", "racnn", pretrained=False, cut="layer2", cbs=list(cbs), **options)


def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
    return learn


def pictures(size=(48, 48), n=4):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 3


@pytest.mark.parametrize("probabilities, loss", [
    ([.6, .62, .9], [.03, 0.]), ([.5, .5, .5], [.05, .05]), ([.9, .1, .2], [.85, 0.]), ([.2, .9], [0.]),
    ([.4, .3, .2, .1], [.15, .15, .15])])
def test_the_ranking_loss_is_its_formula(probabilities, loss):
    torch.testing.assert_close(scale_ranking_loss(torch.tensor([probabilities])), torch.tensor([loss]))


def test_the_ranking_loss_takes_its_margin():
    torch.testing.assert_close(scale_ranking_loss(torch.tensor([[.5, .6]]), .2), torch.tensor([[.1]]))


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 3, 4)])
def test_the_ranking_loss_needs_scales(shape):
    with pytest.raises(ValueError, match="two or more scales"): scale_ranking_loss(torch.rand(shape))


def by_the_layer(gradient, a, b, c):
    "The derivatives of the released layer, written out as it has them, for a crop (3,n,m)."
    n, m, k = *gradient.shape[1:], .05
    H = lambda v: 1 / (1 + torch.exp(-k * v))
    d = lambda v: k * torch.exp(-k * v) / (1 + torch.exp(-k * v)) ** 2
    y, x = torch.meshgrid(b - c + 2 * torch.arange(n).double() * c / n, a - c + 2 * torch.arange(m).double() * c / m,
                          indexing="ij")
    mx, my = H(x - (a - c)) - H(x - (a + c)), H(y - (b - c)) - H(y - (b + c))
    da, db = (d(x - (a - c)) - d(x - (a + c))) * my, (d(y - (b - c)) - d(y - (b + c))) * mx
    dc = -((d(y - (b - c)) + d(y - (b + c))) * mx + (d(x - (a - c)) + d(x - (a + c))) * my) + .005
    total = torch.zeros(3).double()
    for channel in gradient.double().abs():
        w = channel / (channel.max() if channel.max() > 0 else 1) * 1e-7
        total += torch.stack([(w * part).sum() for part in (da, db, dc)])
    return total.float()


@pytest.mark.parametrize("half", [8., 40., 100., 200.])
def test_the_rule_is_the_layers(half):
    gradient = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) ** 3
    gradient[1, 2] = 0                                       # a channel that nothing depends on
    gradient[1, :, :, 150:] *= 5
    expected = torch.stack([by_the_layer(one, 250., 130., half) for one in gradient])
    torch.testing.assert_close(box_gradient(gradient, torch.full((2,), half)), expected, atol=1e-9, rtol=1e-3)


def test_sign_and_scale_do_not_count():
    gradient, half = torch.randn(2, 3, 32, 32), torch.tensor([60., 90.])
    there = box_gradient(gradient, half)
    for other in (-gradient, gradient.abs(), gradient * 1e-6):
        torch.testing.assert_close(box_gradient(other, half), there, atol=1e-9, rtol=1e-4)


def test_no_gradient_moves_nothing():
    found = box_gradient(torch.zeros(2, 3, 16, 16), torch.tensor([60., 90.]))
    assert found.isfinite().all() and not found.any()


def test_a_smaller_crop_is_pulled_as_strongly():
    gradient = F.interpolate(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 224)
    half = torch.tensor([90.])
    large, small = box_gradient(gradient, half), box_gradient(F.interpolate(gradient, 112), half)
    torch.testing.assert_close(small, large, atol=1e-6, rtol=.02)      # its places lie half a pixel off


def test_boxes_go_where_the_gradient_is():
    def pull(x0, y0, x1, y1):
        gradient = torch.zeros(1, 3, 64, 64)
        gradient[:, :, y0:y1, x0:x1] = 1
        return box_gradient(gradient, torch.tensor([80.]))[0]
    assert pull(0, 20, 12, 44)[0] > 0 > pull(52, 20, 64, 44)[0]        # descent goes left, and right
    assert pull(20, 0, 44, 12)[1] > 0 > pull(20, 52, 44, 64)[1]        # up, and down
    assert pull(26, 26, 38, 38)[2] > 0                                 # shrinks


@pytest.mark.parametrize("map_size", [(2, 2), (7, 7), (8, 5), (13, 13), (14, 20)])
def test_a_share_lies_inside(map_size):
    torch.manual_seed(0)
    net = ProposalNet(6, map_size, 16)
    nn.init.normal_(net.box.weight, std=3.)
    share = net(torch.randn(64, 6, *map_size))
    assert share.std(0).min() > .01
    boxes = nested(torch.tensor([[10., 20., 110., 70.]]), share)
    assert (boxes[:, :2] >= torch.tensor([10., 20.]) - 1e-4).all()
    assert (boxes[:, 2:] <= torch.tensor([110., 70.]) + 1e-4).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides >= torch.tensor([100., 50.]) / 3 - 1e-3).all()


def test_the_peak_is_the_cell_of_the_highest_mean():
    maps = torch.zeros(3, 4, 6, 8)
    maps[0, 1, 3, 4], maps[1, :, 0, 0], maps[2, 3, 5, 7] = 9, 1, 2
    maps[0, 0, 1, 1] = 8                                               # less on average
    expected = [[4.5 / 8, 3.5 / 6, .25], [.25, .25, .25], [.75, .75, .25]]
    torch.testing.assert_close(peak_square(maps), torch.tensor(expected))


@pytest.mark.parametrize("options, says", [
    (dict(scales=1), "use 2 or more"), (dict(scales=2.5), "use 2 or more"), (dict(scales=4), "fewer scales"),
    (dict(hidden=0), "hidden=0"), (dict(margin=-.1), "must not be negative"), (dict(warm=1.), "less than 1"),
    (dict(warm=-.1), "0 or more"), (dict(image_size=36, zoom_size=6), "larger image_size or zoom_size")])
def test_what_does_not_fit_is_told_at_once(options, says):
    with pytest.raises(ValueError, match=says): make(**options)


def test_training_needs_the_true_classes():
    with pytest.raises(ValueError, match="needs the true classes"): make().train()(pictures()[0])


@pytest.mark.parametrize("size, options", [((48, 80), {}), ((52, 52), dict(zoom_size=(30, 22))), (48, dict(scales=2)),
                                           (48, dict(shared=True)), (120, dict(scales=4)), (48, dict(warm=0))])
def test_sizes_and_options(size, options):
    net = make(size, **options)
    height, width = net.image_size
    x, y = pictures((height + 16, width + 8))                          # larger than the first view
    net.train()
    terms = net.losses(net(x, y), y, nn.CrossEntropyLoss(reduction="none"))
    assert set(terms) == set(net.terms) and all(term.shape == (4,) and term.isfinite().all() for term in terms.values())
    look = net.eval().look(x)
    k = net.scales - 1
    assert look.boxes.shape == (4, k, 4) and look.scores.shape == (4, k) and look.attention.shape == (4, *net.map_size)
    assert look.boxes.min() >= 0 and look.boxes[..., 2].max() <= width + 8 and look.boxes[..., 3].max() <= height + 16
    for outer, inner in zip(look.boxes.unbind(1), look.boxes.unbind(1)[1:]):
        assert (inner[:, :2] >= outer[:, :2] - 1e-3).all() and (inner[:, 2:] <= outer[:, 2:] + 1e-3).all()
    again = ZoomInNet(body(), 3, **net.config())
    again.load_state_dict(net.state_dict())
    assert again.eval()(x).equal(look.answer)


def test_each_scale_has_weights_of_its_own():
    net = make()
    assert len({id(p) for one in net.bodies for p in one.parameters()}) == 3 * len(list(body().parameters()))
    assert len(make(shared=True).bodies) == 1 and create_body("toy_resnet", pretrained=False)[0].source is not None


def gradients(net, weigh, warmed):
    net.train().zero_grad()
    net.warmed.fill_(warmed)
    x, y = pictures()
    terms = net.losses(net(x, y), y, nn.CrossEntropyLoss(reduction="none"))
    sum(weigh.get(name, 0.) * term.mean() for name, term in terms.items()).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}


def test_gradients_are_kept_apart():
    net = make()
    for term, warmed, parts in (("rank", True, {"proposals"}), ("rank", False, set()), ("peak", False, {"proposals"}),
                                ("peak", True, set()), ("fusion", True, {"fusion_head"}),
                                ("scale1", True, {"body", "scale_heads"}), ("scale3", False, {"later", "scale_heads"})):
        assert {name.split(".")[0] for name in gradients(net, {term: 1.}, warmed)} == parts, (term, warmed)


def test_the_pull_follows_the_weight_of_the_ranking_loss():
    "And the loss scale of mixed precision, and the number of batches to a step, which the layer's own does not."
    net = make()
    once, eight = gradients(net, {"rank": 1.}, True), gradients(net, {"rank": 8.}, True)
    assert once and set(once) == set(eight)
    for name in once: torch.testing.assert_close(eight[name], 8 * once[name])


def test_the_pull_is_the_rule_of_the_crops_gradient():
    net, (x, y) = make().train(), pictures()
    maps, crops, shares, _ = net.look_closer(x)
    heads = net.answers(maps)
    p = torch.stack([heads[f"scale{s}"].softmax(1)[torch.arange(4), y] for s in (1, 2, 3)], 1)
    expected = torch.autograd.grad(scale_ranking_loss(p).sum(), crops, retain_graph=True)
    pulled = torch.autograd.grad(net.rank(heads, y, crops, shares).sum(), shares)
    for side, share, gradient, pull in zip((448, 224), shares, expected, pulled):
        torch.testing.assert_close(pull, side * box_gradient(gradient, side * share[:, 2].detach()))


def test_the_middle_scale_is_left_alone_where_both_pairs_are_close():
    net = make(margin=1.5)                                      # every pair is active
    assert not any(name.startswith("proposals.0") for name in gradients(net, {"rank": 1.}, True))
    assert any(name.startswith("proposals.1") for name in gradients(net, {"rank": 1.}, True))


def test_the_warm_up_ends_in_time_and_for_good():
    seen = []
    learn = learner(warm=.5)
    learn.model.register_forward_pre_hook(lambda net, args: seen.append(bool(net.warmed)) if net.training else None)
    fit(learn, epochs=2)                                        # two batches an epoch
    assert seen == [False, False, True, True]
    seen.clear()
    fit(learn)                                                  # it is trained further
    assert seen == [True, True] and learn.model.state_dict()["warmed"]


def test_a_search_for_the_learning_rate_ends_no_warm_up():
    learn = learner()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    assert not learn.model.warmed
    learn.get_preds()
    assert not learn.model.warmed


def test_mixed_pictures_have_no_true_class():
    with pytest.raises(ValueError, match="leave them out"): fit(learner([MixUp()]))


def test_a_fit_leaves_the_compilers_settings_alone():
    before = torch._functorch.config.donated_buffer
    fit(learn := learner())
    learn.get_preds()
    with pytest.raises(ValueError): fit(learner([MixUp()]))
    assert torch._functorch.config.donated_buffer == before


def test_a_checkpointed_body_learns_the_same():
    plain, saving = (fit(learner(cbs, warm=0)).model.state_dict() for cbs in ((), [CheckpointBody()]))
    for name in plain: torch.testing.assert_close(saving[name], plain[name], atol=1e-5, rtol=1e-4, msg=name)


def test_it_learns_in_bfloat16():
    net = fit(learner([HalfPrecision("bf16")], warm=.5)).model
    assert all(p.isfinite().all() for p in net.parameters())
