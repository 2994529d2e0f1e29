"Exported graphs answer as the network does, and a comparison that should fail does."
import ast
import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import shaken
from PIL import Image, ImageCms

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.methods import METHODS, Method
from fd_focus.training.learner import focus_learner
from fd_focus.training.machine import alone
from fd_focus.use import export
from fd_focus.use.cli import fd_focus_export
from fd_focus.use.export import check_parity, export_model, run_exported, toy_images
from fd_focus.use.model_folder import load_focus, save_focus
from fd_focus.use.predict import FocusClassifier, FocusPipeline, fold_batch_norm


@pytest.fixture(scope="module")
def dls(): return FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2)


def learner(dls, settle=True, **kwargs):
    torch.manual_seed(0)
    learn = focus_learner(dls, kwargs.pop("arch", "toy_resnet"), pretrained=False, **kwargs)
    if settle: shaken(learn.model)
    return learn


@pytest.fixture(scope="module")
def saved(dls, tmp_path_factory): return save_focus(learner(dls), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def graph(saved): return export_model(load_focus(saved), saved.with_name("model.onnx"))


@pytest.fixture(scope="module")
def plain(dls, tmp_path_factory):
    "One look: its graph is made in a quarter of the time, for tests of what is around a graph."
    return save_focus(learner(dls, method="plain"), tmp_path_factory.mktemp("plain") / "model")


def relabelled(graph, net, file):
    "What `export_model` would write of a network that differs from the graph's in what it tells of itself alone."
    import onnx
    model = onnx.load(graph)
    del model.metadata_props[:]
    about = export._metadata(net, FocusPipeline(net).outputs)
    for key, value in about.items(): model.metadata_props.add(key=key, value=value)
    onnx.save(model, file)
    return file


def loaded(dls, tmp_path, arch="toy_resnet", **kwargs):
    return load_focus(save_focus(learner(dls, arch=arch, **kwargs), tmp_path / "model"))


def agrees(net, file, **kwargs):
    parity = check_parity(net, run_exported(file), **kwargs)
    assert parity.ok and parity.images == 64 if not kwargs else parity.ok, parity
    return parity


CASES = [
    dict(answer="ensemble", fusion="mean", crop_norm="separate"),
    dict(attention="single", l=3, answer="hybrid"),
    dict(method="plain"),
    dict(answer="adaptive"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            dict(),
            dict(fusion="mean", hybrid=False),
            dict(l=0, m=5, sigma=0.0),
            dict(method="random_regions"),
        )
    ),
]


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_onnx_of_every_kind_of_net(dls, tmp_path, kwargs):
    net = loaded(dls, tmp_path, **kwargs)
    file = export_model(net, tmp_path / "model.onnx")
    parity = agrees(net, file)
    assert parity.same_boxes == 64 and parity.ties == 0
    import onnx
    model = onnx.load(file)
    onnx.checker.check_model(model)
    outputs = list(FocusPipeline(net).outputs)
    assert ("boxes" in outputs) == (kwargs.get("method") != "plain")
    assert ("looked_again" in outputs) == (getattr(net, "answer", None) == "adaptive")
    assert [i.name for i in model.graph.input] == ["image"] and [o.name for o in model.graph.output] == outputs
    branches = [part.g for node in model.graph.node if node.op_type == "If" for part in node.attribute]
    domains = {node.domain for graph in (model.graph, *branches) for node in graph.node}
    assert not model.functions and domains == {""}                                    # nothing but ONNX's own operators
    assert all(
        dims.dim[0].dim_param
        for dims in [model.graph.input[0].type.tensor_type.shape, model.graph.output[0].type.tensor_type.shape]
    )
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["classes"] == net.classes and (
        about["input_size"],
        about["resize"],
        about["squash"],
        about["min_side"],
    ) == ([64, 64], [64, 64], True, 64)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model.onnx"}                 # one file, weights inside


