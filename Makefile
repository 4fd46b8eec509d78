# `make demo` and `make test` do all the set-up themselves (.venv, CPU packages).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help env reasoning-gym transformer-engine verifiers demo test test-all check format lint words types lock licences clean

help:
	@echo "make demo    warm up a tiny MoE, then train it by RL (FiberPO, Megatron-Core, SGLang)"
	@echo "make test    all tests but the exhaustive ones"
	@echo "make test-all  all tests"
	@echo "make check   format, lint, words, types, tests"
	@echo "make format  reformat the code"
	@echo "make reasoning-gym  install the package of the environment \"reasoning_gym\" (needs a C compiler)"
	@echo "make verifiers  make the interpreter of the environment \"verifiers\""
	@echo "make lock    lock the versions and hashes of all packages again (needs the package index)"
	@echo "make licences  write docs/licences.md again"

env:
	@PYTHON=$(PYTHON) tools/make_env.sh

demo: env
	@tools/demo.sh $(DEMO_ARGS)

# The tests of the fused kernels run Triton's interpreter and compiler (a wheel of some 200 MB). Beside the environment,
# not in it: Megatron and SGLang behave differently where Triton can be imported. 3.7.1 is what torch 2.13 uses on CUDA.
TRITON := .venv/triton-3.7.1
$(TRITON): | env
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --only-binary :all: \
		--target $@ -r tools/requirements-triton.lock

# The losses of verl and TRL are compared with ours: two wheels of 3 MB, without what their trainers need.
PEERS := .venv/peers-verl-0.9.1-trl-1.16.0
$(PEERS): | env
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --require-hashes \
		--only-binary :all: --target $@ -r tools/requirements-peers.lock

# Tests build and run the layers of a GPU with Transformer Engine's Python (two wheels of some 1 MB, no CUDA): a folder for
# each version, which is on no path, so that the CPU platform goes on without it.
TRANSFORMER_ENGINE := .venv/transformer-engine-2.20.2 .venv/transformer-engine-2.10.0
transformer-engine: $(TRANSFORMER_ENGINE)
$(TRANSFORMER_ENGINE): .venv/%: tools/requirements-%.lock | env
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --only-binary :all: \
		--target $@ -r $<
	touch $@

# The newest supported Megatron-Core asks for Python 3.12; what this package uses of it runs on 3.11 too, and only from
# this folder, which is on no path.
LATER_MEGATRON := .venv/megatron-core-0.19.2
$(LATER_MEGATRON): tools/requirements-megatron-core-0.19.2.lock | env
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --only-binary :all: \
		--python-version 3.12 --ignore-requires-python --target $@ -r $<
	touch $@

# The package of the environment "reasoning_gym" and what it needs go into the environment in a step of their own: three of
# its requirements are source archives, and one of them has to be compiled. Without a C compiler its tests are skipped.
REASONING_GYM := .venv/.reasoning-gym-0.1.25
reasoning-gym: $(REASONING_GYM)
$(REASONING_GYM): tools/requirements-reasoning-gym.lock | env
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --no-build-isolation \
		--only-binary :all: --no-binary cellpylib,pycosat,zss -r $<
	touch $@

# The package verifiers needs another version of openai's client than SGLang, so that it has an interpreter of its own (some
# 500 MB). `make test` skips its tests where it is missing.
VERIFIERS := .venv/verifiers-0.3.1
verifiers: $(VERIFIERS)/.made
$(VERIFIERS)/.made: tools/requirements-verifiers.lock | env
	$(BIN)/python -m venv $(VERIFIERS)
	$(VERIFIERS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes \
		--only-binary :all: -r $<
	touch $@

# The tool that resolves versions is not part of the environment; a test resolves what GPUs need (metadata alone).
UV := .venv/uv-0.13.9
$(UV): | env
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ uv==0.13.9

# Most tests wait for other processes more than they compute. Every worker keeps an SGLang server of its own (600 MB).
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
HAS_COMPILER := $(shell command -v cc)
TEST_PACKAGES := $(TRITON) $(PEERS) $(TRANSFORMER_ENGINE) $(UV) $(if $(HAS_COMPILER),$(REASONING_GYM))
test: env $(TEST_PACKAGES)
	$(PYTEST) -m "not exhaustive" $(TEST_ARGS)

# Everything, the cases included that only vary what others cover (marked `exhaustive`).
test-all: env $(TEST_PACKAGES) $(VERIFIERS)/.made $(LATER_MEGATRON)
	$(PYTEST) $(TEST_ARGS)

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: env words
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Docstrings are whole sentences, and some phrases are not used: tools/check_words.py says which, and why.
words: env
	$(BIN)/python tools/check_words.py

types: env
	$(BIN)/mypy

check: lint types test

lock: $(UV)
	$(BIN)/python tools/lock_requirements.py $(UV)/bin/uv
	$(MAKE) licences

licences: env $(REASONING_GYM)
	$(BIN)/python tools/make_licences_page.py

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
