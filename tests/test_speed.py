"Locating goes into one graph, the step waits for no device, and options leave nothing behind."
import contextlib
import copy

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import set_seed

from fd_focus.attention import attention_map
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.training.learner import focus_learner
from fd_focus.loss import FocusLoss
from fd_focus.bodies import create_body, toy_resnet
from fd_focus.focus import FocusNet
from fd_focus.methods import METHODS, bare, build_method
from fd_focus.true_class import PassTarget
from fd_focus.regions import propose_from_table, region_grid, suppression_table
from fd_focus.training.optimizer import fused_adamw
from fd_focus.training.speed import (
    CheckpointBody, CompileStep, HalfPrecision, body_segments, peak_memory, speed_up, switch_checkpoints, whole_step)
from fd_focus.zoom import zoom


def treated(learn): return "forward" in vars(bare(learn.model).body) or learn.whole_step is not None


TAKES_THE_STEP = [CheckpointBody, lambda: CompileStep(backend="eager")]


class Locate(torch.nn.Module):
    "Attention, selection and zoom as one module."
    def __init__(self):
        super().__init__()
        self.register_buffer("grid", region_grid(96, 6, 34))
        self.register_buffer("table", suppression_table(self.grid))

    def forward(self, images, features, weight):
        boxes = self.grid[propose_from_table(attention_map(features, weight), self.table, 6)]
        return boxes, zoom(images, boxes, 48, 34)


def inputs(batch):
    generator = torch.Generator().manual_seed(batch)
    images = torch.rand(batch, 3, 96, 96, generator=generator)
    return images, torch.randn(batch, 16, 6, 6, generator=generator), torch.randn(40, 16, generator=generator)


def test_compiles_as_one_graph():
    "fullgraph=True raises where anything would leave the graph: a branch on data, NumPy, a Python object."
    torch._dynamo.reset()
    located = torch.compile(Locate(), fullgraph=True, backend="aot_eager")(*inputs(3))
    for ours, expected in zip(located, Locate()(*inputs(3))):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def small_body():
    layers = [torch.nn.Conv2d(3, 8, 3, 4, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 12, 3, 2, 1)]
    return torch.nn.Sequential(*layers)


def trained_step(name, wrap):
    "Loss, its terms and all gradients of one step in bfloat16, from the same weights and random numbers."
    torch.manual_seed(0)
    net = build_method(name, small_body(), 3, image_size=64).train()
    loss_func, half = FocusLoss(method=net), lambda: torch.autocast("cpu", torch.bfloat16)
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(1)
    with_classes = any(isinstance(cb, PassTarget) for cb in net.callbacks())
    _, loss = wrap(whole_step(net, loss_func, half))((x, y) if with_classes else (x,), (y,))
    loss.backward()
    return loss.detach(), loss_func.terms, [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "racnn"])     # which asks for a gradient midway
def test_a_step_is_one_graph(name):
    "Half precision, network, losses and the way back; it says what the uncompiled step says."
    torch._dynamo.reset()
    ours = trained_step(name, lambda step: torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False))
    expected = trained_step(name, lambda step: step)
    assert ours[1].keys() == expected[1].keys() and len(ours[2]) == len(expected[2]) > 0
    torch.testing.assert_close(ours[0], expected[0], atol=1e-4, rtol=1e-4)
    for a, b in zip(ours[2], expected[2]): torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)   # of eight bits


def test_fullgraph_would_notice():
    def host(x): return x * 2 if x.max().item() > .5 else x
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(host, fullgraph=True, backend="aot_eager")(torch.rand(3))


def test_exports_with_a_free_batch():
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Locate(), inputs(3), dynamic_shapes=({0: batch}, {0: batch}, None))
    for size in (2, 5):
        for ours, expected in zip(program.module()(*inputs(size)), Locate()(*inputs(size))):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


