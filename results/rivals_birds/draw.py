"""regions.jpg: what each method looks at, in the same test photographs.

    python results/rivals_birds/draw.py BIRDS MODEL...      (model folders; the method's name stands in their config)
"""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

from fd_focus.methods import method_name
from fd_focus.regions import draw_regions
from fd_focus.use.model_folder import load_focus
from fd_focus.use.predict import open_any, prepare

HERE = Path(__file__).parent


def photographs(birds: Path) -> list[Path]:
    "One of each of four classes that are there, none of which anybody has chosen for its looks."
    folders = sorted(folder for folder in birds.iterdir() if folder.is_dir())
    return [sorted(folder.glob("*.jpg"))[-1] for folder in folders[5::len(folders) // 4][:4]]


def main(birds: str, *models: str):
    files = photographs(Path(birds))
    fig, axes = plt.subplots(len(files), len(models), figsize=(1.9 * len(models), 2 * len(files)), squeeze=False,
                             layout="constrained")
    for column, model in zip(axes.T, models):
        net = load_focus(model).eval()
        size = net.about["input_size"]
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in net.stats)
        for ax, file in zip(column, files):
            image, _ = prepare(open_any(file)[0], net.about["resize"], size)
            pixels = torch.tensor(list(image.getdata()), dtype=torch.float).view(*size, 3).permute(2, 0, 1) / 255
            with torch.no_grad(): look = net.examine(((pixels - mean) / std)[None])
            draw_regions(ax, pixels, look.boxes[0] if look.boxes is not None else pixels.new_zeros(0, 4), 4)
            guess = net.classes[int(look.answer.argmax())].partition(".")[2].replace("_", " ")
            right = file.parent.name == net.classes[int(look.answer.argmax())]
            ax.set_title(guess, fontsize=7, color="green" if right else "red")
            ax.set(xticks=[], yticks=[])
        column[0].annotate(method_name(net), (.5, 1.22), xycoords="axes fraction", ha="center", fontsize=10)
    fig.savefig(HERE / "regions.png", dpi=90)
    Image.open(HERE / "regions.png").convert("RGB").save(HERE / "regions.jpg", quality=88)
    (HERE / "regions.png").unlink()


if __name__ == "__main__": main(*sys.argv[1:])
