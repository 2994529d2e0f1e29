"The attention map: what is refused, and properties that hold for any features."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fd_focus.attention import _max_cam, attention_map, class_activation_maps, draw_attention, draw_image, smooth

Z, W = torch.rand(2, 8, 5, 7), torch.randn(4, 8)


def test_refuses_what_cannot_be_meant():
    with pytest.raises(ValueError, match=r"must be \(B,n,h,w\)"): class_activation_maps(Z[0], W)
    with pytest.raises(ValueError, match=r"weight must be \(C,n\)"): class_activation_maps(Z, W[0])
    with pytest.raises(ValueError, match="weight expects 3"): attention_map(Z, W[:, :3])
    with pytest.raises(ValueError, match="one class an image"): attention_map(Z, W, target=torch.tensor([1]))
    with pytest.raises(ValueError, match="sigma=-1.0 is negative"): attention_map(Z, W, sigma=-1.)


@settings(deadline=None, max_examples=50)
@given(classes=st.integers(1, 40), channels=st.integers(1, 24), h=st.integers(1, 6), w=st.integers(1, 6),
       seed=st.integers(0, 10**6))
def test_maximum_in_blocks_is_the_maximum(classes, channels, h, w, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(2, channels, h, w, generator=generator)
    weight = torch.randn(classes, channels, generator=generator)
    expected = class_activation_maps(features, weight).amax(1)
    torch.testing.assert_close(_max_cam(features, weight), expected, rtol=1e-4, atol=1e-5)  # another order of sums


@settings(deadline=None, max_examples=50)
@given(h=st.integers(1, 9), w=st.integers(1, 9), sigma=st.floats(.05, 5), value=st.floats(-3, 3))
def test_smoothing_keeps_a_constant_map(h, w, sigma, value):
    constant = torch.full((1, h, w), value)
    torch.testing.assert_close(smooth(constant, sigma), constant, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_from_rounded_features(dtype):
    rounded = Z.to(dtype)
    assert torch.equal(attention_map(rounded, W), attention_map(rounded.float(), W))


def test_no_gradient_reaches_features_or_weight():
    assert not attention_map(Z.clone().requires_grad_(), W.clone().requires_grad_()).requires_grad


def test_drawing_uses_the_pictures_pixels():
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2)
    picture = torch.rand(3, 20, 30)
    assert draw_image(left, picture, "title") is left and left.get_title() == "title"
    shown = draw_attention(right, picture, torch.rand(2, 3).half())
    assert left.get_xlim() == right.get_xlim() == (0, 30) and left.get_ylim() == right.get_ylim() == (20, 0)
    assert shown.get_array().shape == (2, 3)
    plt.close(fig)
