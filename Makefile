# Every target sets up what it needs in .venv. `make venv PYTHON=/path/to/python3.11` chooses the interpreter.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := $(VENV)/.demo
NODE := $(VENV)/.node
OPENAI_NPM := 7.57.0
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Two processes, each with whole files of tests, slowest first (tests/support/seconds.py); JOBS=0 runs them in one.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?=
VOCAB ?= ../shared/tokenizer
BENCH_ARGS ?=

.PHONY: help venv test check lint format demo bench bench-smoke clean distclean

help:
	@echo "make demo         convert, verify and run a real trained model"
	@echo "make test         the whole test suite"
	@echo "make check        lint, format check, unit tests and parity tests"
	@echo "make format       rewrite the code in the project's layout"
	@echo "make bench        speed and memory beside PaddleNLP and transformers: 30 to 60 minutes"
	@echo "make bench-smoke  a few of these ratios beside the recorded ones: four minutes"
	@echo "make venv         only the environment in .venv"
	@echo "make clean        remove what was built; make distclean also removes .venv"

venv: $(STAMP)

# Re-runs when a version changes. It adds to a .venv that exists and never removes one.
$(STAMP): setup.py pyproject.toml aquila_pd/runtime/versions.py requirements/tested.txt
	@echo "Installing the tested packages into $(VENV): about 3 GB and a few minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c requirements/tested.txt -e ".[cpu,test,dev]"
	@touch $@
	@echo "Installed: $$($(BIN)/python -V), $$($(BIN)/python -m pip list 2>/dev/null | tail -n +3 | wc -l) packages."

test: $(DEMO) $(NODE)
	@$(PYTEST) $(PYTEST_ARGS)

check: lint
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

$(DEMO): requirements/demo.txt $(STAMP)
	@$(PIP) --no-deps -r requirements/demo.txt
	@touch $@

# OpenAI's JavaScript client, for one test of the server; without npm, or without a network, that test is skipped.
$(NODE): $(STAMP)
	@if command -v npm > /dev/null; then \
	  npm install --silent --no-audit --no-fund --prefix $(VENV)/node openai@$(OPENAI_NPM) || \
	  echo "npm could not install openai: its test is skipped."; fi
	@touch $@

demo: $(DEMO)
	@$(BIN)/python examples/demo.py

# docs/BENCHMARKS.md. One part: make bench BENCH_ARGS="--only decode --rounds 3". The tokenizer's part wants a folder with
# vocab.json and merges.txt, and fails alone without one: make bench VOCAB=FOLDER
bench: $(STAMP)
	@$(BIN)/python benchmarks/bench.py --vocab $(VOCAB) $(BENCH_ARGS)

bench-smoke: $(STAMP)
	@$(BIN)/python benchmarks/smoke.py

clean:
	rm -rf build dist *.egg-info demo-output bench-output .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
