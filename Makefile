# `make demo` trains on the toy set and shows it; `make test` proves the library. Both set up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export MPLBACKEND ?= agg

.PHONY: setup demo test test-slow test-gpu test-newest test-lowest readme lint sync nbtest pytest release docs clean

setup: $(STAMP)
$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

# Method and plain backbone on toy birds, same recipe; `fd_focus_train --help` explains the options.
DEMO := --data toy --arch toy_resnet --cut layer2 --image_size 96 --mark_size 0.6 --epochs 24 --bs 32 --seed 0

demo: setup
	$(BIN)/fd_focus_train $(DEMO) --method plain --out runs/demo/plain --overwrite
	$(BIN)/fd_focus_train $(DEMO) --out runs/demo/focus --overwrite
	$(BIN)/fd_focus_compare runs/demo/plain runs/demo/focus

test: setup
	$(MAKE) --no-print-directory lint sync nbtest pytest

# Long lines, unused names and what bugbear finds, in notebooks and package.
lint: setup
	$(BIN)/ruff check .

# Notebooks are the source: cleaning and exporting them again must change nothing that is committed.
sync: setup
	$(BIN)/python tests/check_sync.py
	$(BIN)/python tests/make_readme.py --check

readme: setup
	$(BIN)/python tests/make_readme.py

# Two at a time, each with one thread.
nbtest: setup
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2

pytest: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

test-slow: setup
	$(BIN)/nbdev_test --n_workers 1 --flags slow
	$(BIN)/python -m pytest -q tests --slow

# Where PyTorch sees an NVIDIA GPU; `make test` leaves it alone.
test-gpu: setup
	$(BIN)/python -m pytest -q --gpu tests/test_gpu.py

# The newest fastai with fastcore 2 has no room for nbdev 2: the package alone, in an environment of its own.
NEWEST := .venv-newest
test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check --upgrade . 'fastai<3' 'fastcore>=2'
	cd tests && ../$(NEWEST)/bin/python newest.py

# The oldest versions that pyproject.toml allows; uv can ask for them, pip cannot. They need Python 3.11.
LOWEST := .venv-lowest
test-lowest:
	test -x $(LOWEST)/bin/uv || { $(PYTHON) -m venv $(LOWEST) && $(LOWEST)/bin/python -m pip install -q uv; }
	VIRTUAL_ENV=$(LOWEST) $(LOWEST)/bin/uv pip install -q --resolution lowest-direct --reinstall-package fd_focus .
	cd tests && ../$(LOWEST)/bin/python newest.py lowest

# Source distribution, and the wheel made from it, tried in an empty folder and a fresh environment: dist/.
release: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(if $(TAG),test -e dist/fd_focus-$(TAG:v%=%).tar.gz || { echo "$(TAG) is not the version in settings.ini"; exit 1; })
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/release.py dist/*.whl

# A site from the notebooks as they lie: _docs/index.html.
docs: setup
	$(BIN)/python docs/prepare.py _proc/site
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d _proc/doctrees _proc/site _proc/html
	rm -rf _docs && mv _proc/html _docs

clean:
	rm -rf build dist *.egg-info runs _docs _proc .venv-newest .venv-lowest
