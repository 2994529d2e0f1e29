"""Try a wheel where the working tree cannot help: `python tests/release.py dist/*.whl` installs it without dependencies
into a fresh environment in an empty folder, where the packages of this Python stand by for them, and trains there."""
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

LOOK = '''
import json, sys
sys.modules["nbdev"] = sys.modules["execnb"] = None      # tools of development: importing them would fail
import fd_focus.all, fd_focus.use.cli
from importlib.metadata import distribution
from importlib.util import find_spec
found = distribution("fd_focus")
print(json.dumps(dict(file=fd_focus.__file__, version=found.version, index=bool(find_spec("fd_focus._modidx")),
                      commands=[entry.name for entry in found.entry_points])))
'''
TRAIN = "--data toy --arch toy_resnet --image_size 64 --images_per_class 8 --n_classes 4 --epochs 1 --bs 8 --out run"


def outside() -> dict[str, str]:
    "This environment without what could lead back to the working tree."
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | dict(OMP_NUM_THREADS="1")


def try_wheel(wheel: Path, train: bool = True) -> dict:
    "What the installed package says of itself; CalledProcessError where it does not install, import, answer or train."
    with tempfile.TemporaryDirectory() as tmp:
        run = lambda *words: subprocess.run(list(map(str, words)), check=True, cwd=tmp, env=outside(), text=True,
                                            stdout=subprocess.PIPE).stdout
        fresh = Path(tmp).resolve() / "fresh"
        venv.create(fresh, symlinks=True)
        site = Path(sysconfig.get_path("purelib", "venv", dict(base=fresh, platbase=fresh)))
        pip = [sys.executable, "-m", "pip", "--python", fresh / "bin" / "python"]
        run(*pip, "install", "-q", "--no-deps", wheel.resolve())
        (site / "standby.pth").write_text(sysconfig.get_path("purelib"))     # torch and all others need not come again
        found = json.loads(run(fresh / "bin" / "python", "-W", "ignore", "-c", LOOK).splitlines()[-1])
        assert Path(found["file"]).is_relative_to(fresh), f"imported from {found['file']}, not from the wheel"
        assert "--method" in run(fresh / "bin" / "fd_focus_train", "--help")
        if train: run(fresh / "bin" / "fd_focus_train", *TRAIN.split())
    return found


if __name__ == "__main__":
    for file in sys.argv[1:]:
        found = try_wheel(Path(file))
        print(f"fd_focus {found['version']}: installed, imported and trained from {file}")
