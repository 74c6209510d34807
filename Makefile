# make install: everything into .venv      make demo: the main job on phantoms      make test: lint, types, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and alone: any other request would pull gigabytes of CUDA packages; never torchvision or torchaudio
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# On Linux CPUs the C allocator gives every big tensor back to the system; this keeps them (docs/benchmarks.md)
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 100000000000

.PHONY: install install-test demo sample test lint types tests clean

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[shell,metrics,export,curves]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable ".[shell,metrics,export,curves,test]"
	touch $@

install: $(VENV)/.installed

install-test: $(VENV)/.installed-test

demo: install
	$(BIN)/semisamo1 demo demo-output

# the project behind the module's `Try it`
sample: install
	$(BIN)/python Testing/make_sample.py SemiSAMO1/Resources/Sample/phantoms.zip

test: lint types tests

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-test
	$(BIN)/mypy

# two files at a time, each by one thread, as much of it waits for interpreters that start; in their order: files of few tests
# are the longest here, and would come last; what asserts times has the machine for itself
tests: install-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest -m alone

clean:
	rm -rf $(VENV) demo-output build *.egg-info
