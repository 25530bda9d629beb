# Two commands, each of which does all the set-up on a fresh machine: make quickstart, make test

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: quickstart test test-s3prl lint clean

quickstart: $(VENV)/installed
	$(RUN) train.py hparams/quickstart.yaml

test: $(VENV)/installed lint
	$(RUN) -m pytest

# The tests of the s3prl bridge with the packages s3prl was made for, in an environment of their own.
# `make test` runs them with today's
test-s3prl: $(VENV)/s3prl/installed
	$(VENV)/s3prl/bin/python -m pytest tests/s3prl

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 13) else \
		"Python 3.10 to 3.12 is needed, this is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/s3prl/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable '.[s3prl,test]'
	touch $@

clean:
	rm -rf $(VENV)
