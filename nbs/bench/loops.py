"""Selection, zoom and whole steps with loops over pictures, as public code has them, timed beside the library's.

    python nbs/bench/loops.py --out results/bench/loops.json
"""
import argparse
import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch as replaced

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from fd_focus.attention import attention_map
from fd_focus.evidence.timing import machine, make_net, middle, prediction, ratio, take_turns, training_step
from fd_focus.methods import Method
from fd_focus.regions import propose, propose_from_table, region_grid, suppression_table
from fd_focus.training.machine import keep_memory
from fd_focus.training.speed import peak_memory
from fd_focus.zoom import zoom
from torch import Tensor


def numpy_nms(
    rows: np.ndarray,       # (N,6) score, x0, y0, x1, y1, index
    m: int,
    iou_threshold: float,
) -> list[int]:             # indices, best first
    "Greedy NMS of one picture in NumPy, stopped after `m`."
    rows, picks = rows[rows[:, 0].argsort()], []
    while len(rows):
        best, rows = rows[-1], rows[:-1]
        picks.append(int(best[5]))
        if len(picks) == m: break
        low, high = np.maximum(rows[:, 1:3], best[1:3]), np.minimum(rows[:, 3:5], best[3:5])
        sides = np.maximum(high - low, 0)
        shared = sides[:, 0] * sides[:, 1]
        areas = (rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])
        rows = rows[shared / (areas + (best[3] - best[1]) * (best[4] - best[2]) - shared) <= iou_threshold]
    return picks


def numpy_propose(attention: Tensor, boxes: Tensor, m: int = 6, iou_threshold: float = .25) -> Tensor:
    "(B,m) indices, picture by picture in NumPy."
    corners, index = boxes.cpu().numpy(), np.arange(len(boxes))[:, None]
    rows = [np.concatenate([scores[:, None], corners, index], 1) for scores in attention.flatten(1).cpu().numpy()]
    return torch.tensor([numpy_nms(picture, m, iou_threshold) for picture in rows], device=attention.device)


def torchvision_propose(attention: Tensor, boxes: Tensor, m: int = 6, iou_threshold: float = .25) -> Tensor:
    "(B,m) indices, picture by picture with `torchvision.ops.nms`."
    return torch.stack([torchvision.ops.nms(boxes, scores, iou_threshold)[:m] for scores in attention.flatten(1)])


