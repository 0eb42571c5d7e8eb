# Each target first installs the packages that it needs into .venv. If pyproject.toml has changed, it installs them again.
PYTHON ?= python3
# Not `?=`, because shells such as tcsh export HOST, and hosting platforms often set PORT.
PORT := $(or $(QUARTET_PORT),8000)
HOST := $(or $(QUARTET_HOST),127.0.0.1)
BIN := .venv/bin
# TORCH is the build of PyTorch to install, such as cpu or cu128. If TORCH is empty, pip installs the default build.
# .venv/torch stores the value, because packages that are installed later need the same build.
TORCH ?= $(shell cat .venv/torch 2>/dev/null)
# In a terminal, the installation shows its progress.
QUIET := $(shell test -t 2 || echo -q)
INSTALL := $(if $(TORCH),$(BIN)/python -m pip install -q uv && $(BIN)/uv pip install $(QUIET) --python $(BIN)/python --torch-backend=$(TORCH),$(BIN)/python -m pip install $(QUIET))

# One test process more than cores, because tests often wait for processes that they start.
# OMP_WAIT_POLICY=passive: idle threads of one test do not occupy the cores that parallel tests need.
# OMP_NUM_THREADS=1: the tests run in parallel, so one thread of torch in each test is faster than two.
# PYTHONDONTWRITEBYTECODE=: the empty value allows bytecode files, so that not every test process compiles the project.
export ALLOW_SKIPS
PYTEST := OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal

.PHONY: help serve test test-all check docs report train data evaluate profile bench image-check swaps model-check soak \
	determinism overload restarts records attack fuzz oldest mutants audit clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

serve: .venv/serve ## serve the networks in models_store/ on port 8000; PORT=8111 changes the port
	@QUARTET_HOST=$(HOST) QUARTET_PORT=$(PORT) exec $(BIN)/python -m app.main

test: .venv/test ## run the tests that take a few minutes together, on all cores; ALLOW_SKIPS=1 permits skipped tests
	SIMULATION_SEED=1 SEED=1 $(PYTEST) --hypothesis-seed=1 $(ARGS)

test-all: .venv/test-all ## run all tests with fresh random seeds, also the slow ones, and those with the oldest dependencies and the container image
	$(PYTEST) -m "" $(ARGS)
	$(MAKE) oldest image-check

check: .venv/test ## run ruff, mypy, import-linter, and the rules for tests and functions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python .ci/check_tests.py

docs: .venv/test ## generate the reference pages in docs/reference/ from the code
	$(BIN)/python -m docs.generate

report: .venv/test ## generate docs/measurements.md and the README's key figures from the model cards and benchmarks/results/
	$(BIN)/python -m docs.measurements

data: .venv/train ## download the training data to data/, or QUARTET_DATA_DIR
	$(BIN)/python -m training.data

train: .venv/train ## train the included versions again, with all steps of their recipes, into rebuilt/; ARGS=NAME@VERSION
	$(MAKE) -f recipes/Makefile $(ARGS)

evaluate: .venv/train ## measure the quality of the networks in models_store/ again, and compare it with the model cards
	$(BIN)/python -m training.evaluation.evaluate

bench: .venv/train ## compare the speed of the service with that of other servers; ARGS="--only cnn --servers ours,plain,mosec"
	$(BIN)/python -m benchmarks serving $(ARGS)

profile: .venv/profile ## show how much CPU time each layer of the service uses (py-spy); ARGS="--only cnn --callers 64"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks profile $(ARGS)

swaps: .venv/test ## change the active version 100 times under load, and on a full disk
	SWAPS=100 CALLERS=4 $(BIN)/python -m pytest --timeout 0 tests/robustness/test_version_swaps.py

model-check: .venv/test ## simulate the engines and the life of versions 10,000 times with random actions; RUNS=1000
	MODEL_RUNS=$(or $(RUNS),10000) SIMULATION_EPISODES=$(or $(RUNS),10000) $(PYTEST) --timeout 0 tests/engine/test_simulation.py tests/serving/test_lifecycle.py

soak: .venv/train ## soak test: run mixed load for 30 minutes; ARGS="--minutes 2"
	$(BIN)/python -m benchmarks soak $(ARGS)

