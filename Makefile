# make demo   install, fine-tune the shipped small model for a minute, upscale examples/lr, print the table
# make test   install with the dev, eval, networks and perceptual extras, lint, types, tests
# make small-model   makes a model like the shipped one: photographs (210 MB of Debian packages), six trainings, comparison (1.5 hours on two cores)
# make chaos  kills a run at random moments until it is done and compares every bit; hub faults; fuzz (minutes)
# TORCH=torch==2.13.0 make demo   chooses the torch build (for example a CPU wheel)
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check tests chaos small-model clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . "$(TORCH)"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev,eval,networks,perceptual]" "$(TORCH)"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: check tests

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

tests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

chaos: $(VENV)/.installed-dev
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m chaos.kills
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/fuzz_hub.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/fuzz_doors.py

small-model: $(VENV)/.installed
	test -d photos/crops/train || { $(BIN)/python -m pip install --quiet scikit-image \
		&& $(BIN)/python examples/collect_photographs.py --output photos --crops 256; }
	$(BIN)/python examples/small_model.py train
	$(BIN)/python examples/small_model.py compare

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
