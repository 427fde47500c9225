# Two commands matter: `make demo` and `make test`. Both create the environment in .venv once and reuse it.

VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/lock.txt
STAMP := $(VENV)/.complete

# Give PYTHON=/path/to/python to choose the interpreter; otherwise the first of these that is new enough.
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python)
DEMO_ARGS ?=
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint env clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## Sample the digits pipeline with and without Skip-Cache into outputs/demo (more: DEMO_ARGS=...)
	@$(BIN)/skipdit demo $(DEMO_ARGS)

test: $(STAMP) ## Run the tests (a selection: PYTEST_ARGS="tests/test_house.py -x")
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(STAMP) ## Check style and formatting with ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

env: $(STAMP) ## Create the environment in .venv and nothing else

clean: ## Remove the environment and caches (outputs/ stays)
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last and removed first, so an interrupted set-up is never taken for a complete one: without
# a stamp the environment starts afresh; with an old one (pyproject or lock changed) it is brought up to date.
$(STAMP): pyproject.toml $(LOCK)
	@python=; \
	for candidate in $(CANDIDATES); do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	    python="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: Skip-DiT needs Python 3.11 to 3.13 (tried: $(CANDIDATES)): install it or give its path as PYTHON=/path/to/python." >&2; \
	  exit 1; \
	fi; \
	if [ -e $(STAMP) ]; then \
	  echo "pyproject.toml or $(LOCK) has changed: updating the environment in $(VENV)"; \
	  rm -f $(STAMP); \
	else \
	  echo "Creating an environment in $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) || { \
	    echo "make: $$python could not create $(VENV): on Debian or Ubuntu, install python3-venv and try again." >&2; exit 1; }; \
	fi
	@echo "Installing skipdit with the versions of $(LOCK) (the first time this fetches PyTorch: minutes)"
	@$(BIN)/python -m pip install -q --no-input --disable-pip-version-check -c $(LOCK) setuptools
	@$(BIN)/python -m pip install -q --no-input --disable-pip-version-check -c $(LOCK) --no-build-isolation -e ".[dev]"
	@touch $@
	@echo "The environment is complete."
