# `make compare`, `make train` and `make test` set everything up by themselves, in .venv.
# uv is used when it is there; with pip alone the same versions are installed, only more slowly.
# macOS has GNU make 3.81 (2006) and no GNU coreutils: nothing newer is used here. Its python3 can be Xcode's 3.9, which
# is too old: then uv brings a Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions of everything, so that a set-up gives the same tools a year from now; LOCK= takes the newest allowed.
LOCK ?= requirements.lock
CONSTRAINTS = $(if $(LOCK),-c $(LOCK))
RUN ?=
# Of Python in the package: what is added must replace something.
MAX_LINES = 41240
PYTEST ?=
# Of `make mutants`: parts of paths (MODULES="gpt/ clock"), and how many mutants (N=50); all where they are empty.
MODULES ?=
N ?= 0

.PHONY: compare train test setup lint mypy-linux mypy-darwin test-slow test-online mutants clean

compare: setup
	$(BIN)/python compare.py $(RUN)

train: setup
	$(BIN)/python train.py $(if $(findstring experiment=,$(RUN)),,experiment=quick) $(RUN)

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not online" $(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) -j2 mypy-linux mypy-darwin
	$(BIN)/lint-imports
	@lines=$$(cat $$(find nanogpt_mac -name '*.py') | wc -l); [ $$lines -lt $(MAX_LINES) ] || \
	  { echo "nanogpt_mac has $$lines lines of Python; keep it under $(MAX_LINES)"; exit 1; }

mypy-linux mypy-darwin: setup
	$(BIN)/mypy --platform $(@:mypy-%=%) --cache-dir .mypy_cache/$(@:mypy-%=%)

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not online" $(PYTEST)

test-online: setup
	$(BIN)/python -m pytest -m online $(PYTEST)

mutants: $(VENV)/.mutants
	$(BIN)/python tests/mutants/run.py $(MODULES) --sample $(N) --records $(VENV)/mutants.jsonl

$(VENV)/.mutants: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check $(CONSTRAINTS) -e '.[mutants]'
	@touch $@

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(LOCK)
	@python=$$($(PYTHON) -c 'import sys; print(sys.executable) if sys.version_info >= (3, 11) else sys.exit(1)' \
	  2>/dev/null) || python=; \
	if command -v uv >/dev/null; then \
	  [ -n "$$python" ] || echo "$(PYTHON) is not Python 3.11 or later: uv brings 3.12"; \
	  uv venv --quiet --allow-existing --python "$${python:-3.12}" $(VENV) && \
	  UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" uv pip install --python $(BIN)/python $(CONSTRAINTS) -e '.[test,sweep]'; \
	elif [ -n "$$python" ]; then \
	  "$$python" -m venv $(VENV) && \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-compile $(CONSTRAINTS) -e '.[test,sweep]'; \
	else \
	  echo "$(PYTHON) is not Python 3.11 or later. curl -LsSf https://astral.sh/uv/install.sh | sh installs uv, which brings" \
	    "one (then run make again in a new terminal); or set PYTHON=/path/to/python3.11" >&2; exit 2; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache
