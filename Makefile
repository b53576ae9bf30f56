# Needs GNU make and Python >= 3.12; everything else goes into .venv.
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-x64 test-next test-oldest lint accuracy offsets hero traffic traffic-tpu throughput bench bench-random bench-groups bench-networks bench-overhead bench-growth execute execute-all notebooks docs

PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# A GPU, where there is one and JAX has it installed: make demo JAX_PLATFORMS=cuda
export JAX_PLATFORMS ?= cpu
PYTEST_OPTIONS := --numprocesses auto --maxprocesses 8 --dist worksteal
PYTEST := $(BIN)/python -m pytest $(PYTEST_OPTIONS)

demo: .venv/demo ## train two stylization networks and draw stylize.png
	$(BIN)/python examples/stylize.py $(ARGS)

# On the CPU, wherever it runs: the suite proves the same things everywhere.
test test-fast test-x64 test-next test-oldest: export JAX_PLATFORMS = cpu

test: lint ## lint, types, tests and doctests
	$(PYTEST)

test-fast: lint ## the same without the kernel, compiled code, random calls and properties, most higher derivatives, axes and activations, meshes, processes of their own, examples and the U-Net
	$(PYTEST) -m 'not slow'

# The stylization example mixes its own float32 with JAX's defaults, which convolutions refuse under x64.
test-x64: export JAX_ENABLE_X64 = 1
test-x64: .venv/test ## random tests of every file with 64-bit numbers on; ARGS="--draw 20 --seed 1" draws others
	$(PYTEST) --draw 2 --ignore tests/test_stylize.py $(ARGS)

# JAX contains the next implementations of its derivative rules already. The kernel cannot evaluate their primitive, so
# these are the files about plain XLA.
NEXT := $(patsubst %,tests/test_%.py,activations derivatives edge_cases group_norm jax_features layers offsets platforms transformations)
test-next: export JAX_CUSTOM_JVP3 = 1
test-next: export JAX_CUSTOM_VJP3 = 1
test-next: export JAX_REMAT3 = 1
test-next: export XLA_FLAGS = --xla_force_host_platform_device_count=2
test-next: .venv/test ## random tests with JAX's next custom_jvp, custom_vjp and remat, and two CPU devices
	$(PYTEST) $(NEXT) --draw 8 -m 'not kernel' $(ARGS)

test-oldest: .venv-oldest/test ## the suite on the oldest versions that pyproject.toml admits; ARGS="--draw 3" draws some of it
	.venv-oldest/bin/python -m pytest $(PYTEST_OPTIONS) $(ARGS)

lint: .venv/test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The report and all figures of the last run; the figures (JSON) are not kept in the repository.
RESULTS = --markdown benchmarks/results/$(1).md --json benchmarks/results/$(1).json
# All of them take ARGS="--quick", which only shows that they run, and ARGS="--help".
BENCHMARK := $(BIN)/python -m benchmarks

accuracy: .venv/bench ## the error against float64, compared with Flax
	$(BENCHMARK).accuracy $(call RESULTS,accuracy) $(ARGS)

offsets: .venv/bench ## how far from zero the inputs of norms are inside networks
	$(BENCHMARK).offsets $(call RESULTS,offsets) $(ARGS)

hero: .venv/bench ## the first picture of the README, from accuracy and the last bench-networks
	$(BENCHMARK).hero benchmarks/results/networks.json --plot benchmarks/results/hero.png

traffic: .venv/bench .venv/aot ## count the memory traffic of code compiled for an H100 and an A100, compared with Flax
	$(BENCHMARK).traffic $(call RESULTS,traffic) $(ARGS)

traffic-tpu: .venv/bench .venv/aot-tpu ## the same for a TPU v5e, on random shapes; ARGS="--seeds 2 3 --count 4"
	$(BENCHMARK).traffic --devices TPU --count 16 $(call RESULTS,traffic-tpu) $(ARGS)

throughput: .venv/bench .venv/aot ## count registers, spills, shared memory and instructions of the kernel for H100 and B200
	$(BENCHMARK).throughput $(call RESULTS,throughput) $(ARGS)

bench: .venv/bench ## time relu(norm(x)) compared with other libraries, in about 10 minutes; ARGS="--torch-python PYTHON"
	$(BENCHMARK).compare $(call RESULTS,compare) --plot benchmarks/results/compare.png $(ARGS)

bench-random: .venv/bench ## the same with Flax on random shapes; ARGS="--seeds 7 8", ARGS="--against FOLDER_OF_ANOTHER_JAXNORM"
	$(BENCHMARK).compare --seeds $(call RESULTS,random) $(ARGS)

bench-groups: .venv/bench ## the same with group norm, beside Flax's
	$(BENCHMARK).compare --groups --contenders Flax 'Flax, stable' --seeds $(call RESULTS,groups) $(ARGS)

bench-networks: .venv/bench .venv/aot ## what norms cost in networks: time, memory, time to compile; ARGS=--small
	$(BENCHMARK).networks --h100 $(call RESULTS,networks) $(ARGS)

bench-overhead: .venv/bench ## what a small call costs: tracing, compiling, the first and the next call
	$(BENCHMARK).overhead $(call RESULTS,overhead) $(ARGS)

bench-growth: .venv/bench ## time and bytes against rows, channels and batch, odd sizes too
	$(BENCHMARK).growth $(call RESULTS,growth) --plot benchmarks/results/growth.png $(ARGS)

execute: .venv/test ## execute the kernel without a GPU: ARGS="--gpu H100 --count 20 --seed 7"
	$(BIN)/python -m emulator $(ARGS)

# One architecture per process.
execute-all: .venv/test ## the same with 60 kernels for each of five GPUs, in about 10 minutes
	for gpu in A100 'RTX 3090' H100 B200 'RTX 5090'; do $(BIN)/python -m emulator --gpu "$$gpu" --count 30 $(ARGS) || exit 1; done

notebooks: .venv/notebooks ## run the notebooks top to bottom and write them with their pictures
	$(BIN)/python notebooks/execute.py notebooks/*.ipynb

docs: .venv/docs ## build the pages of docs/ and the API reference into docs/_build/html
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html

# One stamp per group of dependencies: installed again only when pyproject.toml changes.
.venv/demo: pyproject.toml | .venv/bin/python
	@# Groups of dependencies are known to pip since 25.1.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

.venv/%: pyproject.toml | .venv/demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group $*
	@touch $@

# uv resolves to the lower bounds of what pyproject.toml names, which pip cannot.
.venv-oldest/test: pyproject.toml | .venv/test
	$(BIN)/python -m uv venv --quiet --clear --python $(BIN)/python .venv-oldest
	$(BIN)/python -m uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[demo]' --group test
	@touch $@

.venv/bin/python:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
		echo "jaxnorm needs Python 3.12 or newer; found $$('$(or $(PYTHON),python3)' --version 2>&1). Name one: make PYTHON=/path/to/python3.12"; exit 1; }
	'$(PYTHON)' -m venv .venv
