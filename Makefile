# Two commands for a newcomer: `make train` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

.PHONY: train test thorough lint smoke clean
.DEFAULT_GOAL := train

# Train the small Forgetting Transformer of configs/quickstart.py; run it again to resume.
# Pass anything on: make train ARGS="--config.training.steps=50 --workdir=runs/short"
train: $(VENV)/.run
	$(VENV)/bin/python train.py --config=configs/quickstart.py $(ARGS)

# Lint and the test suite. A file stays in one process, which then compiles what its tests share only once.
test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not thorough" $(ARGS)

# The rest: further variants of every mechanism, more meshes, runs killed at any moment.
thorough: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m thorough $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The quick subset, for another interpreter: make smoke PYTHON=python3.13 VENV=.venv-3.13
smoke: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 -m smoke $(ARGS)

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.test: tests/requirements.txt $(VENV)/.run
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@
