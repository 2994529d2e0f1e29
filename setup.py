"Package metadata, all of it read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(root / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
licenses = {"apache2": "License :: OSI Approved :: Apache Software License"}
statuses = ["", "1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]
py_versions = ["3.11", "3.12", "3.13", "3.14"]
readme = root / "README.md"
extras = {key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status'])]}",
        "Intended Audience :: Developers",
        f"Natural Language :: {cfg['language']}",
        *[f"Programming Language :: Python :: {v}" for v in py_versions],
    ],
    packages=find_packages(include=["fd_focus", "fd_focus.*"]),
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require=extras | {"dev": sorted({r for names in extras.values() for r in names})},
    python_requires=f">={cfg['min_python']}",
    entry_points={
        "console_scripts": cfg.get("console_scripts", "").split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