@pytest.mark.parametrize(
    "arch,fusion",
    [
        ("resnet18", "mean"),
        pytest.param("mobilenet_v2", "concat", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", "concat", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", "concat", marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_050", "concat", marks=pytest.mark.slow),
    ],
)
def test_onnx_of_real_bodies(tmp_path, arch, fusion):
    dls = FocusDataLoaders.from_toy(2, 1, image_size=96, n_classes=3, bs=2)
    net = loaded(dls, tmp_path, arch, fusion=fusion, answer="ensemble")
    agrees(net, export_model(net, tmp_path / "model.onnx"))


def test_onnx_with_photographs(data, tmp_path):
    "A MobileNetV2 with ImageNet weights at 224 on 24 photographs of cars."
    files = sorted((data / "cars_sedan33").rglob("*.jpg"))[::60][:24]
    dls = FocusDataLoaders.from_toy(2, 1, image_size=224, n_classes=3, bs=2)
    learn = learner(
        dls, arch="mobilenet_v2", weights=data / "weights" / "mobilenet_v2_imagenet_features.pth", settle=False,
        answer="hybrid"
    )
    net = load_focus(save_focus(learn, tmp_path / "model"))
    classifier = FocusClassifier(net, "cpu")
    parity = agrees(
        net, export_model(net, tmp_path / "model.onnx"), images=torch.stack([classifier.pixels(file) for file in files])
    )
    assert parity.images == 24 and parity.same_class == 24


def test_torch_export(dls, tmp_path):
    net = loaded(dls, tmp_path, answer="ensemble", crop_norm="separate")
    agrees(net, export_model(net, tmp_path / "model.pt2", "torch-export"))
    extra = {"classes": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["classes"]) == net.classes


@pytest.mark.parametrize("kwargs", [dict(fusion="mean"), pytest.param(dict(crop_norm="separate", attention="single"),
                                                                      marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("format", export.FORMATS)
def test_adaptive_for_nobody_some_everybody(tmp_path, format, kwargs):
    "Batches in which nobody, some, and all look again, of one picture and of sixteen; crops are reduced."
    dls = FocusDataLoaders.from_toy(2, 1, image_size=128, n_classes=3, bs=2)
    learn = learner(dls, image_size=64, answer="adaptive", m=4, l=2, **kwargs)
    net = load_focus(save_focus(learn, tmp_path / "model", temperature=1.5))
    pipeline, birds = FocusPipeline(net), toy_images((128, 128), 40)
    with torch.no_grad():
        confidence = net.look((birds - pipeline.mean) / pipeline.std).heads["image"].softmax(1).amax(1)
    order = confidence.argsort()
    net.look_again_below = float(confidence[order[18:20]].mean())          # 19 of 40 are below
    run = run_exported(export_model(net, tmp_path / f"model{export.FORMATS[format]}", format))
    for rows, unsure in ((order[:16], 16), (order[12:28], 7), (order[-16:], 0), (order[:1], 1), (order[-1:], 0)):
        parity = check_parity(net, run, birds[rows], bs=len(rows))
        assert parity.ok and parity.looked_again == unsure and parity.ties == 0, parity
        found = run(birds[rows])                                           # the whole batch at once
        with torch.no_grad(): want = dict(zip(pipeline.outputs, pipeline(birds[rows])))
        assert torch.equal(found["looked_again"], want["looked_again"])
        assert torch.allclose(found["probabilities"], want["probabilities"], atol=1e-5)


def test_parity_of_who_looks_again(dls, tmp_path):
    "A wrong choice is an error, one that hangs on the last digits a tie."
    net = loaded(dls, tmp_path, answer="adaptive")
    pipeline, birds = FocusPipeline(net), toy_images((64, 64), 8)
    def run(image):
        with torch.no_grad(): return dict(zip(pipeline.outputs, pipeline(image)))
    with torch.no_grad():
        confidence = net.look((birds - pipeline.mean) / pipeline.std).heads["image"].softmax(1).amax(1)
    def flipped(image):
        "As an answer that thinks the first bird sure, or unsure, where it is the other."
        found, first = run(image), (image == birds[0]).flatten(1).all(1)
        return found | dict(looked_again=found["looked_again"] ^ first)

    for distance, ok in ((5e-5, True), (-5e-5, True), (.001, False), (-.001, False)):
        net.look_again_below = confidence[0].item() + distance
        assert check_parity(net, run, birds).ok
        parity = check_parity(net, flipped, birds)
        assert parity.ok == ok and parity.same_looks == 7 and parity.ties == ok, parity
    net.look_again_below = 0.
    assert check_parity(net, run, birds).looked_again == 0


def test_input_larger_than_the_first_look(tmp_path):
    "The graph reduces the picture for the first look and crops from the picture itself; temperature is inside."
    dls = FocusDataLoaders.from_toy(2, 1, image_size=96, n_classes=3, bs=2)
    learn = learner(dls, image_size=64, answer="hybrid")
    net = load_focus(save_focus(learn, tmp_path / "model", temperature=2.5))
    run = run_exported(export_model(net, tmp_path / "model.onnx"))
    assert check_parity(net, run).ok
    x = toy_images((96, 96), 2)
    with torch.no_grad():
        want = (
            net((x - torch.tensor(net.stats[0])[:, None, None]) / torch.tensor(net.stats[1])[:, None, None]) / 2.5
        ).softmax(-1)
    assert torch.allclose(run(x)["probabilities"], want, atol=1e-4) and run(x)["boxes"].max() > 64


# A program without this library

def session(file): return pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "prepared",
    [
        dict(),
        dict(squash=False, resize=[80, 72]),
        dict(min_side=None),
        dict(squash=False, input_size=[64, 64], resize=[65, 90], min_side=90),
        dict(squash="pad", input_size=[64, 64], resize=[73, 90], min_side=90),
    ],
    ids=str,
)
@pytest.mark.parametrize("size,orientation", [((640, 410), 1), ((300, 777), 6), ((50, 70), 3)])
def test_without_this_library(saved, graph, tmp_path, prepared, size, orientation):
    y, x = np.mgrid[0:size[1], 0:size[0]]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(
        np.stack([x * 255 / size[0], y * 255 / size[1], 128 + 90 * np.sin(x / 40) * np.cos(y / 30)], -1).astype(
            np.uint8
        )
    ).save(tmp_path / "x.jpg", exif=exif)
    net = load_focus(saved)
    net.about |= prepared
    found = export.answer_photo(session(relabelled(graph, net, tmp_path / "x.onnx")), tmp_path / "x.jpg")
    want = FocusClassifier(net, "cpu").predict(tmp_path / "x.jpg")
    assert (
        found["label"] == want.label
        and abs(found["probability"] - want.probability) < 2e-3
        and np.abs(found["boxes"] - want.boxes.numpy()).max() < 0.01
    )


def drawn_pictures(folder):
    "Pictures of every kind that a user may have."
    rng, files, exif = np.random.default_rng(0), [], Image.Exif()
    def keep(picture, name, **options):
        picture.save(folder / name, **options)
        files.append(folder / name)
    def picture(width, height, channels=3):
        small = rng.integers(0, 256, (9, 7, channels), dtype=np.uint8)
        return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    for i, size in enumerate([(201, 77), (33, 500), (64, 64), (1, 90), (999, 1), (1400, 1050), (4, 3)]):
        keep(picture(*size), f"{i}.{'png' if min(size) < 9 else 'jpg'}")
    for orientation in range(2, 9):
        exif[0x0112] = orientation
        keep(picture(300, 170), f"turned{orientation}.jpg", exif=exif)
    exif[0x0112] = 6
    keep(picture(900, 600), "turned.tif", exif=exif)
    keep(picture(90, 130).convert("L"), "grey.jpg")
    keep(picture(90, 130).convert("1"), "black_or_white.png")
    keep(picture(120, 80, 4), "transparent.png")
    keep(picture(120, 80, 4).convert("LA"), "grey_transparent.png")
    keep(picture(120, 80).quantize(40), "palette.png")
    keep(picture(120, 80).quantize(40), "palette_transparent.png", transparency=3)
    keep(picture(150, 80).convert("CMYK"), "inks.jpg")
    keep(picture(150, 80), "webp.webp", lossless=True)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    keep(picture(150, 80), "of_another_kind.png", icc_profile=lab)
    keep(picture(150, 80), "srgb.png", icc_profile=srgb)
    keep(picture(150, 80), "damaged.png", icc_profile=b"no profile")
    return files


def photographs(data):
    "24 of them: 12 species and 12 cars."
    return [next(iter(sorted(folder.glob("*.jpg"))))
            for place in ("cub_birds50", "cars_sedan33")
            for folder in sorted(folder for folder in (data / place).rglob("*") if next(folder.glob("*.jpg"), 0))[:12]]


def answers_alike(net, graph, files):
    "Ask the program that lies beside a graph, in a process of its own; and this library."
    pytest.importorskip("onnxruntime")
    folder = graph.parent
    classes, program = export.write_beside(net, graph)
    assert (classes, program) == (folder / "model.classes.json", folder / "preprocess.py")
    assert json.loads(classes.read_text()) == net.classes
    told = subprocess.run([sys.executable, "-W", "error", program.name, graph.name, *map(str, files)],
                          cwd=folder, capture_output=True, text=True, env={"PATH": ""})
    assert told.returncode == 0, told.stderr
    wanted = FocusClassifier(net, "cpu").predict([str(file) for file in files])
    asked = session(graph)
    for file, line, want in zip(files, told.stdout.splitlines(), wanted, strict=True):
        found = export.answer_photo(asked, file)
        sure = {None: "", True: ", sure", False: ", not sure"}[want.sure]
        assert line == f"{file}: {found['label']}, {100 * found['probability']:.1f} %{sure}"
        assert (found["label"], found["sure"]) == (want.label, want.sure), file.name
        assert abs(found["probability"] - want.probability) < 2e-3, file.name
        assert np.abs(found["boxes"] - want.boxes.numpy()).max(initial=0) < .05 * max(want.size), file.name


PREPARED = [dict(resize=[73, 73], min_side=73), dict(squash=False, resize=[80, 72], threshold=.6),
            dict(squash="pad")]

@pytest.mark.parametrize("prepared", PREPARED, ids=str)
def test_who_knows_only_the_file_gets_the_same_answers(saved, graph, tmp_path, prepared):
    net = load_focus(saved)
    net.about |= prepared
    answers_alike(net, relabelled(graph, net, tmp_path / "model.onnx"), drawn_pictures(tmp_path))


@pytest.mark.parametrize("prepared", PREPARED, ids=str)
def test_the_same_answers_on_photographs(saved, graph, data, tmp_path, prepared):
    net = load_focus(saved)
    net.about |= prepared
    assert len(files := photographs(data)) == 24
    answers_alike(net, relabelled(graph, net, tmp_path / "model.onnx"), files)


def test_a_profile_of_colours_counts(tmp_path):
    "A photograph in Adobe RGB, or a telephone's P3, has other numbers for the same colours."
    from fd_focus.data.pictures import open_image
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((80, 60))
    profile = wide_profile()
    for mode in ("RGB", "RGBA"):
        picture.convert(mode).save(tmp_path / "wide.png", icc_profile=profile)
        ours, theirs = (np.asarray(opened).astype(int) for opened in (
            open_image(tmp_path / "wide.png"), export.upright(Image.open(tmp_path / "wide.png"))))
        assert np.abs(ours - theirs).max() <= 1 and np.abs(ours - np.asarray(picture).astype(int)).max() > 20
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits a colour"): export.upright(Image.open(tmp_path / "deep.png"))


def wide_profile():
    "sRGB's profile with the red, green and blue of Adobe RGB, under another name."
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = range(132, 132 + 12 * profile[131], 12)
    places = {bytes(profile[i:i + 4]): int.from_bytes(profile[i + 4:i + 8]) for i in entries}
    for tag, xyz in ((b"rXYZ", (.60974, .31111, .01947)), (b"gXYZ", (.20528, .62567, .06087)),
                     (b"bXYZ", (.14919, .06322, .74457))):
        at = places[tag]
        profile[at + 8:at + 20] = b"".join(round(value * 65536).to_bytes(4, "big") for value in xyz)
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))


def test_wrong_pixels_get_no_answer(saved, graph, tmp_path):
    "Up to 255, or with a mean subtracted: NaN for these pictures, and an answer for the others of the batch."
    net = load_focus(saved)
    right = toy_images((64, 64), 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in net.stats)
    for file in (graph, export_model(net, tmp_path / "model.pt2", "torch-export")):
        run = run_exported(file)
        found = run(torch.stack([right[0], 255 * right[1], (right[2] - mean) / std, 2 * right[3] - 1]))["probabilities"]
        assert found.isfinite().all(1).tolist() == [True, False, False, False]
        assert torch.allclose(found[0], run(right)["probabilities"][0], atol=1e-5)
        edges = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64), right[0] * 1.004 - .002])
        assert run(edges)["probabilities"].isfinite().all()


