"""Where do trained networks point, and what would noise, the middle and another picture's regions have hit?

Rows of model folders (named BIRDS_VARIANT_SEED) for rows.csv, those that are not there yet:
    python results/birds_where/measure.py BIRDS MODEL...
Rows of the body that training starts from, with heads that know nothing, and with one fitted to its pooled features:
    python results/birds_where/measure.py BIRDS --untrained WEIGHTS
where.jpg, photographs with their parts, regions and maps:
    python results/birds_where/measure.py BIRDS --picture MODEL
"""
import argparse
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from fastai.data.transforms import Normalize

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.evidence.localisation import BIRD_GROUPS, localisation
from fd_focus.evidence.pointing import _first_maps, cam, point_with
from fd_focus.methods import PlainNet
from fd_focus.use.model_folder import load_focus

HERE = Path(__file__).parent
REGION, M = .5, 4       # the same regions for every network: of half the picture's side


def middle(net, x):
    "The middle of the picture, whatever it shows."
    rows, columns = (torch.hann_window(n + 2, periodic=False)[1:-1] for n in net.map_size)
    return (rows[:, None] * columns).expand(len(x), -1, -1).to(x.device)


WAYS = {"maximum of all CAMs": cam, "CAM of the answer": partial(cam, single=True),
        "Grad-CAM": partial(cam, single=True, sigma=0), "middle of the picture": middle}


def loaders_of(net, data):
    "The test pictures, prepared as in training."
    (height, width), about = net.about["input_size"], net.about
    if height != width: raise SystemExit(f"inputs of {height}x{width} pixels are no squares")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dls = FocusDataLoaders.from_folder(data, image_size=height, resize=about["resize"][0], squash=about["squash"],
                                           bs=32, num_workers=0)
    dls.add_tfms([Normalize.from_stats(*net.stats, cuda=False)], "after_batch")
    if getattr(net, "classes", list(dls.vocab)) != list(dls.vocab): raise SystemExit(f"other classes than in {data}")
    return dls


def rows_of(net, data):
    "One row for each way of pointing and metric. Pictures are read once."
    dls, found = loaders_of(net, data), []
    batches = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x, y in dls.valid]
    with torch.no_grad(): print(f"accuracy of the image head: {accuracy(net, batches):.1%}")
    kept = SimpleNamespace(valid=batches, valid_ds=dls.valid_ds, truth=dls.truth, table=dls.table)
    for way, attention in WAYS.items():
        look = point_with(attention, REGION, M)
        table = localisation(SimpleNamespace(model=net, dls=kept), look=look, groups=BIRD_GROUPS)
        found.append(table.rename_axis("metric").reset_index().assign(way=way))
    return pd.concat(found, ignore_index=True).round(5)


def untrained(weights, seed):
    "The body that training starts from, and random weights for the head."
    torch.manual_seed(seed)
    net = PlainNet.from_arch("mobilenet_v2", 50, weights=weights, image_size=112).eval()
    net.about = dict(input_size=[112, 112], resize=[128, 128], squash=True)
    return net


def head_only(weights, data, steps=300):
    "The body that training starts from, as it is, and a head fitted to the features of the training pictures."
    net = untrained(weights, 0)
    dls = loaders_of(net, data)
    items = list(dls.train_ds.items)
    with torch.no_grad(): features = torch.cat([net.body(x).mean((2, 3)) for x, *_ in dls.test_dl(items)])
    y = torch.tensor([dls.vocab.o2i[dls.table.label[str(item)]] for item in items])
    optimiser = torch.optim.AdamW(net.image_head.parameters(), lr=1e-2, weight_decay=.1)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net.image_head(features), y).backward()
        optimiser.step()
    return net.requires_grad_(False)


def accuracy(net, batches):
    "Share of the test pictures that the image head names, through the maps that `cam` reads."
    right = [(net.image_head(_first_maps(net, x).mean((2, 3))).argmax(1) == y).float() for x, y in batches]
    return torch.cat(right).mean().item()


def add_rows(networks, data, file=HERE / "rows.csv"):
    "Measure what is not in the file yet; networks of the same weights once, whatever head answers."
    columns = ["model", "seed", "way", "metric", "value", "chance", "another", "n", "weights"]
    rows = pd.read_csv(file, dtype={"weights": str}) if file.is_file() else pd.DataFrame(columns=columns)
    for model, seed, make in networks:
        net = make()
        weights = net.about.get("sha256", model)[:12]
        if len(same := rows[(rows.weights == weights) & ((weights != model[:12]) | (rows.seed == seed))]):
            print(f"{model}, seed {seed}: measured already, as {same.model.iloc[0]}, seed {same.seed.iloc[0]}")
            continue
        new = rows_of(net, data).assign(model=model, seed=seed, weights=weights)[columns]
        rows = pd.concat([rows, new], ignore_index=True) if len(rows) else new
        rows.sort_values(["model", "seed"], kind="stable").to_csv(file, index=False)
        print(f"{model}, seed {seed}: {len(new)} rows", flush=True)


def picture(folder, data, file=HERE / "where.jpg", n=5):
    "Photographs with their visible parts, the two best regions, and two maps."
    import matplotlib.pyplot as plt

    from fd_focus.attention import draw_attention
    from fd_focus.regions import draw_regions
    net = load_focus(folder)
    dls = loaders_of(net, data)
    items = list(dls.valid_ds.items)
    shown = items[7::len(items) // n][:n]               # none picked for what they show
    truth, batch = dls.truth(shown), dls.test_dl(shown, num_workers=0).one_batch()[0]
    pictures = Normalize.from_stats(*net.stats, cuda=False).decodes(batch)
    with torch.no_grad(): looks = [point_with(way, REGION, M)(net, batch) for way in list(WAYS.values())[:2]]
    fig, axes = plt.subplots(3, n, figsize=(1.9 * n, 6), layout="constrained")
    for i, item in enumerate(shown):
        name = Path(item).parent.name[4:].replace("_", " ")
        draw_regions(axes[0, i], pictures[i], looks[0].boxes[i], name, k=2)
        for row, (look, title) in enumerate(zip(looks, ("maximum of all CAMs", "CAM of the answer")), 1):
            draw_attention(axes[row, i], pictures[i], look.attention[i], title)
        for ax in axes[:, i]:
            ax.plot(*truth["parts"][i][truth["visible"][i], :2].T, "c.", ms=6, mec="k", mew=.6)
    fig.savefig(file, dpi=80, pil_kwargs={"quality": 82})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("birds", type=Path, help="folder of cub_birds50, with split.csv and parts.csv")
    parser.add_argument("models", nargs="*", type=Path, help="model folders")
    parser.add_argument("--untrained", type=Path, metavar="WEIGHTS", help="of MobileNetV2's body; seeds 0, 1, 2")
    parser.add_argument("--picture", type=Path, metavar="MODEL", help="draw where.jpg with this one")
    args = parser.parse_args()
    networks = [(folder.name.rpartition("_")[0].removeprefix(f"{args.birds.name}_"),
                 int(folder.name.rpartition("_")[2]), partial(load_focus, folder)) for folder in args.models]
    if args.untrained:
        networks += [("untrained", seed, partial(untrained, args.untrained, seed)) for seed in range(3)]
        networks.append(("head only", 0, partial(head_only, args.untrained, args.birds)))
    add_rows(networks, args.birds)
    if args.picture: picture(args.picture, args.birds)
