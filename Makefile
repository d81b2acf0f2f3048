# Every target sets up what it needs in .venv; nothing is installed outside of it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A stamp stands for "installed as pyproject.toml says".
STAMP := $(VENV)/.installed

.PHONY: setup quickstart test test-plain test-sanitized lint bench docs clean

setup: $(STAMP)

# uv installs in seconds what takes pip minutes; it comes from the index like everything else.
# Bytecode at once: where Python may write none, each of the tests' many processes would compile
# all of PyTorch anew, 12 s for 3.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tenfold needs Python 3.11 or newer; name one: make setup PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]'
	touch $(STAMP)

quickstart: setup
	$(BIN)/python examples/quickstart.py

# Two workers with one thread each: more would fight over the cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15 --cov=tenfold --cov-report=term:skip-covered

# Once more without the compiled kernels, what they have a part in.
test-plain: setup
	TENFOLD_KERNELS=reference OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/kernels tests/nn tests/deploy

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in an environment of their own
# that sees the packages of .venv. Without a compiler there is nothing to check.
SANITIZED := build/sanitized
ifneq ($(shell command -v $(CXX)),)
test-sanitized: setup
	test -x $(SANITIZED)/bin/python || $(BIN)/python -m venv --without-pip $(SANITIZED)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
		"$$($(SANITIZED)/bin/python -c 'import site; print(site.getsitepackages()[0])')/packages.pth"
	$(BIN)/uv pip install --quiet --python $(SANITIZED)/bin/python --no-deps --reinstall \
		-C cmake.define.TENFOLD_SANITIZE=ON -C build-dir=build/sanitized-{wheel_tag} .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
		$(SANITIZED)/bin/python -m pytest -p no:cacheprovider tests/kernels
else
test-sanitized:
	@echo "no C++ compiler: there are no compiled kernels to check"
endif

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
