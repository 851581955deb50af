# Every target sets up .venv by itself, from setup.cfg and the versions in .ci/constraints.txt.
# Any variable can be given on the command line: make test PYTHON=python3.12

PYTHON      ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,\
                 $(if $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>&1 || echo no),,$(p))))
VENV        ?= .venv
DEMO_DIR    ?= runs/demo
DEMO_CACHE  ?= $(HOME)/.cache/pemt
PYTEST_ARGS ?= -n 2 --dist loadgroup --no-loadscope-reorder

SCRIPTS     := .ci/run $(wildcard launchers/*.sh launchers/*.sbatch tests/support/slurm/*)
NATIVE      := $(wildcard pemt/ops/csrc/*)

BIN         := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
OLDEST      := .venv-oldest
STAMP       := $(VENV)/.installed
LAUNCH      := $(BIN)/accelerate launch --config_file launchers/accelerate/cpu.yaml \
                 --deepspeed_config_file ds_configs/zero2.json

# One thread a process: two ranks, or two pytest workers, share the machine.
export OMP_NUM_THREADS ?= 1
# `accelerate` and `ninja` start programs by name.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo demo-quick test pytest test-fast test-oldest soak big gpu lint typecheck imports docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: $(STAMP)  ## the main job on a small world: both stages, 2 ranks, ZeRO-2 (2 to 5 minutes on 2 cores)
	$(LAUNCH) -m pemt demo --output_dir $(DEMO_DIR) --cache_dir $(DEMO_CACHE)

demo-quick: $(STAMP)  ## the same with one target and one seed (3 minutes)
	$(LAUNCH) -m pemt demo --quick --output_dir $(DEMO_DIR)-quick --cache_dir $(DEMO_CACHE)

test: lint typecheck imports pytest  ## all checks: ruff, mypy, import directions, pytest

pytest: $(STAMP)  ## pytest alone
	$(BIN)/pytest $(PYTEST_ARGS) $(TESTS)

test-fast: $(STAMP)  ## while writing: configuration, tasks, data, plan, without launches (2 minutes on 2 cores)
	$(BIN)/pytest $(PYTEST_ARGS) -m "not launch and not slow and not real and not soak" \
	  $(addprefix tests/,config tasks data plan parity)

test-oldest: $(OLDEST)/constraints.txt  ## ops, model, engine, launches with the oldest torch and transformers (5 GB)
	$(MAKE) pytest VENV=$(OLDEST) CONSTRAINTS=$< \
	  TESTS="tests/ops tests/model tests/engine $(addprefix tests/launch/test_,launch.py methods_launch.py sharded_start.py)"

# The pinned versions, with the oldest that setup.cfg accepts in place of some.
$(OLDEST)/constraints.txt: .ci/constraints.txt .ci/oldest.txt
	mkdir -p $(@D)
	sed -n 's/^\([^#]*==\).*/^\1/p' .ci/oldest.txt | grep -vif - .ci/constraints.txt | cat - .ci/oldest.txt >$@

soak: $(STAMP)  ## faults in more variants, more often and for minutes than `make test` (docs/reliability.md); 1000 mutations
	$(BIN)/pytest -m soak -rA
	PEMT_FUZZ_INPUTS=1000 $(BIN)/pytest tests/security

big: $(STAMP)  ## t5-3b and flan-t5-xl at full size on two ranks, ZeRO-3 (6 GB of disk, 20 GB of memory)
	$(BIN)/pytest -m big -rA tests/launch/test_full_size.py

gpu:  ## on one GPU, with what is installed: the op's checks, benches as JSON into runs/gpu, all tests that want one
	$(firstword $(wildcard $(BIN)/python) python3) -m tests.gpu

lint: $(STAMP)  ## ruff, shellcheck, clang-format: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x $(SCRIPTS)
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

typecheck: $(STAMP)  ## mypy on the package
	$(BIN)/mypy

imports: $(STAMP)  ## who may import whom (pyproject.toml)
	$(BIN)/lint-imports

docs: $(STAMP)  ## renew the pages that are generated: configuration, tasks
	$(BIN)/python -m docs.generate

clean:  ## remove .venv and every cache; results under runs/ stay
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find pemt tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(if $(PYTHON),,$(error No Python 3.10 or newer was found on PATH; name one: make PYTHON=/path/to/python3.11))
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	# torch alone first: another build of the same release, put into .venv beforehand, stays.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@
