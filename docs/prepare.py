"""Pages for Sphinx from the notebooks as they lie, nothing executed: `python docs/prepare.py FOLDER`.
Hidden cells and `#|` lines go, a gallery comes first, and the parts are those of the table in index.ipynb."""
import base64
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

from PIL import Image

root = Path(__file__).resolve().parent.parent
GITHUB = "https://github.com/fd-focus/fd_focus/blob/main"
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\((?!\w+:|#)([^)\s]+)\)")
ICONS = ".jpg", ".jpeg", ".png"
GALLERY = """# fd_focus

Fine-grained image classification that looks twice, and shows where. Each picture below is the output of a notebook, and
leads to it. [Start here](nbs/index.ipynb), or with [an overview of the method](nbs/00_overview.ipynb).

"""


def notebooks() -> dict[str, list[str]]:
    "Part -> its notebooks, by the table in index.ipynb; those that it does not name yet stand with their neighbours."
    text = "".join("".join(cell["source"]) for cell in json.loads((root / "nbs/index.ipynb").read_text())["cells"])
    parts = {row[1]: re.findall(r"\(([\w/]+)\.ipynb\)", row[2])
             for row in re.finditer(r"^\| ([a-z ]+) \| (\[.*) \|$", text, re.M) if ".ipynb)" in row[2]}
    named = {name: part for part, names in parts.items() for name in names}
    for file in sorted([*(root / "nbs").glob("[0-9]*.ipynb"), *(root / "nbs/tutorials").glob("*.ipynb")]):
        name = file.relative_to(root / "nbs").with_suffix("").as_posix()
        if name in named: continue
        before = [other for other in named if other < name and ("/" in other) == ("/" in name)]
        named[name] = named[max(before)]
        parts[named[name]] = sorted([*parts[named[name]], name])
    return parts


def linked(text: str, name: str, site: Path) -> str:
    "Relative links that work from the site: pictures are copied, notebooks stay, other files are those on GitHub."
    def target(link):
        shown, words, path = link.groups()
        file = Path(os.path.normpath((root / "nbs" / name).parent / path.partition("#")[0])).relative_to(root)
        if shown or file.suffix in ICONS:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, site / file)
        elif file.suffix != ".ipynb": path = f"{GITHUB}/{file.as_posix()}"
        return f"{shown}[{words}]({path})"
    return LINK.sub(target, text)


def page(notebook: dict, name: str, site: Path) -> dict:
    "A notebook as a reader of the site sees it."
    cells = []
    for cell in notebook["cells"]:
        source, outputs = "".join(cell["source"]), cell.get("outputs", [])
        flags = set(re.findall(r"^#\|\s*([\w-]+)", source, re.M))
        if flags & {"hide", "default_exp"}: continue
        if "echo" in flags: cell["metadata"]["tags"] = ["remove-input"]
        if cell["cell_type"] == "markdown": source = linked(source, name, site)
        for output in outputs:
            data = output.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = linked("".join(data["text/markdown"]), name, site)
            for kind in [kind for kind in data if "widget" in kind]: del data[kind]
        cells.append(cell | dict(source=re.sub(r"^#\|.*\n?", "", source, flags=re.M)))
    return notebook | dict(cells=[cell for cell in cells if cell["source"].strip() or cell.get("outputs")])


def picture(notebook: dict) -> Image.Image | None:
    "The largest picture among a notebook's outputs, as wide as a card."
    data = [output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    found = [Image.open(io.BytesIO(base64.b64decode("".join(one[kind])))).convert("RGB")
             for one in data for kind in ("image/png", "image/jpeg") if kind in one]
    found = [image for image in found if .5 < image.width / image.height < 5]
    if not found: return None
    best = max(found, key=lambda image: image.width * image.height)
    best.thumbnail((640, 640))
    return best


def heading(notebook: dict) -> tuple[str, str]:
    "Title and subtitle."
    text = "".join(notebook["cells"][0]["source"])
    subtitle = re.search(r"^> (.*)", text, re.M)
    return re.search(r"^# (.*)", text, re.M)[1], re.sub(r"[*`$]", "", subtitle[1]) if subtitle else ""


def card(name: str, notebook: dict, site: Path) -> str:
    "Of the gallery; nothing for a notebook without a picture."
    image, (title, subtitle) = picture(notebook), heading(notebook)
    if image is None: return ""
    file = site / "gallery" / f"{name.replace('/', '_')}.png"
    file.parent.mkdir(exist_ok=True)
    image.save(file)
    return (f":::{{grid-item-card}} {title}\n:link: nbs/{name}\n:link-type: doc\n:img-top: gallery/{file.name}\n"
            f":img-alt: A picture from this notebook\n\n{subtitle}\n:::\n\n")


def toctree(caption: str, names: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", "", ""])


def modules() -> list[str]:
    files = sorted((root / "fd_focus").rglob("*.py"))
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files if not file.name.startswith("_")]
    return [name for name in names if name != "fd_focus.all"]        # it gives out what the others define


def build(site: Path):
    "The whole source of the site."
    shutil.rmtree(site, ignore_errors=True)
    (site / "api").mkdir(parents=True)
    gallery, trees = GALLERY, toctree("start", ["Start here <nbs/index>"])
    parts = notebooks()
    for part, names in {"": ["index"], **parts}.items():
        cards = ""
        for name in names:
            notebook = json.loads((root / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
            target = site / "nbs" / f"{name}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(page(notebook, name, site)), encoding="utf-8")
            if part: cards += card(name, notebook, site)
        if cards: gallery += f"## {part.capitalize()}\n\n::::{{grid}} 1 2 2 2\n:gutter: 3\n\n{cards}::::\n\n"
        if part: trees += toctree(part, [f"nbs/{name}" for name in names])
    for name in modules():
        text = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"
        (site / "api" / f"{name}.rst").write_text(text)
    (site / "index.md").write_text(gallery + trees + toctree("reference", [f"api/{name}" for name in modules()]))


if __name__ == "__main__": build(Path(sys.argv[1]))
