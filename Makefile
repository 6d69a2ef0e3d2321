# Set-up, demo and tests. Needs Python >= 3.10 and make; everything else goes into .venv.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
# Tests run beside each other on up to four cores, one thread each.
TEST   := $(RUN) -m pytest -q -n auto --maxprocesses=4 --dist=worksteal

.PHONY: setup demo test test-fast test-all lint bench bench-gpu clean

$(VENV)/.done: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 needed; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	@echo "The environment is ready. To use it, run: source $(VENV)/bin/activate"
	@touch $@

setup: $(VENV)/.done

demo: setup
	$(RUN) docs/demo.py

lint: setup
	$(RUN) -m ruff check .

test: lint
	$(TEST) -m "not slow"

test-fast: lint
	$(TEST) -m "not slow and not scripts and not long"

test-all: lint
	$(RUN) -m pytest -q

# AGAINST=DIR is a checkout of github.com/NVlabs/edm to run beside ours.
bench: setup
	$(RUN) -m benchmarks $(if $(AGAINST),--against=$(AGAINST))

# All that a GPU is needed for: its tests, then the figures.
bench-gpu: setup
	$(RUN) -m pytest -q -m gpu
	$(RUN) -m benchmarks --device=cuda $(if $(AGAINST),--against=$(AGAINST))

clean:
	rm -rf $(VENV) demo
