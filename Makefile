# make demo | test | check | fix. Each makes .venv with the pinned dependencies when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(shell sed -n '/^dev = \[/,/^\]/p' pyproject.toml | sed -n 's/^ *"\(.*\)",/"\1"/p')

.PHONY: demo test check fix setup

demo: setup
	$(BIN)/luthier model pull
	$(BIN)/luthier demo

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

# torch goes first and alone: packages that need it would otherwise choose a build of their own. The tests drive the
# service with three majors of OpenAI's package: two lie in folders of their own.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[local,telemetry]' $(DEV)
	for major in 1 2; do $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/sdk/$$major "openai>=$$major,<$$((major + 1))"; done
	touch $(STAMP)
