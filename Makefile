# Every target sets up what it needs in .venv; nothing is installed outside of it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A stamp stands for "installed as pyproject.toml says".
STAMP := $(VENV)/.installed

.PHONY: setup quickstart test lint bench docs clean

setup: $(STAMP)

# uv installs in seconds what takes pip minutes; it comes from the index like everything else.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tenfold needs Python 3.11 or newer; name one: make setup PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	touch $(STAMP)

quickstart: setup
	$(BIN)/python examples/quickstart.py

# Two workers with one thread each: more would fight over the cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov=tenfold --cov-report=term:skip-covered

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Seconds; a page that is missing, a broken link or anything fetched from a network is an error.
# Never with --quiet: MkDocs then doesn't count its warnings, and nothing is strict.
docs: setup
	$(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python benchmarks/lbc_overhead.py
	$(BIN)/python benchmarks/folder_startup.py
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage site
