"Localisation metrics, confusions and calibration: properties, and independent references."
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from torchvision.ops import box_iou

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.evidence.localisation import (BoxRecall, ObjectCoverage, PartHitRate, PointingGame, box_recall, calibrate, confidence_threshold, confused_pairs,
                                expected_calibration_error, fit_temperature, localisation, localisation_metrics, object_coverage, part_hit_rate,
                                plot_confused, pointing_game, predictions, reliability, reliability_diagram)
from fd_focus.training.learner import focus_learner
from fd_focus.draw import plot_attention, plot_focus, plot_regions, plot_zooms


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def random_boxes(generator, *shape, side=100):
    corner = torch.rand(*shape, 2, generator=generator) * side * .7
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2, generator=generator) * side * .3], -1)


# Metrics

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 7))
def test_metrics_against_loops(seed, images, m):
    "Each metric against its definition, image by image and k by k."
    g = torch.Generator().manual_seed(seed)
    regions, boxes, parts = random_boxes(g, images, m), random_boxes(g, images), torch.rand(images, 4, 2, generator=g) * 100
    visible, attention = torch.rand(images, 4, generator=g) < .6, torch.rand(images, 5, 7, generator=g)
    hits, recall, coverage = part_hit_rate(regions, parts, visible), box_recall(regions, boxes, .2), object_coverage(regions, boxes)
    pointed = pointing_game(attention, boxes, (100, 140))
    for i in range(images):
        row, column = np.unravel_index(attention[i].argmax(), (5, 7))
        x, y = (column + .5) * 20, (row + .5) * 20
        assert pointed[i] == bool(boxes[i, 0] <= x <= boxes[i, 2] and boxes[i, 1] <= y <= boxes[i, 3])
        for k in range(1, m + 1):
            inside = [any(r[0] <= px <= r[2] and r[1] <= py <= r[3] for r in regions[i, :k].tolist()) for px, py in parts[i].tolist()]
            shown = [h for h, v in zip(inside, visible[i]) if v]
            if shown: assert math.isclose(hits[i, k - 1], sum(shown) / len(shown), abs_tol=1e-6)
            else: assert hits[i, k - 1].isnan()
            assert recall[i, k - 1] == (box_iou(regions[i, :k], boxes[i:i + 1]).max() >= .2)
    assert (coverage.diff(dim=1) >= -1e-6).all() and (coverage >= 0).all() and (coverage <= 1 + 1e-6).all()
    # By inclusion and exclusion of two regions.
    if m >= 2:
        area = lambda b: (b[:, 2:] - b[:, :2]).clamp_min(0).prod(1)
        meet = lambda a, b: torch.cat([torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])], 1)
        first, second = meet(regions[:, 0], boxes), meet(regions[:, 1], boxes)
        both = torch.where((area(first) > 0) & (area(second) > 0), area(meet(first, second)), 0)
        assert torch.allclose(coverage[:, 1], (area(first) + area(second) - both) / area(boxes), atol=1e-4)


def test_whole_and_nothing():
    everything, box = torch.tensor([[[0., 0., 100., 100.]]]), torch.tensor([[10., 10., 50., 50.]])
    assert object_coverage(everything, box).item() == 1 and part_hit_rate(everything, torch.rand(1, 5, 2) * 100).item() == 1
    assert not box_recall(everything, box).item() and box_recall(box[None], box).item()
    assert object_coverage(torch.tensor([[[60., 60., 70., 70.]]]), box).item() == 0


@pytest.fixture(scope="module")
def learn():
    "An untrained network on twelve validation birds of three classes, in batches of five."
    torch.manual_seed(0)
    dls = FocusDataLoaders.from_toy(4, 4, n_classes=3, bs=5)
    return focus_learner(dls, "toy_resnet", pretrained=False)


def test_metrics_of_a_learner_agree_with_functions(learn):
    found = localisation(learn)
    assert found.notna().all(axis=None) and (found >= 0).all(axis=None) and (found <= 1).all(axis=None)
    old, learn.metrics = learn.metrics, localisation_metrics(learn.dls, k=3)
    names = [metric.name for metric in learn.metrics]
    assert names == [n + c for n in ("pointing_game", "part_hit_rate_3", "object_coverage_3", "box_recall_3") for c in ("", "_chance")]
    with learn.no_bar(): first, second = learn.validate()[1:], learn.validate()[1:]
    learn.metrics = old
    assert first == second                                    # chance too is the same in every epoch
    for name, key in (("pointing_game", "pointing game, object"), ("part_hit_rate_3", "part hit rate at 3"),
                      ("object_coverage_3", "object coverage at 3"), ("box_recall_3", "box recall at 3")):
        assert math.isclose(first[names.index(name)], found.value[key], abs_tol=1e-5), name


