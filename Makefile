# make demo and make test do all the set-up: a virtual environment in .venv, the pinned
# requirements, the compiled extension. Stamp files in .venv/stamps remember what is done, so
# that a second run starts at once. Nothing outside this folder is written.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# two pips at work in one environment would get in each other's way
.NOTPARALLEL:

PYTHON ?= python3
ARGS ?=
WEIGHTS ?=
, := ,

VENV := .venv
STAMPS := $(VENV)/stamps
PY := $(VENV)/bin/python
# The build finds the cmake and ninja of .venv by the PATH.
PIP := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pip --disable-pip-version-check --no-cache-dir

NATIVE := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)
CUDA_ON_HOST := build/cuda_on_host
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt $(filter csrc/%,$(NATIVE))

# Libraries that keep caches in the home directory or in the temporary one keep them here.
export XDG_CACHE_HOME := $(CURDIR)/.cache
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/torchinductor
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton

.PHONY: help demo test test-full lint format bench gpu cuda-on-host sanitize sanitize-cpu sanitize-cuda fuzz wheel sdist pictures clean distclean

help:
	@echo 'make demo       layers at work, a network that learns, maps of photos (WEIGHTS=FILE: yours)'
	@echo 'make test       the tests, a few minutes; ARGS="-k goctconv" goes on to pytest'
	@echo 'make test-full  the tests in their long forms'
	@echo 'make lint       ruff, clang-format, mypy; changes nothing'
	@echo 'make format     rewrites the source the way make lint wants it'
	@echo 'make bench      the benchmark; ARGS="--op goctconv" goes on to bench/run.py'
	@echo 'make gpu        on a machine with a GPU: builds, tests, checks and times the CUDA kernels'
	@echo 'make cuda-on-host  the CUDA kernels as a library that the tests run without a GPU'
	@echo 'make sanitize   the native kernels under sanitizers: addresses, undefined behaviour; of the CUDA'
	@echo '                kernels, run on the host, races too'
	@echo 'make fuzz       100,000 damaged .sodfast files through the C library, sanitized; N=1000 for fewer'
	@echo 'make wheel      dist/sodfast-*.whl; make sdist: dist/sodfast-*.tar.gz'
	@echo 'make pictures   redraws docs/images'
	@echo 'make clean      removes what was built; make distclean: the environment too'
	@echo
	@echo 'Each sets up .venv when needed. PYTHON=python3.12 chooses the interpreter.'

# ---- set-up ---------------------------------------------------------------------------------

$(STAMPS)/venv:
	@requirements/check_tools.sh '$(PYTHON)' '$(CXX)'
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo 'making $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/base: requirements/base.txt $(STAMPS)/venv
	@echo 'installing $< (torch is large: this can take minutes, once)'
	@$(PIP) install $(if $(CI),--quiet) -r $<
	@touch $@

$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/lint $(STAMPS)/docs $(STAMPS)/bench: $(STAMPS)/%: requirements/%.txt $(STAMPS)/base
	@echo 'installing $<'
	@$(PIP) install --quiet -r $<
	@touch $@

$(STAMPS)/test: requirements/demo.txt requirements/docs.txt requirements/train.txt requirements/export.txt
$(STAMPS)/bench: requirements/docs.txt requirements/export.txt

$(STAMPS)/triton: requirements/triton.txt $(STAMPS)/base
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) install --quiet -r $<
	@touch $@

$(STAMPS)/build: $(BUILD_INPUTS) $(STAMPS)/base
	@requirements/check_tools.sh $(PY) '$(CXX)'
	@echo 'building the extension (under a minute; with nvcc a few)'
	@$(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# The CUDA kernels run on the host, for the tests: a few seconds of compiling, no nvcc.
$(STAMPS)/cuda-on-host: $(BUILD_INPUTS) tests/native/cuda_on_host.h tests/native/cuda_races.h $(STAMPS)/base
	@echo 'building the CUDA kernels for the host'
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B $(CUDA_ON_HOST) -G Ninja -DSODFAST_CUDA_ON_HOST=ON \
	    -DTORCH_DIR="$$($(PY) -c 'from importlib.util import find_spec as f; print(f("torch").submodule_search_locations[0])')" \
	    >/dev/null
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build $(CUDA_ON_HOST) --target sodfast_cuda_on_host
	@touch $@

cuda-on-host: $(STAMPS)/cuda-on-host

# ---- work -----------------------------------------------------------------------------------

demo: $(STAMPS)/build $(STAMPS)/demo
	@$(PY) demo/run.py $(if $(WEIGHTS),--weights '$(WEIGHTS)') $(ARGS)

test: $(STAMPS)/build $(STAMPS)/test $(STAMPS)/cuda-on-host $(STAMPS)/triton
	$(PY) -m pytest -q -n 2 --dist worksteal --durations=10 $(ARGS)

test-full: $(STAMPS)/build $(STAMPS)/test $(STAMPS)/cuda-on-host $(STAMPS)/triton
	$(PY) -m pytest -q --durations=20 --full $(ARGS)

# all four say what they have to say, then the status is that of the worst
lint: $(STAMPS)/lint
	@status=0; \
	$(PY) -m ruff check . || status=1; \
	$(PY) -m ruff format --check . || status=1; \
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE) || status=1; \
	$(PY) -m mypy || status=1; \
	exit $$status

format: $(STAMPS)/lint
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE)

bench: $(STAMPS)/build $(STAMPS)/bench
	$(PY) bench/run.py $(ARGS)

# $(call sanitized,folder,sanitizers,programs): builds tests/native so
sanitized = $(VENV)/bin/cmake -S . -B build/$(1) -G Ninja -DCMAKE_BUILD_TYPE=Debug \
	    -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DSODFAST_SANITIZE=$(2) -DSODFAST_NATIVE_TESTS=ON \
	&& $(VENV)/bin/cmake --build build/$(1) --target $(3)

sanitize: sanitize-cpu sanitize-cuda

sanitize-cpu: $(STAMPS)/base
	$(call sanitized,sanitize,address$(,)undefined,sodfast_native_tests)
	$(call sanitized,races,thread,sodfast_threads_tests)
	build/sanitize/sodfast_native_tests $(ARGS)
	build/races/sodfast_threads_tests

# The CUDA kernels run on the host: stray accesses and undefined behaviour, then races.
sanitize-cuda: $(STAMPS)/base
	$(call sanitized,sanitize,address$(,)undefined,sodfast_cuda_on_host_tests)
	$(call sanitized,races,thread,sodfast_cuda_on_host_tests)
	build/sanitize/sodfast_cuda_on_host_tests $(ARGS)
	build/races/sodfast_cuda_on_host_tests $(ARGS)

# Uses the Python and the torch that are there (PYTHON=…), not .venv: they know the GPU.
gpu:
	$(PYTHON) bench/gpu/stages.py $(ARGS)

N ?= 100000
fuzz: $(STAMPS)/build
	$(call sanitized,sanitize,address$(,)undefined,sodfast_fuzz)
	$(PY) tests/native/small_plans.py build/sanitize/plans
	build/sanitize/sodfast_fuzz $(N) 1 build/sanitize/plans/*.sodfast

wheel: $(STAMPS)/base
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

sdist: $(STAMPS)/base
	$(PY) -c 'import setuptools.build_meta as backend; print(backend.build_sdist("dist"))'

pictures: $(STAMPS)/docs
	$(PY) docs/draw_goctconv.py

clean:
	rm -rf build dist *.egg-info sodfast/_C*.so $(STAMPS)/build
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache demo/out

distclean: clean
	rm -rf $(VENV) .cache
