# Run `make` to see the tasks. `make test` on a clean clone does everything, installing included.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TYPES := build/types

SOAK_SECONDS ?= 400

FRAMEWORKS := .venv-integrations

.PHONY: help test test-integrations soak check demo bench bench-full exactness docs constraints clean

help:
	@echo "make test         install into .venv and run the whole suite"
	@echo "make test-integrations  the same for the trainers of other projects, with their releases in $(FRAMEWORKS)"
	@echo "make soak         the tests that draw their own cases, for an hour; SOAK_SECONDS=60 gives each a minute"
	@echo "make check        format, lint, types, links"
	@echo "make demo         train, kill, resume, look at it in TensorBoard, and use the best"
	@echo "make bench        measure against what people use now, in three minutes; docs/benchmarks.md explains"
	@echo "make bench-full   all of it, in an hour and a half; writes docs/benchmarks.md"
	@echo "make exactness    kill and resume trainings of each framework; writes the table of docs/integrations.md"
	@echo "make docs         write docs/cli.md from the commands' own help"
	@echo "make constraints  pin the versions that are installed now"
	@echo "make clean        remove the environments and build files"

$(READY): pyproject.toml setup.py constraints.txt store/_split.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

# Two tests at a time, so one thread of torch each: more would wait for one another.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

# Another environment over the first one: it adds the frameworks, so that the rest is seen to work without them.
$(FRAMEWORKS)/.ready: $(READY) constraints-integrations.txt
	test -x $(FRAMEWORKS)/bin/python || $(PYTHON) -m venv --clear $(FRAMEWORKS)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
		"$$($(FRAMEWORKS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/over.pth"
	$(FRAMEWORKS)/bin/python -m pip install --quiet --constraint constraints.txt \
		--constraint constraints-integrations.txt --editable '.[integrations]'
	@touch $@

test-integrations: $(FRAMEWORKS)/.ready
	OMP_NUM_THREADS=1 $(FRAMEWORKS)/bin/python -m pytest -n 2 --dist worksteal --durations 10 tests/integrations

soak: $(READY)
	rm -rf build/soak
	SOAK_SECONDS=$(SOAK_SECONDS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/faults; \
		status=$$?; $(BIN)/python tests/faults/soak.py; exit $$status

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES) && cp -r registry $(TYPES)/registry
	@cp -r store models cli $(TYPES)/registry/
	@echo "mypy --strict"; cd $(TYPES) && set -o pipefail && \
		../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p registry | \
		sed -E 's#^registry/(store|models|cli)/#\1/#'
	$(BIN)/python docs/check_links.py

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/demo.sh

bench: $(READY)
	$(BIN)/python -m benchmarks --quick --write build/benchmarks

bench-full: $(READY)
	$(BIN)/python -m benchmarks --runs 2 --write docs

exactness: $(FRAMEWORKS)/.ready
	$(FRAMEWORKS)/bin/python -m benchmarks exactness --write docs

docs: $(READY)
	$(BIN)/python docs/make_cli_docs.py

constraints: $(READY)
	@{ head -1 constraints.txt; $(BIN)/python -m pip freeze --all 2>/dev/null | \
		grep -v -e '^-e' -e '^#' -e ' @ ' | sed 's/+.*//'; } > build/constraints.txt && mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) $(FRAMEWORKS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

SHELL := /bin/bash
