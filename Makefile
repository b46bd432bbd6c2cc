# Every target does its own set-up: Python 3.11-3.13 and make are all that is needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DOCS   := .venv-docs

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Where it is set, each process that the tests start would compile three thousand modules again, some twenty seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env demo docs lint check test test-docs test-research test-cluster test-real test-arm test-image format clean

env: $(READY)

# torch first and by its exact version: a looser request may pull gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"sparsepeft needs Python 3.11 to 3.13, but {sys.executable} is {v[0]}.{v[1]}; run: make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable ".[all,dev]"
	@touch $@

demo: $(READY)
	$(BIN)/sparsepeft demo

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not real" -n 2 --dist worksteal

test: $(READY)
	$(BIN)/python -m pytest -q -m "not gpu and not real and not cluster" -n 2 --dist worksteal --ignore=tests/docs --ignore=tests/research

# Every code block of README, docs and docstrings.
test-docs: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/docs

# The papers' tables, the benchmarks and the experiments, on tiny models.
test-research: $(READY)
	$(BIN)/python -m pytest -q -m "not gpu and not cluster" -n 2 --dist worksteal tests/research

# Processes that work together: Ray, Flower, torch.distributed. One worker: each test keeps two cores at work.
test-cluster: $(READY)
	$(BIN)/python -m pytest -q -m "cluster and not gpu and not real" -n 1

# On MPNet-base and Gemma 3 270M in the folder SPARSEPEFT_MODELS; skipped where missing. One worker, as they are large.
test-real: $(READY)
	$(BIN)/python -m pytest -q -m real -n 1

# On an emulated Raspberry Pi 4: needs Debian 12, its packages and PyPI's, and SPARSEPEFT_DATA.
test-arm: $(READY)
	$(BIN)/python -m tests.arm.kernels
	$(BIN)/python -m tests.arm.compare

# The Dockerfile's steps without Docker, and its service without a network: needs Linux, PyPI, and PyTorch's index, or
# TORCH_INDEX=https://pypi.org/simple.
test-image: $(READY)
	$(BIN)/python -m tests.image $(if $(TORCH_INDEX),TORCH_INDEX=$(TORCH_INDEX))

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Into site/; warnings are errors. In an environment of its own: it reads the sources and needs no torch.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt "mkdocs-material" "mkdocstrings[python]" ruff
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS) site build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
