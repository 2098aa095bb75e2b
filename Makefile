# make demo and make test need nothing done before them; both set up what is missing.
.PHONY: setup demo test test-lowest lint bench clean

BIN := .venv/bin

setup:
	@bash .ci/setup

demo: setup
	$(BIN)/kamim demo

test: setup lint
	$(BIN)/pytest -n 2 --dist loadfile

# With the lowest versions that pyproject.toml allows, in .venv-lowest (1 GB).
test-lowest: setup
	@bash .ci/lowest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# SOURCE: a folder of class folders of photographs, such as ImageNet's train. Writes runs/bench/*.json.
bench: setup
	mkdir -p runs/bench
	$(BIN)/kamim preprocess imagefolder --source "$(SOURCE)" --out runs/bench/store --detectors fast,sift,orb
	$(BIN)/kamim bench loader --store runs/bench/store --source "$(SOURCE)" --json runs/bench/loader.json
	$(BIN)/kamim bench preprocess --source "$(SOURCE)" --json runs/bench/preprocess.json
	$(BIN)/kamim bench eval --store runs/bench/store --source "$(SOURCE)" --json runs/bench/eval.json
	$(BIN)/kamim bench train --store runs/bench/store --source "$(SOURCE)" --json runs/bench/train.json
	$(BIN)/kamim bench fidelity --source "$(SOURCE)" --json runs/bench/fidelity.json
	$(BIN)/python benchmarks/gpu_check.py --json runs/bench/gpu.json

clean:
	rm -rf .venv .venv-lowest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
