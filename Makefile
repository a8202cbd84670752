# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

# Builds vLLM without native kernels: its platform comes from this package. Without the version
# override pip would discard the source distribution, whose version carries a suffix.
export VLLM_TARGET_DEVICE := empty
export VLLM_VERSION_OVERRIDE := 0.32.0

.PHONY: setup demo test lint wheel clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-binary vllm --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: setup
	$(BIN)/python -m vllm_spyre_mm.demo

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: setup
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) build dist *.egg-info