def test_pictures_without_truth_count_neither_way(learn):
    "Hidden parts and missing boxes leave means over the others, not NaN and not zero."
    dls = learn.dls
    items = list(dls.valid_ds.items)
    full, table = localisation(learn), dls.table
    try:
        dls.table = table.copy()
        dls.table["visible"] = [np.ones(6, bool)] * len(table)
        for item in items[:6]:
            dls.table.at[str(item), "box"] = np.full(4, np.nan, np.float32)
            dls.table.at[str(item), "visible"] = np.zeros(6, bool)
        half = localisation(learn)
        assert half.notna().all(axis=None)
        metric = [PointingGame(dls), PartHitRate(dls, 4), ObjectCoverage(dls, 4), BoxRecall(dls, 4)]
        old, learn.metrics = learn.metrics, metric
        with learn.no_bar(): values = learn.validate()[1:]
        learn.metrics = old
        keys = ["pointing game, object", "part hit rate at 4", "object coverage at 4", "box recall at 4"]
        assert np.allclose(values, half.value[keys], atol=1e-5)
    finally: dls.table = table
    # The mean over the six others, worked out from the full set's own values.
    attention, regions = learn.see(items[6:])[1].attention, learn.see(items[6:])[1].boxes
    truth = {name: torch.from_numpy(v) for name, v in dls.truth(items[6:]).items()}
    assert math.isclose(half.value["part hit rate at 4"], part_hit_rate(regions, truth["parts"][..., :2])[:, 3].mean(), abs_tol=1e-5)
    assert math.isclose(half.value["pointing game, object"], pointing_game(attention, truth["box"], (96, 96)).float().mean(), abs_tol=1e-5)
    assert not math.isclose(half.value["part hit rate at 4"], full.value["part hit rate at 4"], abs_tol=1e-4)


def test_first_look_smaller_than_the_input(learn):
    "Boxes and truth are pixels of the input, also where the network's first look is reduced."
    small = focus_learner(learn.dls, "toy_resnet", pretrained=False, image_size=64)
    found = localisation(small)
    whole = focus_learner(learn.dls, "toy_resnet", pretrained=False)
    assert abs(found.chance["part hit rate at 4"] - localisation(whole).chance["part hit rate at 4"]) < .12
    assert abs(found.chance["object coverage at 6"] - localisation(whole).chance["object coverage at 6"]) < .12


def test_what_metrics_need_is_said(learn, tmp_path):
    from fd_focus.toy import ToyBirds
    birds = ToyBirds(images_per_class=4, n_classes=2, image_size=64)
    for i in range(8):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        birds[i][0].save(tmp_path / str(i % 2) / f"{i}.png")
    folder = FocusDataLoaders.from_folder(tmp_path, image_size=64, bs=2, num_workers=0)
    with pytest.raises(ValueError, match="know no boxes"): PointingGame(folder)
    boxes = learn.dls.table.drop(columns="parts")
    whole, learn.dls.table = learn.dls.table, boxes
    try:
        with pytest.raises(ValueError, match="know no parts: PartHitRate needs a table with a column 'parts'"): PartHitRate(learn.dls)
        assert [m.label for m in localisation_metrics(learn.dls)[::2]] == ["pointing_game", "object_coverage", "box_recall"]
    finally: learn.dls.table = whole
    plain = focus_learner(learn.dls, "toy_resnet", pretrained=False, plain=True)
    with pytest.raises(ValueError, match="PlainNet has no regions to measure"): localisation(plain)
    with pytest.raises(TypeError, match="PlainNet has no regions to look at"): plain.see(list(learn.dls.valid_ds.items))


# Figures

