# Run `make` to list the targets. Set PYTHON and VENV for another Python: make test PYTHON=python3.13 VENV=.venv313
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# PyTorch, timm and transformers, which exports are tested against, live apart and run in a process of their own.
PEERS ?= .venv-peers
# XLA's compilers for TPUs and GPUs, 2 GB, which the long tests compile for; apart, so that JAX does not look for devices.
COMPILERS ?= build/compilers
PEERS_PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v $(PYTHON))
CONSTRAINTS := $(shell $(PYTHON) -c 'import sys; print("constraints-py311.txt" if sys.version_info < (3, 12) else "constraints.txt")')

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-long check site format install clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1 \t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

install: $(VENV)/installed  ## install jvitmoe with everything for development into $(VENV), and the hooks of commits

PIP := $(RUN) -m pip install --disable-pip-version-check -c $(CONSTRAINTS)

# --no-compile: the bytecode of all packages would take more than 100 MB; Python writes what it needs when it imports.
$(VENV)/base: pyproject.toml $(CONSTRAINTS)
	@echo "Installing jvitmoe into $(VENV): about 0.8 GB, half a minute or more."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet --no-compile -e .
	touch $@

$(VENV)/installed: $(VENV)/base
	@echo "Installing the tools for development into $(VENV), TensorFlow and ONNX among them: about 3 GB more."
	$(PIP) -e '.[dev]'
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(RUN) -m pre_commit install || echo "No hooks: see above."; fi
	touch $@

demo: $(VENV)/base  ## train a dense and a random-routed ViT on digits, one table (minutes on a CPU)
	rm -rf runs/demo
	$(RUN) -m jvitmoe.train --config configs/digits_dense.py --workdir runs/demo/dense
	$(RUN) -m jvitmoe.train --config configs/digits_random.py --workdir runs/demo/random
	$(RUN) -m jvitmoe report runs/demo/dense runs/demo/random --out runs/demo

check: install  ## lint, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Two processes, a file each at a time: tests that run processes of their own wait for them, and would starve more.
PYTEST := JVITMOE_PEERS=$(abspath $(PEERS)/bin/python) $(RUN) -m pytest --dist loadfile -n 2

test: check $(PEERS)/installed  ## check, and all tests but the long ones
	$(PYTEST) -m 'not long'

test-fast: install  ## the tests that start no process and train no whole run (2 minutes), for the inner loop
	$(PYTEST) -n 3 -m 'not long and not process and not slow'

test-long: install $(PEERS)/installed $(COMPILERS)/installed  ## many kills, compiling for TPUs and GPUs, more inputs
	JVITMOE_FUZZ=5 JVITMOE_COMPILERS=$(abspath $(COMPILERS)) $(PYTEST) -m long

$(COMPILERS)/installed: $(VENV)/base $(CONSTRAINTS)
	rm -rf $(COMPILERS)
	$(PIP) --quiet --no-deps --target $(COMPILERS) libtpu jax-cuda12-plugin jax-cuda12-pjrt nvidia-cudnn-cu12
	touch $@

$(PEERS)/installed: requirements-peers.txt
	$(PEERS_PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	touch $@

site: install  ## build the documentation into build/site, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

format: install  ## format the code and apply lint fixes
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove environments and caches, keep runs/
	rm -rf $(VENV) $(PEERS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
