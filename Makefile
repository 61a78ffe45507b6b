# From a bare clone, with Python 3.11+ and make:
#   make quickstart   the whole line on a drawn world: pretrain, probe, evaluate (no downloads once installed)
#   make test         ruff, mypy and all tests but the drills;  TESTS=tests/data  ARGS="-x -k manifest"  narrow it
#   make test-fast    the same without the slow tests
#   make lint         ruff and mypy alone
# Each makes .venv if it is missing and installs again when pyproject.toml has changed. Another Python: make test PYTHON=python3.13

PYTHON ?= python3
TESTS ?= tests
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# One stamp for what a user needs, one for what a developer needs on top; the second install covers the first.
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev

.PHONY: quickstart test test-fast lint

quickstart: $(READY)
	$(BIN)/coca-video quickstart $(ARGS)

test: lint
	$(BIN)/python -m pytest -m "not drill" $(TESTS) $(ARGS)

test-fast: lint
	$(BIN)/python -m pytest -m "not slow and not drill" $(TESTS) $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml
	$(call install,.)
	@touch $@

$(READY_DEV): pyproject.toml
	$(call install,.[dev])
	@touch $(READY) $@

# torch and torchvision come in one resolution: they are built in pairs, and a later install of one could split the pair.
# `uv --version` and not `command -v uv`: a version manager's shim may be there without a uv behind it.
define install
@$(PYTHON) -c 'import sys' >/dev/null 2>&1 || { echo 'There is no Python called "$(PYTHON)" here: install Python 3.11 or newer, or name one with "make PYTHON=/path/to/python3".' >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "coca_video needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1): name a newer one with \"make PYTHON=python3.12\"." >&2; exit 1; }
@set -e; \
if uv --version >/dev/null 2>&1; then \
    test -x $(BIN)/python || uv venv --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV); \
    uv pip install --python $(BIN)/python --editable '$(1)'; \
else \
    test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
    $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade; \
    $(BIN)/python -m pip install --editable '$(1)'; \
fi
endef
