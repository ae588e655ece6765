# Two commands do everything: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := runtime exporter tvm_kernels eval npu_backend

.PHONY: demo test test-slow lint typecheck format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Export the embedded model, generate with it, evaluate it.
demo: $(VENV)/.installed
	$(BIN)/pmpd-export --model demo --output demo-pmpd --overwrite
	$(BIN)/pmpd-run demo-pmpd -p "Once upon a time, there was a little girl named Lily." \
	  -n 100 --schedule static:3@16,2@32 --show-precision
	$(BIN)/pmpd-eval demo-pmpd --task fidelity --data exporter/demo/openings.jsonl \
	  --schedule uniform:4 --schedule uniform:3 --schedule uniform:2 --schedule static:3@16,2@32 --max-new-tokens 48 \
	  --html demo-report.html --json demo-report.json

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders become the namespace package `pmpd` through a tree of links, which type checkers can follow.
typecheck: $(VENV)/.installed
	mkdir -p .typecheck/pmpd
	for folder in $(PACKAGES); do ln -sfn ../../$$folder .typecheck/pmpd/$$folder; done
	$(BIN)/mypy $(PACKAGES:%=-p pmpd.%)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .typecheck demo-pmpd demo-report.html demo-report.json *.partial-*
