# quantline. `make setup` needs Python 3.11, git and make; everything else is installed into .venv and .venvs.
PYTHON ?= python3.11
BIN := .venv/bin
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH :=
# the many imports are compiled once, not at every start
unexport PYTHONDONTWRITEBYTECODE
# dvc asks the network whether there is a newer dvc, and reports usage, unless told not to
export DVC_NO_ANALYTICS := 1

.PHONY: help setup repro report test docs lint format ui push pull verify gc lock clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/ready  ## the core environment in .venv; the toolchains in .venvs follow on demand

# `ready` is made last: a half-built environment has none and is built anew.
.venv/ready: envs/core.txt
	@rm -rf .venv
	@echo "building .venv from envs/core.txt"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^uv==' envs/core.txt)"
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -r envs/core.txt
	@touch $@

# A tracking server that is down makes publish say so, loudly, and end with 75; nothing else has failed then.
PUBLISH := python -m stages.publish || [ $$? -eq 75 ]

repro: setup  ## run the pipeline: every stage of every variant that is out of date, then publish and print the table
	@python -m stages.check
	@dvc repro
	@$(PUBLISH)

report: setup  ## bring the report up to date and open it, or print where it is
	@dvc repro
	@echo "$(CURDIR)/report/index.html"
	@if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] && command -v xdg-open >/dev/null; then xdg-open report/index.html; fi

test: setup  ## the whole test suite, in two processes
	@python -m pytest -n 2 --dist loadgroup

DOCS := .venvs/docs

# The site has an environment of its own, since nothing of the pipeline needs it.
$(DOCS)/ready: envs/docs.txt | .venv/ready
	@rm -rf $(DOCS)
	@echo "building $(DOCS) from envs/docs.txt"
	@$(PYTHON) -m venv $(DOCS)
	@$(BIN)/uv pip install -q --python $(DOCS)/bin/python --no-deps -r envs/docs.txt
	@touch $@

# Not with -q: mkdocs 1.6.1 counts no warnings then, and --strict lets everything pass.
docs: $(DOCS)/ready  ## build the documentation into site/; a broken link or a page outside the menu fails
	@PYTHONPATH=src python tools/options_reference.py docs/reference/options.md
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict
	@echo "$(CURDIR)/site/index.html; with search: python -m http.server -b 127.0.0.1 -d site"

lint: setup  ## ruff, its formatter, mypy, and which package may import which
	@ruff check .
	@ruff format --check .
	@mypy
	@PYTHONPATH=src:. lint-imports --no-logo

format: setup  ## let ruff fix what it can
	@ruff check --fix .
	@ruff format .

ui: setup  ## publish what is new and open the MLflow UI
	@$(PUBLISH)
	@python -m stages.ui

push: setup  ## send every output, and what ran before, to the DVC remote (docs/guide/storage.md)
	@dvc push --run-cache

pull: setup  ## get every output from the DVC remote; `make repro` has nothing to do then
	@dvc pull --run-cache

verify: setup  ## read every output and DVC's cache, and name what is damaged
	@python -m stages.verify

gc: setup  ## list what DVC's cache holds for nobody; `python -m stages.retention apply=true` removes it
	@python -m stages.retention

lock: setup  ## resolve envs/*.in into envs/*.txt again
	@tools/lock_envs.sh

clean:  ## remove environments, scratch and caches; artifacts, DVC's cache and MLflow's store stay
	@rm -rf .venv .venvs scratch site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