def metadata(graph):
    return {name: json.loads(text) for name, text in session(graph).get_modelmeta().custom_metadata_map.items()}


def test_what_a_graph_says_of_itself(saved, plain, graph, tmp_path):
    "An old folder says less of how it was prepared; the graph says all."
    assert metadata(relabelled(graph, load_focus(saved), tmp_path / "again.onnx")) == metadata(graph)
    net = load_focus(plain)
    for name in ("resize", "squash", "min_side"): del net.about[name]
    about = metadata(export_model(net, tmp_path / "model.onnx"))
    want = FocusClassifier(net, "cpu")
    assert tuple(about["resize"]) == want.resize == (73, 73)
    assert tuple(about["input_size"]) == want.input_size == (64, 64)
    assert (about["squash"], about["min_side"]) == (want.squash, want.min_side) == (True, None)
    assert about["classes"] == net.classes and about["preparation"] == export.how_to_prepare(net)
    words = " ".join(about["preparation"])
    for said in ("EXIF", "RGB (not BGR)", "73 x 73", "squashed", "bilinear", "centre, 64 x 64", "0 to 1", "no mean"):
        assert said in words
    net.about["banner"] = 20
    assert "cut off the lowest 20 pixels where it has the banner" in " ".join(export.how_to_prepare(net))


