"Localisation metrics: properties, and independent references."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from fd_focus.bodies import toy_resnet
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.evidence.localisation import (BIRD_GROUPS, BoxRecall, ObjectCoverage, PartHitRate, PointingGame,
                                            box_recall, chance_look, group_hit, localisation, localisation_metrics,
                                            object_coverage, part_hit_rate, pointing_game)
from fd_focus.focus import FocusNet
from fd_focus.methods import Look, Method
from fd_focus.training.learner import focus_learner


def random_boxes(generator, *shape, side=100):
    corner = torch.rand(*shape, 2, generator=generator) * side * .7
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2, generator=generator) * side * .3], -1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 7))
def test_metrics_against_loops(seed, images, m):
    "Each metric against its definition, image by image and k by k."
    g = torch.Generator().manual_seed(seed)
    regions, boxes = random_boxes(g, images, m), random_boxes(g, images)
    parts = torch.rand(images, 4, 2, generator=g) * 100
    visible, attention = torch.rand(images, 4, generator=g) < .6, torch.rand(images, 5, 7, generator=g)
    hits, recall = part_hit_rate(regions, parts, visible), box_recall(regions, boxes, .2)
    group = group_hit(regions, parts, visible)
    coverage = object_coverage(regions, boxes)
    pointed = pointing_game(attention, boxes, (100, 140))
    for i in range(images):
        row, column = np.unravel_index(attention[i].argmax(), (5, 7))
        x, y = (column + .5) * 20, (row + .5) * 20
        assert pointed[i] == bool(boxes[i, 0] <= x <= boxes[i, 2] and boxes[i, 1] <= y <= boxes[i, 3])
        for k in range(1, m + 1):
            inside = [any(r[0] <= px <= r[2] and r[1] <= py <= r[3] for r in regions[i, :k].tolist())
                      for px, py in parts[i].tolist()]
            shown = [h for h, v in zip(inside, visible[i]) if v]
            if shown: assert math.isclose(hits[i, k - 1], sum(shown) / len(shown), abs_tol=1e-6)
            else: assert hits[i, k - 1].isnan()
            assert group[i, k - 1] == any(shown) if shown else group[i, k - 1].isnan()
            assert recall[i, k - 1] == (box_iou(regions[i, :k], boxes[i:i + 1]).max() >= .2)
    assert (coverage.diff(dim=1) >= -1e-6).all() and (coverage >= 0).all() and (coverage <= 1 + 1e-6).all()
    # By inclusion and exclusion of two regions.
    if m >= 2:
        area = lambda b: (b[:, 2:] - b[:, :2]).clamp_min(0).prod(1)
        meet = lambda a, b: torch.cat([torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])], 1)
        first, second = meet(regions[:, 0], boxes), meet(regions[:, 1], boxes)
        both = torch.where((area(first) > 0) & (area(second) > 0), area(meet(first, second)), 0)
        assert torch.allclose(coverage[:, 1], (area(first) + area(second) - both) / area(boxes), atol=1e-4)


def test_whole_and_nothing():
    everything, box = torch.tensor([[[0., 0., 100., 100.]]]), torch.tensor([[10., 10., 50., 50.]])
    assert object_coverage(everything, box).item() == 1
    assert part_hit_rate(everything, torch.rand(1, 5, 2) * 100).item() == 1
    assert not box_recall(everything, box).item() and box_recall(box[None], box).item()
    assert object_coverage(torch.tensor([[[60., 60., 70., 70.]]]), box).item() == 0


def test_metrics_of_a_learner_agree_with_functions(learn):
    found = localisation(learn)
    shares = found.drop(columns="n")
    assert found.notna().all(axis=None) and (shares >= 0).all(axis=None) and (shares <= 1).all(axis=None)
    assert (found.n == 12).all()
    old, learn.metrics = learn.metrics, localisation_metrics(learn.dls, k=3)
    names = [metric.name for metric in learn.metrics]
    kinds = ("pointing_game", "part_hit_rate_3", "object_coverage_3", "box_recall_3")
    assert names == [kind + chance for kind in kinds for chance in ("", "_chance")]
    with learn.no_bar(): first, second = learn.validate()[1:], learn.validate()[1:]
    learn.metrics = old
    assert first == second                                    # chance too is the same in every epoch
    for name, key in (("pointing_game", "pointing game, object"), ("part_hit_rate_3", "part hit rate at 3"),
                      ("object_coverage_3", "object coverage at 3"), ("box_recall_3", "box recall at 3")):
        assert math.isclose(first[names.index(name)], found.value[key], abs_tol=1e-5), name