@pytest.mark.parametrize("draw,per_picture", [(plot_regions, 1), (plot_attention, 1), (plot_zooms, 5)])
def test_figures_of_files_batches_and_tensors(learn, tmp_path, draw, per_picture):
    items = list(learn.dls.valid_ds.items)[:2]
    pictures, focus = learn.see(items)
    x = learn.dls.test_dl(items).one_batch()[0]
    file = tmp_path / "bird.png"
    from PIL import Image
    Image.fromarray((pictures[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
    for arguments, n in (((pictures, focus), 2), ((learn, items), 2), ((learn, x), 2), ((learn, file), 1), ((learn, [file, str(file)]), 2)):
        figure = draw(*arguments)
        assert len([ax for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]) == n * per_picture
    figure, axes = plt.subplots(1, 2 * per_picture)
    assert draw(learn, items, axes=axes) is figure
    with pytest.raises(ValueError, match=f"{2 * per_picture} axes given, {3 * per_picture} needed"): draw(learn, list(learn.dls.valid_ds.items)[:3], axes=axes)


def test_regions_have_the_colours_of_the_paper(learn):
    items = list(learn.dls.valid_ds.items)[:1]
    boxes = learn.see(items)[1].boxes[0]
    patches = plot_regions(learn, items).axes[0].patches[::-1]          # the best lies on top
    assert [plt.matplotlib.colors.to_hex(p.get_edgecolor()) for p in patches] == ["#ff0000", "#00ff00", "#0000ff", "#ffff00"]
    assert [p.get_bbox().extents.tolist() for p in patches] == boxes[:4].tolist()
    assert len(plot_regions(learn, items, k=2).axes[0].patches) == 2 and len(plot_regions(learn, items, k=6).axes[0].patches) == 6
    assert len(plot_focus(learn, items).axes) == 2


def test_attention_has_a_scale(learn):
    items = list(learn.dls.valid_ds.items)[:1]
    attention = learn.see(items)[1].attention[0]
    bar = next(ax for ax in plot_attention(learn, items).axes if ax.get_label() == "<colorbar>")
    assert np.allclose(bar.get_ylim(), (attention.min(), attention.max()), atol=1e-5)


def test_confusions(learn):
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])]
    targets = torch.tensor([0, 1, 1, 2, 2, 2, 1, 0])
    pairs = confused_pairs(logits, targets, ["a", "b", "c"])
    assert pairs.values.tolist() == [["c", "b", 2, 3], ["b", "a", 1, 3], ["b", "c", 1, 3]]
    assert len(confused_pairs(logits, targets, "abc", 1)) == 1
    assert confused_pairs(torch.eye(3), torch.arange(3), "abc").empty
    own, truth = predictions(learn)
    assert own.shape == (12, 3) and truth.tolist() == [list(learn.dls.vocab).index(learn.dls.table.label[str(i)]) for i in learn.dls.valid_ds.items]
    worst = confused_pairs(own, truth, learn.dls.vocab).iloc[0]
    titles = [ax.get_title("left") for ax in plot_confused(learn, pairs=1, examples=2).get_axes()]
    assert any(f"taken for {worst.taken_for}, {worst['count']} of {worst.of}" in title for title in titles)
    plain = focus_learner(learn.dls, "toy_resnet", pretrained=False, plain=True)
    assert plot_confused(plain, pairs=1) is not None


def test_nothing_confused_is_said(learn, monkeypatch):
    import fd_focus.evidence.localisation
    targets = torch.arange(12) % 3
    monkeypatch.setattr(fd_focus.evidence.localisation, "predictions", lambda learn: (torch.eye(3)[targets], targets))
    with pytest.raises(ValueError, match="no validation picture is taken for another class"): plot_confused(learn)


# Calibration

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
        losses = [torch.nn.functional.cross_entropy(logits.double() / t, targets).item() for t in grid]
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


def test_calibrating_where_all_is_right(learn, monkeypatch):
    import fd_focus.evidence.localisation
    targets = torch.arange(60) % 3
    hesitant = torch.eye(3)[targets] * torch.linspace(.3, 2, 60)[:, None]
    monkeypatch.setattr(fd_focus.evidence.localisation, "predictions", lambda learn: (hesitant, targets))
    found = calibrate(learn)
    lowest = hesitant.softmax(1).max(1).values.min()
    assert (found.temperature, found.sure_accuracy, found.sure_share) == (1, 1, 1) and math.isclose(found.threshold, lowest, abs_tol=1e-6) and found.ece == found.ece_calibrated


