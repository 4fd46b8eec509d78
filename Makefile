# `make demo` and `make test` do all the set-up themselves (.venv, CPU packages).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help env demo test check format lint types clean

help:
	@echo "make demo    warm up a tiny MoE, then train it by RL (FiberPO, Megatron-Core, SGLang)"
	@echo "make test    all tests"
	@echo "make check   format, lint, types, tests"
	@echo "make format  reformat the code"

env:
	@PYTHON=$(PYTHON) tools/make_env.sh

demo: env
	@tools/demo.sh $(DEMO_ARGS)

test: env
	$(BIN)/python -m pytest $(TEST_ARGS)

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: env
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
