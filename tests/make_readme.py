"""README.md from nbs/index.ipynb: without hidden cells; cells with `echo: false` show only what they print.
`--check` only compares."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent


def readme() -> str:
    notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    cells = []
    for cell in notebook.cells:
        flags = set(re.findall(r"^#\|\s*(\S+)", cell.source, re.M))
        if flags & {"hide", "default_exp", "export"}: continue
        if "echo:" in flags:
            shown = [output.data for output in cell.outputs if "text/markdown" in output.get("data", {})]
            text = "\n".join(data["text/markdown"] for data in shown)
            cell = nbformat.v4.new_markdown_cell(text)
        cell.source = "\n".join(line for line in cell.source.split("\n") if not line.startswith("#|"))
        cells.append(cell)
    notebook.cells = cells
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    # Links and pictures in the notebook are relative to nbs/, in the README to the root.
    from_root = lambda link: f"]({(Path('nbs') / link[1]).as_posix()})".replace("nbs/../", "")
    body = re.sub(r"\]\((?!https?://|#|/)([^)]+)\)", from_root, body)
    return "<!-- Made from nbs/index.ipynb by `make readme`. -->\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    target = root / "README.md"
    if "--check" not in sys.argv: target.write_text(readme())
    elif target.read_text() != readme(): sys.exit("README.md is out of step with nbs/index.ipynb; run `make readme`")
