PYTHON ?= python3.11
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# More options of pytest: make test PYTEST=--no-skips
PYTEST ?=

.PHONY: quickstart test lint types docs wheel

quickstart: .venv/quickstart
	$(BIN)/search-r3 quickstart --recipe recipes/quickstart.yaml --resume

# A process for every core; a file stays in one, with what its tests share.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(PYTEST)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The frameworks' own types are checked, too.
types: .venv/integrations
	$(BIN)/mypy

# The variable hides an advertisement.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

wheel: .venv/ready
	$(BIN)/python -m build --wheel --outdir dist

# The environment grows by what is asked for. Each of these files stands for an extra that is installed, so that nothing
# is installed twice; a change of the dependencies makes all of them anew.
.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and alone: constraints.txt pins a version of it that needs no CUDA packages on a CPU.
.venv/quickstart: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) torch
	$(INSTALL) --editable '.[train,eval]'
	touch $@

.venv/ready: .venv/quickstart
	$(INSTALL) 'search-r3[serve,dev]'
	touch $@

.venv/integrations: .venv/ready
	$(INSTALL) 'search-r3[integrations]'
	touch $@

.venv/docs: .venv/quickstart
	$(INSTALL) 'search-r3[docs]'
	touch $@
