"Bodies by name, and weights from files."
import copy
import json

import pytest
import torch
import torchvision

from fd_focus.bodies import BodySource, create_body, feature_shape, nearest_size
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.focus import FocusNet
from fd_focus.methods import METHODS, PlainNet, build_method
from fd_focus.regions import draw_regions
from fd_focus.tokens import TokenMaps, read_hub
from fd_focus.training.layers import body_layers, layer_rates, layers_and_heads
from fd_focus.training.learner import focus_learner
from fd_focus.use.model_folder import load_focus, save_focus

timm = pytest.importorskip("timm")

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


# A small one of every family, with random weights

FAMILIES = {   # family: arch, arguments, image_size (whose half is zoom_size), channels, side of the map
    "ResNet": ("resnet18", {}, 64, 512, 2),
    "MobileNetV3": ("mobilenetv3_small_050", {}, 64, 1024, 2),
    "EfficientNet": ("test_efficientnet", {}, 64, 256, 2),
    "RegNet": ("regnety_002", {}, 64, 368, 2),
    "ConvNeXt": ("test_convnext", {}, 64, 64, 2),
    "Swin": ("swin_tiny_patch4_window7_224", dict(embed_dim=24, depths=(1, 1, 1, 1)), 96, 192, 3),
    "ViT": ("vit_tiny_patch16_224", dict(depth=2), 64, 192, 4),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", dict(depth=2), 84, 384, 6),
    "EVA-02": ("eva02_tiny_patch14_224", dict(depth=2), 84, 192, 6),
    "MaxViT": ("maxvit_tiny_tf_224", dict(stem_width=16, embed_dim=(32, 32, 32, 64), depths=(1,) * 4), 224, 512, 7),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def make(family, **options):
    "A network of the method, and the side of its images."
    arch, kwargs, size, *_ = FAMILIES[family]
    return FocusNet.from_arch(arch, 3, False, arch_kwargs=kwargs, image_size=size, m=3, l=2, **options), size


@each_family
def test_every_family_looks_trains_and_is_saved(family, tmp_path):
    "Maps, a look, a training step that reaches every weight, and a model folder that answers the same."
    arch, kwargs, size, channels, side = FAMILIES[family]
    torch.manual_seed(0)
    body, _ = create_body(arch, False, **kwargs)
    assert feature_shape(body, (size, size)) == (channels, side, side)
    dls = FocusDataLoaders.from_toy(2, 1, image_size=size, n_classes=3, bs=2)
    learn = focus_learner(dls, body, image_size=size, preset=None, m=2, l=1, answer="ensemble")
    x, y = (batch.as_subclass(torch.Tensor) for batch in next(iter(dls.train)))
    losses = learn.model.losses(learn.model.train()(x), y, torch.nn.functional.cross_entropy)
    sum(losses.values()).backward()
    assert not [name for name, p in learn.model.named_parameters() if p.grad is None]
    before = copy.deepcopy(learn.model.state_dict())
    learn.model.zero_grad()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert any(not torch.equal(old, new) for old, new in zip(before.values(), learn.model.state_dict().values()))
    with torch.no_grad(): look = learn.model.eval().look(x)
    assert look.answer.shape == (2, 3) and look.attention.shape == (2, side, side) and look.answer.isfinite().all()
    net = load_focus(save_focus(learn, tmp_path / "model"))
    assert net.about["arch"] == arch and net.about["arch_kwargs"] == {
        name: list(v) if isinstance(v, tuple) else v for name, v in kwargs.items()}
    with torch.no_grad(): torch.testing.assert_close(net.look(x).answer, look.answer)


@pytest.mark.parametrize("family", ["ViT", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
                                             if name != "ViT")])
def test_every_family_as_onnx(family, tmp_path):
    from fd_focus.use.export import check_parity, export_model, run_exported
    torch.manual_seed(0)
    net, size = make(family, answer="ensemble")
    net.classes, net.stats = list("abc"), ([.5] * 3, [.5] * 3)
    file = export_model(net.eval(), tmp_path / "model.onnx")
    assert (parity := check_parity(net, run_exported(file), torch.rand(4, 3, size, size))).ok, parity


