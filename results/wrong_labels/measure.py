"""How many planted wrong labels are found, and how many right ones are named?

    python results/wrong_labels/measure.py CARS WEIGHTS WORK

CARS has a folder a class (cars_sedan33). One photograph in twenty gets the label of another class, drawn at random.
`fd_focus_experiment --methods probe --folds 5` names those whose label looks wrong. rows.csv gets a row, wrong.jpg the
first of them.
"""
import argparse
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

HERE = Path(__file__).parent


def plant(cars: Path, folder: Path, share: float, seed: int) -> pd.Series:
    "A folder with all photographs and a split.csv, a part of whose labels is wrong. File -> label as it should be."
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(file.relative_to(cars).as_posix() for file in cars.glob("*/*.jpg"))
    for place in sorted(cars.iterdir()):
        if place.is_dir() and not (folder / place.name).exists(): (folder / place.name).symlink_to(place.resolve())
    right = pd.Series([file.split("/")[0] for file in files], index=files)
    rng, given, names = np.random.default_rng(seed), right.copy(), sorted(set(right))
    for i in rng.choice(len(files), round(share * len(files)), replace=False):
        given.iloc[i] = rng.choice([name for name in names if name != right.iloc[i]])
    pd.DataFrame(dict(file=files, label=given.to_numpy())).to_csv(folder / "split.csv", index=False)
    return right


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cars", type=Path)
    parser.add_argument("weights")
    parser.add_argument("work", type=Path)
    parser.add_argument("--share", type=float, default=.05)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    right = plant(asked.cars, asked.work / "photos", asked.share, asked.seed)
    command = ["fd_focus_experiment", "--methods", "probe", "--folds", "5", "--data", asked.work / "photos", "--arch"]
    command += ["mobilenet_v2", "--weights", asked.weights, "--image_size", "224", "--rival", "probe"]
    subprocess.run([*command, "--out", asked.work / "folds"], check=True)
    joined = asked.work / "folds/out_of_fold"
    given = pd.read_csv(asked.work / "photos/split.csv").set_index("file").label
    wrong = set(given.index[given != right])
    named = pd.read_csv(joined / "labels.csv").query("likely")
    files = [Path(file).relative_to(asked.work / "photos").as_posix() for file in named.file]
    found = [file in wrong for file in files]
    mended = sum(right[file] == suggested for file, suggested, hit in zip(files, named.suggested, found) if hit)
    n = len(wrong)
    row = dict(pictures=len(right), planted=n, named=len(files), found=sum(found), found_in_first=sum(found[:n]),
               found_in_twice=sum(found[:2 * n]), mended=mended, seed=asked.seed,
               accuracy=pd.read_csv(joined / "rows.csv").accuracy[0])
    file = HERE / "rows.csv"
    rows = [pd.read_csv(file)] if file.exists() else []
    pd.concat([*rows, pd.DataFrame([row])]).to_csv(file, index=False)
    Image.open(joined / "labels.png").convert("RGB").save(HERE / "wrong.jpg", quality=85)
    print(row)


if __name__ == "__main__": main()