def sliced_zoom(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    "(B,m,3,size,size), crop by crop: slice, then interpolate."
    def one(image, x0, y0, x1, y1):
        region = image[None, :, int(y0):int(y1), int(x0):int(x1)]
        return F.interpolate(region, size=(size, size), mode="bilinear", align_corners=False)
    return torch.stack([torch.cat([one(image, *box) for box in rows]) for image, rows in zip(images, boxes.tolist())])


@torch.no_grad()
def sliced_crops(images: Tensor, boxes: Tensor, size: tuple[int, int], points: int = 1) -> Tensor:
    "(B,k,3,*size), crop by crop: zeros around the picture, corners at whole pixels, slice, interpolate."
    pads = [side // 2 for side in images.shape[2:]]
    padded = F.pad(images, (pads[1], pads[1], pads[0], pads[0]))
    corners = (boxes + boxes.new_tensor([pads[1], pads[0]] * 2)).int().tolist()
    crops = images.new_zeros(*boxes.shape[:2], 3, *size)
    for i, rows in enumerate(corners):
        for j, (x0, y0, x1, y1) in enumerate(rows):
            part = padded[i:i + 1, :, y0:y1, x0:x1]
            crops[i, j] = F.interpolate(part, size=size, mode="bilinear", align_corners=True)[0]
    return crops


@contextmanager
def with_loops(net: Method):
    "While open, a `NavigatorNet` selects in NumPy, picture by picture, and cuts crop by crop."
    def select(scores, table, m): return numpy_propose(scores.detach(), net.anchors, m, net.iou_threshold)
    with replaced("fd_focus.rivals.nts.propose_from_table", select), \
         replaced("fd_focus.rivals.nts.padded_crops", sliced_crops): yield net


def _in_turns(works: dict, repeats: int, device: str, calls: int = 1, kept: bool = False) -> dict:
    "`times` of every work in seconds a call, and `ratios` of each to 'batched'."
    keep_memory(kept)
    try: times = {k: [t / calls for t in v] for k, v in take_turns(works, repeats, 2, device).items()}
    finally: keep_memory(False)
    return dict(times={k: middle(v) for k, v in times.items()},
                ratios={k: ratio(v, times["batched"]) for k, v in times.items() if k != "batched"})


def bench_naive(image_size=448, batch=16, channels=2048, stride=32, repeats=9, device="cpu") -> dict:
    "Batched selection and zoom (in kept and in new memory) against loops; attention with 10,000 classes."
    torch.manual_seed(0)
    region, size, cells = round(image_size * 5 / 14 / 2) * 2, image_size // 2, image_size // stride
    grid = region_grid(image_size, cells, region).to(device)
    attention, table = torch.rand(batch, cells, cells, device=device), suppression_table(grid)
    images = torch.rand(batch, 3, image_size, image_size, device=device)
    boxes = grid[propose_from_table(attention, table)]
    def many(work): return lambda: [work() for _ in range(20)]       # one call is too short to time
    selection = dict(batched=many(lambda: propose_from_table(attention, table)),
                     batched_with_table=many(lambda: propose(attention, grid)),
                     numpy_loop=many(lambda: numpy_propose(attention, grid)),
                     torchvision_loop=many(lambda: torchvision_propose(attention, grid)))
    roi_align = partial(torchvision.ops.roi_align, sampling_ratio=1, aligned=True)
    enlarging = dict(batched=lambda: zoom(images, boxes, size, region), slices=lambda: sliced_zoom(images, boxes, size),
                     grid_sample=lambda: zoom(images, boxes, size).contiguous(),
                     roi_align=lambda: roi_align(images, list(boxes), size))
    features = torch.rand(batch, channels, cells, cells, device=device)
    weight = torch.rand(10_000, channels, device=device)
    def attend(): return attention_map(features, weight)
    many_classes = dict(features_bytes=features.numel() * 4, peak_bytes=peak_memory(attend, device),
                        seconds=middle(take_turns(dict(a=attend), 2, 0, device)["a"]))
    return dict(batch=batch, image_size=image_size, device=device, propose=_in_turns(selection, repeats, device, 20),
                zoom=_in_turns(enlarging, repeats, device, kept=True),
                zoom_new_pages=_in_turns(enlarging, repeats, device),
                attention_10000_classes=many_classes)


def bench_loops(arch="resnet50", image_size=448, batch=16, n_classes=200, repeats=5, device="cpu") -> dict:
    "A training step and an answer of FocusNet, of NTS-Net, and of NTS-Net with loops; `ratios` are to NTS-Net batched."
    nets = {name: make_net(arch, image_size, n_classes, device, method) for name, method in
            (("focus", "focus"), ("nts", "nts"), ("nts with loops", "nts"))}
    def inside(net, work):
        def run():
            with with_loops(net): work()
        return run
    found = dict(arch=arch, image_size=image_size, batch=batch, device=device, threads=torch.get_num_threads())
    for what, make in (("step", training_step), ("answer", prediction)):
        works = {name: make(net, batch) for name, net in nets.items()}
        works["nts with loops"] = inside(nets["nts with loops"], works["nts with loops"])
        times = take_turns(works, repeats, device=device)
        found[what] = dict(times={name: middle(seconds) for name, seconds in times.items()},
                           ratios={name: ratio(seconds, times["nts"]) for name, seconds in times.items()})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results; not given: they are printed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16, help="pictures a batch of 448 pixels, ResNet-50")
    args = parser.parse_args()
    found = dict(machine=machine(), naive=bench_naive(batch=args.batch, device=args.device),
                 steps=bench_loops(batch=args.batch, device=args.device))
    if args.out: args.out.write_text(json.dumps(found, indent=1))
    else: print(json.dumps(found, indent=1))
