# Two commands work in a clean clone: `make demo` and `make test`. They need Python 3.11 or
# newer and make. Each makes .venv and installs only what it needs; a second call installs
# nothing. `make test PYTHON=python3.12` uses another Python for .venv.

PYTHON ?= python3
FRAMEWORK ?= torch

ifeq ($(filter $(FRAMEWORK),torch tf jax),)
$(error FRAMEWORK must be torch, tf or jax, got '$(FRAMEWORK)')
endif

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt

# A worker per core. Each takes whole files, so what a file compiles is compiled once;
# it takes them in the order of tests/conftest.py, the longest first. A worker computes
# with one thread, because the other core has a worker too.
SIDE_BY_SIDE := --numprocesses auto --dist loadfile --no-loadscope-reorder

# XLA compiles small functions in a quarter of the time without its fusion emitters and
# in one piece. For JAX, LLVM does not optimize either, which halves the rest. `make wheel`
# runs the main tests of JAX with the defaults of XLA and LLVM. If a newer XLA has no such
# flag, it aborts and names it; then remove it here.
test quick: export XLA_FLAGS := --xla_cpu_use_fusion_emitters=false \
  --xla_cpu_parallel_codegen_split_count=1
test quick: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test quick trainers bench lint types mutants docs wheel archives release clean

help:
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 14

demo: .venv/.demo-$(FRAMEWORK)  ## train with and without clipping; FRAMEWORK=torch|tf|jax
	$(BIN)/python examples/demo.py --framework $(FRAMEWORK)

test: .venv/.test  ## run all tests, for all frameworks
	OMP_NUM_THREADS=1 AUTOCLIP_TEST=core,plot,torch,tf,jax,stacks,peers \
	  $(BIN)/python -m pytest $(SIDE_BY_SIDE) \
	  --durations=20 --durations-min=5

quick: .venv/.test  ## test what changed since the last commit, or FOLDER=autoclip_core/log
	FOLDER='$(FOLDER)' $(BIN)/python tests/support/quick.py

# Other packages import these if they are installed, so they have their own environment.
# `-W default`: they warn at import.
trainers: .venv/.trainers  ## test with TRL, PEFT, DeepSpeed and other optimizers
	OMP_NUM_THREADS=1 AUTOCLIP_TEST=core,torch,trainers \
	  .venv/trainers/bin/python -m pytest -W default tests/trainers --durations=5

BENCHMARKS := share run fixed_cost fused trust memory growth jax_steps keras_steps startup \
  gpu

# The last line that it prints is the command that writes tables and picture into docs.
bench: .venv/.bench  ## compare the clippers' times with the frameworks'; results in build/bench
	rm -rf build/bench
	mkdir -p build/bench
	@set -e; start=$$(date +%s); \
	for script in $(BENCHMARKS); do \
	  echo "== $$script"; \
	  $(BIN)/python benchmarks/$$script.py --json build/bench/$$script.json; \
	done; \
	$(BIN)/python benchmarks/picture.py build/bench/run.json build/bench/picture.png; \
	$(BIN)/python benchmarks/page.py build/bench/*.json > build/bench/tables.md; \
	echo "All is in build/bench, after $$(( $$(date +%s) - start )) seconds. Into docs:"; \
	echo "$(BIN)/python benchmarks/page.py --write build/bench/*.json"

lint: .venv/.dev  ## ruff: check lint and format; nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev  ## mypy --strict: the four packages, right and wrong uses
	$(BIN)/mypy

mutants: .venv/.test  ## change the core line by line; the tests must fail each time (an hour)
	$(BIN)/python tests/support/mutants.py

docs: .venv/.docs  ## build the site into site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A wheel can lack files, but it computes what the tree computes. So a few tests suffice.
AWAY_core := project/imports docs/doctests docs/readme project/packaging core/decide \
  core/golden core/window core/policies core/clip_log core/replay core/suggest \
  core/report core/cli
AWAY_plot := core/plot_rows core/clip_log core/replay core/report core/cli
AWAY_torch := torch/clipper torch/checkpoint torch/attach docs/readme docs/doctests
# Here XLA and LLVM compile with their defaults, unlike in `make test`.
AWAY_jax := jax/faults jax/clipper jax/oracles jax/update docs/readme docs/doctests
AWAY_tf := tf/gradients tf/layouts docs/readme docs/doctests

wheel: archives $(addprefix away-,core plot torch jax tf)  ## build the wheel, check its files, test it outside the tree

archives: .venv/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/check-wheel-contents dist/*.whl

# Each extra has a new environment. The tests come from the source archive, whose packages
# are deleted, so the tests import the installed wheel.
away-%: archives
	@echo "== the wheel with $(if $(filter core,$*),NumPy alone,the extra '$*')"
	@set -e; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	tar -xzf dist/*.tar.gz -C "$$away" --strip-components=1; rm -rf "$$away"/autoclip_*; \
	$(BIN)/python -m venv "$$away/venv"; python="$$away/venv/bin/python"; \
	pip="$$python -m pip install --quiet --constraint constraints.txt"; \
	$$pip pip; $$pip "$$(echo dist/*.whl)$(if $(filter core,$*),,[$*])" --group test; \
	cd "$$away"; AUTOCLIP_TEST=core,$* "$$python" -m pytest $(SIDE_BY_SIDE) \
	  $(foreach t,$(AWAY_$*),tests/$(dir $t)test_$(notdir $t).py)

release:  ## run .ci/run, build and tag the version of the tree; nothing is uploaded
	.ci/release

clean:  ## remove build results and caches, except .venv
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# A stamp is newer than the files that say what to install. An environment that exists
# already, incomplete or made by hand, is completed and never cleared.

.venv/.pip: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not it." \
	       "Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -f .venv/pyvenv.cfg && $(BIN)/python -m pip --version >/dev/null 2>&1 || \
	  $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo ".venv was made with a Python older than 3.11. Remove it first:" \
	       "rm -r .venv" >&2; exit 1; }
	$(PIP) pip
	@touch $@

.venv/.test: .venv/.pip pyproject.toml
	$(PIP) --editable '.[all]' --group test --group stacks --group demo
	$(PIP) --no-deps --group peers  # timm requires torchvision, which requires another torch
	@touch $@

.venv/.trainers: .venv/.pip pyproject.toml
	$(BIN)/python -m venv .venv/trainers
	.venv/trainers/bin/python -m pip install --constraint constraints.txt pip
	.venv/trainers/bin/python -m pip install --constraint constraints.txt \
	  --editable '.[torch]' --group test --group trainers
	@touch $@

.venv/.dev: .venv/.test
	$(PIP) --group dev
	@touch $@

.venv/.docs: .venv/.pip pyproject.toml
	$(PIP) --editable . --group docs
	@touch $@

.venv/.bench: .venv/.pip pyproject.toml
	$(PIP) --editable '.[torch,tf,jax,plot]'
	$(PIP) --no-deps --group peers
	@touch $@

.venv/.demo-%: .venv/.pip pyproject.toml
	$(PIP) --editable '.[$*,plot]' --group demo
	@touch $@
