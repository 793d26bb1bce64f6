# Everything runs from the project's own environment, .venv, which the first target that needs it
# makes. PYTHON chooses the interpreter it is made with, VENV another place for it:
# make test PYTHON=python3.12 VENV=/tmp/saqqara-3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check prove soak chaos batch-scale gpu-check format dashboards
.PHONY: audit validate-manifests clean clients screenshots

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 20

install: $(INSTALLED) ## Make the environment, .venv, with all that tests and docs need

demo: $(INSTALLED) ## Find facts in documents on a local Ray, with and without retention
	$(BIN)/python benchmarks/demo.py

# Tests that start Ray run alone: they have many processes and watch the time.
test: $(INSTALLED) ## Run all tests
	$(BIN)/pytest -m 'not slow and not ray' --numprocesses 2 --dist loadscope
	$(BIN)/pytest -m 'ray and not slow'

check: $(INSTALLED) ## Check format, lint and types, then run all tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=tests:benchmarks:benchmarks/gpu:deploy/grafana $(BIN)/mypy tests
	MYPYPATH=benchmarks:benchmarks/gpu:benchmarks/peer_runners $(BIN)/mypy benchmarks
	MYPYPATH=deploy:deploy/grafana $(BIN)/mypy deploy
	$(MAKE) test

# In the order of their names: the longest file has one test, and would be the last by their number.
prove: $(INSTALLED) ## The longer proofs: parity on the real model, 20,000 random requests (25 minutes)
	$(BIN)/pytest -m 'slow and not ray' --numprocesses 2 --dist loadscope \
	    --no-loadscope-reorder tests/slow
	$(BIN)/pytest -m 'slow and ray' tests/slow

fault-schedules: $(INSTALLED) ## Run 100,000 random schedules of faults (ARGS="--again SEED": one)
	$(BIN)/python tests/support/run_fault_schedules.py $(ARGS)

gpu-check: ## Prove and measure the GPU path on this machine's GPU (ARGS=--first, --rest)
	PYTHONPATH=src $(PYTHON) benchmarks/gpu/gpu_check.py $(ARGS)

soak: $(INSTALLED) ## Load a server for 30 minutes (MINUTES=1: shorter), killing ranks; look for leaks
	$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),30) $(ARGS)

batch-scale: $(INSTALLED) ## Answer 2 GB of Parquet with kills, and with two replicas beside one
	$(BIN)/python benchmarks/batch_scale.py $(ARGS)

chaos: $(INSTALLED) ## A batch job whose processes are killed and stopped (ARGS: see tests/chaos/chaos.py)
	PYTHONPATH=tests $(BIN)/python tests/chaos/chaos.py $(ARGS)

screenshots: $(INSTALLED) ## Take the pictures of the server's page, docs/images/page*.png
	PYTHONPATH=tests $(BIN)/python -m support.page_screenshots

clients: $(INSTALLED) ## Run existing clients against a server (ARGS="--only openai litellm": these)
	PYTHONPATH=tests $(BIN)/python tests/clients/run.py $(ARGS)

format: $(INSTALLED) ## Format the code and fix what lint can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dashboards: $(INSTALLED) ## Write the Grafana dashboards, deploy/grafana/*.json
	$(BIN)/python deploy/grafana/dashboards.py

audit: ## Ask about known vulnerabilities of what constraints.txt pins (ARGS="--service osv")
	$(PYTHON) deploy/audit.py $(ARGS)

validate-manifests: $(INSTALLED) ## Check deploy/ku* against schemas (KUBERAY_CRD_DIR: Ray's)
	$(BIN)/python deploy/validate.py

clean: ## Remove caches and build outputs (the environment stays: rm -r .venv)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -prune \
	    -exec rm -rf {} +

# torch comes first, at its pin and alone: the one big download, not repeated when a later
# requirement fails.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Saqqara needs Python \
	3.11 or newer, this is %d.%d; choose another one: make PYTHON=python3.12" \
	% sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,serve,data]'
	@touch $@