def test_pictures_without_truth_count_neither_way(learn):
    "Hidden parts and missing boxes leave means over the others, not NaN and not zero."
    dls = learn.dls
    items = list(dls.valid_ds.items)
    full, table = localisation(learn), dls.table
    try:
        dls.table = table.copy()
        dls.table["visible"] = [np.ones(6, bool)] * len(table)
        for item in items[:6]:
            dls.table.at[str(item), "box"] = np.full(4, np.nan, np.float32)
            dls.table.at[str(item), "visible"] = np.zeros(6, bool)
        half = localisation(learn)
        assert half.notna().all(axis=None)
        metric = [PointingGame(dls), PartHitRate(dls, 4), ObjectCoverage(dls, 4), BoxRecall(dls, 4)]
        old, learn.metrics = learn.metrics, metric
        with learn.no_bar(): values = learn.validate()[1:]
        learn.metrics = old
        keys = ["pointing game, object", "part hit rate at 4", "object coverage at 4", "box recall at 4"]
        assert np.allclose(values, half.value[keys], atol=1e-5)
    finally: dls.table = table
    # The mean over the six others, worked out from the full set's own values.
    attention, regions = learn.see(items[6:])[1].attention, learn.see(items[6:])[1].boxes
    truth = {name: torch.from_numpy(v) for name, v in dls.truth(items[6:]).items()}
    hits, pointed = part_hit_rate(regions, truth["parts"][..., :2]), pointing_game(attention, truth["box"], (96, 96))
    assert math.isclose(half.value["part hit rate at 4"], hits[:, 3].mean(), abs_tol=1e-5)
    assert math.isclose(half.value["pointing game, object"], pointed.float().mean(), abs_tol=1e-5)
    assert not math.isclose(half.value["part hit rate at 4"], full.value["part hit rate at 4"], abs_tol=1e-4)


def test_first_look_smaller_than_the_input(learn):
    "Boxes and truth are pixels of the input, also where the network's first look is reduced."
    small = focus_learner(learn.dls, "toy_resnet", pretrained=False, image_size=64)
    found = localisation(small)
    whole = focus_learner(learn.dls, "toy_resnet", pretrained=False)
    assert abs(found.chance["part hit rate at 4"] - localisation(whole).chance["part hit rate at 4"]) < .12
    assert abs(found.chance["object coverage at 4"] - localisation(whole).chance["object coverage at 4"]) < .12


def test_what_metrics_need_is_said(learn, tmp_path):
    from fd_focus.toy import ToyBirds
    birds = ToyBirds(images_per_class=4, n_classes=2, image_size=64)
    for i in range(8):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        birds[i][0].save(tmp_path / str(i % 2) / f"{i}.png")
    folder = FocusDataLoaders.from_folder(tmp_path, image_size=64, bs=2, num_workers=0)
    with pytest.raises(ValueError, match="know no boxes"): PointingGame(folder)
    boxes = learn.dls.table.drop(columns="parts")
    whole, learn.dls.table = learn.dls.table, boxes
    try:
        with pytest.raises(ValueError, match="know no parts: PartHitRate needs a table with a column 'parts'"):
            PartHitRate(learn.dls)
        labels = [m.label for m in localisation_metrics(learn.dls)[::2]]
        assert labels == ["pointing_game", "object_coverage", "box_recall"]
    finally: learn.dls.table = whole
    plain = focus_learner(learn.dls, "toy_resnet", pretrained=False, method="plain")
    with pytest.raises(ValueError, match="PlainNet has no regions to measure"): localisation(plain)


# Chance

