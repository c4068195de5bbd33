# make notebooks                       the lessons, in JupyterLab, each as a copy of your own
# make notebooks FRESH=3               week 3's lesson anew after a git pull, with your answers filled in
# make course                          every week's script at the preset laptop; PRESET=gpu is the real size, and needs its text first
# make course WEEKS="01 04" PRESET=smoke
# make course MINE=1                   with your own answers to the exercises, as far as they are solved
# make status, make doctor             what is done; what would get in the way on this machine
# make report                          redraws all plots, pages and tables from the logs
# make serve                           your model of week 6, else of week 4, else SmolLM2: API and chat page at http://127.0.0.1:8000
# make serve MODEL=smollm2 DOCUMENTS=weeks/11_rag/handbook
# make serve QUANTIZE=none             with weights as they are; on a CPU they are rounded to 8 bits if you do not say so (int4, nf4: fewer)
# make test                            lint, unit tests, week scripts, notebooks; WORKERS=4 runs four processes of tests
# make quick, make lint                the unit tests that take no time; ruff, the formatting and the types
# make mutants                         puts 300 small faults into shared, one at a time: which do the tests notice? Takes an hour or two
# make sanitize                       the decoder in C under the thread, address and undefined-behaviour sanitizers, and valgrind
# make reference                       the reference of shared, from its docstrings: docs/reference/build/index.html
# make clean                           removes .venv, and every checkpoint, log and plot of your own runs
PYTHON ?= python3
WEEKS ?=
PRESET ?= laptop
MODEL ?=
DOCUMENTS ?=
QUANTIZE ?= auto
MINE ?=
FRESH ?=
WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help course serve test quick mutants sanitize status doctor notebooks report reference lint clean

help:
	@sed -n 's/^# //p' Makefile

course: $(VENV)/.course
	$(RUN) -m shared.course run $(if $(WEEKS),--weeks $(WEEKS)) --preset $(PRESET) $(if $(MINE),--mine)

serve: $(VENV)/.course
	$(RUN) -m shared.serving --page --quantize $(QUANTIZE) $(if $(MODEL),--model $(MODEL)) $(if $(DOCUMENTS),--documents $(DOCUMENTS))

# Each worker takes whole files, with one thread: a notebook's cells share a kernel.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile --durations=40 --doctest-modules shared tests weeks --nbval-lax --nbval-current-env

quick: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile -p no:nbval --doctest-modules shared tests -m "not slow"

# Thread sanitizers want memory where they expect it: setarch -R.
SANITIZED := tests/quantization/decoder_main.c -std=gnu11 -pthread -Wno-psabi -lm
sanitize:
	mkdir -p build
	$(CC) -g -O1 -march=native -fsanitize=thread $(SANITIZED) -o build/thread
	setarch -R build/thread
	$(CC) -g -O1 -march=native -fsanitize=address,undefined -fno-sanitize-recover=all $(SANITIZED) -o build/address
	ASAN_OPTIONS=detect_leaks=0 build/address
	$(CC) -g -O1 -mavx2 -mfma $(SANITIZED) -o build/plain
	valgrind --quiet --error-exitcode=1 build/plain

mutants: $(VENV)/.test
	$(RUN) -m pip install --disable-pip-version-check -q cosmic-ray==8.7.0
	OMP_NUM_THREADS=1 $(RUN) -m tests.mutants --workers $(WORKERS)

status doctor: $(VENV)/.course
	$(RUN) -m shared.course $@

notebooks: $(VENV)/.course
	$(RUN) -m shared.course notebooks $(if $(FRESH),--fresh $(FRESH))

report: $(VENV)/.course
	$(RUN) -m shared.course.report

reference: $(VENV)/.docs
	$(RUN) -m sphinx -q -W --keep-going docs/reference docs/reference/build

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/.course: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --progress-bar on -q -r requirements.txt
	touch $@

$(VENV)/.test: $(VENV)/.course requirements-test.txt
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-test.txt
	touch $@

$(VENV)/.docs: $(VENV)/.course requirements-docs.txt
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) docs/reference/build docs/reference/modules checkpoints logs/*/mine reports/*/mine reports/mine reports/index.html
