# `make demo` trains on the toy set and shows it; `make test` proves the library. Both set up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export MPLBACKEND ?= agg

.PHONY: setup test test-slow sync nbtest pytest clean

setup: $(STAMP)
$(STAMP): settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

test: setup
	$(MAKE) --no-print-directory sync nbtest pytest

# Notebooks are the source: cleaning and exporting them again must change nothing that is committed.
sync: setup
	$(BIN)/python tests/check_sync.py

nbtest: setup
	$(BIN)/nbdev_test --n_workers 1

pytest: setup
	$(BIN)/python -m pytest -q tests

test-slow: setup
	$(BIN)/nbdev_test --n_workers 1 --flags slow
	$(BIN)/python -m pytest -q tests --slow

clean:
	rm -rf build dist *.egg-info runs