def test_a_banner_is_cut_off_as_by_predict(saved, graph, tmp_path):
    "Its pixels are those of the original: a JPEG that comes reduced has fewer, a turned one has them on another side."
    net = load_focus(saved)
    net.about |= dict(banner=20, min_side=73)
    graph, exif, files = relabelled(graph, net, tmp_path / "model.onnx"), Image.Exif(), []
    about = metadata(graph)
    exif[0x0112] = 6
    rng, cut = np.random.default_rng(0), FocusClassifier(net, "cpu", banner=True)
    for size, ending, options in (((320, 170), "png", {}), ((999, 777), "jpg", {}),
                                  ((640, 410), "jpg", dict(exif=exif)), ((30, 12), "png", {})):
        files.append(tmp_path / f"{len(files)}.{ending}")
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(files[-1], **options)
    for file, want in zip(files, cut.predict(files)):
        pixels, view, _ = export.prepare_photo(file, about, banner=20)
        assert np.array_equal(pixels[0], cut.pixels(file).numpy()) and np.allclose(view, want.view)
        assert not np.array_equal(pixels, export.prepare_photo(file, about)[0])
        found = export.answer_photo(session(graph), file, banner=True)
        assert found["label"] == want.label and np.allclose(found["boxes"], want.boxes, atol=.1)
    program = export.write_beside(net, graph)[1]
    lines = [subprocess.run([sys.executable, program, graph, *map(str, files), *flag], capture_output=True, text=True,
                            check=True).stdout.splitlines() for flag in (["--banner"], [])]
    assert len(lines[0]) == len(files) and lines[0] != lines[1]
    net.about.pop("banner")
    with pytest.raises(ValueError, match="knows of no banner"):
        export.answer_photo(session(relabelled(graph, net, graph)), files[0], banner=True)


