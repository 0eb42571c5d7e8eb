# Each target makes its own virtual environment in .venv first, and again when pyproject.toml has changed.
PYTHON ?= python3
PORT ?= 8000
HOST ?= 127.0.0.1
BIN := .venv/bin
# TORCH=cpu, TORCH=cu128 ...: which build of PyTorch to install; empty: the one your package index gives
TORCH ?=
INSTALL := $(if $(TORCH),$(BIN)/python -m pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=$(TORCH),$(BIN)/python -m pip install -q)

# Several tests run at the same time: idle threads of one must not use the cores of another.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: help serve test quick check docs report train data evaluate bench bench-protocols bench-replicas bench-cluster \
	bench-training bench-processes image-check swaps soak determinism overload restarts fuzz oldest audit clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

serve: .venv/serve ## the service on port 8000, or PORT=8111, with the networks of models_store/
	@QUARTET_HOST=$(HOST) QUARTET_PORT=$(PORT) exec $(BIN)/python -m app.main

test: .venv/test ## the whole test suite, on all cores
	$(PYTEST)

quick: .venv/test ## the tests that start no process and train nothing, in about a minute
	$(PYTEST) -m "not processes and not trainings"

check: .venv/test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/test ## generate the reference pages in docs/reference/ from the code
	$(BIN)/python -m docs.generate

report: .venv/test ## generate docs/measurements.md and the README's key figures from the cards and benchmarks/results/
	$(BIN)/python -m docs.measurements

data: .venv/train ## fetch the training data into data/, or QUARTET_DATA_DIR
	$(BIN)/python -m training.data

train: .venv/train ## train and publish all networks, one after the other
	$(BIN)/python -m training.cnn
	$(BIN)/python -m training.cnn --preset strong
	$(BIN)/python -m training.rnn
	$(BIN)/python -m training.lstm
	$(BIN)/python -m training.lstm --preset strong
	$(BIN)/python -m training.cnn --preset digits
	$(BIN)/python -m training.gan
	$(BIN)/python -m training.gan --preset conditional

evaluate: .venv/train ## measure what lies in models_store/ again and compare with its cards
	$(BIN)/python -m training.evaluation.evaluate

bench: .venv/train ## the service under load beside a plain FastAPI server; ARGS="--only cnn --peers litserve"
	$(BIN)/python -m benchmarks.speed.serving $(ARGS)

bench-replicas: .venv/ray ## one and two replicas under Ray Serve beside as many workers; ARGS="--kill"
	$(BIN)/python -m benchmarks.speed.replicas $(ARGS)

bench-protocols: .venv/train ## the same work through each protocol, beside the native endpoint; ARGS="--only text"
	$(BIN)/python -m benchmarks.speed.protocols $(ARGS)

bench-cluster: .venv/ray ## a Ray cluster of two nodes on this machine, a replica and a node of which are killed
	$(BIN)/python -m benchmarks.reliability.cluster $(ARGS)

bench-training: .venv/train ## the workshop's training loops beside ours
	$(BIN)/python -m benchmarks.speed.training

bench-processes: .venv/train ## training on own data with one process and with two
	$(BIN)/python -m benchmarks.speed.processes $(ARGS)

swaps: .venv/test ## versions that change under load, and what is killed in the middle: 100 times, 50 times
	SWAPS=100 CALLERS=4 KILLS=50 $(BIN)/python -m pytest --timeout 0 tests/robustness/test_version_swaps.py

soak: .venv/train ## mixed load for 30 minutes: all answers right, nothing grows; ARGS="--minutes 2"
	$(BIN)/python -m benchmarks.reliability.soak $(ARGS)

determinism: .venv/train ## 2,000 requests alone and in a crowd of 64: the same answers
	$(BIN)/python -m benchmarks.reliability.determinism $(ARGS)

overload: .venv/train ## ten times as much as can be done: what is refused, how fast, and what is left
	$(BIN)/python -m benchmarks.reliability.overload $(ARGS)

restarts: .venv/train ## four services behind nginx, each restarted twice under load, and a worker killed: who notices
	$(BIN)/python -m benchmarks.reliability.restarts $(ARGS)

image-check: .venv/test ## build the container image, run it and check it; ARGS="--torch cu128 --max-gb 9"
	$(BIN)/python -m deploy.image_check $(ARGS)

fuzz: .venv/fuzz ## schemathesis over the OpenAPI document of a service that it starts
	$(BIN)/python -m benchmarks.reliability.fuzz $(ARGS)

oldest: ## the suite with the oldest versions that pyproject.toml allows, in .venv-oldest
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install -q "uv>=0.8"
	.venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python $(if $(TORCH),--torch-backend=$(TORCH)) --resolution lowest-direct -e ".[test]"
	.venv-oldest/bin/python -m pytest $(ARGS)

audit: .venv/audit ## known holes in what is installed (pip-audit), and the list of its parts in sbom.json
	$(BIN)/cyclonedx-py environment --no-validate --output-format JSON --output-file sbom.json $(BIN)/python
	@$(BIN)/python -m pip list --format freeze --exclude-editable | sed 's/+.*//' > .venv/audited.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r .venv/audited.txt

clean: ## remove the virtual environment and what tools leave behind
	rm -rf .venv .venv-oldest sbom.json .pytest_cache .ruff_cache .mypy_cache *.egg-info

.venv/serve: EXTRA :=
.venv/train: EXTRA := [train]
.venv/test: EXTRA := [test]
.venv/ray: EXTRA := [train,ray]
.venv/fuzz: EXTRA := [fuzz]
.venv/audit: EXTRA := [audit]
# what more there is with it
.venv/train: ALSO := .venv/serve
.venv/test: ALSO := .venv/serve .venv/train
.venv/ray: ALSO := .venv/serve .venv/train
.venv/fuzz: ALSO := .venv/serve .venv/train .venv/test
.venv/serve .venv/train .venv/test .venv/ray .venv/fuzz .venv/audit: pyproject.toml
	@test -x $(BIN)/python || { echo "Setting up .venv: this takes a few minutes the first time"; $(PYTHON) -m venv .venv; }
	@$(INSTALL) -e ".$(EXTRA)"
	@touch $@ $(ALSO)
