# make demo and make test need nothing done before them; both set up what is missing.
.PHONY: setup demo test lint clean

BIN := .venv/bin

setup:
	@bash .ci/setup

demo: setup
	$(BIN)/kamim demo

test: setup lint
	$(BIN)/pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
