# `make reproduce` runs the article's experiment, `make test` the tests. Both set up .venv first, and
# install again only after pyproject.toml or constraints.txt changed.
#   make reproduce ARGS="--rank 8 --out runs/rank8"    options of scripts/reproduce_cifar10.py
#   make test INTEROP=1                                with PyTorch, Equinox and Haiku, for the tests with them
#   make test-lowest                                   with the lower bounds of pyproject.toml
#   make test-newest                                   with the newest versions there are; Python 3.12 or newer
#   make test ARGS="tests/test_plan.py -x"             arguments of pytest
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
NEWEST := .venv-newest
ARGS ?=
# Newer JAX needs a newer Python. The first that runs and can make an environment: a pyenv shim on PATH
# may stand for a Python that is switched off, and Debian's may lack venv.
NEWEST_PYTHON ?= $(shell for version in 3.13 3.12; do \
  for python in "$$(command -v python$$version)" \
    $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python 2>/dev/null | sort -Vr); do \
    "$$python" -c 'import ensurepip' >/dev/null 2>&1 && echo "$$python" && exit; \
  done; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help reproduce test test-lowest test-newest newest-python environments lint format clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -7

# $(call install,EXTRAS): the project as an editable install, with the locked versions.
define install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(1)]'
	@touch $@
endef

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: expected Python 3.11 or newer, found `$(PYTHON) --version 2>&1`;" \
	       "name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cifar10: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing jax_lora[cifar10] into $(VENV) ..."
	$(call install,cifar10)

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing jax_lora[dev] into $(VENV) ..."
	$(call install,dev)
	@touch $(VENV)/.cifar10

$(VENV)/.interop: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing jax_lora[interop] into $(VENV) ..."
	$(call install,interop)

reproduce: $(VENV)/.cifar10
	$(BIN)/python scripts/reproduce_cifar10.py $(ARGS)

test: $(VENV)/.dev $(if $(INTEROP),$(VENV)/.interop)
	$(BIN)/python -m pytest $(ARGS)

test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python -m pytest $(ARGS)

# The direct dependencies at their lower bounds, read from pyproject.toml.
$(LOWEST)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing jax_lora[dev] at its lower bounds into $(LOWEST) ..."
	$(PYTHON) -m venv --clear $(LOWEST)
	$(PYTHON) -c 'import re, sys; print("\n".join(f"{n}=={v}" for n, v in re.findall( \
	  r"\"([\w-]+)>=([\d.]+)\"", sys.stdin.read()) if n not in ("setuptools", "torch", "equinox", "dm-haiku")))' \
	  < pyproject.toml > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --editable '.[dev]'
	@touch $@

test-newest: $(NEWEST)/.dev
	$(NEWEST)/bin/python -m pytest $(ARGS)

# No constraints: what pip resolves today. Equinox and Haiku run on JAX alone and come along.
$(NEWEST)/.dev: pyproject.toml | newest-python
	@echo "installing jax_lora[dev] with the newest versions into $(NEWEST) ..."
	$(NEWEST_PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[dev]' equinox dm-haiku
	@touch $@

newest-python:
	@python="$(NEWEST_PYTHON)"; [ -n "$$python" ] || { \
	  echo "error: expected python3.13 or python3.12 on PATH or in pyenv, found neither;" \
	       "name one: make NEWEST_PYTHON=/path/to/python test-newest" >&2; exit 1; }; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "error: expected Python 3.12 or newer, found `"$$python" --version 2>&1`;" \
	       "name another one: make NEWEST_PYTHON=python3.13 test-newest" >&2; exit 1; }

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
