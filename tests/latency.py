"""How long an answer takes on this CPU: PyTorch eager and compiled, folded and channels last, and ONNX Runtime.

    python tests/latency.py --out results/latency/latency.csv

Run it on a quiet machine. All ways of a model take turns, call by call, so that a machine that slows down slows all
of them down.
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

from fd_focus.methods import METHODS
from fd_focus.use.export import export_model, run_exported
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
        times, end = {key: [] for key in calls}, time.perf_counter() + seconds
        while min(map(len, times.values())) < 3 or time.perf_counter() < end:
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                times[key].append(time.perf_counter() - start)
    for row in rows:
        if not (taken := times.get((row["runtime"], row["folded"], row["channels_last"]))): continue
        low, middle, high = statistics.quantiles(taken, n=4)
        row |= dict(median_ms=round(1e3 * middle, 2), low_ms=round(1e3 * low, 2), high_ms=round(1e3 * high, 2),
                    images_per_second=round(batch / middle, 2), calls=len(taken))
    return rows


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
    "status",
]


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
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--threads", type=int, help="of PyTorch and ONNX Runtime; default: all cores")
    args = parser.parse_args(args)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads or os.cpu_count())
    rows, about = [], machine()
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
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(part := args.out.with_suffix(".part"), "w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(args.out)
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__": sys.exit(main())
