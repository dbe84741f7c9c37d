PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/python
PART ?= reference
OUT ?= gpu-check

.PHONY: venv demo test lint format bench gpu-check clean

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(IN_VENV) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,log,viz,test]'
	touch $@

demo: venv
	$(IN_VENV) -m ijepa_fast.train --preset demo

test: venv
	$(IN_VENV) -m pytest -q --durations=8

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: venv
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: venv
	$(IN_VENV) -m pytest benchmarks -q

# on a CUDA machine, with its own Python: make gpu-check PART=reference OUT=dir PYTHON=python3
gpu-check:
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/gpu_check.py $(PART) --out $(OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info
