# `make help` lists the commands. Each makes the virtual environment it needs and reuses it when it is there.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
OLDEST ?= .venv-oldest
# triton 3.6's interpreter makes integers of arrays in a way that numpy 2.4 refuses
OLDEST_PINS = transformers==5.17.0 triton==3.6.0 'numpy<2.4'
TRITONS = 3.6.0 3.8.0 3.9.0
AOT = .venv-aot-$(TRITON)
AOT_PY = $(if $(TRITON),$(AOT),$(VENV))/bin/python
AOT_TESTS = -m pytest -q -n $(WORKERS) tests/*/test_aot_*.py -m "full or not full"
TESTS ?= tests
WORKERS ?= 2

PY = $(VENV)/bin/python
PIP = -m pip install -qq --disable-pip-version-check
PIP_DOWNLOAD = -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	--platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 -d .oracle-wheels
BASE = $(VENV)/.base-$(TORCH)
DEV = $(VENV)/.dev-$(TORCH)
# Cheap when no C++ file changed. Without REQUIRE a failed compile is reported and the PyTorch path serves.
BUILD_EXT = setup.py --quiet build_ext --inplace
REQUIRE = SIMCTG_FAST_REQUIRE_EXT=1
PYTEST = -m pytest -q -n $(WORKERS) --dist loadgroup $(TESTS)
# What an extended set adds to its base is tried by the tests of what uses it.
OTHER_ISAS = from simctg_fast import _C; best, *others = _C.supported_isas(); print(*(i for i in others if '_' not in i and i not in best))
# pytest's 5 says that TESTS holds no such test
TEST_ISA = isas=$$(PYTHONPATH=. $(PY) -c "$(OTHER_ISAS)") || exit 1; for isa in $$isas; do \
	echo "SIMCTG_FAST_ISA=$$isa"; SIMCTG_FAST_ISA=$$isa $(PY) $(PYTEST) -m "csrc and not full" || [ $$? = 5 ] || exit 1; done

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-isa test-full test-oldest lint format bench parity gpu oracle-wheels aot clean

help: ## This list
	@echo "usage: make COMMAND [TORCH=2.13.0] [PYTHON=python3] [VENV=.venv] [TESTS=tests] [WORKERS=2]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(BASE) ## Greedy, nucleus sampling and contrastive search side by side, on the bundled model
	@$(PY) $(BUILD_EXT)
	@$(VENV)/bin/simctg-fast demo

test: $(DEV) ## The fast set of tests, then what depends on it under the other instruction sets
	@$(REQUIRE) $(PY) $(BUILD_EXT)
	@$(PY) $(PYTEST)
	@$(TEST_ISA)

test-isa: $(DEV) ## What reaches the C++ kernels, under each instruction set of this machine but the best
	@$(REQUIRE) $(PY) $(BUILD_EXT)
	@$(TEST_ISA)

test-full: $(DEV) ## Every test, at full size, and `make aot` on triton 3.6.0, 3.8.0 and 3.9.0
	@$(REQUIRE) $(PY) $(BUILD_EXT)
	@$(PY) $(PYTEST) -m "full or not full"
	@$(if $(filter tests,$(TESTS)),for triton in $(TRITONS); do \
		echo "triton $$triton"; $(MAKE) --no-print-directory aot TRITON=$$triton ARGS= || exit 1; done)

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

gpu: ## Checks and speed on a CUDA device, with the system's own python3 and torch, no network [CALL=1, or PART=decode]
	@$(PYTHON) benchmarks/gpu.py $(CALL) $(PART) $(ARGS)

# For that machine's Python: pure ones, and tokenizers, whose wheel serves Python 3.9 and every one after it. requests
# and what it needs: transformers 5 no longer brings it.
oracle-wheels: ## transformers 4.55.4 and what it pins, into .oracle-wheels, to take along to `make gpu`
	@mkdir -p .oracle-wheels
	@$(PYTHON) $(PIP_DOWNLOAD) transformers==4.55.4 'tokenizers==0.21.4' 'huggingface_hub==0.36.0' \
		requests urllib3 idna certifi charset_normalizer
	@ls .oracle-wheels

# Compilers differ in the registers that they find: TRITON=3.6.0 asks that one, in an environment of its own.
aot: $(if $(TRITON),$(AOT)/.stamp-$(TORCH),$(DEV)) ## Every Triton kernel compiled for GPUs that are not here [TRITON=3.6.0]; a table with ARGS="--arch 90"
	@PYTHONPATH=. $(AOT_PY) $(if $(ARGS),benchmarks/aot.py $(ARGS),$(AOT_TESTS))

clean: ## Remove builds and caches (environments stay: rm -r .venv*)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks simctg_fast/_C.*
	@find kernels simctg_fast benchmarks examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

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
	@$(OLDEST)/bin/python $(PIP) setuptools pybind11 ninja $(OLDEST_PINS)
	@$(OLDEST)/bin/python $(PIP) --no-build-isolation --editable ".[test]" $(OLDEST_PINS)
	@rm -f $(OLDEST)/.stamp-* && touch $@

# What compiles the kernels: torch, then the triton that was asked for. ptxas comes with it, and no GPU is needed.
.venv-aot-%/.stamp-$(TORCH):
	@$(call make_venv,$(@D))
	@echo "$(@D): installing torch $(TORCH) and triton $* (a minute or two)"
	@$(@D)/bin/python $(PIP) torch==$(TORCH)
	@$(@D)/bin/python $(PIP) triton==$* pytest pytest-xdist 'numpy<2.4'
	@rm -f $(@D)/.stamp-* && touch $@

define make_venv
if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] \
	+ " (PYTHON=... chooses another)" if sys.version_info < (3, 10) else 0)' && \
	echo "$(1): creating the virtual environment" && $(PYTHON) -m venv $(1); \
fi
endef
