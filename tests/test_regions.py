"Boxes lie where they should, and `propose` picks what torchvision's NMS picks, for any finite scores without ties."
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st

from fd_focus.regions import (REGION_COLOURS, _greedy, _greedy_numpy, draw_regions, propose, region_grid,
                              suppression_table)


@settings(deadline=None, max_examples=150)
@given(image=st.sampled_from([64, 100, 224, 448, 449]), cells=st.integers(2, 15), share=st.floats(0.1, 0.9),
       threshold=st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.7, 1.0]), seed=st.integers(0, 10**6),
       scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_equals_torchvision_nms(image, cells, share, threshold, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    boxes = region_grid(image, cells, max(1, int(image * share)))
    scores = (torch.randperm(cells * cells, generator=generator).float() - cells).view(1, cells, cells) * scale
    m = min(6, cells * cells)
    reference = torchvision.ops.nms(boxes, scores.flatten(), threshold)[:m]
    ours = propose(scores, boxes, m, threshold)[0]
    assert torch.equal(ours[: len(reference)], reference)
    assert len(set(ours.tolist())) == m


boxes, attention = region_grid(448, 14, 160), torch.rand(4, 14, 14, generator=torch.Generator().manual_seed(0))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="region_size=500 does not fit image_size=448"): region_grid(448, 14, 500)
    with pytest.raises(ValueError, match="map_size=0 has no cell"): region_grid(448, 0, 160)
    with pytest.raises(ValueError, match="m=197 regions asked for, but there are only 196 boxes"):
        propose(attention, boxes, m=197)
    with pytest.raises(ValueError, match="42 cells, but there are 196 boxes"): propose(attention[:, :3], boxes)


@settings(deadline=None, max_examples=100)
@given(height=st.integers(20, 450), width=st.integers(20, 450), h=st.integers(1, 15), w=st.integers(1, 15),
       share=st.floats(.05, 1))
def test_boxes_lie_inside_and_keep_their_size(height, width, h, w, share):
    region = max(1, int(height * share)), max(1, int(width * share))
    grid = region_grid((height, width), (h, w), region)
    assert grid.shape == (h * w, 4) and (grid[:, :2] >= 0).all()
    assert (grid[:, 2] <= width + 1e-4).all() and (grid[:, 3] <= height + 1e-4).all()   # float32, fractions of a pixel
    sides = torch.tensor(region[::-1]).float().expand(h * w, 2)
    torch.testing.assert_close(grid[:, 2:] - grid[:, :2], sides, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=100)
@given(m=st.integers(1, 12), threshold=st.sampled_from([0.0, 0.1, 0.25, 0.7]), seed=st.integers(0, 10**6))
def test_numpy_and_tensors_pick_the_same(m, threshold, seed):
    scores = torch.rand(3, 196, generator=torch.Generator().manual_seed(seed))
    table = suppression_table(boxes, threshold)
    fast = _greedy_numpy(scores.numpy(), table.numpy(), m)
    ours = _greedy(scores, table, m)
    assert fast is None or torch.equal(torch.from_numpy(fast), ours)
    assert torch.equal(propose(scores, boxes, m, threshold), ours)


def test_the_best_suppressed_follow_in_order():
    few = propose(attention, boxes, m=6, iou_threshold=0.)
    for scores, ours in zip(attention.flatten(1), few):
        alive = torchvision.ops.nms(boxes, scores, 0.)[:6]
        assert torch.equal(ours[:len(alive)], alive)
        rest = [i for i in scores.argsort(descending=True).tolist() if i not in alive.tolist()]
        assert ours[len(alive):].tolist() == rest[:6 - len(alive)]


def test_no_regions():
    assert propose(attention, boxes, m=0).shape == (4, 0)


def test_best_region_is_drawn_last():
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgba
    fig, ax = plt.subplots()
    draw_regions(ax, torch.rand(3, 448, 448), boxes[:6], k=6)
    drawn = [patch.get_edgecolor() for patch in ax.patches[::-1]]
    assert drawn == [to_rgba(c) for c in (*REGION_COLOURS, "white", "white")]
    plt.close(fig)


def test_a_table_in_pieces_is_the_whole_table():
    "IoU is computed some rows at a time: of a fine map's thousand boxes it would take many times the table's memory."
    fine = region_grid(448, 32, 160)
    whole = (torchvision.ops.box_iou(fine, fine).double() > .25) | torch.eye(1024, dtype=torch.bool)
    assert torch.equal(suppression_table(fine), whole) and suppression_table(fine[:0]).shape == (0, 0)