def test_names_of_weights_stay():
    "A model folder of yesterday must fit."
    first = {"resnet18": "conv1.weight", "mobilenet_v2": "0.0.weight", "densenet121": "conv0.weight",
             "googlenet": "conv1.conv.weight", "resnet10t": "all.conv1.0.weight", "test_convnext": "all.stem.0.weight",
             "swin_tiny_patch4_window7_224": "all.patch_embed.proj.weight", "toy_resnet": "conv1.weight"}
    assert {arch: next(iter(create_body(arch, False)[0].state_dict())) for arch in first} == first


def test_the_trial_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    whole = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    after = torch.rand(1)
    torch.manual_seed(0)
    body, _ = create_body("vit_tiny_patch16_224", False, depth=2)
    assert torch.equal(body.all.patch_embed.proj.weight, whole.patch_embed.proj.weight)
    assert torch.equal(torch.rand(1), after)


def test_a_late_normalisation_comes_before_the_maps():
    "EVA-02 averages its tokens, then normalises: its maps would be wild without."
    body, _ = create_body("eva02_tiny_patch14_224", False, depth=2)
    assert body.late_norm
    with torch.no_grad(): maps = body(10 * torch.rand(1, 3, 56, 56))
    torch.testing.assert_close(maps.std(1, correction=0), torch.ones(1, 4, 4), rtol=1e-3, atol=0)


@each_family
def test_every_layer_is_in_one_group(family):
    "For a learning rate of its own: all parameters once, in several layers, the stem in the first."
    arch, kwargs, *_ = FAMILIES[family]
    with torch.device("meta"): body = create_body(arch, False, **kwargs)[0]
    layers = body_layers(body)
    assert len(layers) > 2 and all(layers)
    assert sorted(id(p) for layer in layers for p in layer) == sorted(map(id, body.parameters()))
    assert any(p is next(body.parameters()) for p in layers[0])


def test_several_bodies_and_wrappers_are_grouped_too():
    "Bodies that share their parameters, and one that is compiled; the heads are the last group."
    body, _ = create_body("toy_resnet", False)
    net = FocusNet(body, 3, 96, crop_norm="separate")
    groups = layers_and_heads(net)
    assert [len(group) for group in groups] == [3, 6, 9, 9, 6]
    assert sorted(id(p) for group in groups for p in group) == sorted(map(id, net.parameters()))
    with pytest.raises(ValueError, match="decay=0; use 1 for none, or less"): layer_rates(3, .1, decay=0)


# Sizes

@pytest.mark.parametrize("arch,kwargs,size,message", [
    ("vit_small_patch14_reg4_dinov2", dict(depth=1), (440, 224), "440x224 pixels; 434x224 or 448x224 would do"),
    ("vit_tiny_patch16_224", dict(depth=1), (230, 230), "230x230 pixels; 224x224 or 240x240 would do"),
    ("test_maxvit", {}, (224, 224), "160x160 or 320x320 would do"),
    ("test_vit_relpos", {}, (320, 320), "320x320 pixels; 160x160 is all it takes.* such as vit_small_patch14"),
    ("beit_base_patch16_224", dict(depth=1), (448, 448), "224x224 is all it takes.* such as vit_small_patch14"),
    ("hiera_tiny_224", {}, (448, 448), "224x224 is all it takes"),
])
def test_a_wrong_size_gets_the_right_ones(arch, kwargs, size, message):
    with torch.device("meta"): body = create_body(arch, False, **kwargs)[0]
    with pytest.raises(ValueError, match=message): feature_shape(body, size)


def test_a_body_that_takes_nothing():
    class Stubborn(torch.nn.Module):
        def forward(self, x): raise AssertionError("no")
    with pytest.raises(ValueError, match="use a larger image_size, or the one it was made for, or another arch.*(no)"):
        feature_shape(Stubborn(), (64, 64))


