"""What an exported model weighs, how long an answer takes, how often it is right: in 32 bits, in 8, in OpenVINO.

    python tests/deploy.py MODEL_FOLDER PHOTOGRAPHS NAME [--out results/latency/deploy.csv]

PHOTOGRAPHS has a folder for each class, with photographs that the model has not seen: two thirds of them calibrate, a
third judges. All ways take turns, picture by picture; run it on a quiet machine. Rows of the same NAME are replaced.
"""
import argparse
import csv
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from latency import machine, summary, take_turns

from fd_focus.use.export import export_model, run_exported
from fd_focus.use.int8 import calibration_files, compare_exported, quantise
from fd_focus.use.model_folder import load_focus
from fd_focus.use.pipeline import fold_batch_norm
from fd_focus.use.predict import FocusClassifier

COLUMNS = ["name", "way", "method", "arch", "input_size", "megabytes", "median_ms", "low_ms", "high_ms", "calls",
           "right", "of", "same_class", "box_iou", "box_pixels", "calibrated", "threads", "processor", "load", "torch",
           "onnxruntime", "openvino", "date"]


def graphs(net, classifier, calibrating: list[str], place: Path, ways: list[str]) -> dict:
    "Way -> megabytes, and a function of pictures (B,3,H,W)."
    exact = export_model(fold_batch_norm(net), place / "model.onnx")
    found = {"eager": (sum(t.nbytes for t in net.state_dict().values()) / 1e6, eager(classifier))}
    found["onnx"] = exact.stat().st_size / 1e6, run_exported(exact, torch.get_num_threads())
    if "int8" in ways:
        small = quantise(exact, place / "int8.onnx", map(classifier.pixels, calibrating))
        found["int8"] = small.stat().st_size / 1e6, run_exported(small, torch.get_num_threads())
    if "openvino" in ways:
        from fd_focus.use.openvino import run_openvino, to_openvino
        file = to_openvino(exact, place / "model.xml")
        found["openvino"] = sum(part.stat().st_size for part in place.glob("model.[xb]*")) / 1e6, run_openvino(file)
    return {way: found[way] for way in ways}


def eager(classifier):
    @torch.inference_mode()
    def run(x):
        x = x.contiguous(memory_format=torch.channels_last)
        return dict(zip(classifier.pipeline.outputs, classifier.pipeline(x)))
    return run


def measure(model: Path, folder: Path, seconds: float, ways: list[str]) -> list[dict]:
    "A row for each way."
    net = load_focus(model)
    classifier, (calibrating, judging) = FocusClassifier(net, "cpu", amp="fp32"), calibration_files(folder)
    pictures = [classifier.pixels(file) for file in judging]
    classes = [net.classes.index(Path(file).relative_to(folder).parts[0]) for file in judging]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        runs = graphs(net, classifier, calibrating, Path(place), ways)
        reference = run_exported(Path(place) / "model.onnx")
        some = [picture[None] for picture in pictures[:12]]          # as many sure and unsure ones for every way
        def all_of(run): return lambda: [run(picture) for picture in some]
        times = take_turns({way: all_of(run) for way, (_, run) in runs.items()}, seconds)
        for way, (megabytes, run) in runs.items():
            moved = compare_exported(reference, run, pictures)
            right = sum(int(run(x[None])["probabilities"].argmax()) == y for x, y in zip(pictures, classes))
            rows.append(dict(
                way=way, method=net.about["method"], arch=net.about["arch"], input_size=classifier.input_size[0],
                megabytes=round(megabytes, 2), right=right, of=len(pictures), same_class=moved.same_class,
                box_iou=round(moved.box_iou, 3), box_pixels=round(moved.box_pixels, 1), calibrated=len(calibrating),
                **{k: v for k, v in summary([t / len(some) for t in times[way]], 1).items() if k in COLUMNS}))
    return rows


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("name", help="of the rows, such as 'sedans, photos'")
    parser.add_argument("--out", default="results/latency/deploy.csv", type=Path)
    parser.add_argument("--seconds", default=60., type=float, help="to measure, all ways together")
    parser.add_argument("--ways", nargs="+", default=["eager", "onnx", "int8", "openvino"])
    parser.add_argument("--threads", type=int, help="default: all cores")
    args = parser.parse_args(args)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads or os.cpu_count())
    about = dict(name=args.name) | machine()
    if "openvino" in args.ways: about["openvino"] = version("openvino").split("-")[0]
    rows, others = measure(args.model, args.photographs, args.seconds, args.ways), []
    if args.out.is_file():
        with open(args.out, newline="") as stream:
            others = [row for row in csv.DictReader(stream) if row["name"] != args.name]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(part := args.out.with_suffix(".part"), "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(others + [about | row for row in rows])
    part.replace(args.out)
    shown = ("way", "megabytes", "median_ms", "right", "of", "same_class", "box_iou")
    for row in rows: print({name: row[name] for name in shown})


if __name__ == "__main__": sys.exit(main())