class HostReads(torch.overrides.TorchFunctionMode):
    "Counts what would make the host wait for a device."
    names = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.names: self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_step_reads_nothing_on_the_host(monkeypatch):
    "On a CPU, selection reads the tensor's memory through NumPy, at no wait; the form for devices is taken here."
    import fd_focus.regions as regions
    monkeypatch.setattr(regions, "_numpy_can", lambda scores: False)
    net, loss_func = FocusNet(toy_resnet(), 5, image_size=96).train(), FocusLoss()
    opt = fused_adamw([list(net.parameters())], lr=1e-3)
    x, y = torch.rand(4, 3, 128, 128), torch.tensor([0, 1, 2, 3])             # larger than image_size: boxes are scaled
    with HostReads() as reads:
        loss_func(net(x), y).backward()
    assert reads.seen == []
    opt.step()
    with HostReads() as reads: float(x.sum())
    assert reads.seen                                                        # the counter counts


@pytest.fixture(scope="module")
def dls():
    return FocusDataLoaders.from_toy(images_per_class=8, valid_per_class=3, n_classes=4, image_size=64, bs=16)


@contextlib.contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield


def test_bfloat16_is_left_after_an_error(dls):
    class Break(Callback):
        order = 11
        def after_pred(self): raise RuntimeError("broken")
    class BreakInside(Callback):
        def before_batch(self): self.learn.xb = ()
    for broken, error in ((Break, RuntimeError), (BreakInside, TypeError)):
        learn = focus_learner(dls, "toy_resnet", pretrained=False, cbs=[HalfPrecision("bf16"), broken()])
        with quiet(learn), pytest.raises(error): learn.fit(1, 1e-3)
        assert not torch.is_autocast_enabled("cpu") and "forward" not in vars(learn.model)
        with torch.no_grad(): assert learn.model.eval()(torch.rand(2, 3, 64, 64)).dtype == torch.float32


def test_attention_is_float32_under_bfloat16(dls, monkeypatch):
    import fd_focus.focus as model
    seen, whole = [], model.propose_from_table
    def noted(attention, *args):
        seen.append(attention.dtype)
        return whole(attention, *args)
    monkeypatch.setattr(model, "propose_from_table", noted)
    learn = speed_up(focus_learner(dls, "toy_resnet", pretrained=False), amp="bf16")
    with quiet(learn): learn.fit(1, 1e-3)
    assert seen and set(seen) == {torch.float32}


def test_options_leave_the_body_as_it_was(dls):
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    names, forward = list(learn.model.state_dict()), learn.model.body.forward
    speed_up(learn, checkpointing=True)
    with quiet(learn): learn.fit(1, 1e-3)
    assert learn.model.body.forward == forward and list(learn.model.state_dict()) == names


def test_speed_up_replaces_an_earlier_choice(dls):
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    kinds = lambda: [type(cb).__name__ for cb in learn.cbs]
    speed_up(speed_up(learn, amp="bf16", accumulate=2), amp="bf16")
    assert kinds().count("HalfPrecision") == 1 and "AccumulateGradients" not in kinds()
    speed_up(learn)
    assert "HalfPrecision" not in kinds()
    from fastai.callback.training import GradientAccumulation
    learn.add_cb(GradientAccumulation(32))                       # somebody's own choice
    speed_up(learn, accumulate=3)
    assert "GradientAccumulation" not in kinds() and kinds().count("AccumulateGradients") == 1


@pytest.mark.parametrize("accumulate,ratios", [(3, [1, 3]), (9, [9 / 4]), (2, [1, 1])])
def test_an_epoch_uses_all_its_gradients(accumulate, ratios):
    "Four batches an epoch: a step's gradients are the mean over its pictures, also where it wants more batches."
    four = FocusDataLoaders.from_toy(images_per_class=8, valid_per_class=1, n_classes=4, image_size=64, bs=8)
    found = []
    class Watch(Callback):
        order = 50
        def after_backward(self): self.summed = self.model.image_head.weight.grad.norm().item()
        def before_step(self): found.append(self.model.image_head.weight.grad.norm().item() / self.summed)
    learn = speed_up(focus_learner(four, "toy_resnet", pretrained=False, cbs=[Watch()]), accumulate=accumulate)
    before = learn.model.image_head.weight.detach().clone()
    with quiet(learn): learn.fit(2, 1e-3)
    assert found == pytest.approx(2 * ratios) and not learn.model.image_head.weight.equal(before)


@pytest.mark.parametrize("accumulate,exchanges", [(1, [True] * 4), (2, [False, True] * 2),
                                                  (3, [False, False, True, True])])
