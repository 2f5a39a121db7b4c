# Everything runs in .venv, which these targets make and keep up to date.
#   PYTHON      the Python to start from (3.10 or newer); its torch is reused if it is >= 2.11
#   TORCH_SPEC  what to give pip where there is no such torch
#   ARGS        more arguments for pytest or benchmarks/run.py

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
ARGS ?=

PY := $(VENV)/bin/python
# A reused torch brings its neighbours along, whose programs lie beside its own Python.
export PATH := $(abspath $(VENV)/bin):$(PATH):$(dir $(shell command -v $(PYTHON)))
PIP := $(PY) -m pip --disable-pip-version-check
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

CHECK_PYTHON = import sys; sys.version_info >= (3, 10) or \
	sys.exit("aspp_ext needs Python 3.10 or newer, this is " + sys.version.split()[0] + \
	": name another one, as in make PYTHON=python3.12 test")
# Prints the folder of an installed torch >= 2.11, to be seen from .venv through a .pth file.
FIND_TORCH = import importlib.metadata as m; d = m.distribution("torch"); \
	print(d.locate_file("") if [*map(int, d.version.split(".")[:2])] >= [2, 11] else "", end="")
SITE_PACKAGES = $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

EMULATED := $(CURDIR)/build/emulated
# The head is composed of these, or the CPU's own.
EMULATED_OPERATORS = 'not inference and not head'
EMULATE_TESTS = $(addprefix tests/test_,forward.py backward.py contract.py layouts.py opcheck.py)
INTERPRET_TESTS = $(addprefix tests/test_,forward.py backward.py layouts.py contract.py opcheck.py \
	autocast.py interpreted_kernels.py interpreted_faults.py interpreted_modules.py)
# Of Triton's kernels there are none in float64, and what a test asks of the CPU's alone.
NOT_INTERPRETED = float64 or gradcheck or python or by_environment or any_number_of_channels \
	or cuda_autocast or depend_on_the_batch or kernel_too_large or other_kinds \
	or reaches_exactly and backward
SANITIZED := $(CURDIR)/build/sanitized
SANITIZE_FLAGS = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
	-fno-sanitize-recover=undefined
SANITIZE_TESTS = $(addprefix tests/test_,forward.py backward.py contract.py fuzz.py polyphase.py)
# libstdc++ too: without it an exception aborts inside ASan's interceptor. A null allocation is what
# the tests of sizes beyond memory wait for.
SANITIZE_PRELOAD = $(foreach name,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(name).so))
RUN_SANITIZED = LD_PRELOAD='$(SANITIZE_PRELOAD)' UBSAN_OPTIONS=print_stacktrace=1 \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1

.PHONY: help build test bench lint format emulate interpret sanitize sanitize-emulated clean

help:
	@echo "make build     compile the native libraries into aspp_ext/ (incremental)"
	@echo "make test      make the environment, build, run the tests"
	@echo "make bench     make the environment, build, run the benchmark, refresh its tables"
	@echo "make lint      ruff, clang-format and mypy, changing nothing"
	@echo "make format    let ruff and clang-format rewrite the sources"
	@echo "make emulate   run the tests of the pyramids on the CUDA kernels, on the CPU"
	@echo "make interpret run the operators' tests on Triton's kernels, interpreted: an hour"
	@echo "make sanitize  run the quick CPU tests under AddressSanitizer and UBSan"
	@echo "make sanitize-emulated  the same with the CUDA kernels on the CPU"
	@echo "make clean     remove what was built (.venv stays)"

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PYTHON) -c '$(FIND_TORCH)' >$(SITE_PACKAGES)/installed_torch.pth 2>/dev/null || true

$(VENV)/installed: $(VENV)/pyvenv.cfg pyproject.toml requirements-models.txt
	@if [ -s $(SITE_PACKAGES)/installed_torch.pth ]; \
	then echo "== reusing the torch in $$(cat $(SITE_PACKAGES)/installed_torch.pth)"; \
	else echo "== installing $(TORCH_SPEC)"; $(PIP) install '$(TORCH_SPEC)'; fi
	@echo "== building"
	$(PIP) install 'setuptools>=77' pybind11 ninja
	$(PY) setup.py build_ext --inplace
	@echo "== installing aspp_ext, tests' and benchmarks' requirements"
	$(PIP) install --no-build-isolation --editable '.[test,bench]'
	$(PIP) install --no-deps -r requirements-models.txt
	@touch $@

build: $(VENV)/installed
	$(PY) setup.py build_ext --inplace

test: build
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

bench: build
	$(PY) benchmarks/run.py $(ARGS)

$(VENV)/linters: $(VENV)/installed
	$(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@

lint: $(VENV)/linters
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $(CXX_SOURCES)
	$(PY) -m mypy

format: $(VENV)/linters
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $(CXX_SOURCES)

emulate: build
	ASPP_EXT_CUDA=emulate ASPP_EXT_LIBRARY_DIR=$(EMULATED) $(PY) setup.py build_ext --inplace
	ASPP_EXT_LIBRARY_DIR=$(EMULATED) \
	  $(PY) -m pytest -k $(EMULATED_OPERATORS) $(EMULATE_TESTS) $(ARGS)

interpret: build
	TRITON_INTERPRET=1 ASPP_EXT_BACKEND=triton OMP_NUM_THREADS=1 \
	  $(PY) -m pytest -k 'not ($(NOT_INTERPRETED))' $(INTERPRET_TESTS) $(ARGS)

sanitize: build
	ASPP_EXT_CUDA=0 ASPP_EXT_LIBRARY_DIR=$(SANITIZED) CXXFLAGS='$(SANITIZE_FLAGS)' \
	  $(PY) setup.py build_ext --inplace
	$(RUN_SANITIZED) ASPP_EXT_LIBRARY_DIR=$(SANITIZED) \
	  $(PY) -m pytest -m 'not slow' $(SANITIZE_TESTS) $(ARGS)

sanitize-emulated: build
	ASPP_EXT_CUDA=emulate ASPP_EXT_LIBRARY_DIR=$(EMULATED)-sanitized \
	  CXXFLAGS='$(SANITIZE_FLAGS)' $(PY) setup.py build_ext --inplace
	$(RUN_SANITIZED) ASPP_EXT_LIBRARY_DIR=$(EMULATED)-sanitized \
	  $(PY) -m pytest -m 'not slow' -k $(EMULATED_OPERATORS) \
	  $(addprefix tests/test_,contract.py layouts.py) $(ARGS)

clean:
	rm -rf build dist *.egg-info aspp_ext/*.so aspp_ext/_build_info.json
