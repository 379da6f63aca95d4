# Everything runs in .venv; the first target that needs it makes it. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check format model clean

demo: $(VENV)/.ready  ## serve a real model, teach it, undo it (fetches 93 MB once)
	$(BIN)/insitu demo --yes $(DEMO)

test: $(VENV)/.ready model  ## all tests, the ones on the real model included
	$(BIN)/pytest $(PYTEST)

check: $(VENV)/.ready  ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

model: $(VENV)/.ready
	@$(BIN)/python -c "from insitu.live.source import resolve; resolve('smollm2', yes=True)"

# torch first and pinned: any other request for it pulls another build.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
