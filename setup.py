"Everything but the page for PyPI stands in pyproject.toml."
import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
for before, where in {r"(!\[[^]]*\]\()": "raw", r"(\]\()": "blob"}.items():      # links are relative in the repository
    readme = re.sub(before + r"(?!\w+:|#)", rf"\1https://github.com/fd-focus/fd_focus/{where}/main/", readme)
setup(long_description=readme, long_description_content_type="text/markdown")