def test_never_sure_is_not_only_sure_at_one():
    "Float32 has probabilities of 1.0: they may count as sure, where nothing else does; or there is no threshold at all."
    certain = torch.eye(2)[torch.zeros(20, dtype=torch.long)]
    right = confidence_threshold(certain, torch.zeros(20))
    assert (right.probability, right.accuracy, right.share) == (1, 1, 1)
    wrong = confidence_threshold(certain, torch.ones(20))
    assert wrong.probability == 2 and math.isnan(wrong.accuracy) and wrong.share == 0 and not (certain >= wrong.probability).any()


def test_reliability_against_sklearn():
    logits, targets = drawn(sharpen=2.)
    probabilities = logits.softmax(1)
    confidence, guess = probabilities.max(1)
    right, mean = calibration_curve((guess == targets).numpy(), confidence.numpy(), n_bins=15)
    table = reliability(probabilities, targets, 15)
    assert np.allclose(table.accuracy, right) and np.allclose(table.confidence, mean, atol=1e-6) and table["count"].sum() == 3000
    assert math.isclose(expected_calibration_error(probabilities, targets), float((table["count"] / 3000 * np.abs(right - mean)).sum()), abs_tol=1e-6)


def test_ece_of_extremes():
    sure = torch.eye(2)[torch.zeros(10, dtype=torch.long)]
    assert expected_calibration_error(sure, torch.zeros(10)) == 0 and expected_calibration_error(sure, torch.ones(10)) == 1
    with pytest.raises(ValueError, match="bins=0"): reliability(sure, torch.zeros(10), 0)


def test_reliability_diagram_draws_into_axes():
    logits, targets = drawn(300)
    figure, ax = plt.subplots()
    assert reliability_diagram(logits.softmax(1), targets, ax=ax) is figure and "ECE" in ax.get_title()
    assert reliability_diagram(logits.softmax(1), targets) is not figure


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(.3, 1.), st.integers(1, 20))
def test_threshold_is_the_smallest_that_keeps_the_promise(seed, accuracy, least):
    g = torch.Generator().manual_seed(seed)
    probabilities = (torch.randint(0, 6, (40, 3), generator=g) + .01).div(3).softmax(1)         # many ties
    targets = torch.randint(0, 3, (40,), generator=g)
    found = confidence_threshold(probabilities, targets, accuracy, least)
    confidence, guess = probabilities.double().max(1)
    right = guess == targets
    fits = [t for t in confidence.unique().tolist() if (keep := confidence >= t).sum() >= least and right[keep].double().mean() >= accuracy - 1e-9]
    if not fits: assert found.probability == 2 and found.share == 0 and math.isnan(found.accuracy); return
    keep = confidence >= found.probability
    assert found.probability == min(fits)
    assert math.isclose(found.share, keep.double().mean()) and math.isclose(found.accuracy, right[keep].double().mean())


def test_calibrate_a_learner(learn, tmp_path):
    found = calibrate(learn, accuracy=.5)
    assert 1 / 20 <= found.temperature <= 20 and (0 <= found.threshold <= 1 or found.threshold == 2 and found.sure_share == 0) and 0 <= found.ece <= 1 and 0 <= found.ece_calibrated <= 1
    logits, targets = predictions(learn)
    assert math.isclose(found.temperature, fit_temperature(logits, targets))
    probabilities = (logits / found.temperature).softmax(1)
    sure = probabilities.max(1).values >= found.threshold
    assert math.isclose(sure.double().mean(), found.sure_share, abs_tol=1e-9)
    from fd_focus.use.model_folder import load_focus, save_focus
    save_focus(learn, tmp_path, "toy_resnet", temperature=found.temperature, threshold=found.threshold)      # the model folder takes them
    config = load_focus(tmp_path).config
    assert math.isclose(config["temperature"], found.temperature) and config["threshold"] == found.threshold
    never = calibrate(learn, accuracy=1.)
    assert never.threshold == 2 and never.sure_share == 0 and math.isnan(never.sure_accuracy)                # an untrained network
    save_focus(learn, tmp_path, "toy_resnet", temperature=never.temperature, threshold=never.threshold)
    assert load_focus(tmp_path).config["threshold"] == 2
