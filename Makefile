# Everything runs in .venv, which these targets make and keep up to date.
#   PYTHON      the Python to start from (3.10 or newer); its torch is reused if it is >= 2.11
#   TORCH_SPEC  what to give pip where there is no such torch
#   ARGS        more arguments for scripts/prove.py, pytest or benchmarks/run.py

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
ARGS ?=

SHELL := bash
TOOK = echo "== took $$SECONDS s"
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

.PHONY: help build test prove bench lint format clean

help:
	@echo "make build     compile the native libraries into aspp_ext/ (incremental)"
	@echo "make test      make the environment, build, run the tests: minutes"
	@echo "make prove     every proof there is, from where the last run stopped: an hour"
	@echo "make bench     make the environment, build, run the benchmark, refresh its tables"
	@echo "make lint      ruff, clang-format and mypy, changing nothing"
	@echo "make format    let ruff and clang-format rewrite the sources"
	@echo "make clean     remove what was built (.venv stays)"

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PYTHON) -c '$(FIND_TORCH)' >$(SITE_PACKAGES)/installed_torch.pth 2>/dev/null || true

$(VENV)/installed: $(VENV)/pyvenv.cfg pyproject.toml requirements-models.txt
	@if [ -s $(SITE_PACKAGES)/installed_torch.pth ]; \
	then echo "== reusing the torch in $$(cat $(SITE_PACKAGES)/installed_torch.pth)"; \
	else echo "== installing $(TORCH_SPEC)"; $(PIP) install '$(TORCH_SPEC)' && $(TOOK); fi
	@echo "== building"
	@$(PIP) install 'setuptools>=77' pybind11 ninja && $(PY) setup.py build_ext --inplace && $(TOOK)
	@echo "== installing aspp_ext, tests' and benchmarks' requirements"
	@$(PIP) install --no-build-isolation --editable '.[test,bench]' && \
	  $(PIP) install --no-deps -r requirements-models.txt && $(TOOK)
	@touch $@

build: $(VENV)/installed
	$(PY) setup.py build_ext --inplace

test: $(VENV)/installed
	$(PY) scripts/prove.py --test $(ARGS)

prove: build
	$(PY) scripts/prove.py $(ARGS)

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

clean:
	rm -rf build dist *.egg-info aspp_ext/*.so aspp_ext/_build_info.json
