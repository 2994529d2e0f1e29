"A release that installs without the tools of development, and a README that says what the notebooks say."
import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from importlib.metadata import PathDistribution
from pathlib import Path

import fd_focus
import pytest
import yaml
from release import try_wheel

root = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_readme_is_made_from_the_index():
    from make_readme import readme          # nbconvert takes seconds, which not every worker of pytest need spend
    assert (root / "README.md").read_text() == readme()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Folder with the source distribution and the wheel that is made from it."
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, root]
    subprocess.run(build, check=True, capture_output=True)
    return folder


def test_wheel_holds_every_module_and_nothing_else(built):
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    modules = {p.relative_to(root).as_posix() for p in (root / "fd_focus").rglob("*.py")} - {"fd_focus/_modidx.py"}
    assert {name for name in names if ".dist-info/" not in name} == modules | {"fd_focus/py.typed"}
    with tarfile.open(next(built.glob("*.tar.gz"))) as source:
        inside = {name.partition("/")[2] for name in source.getnames()}
    assert {"pyproject.toml", "settings.ini", "setup.py", "CITATION.cff", "CHANGELOG.md", "LICENSE"} <= inside
    assert not [name for name in inside if name.startswith(("tests", "nbs", "results"))]


def test_metadata_says_what_the_project_says(built):
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(built / "site")
    found = PathDistribution(next((built / "site").glob("*.dist-info")))
    assert (found.name, found.version) == (PROJECT["name"], fd_focus.__version__)
    assert found.metadata["License-Expression"] == "Apache-2.0" and found.metadata["Requires-Python"] == ">=3.11"
    assert set(found.metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert {entry.name: entry.value for entry in found.entry_points} == PROJECT["scripts"]
    links = re.findall(r"\]\(([^)]+)\)", found.metadata.get_payload())
    assert links and all(link.startswith(("https://", "#")) for link in links), "a page of PyPI has no files beside it"


@pytest.mark.slow
def test_wheel_works_in_an_empty_folder(built):
    found = try_wheel(next(built.glob("*.whl")))
    assert found["version"] == fd_focus.__version__ and not found["index"]
    assert set(found["commands"]) == set(PROJECT["scripts"])


def settings_ini() -> dict:
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_settings_of_nbdev_agree_with_the_project():
    "The version stands in settings.ini alone, what pip needs in pyproject.toml alone; the rest is the same in both."
    nbdev = settings_ini()
    assert nbdev["version"] == fd_focus.__version__, "run nbdev_export: it writes the version into the package"
    assert nbdev["lib_name"] == PROJECT["name"] and nbdev["description"] == PROJECT["description"]
    assert PROJECT["requires-python"] == f">={nbdev['min_python']}" and PROJECT["urls"]["Source"] == nbdev["git_url"]
    assert PROJECT["authors"] == [dict(name=nbdev["author"], email=nbdev["author_email"])]
    assert PROJECT["urls"]["Homepage"] == nbdev["doc_host"] + nbdev["doc_baseurl"]
    twice = [key for key in nbdev if key.endswith("requirements") or key == "console_scripts"]
    assert not twice, f"{twice} of settings.ini belong into pyproject.toml"


def test_every_command_is_installed():
    import fd_focus.use.cli as cli
    assert {name for name in vars(cli) if name.startswith("fd_focus_")} == set(PROJECT["scripts"])


def test_changes_name_the_version():
    "The topmost heading is this version, or one that is not released yet, above it."
    heads = re.findall(r"^## (\S+)(.*)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    versions = [version for version, note in heads if "not released" not in note]
    assert len(heads) - len(versions) <= 1 and versions[0] == fd_focus.__version__
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == fd_focus.__version__ and citation["license"] == PROJECT["license"]


WORKFLOWS = sorted((root / ".github" / "workflows").glob("*.yml"))


YAML = [*sorted(root.glob(".github/**/*.yml")), root / ".pre-commit-config.yaml", root / "CITATION.cff"]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_can_be_read(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_workflows_run_what_make_runs():
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.M))
    called = set()
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
            assert all(line.startswith("make ") for line in lines), f"{path.name}: {lines}"
            called |= {line.split()[1] for line in lines}
    assert called == {"test", "demo", "test-newest", "test-lowest", "docs", "release"} and called <= targets


def test_no_machine_is_in_saved_outputs():
    "Paths of the machine that ran a notebook, and warnings with them, are not for readers."
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


def test_site_shows_every_notebook_without_what_is_hidden(tmp_path):
    subprocess.run([sys.executable, root / "docs" / "prepare.py", tmp_path / "site"], check=True)
    pages = {p.relative_to(tmp_path / "site").with_suffix("").as_posix(): json.loads(p.read_text())
             for p in (tmp_path / "site").rglob("*.ipynb")}
    notebooks = {p.relative_to(root).with_suffix("").as_posix() for p in (root / "nbs").glob("[!_]*.ipynb")}
    assert notebooks <= set(pages)
    front = (tmp_path / "site" / "index.md").read_text()
    assert all(re.search(rf"^{page}$|<{page}>", front, re.M) for page in pages), "a page is in no table of contents"
    for name, page in pages.items():
        sources = [cell["source"] for cell in page["cells"]]
        assert not [line for source in sources for line in source.split("\n") if line.startswith("#|")], name
        assert not any("nbdev_export()" in source for source in sources), name


def imported(tree) -> set[str]:
    "First words of the modules, but Python's and our own, that some code imports."
    names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"fd_focus"}


