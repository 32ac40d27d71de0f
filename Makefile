# make train · make test · make lab · make docs · make readme · make clean: each sets up .venv by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORES  := $(shell getconf _NPROCESSORS_ONLN)
RUN    ?= runs/glyphs

.PHONY: help train test lab export execute readme docs clean

help:
	@echo "make train    train the main job into $(RUN) (10 minutes on two cores, after the install)"
	@echo "make lab      the book in JupyterLab: chapters to read, change and run"
	@echo "make test     every check: export, notebooks, tests"
	@echo "make execute  run the chapters whose outputs are older than their code, and keep what they show"
	@echo "make readme   README.md from nbs/index.ipynb"
	@echo "make docs     the site, into _docs (needs Quarto)"
	@echo "make clean    remove the environment and everything built; runs/ stays"

$(VENV)/python-ok:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "clip_nbdev needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/runtime-ok: settings.ini setup.py constraints.txt | $(VENV)/python-ok
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/dev-ok: settings.ini setup.py constraints.txt | $(VENV)/python-ok
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/runtime-ok

train: $(VENV)/runtime-ok
	$(BIN)/accelerate launch -q --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  -m clip_nbdev.train --data glyphs --minutes 9.5 --out $(RUN) --overwrite

lab: $(VENV)/dev-ok
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab --notebook-dir nbs

export: $(VENV)/dev-ok
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

execute: export
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/execute.py --stale
	$(BIN)/nbdev_clean

readme: $(VENV)/dev-ok
	$(BIN)/python -m nbconvert --log-level ERROR --no-input --to markdown --output-dir . --output README nbs/index.ipynb
	sed -i.old -E 's#\]\(([a-z0-9_]+\.ipynb|images/)#](nbs/\1#g' README.md && rm README.md.old

test: $(VENV)/dev-ok
	$(BIN)/python -m pyflakes clip_nbdev tests
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_test --n_workers $(CORES)
	OMP_NUM_THREADS=$(CORES) $(BIN)/python -m pytest -q tests

# nbdev_docs makes a README of its own where README.md is older than the index: its links would be dead.
docs: $(VENV)/dev-ok
	@command -v quarto >/dev/null || { echo "make docs needs Quarto: https://quarto.org/docs/get-started"; exit 1; }
	@touch README.md
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs

clean:
	rm -rf $(VENV) _docs _proc build dist *.egg-info nbs/nbdev.yml
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
