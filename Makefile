# Each target makes its own .venv from constraints.txt; nothing has to be installed by hand first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: test demo reproduce bench bench-quick format clean

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

# Meant for an hour on 2 cores, and for a card where there is one: records, docs/benchmarks.md and the README's table.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.floor
	$(BIN)/python -m benchmarks.micro
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.report

# The same in small, into build/bench/; the first time the environments of the peers take minutes of their own.
bench-quick: $(INSTALLED)
	$(BIN)/python -m benchmarks.floor --quick
	$(BIN)/python -m benchmarks.micro --quick
	$(BIN)/python -m benchmarks.peers --quick
	$(BIN)/python -m benchmarks.report --quick

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build demo_out eaptk.egg-info eaptk/_native*.so
