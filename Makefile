# Everything sets itself up: on a machine with Python 3.11 and nothing else, `make demo` and `make test` just run.
#
#   make demo        a real Megatron-LM training on this machine's CPU, in under ten minutes
#   make test        what CI runs: linters, types, tests; the long ones are left to `make test-all`
#   make bench       the promised ratios
#
# On a machine whose package index gives another torch by default, say which build you want:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3.11
VENV ?= .venv
TORCH ?= torch==2.13.0
# Most of what is long about the tests is waiting, so more of them than there are cores run side by side.
WORKERS ?= 4
BIN := $(VENV)/bin
# A rank that spins while it waits for another takes the core that the other one needs.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The tests start Python some thousand times: it has to keep what it compiles.
unexport PYTHONDONTWRITEBYTECODE

say = @printf '\n==> %s\n' $(1)

.PHONY: demo test test-all lint bench source clean

demo: $(VENV)/.train source
	$(call say,"training examples/tiny: two processes$(comma) one hundred steps")
	$(BIN)/python run.py --config-path ./examples/tiny/conf --config-name train action=run

test: $(VENV)/.dev source lint
	$(call say,"running the tests")
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadgroup

test-all: $(VENV)/.dev source lint
	$(call say,"running all tests, the long ones too")
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

lint: $(VENV)/.dev
	$(call say,"linters and types")
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/patches.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/engine.py --threads 1
	@if [ "$$(id -u)" -eq 0 ]; then $(BIN)/python benchmarks/fanout.py; else echo "benchmarks/fanout.py makes hosts and needs root"; fi

source: $(VENV)/.train
	$(call say,"the pinned Megatron-LM source$(comma) patched for this machine")
	@$(BIN)/flagscale source fetch megatron

comma := ,

$(VENV)/bin/python:
	$(call say,"making a virtual environment in $(VENV)")
	$(PYTHON) -m venv $(VENV)

# torch comes first and by itself: nothing that is installed later may choose another build of it.
$(VENV)/.torch: $(VENV)/bin/python
	$(call say,"installing $(TORCH): the largest part$(comma) a minute or two")
	$(BIN)/python -m pip install --quiet --progress-bar on $(TORCH)
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml setup.py
	$(call say,"installing this toolkit and what training needs")
	$(BIN)/python -m pip install --quiet --editable ".[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(call say,"installing what the tests need")
	$(BIN)/python -m pip install --quiet --editable ".[train,engine,serve,ray,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
