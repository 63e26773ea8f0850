# Needs a Python and nothing else; works with GNU make 3.81, which is what macOS has.
#
#   make demo            train the demo on this machine
#   make test            everything a change must pass
#   make PYTHON=python3.12 test
#
# The first of them makes .venv and installs into it; it is reused until pyproject.toml changes.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tried in this order; the first that is new enough is taken.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10 python
# Passed on: make test PYTEST_ARGS='-k ring -x', make demo DEMO_ARGS='--epochs 1'
PYTEST_ARGS ?=
DEMO_ARGS ?=
# Processes that run the tests of `make test` side by side: make test WORKERS=8, or WORKERS=0 for none beside pytest itself.
# A file's tests stay together, because they share servers.
WORKERS ?= 2
BESIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
TESTS := not slow and not gpu
# Tests start servers by the hundred, and each would compile the package anew where bytecode is not kept.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help venv demo test lint types imports test-slow test-gpu bench stubs clean

help:
	@echo 'make demo       train the demo on this machine (DEMO_ARGS=...)'
	@echo 'make test       lint, types, imports, and all tests that are neither slow nor for a GPU (PYTEST_ARGS=...)'
	@echo 'make lint       ruff: rules and formatting'
	@echo 'make types      mypy'
	@echo 'make imports    import-linter: who may import whom'
	@echo 'make test-slow  the slow tests'
	@echo 'make test-gpu   the tests that need a CUDA GPU (pip install the cuda12 or cuda13 extra first)'
	@echo 'make bench      the benchmarks'
	@echo 'make stubs      generate the gRPC stubs anew'
	@echo 'make venv       only make .venv with everything in it (PYTHON=...)'
	@echo 'make clean      remove what these made'

venv: $(STAMP)

# The stamp is written last, so an installation cut short is done again. An environment whose Python is gone is made
# anew. pip 22.3 is the first with --python, which the packaging tests use; early Python 3.10 brings an older one.
$(STAMP): pyproject.toml
	@set -eu; \
	if ! $(BIN)/python -c '' 2>/dev/null; then \
	    found=; \
	    for python in $(PYTHON); do \
	        if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	            found=$$python; break; \
	        fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo 'Python 3.10 or newer is needed, and none of these is one: $(PYTHON)' >&2; \
	        echo 'Name yours: make PYTHON=/path/to/python3' >&2; \
	        exit 1; \
	    fi; \
	    if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "$$found cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
	        exit 1; \
	    fi; \
	    echo "making $(VENV) with $$found (`"$$found" --version`)"; \
	    "$$found" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=22.3'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,demo,bench]'
	@touch $@

demo: $(STAMP)
	$(BIN)/dsml-gpu demo $(DEMO_ARGS)

# Most tests side by side, then those that measure time one by one. Status 5: PYTEST_ARGS leave none of them to run.
test: lint types imports
	@set -u; beside=0; alone=0; \
	$(BIN)/python -m pytest $(BESIDE) -m '$(TESTS) and not alone' $(PYTEST_ARGS) || beside=$$?; \
	case $$beside in 0|1|5) ;; *) exit $$beside ;; esac; \
	$(BIN)/python -m pytest -m '$(TESTS) and alone' $(PYTEST_ARGS) || alone=$$?; \
	case $$beside$$alone in 00|05|50) ;; *) exit 1 ;; esac

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow and not gpu' $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(PYTEST_ARGS)

stubs: $(STAMP)
	$(BIN)/python proto/generate.py

clean:
	rm -rf $(VENV) .venv-protoc build dist .benchmarks .hypothesis
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
