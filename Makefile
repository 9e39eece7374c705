# make demo | test | check | sanitize | dist-test | test-triton | test-full: each sets up everything it needs in .venv and may be repeated.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
INPUTS := pyproject.toml setup.py requirements/dev.txt $(NATIVE)

# One thread a process: pytest runs several side by side. Nothing in the tests may need the hub.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# The sanitizers' runtime comes before Python, with what it wraps. It looks for no leaks: Python and torch keep memory until
# the process ends.
PRELOAD = $$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)
SANITIZE_ENV = LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 $(TEST_ENV)
# Not under sanitizers: memory that they keep for a while, and error bounds of code that they round differently.
SANITIZE_TESTS := tests/ops tests/test_native.py tests/test_plan.py -k "(cpu or native or plan) and not memory_does_not_grow and not twice"

TRITON_TESTS = -m "not long"

.PHONY: help demo test check sanitize dist-test test-triton test-full clean

help:
	@echo "make demo    install into $(VENV) and run the demo"
	@echo "make test    install into $(VENV) and run the tests (PYTEST_ARGS='$(PYTEST_ARGS)')"
	@echo "make check   lint, formatting and types"
	@echo "make sanitize   the kernels' tests with address and undefined-behaviour sanitizers"
	@echo "make dist-test  wheel and sdist, built and tried in fresh environments, with and without a compiler"
	@echo "make test-triton  the Triton kernels, interpreted and compiled without a GPU, in $(VENV)-triton; not the long tests"
	@echo "make test-full  make test, and all tests of the Triton kernels"
	@echo "make clean   remove $(VENV) and build leftovers"
	@echo "PYTHON=$(PYTHON) makes the environment; it must be 3.10 or newer"

demo: $(VENV)/.installed
	$(BIN)/fastprompt demo

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastprompt
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(wildcard tests/native/*.cpp)

# Into a tree of its own, which the tests then import.
sanitize: $(VENV)/.installed-dev
	FASTPROMPT_BUILD=cpu FASTPROMPT_BUILD_DEBUG=1 $(BIN)/python setup.py --quiet build --build-lib build/sanitize
	$(SANITIZE_ENV) $(BIN)/pytest -o pythonpath="build/sanitize tests" $(PYTEST_ARGS) $(SANITIZE_TESTS)

dist-test: $(VENV)/.installed-dev
	$(BIN)/python tests/dist/check.py

# In an environment of its own, which has Triton and what its interpreter needs.
test-triton:
	$(MAKE) VENV=$(VENV)-triton $(VENV)-triton/.installed-triton
	$(TEST_ENV) $(VENV)-triton/bin/python -m pytest $(PYTEST_ARGS) $(TRITON_TESTS) tests/triton_kernels tests/bench/test_gpu_check_interpreted.py

test-full: test
	$(MAKE) test-triton TRITON_TESTS=

clean:
	rm -rf $(VENV) $(VENV)-triton build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An environment that is there already is used as it is. torch comes first: whatever depends on it then keeps it.
$(VENV)/.torch: requirements/cpu.txt
	@test -x $(BIN)/python || { \
	    command -v $(PYTHON) >/dev/null || { \
	        echo "error: $(PYTHON) was not found; install Python 3.10 or newer, or name one: make PYTHON=python3.11" >&2; exit 1; }; \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	        echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), fastprompt needs 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }; \
	    $(PYTHON) -m venv $(VENV); }
	@if nvidia-smi -L >/dev/null 2>&1; then \
	    echo "GPU found: torch is not constrained"; $(PIP) install 'torch>=2.10'; \
	else $(PIP) install -r requirements/cpu.txt; fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(INPUTS)
	$(PIP) install -c requirements/dev.txt -e '.[peft]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c requirements/dev.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-triton: $(VENV)/.torch $(INPUTS) requirements/triton.txt
	FASTPROMPT_BUILD=none $(PIP) install -r requirements/triton.txt -e . pytest pytest-xdist hypothesis
	@touch $@