determinism: .venv/train ## check that 2,000 requests get the same answers with 1 caller and with 64 callers
	$(BIN)/python -m benchmarks determinism $(ARGS)

overload: .venv/train ## overload test: send ten times the load that the service can handle
	$(BIN)/python -m benchmarks overload $(ARGS)

attack: .venv/test ## measure the latency of a normal client during attacks; ARGS="--only trailers,bombs"
	$(BIN)/python -m benchmarks attack $(ARGS)

restarts: .venv/train ## restart four services behind nginx under load, and kill a worker
	$(BIN)/python -m benchmarks restarts $(ARGS)

records: .venv/train ## capture, feedback, a shadow and batch jobs under load, while workers are killed: 30 minutes
	$(BIN)/python -m benchmarks records $(ARGS)

image-check: .venv/test ## build, run and check the container image; ARGS="--torch cu128 --max-gb 9"
	$(BIN)/python -m deploy.image_check $(ARGS)

fuzz: .venv/fuzz ## fuzz test: send random requests to the service with Schemathesis
	$(BIN)/python -m benchmarks fuzz $(ARGS)

oldest: ## run all tests with the oldest allowed dependencies, in .venv-oldest
	@.venv-oldest/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install -q "uv>=0.8"
	.venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python $(if $(TORCH),--torch-backend=$(TORCH)) --resolution lowest-direct --compile-bytecode -e ".[test]"
	.venv-oldest/bin/python -m pytest $(ARGS)

mutants: .venv/mutants ## run mutation tests of app/engine, app/serving, app/store, request parsing and HTTP; ARGS="--sample 150 app.store*"
	OMP_NUM_THREADS=1 $(BIN)/python .ci/mutants.py $(ARGS)

audit: .venv/audit ## list known vulnerabilities of the installed packages (pip-audit), and write sbom.json
	$(BIN)/cyclonedx-py environment --no-validate --output-format JSON --output-file sbom.json $(BIN)/python
	@$(BIN)/python -m pip list --format freeze --exclude-editable | sed 's/+.*//' > .venv/audited.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r .venv/audited.txt

clean: ## remove the virtual environments and generated files
	rm -rf .venv .venv-oldest mutants sbom.json .pytest_cache .ruff_cache .mypy_cache *.egg-info

# To compile the modules that the service imports takes a quarter of the time that it takes to compile all.
.venv/serve: NO_COMPILE := --no-compile
.venv/serve: EXTRA := [tables]
.venv/train: EXTRA := [train]
.venv/test: EXTRA := [test]
.venv/test-all: EXTRA := [test-all]
.venv/ray: EXTRA := [train,ray]
.venv/fuzz: EXTRA := [fuzz]
.venv/audit: EXTRA := [audit]
.venv/mutants: EXTRA := [mutants]
.venv/profile: EXTRA := [profile]
# ALSO lists the targets that need only a subset of the packages of a target. They count as installed, too.
.venv/train: ALSO := .venv/serve
.venv/test: ALSO := .venv/serve .venv/train
.venv/test-all: ALSO := .venv/serve .venv/train .venv/test .venv/ray
.venv/profile: ALSO := .venv/serve .venv/train
.venv/ray: ALSO := .venv/serve .venv/train
.venv/fuzz .venv/mutants: ALSO := .venv/serve .venv/train .venv/test
.venv/serve .venv/train .venv/test .venv/test-all .venv/ray .venv/fuzz .venv/mutants .venv/profile .venv/audit: pyproject.toml
# Without Debian's package python3-venv, `python3 -m venv` fails after it has made $(BIN)/python, so test pip instead.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Setting up .venv: this takes a few minutes the first time"; $(PYTHON) -m venv .venv && echo "$(TORCH)" > .venv/torch; } || { echo "$(PYTHON) -m venv failed; on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
	@test "$$(cat .venv/torch 2>/dev/null)" = "$(TORCH)" || { echo ".venv has another build of PyTorch than TORCH=$(TORCH): run 'make clean' first" >&2; exit 1; }
	@$(INSTALL) $(NO_COMPILE) -e ".$(EXTRA)"
	@$(if $(NO_COMPILE),PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import app.main; import app.tables.read")
	@touch $@ $(ALSO)
