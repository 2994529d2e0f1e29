"Cleaning and exporting a copy of the notebooks must give exactly the files that are in the working tree."
import filecmp, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
ignore = shutil.ignore_patterns(".venv*", ".git", "runs", "__pycache__", "*.egg-info", ".pytest_cache", ".hypothesis",
                                "build", "dist", ".ipynb_checkpoints", "_docs", "_proc")
OWN = ("py.typed", "data/__init__.py")        # of the package, and of no notebook


def tree(folder):
    "Every file below `folder`, relative, without caches."
    return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()
            and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}


with tempfile.TemporaryDirectory() as tmp:
    copy = Path(tmp) / root.name
    shutil.copytree(root, copy, ignore=ignore)
    shutil.rmtree(copy / "fd_focus")          # a module without a notebook must not survive
    for own in OWN:
        (copy / "fd_focus" / own).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "fd_focus" / own, copy / "fd_focus" / own)
    for tool in ("nbdev_clean", "nbdev_export"):
        subprocess.run([str(Path(sys.executable).parent / tool)], cwd=copy, check=True)
    wrong = []
    for part in ("nbs", "fd_focus"):
        ours, fresh = tree(root / part), tree(copy / part)
        wrong += [f"{part}/{p}: not produced by nbdev_export" for p in sorted(ours - fresh)]
        wrong += [f"{part}/{p}: not committed" for p in sorted(fresh - ours)]
        wrong += [f"{part}/{p}: differs" for p in sorted(ours & fresh)
                  if not filecmp.cmp(root / part / p, copy / part / p, shallow=False)]
if wrong: sys.exit("Notebooks and package are out of step; run nbdev_clean and nbdev_export:\n  " + "\n  ".join(wrong))
print("notebooks and package are in step")
