# Commands that need nothing but Python: `make check` (the conformance suite), `make test` (our own tests) and
# `make faults` (faults planted in the implementation, each of which the suite must kill).
# Each sets up .venv with the pinned packages first. `make check PYTHON=python3 NOVENV=1` uses an interpreter that
# already has torch and Triton, as GPU machines have, and installs nothing.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifdef NOVENV
RUN := $(PYTHON)
READY := .moegate/linked
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: check test faults lint bench setup clean

check: $(READY)
	$(RUN) -m moegate check $(ARGS)

# Without a GPU the tests of kernels run under Triton's interpreter, which a process must be told before it starts.
test: export TRITON_INTERPRET ?= $(if $(wildcard /dev/nvidia0),0,1)
test: $(READY)
	$(RUN) -m pytest tests -n 2 $(ARGS)

faults: $(READY)
	$(RUN) -m moegate faults --witness $(ARGS)

bench: $(READY)
	$(RUN) -m moegate.bench $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	rm -rf .links && mkdir -p .links/moegate
	ln -s $(foreach room,reference impl conformance bench,../../$(room)) $(patsubst %,../../%,$(wildcard cli/*.py)) .links/moegate/
	$(RUN) -m pyright --pythonpath $(RUN)
	PYTHONPATH=.links $(RUN) -c "from importlinter.cli import lint_imports_command as lint; lint()"

setup: $(READY)

# torch comes first and by its pinned version: a range would fetch a GPU build of several gigabytes.
$(VENV)/.ready: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

.moegate/linked: pyproject.toml setup.py
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	mkdir -p .moegate && touch $@

clean:
	rm -rf $(VENV) .links .moegate build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