@pytest.mark.parametrize("image,input_size", [(96, 96), (64, 96)])
def test_chance_is_the_network_with_noise_for_attention(image, input_size):
    "The same grid as the network's own, also where its first look is smaller than the input."
    net = FocusNet(toy_resnet(), 3, image_size=image).eval()
    with torch.no_grad(): look = net.examine(torch.rand(2, 3, input_size, input_size))
    blind = chance_look(look, (input_size, input_size), torch.Generator().manual_seed(0))
    grid = net.grid * input_size / image
    assert all(torch.isclose(grid, box, atol=1.).all(1).any() for box in blind.boxes.flatten(0, 1))
    own = (look.boxes[0, 0, 2:] - look.boxes[0, 0, :2]).round()
    assert torch.allclose(blind.boxes[..., 2:] - blind.boxes[..., :2], own)
    again = chance_look(look, (input_size, input_size), torch.Generator().manual_seed(0))
    assert torch.equal(again.boxes, blind.boxes)


def test_chance_without_a_map_and_with_boxes_of_several_sizes():
    boxes = torch.tensor([[[0., 0., 20., 10.], [5., 5., 25., 15.], [0., 0., 60., 60.]]]).expand(4, 3, 4)
    blind = chance_look(Look(torch.zeros(4, 2), boxes=boxes), (80, 100), torch.Generator().manual_seed(0))
    sides = blind.boxes[..., 2:] - blind.boxes[..., :2]
    assert blind.boxes.shape == (4, 3, 4) and torch.allclose(sides, torch.tensor([20., 10.]))
    assert (blind.boxes >= 0).all() and (blind.boxes <= torch.tensor([100., 80., 100., 80.])).all()


class Corners(Method):
    "A method of one's own that looks at two corners and has no attention."
    def __init__(self, body, n_classes, image_size=96):
        super().__init__(body, n_classes, image_size)
        self.head = torch.nn.Linear(self.n_features, n_classes)
    def forward(self, x, target=None):
        logits = self.head(self.body(x).mean((2, 3)))
        return {"image": logits} if self.training else logits
    def look(self, x):
        boxes = torch.tensor([[0., 0., 32., 32.], [64., 64., 96., 96.]], device=x.device)
        return Look(self(x), boxes=boxes.expand(len(x), 2, 4))


def test_any_method_with_boxes(learn):
    own = focus_learner(learn.dls, "toy_resnet", method=Corners, pretrained=False)
    found = localisation(own)
    assert "pointing game, object" not in found.index and "part hit rate at 2" in found.index
    assert found.notna().all(axis=None)
    truth = {name: torch.from_numpy(v) for name, v in learn.dls.truth(list(learn.dls.valid_ds.items)).items()}
    corners = own.see(list(learn.dls.valid_ds.items))[1].boxes
    covered = object_coverage(corners, truth["box"])[:, 1].mean()
    assert math.isclose(found.value["object coverage at 2"], covered, abs_tol=1e-6)
    own.metrics = [PartHitRate(learn.dls, 2)]
    with own.no_bar(): assert math.isclose(own.validate()[1], found.value["part hit rate at 2"], abs_tol=1e-6)


# Parts that are points, with names, in groups

@pytest.fixture
def pointed(learn):
    "The toy birds as if only points were known, by name; one picture shows no part, another only the first two."
    table, dls = learn.dls.table, learn.dls
    parts = [np.concatenate([points[:, :2], 0 * points[:, 2:]], 1) for points in table.parts]
    dls.table = table.assign(parts=parts, visible=[np.ones(6, bool) for _ in parts],
                             box=[np.full(4, np.nan, np.float32)] * len(table))
    dls.table.attrs["part_names"] = list("abcdef")
    first, second = map(str, list(dls.valid_ds.items)[:2])
    dls.table.at[first, "visible"] = np.zeros(6, bool)
    dls.table.at[second, "visible"] = np.arange(6) < 2
    yield learn
    dls.table = table