def test_gradients_are_exchanged_for_a_step_only(accumulate, exchanges):
    "With several processes; here the attribute of DistributedDataParallel that its `no_sync` sets."
    four = FocusDataLoaders.from_toy(images_per_class=8, valid_per_class=1, n_classes=4, image_size=64, bs=8)
    found = []
    class Watch(Callback):
        def after_pred(self):
            if self.training: found.append(self.model.require_backward_grad_sync)
    learn = speed_up(focus_learner(four, "toy_resnet", pretrained=False, cbs=[Watch()]), accumulate=accumulate)
    learn.model.require_backward_grad_sync = True
    with quiet(learn): learn.fit(2, 1e-3)
    assert found == exchanges * 2


def test_gradients_of_a_stopped_fit_are_forgotten(dls):
    class Stop(Callback):
        order = 100
        def after_batch(self): raise KeyboardInterrupt
    learn = speed_up(focus_learner(dls, "toy_resnet", pretrained=False), accumulate=2)
    with quiet(learn):
        with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-3, cbs=[Stop()])
        assert learn.model.image_head.weight.grad.any()
        class Look(Callback):
            def before_train(self): assert all(p.grad is None or not p.grad.any() for p in self.model.parameters())
        learn.fit(1, 1e-3, cbs=[Look()])


@pytest.mark.parametrize("make", TAKES_THE_STEP, ids=["checkpointing", "compile"])
def test_options_find_the_body_of_a_wrapped_model(dls, tmp_path, monkeypatch, make):
    "Several processes train a network that is wrapped, and it may be wrapped when the callbacks clean up."
    import fd_focus.training.speed as speed
    monkeypatch.setattr(speed, "_need_compiler", lambda device: None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        learn = focus_learner(dls, "toy_resnet", pretrained=False, cbs=[make()])
        body, _ = learn.model.body, learn.create_opt()
        learn.model = torch.nn.parallel.DistributedDataParallel(learn.model, find_unused_parameters=True)
        with quiet(learn): learn.fit(1, 1e-3)
        assert not treated(learn) and learn.model.module.body is body
    finally: torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", TAKES_THE_STEP, ids=["checkpointing", "compile"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, CancelFitException])
def test_a_fit_that_is_broken_off_leaves_the_network_as_it_was(dls, monkeypatch, make, stop):
    "fastai calls no `after_fit` after Ctrl-C or an error."
    import fd_focus.training.checkpoint    # noqa: F401 -- has its own loop over epochs
    import fd_focus.training.speed as speed
    monkeypatch.setattr(speed, "_need_compiler", lambda device: None)
    seen = []
    class Stop(Callback):
        order = 90
        def after_batch(self):
            seen.append(treated(self.learn))
            raise stop("enough")
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    with contextlib.suppress(KeyboardInterrupt, OSError), quiet(learn): learn.fit(1, 1e-3, cbs=[make(), Stop()])
    assert seen == [True]                                        # in mid-fit it was another
    assert not treated(learn)
    with quiet(learn): learn.fit(1, 1e-3)
    assert len(learn.recorder.values) == 1


def test_compile_asks_for_a_compiler_before_training(dls, monkeypatch):
    import fd_focus.training.speed as speed
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)
    learn = focus_learner(dls, "toy_resnet", pretrained=False, cbs=[CompileStep()])
    with quiet(learn), pytest.raises(ValueError, match="install g\\+\\+ or clang\\+\\+"): learn.fit(1, 1e-3)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "squeezenet1_1", "vgg11_bn", "densenet121",
                                  "convnext_tiny"])
def test_segments_are_the_whole_body_in_order(arch):
    body = create_body(arch, pretrained=False)[0]
    units = [unit for segment in body_segments(body) for unit in segment]
    assert sum(len(list(unit.parameters())) for unit in units) == len(list(body.parameters()))
    body.eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, out = body(x.clone()), x.clone()
        for segment in body_segments(body):
            start = out.clone()
            held = out
            for unit in segment: out = unit(out)
            torch.testing.assert_close(held, start)      # from an overwritten border nothing could be computed again
    torch.testing.assert_close(out, expected)


