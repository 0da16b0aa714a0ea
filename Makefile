# quantline. `make setup` needs Python 3.11, git and make; everything else is installed into .venv and .venvs.
PYTHON ?= python3.11
BIN := .venv/bin
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH :=
# the many imports are compiled once, not at every start
unexport PYTHONDONTWRITEBYTECODE
# disables dvc's update check and usage reports
export DVC_NO_ANALYTICS := 1

.PHONY: help setup repro report experiments test docs lint format ui push pull verify gc lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/ready  ## the core environment in .venv; the toolchains in .venvs follow on demand

# `ready` is made last, so an incomplete environment is built again.
ifdef BUNDLE
# Everything from a folder that `python -m stages.bundle` made, where there is no network (docs/guide/offline.md).
.venv/ready: envs/core.txt
	@$(PYTHON) tools/unbundle.py "$(BUNDLE)" .
	@PYTHONPATH=src $(BIN)/python tools/prefer_reflinks.py .
else
.venv/ready: envs/core.txt
	@rm -rf .venv
	@echo "building .venv from envs/core.txt"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^uv==' envs/core.txt)"
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -r envs/core.txt
	@PYTHONPATH=src $(BIN)/python tools/prefer_reflinks.py .
	@touch $@
endif

# publish exits with 75 if the tracking server is down; the pipeline itself did not fail then.
PUBLISH := python -m stages.publish || [ $$? -eq 75 ]

repro: setup  ## run every stage that is out of date, then publish and print the table
	@python -m stages.check
	@dvc repro
	@$(PUBLISH)

report: setup  ## update the report and open it, or print its path
	@dvc repro
	@echo "$(CURDIR)/report/index.html"
	@if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] && command -v xdg-open >/dev/null; then xdg-open report/index.html; fi

# DVC has a column for each figure of each variant; these are the ones of the variant to ship. They take 113 columns with
# experiments; a narrower terminal shows the change alone, where DVC would cut all of them.
experiments: setup  ## every commit and experiment with the variant that it would ship, its change, size and divergence
	@columns=$${COLUMNS:-$$(tput cols 2>/dev/null || echo 120)}; figures='change|size|kl'; \
	[ "$$columns" -ge 113 ] || figures=change; \
	dvc exp show --no-pager --drop '.*' --keep "Exp|best|metrics.json:($$figures)"

test: setup  ## the whole test suite, in two processes
	@python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

DOCS := .venvs/docs

# The site has its own environment, since the pipeline does not need it.
$(DOCS)/ready: envs/docs.txt | .venv/ready
	@rm -rf $(DOCS)
	@echo "building $(DOCS) from envs/docs.txt"
	@$(PYTHON) -m venv $(DOCS)
	@$(BIN)/uv pip install -q --python $(DOCS)/bin/python --no-deps -r envs/docs.txt
	@touch $@

# Without -q: with it, mkdocs 1.6.1 does not count warnings and --strict never fails.
docs: $(DOCS)/ready  ## build the documentation into site/; a broken link or a page outside the menu fails
	@PYTHONPATH=src python tools/options_reference.py docs/reference/options.md
	@PYTHONPATH=src:. python tools/command_pages.py docs/reference/commands
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict
	@echo "$(CURDIR)/site/index.html; with search: python -m http.server -b 127.0.0.1 -d site"

lint: setup  ## ruff, its formatter, mypy, and the import rules of the packages
	@ruff check .
	@ruff format --check .
	@mypy
	@PYTHONPATH=src:. lint-imports --no-logo

format: setup  ## fix and format with ruff
	@ruff check --fix .
	@ruff format .

ui: setup  ## publish new results and start the MLflow UI
	@$(PUBLISH)
	@python -m stages.ui

push: setup  ## push every output and the run cache to the DVC remote (docs/guide/storage.md)
	@dvc push --run-cache

pull: setup  ## pull every output from the DVC remote; `make repro` then has nothing to do
	@dvc pull --run-cache

verify: setup  ## check every output and DVC's cache, and list damaged files
	@python -m stages.verify

gc: setup  ## list unused objects in DVC's cache; `python -m stages.retention apply=true` removes them
	@python -m stages.retention

lock: setup  ## resolve envs/*.in into envs/*.txt again
	@tools/lock_envs.sh

clean:  ## remove environments, scratch and caches; artifacts, DVC's cache and MLflow's store stay
	@rm -rf .venv .venvs scratch site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
