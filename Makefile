# Needs GNU make and Python >= 3.12; everything else goes into .venv.
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-x64 test-oldest lint accuracy traffic traffic-tpu throughput bench bench-random bench-networks bench-memory bench-overhead bench-growth execute execute-all notebooks docs

PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# A GPU, where there is one and JAX has it installed: make demo JAX_PLATFORMS=cuda
export JAX_PLATFORMS ?= cpu
PYTEST_OPTIONS := --numprocesses auto --maxprocesses 8 --dist worksteal
PYTEST := $(BIN)/python -m pytest $(PYTEST_OPTIONS)

demo: .venv/demo ## train a stylisation network on two photographs, write stylize.png
	$(BIN)/python examples/stylize.py $(ARGS)

# On the CPU, wherever it runs: the suite proves the same things everywhere.
test test-fast test-x64 test-oldest: export JAX_PLATFORMS = cpu

test: lint ## lint, types, tests and doctests
	$(PYTEST)

test-fast: lint ## the same without the kernel, compiled code, calls and properties drawn by chance, most higher derivatives, axes and activations, meshes, processes of their own, examples and the U-Net
	$(PYTEST) -m 'not slow'

# The stylisation example mixes its own float32 with JAX's defaults, which convolutions refuse under x64.
test-x64: export JAX_ENABLE_X64 = 1
test-x64: .venv/test ## tests of every file, drawn by chance, with 64-bit numbers on; ARGS="--draw 20 --seed 1" draws others
	$(PYTEST) --draw 2 --ignore tests/test_stylize.py $(ARGS)

test-oldest: .venv-oldest/test ## the suite on the oldest versions that pyproject.toml admits; ARGS="--draw 3" draws some of it
	.venv-oldest/bin/python -m pytest $(PYTEST_OPTIONS) $(ARGS)

lint: .venv/test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

accuracy: .venv/bench ## print the error against float64 beside Flax's
	$(BIN)/python benchmarks/accuracy.py

traffic: .venv/test ## print the memory traffic counted on code compiled for an H100 and an A100, beside Flax's
	$(BIN)/python benchmarks/traffic.py --markdown benchmarks/results/traffic.md $(ARGS)

traffic-tpu: .venv/aot-tpu .venv/bench ## the same for a TPU v5e, on cases that are drawn; ARGS="--seeds 2 3 --cases 4"
	$(BIN)/python benchmarks/traffic_tpu.py --markdown benchmarks/results/traffic-tpu.md $(ARGS)

# Tables, pictures and all figures of the last run; the figures (JSON) are not kept in the repository.
RESULTS = --markdown benchmarks/results/$(1).md --json benchmarks/results/$(1).json

throughput: .venv/bench .venv/aot ## count instructions on the machine code for H100 and B200, model what limits the kernel, in about 20 minutes
	$(BIN)/python benchmarks/throughput.py $(call RESULTS,throughput) $(ARGS)

bench: .venv/bench ## time relu(norm(x)) beside what people use, in under 10 minutes; ARGS="--torch-python PYTHON"
	$(BIN)/python benchmarks/compare.py $(call RESULTS,compare) --plot benchmarks/results/compare.png $(ARGS)

bench-random: .venv/bench ## time norm and activation beside Flax on shapes that chance picks; ARGS="--seeds 7"
	$(BIN)/python benchmarks/random_shapes.py $(call RESULTS,random) $(ARGS)

bench-networks: .venv/bench ## what the norms of small networks cost in a training step, and to compile, beside Flax
	$(BIN)/python benchmarks/networks.py $(call RESULTS,networks) $(ARGS)

bench-memory: .venv/bench .venv/aot ## peak memory of a training step of a U-Net
	$(BIN)/python benchmarks/memory.py $(call RESULTS,memory) $(ARGS)

bench-overhead: .venv/bench ## what a small call costs besides: tracing, compiling, the first and the next call
	$(BIN)/python benchmarks/overhead.py $(call RESULTS,overhead) $(ARGS)

bench-growth: .venv/bench .venv/aot ## time and bytes against rows, channels and batch, odd sizes too
	$(BIN)/python benchmarks/growth.py --h100 $(call RESULTS,growth) --plot benchmarks/results/growth.png $(ARGS)

execute: .venv/test ## execute the kernel without a GPU: ARGS="--gpu H100 --count 20 --seed 7"
	$(BIN)/python -m emulator $(ARGS)

# One architecture per process.
execute-all: .venv/test ## the same with 60 kernels for each of five GPUs, in about 10 minutes
	for gpu in A100 'RTX 3090' H100 B200 'RTX 5090'; do $(BIN)/python -m emulator --gpu "$$gpu" --count 30 $(ARGS) || exit 1; done

notebooks: .venv/notebooks ## run the notebooks top to bottom and write them with their pictures
	$(BIN)/python notebooks/execute.py notebooks/*.ipynb

docs: .venv/docs ## build the pages of docs/ and the API reference into docs/_build/html
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html

# One stamp per extra: installed again only when pyproject.toml changes.
.venv/%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# uv resolves to the lower bounds of what pyproject.toml names, which pip cannot.
.venv-oldest/test: pyproject.toml | .venv/test
	$(BIN)/python -m uv venv --quiet --clear --python $(BIN)/python .venv-oldest
	$(BIN)/python -m uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[test]'
	@touch $@

.venv/bin/python:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
		echo "jaxnorm needs Python 3.12 or newer; found $$('$(or $(PYTHON),python3)' --version 2>&1). Name one: make PYTHON=/path/to/python3.12"; exit 1; }
	'$(PYTHON)' -m venv .venv
