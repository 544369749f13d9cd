# `make help` lists the commands. Each makes the virtual environment it needs and reuses it when it is there.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
OLDEST ?= .venv-oldest
TESTS ?= tests
WORKERS ?= 2

PY = $(VENV)/bin/python
PIP = -m pip install -qq --disable-pip-version-check
BASE = $(VENV)/.base-$(TORCH)
DEV = $(VENV)/.dev-$(TORCH)
# Cheap when no C++ file changed. Without REQUIRE a failed compile is reported and the PyTorch path serves.
BUILD_EXT = setup.py --quiet build_ext --inplace
REQUIRE = SIMCTG_FAST_REQUIRE_EXT=1
PYTEST = -m pytest -q -n $(WORKERS) --dist loadgroup $(TESTS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-full test-oldest lint format bench parity gpu clean

help: ## This list
	@echo "usage: make COMMAND [TORCH=2.13.0] [PYTHON=python3] [VENV=.venv] [TESTS=tests] [WORKERS=2]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(BASE) ## Greedy, nucleus sampling and contrastive search side by side, on the bundled model
	@$(PY) $(BUILD_EXT)
	@$(VENV)/bin/simctg-fast demo

test: $(DEV) ## The fast set of tests
	@$(REQUIRE) $(PY) $(BUILD_EXT)
	@$(PY) $(PYTEST)

test-full: $(DEV) ## Every test, at full size
	@$(REQUIRE) $(PY) $(BUILD_EXT)
	@$(PY) $(PYTEST) -m "full or not full"

test-oldest: $(OLDEST)/.stamp-$(TORCH) ## The fast set on transformers 5.17.0 and triton 3.6.0
	@$(REQUIRE) $(OLDEST)/bin/python $(BUILD_EXT)
	@$(OLDEST)/bin/python $(PYTEST)

lint: $(DEV) ## ruff (rules and format) and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(DEV) ## Let ruff put right what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(DEV) ## Speed and memory of decoding, against greedy and against transformers 4
	@$(REQUIRE) $(PY) $(BUILD_EXT)
	@$(PY) benchmarks/decode.py $(ARGS)

parity: $(DEV) ## Token for token against transformers 4.55.4, which gets an environment of its own
	@$(REQUIRE) $(PY) $(BUILD_EXT)
	@$(PY) benchmarks/parity.py $(ARGS)

gpu: ## Checks on a CUDA device, with the system's own python3 and torch [PART=name]
	@PYTHONPATH=. $(PYTHON) $(BUILD_EXT)
	@PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(PART)

clean: ## Remove builds and caches (environments stay: rm -r .venv*)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks simctg_fast/_C.*
	@find kernels simctg_fast benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# What the library itself needs. torch goes first: the version is the caller's choice, and pip must not weigh it again.
$(BASE): pyproject.toml
	@$(call make_venv,$(VENV))
	@echo "$(VENV): installing torch $(TORCH) (the longest step: a minute or two, more where the build for CUDA is fetched)"
	@$(PY) $(PIP) torch==$(TORCH)
	@echo "$(VENV): installing transformers and the other dependencies, compiling the C++ extension"
	@$(PY) $(PIP) setuptools pybind11 ninja
	@$(PY) $(PIP) --no-build-isolation --editable .
	@rm -f $(VENV)/.base-* $(VENV)/.dev-* && touch $@

$(DEV): $(BASE)
	@echo "$(VENV): installing the tools for tests, benchmarks and lint"
	@$(PY) $(PIP) --no-build-isolation --editable ".[test,bench,dev]"
	@touch $@

$(OLDEST)/.stamp-$(TORCH): pyproject.toml
	@$(call make_venv,$(OLDEST))
	@echo "$(OLDEST): installing torch $(TORCH), transformers 5.17.0 and triton 3.6.0 (a few minutes)"
	@$(OLDEST)/bin/python $(PIP) torch==$(TORCH)
	@$(OLDEST)/bin/python $(PIP) setuptools pybind11 ninja transformers==5.17.0 triton==3.6.0
	@$(OLDEST)/bin/python $(PIP) --no-build-isolation --editable ".[test]" transformers==5.17.0 triton==3.6.0
	@rm -f $(OLDEST)/.stamp-* && touch $@

define make_venv
if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] \
	+ " (PYTHON=... chooses another)" if sys.version_info < (3, 10) else 0)' && \
	echo "$(1): creating the virtual environment" && $(PYTHON) -m venv $(1); \
fi
endef
