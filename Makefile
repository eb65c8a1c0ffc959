# One virtual environment, made on first use. Another torch (a CUDA build): make test TORCH=torch
VENV ?= .venv
COMPAT ?= .venv-compat
RIVALS ?= .venv-rivals
RIVALS_SECONDS ?= 1080
PYTHON ?= python3
TORCH ?= torch==2.13.0
# What make test-triton compiles with, beside the Triton that the test extra pins, in an environment of its own.
TRITON ?= 3.9.0
TRITON_VENV ?= .venv-triton-$(TRITON)
BIN = $(VENV)/bin
JOBS ?= 2

# Where make gpu leaves its results, and a folder of wheels that it installs first: make gpu WHEELS=wheels
OUT ?= build/gpu/results
WHEELS ?=

# What make docs-look opens the site in.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

# What make clib builds: everything takes long.
CLIB_ARCHS ?= 80;90;100
CLIB_DTYPES ?= float32
CLIB_DIVERGENCES ?= drkl;jsd;taid

.PHONY: help install wheel demo test test-emulated mutants test-compat test-triton clib lint types docs docs-look bench bench-rivals gpu compile-all clean

help:
	@echo "make demo         set up, distil a small model on real text, draw what the loss saves: build/demo.png (CPU: under five minutes)"
	@echo "make test         set up and run all tests (no GPU needed)"
	@echo "make mutants      which tests notice a wrong formula: MUTANTS='fkl.term jsd' for some of them"
	@echo "make test-emulated  the Triton half of the tests as compiled for GPUs, emulated (long)"
	@echo "make test-compat  the drop-in replacements beside the originals, in an environment of their own"
	@echo "make test-triton  compile every kernel with another Triton (3.9.0, or TRITON=...), in an environment of its own"
	@echo "make clib         the C library, for a few divergences and float32 unless told otherwise, and its tests"
	@echo "make lint types   ruff and basedpyright"
	@echo "make wheel        a wheel and an sdist in build/dist"
	@echo "make docs         the documentation as a site in build/site; a warning is an error"
	@echo "make docs-look    every page of it in Chromium, on a phone and on a desk: screenshots in build/look, and what is wrong"
	@echo "make bench        time, memory and accuracy on this machine, written to bench/results, and the README's tables"
	@echo "make bench-rivals  the loss head beside Liger, TRL, Unsloth, ORDA and torch's own, in an environment of their own"
	@echo "make gpu          on a machine with a GPU: tests, benchmark, summary, in nine minutes and without a network"
	@echo "make compile-all  compile every kernel for every dtype and architecture, and count what each takes (long)"

install: $(VENV)/installed

# torch first and alone: asked for as a dependency it could resolve to another build.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test,demo,bench,plots]"
	touch $@

demo: install
	@mkdir -p build
	$(BIN)/python -m fusedkd demo --json build/demo.json

test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

mutants: install
	$(BIN)/python tests/mutate.py --jobs $(JOBS) $(MUTANTS)

# As compiled for each of these architectures; an emulator with a sanitizer runs the PTX (tests/emulator). It finds the
# same races in every order; in lockstep it takes an hour or two, in greedy order several times that.
EMULATE ?= 80 90
EMULATE_OPTIONS ?= --order lockstep
EMULATED = $(addprefix tests/test_,$(addsuffix .py,logits heads options split_rows streaming token_logprobs hard_rows \
	identities properties autograd uncounted surroundings pitfalls weight_grad custom_divergence definition recipes))

# Of the sdist, which must be complete.
wheel: install
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/dist .
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('build/dist')"
	@ls build/dist

test-emulated: install
	TRITON_INTERPRET=0 $(BIN)/python tests/compiled_cases.py "many rows"
	for capability in $(EMULATE); do \
		$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --emulate $$capability $(EMULATE_OPTIONS) $(EMULATED) || exit 1; done

