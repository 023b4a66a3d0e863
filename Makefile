# Two commands on a fresh machine with Python 3.11 or newer: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Versions that are known to work together, per Python version; another Python resolves its own.
CONSTRAINTS = $(shell $(PYTHON) -c 'import sys, os; f = "constraints/py%d%d.txt" % sys.version_info[:2]; print("-c " + f if os.path.exists(f) else "")')

# Most of the tests' time goes into compiling programs that run for milliseconds.
COMPILE_FAST = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true $(FUSION)
# The newest XLA, which Python 3.12 and later get, does not know this flag, and ends a process that names it.
FUSION = $(shell $(BIN)/python -c 'import sys; print("--xla_cpu_use_fusion_emitters=false" * (sys.version_info < (3, 12)))')
# Slow tests that train for minutes, or look at what the compiler makes.
OPTIMISED := $(patsubst %,tests/%.py,whole/test_demo model/test_kernels whole/test_notebooks training/test_steps \
  study/test_study plan/test_tpu)

.PHONY: help env demo base check test test-slow fuzz kill test-beam test-buckets test-lmms test-gpu-compile test-gpu-programs lint docs notebooks

help:
	@echo 'make demo       tune the embedded tiny model with SCT, and ask it a question'
	@echo 'make check      lint, and the tests of pure functions'
	@echo 'make test       lint, and all tests but the slow ones'
	@echo 'make test-slow  what takes minutes: the whole demo, runs that are killed, the recorded chat, programs for TPUs'
	@echo 'make fuzz       3,000 damaged files for readers and commands, others each time; SEED=... CASES=... for the same again (half an hour)'
	@echo 'make kill       every command that writes, killed ten times; SEED=... for the same again (about 20 minutes)'
	@echo 'make test-beam  pre-decoding through Apache Beam, in an environment of its own (it wants older libraries)'
	@echo 'make test-buckets  a run in a bucket, by an emulator of Google Cloud Storage, in an environment of its own'
	@echo 'make test-lmms  the lmms-eval plugin, in an environment of its own (it wants PyTorch and much else)'
	@echo 'make test-gpu-compile  attention and plans compiled for NVIDIA cards, without one, with both sets of versions (2 x 4.4 GB)'
	@echo 'make test-gpu-programs  likewise a gradient step, prefill and the tower, two layers of each'
	@echo 'make docs       the documentation as web pages, in site/'
	@echo 'make notebooks  notebooks/*.ipynb from notebooks/*.py, run, with their pictures for docs/ (minutes)'
	@echo 'make base       train the embedded base model again (about three quarters of an hour)'

env: .venv/ready

.venv/ready: pyproject.toml $(wildcard constraints/*.txt)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("xcomp_jax needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[test]'
	touch $@

demo: env
	$(BIN)/python -m xcomp_jax.demo --out demo

base: env
	$(BIN)/python -m xcomp_jax.demo --base --out demo/base

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/lint-imports --no-logo
	$(BIN)/ty check

check: lint
	XLA_FLAGS="$$XLA_FLAGS $(COMPILE_FAST)" $(BIN)/python -m pytest -m 'pure and not slow' -n 2 --dist loadfile

test: lint
	XLA_FLAGS="$$XLA_FLAGS $(COMPILE_FAST)" $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-slow: .venv/ready-tpu
	XLA_FLAGS="$$XLA_FLAGS $(COMPILE_FAST)" $(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(OPTIMISED:%=--ignore=%)
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(OPTIMISED)

.venv/ready-tpu: .venv/ready
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[plan,test]'
	touch $@

# A seed that is given, such as the one that the last run has printed, makes the same cases again.
CASES ?= 3000

fuzz: env
	$(BIN)/python tests/helpers/fuzzing.py $(SEED:%=--seed %) --cases $(CASES) --commands $$(($(CASES) / 20))

kill: env
	$(BIN)/python tests/helpers/killing.py $(SEED:%=--seed %)

test-beam: .venv-beam/ready
	.venv-beam/bin/python -m pytest tests/data/test_beam.py

test-buckets: .venv-buckets/ready
	.venv-buckets/bin/python -m pytest tests/whole/test_buckets.py

test-lmms: .venv-lmms/ready
	.venv-lmms/bin/python -m pytest tests/evaluation/test_lmms.py

# The GPU compiler needs no GPU, but a process of its own for every architecture, and 4.4 GB for each set of versions.
PYTHON311 ?= python3.11
PYTHON313 ?= python3.13

test-gpu-compile: .venv-gpu311/ready .venv-gpu313/ready
	for env in $(^D); do for card in h100 h200 b200 a100 a10 l4 t4; do \
	  $$env/bin/python -m pytest tests/model/test_gpu.py -k "$$card and (attention or rules or plan)" || exit 1; done; done

test-gpu-programs: .venv-gpu311/ready .venv-gpu313/ready
	for env in $(^D); do for card in h100 h200 a100; do \
	  $$env/bin/python -m pytest tests/model/test_gpu.py -k "$$card and programs" || exit 1; done; done

.venv-gpu%/ready: pyproject.toml constraints/py%.txt
	$(PYTHON$*) -m venv .venv-gpu$*
	.venv-gpu$*/bin/python -m pip install -q --upgrade pip
	.venv-gpu$*/bin/python -m pip install -q -c constraints/py$*.txt -e '.[gpu,test]'
	touch $@

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build -q --strict

notebooks: env
	$(BIN)/python docs/notebooks.py

# An environment of its own for an extra that the others can't live with.
.venv-%/ready: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q --upgrade pip
	.venv-$*/bin/python -m pip install -q -e '.[$*,test]'
	touch $@
