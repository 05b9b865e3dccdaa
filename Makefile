# make demo   trains a dense and a random-routed ViT on digits and puts them side by side (minutes on a CPU)
# make test   checks and tests everything
# make check  lint, format, types
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
CONSTRAINTS := $(shell $(PYTHON) -c 'import sys; print("constraints-py311.txt" if sys.version_info < (3, 12) else "constraints.txt")')

.PHONY: demo test check format install clean
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: install
	rm -rf runs/demo
	$(RUN) -m jvitmoe.train --config configs/digits_dense.py --workdir runs/demo/dense
	$(RUN) -m jvitmoe.train --config configs/digits_random.py --workdir runs/demo/random
	$(RUN) -m jvitmoe.report runs/demo/dense runs/demo/random --out runs/demo

check: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: check
	$(RUN) -m pytest

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
