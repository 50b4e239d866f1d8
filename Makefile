# make demo      install into .venv and train on the embedded data set
# make test      install with the test extra and run the tests, but for slow ones
# make test-all  those, then the slow ones
# make lint      layout, what ruff checks, types of the public API
# make docs      build the documentation into site/
# make install   only install (with the test extra)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
LINT_INSTALLED := $(VENV)/.installed-lint
LINTED := fedmmr_jax experiments tests examples docs

.PHONY: demo test test-all lint docs install clean

demo: $(INSTALLED)
	$(BIN)/python -m experiments.train --flagfile=experiments/presets/synthetic.flags

test: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not slow'

test-all: test
	$(BIN)/python -m pytest -m slow

lint: $(LINT_INSTALLED)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

docs: $(DOCS_INSTALLED)
	$(BIN)/python experiments/results/draw.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

install: $(INSTALLED)

# Editable: a change in the sources needs no new install.
$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED) setup.cfg
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

$(LINT_INSTALLED): $(INSTALLED) setup.cfg
	$(BIN)/pip install --quiet --editable '.[lint]'
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
