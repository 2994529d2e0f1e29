"Toy birds: what is refused, and that marks, bird and background don't depend on each other."
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fd_focus.toy import SITES, ToyBirds, ToyItem, class_marks, draw_bird, toy_items

seeds = st.integers(0, 10**6)


def test_refuses_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="n_classes=65: six marks make 2 to 64 classes"): class_marks(65)
    with pytest.raises(ValueError, match="split='dev' is none of"): ToyBirds("dev")
    with pytest.raises(ValueError, match="images_per_class=0; use at least 1"): ToyBirds(images_per_class=0)
    with pytest.raises(ValueError, match="image_size=8 is too small"): ToyBirds(image_size=8)
    with pytest.raises(IndexError, match="bird 12 of 12"): ToyBirds(images_per_class=1).draw(12)
    with pytest.raises(ValueError, match="would validate on training birds"): toy_items(split="train")


@settings(deadline=None, max_examples=25)
@given(seed=seeds, clutter=st.floats(0, 1))
def test_clutter_does_not_change_the_bird(seed, clutter):
    (clean, truth), (thick, again) = (draw_bird(np.random.default_rng(seed), [False] * 6, 128, clutter=amount)
                                      for amount in (0, clutter))
    assert np.array_equal(truth.parts, again.parts) and np.array_equal(truth.box, again.box)
    for site in ("breast", "wing"):                                  # their centres lie well inside the bird
        x, y = truth.parts[SITES.index(site), :2].astype(int)
        assert np.array_equal(np.asarray(clean)[y - 1:y + 2, x - 1:x + 2], np.asarray(thick)[y - 1:y + 2, x - 1:x + 2])


@settings(deadline=None, max_examples=25)
@given(seed=seeds, label=st.integers(0, 63))
def test_marks_change_nothing_else(seed, label):
    (bare, truth), (marked, again) = (draw_bird(np.random.default_rng(seed), marks, 128)
                                      for marks in ([False] * 6, class_marks(64)[label]))
    assert np.array_equal(truth.parts, again.parts)
    changed = np.abs(np.asarray(bare, int) - np.asarray(marked, int)).sum(-1) > 0
    yy, xx = np.mgrid[:128, :128] + .5
    for (x, y, r), here in zip(truth.parts, again.marked):
        if here: changed &= (xx - x) ** 2 + (yy - y) ** 2 > (r + 2) ** 2
    assert not changed.any()


@settings(deadline=None, max_examples=25)
@given(seed=seeds, size=st.sampled_from([32, 96, 224]))
def test_the_truth_lies_inside(seed, size):
    truth = ToyBirds(images_per_class=1, n_classes=6, image_size=size, seed=seed).truth(seed % 6)
    assert (truth.box >= 0).all() and (truth.box <= size).all()
    assert (truth.parts[:, :2] >= truth.box[:2] - 1).all() and (truth.parts[:, :2] <= truth.box[2:] + 1).all()


def test_a_pickle_holds_no_pictures():
    birds = ToyBirds(images_per_class=1, image_size=32, cache=True)
    birds.draw(3)
    assert birds._kept and not pickle.loads(pickle.dumps(birds))._kept


def test_items_of_both_halves():
    items, reader = toy_items(2, 1, n_classes=3, image_size=32)
    assert [item.split for item in items] == ["train"] * 6 + ["valid"] * 3
    assert str(ToyItem("valid", 2)) == "valid/00002" and reader("a path") == "a path"
    assert reader.truth(items[-1]).label == 2
