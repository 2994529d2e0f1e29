"""How long an answer takes on this CPU: PyTorch eager and compiled, folded and channels last, and ONNX Runtime.

    python tests/latency.py --out results/latency/latency.csv
    python tests/latency.py --looks     # only what a second look costs; other rows of the file stay

Run it on a quiet machine. All ways of a model take turns, call by call, so that a machine that slows down slows all
of them down. After each call there is a pause: threads go on spinning for a while, which slowed down whatever came
next, up to fivefold.
"""
import argparse
import copy
import csv
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from fd_focus.methods import METHODS, method_options
from fd_focus.presets import PRESETS
from fd_focus.use.export import export_model, run_exported, toy_images
from fd_focus.use.predict import FocusPipeline, fold_batch_norm

BODIES = {"resnet50": 448, "mobilenet_v2": 224}
EAGER = [("eager", folded, last) for folded in (False, True) for last in (False, True)]
WAYS = EAGER + [
    ("compiled", False, False),
    ("compiled", True, True),
    ("onnxruntime", False, False),
]  # runtime, batch norm folded, channels last


def make(body: str, size: int, method: str, classes: int):
    "A network with random weights; time does not depend on them."
    torch.manual_seed(0)
    net = METHODS[method].from_arch(body, classes, pretrained=False, image_size=size).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(0, 0.1)
    return net


def way(net, runtime: str, folded: bool, last: bool, x, folder: Path):
    "A function without arguments that answers `x`, and gives probabilities."
    if runtime == "onnxruntime":
        run = run_exported(export_model(net, folder / "model.onnx"), torch.get_num_threads())
        return lambda: run(x)["probabilities"]
    pipeline = FocusPipeline(fold_batch_norm(net) if folded else copy.deepcopy(net))
    if last:
        pipeline, x = pipeline.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if runtime == "compiled": pipeline = torch.compile(pipeline, dynamic=False)
    return lambda: pipeline(x)[0]


PAUSE = .05     # seconds


def take_turns(calls: dict, seconds: float) -> dict[object, list[float]]:
    "Seconds of every call, by its key: at least three times each, and until `seconds` are over."
    times, end = {key: [] for key in calls}, time.perf_counter() + seconds
    while calls and (min(map(len, times.values())) < 3 or time.perf_counter() < end):
        for key, call in calls.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    return times


def summary(times: list[float], batch: int) -> dict:
    low, middle, high = statistics.quantiles(times, n=4)
    return dict(median_ms=round(1e3 * middle, 2), low_ms=round(1e3 * low, 2), high_ms=round(1e3 * high, 2),
                images_per_second=round(batch / middle, 2), calls=len(times))


@torch.inference_mode()
def measure(net, batch: int, seconds: float, ways) -> list[dict]:
    "Rows of all ways for one network and batch; a way that cannot run says why."
    size, rows, calls, reference = net.image_size, [], {}, None
    x = torch.rand(batch, 3, *size)
    with tempfile.TemporaryDirectory() as folder:
        for runtime, folded, last in ways:
            row = dict(runtime=runtime, folded=folded, channels_last=last, status="ok")
            rows.append(row)
            try:
                call = way(net, runtime, folded, last, x, Path(folder))
                out = call()                                          # compiles, allocates
                reference = out if reference is None else reference
                row["difference"] = float((out - reference).abs().max())
                call()
                calls[runtime, folded, last] = call
            except Exception as error:
                row["status"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        times = take_turns(calls, seconds)
    for row in rows:
        if taken := times.get((row["runtime"], row["folded"], row["channels_last"])): row |= summary(taken, batch)
    return rows


# What a second look costs: a network of preset photos, answered by one look, by two of some pictures, by two of all.

LOOK_WAYS = [("eager", True, True), ("onnxruntime", False, False)]
SHARE, UNSURE = .1, 2          # pictures that look again: of all, and (the nearest whole number) of sixteen


@torch.inference_mode()
def twice(body: str, size: int, classes: int):
    "A network of preset photos, sixteen pictures, surest first, and a limit that the last two of them are below."
    torch.manual_seed(0)
    options = {k: v for k, v in PRESETS["photos"]("focus", size).items() if k in method_options(METHODS["focus"])}
    net = METHODS["focus"].from_arch(body, classes, pretrained=False, **options)
    net.about = dict(input_size=[2 * size, 2 * size])
    x, pipeline = toy_images((2 * size, 2 * size), 16), FocusPipeline(net)
    normal = (x - pipeline.mean) / pipeline.std
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d): module.momentum = 1.
    net.train().body(normal)                                             # so that pictures matter
    net.eval().image_head.weight.normal_(0, .5)
    confidence = net.first_look(normal, 1)[1].softmax(1).amax(1)
    x = x[confidence.argsort(descending=True)]
    limit = confidence.sort().values[UNSURE - 1:UNSURE + 1]
    if limit[1] - limit[0] < 1e-3: raise RuntimeError("no gap between sure and unsure pictures")
    return net, x, float(limit.mean())


def answered(net, answer: str, limit: float):
    "The same network (and its weights) with another answer."
    net = copy.deepcopy(net)
    net.answer, net.look_again_below = answer, limit
    return net