def test_the_program_needs_little_and_spares_what_is_there(saved, tmp_path):
    net = load_focus(saved)
    (tmp_path / "preprocess.py").write_text("mine")
    classes, program = export.write_beside(net, tmp_path / "v2.model.onnx")
    assert (classes.name, program.name) == ("v2.model.classes.json", "v2.model.preprocess.py")
    assert (tmp_path / "preprocess.py").read_text() == "mine"
    (tmp_path / "preprocess.py").unlink()
    for _ in range(2): assert export.write_beside(net, tmp_path / "a.onnx")[1].name == "preprocess.py"
    assert [file.name for file in export.write_beside(net, tmp_path / "b.pt2")] == ["b.classes.json"]
    tree = ast.parse(program.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"io", "json", "sys", "numpy", "PIL", "onnxruntime"}
    assert max(map(len, program.read_text().splitlines())) <= 120


def test_parity_fails_where_it_should(dls, tmp_path):
    net = loaded(dls, tmp_path)
    pipeline = FocusPipeline(net)
    def run(image):
        with torch.no_grad(): return dict(zip(pipeline.outputs, pipeline(image)))
    birds = toy_images((64, 64), 8)

    def differ(name, change):
        return check_parity(net, lambda image: (found := run(image)) | {name: change(found[name])}, birds)
    assert check_parity(net, run).ok
    assert not differ("probabilities", lambda p: p + torch.tensor([2e-4, -2e-4, 0])).ok
    assert not differ("probabilities", lambda p: p.roll(1, 1)).ok
    assert not differ("boxes", lambda b: b + 1).ok
    assert not differ("boxes", lambda b: b.flip(1)).ok                        # the right boxes in another order
    assert differ("boxes", lambda b: b + .001).ok
    other = load_focus(save_focus(learner(dls, sigma=2.), tmp_path / "other"))
    assert not check_parity(other, run, birds).ok


