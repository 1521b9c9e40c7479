# `make demo` and `make test` install what they need. They want Debian with apt, git and Python 3.11 or later.
.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
# What the benchmarks compare with has an environment of its own, never the project's.
PEERS := benchmarks/.peers
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PYTHON ?= python3
# Most tests wait for a broker or a process: more of them at once than there are cores.
TESTS_AT_ONCE ?= 4
NEWEST = UV=$(abspath $(BIN))/uv TESTS_AT_ONCE=$(TESTS_AT_ONCE) scripts/test-newest
# Compiled once, or each of the thousands of processes that the tests start compiles what it imports.
export UV_COMPILE_BYTECODE = 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-newest check fast docs chaos servers browser dist bench bench-quick clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/runtime ## Two workers share five tasks, one worker is killed, nothing is lost
	$(BIN)/leveret demo

test: check docs servers browser ## Everything CI runs: linters, types, all tests on real brokers, some on the newest Python
	$(NEWEST) -q -n $(TESTS_AT_ONCE) tests/unit tests/conformance tests/lifecycle/test_django.py
	rm -f .coverage .coverage.*
	COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml $(BIN)/coverage run -m pytest -n $(TESTS_AT_ONCE) --maxschedchunk 1
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

test-newest: $(VENV)/dev ## All tests that need no RabbitMQ, on the newest Python
	$(NEWEST)

check: $(VENV)/dev ## Linters, types and the import rule
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	for folder in examples/*/; do (cd $$folder && MYPYPATH=../../src:. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml *.py) || exit 1; done
	$(BIN)/lint-imports

fast: $(VENV)/dev ## The tests that need no RabbitMQ and no processes
	$(BIN)/pytest -q tests/unit

docs: $(VENV)/dev ## The documentation site, into site/; a warning is an error
	$(BIN)/zensical build --clean --strict

chaos: $(VENV)/dev servers ## The fault run: is a task lost? CHAOS="--seed 7 --on sqlite --fault disk-full"
	$(BIN)/python -m chaos $(CHAOS)

servers: ## Install the RabbitMQ servers and the databases that the tests start their own of
	scripts/install-rabbitmq
	scripts/install-databases

browser: ## Install the browser that the tests look at the dashboard with
	scripts/install-browser

dist: $(BIN)/uv ## Wheel and sdist, into dist/; each is installed into an empty environment, and runs the demo
	UV=$(abspath $(BIN))/uv PYTHON=$(PYTHON) scripts/check-dist

bench: $(VENV)/dev $(PEERS)/installed servers ## Measure Leveret beside its peers and write benchmarks/RESULTS.md (BENCH="--on 4")
	$(BIN)/python -m benchmarks $(BENCH)

bench-quick: $(VENV)/dev $(PEERS)/installed servers ## The same in three minutes: fewer peers and rounds, writes nothing
	$(BIN)/python -m benchmarks --quick $(BENCH)

clean: ## Remove what was built here
	rm -rf $(VENV) $(PEERS) dist site .cache .coverage* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# The standard library's venv is a package of its own on Debian.
$(BIN)/uv:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y --no-install-recommends python3-venv; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv

$(VENV)/runtime: $(BIN)/uv pyproject.toml uv.lock
	UV_PROJECT_ENVIRONMENT=$(VENV) $(BIN)/uv sync -q --locked --inexact --no-default-groups
	@touch $@

$(VENV)/dev: $(BIN)/uv pyproject.toml uv.lock
	UV_PROJECT_ENVIRONMENT=$(VENV) $(BIN)/uv sync -q --locked --inexact
	@touch $@

$(PEERS)/installed: $(BIN)/uv benchmarks/peers.txt
	rm -rf $(PEERS)
	$(BIN)/uv venv -q --python $(BIN)/python $(PEERS)
	$(BIN)/uv pip install -q --python $(PEERS)/bin/python -r benchmarks/peers.txt
	@touch $@