def test_groups_against_their_parts(pointed):
    groups = dict(front=("a", "b"), rest=("c", "d", "e", "f"), last=("f",))
    found = localisation(pointed, groups=groups)
    assert found.n["front hit at 1"] == 11 and found.n["rest hit at 1"] == 10 and found.n["part hit rate at 1"] == 11
    items = list(pointed.dls.valid_ds.items)
    boxes, truth = pointed.see(items)[1].boxes, pointed.dls.truth(items)
    for group, columns in (("front", [0, 1]), ("rest", [2, 3, 4, 5]), ("last", [5])):
        for k in (1, 4):
            values = []
            for some, parts, visible in zip(boxes[:, :k].tolist(), truth["parts"], truth["visible"]):
                shown = [parts[c] for c in columns if visible[c]]
                if shown: values.append(any(b[0] <= p[0] <= b[2] and b[1] <= p[1] <= b[3] for b in some for p in shown))
            assert math.isclose(found.value[f"{group} hit at {k}"], np.mean(values), abs_tol=1e-5), (group, k)
    alone = localisation(pointed)                          # groups add rows and change none
    assert alone.equals(found.loc[alone.index]) and not [name for name in found.index if "object" in name]


def test_points_within_a_share_of_the_side(pointed):
    "The tolerance is a share of each side of the input; with all of it everything is hit, with none of it nothing."
    key = "pointing game, any part within {} of the side".format
    assert localisation(pointed, within=1.).value[key("100%")] == 1
    assert localisation(pointed, within=0.).value[key("0%")] == 0
    items = list(pointed.dls.valid_ds.items)
    attention, truth = pointed.see(items)[1].attention, pointed.dls.truth(items)
    hits = []
    for one, parts, visible in zip(attention, truth["parts"], truth["visible"]):
        row, column = np.unravel_index(one.argmax(), one.shape)
        x, y = (column + .5) * 96 / one.shape[1], (row + .5) * 96 / one.shape[0]
        if visible.any(): hits.append(any(max(abs(px - x), abs(py - y)) <= .2 * 96 for px, py, _ in parts[visible]))
    assert math.isclose(localisation(pointed, within=.2).value[key("20%")], np.mean(hits), abs_tol=1e-5)


def test_metrics_of_training_without_boxes(pointed):
    names = [metric.name for metric in localisation_metrics(pointed.dls)]
    assert names == ["part_hit_rate_4", "part_hit_rate_4_chance"]


def test_groups_of_parts_without_a_name(learn, pointed):
    with pytest.raises(ValueError, match="groups name back, beak, .*throat, but the table.s parts are a, b"):
        localisation(pointed, groups=BIRD_GROUPS)
    del pointed.dls.table.attrs["part_names"]
    with pytest.raises(ValueError, match="but the table's parts have no names"):
        localisation(pointed, groups={"head": ("a",)})


def test_another_pictures_regions_do_as_well_where_all_are_the_same(learn):
    "A way of looking that sees the same everywhere is level with itself on other pictures, and beats noise or not."
    box = torch.tensor([[[30., 30., 66., 66.]]])
    def always(net, x): return Look(net(x), boxes=box.expand(len(x), -1, -1))
    found = localisation(learn, look=always)
    assert np.allclose(found.value, found.another, atol=1e-5) and not np.allclose(found.value, found.chance, atol=.01)
    assert not [name for name in found.index if name.startswith("pointing")]       # no map, no game
    own = localisation(learn)
    assert not np.allclose(own.value, own.another, atol=.01)
    assert localisation(learn).equals(own)                                         # the same seed, the same table


def test_metrics_take_tensors_of_a_gpu():
    "Without a GPU: PyTorch's fake tensors complain as a GPU's would where devices are mixed."
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fd_focus.evidence.localisation import _pointed
    with FakeTensorMode(allow_non_fake_inputs=False):
        boxes, box = torch.rand(3, 4, 4, device="cuda"), torch.rand(3, 4, device="cuda")
        parts, shown = torch.rand(3, 5, 3, device="cuda"), torch.ones(3, 5, dtype=torch.bool, device="cuda")
        attention = torch.rand(3, 7, 7, device="cuda")
        found = [part_hit_rate(boxes, parts[..., :2]), part_hit_rate(boxes, parts[..., :2], shown),
                 group_hit(boxes, parts[..., :2], shown), box_recall(boxes, box), object_coverage(boxes, box),
                 pointing_game(attention, box, (64, 64), 3.), _pointed(attention, parts, shown, (64, 64), .1)]
        assert all(values.device.type == "cuda" for values in found)
