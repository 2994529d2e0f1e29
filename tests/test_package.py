"A wheel that installs without the tools of development, and a README that says what the notebooks say."
import subprocess
import sys
import zipfile
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