def test_what_is_imported_is_declared():
    "At the head of a module by the package itself (or by the extra that the module is for), within functions by any."
    called = dict(PIL="pillow", yaml="pyyaml", pillow_heif="pillow-heif", IPython="ipython")
    names = lambda words: {re.match(r"[\w-]+", word)[0] for word in words}
    package, extras = names(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    anybody = package.union(*map(names, extras.values()))
    for module in (root / "fd_focus").rglob("*.py"):
        tree, own = ast.parse(module.read_text(encoding="utf-8")), names(extras.get(module.stem, []))
        head = {called.get(name, name) for name in imported(tree.body)}
        assert not head - package - own, module.name
        anywhere = {called.get(name, name) for name in imported(ast.walk(tree))} - {"wandb"}     # asked for by name
        assert not anywhere - anybody, module.name


def test_the_data_package_has_the_names_of_its_modules():
    import fd_focus.data
    from fd_focus.data.benchmarks import aircraft_table
    assert callable(fd_focus.data.stratified_split)          # which has moved since
    assert fd_focus.data.aircraft_table is aircraft_table and not hasattr(fd_focus.data, "abacus")


TUTORIALS = sorted((root / "nbs/tutorials").glob("*.ipynb"))

def cells_of(notebook): return ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"]]

@pytest.mark.parametrize("notebook", TUTORIALS, ids=lambda file: file.stem)
def test_a_tutorial_opens_in_colab(notebook):
    title, first = cells_of(notebook)[:2]
    place = f"fd-focus/fd_focus/blob/main/nbs/tutorials/{notebook.name}"
    assert f"](https://colab.research.google.com/github/{place})" in title
    assert first == cells_of(TUTORIALS[0])[1], "the cell that installs is the same everywhere"


@pytest.mark.slow
def test_the_first_cell_of_a_tutorial_installs_the_library(tmp_path):
    "In a fresh environment; git takes this clone for the public one."
    python = tmp_path / "fresh/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "ipython"], check=True)
    script = tmp_path / "colab.ipy"
    shown = "import os\nimport fd_focus.all\nprint(fd_focus.__file__, os.getcwd())"
    script.write_text(f"{cells_of(TUTORIALS[0])[1]}\n{shown}")
    here = dict(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0=f"url.{root.as_uri()}.insteadOf",
                GIT_CONFIG_VALUE_0="https://github.com/fd-focus/fd_focus")
    done = subprocess.run([python, "-m", "IPython", script], cwd=tmp_path, env=os.environ | here, text=True,
                          capture_output=True)
    assert f"{tmp_path / 'fresh'}" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("fd_focus/nbs/tutorials")
