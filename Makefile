PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/python
PART ?= first
OUT ?= gpu-check

.PHONY: venv demo test torture lint format bench bench-accept static-accept gpu-check gpu-bundle docs dist clean

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(IN_VENV) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,log,wandb,mlflow,viz,onnx,hub,docs,test]'
	# for its tests; what it asks for includes torchvision, of which no CPU build goes with this torch
	$(IN_VENV) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps timm
	touch $@

demo: venv
	$(IN_VENV) -m ijepa_fast.train --preset demo

test: venv
	$(IN_VENV) -m pytest -q -n 2 --benchmark-disable --durations=8

# a run's accidents: kills, lost ranks, a pulled cable, hostile files, a soak of three hours. Shorter:
# make torture TORTURE="--mutations 500 --kills 80 --soak-minutes 5"
torture: venv
	$(IN_VENV) -m pytest --torture -q -s $(TORTURE) tests/torture

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: venv
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: venv
	$(IN_VENV) -m pytest benchmarks -q

# this machine's times become its baseline
bench-accept: venv
	$(IN_VENV) -m pytest benchmarks -q --accept-baseline

# the compiled code becomes what the gate compares with
static-accept: venv
	$(IN_VENV) -m benchmarks.static --accept

# parts first, step, ops, data, train, sanitize, tune; on a CUDA machine, with its own Python: make gpu-check PART=first OUT=dir PYTHON=python3
# ARGS goes on to the part, e.g. PART=step ARGS='--presets vitb16_in1k --seconds 120'
gpu-check:
	PYTHONPATH=.:kernels:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu_check $(PART) --out $(OUT) $(ARGS)

# what such a machine needs if it has no network, into gpu-bundle/; ARGS=--dali adds DALI
gpu-bundle: venv
	PYTHONPATH=.:kernels $(IN_VENV) -m benchmarks.gpu_check.bundle $(ARGS)

# the site; open build/site/index.html, or for its search: python -m http.server -d build/site
docs: venv
	NO_MKDOCS_2_WARNING=1 $(IN_VENV) -m mkdocs build -f docs/site/mkdocs.yml

# sdists and wheels of kernels and trainer, in dist/; what builds them has an environment of its own
dist:
	rm -rf dist
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install -q --disable-pip-version-check build twine
	build/venv/bin/python -m build -o dist kernels
	build/venv/bin/python -m build -o dist .
	build/venv/bin/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/*.egg-info