# Programs of which a file or two each are tested: what they depend on wants a GPU or a cluster, or a newer Python, and is
# left out.
ALONE = verl==0.9.1 veomni==0.1.12 nvidia-modelopt==0.47.0 axolotl==0.21.0 ms-swift==4.6.0 torchtune==0.6.1 \
	nemo-automodel==0.7.0 megatron-core==0.19.2

# The programs that fusedkd.compat replaces parts of. The constraint keeps the torch that was asked for.
$(COMPAT)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet "$(TORCH)"
	$(COMPAT)/bin/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(COMPAT)/torch.txt
	$(COMPAT)/bin/python -m pip install --quiet --constraint $(COMPAT)/torch.txt --editable ".[compat]"
	$(COMPAT)/bin/python -m pip install --quiet --no-deps --ignore-requires-python $(ALONE)
	touch $@

test-compat: $(COMPAT)/installed
	$(COMPAT)/bin/python -m pytest tests/compat

# Without dependencies: the test extra pins the other Triton.
$(TRITON_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(TRITON_VENV)/bin/python -m pip install --quiet --no-deps "triton==$(TRITON)"
	$(TRITON_VENV)/bin/python -m pip install --quiet "pytest>=8,<9.2" "hypothesis>=6.100" "numpy>=2"
	$(TRITON_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

test-triton: $(TRITON_VENV)/installed
	$(TRITON_VENV)/bin/python -m pytest tests/test_compile.py tests/test_compiled_code.py tests/test_sass.py

clib: install
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/clib -DPython3_EXECUTABLE="$(abspath $(BIN))/python" \
		"-DFUSEDKD_ARCHS=$(CLIB_ARCHS)" "-DFUSEDKD_DTYPES=$(CLIB_DTYPES)" "-DFUSEDKD_DIVERGENCES=$(CLIB_DIVERGENCES)"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/clib -j $(JOBS)
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/clib -L cpu --output-on-failure

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Read from the sources: the site needs no torch and no GPU.
docs: $(VENV)/documented
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build --strict
	$(BIN)/python tests/check_site.py build/site

$(VENV)/documented: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

docs-look: docs
	$(BIN)/python -m pip install --quiet "playwright>=1.55"
	$(BIN)/python tests/look_at_site.py build/site build/look --chromium "$(CHROMIUM)"

bench: install
	$(BIN)/python -m fusedkd bench --out bench/results
	$(BIN)/python -m fusedkd bench --out bench/results --readme README.md

# The programs that fusedkd is measured beside, bench/rivals.txt alone and last: what they depend on wants a GPU, or
# another TRL. The constraint keeps the torch that was asked for.
$(RIVALS)/installed: pyproject.toml bench/rivals.txt
	$(PYTHON) -m venv $(RIVALS)
	$(RIVALS)/bin/python -m pip install --quiet "$(TORCH)"
	$(RIVALS)/bin/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(RIVALS)/torch.txt
	$(RIVALS)/bin/python -m pip install --quiet --constraint $(RIVALS)/torch.txt --editable ".[bench,compat]"
	$(RIVALS)/bin/python -m pip install --quiet --no-deps --requirement bench/rivals.txt
	touch $@

# Section heads again, beside all of them. Twenty minutes: a case that has begun may end after the time that is set here,
# and those that there is no time for say so. All ten, peaked rows too: make bench-rivals RIVALS_SECONDS=3600.
bench-rivals: $(RIVALS)/installed
	$(RIVALS)/bin/python -m fusedkd bench --device cpu --only heads --seconds $(RIVALS_SECONDS) --out bench/results
	$(RIVALS)/bin/python -m fusedkd bench --out bench/results --readme README.md

# With the Python that has torch, from the sources where they are: nothing is fetched.
gpu:
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target build/gpu $(WHEELS)/*.whl)
	PYTHONPATH=python:build/gpu $(PYTHON) -m fusedkd.bench.gpu --out "$(OUT)"

compile-all: install
	FUSEDKD_TESTS=all $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests/test_compile.py tests/test_figures.py

clean:
	rm -rf $(VENV) $(COMPAT) $(RIVALS) .venv-triton-* build
