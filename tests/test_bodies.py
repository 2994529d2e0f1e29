"Bodies by name, and weights from files."
import pytest
import torch

from fd_focus.bodies import create_body, feature_shape
from fd_focus.focus import FocusNet


CHANNELS = dict(resnet18=512, mobilenet_v2=1280, efficientnet_b0=1280, convnext_tiny=768, regnet_y_400mf=440,
                shufflenet_v2_x0_5=1024, vgg11_bn=512, swin_t=768, mnasnet0_5=1280, densenet121=1024, resnet10t=512,
                mobilenetv3_small_050=1024)


@pytest.mark.parametrize("arch,channels", CHANNELS.items())
def test_bodies(arch, channels):
    body, (mean, std) = create_body(arch, pretrained=False)
    n, h, w = feature_shape(body, (128, 128))
    assert n == channels and h == w == 4 and len(mean) == len(std) == 3


@pytest.mark.parametrize("arch,file,cut,channels", [("mobilenet_v2", "mobilenet_v2_imagenet_features.pth", None, 1280),
                                                    ("resnet18", "resnet18_imagenet_to_layer3.pth", "layer3", 256)])
def test_real_weights(data, arch, file, cut, channels):
    body, _ = create_body(arch, weights=data / "weights" / file, cut=cut)
    state = torch.load(data / "weights" / file, weights_only=True)
    name, weight = next((n, w) for n, w in state.items() if w.ndim == 4)
    assert torch.equal(next(p for p in body.parameters() if p.ndim == 4), weight.float())
    assert feature_shape(body, (224, 224))[0] == channels


def test_weights_beyond_the_file(data):
    with pytest.raises(ValueError, match="missing: layer4.0"):
        create_body("resnet18", weights=data / "weights" / "resnet18_imagenet_to_layer3.pth")


@pytest.mark.parametrize("arch,size,shape", [("googlenet", 224, (1024, 7, 7)), ("inception_v3", 299, (2048, 8, 8))])
def test_auxiliary_classifiers_lie_aside(arch, size, shape):
    """The body ends at the pooling, not where training from scratch has a second classifier; inputs are normalised as
    these weights want."""
    body, (mean, std) = create_body(arch, pretrained=False)
    assert feature_shape(body, (size, size)) == shape and mean == std == (.5, .5, .5)


def test_a_body_that_is_no_row_of_layers_is_refused():
    with pytest.raises(ValueError, match="another architecture: a body is layers in a row"):
        FocusNet.from_arch("vit_b_32", 3, pretrained=False, image_size=64)
