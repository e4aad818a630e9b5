# `make help` lists the targets. Everything is kept in .venv and .cache-make; `make clean` removes both.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# PYTHON=... names the interpreter to build .venv with; otherwise the first one of 3.11 or newer.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; exit; }; done; echo python3)
# Extra arguments for the step that installs torch, say an --index-url of your own.
TORCH_PIP_ARGS ?=
TORCH = $(shell nvidia-smi -L >/dev/null 2>&1 && echo 'torch>=2.11' || echo 'torch==2.13.0')
WORKERS ?= 3
# Of Transformers: the last of each minor release that is supported.
RELEASES ?= 5.17.0 5.18.0 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0
# Arguments for pytest, say PYTEST_ARGS="-k route -x".
PYTEST_ARGS ?=
export PYTEST_ARGS
MOERUNNER_SEED ?= $(shell date +%-m%d%H%M%S)
MOERUNNER_SEED := $(MOERUNNER_SEED)
export MOERUNNER_SEED

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CACHE := .cache-make
TIMES := $(CACHE)/test-times.txt
LINTED := src tests hatch_build.py $(wildcard scripts)
# What an install compiles.
NATIVE := hatch_build.py $(wildcard src/moerunner/kernels/cpu/*.cpp src/moerunner/kernels/cpu/*.h src/moerunner/kernels/cpu/build.py)

# An environment that no longer starts, or that was copied here from another folder, is built again.
ifneq ($(wildcard $(VENV)),)
$(shell { [ "$$(cat $(VENV)/.root 2>/dev/null)" = '$(CURDIR)' ] && $(BIN)/python -c '' 2>/dev/null; } \
	|| rm -f $(VENV)/.stamp-*)
endif

# $(call phase,NAME,COMMAND): run the command, print and keep the seconds it took.
define phase
echo "--- $(1)"; begin=$$(date +%s%N); status=0; $(2) || status=$$?; \
tenths=$$(( ($$(date +%s%N) - begin) / 100000000 )); seconds=$$((tenths / 10)).$$((tenths % 10)); \
printf '%s\t%s\n' "$(1)" "$$seconds" >> $(TIMES); \
[ $$status -eq 0 ] || { echo "--- $(1) FAILED after $$seconds s"; exit $$status; }
endef

.PHONY: help demo test test-all gpu-test has-gpu mutants accuracy upstream versions docs numbers lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo ## install what the demo needs, then run it
	@echo "[4/4] demo"
	@$(BIN)/python -m moerunner demo

test: $(VENV)/.stamp-dev ## install, then lint, types, floors and the fast tests
	@echo "[4/4] checks and tests, seed $(MOERUNNER_SEED) (again: make test MOERUNNER_SEED=$(MOERUNNER_SEED))"
	@mkdir -p $(CACHE) && rm -f $(TIMES)
	@$(call phase,ruff check,$(BIN)/ruff check $(LINTED))
	@$(call phase,ruff format,$(BIN)/ruff format --check $(LINTED))
	@$(call phase,pyright,$(BIN)/pyright --pythonpath $(BIN)/python)
	@$(call phase,lint-imports,$(BIN)/lint-imports --no-logo --cache-dir $(CACHE)/import-linter)
	@$(call phase,pytest,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadgroup --durations 10 $(PYTEST_ARGS))
	@$(BIN)/python scripts/check_budget.py $(TIMES)

test-all: $(VENV)/.stamp-dev ## every test, the long ones too; writes docs/results/test-all.json
	@echo "[4/4] all tests, seed $(MOERUNNER_SEED)"
	@mkdir -p $(CACHE) && rm -f $(CACHE)/test-all.xml
	@status=0; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations 20 \
		--junitxml $(CACHE)/test-all.xml $(PYTEST_ARGS) || status=$$?; \
	$(BIN)/python scripts/write_results.py $(CACHE)/test-all.xml docs/results/test-all.json; exit $$status

gpu-test: has-gpu $(VENV)/.stamp-dev ## on an NVIDIA GPU: the kernels' tests, and every backend against float64 (.cache-make/gpu-check.json)
	@mkdir -p $(CACHE)
	@$(BIN)/python -m pytest tests/kernels tests/bench -m "gpu or not gpu" $(PYTEST_ARGS)
	@$(BIN)/python scripts/gpu_check.py $(CACHE)/gpu-check.json

has-gpu:
	@nvidia-smi -L >/dev/null 2>&1 || { echo "make gpu-test needs an NVIDIA GPU, and nvidia-smi finds none" >&2; exit 3; }

mutants: $(VENV)/.stamp-dev ## break the code on purpose and see the tests notice
	@$(BIN)/python scripts/mutants.py

upstream: $(VENV)/.stamp-dev ## Transformers' own common model tests on patched models; FAMILIES="mixtral olmoe" for a part
	@$(BIN)/python scripts/upstream_tests.py $(FAMILIES)

versions: $(VENV)/.stamp-dev ## every family against each release of Transformers; RELEASES="5.17.0 5.18.0" for a part
	@status=0; for release in $(RELEASES); do folder=$(CACHE)/transformers-$$release; \
		[ -d $$folder/transformers ] || $(PIP) install -q --target $$folder "transformers==$$release"; \
		PYTHONPATH=$$folder $(BIN)/python scripts/versions.py || status=1; done; exit $$status

accuracy: $(VENV)/.stamp-demo ## 17 families against Transformers, on a GPU if there is one; writes docs/accuracy.md
	@$(BIN)/python scripts/accuracy.py

docs: $(VENV)/.stamp-docs ## the documentation as pages in .cache-make/site, without the network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open $(CACHE)/site/index.html, or with search: $(BIN)/python -m http.server -d $(CACHE)/site"

numbers: $(VENV)/.stamp-venv ## the tables of README.md and docs/benchmarks.md from benchmarks/results/
	@$(BIN)/python scripts/numbers_page.py

lint: $(VENV)/.stamp-dev ## ruff, pyright and the import floors only
	@$(BIN)/ruff check $(LINTED)
	@$(BIN)/ruff format --check $(LINTED)
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-logo --cache-dir $(CACHE)/import-linter

format: $(VENV)/.stamp-dev ## let ruff rewrite the sources
	@$(BIN)/ruff check --fix $(LINTED)
	@$(BIN)/ruff format $(LINTED)

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) $(CACHE) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	@echo "[1/4] Python environment in $(VENV), from $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "moerunner needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo '$(CURDIR)' > $(VENV)/.root
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	@echo "[2/4] $(TORCH) (the largest download)"
	@$(PIP) install $(TORCH_PIP_ARGS) '$(TORCH)'
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml $(NATIVE)
	@echo "[3/4] moerunner with Transformers, serving and plots"
	@$(PIP) install -q -e '.[hf,serve,plot]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch pyproject.toml $(NATIVE)
	@echo "[3/4] moerunner with Transformers, serving, plots and the test tools"
	@$(PIP) install -q -e '.[hf,serve,plot,dev]'
	@touch $@ $(VENV)/.stamp-demo

$(VENV)/.stamp-docs: $(VENV)/.stamp-demo
	@$(PIP) install -q -e '.[docs]'
	@touch $@
