# make demo   from nothing to feature maps: installs, builds resnet50 in int8 from photographs, runs it, shows it
# make test   installs and runs every test; no GPU, no model hub
# make lint   formatting, lint, types, direction of imports
# make bench  the figures of the README, side by side with their peers; writes benchmarks/results
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test lint bench schema clean

demo: $(VENV)/.demo
	$(BIN)/python -m build_scripts.demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run

schema: $(VENV)/.dev
	$(BIN)/python -m build_scripts.write_schema

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "edge_backbones needs Python 3.10 or newer; say which: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo_output .cache
