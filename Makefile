# `make` or `make help` lists the commands.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup train test faults soak gpu table lint clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

.venv/installed: requirements.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

setup: .venv/installed ## make .venv and install the pinned requirements

train: setup ## train a small ViT with DropKey on digits (under a minute, once installed)
	@$(BIN)/python train.py $(ARGS)

test: setup ## run all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $${TEST_PROCESSES:-2} --dist worksteal $(ARGS)

faults: setup ## hostile commands, damaged files and 28 faults of the world around a run, all of them; half an hour
	@cd tests && ../$(BIN)/python -m hostile
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fault --every-fault $(ARGS)

soak: setup ## kills and resumes at random moments, for an hour; ARGS="minutes=1" in small
	@cd tests && ../$(BIN)/python -m soak $(ARGS)

gpu: setup ## where there is a GPU: its tests, then all benchmarks, into benchmarks/results/
	@$(BIN)/python -m pytest tests/test_cuda.py tests/test_triton.py
	@$(BIN)/python scripts/benchmark.py all device=cuda

table: setup ## run and report a table of the paper: make table TABLE=schedule SCALE=smoke
	@$(BIN)/python scripts/reproduce.py run table=$(TABLE) scale=$(SCALE) $(ARGS)

lint: setup ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean: ## remove the environment and caches; runs stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
