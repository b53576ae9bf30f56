# Needs GNU make and Python >= 3.12; everything else goes into .venv.
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast suite suite-fast test-all test-x64 test-next test-devices test-oldest test-3.12 test-3.13 lint accuracy offsets hero traffic traffic-tpu throughput bench bench-random bench-groups bench-networks bench-overhead execute execute-all notebooks docs

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

# The tests run on the CPU, whatever the machine has: the suite proves the same everywhere.
test test-fast suite suite-fast test-all test-x64 test-next test-devices test-oldest test-3.12 test-3.13: export JAX_PLATFORMS = cpu

# The types are checked on one core while the tests begin on the others.
test: .venv/test ## lint, types, tests and doctests, in about 8 minutes on two cores
	@$(MAKE) --no-print-directory --jobs 2 lint suite

test-fast: .venv/test ## lint, types and the quick tests, in about a minute
	@$(MAKE) --no-print-directory --jobs 2 lint suite-fast

suite: .venv/test
	$(PYTEST) $(ARGS)

suite-fast: .venv/test
	$(PYTEST) -m 'not slow'

# .venv has the newest JAX that pyproject.toml admits, so the first of these is the suite on the newest one.
test-all: lint ## everything, in an hour or two: each case, x64, the next JAX, 2 and 8 devices, the oldest versions, Python 3.13
	$(PYTEST) --all
	$(MAKE) execute-all test-x64 test-next test-devices test-oldest test-3.13

# The stylization example mixes its own float32 with JAX's defaults, which convolutions refuse under x64.
test-x64: export JAX_ENABLE_X64 = 1
test-x64: .venv/test ## the suite with 64-bit numbers on; ARGS="--draw 2" runs two random tests of every file
	$(PYTEST) --ignore tests/test_stylize.py $(ARGS)

# The kernel cannot evaluate the primitive of JAX's next derivative rules, and its interpreter wants a single device, so
# these two targets run the files about plain XLA.
PLAIN := $(patsubst %,tests/test_%.py,activations derivatives edge_cases group_norm jax_features layers offsets platforms transformations)

# JAX contains the next implementations of its derivative rules already.
test-next: export JAX_CUSTOM_JVP3 = 1
test-next: export JAX_CUSTOM_VJP3 = 1
test-next: export JAX_REMAT3 = 1
test-next: .venv/test ## tests of plain XLA with JAX's next custom_jvp, custom_vjp and remat; ARGS="--draw 8"
	$(PYTEST) $(PLAIN) -m 'not kernel' $(ARGS)

test-devices: .venv/test ## tests of plain XLA on two and on eight CPU devices; ARGS="--draw 8"
	XLA_FLAGS=--xla_force_host_platform_device_count=2 $(PYTEST) $(PLAIN) -m 'not kernel' $(ARGS)
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(PYTEST) $(PLAIN) -m 'not kernel' $(ARGS)

test-oldest: .venv-oldest/test ## the suite on the oldest versions that pyproject.toml admits; ARGS="--draw 3"
	.venv-oldest/bin/python -m pytest $(PYTEST_OPTIONS) $(ARGS)

test-3.12 test-3.13: test-%: .venv-%/test ## the suite on that Python; ARGS="--draw 3"
	.venv-$*/bin/python -m pytest $(PYTEST_OPTIONS) $(ARGS)

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

hero: .venv/bench ## the first picture of the README, from accuracy and the last make bench
	$(BENCHMARK).hero benchmarks/results/compare.json --plot benchmarks/results/hero.png

traffic: .venv/bench .venv/aot ## count the memory traffic of code compiled for an H100 and an A100, compared with Flax
	$(BENCHMARK).traffic $(call RESULTS,traffic) $(ARGS)

traffic-tpu: .venv/bench .venv/aot-tpu ## the same for a TPU v5e, on random shapes; ARGS="--seeds 2 3 --count 4"
	$(BENCHMARK).traffic --devices TPU --count 16 $(call RESULTS,traffic-tpu) $(ARGS)

throughput: .venv/bench .venv/aot ## count registers, spills, shared memory and instructions of the kernel for H100 and B200
	$(BENCHMARK).throughput $(call RESULTS,throughput) $(ARGS)

bench: .venv/bench ## time relu(norm(x)) compared with other libraries, in about 10 minutes; ARGS="--torch-python PYTHON"
	$(BENCHMARK).compare $(call RESULTS,compare) --plot benchmarks/results/compare.png $(ARGS)

bench-random: .venv/bench ## the same with Flax on random shapes; ARGS="--seeds 7 8"
	$(BENCHMARK).compare --seeds $(call RESULTS,random) $(ARGS)

bench-groups: .venv/bench ## the same with group norm, beside Flax's
	$(BENCHMARK).compare --groups --contenders Flax 'Flax, stable' --seeds $(call RESULTS,groups) $(ARGS)

bench-networks: .venv/bench .venv/aot ## what norms cost in networks: time, memory, time to compile; ARGS=--small
	$(BENCHMARK).networks --h100 $(call RESULTS,networks) $(ARGS)

bench-overhead: .venv/bench ## what a small call costs: tracing, compiling, the first and the next call
	$(BENCHMARK).overhead $(call RESULTS,overhead) $(ARGS)

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

# A Python that is not here uv downloads, where it can. pyenv has commands for versions that are not switched on, so we
# name those that are installed.
.venv-3.%/test: pyproject.toml | .venv/test
	@$(BIN)/python -m uv venv --quiet --clear --python "$$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.$*.*/bin/python 2>/dev/null | tail -1 | grep . || echo 3.$*)" .venv-3.$* || { \
		echo "There is no Python 3.$* here, and uv could not download one. Install it, or run make test-all where it is."; exit 1; }
	$(BIN)/python -m uv pip install --quiet --python .venv-3.$* --editable '.[demo]' --group test
	@touch $@

.venv/bin/python:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
		echo "jaxnorm needs Python 3.12 or newer; found $$('$(or $(PYTHON),python3)' --version 2>&1). Name one: make PYTHON=/path/to/python3.12"; exit 1; }
	'$(PYTHON)' -m venv .venv
