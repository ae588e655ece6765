# Two commands do everything: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := runtime exporter tvm_kernels eval npu_backend
# Two test processes: a third one pays with the memory of another torch. `make test PYTEST="-x -k kernel"` adds options.
WORKERS ?= 2
PYTEST ?=
RUN_TESTS = $(BIN)/python -m pytest $(PYTEST)
# A file's tests share what is expensive, so they run in one process.
IN_PARALLEL = -n $(WORKERS) --dist loadfile
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-fast test-slow test-real lint typecheck format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "environment 1 of 3: $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@echo "environment 2 of 3: torch (the largest package: about a minute the first time)"
	@$(PIP) torch
	@echo "environment 3 of 3: the other packages, and pmpd itself (about a minute the first time)"
	@$(PIP) --editable '.[dev]'
	@touch $@

# Export the embedded model, find a schedule for it, generate with it, evaluate it.
demo: $(VENV)/.installed
	@echo "demo 1 of 4: export the embedded model"
	$(BIN)/pmpd-export --model demo --precisions 4,3,2 --calibration own --output demo-pmpd --overwrite
	@echo "demo 2 of 4: find a schedule for it"
	$(BIN)/pmpd-schedule demo-pmpd --task jsonl --data exporter/demo/openings.jsonl --prompt-template '{prompt}' \
	  --max-new-tokens 48 --tolerance 20% --as stories
	@echo "demo 3 of 4: write a story with it, coloured by precision"
	$(BIN)/pmpd-run demo-pmpd -p "Once upon a time, there was a little girl named Lily." -n 100 --show-precision
	@echo "demo 4 of 4: compare schedules with the unquantized model"
	$(BIN)/pmpd-eval demo-pmpd --task fidelity --data exporter/demo/openings.jsonl \
	  --schedule uniform:4 --schedule uniform:3 --schedule uniform:2 --schedule static:3@16,2@32 --max-new-tokens 48 \
	  --speed --html demo-report.html --json demo-report.json
	@echo
	@echo "The bundle is demo-pmpd/. Open demo-report.html in a browser: quality and speed of each schedule, and the answers"
	@echo "coloured by precision. In the table, compare uniform:3 with static:3@16,2@32: same bits on average."
	@echo "Write more: $(BIN)/pmpd-run demo-pmpd -p 'The dog saw a red ball.' --show-precision"

# What one runs before a commit: all but the slow tests. They take 15 minutes of processor time, half of that on two
# cores; the first time also 5 minutes for compiling kernels, which stay in the cache.
test: $(VENV)/.installed
	$(RUN_TESTS) $(IN_PARALLEL) -m "fast or full"

# What one runs while editing: seconds. A test that takes longer than its share fails here.
test-fast: $(VENV)/.installed
	$(RUN_TESTS) $(IN_PARALLEL) -m fast --fast-limit 3

test-slow: $(VENV)/.installed
	$(RUN_TESTS) -m slow

# Real models and data, from ../shared and ~/.cache/pmpd-models; skipped where they are missing.
test-real: $(VENV)/.installed
	$(RUN_TESTS) -m "real and not slow" tests/real

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
	rm -rf $(VENV) .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	rm -rf demo-pmpd demo-report.html demo-report.json *.partial
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
