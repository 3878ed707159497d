# make demo, test, bench, docs, lint, format, build, build-oldest, test-triton, clean. The first call makes .venv; later calls install only what changed.
# TORCH=2.12.0 (or any pip requirement) and PYTHON=python3.12 choose what .venv is made of; ARGS goes to the program.

TORCH ?= 2.13.0
PYTHON ?= $(shell for python in python3.12 python3.11 python3.10 python3; do \
	$$python -c '$(USABLE)' 2>/dev/null && echo $$python && break; done)
# The sentence a machine without a usable Python gets is in the recipe of .venv/python.
USABLE := import ensurepip, os, sys, sysconfig, venv; \
	sys.exit(sys.version_info < (3, 10) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
REQUIREMENT := $(if $(filter 0% 1% 2% 3% 4% 5% 6% 7% 8% 9%,$(TORCH)),torch==$(TORCH),$(TORCH))

CXX_FILES = $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu")

.PHONY: demo test bench docs lint ruff clang-format mypy format build build-oldest test-triton clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

demo: build $(VENV)/demo.txt
	$(RUN) -m surgery_kernels.reproduce digits $(ARGS)

# One pass per instruction set of this machine, the widest first; what does not depend on it runs in that pass only.
# WORKERS processes share the files of tests; their threads wait without turning, which the others' would pay for. ARGS may leave a later pass without tests: pytest's status 5.
WORKERS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
test: build $(VENV)/test.txt
	@isas=$$($(RUN) -c 'from surgery_kernels import _C; print(*reversed(_C.isas()))') && marked= && \
	for isa in $$isas; do \
		echo "SURGERY_KERNELS_ISA=$$isa"; \
		OMP_WAIT_POLICY=PASSIVE SURGERY_KERNELS_ISA=$$isa $(RUN) -m pytest -q -n $(WORKERS) --dist loadfile $${marked:+-m "$$marked"} $(ARGS) || [ "$$? $$marked" = "5 not any_isa" ] || exit 1; \
		marked="not any_isa"; \
	done

bench: build $(VENV)/bench.txt
	$(RUN) -m pytest bench --benchmark-json=build/bench.json $(ARGS)
	$(RUN) bench/report.py build/bench.json

docs: $(VENV)/docs.txt
	$(RUN) -m mkdocs --quiet build --strict

lint: ruff clang-format mypy

ruff: $(VENV)/lint.txt
	$(RUN) -m ruff check --quiet
	$(RUN) -m ruff format --quiet --check

clang-format: $(VENV)/lint.txt
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

mypy: $(VENV)/lint.txt
	$(RUN) -m mypy

format: $(VENV)/lint.txt
	$(RUN) -m ruff check --quiet --fix
	$(RUN) -m ruff format --quiet
	$(VENV)/bin/clang-format -i $(CXX_FILES)

build: $(VENV)/dev.txt
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) setup.py --quiet build_ext --inplace

# Against the oldest torch that is promised, of which the build takes headers and one library (a download of 0.9 GB);
# what comes out has to merge on the installed torch.
OLDEST_TORCH := 2.10.0
OLDEST := $(CURDIR)/build/torch-$(OLDEST_TORCH)

build-oldest: build $(OLDEST)/torch/version.py
	PYTHONPATH="$(OLDEST)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH" SK_CUDA_ARCHS=90-real \
		$(RUN) setup.py --quiet build --build-lib $(OLDEST)/built
	cd $(OLDEST)/built && $(CURDIR)/$(RUN) $(CURDIR)/.ci/oldest_torch.py $(OLDEST_TORCH) $(OLDEST)/torch/lib/libtorch_cpu.so

# The Triton kernels under another Triton, in its interpreter and ahead of time for one GPU. NUMPY: what that one takes;
# the interpreter of 3.6 breaks with numpy from 2.4 on.
TRITON ?= 3.6.0
NUMPY ?= 2.2.6
OTHER_TRITON = $(CURDIR)/build/triton-$(TRITON)

test-triton: build $(VENV)/test.txt build/triton-$(TRITON)/installed
	OMP_WAIT_POLICY=PASSIVE PYTHONPATH="$(OTHER_TRITON)" $(RUN) -m pytest -q -n $(WORKERS) --dist loadfile tests/triton --deselect tests/triton/test_compile.py $(ARGS)
	PYTHONPATH="$(OTHER_TRITON):$(CURDIR)" $(RUN) bench/compile_kernels.py --targets sm_90 >$(OTHER_TRITON)/kernels.md

build/triton-%/installed:
	$(PIP) --no-deps --target $(@D) triton==$* numpy==$(NUMPY)
	@touch $@

$(OLDEST)/torch/version.py:
	$(PIP) --no-deps --no-compile --target $(OLDEST) torch==$(OLDEST_TORCH)

clean:
	rm -rf build dist *.egg-info surgery_kernels/_C*.so .mypy_cache .pytest_cache .ruff_cache

# An extra of pyproject.toml; torch comes first and alone, or pip would take another build of it, and stays what it is.
$(VENV)/%.txt: pyproject.toml $(VENV)/torch
	$(RUN) .ci/extra.py $* > $@
	$(PIP) -r $@ '$(REQUIREMENT)'

$(VENV)/torch: $(VENV)/python
	$(PIP) '$(REQUIREMENT)'
	@echo '$(TORCH)' > $@

$(VENV)/python:
	@'$(PYTHON)' -c '$(USABLE)' 2>/dev/null || { echo "$(or $(PYTHON),This machine) must have Python 3.10 or newer," \
		"its headers, venv and ensurepip (Debian: apt install python3-dev python3-venv), or set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo '$(CURDIR)' > "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/surgery_kernels.pth"
	@echo '$(PYTHON)' > $@

# Made again when they are not what was asked for last time.
ifneq ($(TORCH),$(shell cat $(VENV)/torch 2>/dev/null))
.PHONY: $(VENV)/torch
endif
ifneq ($(origin PYTHON),file)
ifneq ($(PYTHON),$(shell cat $(VENV)/python 2>/dev/null))
.PHONY: $(VENV)/python
endif
endif
