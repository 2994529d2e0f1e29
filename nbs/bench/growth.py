"""How time and memory grow with the batch, the side of the picture, classes and regions.

    python nbs/bench/growth.py --out results/bench/growth.json
"""
import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fd_focus.attention import attention_map
from fd_focus.evidence.timing import machine, make_net, middle, take_turns, training_step
from fd_focus.regions import propose_from_table, region_grid, suppression_table
from fd_focus.training.speed import peak_memory
from fd_focus.zoom import zoom


def exponent(x: list[float], y: list[float]) -> float:
    "Slope of the straight line through (log x, log y)."
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def locating(
    batch: int, n_classes: int = 200, m: int = 6, image_size: int = 448, channels: int = 2048, device: str = "cpu",
) -> Callable:
    "A function that runs the paper's attention, selection and zoom on given feature maps."
    torch.manual_seed(0)
    cells, region = image_size // 32, round(image_size * 5 / 14 / 2) * 2
    features = torch.rand(batch, channels, cells, cells, device=device)
    weight = torch.rand(n_classes, channels, device=device)
    images = torch.rand(batch, 3, image_size, image_size, device=device)
    grid = region_grid(image_size, cells, region).to(device)
    table = suppression_table(grid)
    def run():
        picks = propose_from_table(attention_map(features, weight), table, m)
        return zoom(images, grid[picks], image_size // 2, region)
    return run


def growth(make: Callable, sizes: tuple, repeats: int = 3, device: str = "cpu") -> dict:
    "Median seconds and peak bytes of `make(x)()` for each x, and the fitted exponents."
    works = {x: make(x) for x in sizes}
    times = take_turns(works, repeats, device=device)
    seconds = [middle(times[x])["median"] for x in sizes]
    memory = [peak_memory(work, device, warm=False) for work in works.values()]
    upper = slice(len(sizes) // 2, None)
    return dict(x=list(sizes), seconds=seconds, bytes=memory, time_exponent=exponent(sizes, seconds),
                memory_exponent=exponent(sizes, memory), upper_time_exponent=exponent(sizes[upper], seconds[upper]))


def bench_growth(
    arch="toy_resnet", image_size=224, batches=(1, 2, 4, 8, 16, 32, 64), image_sizes=(224, 320, 448, 640, 896),
    classes=(10, 100, 1000, 10_000), regions=(1, 2, 4, 8, 16), repeats=3, device="cpu",
) -> dict:
    "The series by name: a whole step with a small body, and locating alone with feature maps of ResNet-50."
    def step(batch, size=image_size, n=200, **options):
        return training_step(make_net(arch, size, n, device, **options), batch)
    where, series = partial(locating, device=device), partial(growth, repeats=repeats, device=device)
    return {"step, batch": series(lambda b: step(b), batches),
            "step, image size": series(lambda s: step(2, s), image_sizes),
            "step, classes": series(lambda n: step(8, n=n), classes),
            "step, m": series(lambda m: step(8, m=m, l=min(4, m)), regions),
            "locating, batch": series(lambda b: where(b), batches),
            "locating, image size": series(lambda s: where(4, image_size=s), image_sizes),
            "locating, classes": series(lambda n: where(4, n_classes=n), classes),
            "locating, m": series(lambda m: where(4, m=m), regions)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results; not given: they are printed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    found = dict(machine=machine(), growth=bench_growth(device=args.device))
    if args.out: args.out.write_text(json.dumps(found, indent=1))
    else: print(json.dumps(found, indent=1))
