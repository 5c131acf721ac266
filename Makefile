# make serve ARGS="--port 9000"    make test ARGS="-k scheduler"    make venv PIP_ARGS="..." (see deploy/install.sh)
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CODE := server deltas deploy tests benchmarks
export PIP_ARGS

.DEFAULT_GOAL := help
.PHONY: help venv serve test check format lint types mutants bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

venv: $(STAMP) ## build .venv: everything, with the demo and dev extras

$(STAMP): pyproject.toml requirements.lock requirements-dev.lock deploy/install.sh
	$(PYTHON) -m venv .venv
	deploy/install.sh dependencies $(BIN)/python requirements-dev.lock
	deploy/install.sh project $(BIN)/python -e
	touch $@

serve: venv ## start the server on the demo backbone
	$(BIN)/deltaserve serve $(ARGS)

# Two workers, each with one thread of torch's: more of either would only make them wait for each other on two cores.
test: venv ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: venv ## formatting and ruff's rules
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

types: venv ## mypy, strict
	$(BIN)/mypy

check: lint types test ## what CI runs

format: venv ## format the code, mend what ruff can
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

mutants: venv ## break the code on purpose: every break must be noticed by a test
	$(BIN)/python -m tests.mutants $(ARGS)

bench: venv ## every benchmark that a CPU can show, and a summary; ARGS=--quick: small sizes
	$(BIN)/python -m benchmarks.run_all $(ARGS)

clean: ## remove what was built; keeps .venv and data
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
