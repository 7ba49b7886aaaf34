# Each target makes its own .venv from constraints.txt; nothing has to be installed by hand first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: test demo reproduce bench format clean

test: $(INSTALLED)
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; $(BIN)/playwright install chromium
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

reproduce: $(INSTALLED)
	$(BIN)/python examples/arithmetic/train.py --out build/arithmetic

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.cost
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.throughput

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build demo_out eaptk.egg-info eaptk/_native*.so
