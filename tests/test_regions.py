"`propose` picks what torchvision's NMS picks, for any finite scores without ties."
import torch
import torchvision
from hypothesis import given, settings, strategies as st

from fd_focus.regions import propose, region_grid


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
