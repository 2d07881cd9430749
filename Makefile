PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test lint types

quickstart: .venv/ready
	$(BIN)/search-r3 quickstart --recipe recipes/quickstart.yaml --resume

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# torch first and alone: constraints.txt pins a version of it that needs no CUDA packages on a CPU.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
