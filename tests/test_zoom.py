"Zooming equals PyTorch's interpolation of the slice, antialiased where a crop is reduced, also in a graph."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from fd_focus.zoom import _windows, _windows_gather, _zoom_any, _zoom_equal, _zoom_weighted, zoom

images = torch.rand(2, 3, 90, 120, generator=torch.Generator().manual_seed(0))


def sliced(images, boxes, size):
    "F.interpolate of every slice, antialiased (which changes nothing where a slice is enlarged)."
    crops = [[F.interpolate(image[None, :, y0:y1, x0:x1], size=size, mode="bilinear", antialias=True)
              for x0, y0, x1, y1 in rows] for image, rows in zip(images, boxes.long().tolist())]
    return torch.stack([torch.cat(row) for row in crops])


def boxes_of(region, seed, m=3):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(0, 121 - region[1], (2, m), generator=generator)
    top = torch.randint(0, 91 - region[0], (2, m), generator=generator)
    return torch.stack([left, top, left + region[1], top + region[0]], -1).float()


sides = st.tuples(st.integers(5, 90), st.integers(5, 120))


@settings(deadline=None, max_examples=60)
@given(region=sides, size=st.tuples(st.integers(5, 60), st.integers(5, 60)), seed=st.integers(0, 10**6))
def test_boxes_of_one_size_equal_the_slices(region, size, seed):
    boxes = boxes_of(region, seed)
    torch.testing.assert_close(zoom(images, boxes, size, region), sliced(images, boxes, size), rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(region=st.tuples(st.integers(30, 90), st.integers(30, 120)),
       size=st.tuples(st.integers(8, 60), st.integers(8, 60)), seed=st.integers(0, 10**6))
def test_boxes_of_any_size_equal_the_slices_inside(region, size, seed):
    boxes = boxes_of(region, seed)
    inner = (..., slice(2, -2), slice(2, -2))       # at the edge they look over it, slices do not
    torch.testing.assert_close(zoom(images, boxes, size)[inner], sliced(images, boxes, size)[inner], rtol=0, atol=1e-4)


def test_enlarging_is_plain_bilinear_bit_for_bit():
    boxes = boxes_of((30, 30), 0)
    top, left = boxes[..., 1].long(), boxes[..., 0].long()
    planes = _windows(images, top, left, (30, 30)).reshape(-1, 1, 30, 30)
    plain = F.interpolate(planes, size=(40, 50), mode="bilinear", align_corners=False).view(2, 3, 3, 40, 50)
    assert torch.equal(_zoom_equal(images, boxes, (40, 50), (30, 30)), plain)


def test_stripes_do_not_alias():
    stripes = (torch.arange(120) % 2).float().expand(1, 3, 120, 120)          # one pixel black, one white
    box = torch.tensor([[[0., 0., 120., 120.]]])
    for crop in (zoom(stripes, box, 30, 120), zoom(stripes, box, 30)):
        assert (crop[..., 2:-2] - .5).abs().max() < .05          # grey; plain bilinear reading gives a pattern


@pytest.mark.parametrize("region", [(20, 20), (60, 80)], ids=["enlarged", "reduced"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(region, dtype):
    boxes = boxes_of(region, 1)
    for crops in (zoom(images.to(dtype), boxes, 40, region), zoom(images.to(dtype), boxes, 40)):
        assert crops.dtype == dtype
    rounded, exact = zoom(images.to(dtype), boxes, 40, region), zoom(images, boxes, 40, region)
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=2e-2)


def test_mixed_sizes_in_one_call():
    boxes = torch.tensor([[[0., 0., 20., 20.], [10., 5., 110., 85.]]]).expand(2, 2, 4)
    crops = zoom(images, boxes, 40)
    for k in range(2):
        expected = sliced(images, boxes[:, [k]], (40, 40))
        torch.testing.assert_close(crops[:, [k], :, 2:-2, 2:-2], expected[..., 2:-2, 2:-2], rtol=0, atol=1e-4)


def test_weights_equal_grid_sample_where_enlarged():
    boxes = boxes_of((30, 40), 2) + .3
    weighted, sampled = (f(images, boxes, (64, 64)) for f in (_zoom_weighted, _zoom_any))
    torch.testing.assert_close(weighted, sampled, rtol=0, atol=1e-4)


def test_both_ways_of_cutting_windows():
    boxes = boxes_of((30, 40), 3).long()
    args = images, boxes[..., 1], boxes[..., 0], (30, 40)
    assert torch.equal(_windows(*args), _windows_gather(*args))


def test_refuses_what_does_not_fit_and_takes_no_boxes():
    boxes = boxes_of((30, 30), 0)
    assert zoom(images, boxes[:, :0], 56).shape == (2, 0, 3, 56, 56)
    with pytest.raises(ValueError, match=r"images must be \(B,3,H,W\)"): zoom(images[0], boxes, 56)
    with pytest.raises(ValueError, match=r"boxes must be \(2,m,4\)"): zoom(images, boxes[0], 56)
    with pytest.raises(ValueError, match=r"region_size=500 does not fit images of \(90, 120\)"):
        zoom(images, boxes, 56, 500)


@pytest.mark.parametrize("sizes", [(40, 20), (40, 60), (40,)], ids=["enlarged", "reduced", "any"])
def test_onnx(sizes, tmp_path):
    "The exporter and the runtime know each of the three ways."
    onnxruntime = pytest.importorskip("onnxruntime")
    class Zoomer(torch.nn.Module):
        def forward(self, images, boxes): return zoom(images, boxes, *sizes)
    side = sizes[1] if len(sizes) > 1 else 60
    boxes = boxes_of((side, side), 4)
    torch.onnx.export(Zoomer(), (images, boxes), tmp_path/"zoom.onnx", dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/"zoom.onnx", providers=["CPUExecutionProvider"])
    feed = dict(zip([i.name for i in session.get_inputs()], (images.numpy(), boxes.numpy())))
    crops = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(crops, zoom(images, boxes, *sizes), rtol=0, atol=1e-4)
