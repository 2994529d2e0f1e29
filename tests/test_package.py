"A wheel that installs without the tools of development, and a README that says what the notebooks say."
import ast
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

from make_readme import readme

root = Path(__file__).resolve().parent.parent


def test_readme_is_made_from_the_index():
    assert (root / "README.md").read_text() == readme()


def test_wheel_holds_every_module_and_imports_without_nbdev(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, root]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {p.relative_to(root).as_posix() for p in (root / "fd_focus").rglob("*.py")} <= set(names)
    assert any(name.endswith("entry_points.txt") for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = ("import sys; sys.modules['nbdev'] = sys.modules['execnb'] = None\n"      # importing them would fail
              "import fd_focus.all, fd_focus.use.cli; assert 'site' in fd_focus.all.__file__")
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=tmp_path / "site")


def test_no_machine_is_in_saved_outputs():
    "Paths of the machine that ran a notebook, and warnings with them, are not for readers."
    import json
    wrong = []
    for file in sorted((root / "nbs").rglob("*.ipynb")):
        for cell in json.loads(file.read_text())["cells"]:
            text = ""
            for output in cell.get("outputs", []):
                data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image")}
                text += json.dumps({**output, "data": data})
            if any(word in text for word in ("/site-packages/", "/home/", "/root/")):
                wrong.append(f"{file.name} {cell['id']}")
            assert '"output_type": "error"' not in text, f"{file.name} {cell['id']} holds an error"
    assert not wrong, wrong


def imported(tree) -> set[str]:
    "First words of the modules, but Python's and our own, that some code imports."
    names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"fd_focus"}


def test_what_is_imported_is_declared():
    "At the head of a module by the package itself (or by the extra that the module is for), within functions by any."
    called = dict(PIL="pillow", yaml="pyyaml", pillow_heif="pillow-heif", IPython="ipython")
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    declared = {key: set(re.findall(r"([a-z_-]+)[^ ]*", words)) for key, words in config["DEFAULT"].items()
                if key.endswith("requirements")}
    for module in (root / "fd_focus").rglob("*.py"):
        tree, own = ast.parse(module.read_text(encoding="utf-8")), declared.get(f"{module.stem}_requirements", set())
        head = {called.get(name, name) for name in imported(tree.body)}
        assert not head - declared["requirements"] - own, module.name
        anywhere = {called.get(name, name) for name in imported(ast.walk(tree))} - {"wandb"}     # asked for by name
        assert not anywhere - set().union(*declared.values()), module.name