def test_a_body_of_one_size_can_be_used_at_it():
    for arch, kwargs in (("beit_base_patch16_224", dict(depth=1)), ("hiera_tiny_224", {})):
        with torch.device("meta"): body = create_body(arch, False, **kwargs)[0]
        assert feature_shape(body, (224, 224))[0] == 768
    assert feature_shape(create_body("beit_base_patch16_224", False, depth=1, img_size=96)[0], (96, 96)) == (768, 6, 6)


def test_defaults_fit_the_patches():
    "Half of 420 is 15 patches of 14; half of 448 is 16; half of 434 is 15.5, and 210 the next."
    body, _ = create_body("vit_small_patch14_reg4_dinov2", False, depth=1, embed_dim=96, num_heads=2)
    assert [FocusNet(body, 3, size).zoom_size[0] for size in (420, 448, 434)] == [210, 224, 210]
    with pytest.raises(ValueError, match="280x280 or 294x294 would do: give it as image_size, or as zoom_size"):
        FocusNet(body, 3, 448, zoom_size=290)
    assert nearest_size(body.train(), (160, 100)) == (154, 98) and body.training and body.all.blocks[0].training


@pytest.mark.parametrize("arch,instead", [("vit_b_32", "vit_base_patch32_224"), ("vit_h_14", "vit_huge_patch14_224")])
def test_transformers_of_torchvision(arch, instead):
    with pytest.raises(ValueError, match=f"takes pictures of one size.*use {instead}"):
        FocusNet.from_arch(arch, 3, pretrained=False, image_size=64)
    assert timm.is_model(instead)


# Finer maps

def dino(image_size=448, **options):
    torch.manual_seed(0)
    kwargs = dict(depth=1, embed_dim=32, num_heads=2)
    return FocusNet(create_body("vit_small_patch14_reg4_dinov2", False, **kwargs)[0], 3, image_size, **options)


def test_a_map_of_32_by_32():
    "Eq. 2, boxes and pictures on a thousand cells; smoothing and suppression as wide in pixels as on the paper's map."
    net = dino(answer="ensemble").eval()
    assert net.map_size == (32, 32) and net.suppresses.numel() == 1024 ** 2 and net.suppresses.dtype == torch.bool
    assert net.sigma * 448 / 32 == pytest.approx(32)
    coarse = FocusNet.from_arch("resnet18", 3, False, image_size=448)
    assert coarse.map_size == (14, 14) and coarse.sigma == 1 and coarse.region_size == net.region_size == (160, 160)
    x = torch.rand(2, 3, 448, 448)
    with torch.no_grad():
        maps, look = net.body(x), net.examine(x)
        cams = torch.einsum("bnhw,cn->bchw", maps, net.image_head.weight)
        torch.testing.assert_close(cams.mean((2, 3)) + net.image_head.bias, look.heads["image"], rtol=1e-4, atol=1e-4)
    rows = torch.exp(-.5 * ((torch.arange(32)[:, None] - torch.arange(32)) * 14 / 32) ** 2)     # cells of 14 pixels
    rows = rows / rows.sum(1, keepdim=True)
    torch.testing.assert_close(look.attention, rows @ cams.amax(1) @ rows.T, rtol=1e-4, atol=1e-4)
    for boxes in look.boxes:
        assert (boxes >= 0).all() and (boxes <= 448).all() and len(boxes) == 6
        assert torchvision.ops.box_iou(boxes[:4], boxes[:4]).fill_diagonal_(0).max() <= .25
    from matplotlib.figure import Figure
    axes = Figure().subplots()
    draw_regions(axes, x[0], look.boxes[0])
    assert len(axes.patches) == 4


def test_a_map_that_is_too_fine_is_refused():
    with pytest.raises(ValueError, match="map has 4096 cells, and 3600 is the most.*larger patches"): dino(896)


