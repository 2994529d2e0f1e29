"What the method promises about cost, and that it stays one graph."
import torch

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
