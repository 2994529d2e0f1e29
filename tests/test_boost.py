"BoostCNN: weights and risk against autograd, whose turn it is, who moves, the step that is found, bad input."
import math

import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fd_focus.bodies import create_body
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.methods import METHODS, Method
from fd_focus.rivals.boost import (BoostNet, boosting_weights, exponential_risk, line_search, training_pictures,
                                   turn_of)
from fd_focus.training.learner import focus_learner
from fd_focus.training.recipes import ValidateEvery      # and the recipes, which are patched in


def toy_body(): return create_body("toy_resnet", pretrained=False, cut="layer2")[0]


def learner(n=6, **options):
    set_seed(0, reproducible=True)
    dls = FocusDataLoaders.from_toy(n, 3, n_classes=3, image_size=48, bs=6)
    return focus_learner(dls, "toy_resnet", "boost", pretrained=False, cut="layer2", **dict(base="plain") | options)


def fit(learn, epochs, *cbs, recipe="fit_one_cycle", **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, recipe)(epochs, cbs=list(cbs), **kwargs)
    return learn


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(0, 10 ** 6))
def test_weights_are_minus_twice_the_gradient_of_the_risk(b, c, seed):
    chance = torch.Generator().manual_seed(seed)
    scores = (3 * torch.randn(b, c, generator=chance)).requires_grad_()
    target = torch.randint(0, c, (b,), generator=chance)
    true = scores.gather(1, target[:, None])
    risk = (-(true - scores) / 2).exp().sum(1) - 1                  # exp(0) for j = z
    gradient, = torch.autograd.grad(risk.sum(), scores)
    torch.testing.assert_close(exponential_risk(scores, target), risk, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(boosting_weights(scores, target), -2 * gradient, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(boosting_weights(scores, target).sum(1), torch.zeros(b), atol=1e-3, rtol=0)


def test_weights_stay_finite_and_float32():
    scores, target = torch.tensor([[-1e4, 1e4, 0.]]), torch.tensor([0])
    assert boosting_weights(scores, target).isfinite().all()
    half = boosting_weights(torch.tensor([[.5, -.25, 8.]]).half(), target)
    assert half.dtype == torch.float32 and half.equal(boosting_weights(torch.tensor([[.5, -.25, 8.]]), target))


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 10), st.floats(.1, 5))
def test_the_search_finds_the_floor_of_any_valley(floor, slope):
    assert abs(line_search(lambda a: math.cosh(slope * (a - floor))) - floor) < 1e-3


def test_the_search_stops_at_its_limit():
    assert line_search(lambda a: math.exp(-a), high=4.) > 3.999 and line_search(math.exp) < 1e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6))
def test_every_epoch_is_somebodys_and_turns_follow_each_other(n_epoch, rounds):
    turns = [turn_of(epoch, n_epoch, rounds) for epoch in range(n_epoch)]
    assert all(first <= epoch < end for epoch, (_, first, end) in enumerate(turns))
    members = [t for t, *_ in turns]
    assert sorted(members) == members and set(members) == set(range(min(rounds, n_epoch)))
    lengths = [members.count(t) for t in set(members)]
    assert max(lengths) - min(lengths) <= 1


def test_the_distance_suits_a_rate_made_for_cross_entropy():
    "SGD of the recipe `paper` on features as a bilinear member with 256 of them has: of length 16, none negative."
    chance = torch.Generator().manual_seed(0)
    x = 16 * nn.functional.normalize(torch.rand(32, 4096, generator=chance))
    y, head, net = torch.arange(32) % 4, nn.Linear(4096, 4), BoostNet(toy_body(), 4, 48, base="plain")
    opt, losses = torch.optim.SGD(head.parameters(), .01, momentum=.9), []
    for _ in range(40):
        loss = net.losses(dict(earlier=torch.zeros(32, 4), member=head(x)), y, None)["boost"].mean()
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and max(losses) < 2


class Moves(Callback):
    "Which members' bodies and heads, and which members' statistics, have changed after each training batch."
    order = 60
    def _state(self):
        parts = [part for m in self.model.members for part in (m.body, m.image_head)]
        return [torch.cat([t.detach().flatten().double() for t in part.state_dict().values()]) for part in parts]
    def before_fit(self): self.moves, self.before = [], self._state()
    def after_batch(self):
        if not self.training: return
        now = self._state()
        self.moves.append([not a.equal(b) for a, b in zip(self.before, now)])
        self.before = now


@pytest.mark.parametrize("recipe", ["fit_one_cycle", "fit_paper", "fit_modern"])
def test_one_member_moves_at_a_time_in_every_recipe(recipe):
    "Three batches an epoch. Head, then head and body, of the first member; then the same of the second."
    learn, watch = learner(rounds=2, head_first=.5), Moves()
    learn.unfreeze()
    for _ in range(2):            # a second fit finds gradients and momentum of the first
        fit(learn, 4, watch, recipe=recipe)
        head, both = [False, True], [True, True]
        first, second = [[*a, False, False] for a in (head, both)], [[False, False, *a] for a in (head, both)]
        assert watch.moves == [first[0]] * 3 + [first[1]] * 3 + [second[0]] * 3 + [second[1]] * 3
    assert not learn.model.resting


