"""How well does a trained model tell pictures of classes that it was not taught?

Adds rows to rows.csv, one a score; a model that is there already is left alone:
    python results/unknown/measure.py MODEL DATA [--left_out FOLDER] [--name NAME] [--seed SEED] [--device cuda]
MODEL is the folder of a model that was trained without some classes. DATA is what it was trained from, a folder with
split.csv or class folders; pictures there of classes that the model does not know are the unknown ones, and FOLDER
gives more of them, or others.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from fd_focus.data.tables import class_folders, csv_rows
from fd_focus.use.features import Features
from fd_focus.use.files import find_pictures
from fd_focus.use.predict import FocusClassifier
from fd_focus.use.seen import seen_before
from fd_focus.use.unknown import choose_known, compare_scores, tell_apart

HERE = Path(__file__).parent


def pictures_of(data, model, classes, left_out):
    "file, label, part: what the model was trained on, what chooses, what judges, and what it does not know."
    file = data / "split.csv"
    table = csv_rows(file) if file.is_file() else class_folders(data)
    table = table.assign(file=[str(data / name) for name in table.file])[["file", "label"]]
    part = pd.Series(seen_before(table.file, model), index=table.index).replace("", "test")
    if not (part == "train").any(): raise SystemExit(f"{model} has not seen the pictures in {data}, or has no seen.csv")
    valid = np.flatnonzero((part == "valid") & table.label.isin(classes))
    if not ((part == "test") & table.label.isin(classes)).any(): part.iloc[valid[::2]] = "test"    # half of those chose
    table["part"] = part.where(table.label.isin(classes), "unknown")
    if left_out:
        more = pd.DataFrame(dict(file=list(find_pictures([str(left_out)])), part="unknown"))
        table = pd.concat([table, more])
    counts = table.part.value_counts()
    if len(counts) < 4: raise SystemExit(f"train, valid, test and unknown pictures are needed, not {dict(counts)}")
    return table.reset_index(drop=True)


def rows_of(classifier, table):
    "A row a score, and what passes the limit that validation pictures chose."
    found: dict[str, Features] = {}
    for part, rows in table.groupby("part"):
        found[part] = classifier.features(list(rows.file))
        print(f"{part}: {found[part]}", flush=True)
    labels = table.drop_duplicates("file").set_index("file").label
    train, valid, test, unknown = (found[part] for part in ("train", "valid", "test", "unknown"))
    def classes(some): return np.array([classifier.classes.index(labels[file]) for file in some.sources])
    known = choose_known(train.image, classes(train), valid.image, valid.logits, classes(valid))
    both = [(part.image, part.logits) for part in (valid, test, unknown)]
    rows = compare_scores(train.image, *both)
    answer = tell_apart(1 - test.probability, 1 - unknown.probability)          # of the answer, not of the image head
    rows = pd.concat([pd.DataFrame([dict(score="probability of the answer") | answer]), rows])
    passed = [(known.novelty(*part) <= known.limit).mean() for part in both[1:]]
    right = np.mean([classifier.classes[i] == label for i, label in zip(classes(test), test.labels)])
    return rows.assign(known=len(test), unknown=len(unknown), chosen=rows.score == f"{known.score} {known.k}",
                       known_pass=passed[0], unknown_pass=passed[1], accuracy=right).round(4)


def add_rows(args, file=HERE / "rows.csv"):
    classifier = FocusClassifier.load(args.model, args.device)
    config = classifier.config
    weights, rows = config.get("sha256", str(args.model))[:12], pd.read_csv(file) if file.is_file() else None
    if rows is not None and (rows.weights == weights).any(): raise SystemExit(f"{args.model}: measured already")
    table = pictures_of(args.data, args.model, classifier.classes, args.left_out)
    out = sorted(set(table.label.dropna()) - set(classifier.classes)) or [args.left_out.name]
    about = dict(data=args.data.name, model=args.name or args.model.name, seed=args.seed, method=config["method"],
                 arch=config["arch"], left_out=" ".join(out), weights=weights)
    new = rows_of(classifier, table)
    new = pd.concat([pd.DataFrame([about] * len(new), index=new.index), new], axis=1)
    pd.concat([rows, new]).to_csv(file, index=False)
    print(new[["score", "auroc", "fpr", "chosen", "known_pass", "unknown_pass"]].to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("data", type=Path, help="folder of the pictures, with split.csv or class folders")
    parser.add_argument("--left_out", type=Path, help="folder of pictures of unknown classes")
    parser.add_argument("--name", help="of the variant; not given: the model folder's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda")
    add_rows(parser.parse_args())