def test_old_folders_keep_their_smoothing():
    assert dino(sigma=1.).config()["sigma"] == 1 and dino().config()["sigma"] == pytest.approx(32 / 14)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_takes_tokens(method):
    body, _ = create_body("vit_tiny_patch16_224", False, depth=1, embed_dim=48, num_heads=3)
    net = build_method(method, body, 3, image_size=128).eval()
    with torch.no_grad(): assert net.look(torch.rand(2, 3, 128, 128)).answer.isfinite().all()


# The Hugging Face hub

def test_a_model_of_the_hub(monkeypatch, tmp_path):
    "Its address stands for an architecture, arguments and weights; a model folder records the first two."
    asked = []
    def load(address, cache_dir=None):
        asked.append(address)
        config = dict(timm.get_pretrained_cfg("resnet18").to_dict(), mean=(.1, .2, .3), hf_hub_id=address)
        return (config, "resnet18", {}) if "plain" in address else (config, "vit_tiny_patch16_224", dict(depth=1))
    monkeypatch.setattr(timm.models, "load_model_config_from_hf", load)
    for name in ("hf-hub:me/vit@v1", "hf_hub:me/vit", "timm/vit"):
        body, (mean, _) = create_body(name, False, num_heads=2)
        assert body.source.arch == "vit_tiny_patch16_224" and mean == (.1, .2, .3)
        assert body.source.arch_kwargs == dict(depth=1, num_heads=2) and isinstance(body, TokenMaps)
    assert asked == ["me/vit@v1", "me/vit", "timm/vit"]
    body, _ = create_body("timm/plain", False)                      # torchvision has a resnet18 of its own
    again, _ = create_body(body.source.arch, False, **body.source.arch_kwargs)
    assert list(again.state_dict()) == list(body.state_dict()) and "all.conv1.weight" in body.state_dict()
    dls = FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2)
    folder = save_focus(focus_learner(dls, "timm/vit", "plain", pretrained=False), tmp_path / "model")
    monkeypatch.setattr(timm.models, "load_model_config_from_hf", lambda *_: 1 / 0)
    assert isinstance(load_focus(folder).body, TokenMaps)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(arch="timm/vit")))
    with pytest.raises(ValueError, match="arch='timm/vit' is no model .* but an address"): load_focus(folder)


def test_without_the_hub(monkeypatch):
    def offline(*args, **kwargs): raise OSError("no network\nand more")
    monkeypatch.setattr(timm.models, "load_model_config_from_hf", offline)
    with pytest.raises(ValueError, match=r"'timm/vit': the Hugging Face hub did not give it \(no network\); look for"):
        create_body("timm/vit")
    assert read_hub("resnet18.a1_in1k") == ("resnet18.a1_in1k", {}, None)


def test_cuts_of_timm():
    "By number or by name of the layers that timm lists; what comes after is not kept."
    body, _ = create_body("vit_tiny_patch16_224", False, cut=-1, depth=3)
    assert len(body.all.blocks) == 2
    assert body.source == BodySource("vit_tiny_patch16_224", -1, dict(depth=3), (.5,) * 3, (.5,) * 3)
    assert feature_shape(create_body("resnet10t", False, cut="layer2")[0], (64, 64)) == (128, 8, 8)
    with pytest.raises(ValueError, match="cut='layer9' is none of the body's layers: act1, layer1"):
        create_body("resnet10t", False, cut="layer9")


def test_wrong_arguments():
    with pytest.raises(ValueError, match="cannot be made with {'telescope': 3}: .*telescope"):
        create_body("vit_tiny_patch16_224", False, telescope=3)


def test_weights_of_a_transformer_from_a_file(tmp_path):
    "timm's own file fits, its classifier is let go, its late normalisation is not."
    whole = timm.create_model("eva02_tiny_patch14_224", depth=1)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    body, _ = create_body("eva02_tiny_patch14_224", weights=tmp_path / "w.pth", depth=1)
    assert torch.equal(body.all.fc_norm.weight, whole.fc_norm.weight)
    assert torch.equal(body.all.blocks[0].mlp.fc2.weight, whole.blocks[0].mlp.fc2.weight)
    assert PlainNet(body, 3, 56).map_size == (4, 4)
