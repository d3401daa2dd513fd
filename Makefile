# Nothing is needed before `make demo` or `make test` but Python 3.10+ and make: both set up .venv themselves.
PYTHON ?= python3
# Test processes at a time: one for each core that is free, with 2 GB of memory for each.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .venv-peers

.PHONY: demo test check lint types package faults peers training-step clean

# Both are thousands of operations on tiny tensors, on which threads wait for each other: beside one other busy process
# two of them are 40 times as slow as one.
demo test: export OMP_NUM_THREADS := 1

demo: $(READY)
	$(BIN)/qtemper train digits-w2a2-tempering

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The wheel, installed without the repository beside it, in an environment of its own.
package: $(READY)
	rm -rf build/package && mkdir -p build/package
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/package .
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/pip install --quiet -c constraints.txt "$$(ls build/package/*.whl)[train]"
	cd build/package && venv/bin/python -I -c "import qtemper; print(qtemper.__file__, qtemper.__version__)"
	cd build/package && venv/bin/qtemper train digits-w2a2-tempering --out run \
		--set float_train.epochs=2 --set train.epochs=1
	cd build/package && venv/bin/qtemper evaluate run --json

# torch first and by itself: an index may offer several builds, and the constraint picks one for everything after.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The table of docs/reliability.md: kills, full disks, damage, wrong settings; under 15 minutes on two cores.
faults: $(READY)
	$(BIN)/python -m benchmarks.faults

# The libraries that the training step is compared with, never in the environment that develops and tests qtemper.
peers: $(PEERS)/.ready

$(PEERS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet -c constraints.txt torch
	$(PEERS)/bin/pip install --quiet -c constraints.txt -e '.[peers]'
	touch $@

# Time and memory of a training step, beside float and the peers; hours for everything, see --help for less.
training-step: $(READY) $(PEERS)/.ready
	$(BIN)/python -m benchmarks.training_step
