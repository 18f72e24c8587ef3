# `make test` and `make bench` need nothing but a Python: the first run makes .venv and installs the package into it.
PYTHON  ?= python3
TORCH   := torch==2.13.0 triton==3.7.1
STAGE   ?= first
WORKERS ?= 2
PY      := .venv/bin/python
STAMP   := .venv/.installed

.PHONY: test test-full test-transformers test-eval bench lint lint-kernels wheel rehearse gpu-report clean

# every behaviour, large grids by a sample in which every pair of values meets; the kernels' tests run in Triton's
# interpreter, which is plain Python: WORKERS processes of one thread each
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# the rest of the grids, of which `make test` runs a bounded sample, and thousands of random inputs
test-full: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m full $(ARGS)

# the models and what wraps them under another release, TRANSFORMERS=4.57.6 for one
TRANSFORMERS ?= 4.46.3
OTHER        := .venv/transformers-$(TRANSFORMERS)
test-transformers: $(STAMP)
	test -d $(OTHER) || $(PY) -m pip install -qq --disable-pip-version-check --target $(OTHER) transformers==$(TRANSFORMERS)
	PYTHONPATH=$(OTHER) OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) tests/test_models.py tests/test_transformers.py tests/test_patch.py \
		tests/test_readme.py

# the evaluation harness brings 0.6 GB of packages: `make test` skips its tests where it is not installed
test-eval: $(STAMP)
	$(PY) -m pip install -qq --disable-pip-version-check $(TORCH) -e '.[eval]'
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_lm_eval.py

bench: $(STAMP)
	$(PY) benchmarks/attn_speed.py $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

lint-kernels: $(STAMP)
	$(PY) tests/kernel_lint.py --all

# without the old build/: setuptools would pack what lies there, deleted modules too
wheel: $(STAMP)
	rm -rf build dist
	$(PY) -m pip wheel -q . --no-deps --no-build-isolation -w dist

# the stages of gpu-report on a CPU, with little to do, and what carries compiled kernels from one to the next
rehearse: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m rehearsal tests/test_bench_gpu_report.py tests/test_bench_warm.py

# in the environment at hand: installs nothing; STAGE=first, second, third or sweep; OUT=DIR; without a repository
# ARGS="--commit ..."
gpu-report:
	$(PYTHON) benchmarks/gpu_report.py --stage $(STAGE) $(if $(OUT),--out "$(OUT)") $(ARGS)

clean:
	rm -rf .venv .triton build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -qq --disable-pip-version-check $(TORCH) -e '.[bench,dev]'
	touch $@
