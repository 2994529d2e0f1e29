"Confusions and calibration: properties, and independent references."
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.interpret import ClassificationInterpretation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from sklearn.calibration import calibration_curve

from fd_focus.evidence import calibration
from fd_focus.evidence.calibration import (calibrate_logits, confidence_threshold, confused_pairs,
                                           expected_calibration_error, fit_temperature, least_share, plot_confused,
                                           predictions, reliability, reliability_diagram)
from fd_focus.evidence.look_again import calibrate
from fd_focus.training.learner import focus_learner
from fd_focus.use.model_folder import load_focus, save_focus


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_confusions(learn):
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])]
    targets = torch.tensor([0, 1, 1, 2, 2, 2, 1, 0])
    pairs = confused_pairs(logits, targets, ["a", "b", "c"])
    assert pairs.values.tolist() == [["c", "b", 2, 3], ["b", "a", 1, 3], ["b", "c", 1, 3]]
    assert len(confused_pairs(logits, targets, "abc", 1)) == 1
    assert confused_pairs(torch.eye(3), torch.arange(3), "abc").empty
    own, truth = predictions(learn)
    labels = learn.dls.table.label[[str(item) for item in learn.dls.valid_ds.items]]
    assert own.shape == (12, 3) and truth.tolist() == [list(learn.dls.vocab).index(label) for label in labels]
    worst = confused_pairs(own, truth, learn.dls.vocab).iloc[0]
    with learn.no_bar(): theirs = ClassificationInterpretation.from_learner(learn).most_confused()      # fastai's
    ours = confused_pairs(own, truth, learn.dls.vocab)
    assert sorted(map(tuple, theirs)) == sorted(zip(ours["is"], ours.taken_for, ours["count"]))
    titles = [ax.get_title("left") for ax in plot_confused(learn, pairs=1, examples=2).get_axes()]
    assert any(f"taken for {worst.taken_for}, {worst['count']} of {worst.of}" in title for title in titles)
    plain = focus_learner(learn.dls, "toy_resnet", pretrained=False, method="plain")
    assert plot_confused(plain, pairs=1) is not None


def test_nothing_confused_is_said(learn, monkeypatch):
    targets = torch.arange(12) % 3
    monkeypatch.setattr(calibration, "predictions", lambda learn: (torch.eye(3)[targets], targets))
    with pytest.raises(ValueError, match="no validation picture is taken for another class"): plot_confused(learn)


def drawn(n=3000, classes=8, seed=0, sharpen=1.):
    "Logits, and targets drawn from the probabilities they mean before they are sharpened."
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=g) * 2
    return logits * sharpen, torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]


@pytest.mark.parametrize("sharpen", [.3, 1., 2.5])
def test_temperature_undoes_sharpening(sharpen):
    logits, targets = drawn(sharpen=sharpen)
    temperature = fit_temperature(logits, targets)
    assert abs(temperature / sharpen - 1) < .08                        # three standard errors at 3,000 answers
    assert ((logits / temperature).argmax(1) == logits.argmax(1)).all()
    loss = lambda t: torch.nn.functional.cross_entropy(logits / t, targets).item()
    assert loss(temperature) <= min(loss(temperature * f) for f in (.9, .97, 1.03, 1.1))


def test_the_usual_temperature_is_the_most_likely_one():
    "Against a fine grid: the case without an error changes nothing where there are some, few or many."
    for wrong in (1, 3, 300):
        logits, targets = drawn(n=600, sharpen=2.)
        guess = logits.argmax(1)
        targets = torch.where(torch.arange(600) < wrong, targets.where(targets != guess, (guess + 1) % 8), guess)
        grid = np.geomspace(1 / 20, 20, 6001)                           # steps of a thousandth
        parts = [torch.from_numpy(part)[:, None, None] for part in np.array_split(grid, 24)]
        losses = [(logits.double() / t).log_softmax(2)[:, torch.arange(600), targets] for t in parts]  # (250,600)
        losses = -torch.cat(losses).mean(1).numpy()
        assert math.isclose(fit_temperature(logits, targets), grid[np.argmin(losses)], rel_tol=1e-3), wrong


@pytest.mark.parametrize("scale", [.01, .3, 5., 1000.])
def test_no_temperature_without_an_error(scale):
    "A network that hesitates, but is right each time, is not made to sound sure; one that is sure stays so."
    right, logits = torch.arange(40) % 4, torch.eye(4)[torch.arange(40) % 4] * scale
    assert fit_temperature(logits, right) == 1
    assert fit_temperature(torch.zeros(40, 4), right) == 1             # says nothing at all
    assert fit_temperature(logits, right.flip(0)) > 1
    assert fit_temperature(logits[:1], right[:1]) == 1


def test_a_tie_is_no_error_to_judge_by():
    "The one wrong answer is wrong by a hair: no temperature could mend it, and the others would take the smallest."
    right, logits = torch.arange(40) % 4, 5. * torch.eye(4, dtype=torch.double)[torch.arange(40) % 4]
    logits[0, 1] = logits[0, 0] + 1e-9
    assert logits[0].argmax() != right[0] and fit_temperature(logits, right) == 1


def test_calibrating_where_all_is_right():
    targets = torch.arange(60) % 3
    hesitant = torch.eye(3)[targets] * torch.linspace(.3, 2, 60)[:, None]
    found = calibrate_logits(hesitant, targets)
    lowest = hesitant.softmax(1).max(1).values.min()
    assert (found.temperature, found.sure_accuracy, found.sure_share) == (1, 1, 1)
    assert math.isclose(found.threshold, lowest, abs_tol=1e-6) and found.ece == found.ece_calibrated


def test_never_sure_is_not_only_sure_at_one():
    "Float32 has probabilities of 1.0: they may count as sure where nothing else does; or there is no threshold."
    certain = torch.eye(2)[torch.zeros(40, dtype=torch.long)]
    right = confidence_threshold(certain, torch.zeros(40))
    assert (right.probability, right.accuracy, right.share) == (1, 1, 1)
    wrong = confidence_threshold(certain, torch.ones(40))
    assert wrong.probability == 2 and math.isnan(wrong.accuracy) and wrong.share == 0
    assert not (certain >= wrong.probability).any()


def test_reliability_against_sklearn():
    logits, targets = drawn(sharpen=2.)
    probabilities = logits.softmax(1)
    confidence, guess = probabilities.max(1)
    right, mean = calibration_curve((guess == targets).numpy(), confidence.numpy(), n_bins=15)
    table = reliability(probabilities, targets, 15)
    assert np.allclose(table.accuracy, right) and np.allclose(table.confidence, mean, atol=1e-6)
    assert table["count"].sum() == 3000
    expected = float((table["count"] / 3000 * np.abs(right - mean)).sum())
    assert math.isclose(expected_calibration_error(probabilities, targets), expected, abs_tol=1e-6)


def test_ece_of_extremes():
    sure = torch.eye(2)[torch.zeros(10, dtype=torch.long)]
    assert expected_calibration_error(sure, torch.zeros(10)) == 0
    assert expected_calibration_error(sure, torch.ones(10)) == 1
    with pytest.raises(ValueError, match="bins=0"): reliability(sure, torch.zeros(10), 0)


def test_reliability_diagram_draws_into_axes():
    logits, targets = drawn(300)
    figure, ax = plt.subplots()
    assert reliability_diagram(logits.softmax(1), targets, ax=ax) is figure and "ECE" in ax.get_title()
    assert reliability_diagram(logits.softmax(1), targets) is not figure


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(.3, 1.), st.floats(.5, .99))
def test_threshold_is_the_smallest_that_keeps_the_promise(seed, accuracy, certainty):
    "Against each possible threshold, and the other way to ask: how likely is it that the true share is too small?"
    g = torch.Generator().manual_seed(seed)
    probabilities = (torch.randint(0, 6, (40, 3), generator=g) + .01).div(3).softmax(1)         # many ties
    targets = torch.where(torch.rand(40, generator=g) < .8, probabilities.argmax(1), 2)
    found = confidence_threshold(probabilities, targets, accuracy, certainty)
    confidence, guess = probabilities.double().max(1)
    right = guess == targets
    def too_small(t):
        k, n = right[confidence >= t].sum().item(), (confidence >= t).sum().item()
        return beta(k + .5, n - k + .5).cdf(accuracy)
    fits = [t for t in confidence.unique().tolist() if too_small(t) <= 1 - certainty]
    if not fits:
        assert (found.probability, found.share, found.right, found.of) == (2, 0, 0, 0) and math.isnan(found.accuracy)
        return
    keep = confidence >= found.probability
    assert found.probability == min(fits) and (found.right, found.of) == (right[keep].sum(), keep.sum())
    assert math.isclose(found.share, keep.double().mean()) and math.isclose(found.accuracy, right[keep].double().mean())


@pytest.mark.parametrize("n, sure", [(10, False), (26, False), (27, True), (1000, True)])
def test_few_pictures_promise_little(n, sure):
    "All are right, each with 0.9: that is 95 % only where there are enough of them."
    probabilities = torch.tensor([[.9, .1]]).expand(n, 2)
    found = confidence_threshold(probabilities, torch.zeros(n))
    assert (found.probability < 1) == sure and (found.right, found.of) == ((n, n) if sure else (0, 0))
    assert (least_share(n, n) >= .95) == sure


def test_the_promise_is_kept_on_other_pictures():
    "An honest network, thresholds from 60 pictures: broken in few trials, where counting alone breaks every other one."
    g, broken = torch.Generator().manual_seed(0), 0
    for seed in range(60):
        logits, targets = drawn(2060, classes=4, seed=seed)
        probabilities = (1.5 * logits).softmax(1)
        targets = torch.multinomial(probabilities, 1, generator=g)[:, 0]
        found = confidence_threshold(probabilities[:60], targets[:60])
        sure = probabilities[60:].max(1).values >= found.probability
        right = (probabilities.argmax(1) == targets)[60:][sure].double().mean()
        broken += bool(right < .95)                                       # NaN, nobody is sure, breaks nothing
    assert broken <= 12                                                   # a fifth


def test_calibrate_a_learner(learn, tmp_path):
    found = calibrate(learn, accuracy=.5)
    assert 1 / 20 <= found.temperature <= 20 and 0 <= found.ece <= 1 and 0 <= found.ece_calibrated <= 1
    assert 0 <= found.threshold <= 1 or found.threshold == 2 and found.sure_share == 0
    logits, targets = predictions(learn)
    assert math.isclose(found.temperature, fit_temperature(logits, targets))
    probabilities = (logits / found.temperature).softmax(1)
    sure = probabilities.max(1).values >= found.threshold
    assert math.isclose(sure.double().mean(), found.sure_share, abs_tol=1e-9)
    right = probabilities.argmax(1) == targets
    assert (found.sure_right, found.sure_of) == (right[sure].sum(), sure.sum())
    assert (found.right, found.pictures, found.wanted) == (right.sum(), 12, .5)
    save_focus(learn, tmp_path, calibration=found)
    config = load_focus(tmp_path).about
    assert math.isclose(config["temperature"], found.temperature) and config["threshold"] == found.threshold
    assert config["evidence"] == dict(right=found.sure_right, of=found.sure_of, pictures=12, wanted=.5)
    assert config["metrics"] == dict(accuracy=found.right / 12, valid_images=12)
    never = calibrate(learn, accuracy=1.)
    assert never.threshold == 2 and never.sure_share == 0 and math.isnan(never.sure_accuracy)      # it is untrained
    save_focus(learn, tmp_path, temperature=never.temperature, threshold=never.threshold)
    assert load_focus(tmp_path).about["threshold"] == 2
    save_focus(learn, tmp_path, calibration=never)
    about = load_focus(tmp_path).about
    assert about["threshold"] == 2 and about["evidence"] == dict(right=0, of=0, pictures=12, wanted=1.)


def test_what_cannot_be_fitted_is_said():
    logits, targets = drawn(50)
    with pytest.raises(ValueError, match="50 logits and 5 targets"): fit_temperature(logits, targets[:5])
    with pytest.raises(ValueError, match="0 logits and 0 targets"): fit_temperature(logits[:0], targets[:0])
    with pytest.raises(ValueError, match="NaN"): fit_temperature(logits * float("nan"), targets)
    for certainty in (0, 1, 95, float("nan")):
        with pytest.raises(ValueError, match=f"certainty={certainty}; use a number between 0 and 1"):
            least_share(1, 2, certainty)
