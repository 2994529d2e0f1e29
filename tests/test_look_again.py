"Who looks again: the curve and the choice against brute force; a learner's limit, and where none is chosen."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.evidence.comparison import multiply_adds
from fd_focus.evidence.look_again import both_looks, calibrate, choose_share, look_again_curve
from fd_focus.training.learner import focus_learner


def answers(first, second, targets, below):
    "Accuracy and share, picture by picture."
    right = again = 0
    for one, two, target in zip(first, second, targets):
        unsure = one.double().max() < below
        again += unsure
        right += (two if unsure else one).argmax() == target
    return float(right) / len(targets), float(again) / len(targets)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 25), st.integers(2, 5), st.booleans())
def test_the_curve_is_what_each_limit_does(seed, n, c, ties):
    rng = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(n, c, generator=rng).mul(3).softmax(1) for _ in range(2))
    if ties: first = first.mul(4).round().clamp_min(1).div(4)
    targets = torch.randint(0, c, (n,), generator=rng)
    curve = look_again_curve(first, second, targets)
    for row in curve.itertuples():
        assert answers(first, second, targets, row.below) == pytest.approx((row.accuracy, row.share))
    assert curve.share.iloc[0] == 0 and curve.share.iloc[-1] == 1 and curve.share.is_monotonic_increasing
    chosen = choose_share(curve)
    assert chosen.accuracy >= chosen.everybody - 1e-9
    assert all(row.accuracy < chosen.everybody for row in curve.itertuples() if row.share < chosen.share)
    least = choose_share(curve, .3)
    assert least.share <= .3 and not any(least.share < row.share <= .3 for row in curve.itertuples())


def test_a_learner_chooses_on_validation_pictures(learn):
    learn = focus_learner(learn.dls, "toy_resnet", pretrained=False)
    assert learn.model.answer == "adaptive"                    # the default preset
    first, second, targets = both_looks(learn)
    found = calibrate(learn, look_again=.5)
    chosen = found.look_again
    assert chosen.share <= .5 and learn.model.look_again_below == chosen.below
    assert answers(first, second, targets, chosen.below) == pytest.approx((chosen.accuracy, chosen.share))
    with learn.no_bar(): assert learn.validate()[1] == pytest.approx(chosen.accuracy)
    size = learn.model.image_size
    one, two = (multiply_adds(learn.model, size, share) for share in (0., 1.))
    assert one < multiply_adds(learn.model, size, chosen.share) < two or chosen.share == 0


def test_test_pictures_choose_nothing():
    dls = FocusDataLoaders.from_toy(4, 4, n_classes=3, bs=5, split="test")
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    learn.model.look_again_below = .123
    assert calibrate(learn).look_again is None and learn.model.look_again_below == .123
    with pytest.raises(ValueError, match="test pictures are for a finished choice"): calibrate(learn, look_again=.1)


def test_where_nobody_could_look_again(learn):
    plain = focus_learner(learn.dls, "toy_resnet", method="plain", pretrained=False)
    assert calibrate(plain).look_again is None
    with pytest.raises(ValueError, match="this one looks at all alike"): calibrate(plain, look_again=.1)
    with pytest.raises(ValueError, match="nobody could look again"): both_looks(plain)
    paper = focus_learner(learn.dls, "toy_resnet", preset="paper", pretrained=False)
    assert calibrate(paper).look_again is None
    with pytest.raises(ValueError, match="share=2; use a number from 0 to 1"): calibrate(learn, look_again=2)


def test_settings_without_a_preset_mean_the_methods_own_defaults():
    from fd_focus.training.run import make_learner
    from fd_focus.training.settings import Settings, make_settings
    tiny = dict(arch="toy_resnet", image_size=64, n_classes=3, images_per_class=8, valid_per_class=2, bs=8)
    paper, photos = make_learner(Settings(**tiny)), make_learner(make_settings(dict(tiny, preset="photos")))
    assert (paper.model.answer, paper.model.m, paper.loss_func.distill) == ("hybrid", 6, 0)
    assert (photos.model.answer, photos.model.m, photos.loss_func.distill) == ("adaptive", 4, 1)
