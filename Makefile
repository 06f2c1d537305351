# Each target is one line over the command line: python -m utils --help
PYTHON ?= python3
VENV := .venv
IN := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test test-rest test-all faults lint drift bundle bench tables address clean

demo: $(VENV)/installed  ## the whole series on a CPU, about three minutes
	$(IN) -m utils run --profile demo --run-dir runs/demo

test: $(VENV)/installed  ## unit tests, the notebooks' static tests, one run of the whole demo
	$(IN) -m pytest -q -n 2 --dist worksteal --ignore tests/e2e --ignore tests/faults

test-rest: $(VENV)/installed  ## what `make test` leaves out: kernel, bundle, chain, two processes, and faults in short
	$(IN) -m pytest -q -n 2 --dist worksteal tests/e2e tests/faults

test-all: test test-rest  ## all tests, as CI runs them

faults: $(VENV)/installed  ## kills, full disks, damaged files, senseless input, in full; writes tests/faults/README.md
	FAULTS_README=$(CURDIR)/tests/faults/README.md $(IN) -m pytest -q -n 2 --dist worksteal tests/faults

lint: $(VENV)/installed  ## style, secrets in what is committed, advisories about the pins (or, without a network, their age)
	$(IN) -m ruff check . && $(IN) -m ruff format --check . && $(IN) -m tests.secret_scan && $(IN) -m tests.audit

drift: $(VENV)/installed  ## which of our keyword arguments the newest allowed versions of unsloth, trl, ... no longer take
	$(IN) -m tests.drift

bundle: $(VENV)/installed  ## kaggle_kernel.ipynb, the series in one file
	$(IN) -m utils bundle

bench:  ## on a CUDA machine: the whole series with 8B shapes, training's speed, growth and parity, kills on GPUs, repeatability; ROWS and ITEMS are JSONL files
	python3 -m benchmarks.standin $(or $(STANDIN),/tmp/standin-8b)
	python3 -m benchmarks.series $(or $(STANDIN),/tmp/standin-8b) --rows $(ROWS) --benchmark $(ITEMS) --out benchmarks/results/series-8b.json
	python3 -m benchmarks.train measure $(or $(STANDIN),/tmp/standin-8b) --rows $(ROWS) --out benchmarks/results/train.json
	python3 -m benchmarks.parity --out benchmarks/results/parity.json
	python3 -m benchmarks.train growth $(or $(STANDIN),/tmp/standin-8b) --rows $(ROWS) --out benchmarks/results/train.json
	python3 -m benchmarks.several --out benchmarks/results/several.json
	python3 -m benchmarks.repeatability measure $(or $(STANDIN),/tmp/standin-8b) --rows $(ROWS) --out benchmarks/results/repeatability.json
	python3 -m benchmarks.tables --draw

tables: $(VENV)/installed  ## the tables in docs/, from benchmarks/results/, the stages and this file
	$(IN) -m benchmarks.tables

# Made anew only when a requirements file is newer than the last installation that worked.
$(VENV)/installed: requirements.txt requirements-cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]} found, 3.11 to 3.13 needed: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo "Installing about 2 GB into $(VENV); this takes some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(IN) -m pip install --quiet -r requirements-cpu.txt
	@touch $@

address:  ## make address REPOSITORY=you/fork: put your repository into badges and bootstrap cells
	@test -n "$(REPOSITORY)" || { echo "Say which: make address REPOSITORY=you/fork"; exit 1; }
	@old=$$(sed -n 's/^REPOSITORY = "\(.*\)"/\1/p' utils/project.py); \
	git grep -lF "$$old" -- notebooks README.md utils | xargs sed -i "s#$$old#$(REPOSITORY)#g"
	$(MAKE) bundle
	@echo "Badges and bootstrap cells point to $(REPOSITORY); put your Kaggle user name into id in kernel-metadata.json, commit, and tag as REF in utils/project.py says: notebooks opened alone clone that tag."

clean:
	rm -rf $(VENV) runs