def test_ties_are_told_from_errors(dls, tmp_path):
    "On one colour many cells have the same attention but for rounding: any may be first, but no place off the grid."
    net = loaded(dls, tmp_path, l=1, m=1, sigma=0., answer="hybrid")
    pipeline = FocusPipeline(net)
    image = torch.full((1, 3, 64, 64), .5)
    with torch.no_grad():
        probabilities, boxes, scores, attention = pipeline(image)
        noisy = pipeline(image + 1e-5 * torch.randn(64, 3, 64, 64))[1][:, 0]
    def answer(box):
        return lambda x: dict(probabilities=probabilities, boxes=box, scores=scores, attention=attention)

    others = noisy[(noisy - boxes[0, 0]).abs().amax(1) > 1]
    if len(others):
        parity = check_parity(net, answer(others[:1][None]), image)
        assert parity.ok and parity.ties == 1
    assert not check_parity(net, answer(boxes + 3), image).ok
    far = attention.flatten().argmin()
    assert not check_parity(net, answer(net.grid[far][None, None]), image).ok


def test_what_cannot_be_exported(dls, tmp_path, monkeypatch):
    net = loaded(dls, tmp_path)
    monkeypatch.setattr(Method, "deterministic", False)
    with pytest.raises(ValueError, match="the method 'focus' answers differently each time"):
        export_model(net, tmp_path / "model.onnx")
    monkeypatch.undo()
    net = loaded(dls, tmp_path, method="plain")
    with pytest.raises(ValueError, match="format='tflite'; use 'onnx' or 'torch-export'"):
        export_model(net, tmp_path / "model.tflite", "tflite")
    for opset in (11, 99):
        with pytest.raises(
            ValueError, match=f"opset={opset} cannot be had: the exporter wrote version 18; use opset=18"
        ):
            export_model(net, tmp_path / "model.onnx", opset=opset)
        assert {p.name for p in tmp_path.iterdir()} == {"model"}
    for name in ("onnx", "onnxscript"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, name, None)
            with pytest.raises(ValueError, match="pip install 'fd_focus.export.'"):
                export_model(net, tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="running an ONNX file needs onnxruntime"):
        run_exported(tmp_path / "model.onnx")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small file system")
@pytest.mark.parametrize("format", export.FORMATS)
def test_full_disk(plain, tmp_path, format):
    "An error with a message, and nothing half written; when there is room again, it works."
    disk, name = tmp_path / "disk", f"model{export.FORMATS[format]}"
    disk.mkdir()
    size = 1000 * (sum(file.stat().st_size for file in plain.iterdir()) // 2000)         # the weights do not fit
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        with pytest.raises(OSError, match=f"No space left on device: '{disk / name}'"):
            export_model(load_focus(plain), disk / name, format)
        with pytest.raises(SystemExit, match=f"fd_focus: No space left on device: {disk}"):
            fd_focus_export(model=str(plain), format=format, out=str(disk / name), n=2)
        assert not list(disk.iterdir())
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert export_model(load_focus(plain), disk / name, format).stat().st_size > size
    finally: subprocess.run(["umount", "-l", disk], check=True)


# Faster answers

@pytest.mark.parametrize(
    "arch,left,kwargs",
    [
        ("toy_resnet", 0, {}),
        ("toy_resnet", 0, dict(crop_norm="separate")),
        pytest.param("mobilenet_v2", 0, {}, marks=pytest.mark.slow),
        pytest.param("densenet121", 62, dict(crop_norm="separate"), marks=pytest.mark.slow),
    ],
)
def test_folding_changes_no_answer(tmp_path, arch, left, kwargs):
    "Batch norms that follow a convolution are folded, also in the body for crops; DenseNet's come before theirs."
    torch.manual_seed(0)
    net = shaken(METHODS["focus"].from_arch(arch, 3, pretrained=False, image_size=96, m=4, l=2, **kwargs))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    folded, x = fold_batch_norm(net), torch.rand(2, 3, 96, 96)
    count = lambda net: sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    assert count(net) > count(folded.body) == left and (
        count(folded.crop_body) == left if "crop_norm" in kwargs else folded.crop_body is None
    )
    with torch.no_grad(): ours, theirs = net.look(x), folded.look(x)
    assert torch.allclose(ours.answer.softmax(1), theirs.answer.softmax(1), atol=1e-4) and torch.equal(
        ours.boxes, theirs.boxes
    )
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()
    )  # the original is as it was


