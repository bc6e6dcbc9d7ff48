# make run    set everything up and serve on 127.0.0.1:8000, with host processes and RAM
# make test   set everything up and run every check and test that needs no GPU (needs a Docker engine)
# make test-crash  kill the server, and the Docker engine, at many random moments, and audit what is left
# make soak   a mixed load with swaps for SECONDS (600) on ENGINE (process): nothing lost, nothing grows
# make bench  measure speed and memory against a direct connection

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

WORKERS ?= 3
SECONDS ?= 600
ENGINE ?= process

.PHONY: run test test-crash soak check bench clean

run: $(VENV)/.installed
	$(BIN)/orchestrator serve --engine process --devices host

# `make run` needs no test tools, but one environment is simpler than two.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy services/llama-cpp/image/*.py

# Most tests wait for something: three at a time keep two cores busy.
test: check
	$(BIN)/python -m tests.images.build
	$(BIN)/python -m tests.images.stack
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-crash: $(VENV)/.installed
	$(BIN)/python -m tests.images.build
	CRASH_ROUNDS=100 CRASH_FREEZE_S=30 $(BIN)/pytest tests/crash -s

soak: $(VENV)/.installed
	$(BIN)/python -m tests.images.build
	$(BIN)/python -m tests.soak --seconds $(SECONDS) --engine $(ENGINE)

bench: $(VENV)/.installed
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .ruff_cache