@torch.inference_mode()
def measure_looks(body: str, size: int, batch: int, seconds: float, runtimes: list[str], classes: int) -> list[dict]:
    "Rows of one look, of the adaptive answer, and of two looks for everybody; all take turns."
    net, x, limit = twice(body, size, classes)
    if batch not in (1, len(x)): raise SystemExit(f"--looks measures batches of 1 and {len(x)}, not {batch}")
    one, two = answered(net, "image", 0.), answered(net, "ensemble", 0.)
    some = answered(net, "adaptive", limit)
    cases = {("one look", 0): (one, x[:batch]), ("everybody looks again", 1): (two, x[:batch])}
    if batch == 1: cases |= {("adaptive, sure", 0): (some, x[:1]), ("adaptive, unsure", 1): (some, x[-1:])}
    else: cases[f"adaptive, {UNSURE} of {batch}", UNSURE / batch] = some, x
    calls, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for (runtime, folded, last), (name, (case, pictures)) in itertools.product(LOOK_WAYS, cases.items()):
            if runtime not in runtimes: continue
            if "adaptive" in name[0]:
                looked = FocusPipeline(case)(pictures)[-1]
                assert looked.sum() == round(name[1] * batch), f"{name}: {looked.sum()} look again"
            call = way(case, runtime, folded, last, pictures, Path(folder))
            gap = float((call() - FocusPipeline(case)(pictures)[0]).abs().max())
            calls[name, runtime, folded, last] = call
            rows.append(dict(model=f"photos, {name[0]}", share=name[1], runtime=runtime, folded=folded,
                             channels_last=last, difference=gap, status="ok"))
        times = take_turns(calls, seconds)
    for row, taken in zip(rows, times.values()): row |= summary(taken, batch)
    return rows + [average(rows, runtime) for runtime in runtimes if runtime != "compiled" and batch == 1]


def average(rows: list[dict], runtime: str) -> dict:
    "What a picture costs that comes alone: a sure one's time and an unsure one's, weighted by their shares."
    kinds = {row["model"].split()[-1]: row for row in rows if row["runtime"] == runtime and "adaptive" in row["model"]}
    sure, unsure = kinds["sure"], kinds["unsure"]
    times = ("median_ms", "low_ms", "high_ms")
    mean = {name: round((1 - SHARE) * sure[name] + SHARE * unsure[name], 2) for name in times}
    return sure | mean | dict(
        model=f"photos, adaptive, {SHARE:.0%} unsure", share=SHARE, images_per_second=round(1e3 / mean["median_ms"], 2),
        calls=sure["calls"] + unsure["calls"], difference=max(sure["difference"], unsure["difference"]))


def machine() -> dict:
    try: name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration): name = platform.processor() or platform.machine()
    return dict(
        threads=torch.get_num_threads(),
        processor=name,
        load=round(os.getloadavg()[0], 2),
        torch=version("torch"),
        onnxruntime=version("onnxruntime"),
        date=time.strftime("%Y-%m-%d"),
    )


COLUMNS = [
    "body",
    "image_size",
    "model",
    "batch",
    "runtime",
    "folded",
    "channels_last",
    "median_ms",
    "low_ms",
    "high_ms",
    "images_per_second",
    "calls",
    "difference",
    "threads",
    "processor",
    "load",
    "torch",
    "onnxruntime",
    "date",
    "share",
    "status",
]


def write(rows: list[dict], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(part := file.with_suffix(".part"), "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(file)


def kept(file: Path, looks: bool) -> list[dict]:
    "Rows of the file that are not measured now: those of looks, or all others."
    if not file.is_file(): return []
    with open(file, newline="") as stream: rows = list(csv.DictReader(stream))
    return [row for row in rows if bool(row.get("share")) != looks]


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/latency/latency.csv", type=Path, help="CSV to write")
    parser.add_argument(
        "--seconds",
        default=60.0,
        type=float,
        help="to measure each model and batch, all ways together; at least three calls each",
    )
    parser.add_argument("--bodies", nargs="+", default=list(BODIES), help="torchvision or timm names, or toy_resnet")
    parser.add_argument(
        "--image_size", type=int, help="instead of each body's own: 448 for resnet50, 224 for mobilenet_v2"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=["eager", "compiled", "onnxruntime"],
        default=["eager", "compiled", "onnxruntime"],
    )
    parser.add_argument("--looks", action="store_true", help="only what a second look costs, with preset photos")
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--threads", type=int, help="of PyTorch and ONNX Runtime; default: all cores")
    args = parser.parse_args(args)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads or os.cpu_count())
    rows, others, about = [], kept(args.out, args.looks), machine()
    if args.looks:
        for batch in args.batches:
            size = args.image_size or BODIES["mobilenet_v2"]
            body = args.bodies[0] if len(args.bodies) == 1 else "mobilenet_v2"
            for row in measure_looks(body, size, batch, args.seconds, args.runtimes, args.classes):
                rows.append(dict(body=body, image_size=size, batch=batch) | row | about)
                print(body, size, row["model"], f"batch {batch}:", row["runtime"], f"{row['median_ms']} ms", flush=True)
        return write(others + rows, args.out)
    for body, method, batch in itertools.product(args.bodies, ("focus", "plain"), args.batches):
        size = args.image_size or BODIES.get(body, 224)
        net, model = make(body, size, method, args.classes), "fd_focus" if method == "focus" else method
        for row in measure(net, batch, args.seconds, [way for way in WAYS if way[0] in args.runtimes]):
            rows.append(dict(body=body, image_size=size, model=model, batch=batch) | row | about)
            print(
                body,
                size,
                model,
                f"batch {batch}:",
                row["runtime"],
                "folded" * row["folded"],
                "channels last" * row["channels_last"],
                f"{row['median_ms']} ms" if row["status"] == "ok" else row["status"],
                flush=True,
            )
        write(rows + others, args.out)
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__": sys.exit(main())
