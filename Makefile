# Two commands, each of which does all the set-up on a fresh machine: make quickstart, make test

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
comma := ,
# Two processes of one thread each: tests are small, and threads of several processes wait for each other
PYTEST = -m pytest -n 2 --dist loadfile
# A whole environment, with its Python and what to install: uv takes half of pip's time. It does not
# read pip.conf: where that names the only index, pip goes on
define install
	$(1) -m pip install --quiet uv
	$(1) -m uv pip install --quiet $(2) || $(1) -m pip install --quiet $(2)
endef

.PHONY: quickstart test test-s3prl test-espnet-s3prl lint docs wheel clean

quickstart: $(VENV)/installed
	$(RUN) train.py hparams/quickstart.yaml

test: $(VENV)/installed lint docs
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST)

# The tests of the s3prl bridge with the packages s3prl was made for, in an environment of their own.
# `make test` runs them with today's
test-s3prl: $(VENV)/s3prl/installed
	OMP_NUM_THREADS=1 $(VENV)/s3prl/bin/python $(PYTEST) tests/s3prl

# The same bridge on the maintained fork, with the dependencies of $(VENV)
test-espnet-s3prl: $(VENV)/espnet-s3prl/installed
	OMP_NUM_THREADS=1 $(VENV)/espnet-s3prl/bin/python $(PYTEST) \
		tests/s3prl/test_upstream.py tests/s3prl/test_emotion.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in build/site. A link to nowhere is an error
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# sdist and wheel in dist/. The wheel is tried in an environment that sees the dependencies of $(VENV)
wheel: $(VENV)/installed
	rm -rf dist $(VENV)/wheel
	$(RUN) -m build --outdir dist . > /dev/null
	$(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip install --quiet --no-deps dist/*.whl
	cd $(VENV)/wheel && echo "$$(../bin/python -c 'import site; print(site.getsitepackages()[0])')" > \
		$$(bin/python -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth
	cd $(VENV)/wheel && bin/python -c 'import speechbrain_jepa as p; assert "wheel" in p.__file__, p.__file__; p.AudioJEPA()'
	cd $(VENV)/wheel && bin/python -m speechbrain_jepa.embed --help > /dev/null
	cd $(VENV)/wheel && bin/speechbrain-jepa export --help > /dev/null

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 13) else \
		"Python 3.10 to 3.12 is needed, this is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(call install,$(RUN),--editable '.[dev]')
	$(RUN) -m pip install --quiet --no-deps heareval==2021.1.3
	touch $@

$(VENV)/s3prl/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(call install,$(@D)/bin/python,--editable '.[s3prl$(comma)superb$(comma)test]')
	touch $@

$(VENV)/espnet-s3prl/installed: $(VENV)/installed
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps 'espnet-s3prl>=2026.5'
	echo "$(CURDIR)" > "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	$(RUN) -c 'import site; print(site.getsitepackages()[0])' >> \
		"$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	touch $@

clean:
	rm -rf $(VENV)
