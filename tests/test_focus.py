"What the method promises about cost, and that it stays one graph."
import pytest
import torch

from fd_focus.bodies import create_body
from fd_focus.focus import FocusNet


def test_prediction_looks_at_fewer_regions():
    net = FocusNet.from_arch("toy_resnet", 3, pretrained=False, image_size=64)
    seen = []
    net.body.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    with torch.no_grad():
        net.train()(torch.rand(2, 3, 64, 64))
        net.eval()(torch.rand(2, 3, 64, 64))
    assert seen == [2, 12, 2, 8]


def test_one_graph_without_host_waits():
    "torch.compile with fullgraph proves that nothing leaves the graph."
    net = FocusNet.from_arch("toy_resnet", 3, pretrained=False, image_size=64).eval()
    x = torch.rand(2, 3, 64, 64)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad(): assert torch.allclose(compiled(x), net(x), atol=1e-5)


def test_crops_with_statistics_of_their_own():
    "Training outputs are the same to the last bit; afterwards each set of statistics holds its own pictures'."
    def normed(): return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.BatchNorm2d(8))
    x, nets = torch.rand(4, 3, 224, 224), {}
    for crop_norm in ("batch", "separate"):
        torch.manual_seed(1)
        nets[crop_norm] = FocusNet(normed(), 3, image_size=224, crop_norm=crop_norm).train()
    outputs = {name: net(x) for name, net in nets.items()}
    for name in outputs["batch"]: assert torch.equal(outputs["batch"][name], outputs["separate"][name])
    torch.manual_seed(1)
    alone = normed().train()
    alone(x)
    own, both = nets["separate"], nets["batch"]
    assert torch.equal(own.body[1].running_mean, alone[1].running_mean)
    assert not torch.equal(own.crop_body[1].running_mean, own.body[1].running_mean)
    assert not torch.equal(both.body[1].running_mean, own.body[1].running_mean)
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in both.parameters())


def test_exports_with_a_free_batch():
    "No shape depends on data in eval mode."
    net, x = FocusNet.from_arch("toy_resnet", 5, pretrained=False, image_size=96).eval(), torch.rand(3, 3, 96, 96)
    free = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(net, (x,), dynamic_shapes=free)
    with torch.no_grad(): assert torch.allclose(program.module()(x[:2]), net(x[:2]), atol=1e-4)


@pytest.mark.parametrize("options,message", [
    (dict(m=2, l=3), "l=3 regions are to be used of m=2"), (dict(m=400, l=4), "m=400 regions, but the body's map"),
    (dict(attention="mean"), "attention='mean' is none of"), (dict(fusion="sum"), "fusion='sum' is none of"),
    (dict(answer="region"), "answer='region' is none of"), (dict(crop_norm="none"), "crop_norm='none' is none of"),
    (dict(region_size=97), r"region_size=\(97, 97\) does not fit")])
def test_faults(options, message):
    with pytest.raises(ValueError, match=message):
        FocusNet.from_arch("toy_resnet", 3, pretrained=False, image_size=96, **options)


def test_a_picture_smaller_than_the_first_look_is_refused():
    net = FocusNet.from_arch("toy_resnet", 3, pretrained=False, image_size=96).eval()
    with pytest.raises(ValueError, match=r"images of \(64, 96\) pixels are smaller than image_size=\(96, 96\)"):
        net(torch.rand(1, 3, 64, 96))


def test_two_threads_use_one_network():
    "Crops with batch-norm statistics of their own: nothing in the network is switched while it answers."
    from concurrent.futures import ThreadPoolExecutor
    body, _ = create_body("toy_resnet", pretrained=False, cut="layer2")
    net = FocusNet(body, 4, image_size=64, crop_norm="separate", answer="ensemble").train()
    torch.manual_seed(0)
    pictures = torch.rand(6, 3, 64, 64)
    with torch.no_grad():
        net(pictures)                                   # the two sets of statistics differ now
        net.eval()
        alone = [net(picture[None]) for picture in pictures]
        with ThreadPoolExecutor(2) as pool: together = list(pool.map(lambda k: net(pictures[k % 6, None]), range(60)))
    assert all(torch.allclose(answer, alone[k % 6], atol=1e-5) for k, answer in enumerate(together))
