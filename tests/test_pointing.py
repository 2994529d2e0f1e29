"Other ways of pointing: against the network's own, and Grad-CAM as its authors define it."
import numpy as np
import pytest
import torch

from fd_focus.bodies import toy_resnet
from fd_focus.evidence.controls import RandomRegionsNet
from fd_focus.evidence.localisation import localisation
from fd_focus.evidence.pointing import cam, point_with
from fd_focus.focus import FocusNet
from fd_focus.methods import PlainNet
from fd_focus.regions import region_grid
from fd_focus.training.learner import focus_learner


def grad_cam(net, x, target):
    "Selvaraju et al. 2017, with hooks on the body, as for a network of which nothing is known."
    kept = {}
    hook = net.body.register_forward_hook(lambda module, args, output: kept.update(maps=output))
    try:
        with torch.enable_grad():
            for p in net.parameters(): p.requires_grad_()
            logits = net(x)
            logits = logits[torch.arange(len(x)), target].sum()
            gradient, = torch.autograd.grad(logits, kept["maps"])
    finally: hook.remove()
    return (gradient.mean((2, 3), keepdim=True) * kept["maps"]).sum(1).detach().relu()


@pytest.mark.parametrize("size", [64, 96, (64, 96)])
def test_grad_cam_is_the_cam_of_the_class(size):
    torch.manual_seed(0)
    net = PlainNet(toy_resnet(), 5, image_size=size).eval()
    x = torch.rand(4, 3, *net.image_size)
    h, w = net.map_size
    published, ours = grad_cam(net, x, net(x).argmax(1)) * h * w, cam(net, x, single=True, sigma=0)
    assert torch.allclose(published, ours.relu(), atol=1e-5) and published.amax() > 0
    positive = published.flatten(1).amax(1) > 0
    assert torch.equal(published.flatten(1).argmax(1)[positive], ours.flatten(1).argmax(1)[positive])
    other = (net(x).argmax(1) + 1) % 5                                    # and not that of any class
    assert not torch.allclose(grad_cam(net, x, other) * h * w, ours.relu(), atol=1e-3)


@pytest.mark.parametrize("side", [96, 160])
@pytest.mark.parametrize("attention", ["max", "single"])
def test_the_networks_own_map_and_regions(attention, side):
    torch.manual_seed(0)
    net = FocusNet(toy_resnet(), 5, image_size=96, region_size=48, attention=attention, m=5).eval()
    x = torch.rand(4, 3, side, side)
    with torch.no_grad(): own = net.examine(x)
    look = point_with(lambda net, x: cam(net, x, attention == "single"), m=5)(net, x)
    assert torch.allclose(look.attention, own.attention, atol=1e-5) and torch.allclose(look.boxes, own.boxes, atol=1e-3)


def test_any_network_can_be_measured(learn):
    "Plain ones, which have no regions of their own, and those that look at random."
    for method in ("plain", RandomRegionsNet):
        other = focus_learner(learn.dls, "toy_resnet", pretrained=False, method=method)
        was = other.model.training
        found = localisation(other, look=point_with(cam, .4, m=3))
        assert "part hit rate at 3" in found.index and "part hit rate at 4" not in found.index
        assert found.notna().all(axis=None) and other.model.training == was
        again = localisation(other, look=point_with(cam, .4, m=3))
        assert again.equals(found)                                       # nothing of chance in the map


def test_localisation_of_the_own_map_is_localisation(learn):
    net = learn.model
    share = net.region_size[0] / net.image_size[0]
    found, own = localisation(learn, look=point_with(cam, share, net.m)), localisation(learn)
    assert np.allclose(found.loc[own.index], own, atol=1e-5)


def test_regions_that_do_not_fit():
    net = PlainNet(toy_resnet(), 3, image_size=64).eval()
    with pytest.raises(ValueError, match="region_size="): point_with(cam, region=1.5)(net, torch.rand(1, 3, 64, 64))
    look = point_with(cam, region=.25, m=2)(net, torch.rand(2, 3, 64, 64))
    grid = region_grid(64, net.map_size, 16)
    assert all((grid == box).all(1).any() for box in look.boxes.flatten(0, 1)) and look.answer.shape == (2, 0)
