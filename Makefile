# `make help` lists the targets. Every target sets itself up on a fresh machine.
PYTHON   ?= python3
VENV     ?= .venv
BIN      := $(VENV)/bin
APPROACH ?= film
PRESET   ?= mini
SEED     ?= 0
DATA     ?=
ARGS     ?=
RUNS     ?= runs
PORT     ?= 6006
JOBS     ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup train pretrain-mini test test-all test-bolts test-minimum lint dashboard bench results

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-15s %s\n", $$1, $$2}'
	@echo "  e.g. make train APPROACH=film SEED=1 ARGS=\"--trainer.max_epochs 3\""

$(BIN)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@

setup: $(BIN)/.installed ## create .venv and install

# DATA is a captions file (CSV, TSV, JSONL), of which all pairs are taken, or an overlay recipe (YAML) that says where captions and pictures lie
data_option = $(if $(DATA),$(if $(filter %.yaml %.yml,$(DATA)),-c $(DATA),--data.source table --data.captions $(DATA) --data.pairs null))

# a preset's values for one approach, where that has other parts than most (a language model, no text encoder)
preset_overlay = $(firstword $(wildcard experiments/overlays/$(PRESET)_$(APPROACH).yaml) experiments/overlays/$(PRESET).yaml)
# and what it changes of the preset's own
preset_values = $(addprefix -c ,$(wildcard experiments/overlays/$(PRESET)/$(APPROACH).yaml))

train: $(BIN)/.installed ## teach an encoder: APPROACH=film [PRESET=mini|paper] [SEED=0] [DATA=captions.csv] [ARGS="..."]
	$(BIN)/wlsup fit -c experiments/base.yaml -c experiments/$(APPROACH).yaml \
		$(if $(filter-out mini,$(PRESET)),-c $(preset_overlay) $(preset_values)) \
		--seed_everything $(SEED) $(data_option) $(ARGS)

pretrain-mini: $(BIN)/.installed ## make the mini models again (vision, text, LM, tokenizer): about half an hour
	$(BIN)/python experiments/pretrain_mini.py --out wlsup/assets/mini

# one thread a process: the models are small, and processes that share cores by threads only wait for one another
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 30 --durations-min 5

test: $(BIN)/.installed ## the fast tests, in JOBS=2 processes
	$(PYTEST) -m "not slow and not multiprocess and not browser and not bolts"

test-all: $(BIN)/.installed ## every test but those of the extra `bolts`
	$(PYTEST) -m "not bolts"

# lightning-bolts brings pytorch-lightning 1.9.5 and an old setuptools, which must not enter $(VENV): they go into an
# environment of their own, in front of $(VENV)'s packages, so that torch need not be installed twice
BOLTS := $(VENV)-bolts
PUREPLACE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(BOLTS)/.installed: $(BIN)/.installed constraints-bolts.txt
	$(PYTHON) -m venv $(BOLTS)
	$(BOLTS)/bin/python -m pip install --quiet --no-deps -r constraints-bolts.txt
	printf 'import site; site.addsitedir("%s")\n' "$$($(BIN)/python $(PUREPLACE))" \
		> "$$($(BOLTS)/bin/python $(PUREPLACE))/wlsup-base.pth"
	@touch $@

test-bolts: $(BOLTS)/.installed ## our schedule and LARS against lightning-bolts', in an environment of its own
	$(BOLTS)/bin/python -m pytest -m bolts tests/bolts

MINIMUM := $(VENV)-minimum
$(MINIMUM)/.installed: setup.cfg constraints-minimum.txt
	$(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet --upgrade pip
	$(MINIMUM)/bin/python -m pip install --quiet -c constraints-minimum.txt -e ".[test]"
	@touch $@

test-minimum: $(MINIMUM)/.installed ## the fast tests on the oldest versions that setup.cfg promises
	OMP_NUM_THREADS=1 $(MINIMUM)/bin/python -m pytest -n $(JOBS) --dist worksteal \
		-m "not slow and not multiprocess and not browser and not bolts"

lint: $(BIN)/.installed ## ruff, check and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

results: $(BIN)/.installed ## every approach x three seeds, resumable: experiments/results/mini.{json,md} [ARGS="--jobs 2"]
	$(BIN)/python experiments/run_results.py $(ARGS)

dashboard: $(BIN)/.installed ## TensorBoard over runs/
	$(BIN)/tensorboard --logdir $(RUNS) --port $(PORT)

bench: $(BIN)/.installed ## the benchmarks, against the peers
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	missed=; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || missed="$$missed $$file"; done; \
		[ -z "$$missed" ] || { echo "a bar missed, or not run:$$missed"; exit 1; }
