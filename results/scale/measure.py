"""How many small pictures a second do one and two actors of Ray answer, against the plain command?

Writes rows.csv, a row a way and round; rounds take turns, so that a busy minute falls on all ways alike:
    python results/scale/measure.py MODEL [--pictures 10000] [--rounds 3]
The pictures are drawn toy birds of 96 pixels, as JPEG files. `whole` is the time of the command. `seconds` is what the
command says: with Ray, the model's loading in each actor is in it, and Ray's own start is not.
"""
import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from fd_focus.toy import ToyBirds

HERE, BIN = Path(__file__).parent, Path(sys.executable).parent


def draw(folder, number):
    "Pictures, a thousand different ones under many names."
    birds = ToyBirds("test", images_per_class=125, n_classes=8, image_size=96)
    for i in range(number):
        file = folder / f"{i // 1000:03d}" / f"{i % 1000:03d}.jpg"
        file.parent.mkdir(exist_ok=True)
        birds[i % len(birds)][0].save(file, quality=90)


def measure(model, pictures, way, words, bs):
    "One run of the command."
    with tempfile.TemporaryDirectory() as out:
        place = Path(out) / ("rows.csv" if way == "plain" else "rows")
        start = time.perf_counter()
        command = [BIN / "fd_focus_predict", model, pictures, "--out", place, "--bs", str(bs), "--device", "cpu"]
        run = subprocess.run([*command, *words], stderr=subprocess.PIPE, text=True)
        whole = time.perf_counter() - start
    found = re.search(r"(\d+) pictures in ([\d.]+) s", run.stderr)
    if run.returncode or not found: raise SystemExit(run.stderr)
    seconds = float(found[2])
    return dict(way=way, pictures=int(found[1]), bs=bs, seconds=seconds, whole=round(whole, 1),
                a_second=round(int(found[1]) / seconds, 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bs", type=int, default=16)
    args = parser.parse_args()
    ways = dict(plain=[], **{f"{n} actor{'s' * (n > 1)}": ["--ray", "--actors", str(n)] for n in (1, 2)})
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), args.pictures)
        rows = [dict(round=number, cores=os.cpu_count(), machine=platform.machine(), model=args.model.name)
                | measure(args.model, folder, way, words, args.bs)
                for number in range(args.rounds) for way, words in ways.items()]
    print(table := pd.DataFrame(rows))
    table.to_csv(HERE / "rows.csv", index=False)
