"The rules that keep the house in order: arrows go one way, rooms stay small, nobody knows a method by name."
import ast
import json
import re
from pathlib import Path
from statistics import median

import pytest

root = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (root / "fd_focus").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
NOTEBOOKS = sorted(p for p in (root / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "_proc"} & set(p.parts))


def dotted(path: Path) -> str: return ".".join(path.relative_to(root).with_suffix("").parts)


def number(path: Path) -> int:
    "Of the notebook that a module is made from."
    return int(re.search(r"File to edit: .*?/(\d+)_", path.read_text(encoding="utf-8"))[1])


def imports(path: Path) -> set[str]:
    "Modules of the package that a module imports, wherever in it."
    package, found = dotted(path).split(".")[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) + 1 - node.level] if node.level else []
            where = ".".join([*base, *([node.module] if node.module else [])])
            names = [where, *(f"{where}.{alias.name}" for alias in node.names)]
        else: continue
        found |= {name for name in names if name.startswith("fd_focus.")}
    return found & {dotted(p) for p in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_arrows_go_one_way(path):
    numbers = {dotted(p): number(p) for p in MODULES}
    higher = {name for name in imports(path) if numbers[name] >= number(path)}
    assert not higher, f"{dotted(path)} ({number(path)}) imports {higher}: only modules of lower numbers, please"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def cells(path: Path) -> list[tuple[str, str]]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in found]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_one_idea(path):
    assert len(cells(path)) <= (42 if re.match(r"1\d_", path.name) else 75)
    exported = [source for kind, source in cells(path) if source.startswith("#| export")]
    assert not [source.split("\n")[1] for source in exported if source.count("\n") > 45]


def test_export_cells_are_short():
    exported = [source for path in NOTEBOOKS for kind, source in cells(path) if source.startswith("#| export")]
    assert median(source.count("\n") for source in exported) <= 14


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nobody_knows_a_method_by_name(path):
    "Only the modules of methods themselves, and what is made for one of them, name a network's class."
    own = re.compile(r"fd_focus\.(methods|focus|rivals\..*|evidence\.controls|all)")
    if own.fullmatch(dotted(path)): return
    used = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    assert not used & {"FocusNet", "PlainNet", "RandomRegionsNet", "MixedRegionsNet"}


def test_public_names():
    import fd_focus.all as everything
    names = [name for name in vars(everything) if not name.startswith("_")]
    assert sorted(everything.__all__) == sorted(set(everything.__all__)), "a name stands twice in fd_focus.all"
    assert set(names) == set(everything.__all__), set(names) ^ set(everything.__all__)
    import fastai.vision.all as fastai
    shadows = {name for name in everything.__all__ if getattr(fastai, name, None) is not None}
    assert not shadows - {"create_body"}, f"fd_focus.all would replace fastai's {shadows}"
