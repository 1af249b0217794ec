# What a machine with Python >= 3.11 (and its venv module) needs:  make install   make demo   make serve   make test
# Every other target is listed by `make help`.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Test files are spread over two processes of one thread each: most of a test on Ray is waiting, and torch on many
# threads makes small models slower. In the order of tests/conftest.py. On a larger machine: make test TEST_PROCESSES=8
TEST_PROCESSES ?= 2
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.DEFAULT_GOAL := help
.PHONY: help install demo serve test check docs reference format lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## the environment in .venv: locked versions, this package editable, the development tools

# Compiled at once: a run starts several processes, and each would compile all libraries for itself.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1): name another one with make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "no virtual environment could be made: on Debian, install python3-venv"; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --build-constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## the main job on the shipped demo: distillation and preference RL on real images
	$(BIN)/flashdmd train

serve: install ## what `make demo` made, as an image API with a page at http://127.0.0.1:8000
	$(BIN)/flashdmd serve runs/demo

test: install ## all tests
	$(TEST_ENV) $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: install docs ## style, types, import rules, declared dependencies, links of the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry flashdmd_ray jobs

docs: install ## the documentation as a site in build/site; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

reference: install ## docs/configuration.md and the schemas for editors, from the configuration's types
	$(BIN)/python -m flashdmd_ray.reference.pages

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lock: install ## resolve the floors of pyproject.toml anew into constraints.txt (no registry address is written)
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra low-memory --universal --python-version 3.11 --upgrade \
	  --no-header --no-annotate --no-emit-index-url --quiet --output-file constraints.txt

clean: ## remove caches and build leftovers; runs/ and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find flashdmd_ray jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
