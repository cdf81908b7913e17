# Two commands for a newcomer: `make train` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

.PHONY: train test thorough lint smoke report reproduce-egsw clean
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

# Compile every Pallas kernel for TPUs and GPUs that need not be here, and write what the compilers say: docs/kernels.md
report: $(VENV)/.test $(VENV)-cuda/.installed
	$(VENV)/bin/python -m kernels.report --out=docs/kernels/tpu.json
	PATH="$$($(VENV)-cuda/bin/python -c 'import nvidia.cuda_nvcc as p; print(p.__path__[0])')/bin:$$PATH" \
	  $(VENV)-cuda/bin/python -m kernels.report --targets=sm_80,sm_90 --out=docs/kernels/cuda.json
	$(VENV)/bin/python -m kernels.report.comparison --out=docs/kernels/comparison.json
	$(VENV)/bin/python -m kernels.report --page docs/kernels/comparison.json docs/kernels/tpu.json docs/kernels/cuda.json > docs/kernels.md

# GRPO against GRPO with EGSW on countdown, twelve small runs on two cores, with a table and a figure: docs/egsw.md
reproduce-egsw: $(VENV)/.run
	$(VENV)/bin/python -m attnlab.reproduce.egsw --out=runs/egsw $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-cuda

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.test: tests/requirements.txt $(VENV)/.run
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# The CUDA plugin reports missing drivers wherever it is installed, so it has an environment to itself.
$(VENV)-cuda/.installed: $(VENV)/.test
	$(PYTHON) -m venv $(VENV)-cuda
	$(VENV)-cuda/bin/python -m pip install --quiet --disable-pip-version-check absl-py jaxtyping nvidia-cuda-nvcc-cu12 \
	  $$($(VENV)/bin/python -c 'import jax; print(f"jax=={jax.__version__} jax-cuda12-plugin=={jax.__version__}")')
	touch $@
