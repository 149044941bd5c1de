# Two commands do everything on a fresh machine: `make demo` and `make test`.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/all
	$(BIN)/qkv demo

test: $(VENV)/test lint
	$(BIN)/pytest -n 2

lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/test
	$(BIN)/python -m benchmarks

# torch comes first and by itself, so that its small CPU build is taken where there is one.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/all: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --editable ".[all]"
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
