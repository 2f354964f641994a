# Every target first brings .venv up to date with requirements.lock (quick when nothing changed).
# ORDERS, KEEP and other variables given on the command line reach the programs as environment variables.

PYTHON_BIN := .venv/bin
FAST_TESTS := $(wildcard tests/unit tests/docs tests/structure)
# Of these, those that start a process for each command of a user or simulate whole systems: minutes by themselves.
SLOW_TESTS := tests/unit/cli tests/docs/test_code_blocks.py tests/unit/testing/simulator
# More than cores: half of the time a test waits for a broker.
TEST_WORKERS ?= 3
BROKERS ?= rabbitmq redis nats postgres kafka
# The tests start some thousand processes of Python: what all of them import is compiled once, before. What a test
# writes, and writes over within the same second, must not be taken from byte code.
COMPILE := $(PYTHON_BIN)/python -m compileall -q src tests examples
test check: export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo brokers brokers-stop test check lint bench matrix lock build clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## create or update .venv
	@scripts/setup.sh

demo: setup ## the shop on real orders (ORDERS=… how many, KEEP=1 leaves the page up, TRANSPORT=kafka|rabbitmq|nats|redis|postgres, RESTART=1)
	@$(PYTHON_BIN)/python -m examples.shop.demo

brokers: setup ## install and start RabbitMQ, Redis, NATS, PostgreSQL and Kafka on loopback, for the tests
	@$(PYTHON_BIN)/python -m scripts.brokers start $(BROKERS)

brokers-stop: ## stop them; their data stays in build/brokers
	@$(or $(wildcard $(PYTHON_BIN)/python),python3) -m scripts.brokers stop

lint: setup
	$(PYTHON_BIN)/ruff format --check .
	$(PYTHON_BIN)/ruff check .
	$(PYTHON_BIN)/mypy
	$(PYTHON_BIN)/lint-imports

check: lint ## style, types, imports and the fast tests, in a minute; needs no servers
	@$(COMPILE)
	$(PYTHON_BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadgroup $(FAST_TESTS) $(SLOW_TESTS:%=--ignore=%)

test: lint $(if $(CI),brokers) ## everything: style, types, imports and all tests; 20 to 25 minutes on two cores
	@$(COMPILE)
	$(PYTHON_BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadgroup tests

bench: setup ## all benchmarks, or one suite (SUITE=embedded)
	$(PYTHON_BIN)/python -m benchmarks $(SUITE)

matrix: setup ## run the conformance suite and write the support matrix (ON=sqlite: one transport)
	$(PYTHON_BIN)/python -m tests.conformance.record $(ON)

lock: setup ## renew requirements.lock (UPGRADE=1 takes newer versions)
	$(PYTHON_BIN)/uv pip compile pyproject.toml --group dev --all-extras --universal \
		--python-version 3.11 --generate-hashes --quiet --custom-compile-command 'make lock' \
		$(if $(UPGRADE),--upgrade) --output-file requirements.lock
	@scripts/setup.sh

build: setup ## the wheel, in dist/
	$(PYTHON_BIN)/uv build --wheel --no-build-isolation --python $(PYTHON_BIN)/python --out-dir dist

clean: $(if $(wildcard build/brokers),brokers-stop) ## remove everything that was made
	rm -rf .venv .bootstrap dist build .coverage .coverage.* htmlcov \
		.mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
