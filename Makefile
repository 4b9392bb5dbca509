# Every target does all the set-up that it needs, once: a virtual environment in .venv with the versions of
# constraints.txt, and flashprune built into it. Another interpreter: make PYTHON=python3.12

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
# Where torch brings none, as its CPU builds do. No constraint: a CUDA build of torch demands its own version of Triton.
TRITON := triton==3.6.0
SOURCES := $(shell find csrc -type f)

.PHONY: help demo test bench lint build clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    prune the tokens of photographs with every method, into demo/"
	@echo "make test    run the tests"
	@echo "make bench   time everything beside the published loops, into bench/: about ten minutes"
	@echo "make lint    check format, lint and types"
	@echo "make build   set up and build only"
	@echo "make clean   remove what was built; .venv stays"

demo: $(VENV)/installed
	$(BIN)/flashprune demo --out demo

# A process a core, one thread each: two processes with two threads each wait for one another.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

bench: $(VENV)/installed
	$(BIN)/flashprune bench --out bench

lint: $(VENV)/installed $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

build: $(VENV)/installed

clean:
	rm -rf build dist demo $(VENV)/installed python/*.egg-info
	rm -f python/flashprune/*.so

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
	@eval "$$FIND_PYTHON"; echo "Making $(VENV) with $$("$$python" --version)"; "$$python" -m venv $(VENV)

$(VENV)/requirements: $(BIN)/python constraints.txt
	@echo "Installing PyTorch and the build tools into $(VENV): once, several minutes on a slow line"
	$(PIP) setuptools wheel cmake ninja pybind11 torch
	@[ "$$(uname -sm)" != "Linux x86_64" ] || $(BIN)/python -c 'import sys, importlib.util as u; sys.exit(not u.find_spec("triton"))' || $(PIP) $(TRITON)
	@touch $@

# Without build isolation: the build uses the torch that is already here.
$(VENV)/installed: $(VENV)/requirements pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	@echo "Building flashprune"
	$(PIP) --quiet --no-build-isolation --editable '.[cli,test]'
	@$(BIN)/python -c "from flashprune import native as n; print('CPU library:', n.cpu_status(), '\nCUDA library:', n.cuda_status())"
	@touch $@

$(VENV)/linters: $(VENV)/requirements
	$(PIP) --quiet ruff mypy clang-format
	@touch $@
