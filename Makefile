# PYTHON makes the environments, GPU_PYTHON that of `make gpu-cache`; ARGS is passed on to the command that a target runs;
# OUT is where results go; CALL is which half of `make gpu`; MINUTES is how long `make fuzz` goes on.
PYTHON ?= python3
GPU_PYTHON ?= python3.12
ARGS ?=
OUT ?=
CALL ?=
MINUTES ?= 30

SUPPORTED = import sys; version = sys.version_info[:2]; (3, 10) <= version <= (3, 13) or sys.exit( \
	"fastlinear is developed with Python 3.10 to 3.13, but $(PYTHON) is Python %d.%d; " % version + \
	"name another one, as in: make PYTHON=python3.12 test")

VERSION_DEPENDENT = $(addprefix tests/,kernels/forward kernels/backward kernels/launching kernels/test_compile.py \
	$(patsubst %,ops/test_%.py,autocast checkpointing cuda_graphs gradients pytorch_data torch_compile torch_export \
	torch_func without_data) choice/test_ranks.py $(patsubst %,api/test_%.py,contract contract_calls contract_hooks \
	contract_modes explain host_time in_use in_use_replaced in_use_traced shortcut))

.DEFAULT_GOAL := help
.PHONY: help test test-oldest test-newest test-versions test-ecosystem lint mutation random-mutation fuzz resources demo bench bench-pytest report host-time gpu gpu-cache gpu-rehearsal clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile
	@echo 'PYTHON=python3.12 picks the interpreter; ARGS="..." is passed on, as in: make test ARGS="-k bias -x"'

test: .venv/installed ## run the tests on the pinned torch and Triton
	.venv/bin/pytest -n auto --dist worksteal $(ARGS)

test-oldest: .venv-oldest/installed ## run the tests on the oldest supported torch and Triton (5 GB to install)
	.venv-oldest/bin/pytest -n auto --dist worksteal $(ARGS)

test-newest: .venv-newest/installed ## run the tests on the newest supported torch and Triton (5.7 GB to install)
	.venv-newest/bin/pytest -n auto --dist worksteal $(ARGS)

test-versions: .venv-newest/installed ## run, as test-newest does, what depends most on the versions of torch and Triton
	.venv-newest/bin/pytest -n auto --dist worksteal $(VERSION_DEPENDENT) $(ARGS)

test-ecosystem: .venv-ecosystem/installed ## run the tests with other libraries: transformers, PEFT, torchao, torch.nn.utils
	.venv-ecosystem/bin/pytest -n auto --dist worksteal tests/ecosystem $(ARGS)

lint: .venv/installed ## ruff check, ruff format --check, mypy, import-linter
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

mutation: .venv/installed ## break the code in known ways, and see that the tests fail
	.venv/bin/python tests/mutation.py $(ARGS)

random-mutation: .venv/installed ## change random tokens of the code, and see that the tests fail: ARGS="--seed 1 --jitted 30"
	.venv/bin/python tests/random_mutation.py $(ARGS)

fuzz: .venv/installed ## call the layers with random shapes, strides, dtypes and settings for MINUTES=30, against float64
	.venv/bin/python tests/fuzz.py --minutes $(MINUTES) $(ARGS)

resources: .venv/installed ## compile the kernels for GPUs that need not be there: registers, spills; ARGS=--launches: machine code
	.venv/bin/python -m benchmarks.resources $(ARGS)

demo: .venv/installed ## train a classifier with the layer and with nn.Linear, for several batch sizes
	.venv/bin/python -m benchmarks.train $(ARGS)

bench: .venv/installed ## time layers of real models at many batch sizes: ARGS="--quick", "--help"
	.venv/bin/python -m benchmarks.linear $(ARGS)

bench-pytest: .venv/installed ## the same in small with pytest-benchmark: ARGS="--benchmark-autosave", "--benchmark-compare"
	.venv/bin/pytest -o addopts= benchmarks $(ARGS)

report: .venv/installed ## draw the README's tables and pictures from benchmarks/results
	.venv/bin/python -m benchmarks.report $(ARGS)

host-time: .venv/installed ## measure the microseconds that a call takes besides its kernels
	.venv/bin/python -m benchmarks.host_time $(ARGS)

# Nothing is downloaded: the machine's own torch and Triton are what is measured.
gpu: ## check and measure everything on this machine's GPU, with its own Python: OUT=FOLDER CALL=1, then CALL=2
	@test -n "$(OUT)" || { echo 'make gpu needs a folder for its results, as in: make gpu OUT=results CALL=1'; exit 2; }
	@test -n "$(CALL)" || { echo 'make gpu is two calls of six minutes each; name one, as in: make gpu OUT=$(OUT) CALL=1'; exit 2; }
	@$(PYTHON) -m benchmarks.gpu --check
	$(PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps -e .
	@$(PYTHON) -m benchmarks.gpu --call "$(CALL)" --out "$(OUT)" $(ARGS)

gpu-cache: .venv-gpu/installed ## compile here what `make gpu` launches on Hopper, into benchmarks/gpu-cache.tar.xz
	.venv-gpu/bin/python -m benchmarks.gpu_cache make $(ARGS)

gpu-rehearsal: .venv/installed ## both calls of `make gpu` where there is no GPU, on small shapes; OUT=FOLDER takes the results
	@test -n "$(OUT)" || { echo 'make gpu-rehearsal needs a folder, as in: make gpu-rehearsal OUT=rehearsal'; exit 2; }
	.venv/bin/python -m benchmarks.rehearsal --out "$(OUT)" $(ARGS)

clean: ## remove the environments, caches and build products
	rm -rf .venv .venv-oldest .venv-newest .venv-ecosystem .venv-gpu build dist fastlinear.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment: the pinned packages, and this checkout in editable mode. `unfinished` lies in it while it is being
# made; one that was interrupted is made anew.
.venv/installed: requirements.txt setup.py pyproject.toml
.venv-oldest/installed: requirements-oldest.txt setup.py pyproject.toml
.venv-newest/installed: requirements-newest.txt setup.py pyproject.toml
# A machine's pip may be configured to hold torch back, by a file of constraints.
.venv-newest/installed: export PIP_CONSTRAINT = /dev/null
# Triton finds a kernel again that the same Triton has compiled under the same Python: those of the GPU's machine.
.venv-gpu/installed: PYTHON = $(GPU_PYTHON)
.venv-gpu/installed: requirements-oldest.txt setup.py pyproject.toml
.venv-ecosystem/installed: requirements-ecosystem.txt requirements.txt setup.py pyproject.toml
.venv/installed .venv-oldest/installed .venv-newest/installed .venv-gpu/installed .venv-ecosystem/installed:
	@$(PYTHON) -c '$(SUPPORTED)'
	@if test -e $(@D)/unfinished; then rm -rf $(@D); fi
	@mkdir -p $(@D) && touch $(@D)/unfinished
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r $<
	$(@D)/bin/python -m pip install --no-build-isolation --no-deps -e .
	@rm $(@D)/unfinished && touch $@
