"""Do the defaults win on a small folder? Eight sedans with 30 photographs each, as a new user would have them.

    python results/small_folder/measure.py CARS WEIGHTS WORK --seed 0 [--recipes plain default ...]

CARS has a folder a class (cars_sedan33), WEIGHTS is a file for MobileNetV2. A seed draws the classes, their photographs
and the training. fd_focus_train has the 30 of each and keeps a fifth back to choose by; all other photographs judge, by
fd_focus_predict. rows.csv gets a row a training, answers.csv what it answered; what is there already is left alone.
"""
import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
RECIPES = {"plain": "--method plain", "default": "",
           "plain, 8 a batch": "--method plain --bs 8", "default, 8 a batch": "--bs 8",
           "plain, 45 epochs": "--method plain --epochs 45",      # as long as the default takes
           "plain, 45 epochs, 8 a batch": "--method plain --epochs 45 --bs 8",
           "probe": "--method probe"}


def small_folder(cars: Path, work: Path, seed: int, classes=8, each=30):
    "Links to the photographs to train on, a folder a class, and to the rest: photos, rest."
    rng, photos, rest = np.random.default_rng(seed), work / f"seed{seed}/photos", work / f"seed{seed}/rest"
    names = sorted(place.name for place in cars.iterdir() if place.is_dir())
    for name in sorted(rng.choice(names, classes, replace=False)):
        files = rng.permutation(sorted((cars / name).glob("*.jpg")))
        for i, file in enumerate(files):
            link = (photos if i < each else rest) / name / Path(file).name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists(): link.symlink_to(Path(file).resolve())
    return photos, rest


def train(photos, weights, out, flags, seed):
    "What the run has to say of itself, by `fd_focus_train` if it has not been made yet."
    file = out / "summary.json"
    words = ["--data", photos, "--arch", "mobilenet_v2", "--weights", weights, "--image_size", "224", "--workers", "0"]
    words += ["--seed", str(seed), "--out", out, *flags.split()]
    if not file.exists(): subprocess.run(["fd_focus_train", *words], check=True)
    return json.loads(file.read_text())


def answers(model, rest, out):
    "A row a photograph: its class, the answer, whether it counts as sure, and whether it needed a second look."
    subprocess.run(["fd_focus_predict", model, rest, "--out", out], check=True)
    kept = ["file", "answer", "probability", "sure", "looked_again"]
    table = pd.read_csv(out).rename(columns=dict(label="answer"))[kept]
    files = [Path(file) for file in table.file]
    return table.assign(file=[file.name for file in files], label=[file.parent.name for file in files])


def add(file, new):
    old = [pd.read_csv(file)] if file.exists() else []
    pd.concat([*old, new]).to_csv(file, index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cars", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    asked = parser.parse_args()
    photos, rest = small_folder(asked.cars, asked.work, asked.seed)
    rows = HERE / "rows.csv"
    for name in asked.recipes:
        done = pd.read_csv(rows) if rows.exists() else pd.DataFrame(columns=["recipe", "seed"])
        if ((done.recipe == name) & (done.seed == asked.seed)).any(): continue
        out = asked.work / f"seed{asked.seed}" / name.replace(",", "").replace(" ", "_")
        summary = train(photos, asked.weights.resolve(), out, RECIPES[name], asked.seed)
        table = answers(out / "model", rest, out / "rest.csv")
        right = table.answer == table.label
        add(HERE / "answers.csv", table.assign(recipe=name, seed=asked.seed))
        row = dict(recipe=name, seed=asked.seed, accuracy=right.mean(), pictures=len(table), sure=table.sure.mean(),
                   sure_and_wrong=(table.sure & ~right).sum(), looked_again=(table.looked_again == True).mean(),  # noqa
                   chosen_by=summary["accuracy"], seconds=summary["seconds"])
        add(rows, pd.DataFrame([row]).round(4))
        print(row, flush=True)


if __name__ == "__main__": main()
