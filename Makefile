# Two commands from a clean clone: `make demo` and `make test`. They need Python 3.11 or
# newer and make; each makes .venv, installs what it needs and no more, and a second call
# installs nothing. `make test PYTHON=python3.12` takes another Python for .venv.

PYTHON ?= python3
FRAMEWORK ?= torch

ifeq ($(filter $(FRAMEWORK),torch tf jax),)
$(error FRAMEWORK must be torch, tf or jax, got '$(FRAMEWORK)')
endif

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt

# A worker per core. Each takes whole files, so what a file compiles is compiled once;
# it takes them in the order of tests/conftest.py, the longest first.
SIDE_BY_SIDE := --numprocesses auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test quick bench lint types mutants docs wheel archives clean

help:
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 14

demo: .venv/.demo-$(FRAMEWORK)  ## train with and without clipping; FRAMEWORK=torch|tf|jax
	$(BIN)/python examples/demo.py --framework $(FRAMEWORK)

test: .venv/.test  ## run all tests, for all frameworks
	AUTOCLIP_TEST=core,plot,torch,tf,jax,stacks,peers $(BIN)/python -m pytest $(SIDE_BY_SIDE) \
	  --durations=20 --durations-min=5

quick: .venv/.test  ## test what changed since the last commit, or FOLDER=autoclip_core/log
	FOLDER='$(FOLDER)' $(BIN)/python tests/support/quick.py

BENCHMARKS := run fixed_cost fused memory growth jax_steps keras_steps gpu

# `benchmarks/page.py --write build/bench/*.json` puts tables and picture into docs.
bench: .venv/.bench  ## time the clippers against what the frameworks have, into build/bench
	rm -rf build/bench
	mkdir -p build/bench
	@set -e; start=$$(date +%s); \
	for script in $(BENCHMARKS); do \
	  echo "== $$script"; \
	  $(BIN)/python benchmarks/$$script.py --json build/bench/$$script.json; \
	done; \
	$(BIN)/python benchmarks/picture.py build/bench/run.json build/bench/picture.png; \
	$(BIN)/python benchmarks/page.py build/bench/*.json > build/bench/tables.md; \
	echo "All is in build/bench, after $$(( $$(date +%s) - start )) seconds"

lint: .venv/.dev  ## ruff: lint and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev  ## mypy --strict over the four packages and the typed examples of the tests
	$(BIN)/mypy

mutants: .venv/.test  ## change the core line by line and see the tests notice; an hour
	$(BIN)/python tests/support/mutants.py

docs: .venv/.docs  ## build the site into site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What a wheel can get wrong is what it holds, not what it computes: some files will do.
AWAY_core := project/imports docs/doctests docs/readme project/packaging core/decide \
  core/golden core/window core/policies core/clip_log core/replay core/suggest \
  core/report core/cli
AWAY_plot := core/plot_rows core/clip_log core/replay core/report core/cli
AWAY_torch := torch/clipper torch/checkpoint torch/attach docs/readme docs/doctests
AWAY_jax := jax/faults docs/readme docs/doctests
AWAY_tf := tf/gradients tf/layouts docs/readme docs/doctests

wheel: archives $(addprefix away-,core plot torch jax tf)  ## build it, check what it holds, test it away from the tree

archives: .venv/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/check-wheel-contents dist/*.whl

# In a new environment for each extra. The tests come from the source archive with the
# packages deleted, so only the installed wheel can answer.
away-%: archives
	@echo "== the wheel with $(if $(filter core,$*),NumPy alone,the extra '$*')"
	@set -e; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	tar -xzf dist/*.tar.gz -C "$$away" --strip-components=1; rm -rf "$$away"/autoclip_*; \
	$(BIN)/python -m venv "$$away/venv"; python="$$away/venv/bin/python"; \
	pip="$$python -m pip install --quiet --constraint constraints.txt"; \
	$$pip pip; $$pip "$$(echo dist/*.whl)$(if $(filter core,$*),,[$*])" --group test; \
	cd "$$away"; AUTOCLIP_TEST=core,$* "$$python" -m pytest $(SIDE_BY_SIDE) \
	  $(foreach t,$(AWAY_$*),tests/$(dir $t)test_$(notdir $t).py)

clean:  ## remove what was built and cached; .venv stays
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# A stamp is newer than the files that say what to install. An environment that is here
# already, half made or made by hand, is completed and never cleared.

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
	$(PIP) --no-deps --group peers  # timm asks for torchvision, whose torch is another
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
