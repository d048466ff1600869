# `make bench` and `make test` do all the set-up: they use the active virtual environment, or make .venv.
# A torch that is already there is kept.
ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := $(CURDIR)/.venv
endif
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.fastformer-ready
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
EMULATOR := $(shell find tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: build bench test lint fuzz simt gpu wheel compile-matrix readme-table clean

build: $(READY) fastformer/lib/.built

$(VENV)/bin/python:
	python3 -m venv $(VENV)

$(READY): requirements-dev.txt pyproject.toml | $(VENV)/bin/python
	$(PYTHON) -c 'import torch' 2>/dev/null || $(PYTHON) -m pip install -q $$(grep '^torch' requirements-dev.txt)
	grep -v '^torch' requirements-dev.txt | $(PYTHON) -m pip install -q -r /dev/stdin
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps --editable .
	touch $@

fastformer/lib/.built: setup.py $(SOURCES)
	$(PYTHON) setup.py -q build_ext --inplace
	touch $@

bench: build
	$(VENV)/bin/fastformer bench

# pytest-xdist: two processes of one thread each finish sooner on two cores than one process of two.
test: lint build
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2

lint: $(READY)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES) $(EMULATOR)

# A thousand random cases for each property, instead of the twenty of `make test`.
fuzz: build
	FASTFORMER_HYPOTHESIS_PROFILE=fuzz OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -k any_

# The CUDA C++ kernels in the emulator, their threads in twenty random orders.
simt: build
	FASTFORMER_SIMT_SCHEDULES=20 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -k "simt or cuda-cpu" tests/test_simt.py \
		$(foreach name,softmax layer_norm rows_hopper rotary feed_forward feed_forward_hopper linear_cross_entropy cuda_devices \
			attention attention_features attention_dropout attention_cuda attention_hopper decoding varlen_attn,tests/test_$(name).py)

# On a machine with an NVIDIA GPU, without network: tests, benchmarks, compute-sanitizer, tuning, Nsight Compute, within
# eight minutes. See benchmarks/gpu_plan.py.
gpu:
	$(or $(wildcard $(PYTHON)),python3) benchmarks/gpu_plan.py

wheel: $(READY)
	$(PYTHON) -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

# Every Triton kernel compiled for every architecture by every supported Triton; fetches the other Tritons.
compile-matrix: build
	$(PYTHON) tests/ahead_of_time/matrix.py

# README.md's tables and pictures, and the index of benchmarks/results, from the newest results kept there.
readme-table: build
	$(PYTHON) -m fastformer.benchmarks.readme_table

clean:
	rm -rf build dist fastformer/lib fastformer.egg-info $(READY)