def test_settings_choose_the_options():
    from fd_focus.training.run import make_learner
    from fd_focus.training.settings import Settings
    base = dict(data="toy", arch="toy_resnet", image_size=64, epochs=1, bs=16, images_per_class=4, n_classes=4)
    kinds = lambda **options: {type(cb).__name__ for cb in make_learner(Settings(**base, **options)).cbs}
    assert "ChannelsLast" in kinds()
    chosen = kinds(amp="bf16", checkpointing=True, accumulate=2)
    assert {"HalfPrecision", "CheckpointBody", "AccumulateGradients"} <= chosen
    assert "CompileStep" in kinds(compile="default") and "ChannelsLast" not in kinds(channels_last=False)
    for options, message in ((dict(amp="fp8"), "amp='fp8' is none of"),
                             (dict(accumulate=0), "accumulate=0; use a whole number"),
                             (dict(compile="default", checkpointing=True), "exclude each other")):
        with pytest.raises(ValueError, match=message): make_learner(Settings(**base, **options))


@pytest.mark.parametrize("options", [dict(checkpointing=True), dict(compile="default")], ids=str)
def test_both_bodies_are_treated(dls, monkeypatch, options):
    "With crop_norm='separate' a second body sees the crops; it shares the parameters, and has statistics of its own."
    import fd_focus.training.speed as speed
    monkeypatch.setattr(speed, "_need_compiler", lambda device: None)
    seen = []
    class Watch(Callback):
        order = 90
        def after_batch(self):
            if self.training:
                seen.append(["forward" in vars(body) for body in self.model.bodies])
    ends = []
    for chosen in ({}, options):
        set_seed(0, reproducible=True)
        dls.train.rng.seed(0)
        learn = focus_learner(dls, "toy_resnet", pretrained=False, crop_norm="separate", cbs=[Watch()])
        speed_up(learn, **chosen)
        for cb in learn.cbs:
            if isinstance(cb, CompileStep): cb.kwargs["backend"] = "eager"
        with quiet(learn): learn.fit(1, 1e-3)
        ends.append(learn.model.state_dict())
    assert seen[0] == [False, False] and seen[-1] == 2 * ["checkpointing" in options]
    for name, tensor in ends[0].items(): torch.testing.assert_close(tensor, ends[1][name], atol=1e-4, rtol=0)


VITS = dict(vit_tiny_patch16_224=dict(depth=3), swin_tiny_patch4_window7_224=dict(embed_dim=24, depths=(2, 2),
            num_heads=(2, 2), window_size=4), convnext_atto=dict(depths=(2, 2, 1, 1), dims=(16, 24, 32, 48)))

@pytest.mark.parametrize("arch", VITS)
def test_a_transformer_keeps_its_own_borders(arch):
    "The same losses and gradients in less memory, dropped paths too; afterwards it is as it was."
    pytest.importorskip("timm")
    dls = FocusDataLoaders.from_toy(4, 2, n_classes=2, image_size=64, bs=4)
    ends, body = [], create_body(arch, pretrained=False, drop_path_rate=.2, **VITS[arch])[0]
    for checkpointing in (False, True):
        set_seed(0, reproducible=True)
        dls.train.rng.seed(0)
        learn = focus_learner(dls, copy.deepcopy(body), "plain")
        speed_up(learn, checkpointing=checkpointing)
        with quiet(learn): learn.fit(1, 1e-3)
        assert "forward" not in vars(learn.model.body)
        assert not any(getattr(module, "grad_checkpointing", False) for module in learn.model.body.modules())
        ends.append(learn.model.state_dict())
    for name, tensor in ends[0].items(): torch.testing.assert_close(tensor, ends[1][name], atol=1e-4, rtol=0)
    def needs(on):
        assert switch_checkpoints(body, on)
        return peak_memory(lambda: body(torch.rand(8, 3, 128, 128)).square().mean().backward())
    assert needs(True) < .8 * needs(False)


def test_half_precision_wants_our_learner(dls):
    from fastai.learner import Learner
    learn = Learner(dls, FocusNet(toy_resnet(), 4, image_size=64), loss_func=FocusLoss(), cbs=[HalfPrecision("bf16")])
    with quiet(learn), pytest.raises(TypeError, match="HalfPrecision is for a FocusLearner"): learn.fit(1)
