# `make compare`, `make train` and `make test` set everything up by themselves, in .venv.
# uv is used when it is there; with pip alone the same versions are installed, only more slowly.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions of everything, so that a set-up gives the same tools a year from now; LOCK= takes the newest allowed.
LOCK ?= requirements.lock
CONSTRAINTS = $(if $(LOCK),-c $(LOCK))
RUN ?=
# Of Python in the package: what is added must replace something.
MAX_LINES = 17000
PYTEST ?=

.PHONY: compare train test setup lint test-slow test-online clean

compare: setup
	$(BIN)/python compare.py $(RUN)

train: setup
	$(BIN)/python train.py experiment=quick $(RUN)

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not online" $(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@lines=$$(cat $$(find nanogpt_mac -name '*.py') | wc -l); [ $$lines -lt $(MAX_LINES) ] || \
	  { echo "nanogpt_mac has $$lines lines of Python; keep it under $(MAX_LINES)"; exit 1; }

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not online" $(PYTEST)

test-online: setup
	$(BIN)/python -m pytest -m online $(PYTEST)

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nanogpt-mac needs Python 3.11 or later; $(PYTHON) is older. Set PYTHON=/path/to/python3.11"; exit 2; }
	@if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV) && \
	  UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" uv pip install --python $(BIN)/python $(CONSTRAINTS) -e '.[test]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --disable-pip-version-check $(CONSTRAINTS) -e '.[test]'; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache
