# `make test` and `make demo` set up all that they need in .venv, from nothing.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export JAX_PLATFORMS ?= cpu
# glibc hands out huge pages: a training step on a CPU takes two thirds of the time, for it touches fresh memory.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: test test-all parity demo lint format clean

test: $(READY)
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-all: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-tpu.txt
	$(BIN)/pytest -n 2 --dist loadfile

parity: $(READY)
	$(BIN)/python -m tests.parity > docs/parity.md; code=$$?; cat docs/parity.md; exit $$code

demo: $(READY)
	$(BIN)/wemmu demo --out out/demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .jax_cache out

$(READY): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -e .
	touch $@