def test_each_member_goes_through_the_whole_schedule():
    class Rates(Callback):
        order = 70
        def before_fit(self): self.rates = []
        def after_batch(self):
            if self.training: self.rates.append(self.opt.hypers[-1]["lr"])
    rates = Rates()
    fit(learner(head_first=0), 4, rates)
    assert rates.rates[:6] == pytest.approx(rates.rates[6:])


def risk_of(learn, k):
    "Of the first k members, on all training pictures."
    net = learn.model.eval()
    with torch.no_grad():
        risks = [exponential_risk(net.boosted(x, k), y) for x, y in training_pictures(learn)]
    return float(torch.cat(risks).mean())


def test_the_step_is_where_the_risk_is_least():
    learn = fit(learner(rounds=3, shrink=.7, head_first=0), 6)
    net, noted = learn.model, float(learn.model.risk)
    assert noted == pytest.approx(risk_of(learn, 3), rel=1e-4)
    risks = [2., *(risk_of(learn, k) for k in (1, 2, 3))]
    assert all(later <= before + 1e-4 for before, later in zip(risks, risks[1:]))
    last = net.steps[2].item()
    assert last > 0
    for other in (.9, 1.1):
        net.steps[2] = round(other * last)
        assert risk_of(learn, 3) >= noted - 1e-5


def test_an_answer_is_the_sum():
    net = BoostNet(toy_body(), 4, (48, 64), rounds=3, shrink=.5).eval()
    net.steps.copy_(torch.tensor([1_500_000, 250_000, 0]))
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        expected = .75 * net.members[0](x) + .125 * net.members[1](x)
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
        look = net.look(x)
    torch.testing.assert_close(look.answer, expected, atol=1e-5, rtol=1e-5)
    assert look.attention.shape == (2, *net.map_size) and look.boxes is None


def test_members_start_from_one_body_but_share_nothing():
    net = BoostNet(toy_body(), 3, 48, rounds=2, base="plain")
    first, second = net.bodies
    assert all(a.equal(b) and a.data_ptr() != b.data_ptr() for a, b in zip(first.parameters(), second.parameters()))
    assert not net.members[0].image_head.weight.equal(net.members[1].image_head.weight)
    names = list(net.state_dict())
    assert not [name for name in names if name.startswith("body.")] and len(set(names)) == len(names)


def test_finished_members_answer_in_eval_mode_and_get_no_gradient():
    net = BoostNet(toy_body(), 3, 48, rounds=2, base="plain", head_first=0).train()
    net.begin(1, afresh=True)
    net.train()
    assert not any(m.training for m in net.members[0].modules()) and all(m.training for m in net.members[1].modules())
    x, y = torch.randn(4, 3, 48, 48), torch.arange(4) % 3
    outputs = net(x, y)
    assert outputs["earlier"].any() and not outputs["earlier"].requires_grad
    net.losses(outputs, y, None)["boost"].sum().backward()
    without = {key for key, p in net.named_parameters() if p.grad is None}
    assert without == {key for key, _ in net.named_parameters() if key.startswith(net.at_rest)}


def test_fewer_epochs_than_rounds_leave_the_last_members_out():
    learn = fit(learner(rounds=3), 1)
    assert learn.model.alpha[0] > 0 and learn.model.alpha[1:].tolist() == [0, 0]


def test_an_average_of_the_weights_leaves_steps_and_risk_alone():
    learn = fit(learner(head_first=0), 4, recipe="fit_modern", ema=.9)
    assert float(learn.model.risk) == pytest.approx(risk_of(learn, 2), rel=.05)     # the first member's mean lags
    assert learn.model.steps.dtype == torch.int64 and (learn.model.steps > 0).all()


def test_nothing_is_touched_while_a_rate_is_looked_for_or_predictions_are_made():
    learn = fit(learner(), 2)
    before = learn.model.steps.clone(), learn.model.log_risk.clone()
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=4, show_plot=False)
        learn.get_preds()
        learn.validate()
    assert learn.model.steps.equal(before[0]) and learn.model.log_risk.equal(before[1])


class TwoHeads(Method):
    heads = ("image", "other")
    def __init__(self, body, n_classes, image_size=448):
        super().__init__(body, n_classes, image_size)
        self.image_head = nn.Linear(self.n_features, n_classes)


@pytest.mark.parametrize("options, message", [
    (dict(rounds=0), "rounds=0; use at least 1"),
    (dict(shrink=0), "shrink=0; use a number above 0, at most 1"),
    (dict(shrink=1.5), "shrink=1.5; use a number above 0"),
    (dict(head_first=1.), "head_first=1.0 is a share"),
    (dict(base="boost"), "base='boost' boosts already"),
    (dict(base="two_heads"), r"has several heads \(image, other\)"),
    (dict(base="focus"), "has several heads"),
    (dict(base="nobody"), "nobody.* is none of"),
])
def test_bad_input_is_told_at_once(options, message, monkeypatch):
    monkeypatch.setattr(METHODS, "places", METHODS.places | {"two_heads": TwoHeads})
    with pytest.raises(ValueError, match=message): BoostNet(toy_body(), 3, 48, **options)


def test_steps_are_found_where_validation_waits_for_the_last_epoch():
    "The line search is due at the end of each member's turn, whether somebody looks at the validation pictures or not."
    found = []
    for cbs in ([], [ValidateEvery(0)]):
        found.append(fit(learner(), 4, *cbs, lr_max=1e-3).model.alpha.tolist())
    assert found[0] == found[1] and found[0][0] != 1
