# Everything starts from a Python >= 3.10 and this file: `make demo` builds .venv by itself.
# Override on the command line, e.g. `make test PYTHON=python3.12` or `make demo ARGS="--prompt 'Call me'"`.

VENV ?= .venv
# Pinned, or pip would fetch newer ones. torch 2.11 is the CUDA build that goes with Triton 3.6. Without a GPU the much
# smaller CPU build of torch 2.13 is preferred, if pip can see it (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
TORCH_CUDA = 2.11.0
TORCH ?= $(shell nvidia-smi >/dev/null 2>&1 && echo $(TORCH_CUDA) || echo 2.13.0)
TRITON ?= 3.6.0
WITH_TORCH = "triton==$(TRITON)" "numpy<2.4"
ifeq ($(origin TORCH),file)
OR_ELSE = || { echo "make: no torch $(TORCH) that goes with Triton $(TRITON) was found; taking torch $(TORCH_CUDA)" >&2; \
	$(PIP) install --quiet "torch==$(TORCH_CUDA)" $(WITH_TORCH); }
endif
PIP = "$(VENV)/bin/python" -m pip --disable-pip-version-check
# The interpreter that runs everything. `make test PY=python3` uses one that has all packages, and installs nothing.
PY ?= $(VENV)/bin/python
READY = $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.ready)
FIND_PYTHON = for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$p" && break; done
PYTHON ?= $(shell $(FIND_PYTHON))
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(READY)  ## stream a text from one kernel launch and compare it with transformers (on a GPU if there is one)
	$(PY) demos/demo.py $(ARGS)

test: $(READY)  ## the test suite; tests that need a GPU are skipped without one
	$(PY) -m pytest $(ARGS)

check: $(READY)  ## ruff: lint and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)  ## let ruff rewrite what `make check` complains about
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY)  ## latency suites (a GPU, please)
	$(PY) -m pytest bench $(ARGS)

clean:  ## remove the environment and all caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks

# torch, Triton and numpy come first and by themselves, so that nothing later decides their versions.
$(VENV)/.torch-$(TORCH)-$(TRITON):
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.10 found; name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "make: PYTHON=$(PYTHON) is no Python >= 3.10; name another with PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "make: $(PYTHON) lacks venv or ensurepip; install them (Debian, Ubuntu: the package python3-venv)" \
		"or name another Python with PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear "$(VENV)"
	$(PIP) install --quiet "torch==$(TORCH)" $(WITH_TORCH) $(OR_ELSE)
	touch $@

$(VENV)/.ready: $(VENV)/.torch-$(TORCH)-$(TRITON) pyproject.toml
	$(PIP) install --quiet -e ".[test]"
	touch $@