def test_folding_leaves_what_it_cannot_trace():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 8, 3, 4), torch.nn.BatchNorm2d(8)
        def forward(self, x): return self.norm(self.conv(x)) if float(x.mean()) > -1e9 else x
    net = fold_batch_norm(METHODS["focus"](Odd(), 3, image_size=64))
    assert isinstance(net.body, Odd) and net(torch.rand(1, 3, 64, 64)).shape == (1, 3)


# The command

def written(folder):
    "All but what lies beside a graph for those who have no fd_focus."
    names = {str(place.relative_to(folder)) for place in folder.rglob("*")}
    return {name for name in names if not name.endswith((".classes.json", "preprocess.py"))}


def test_command(dls, plain, data, tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fd_focus_export(model=str(save_focus(learner(dls, answer="hybrid"), tmp_path_factory.mktemp("hybrid") / "model")))
    assert (
        "model.onnx: " in (told := capsys.readouterr().out)
        and "64 pictures: 64 with the same class, 64 with the same boxes" in told
    )
    fd_focus_export(
        model=str(plain), format="torch-export", out="deep/birds.pt2", images=[str(data / "cars_sedan33")], n=3
    )
    assert "3 pictures: 3 with the same class" in capsys.readouterr().out
    assert written(tmp_path) == {"model.onnx", "deep", "deep/birds.pt2"}
    def message(**kwargs):
        with pytest.raises(SystemExit) as end: fd_focus_export(**dict(model=str(plain)) | kwargs)
        return end.value.code
    assert "no model folder" in message(model="gone")
    assert "format='tflite'" in message(format="tflite")
    assert "ends in .onnx" in message(out="model.bin")
    assert "no file gone.jpg" in message(images=["gone.jpg"])
    assert "n=0" in message(n=0)
    assert "opset=18 is for format 'onnx'" in message(format="torch-export", opset=18)


def hold(file, held):
    "In a process of its own, which works on `file` for long."
    with alone(file):
        held.touch()
        time.sleep(600)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_one_export_to_a_file_at_a_time(plain, tmp_path, tmp_path_factory, processes):
    file, held = tmp_path / "model.onnx", tmp_path_factory.mktemp("said") / "held"
    other = processes(hold, file, held)
    while not held.exists(): assert other.is_alive(); time.sleep(.02)
    with pytest.raises(SystemExit, match=f"fd_focus: process {other.pid} on .* works on {file}"):
        fd_focus_export(model=str(plain), out=str(file), n=2)
    other.kill(); other.join()
    fd_focus_export(model=str(plain), out=str(file), n=2)
    assert written(tmp_path) == {"model.onnx"}


def test_command_reads_a_list(plain, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("".join(f"{file}\n" for file in sorted((data / "cars_sedan33").rglob("*.jpg"))[:3]))
    )
    fd_focus_export(model=str(plain), images=["-"], n=2)
    assert "2 pictures: 2 with the same class" in capsys.readouterr().out


def test_command_without_pictures(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(SystemExit) as end: fd_focus_export(model=str(plain), images=["-"])
    assert "--images -: no pictures to compare on" in end.value.code and not list(tmp_path.iterdir())


def test_command_keeps_no_graph_that_differs(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export,
        "run_exported",
        lambda file: (
            lambda image, run=run_exported(file): (
                (out := run(image)) | dict(probabilities=out["probabilities"].roll(1, 1))
            )
        ),
    )
    with pytest.raises(SystemExit) as end: fd_focus_export(model=str(plain), out=str(tmp_path / "model.onnx"), n=4)
    assert "does not answer as PyTorch does: 4 pictures: 0 with the same class" in end.value.code and not list(
        tmp_path.iterdir()
    )
