# make serve   start the server on the embedded nano model and print the chat page's address
# make chat    talk to it in the terminal
# make train-demo   train a tiny model on the texts of TEXT (default: docs) in some minutes; ARGS=--serve serves it
# make test    run the tests            make check   lint, format and types
# make test-clients   install SDKs and coding agents into build/clients and run them against the server
# make test-cluster   install Ray into build/cluster and run servers with several engines
# make bench   compare with transformers  make setup   only install
# make sanitize      the native kernels' tests under address and undefined-behaviour sanitizers
# make llama-bench   build llama.cpp's benchmark, and the tool that tests compare GGUF files with, into LLAMA
# make llama-server  build llama.cpp's server, for dsv4 bench serving (ten minutes more)
# make trl      install TRL into build/trl, for dsv4 bench grpo
# Variables: MODEL=folder TEXT=folder PORT=8000 HOST=127.0.0.1 PYTHON=python3 VENV=.venv WORKERS=2 ARGS="more arguments"
#            LLAMA=~/.cache/dsv4/llama.cpp

PYTHON ?= python3
VENV ?= .venv
MODEL ?=
TEXT ?= docs
HOST ?= 127.0.0.1
PORT ?= 8000
WORKERS ?= 2
CONSTRAINTS ?= -c constraints.txt
ARGS ?=
CLUSTER ?= build/cluster
TRL ?= build/trl
LLAMA ?= $(HOME)/.cache/dsv4/llama.cpp

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS)
extra = $(BIN)/python scripts/extra.py $(1) >$(VENV)/.$(1).txt && $(PIP) --requirement $(VENV)/.$(1).txt

.PHONY: help setup serve chat train-demo test check test-clients test-cluster bench sanitize llama-bench llama-server trl
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p;/^$$/q' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.run

serve: $(VENV)/.run
	@$(BIN)/dsv4 serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

chat: $(VENV)/.run
	@$(BIN)/dsv4 chat $(MODEL) $(ARGS)

train-demo: $(VENV)/.train
	@$(BIN)/dsv4 train demo "$(TEXT)" --port $(PORT) $(ARGS)

test: $(VENV)/.test
	@command -v bwrap >/dev/null || echo "make: no bubblewrap, so the sandbox's tests are skipped (Debian: apt-get install bubblewrap)"
	@command -v chromium >/dev/null || echo "make: no chromium, so the chat page's tests are skipped (Debian: apt-get install chromium)"
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("reasoning_gym") is None)' \
		|| echo "make: no C compiler, which reasoning-gym needs, so tests of tasks, evaluations and recipes are skipped (Debian: apt-get install gcc)"
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-cluster: $(VENV)/.test $(CLUSTER)/.ray
	$(CLUSTER)/bin/python -m pytest -m cluster tests/cluster $(ARGS)

# An environment of its own, for Ray brings sixty packages; all else is found in VENV.
$(CLUSTER)/.ray: pyproject.toml $(VENV)/.python
	@echo "make: installing Ray into $(CLUSTER) (half a gigabyte)"
	@$(PYTHON) -m venv $(CLUSTER)
	@$(BIN)/python scripts/extra.py cluster >$(CLUSTER)/.cluster.txt
	@$(CLUSTER)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --requirement $(CLUSTER)/.cluster.txt
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>$(CLUSTER)/lib/python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages/dsv4.pth
	@touch $@

PYTHON_CLIENTS := $(patsubst tests/clients/python/%.txt,build/clients/.%,$(wildcard tests/clients/python/*.txt))
test-clients: $(VENV)/.test build/clients/.node $(PYTHON_CLIENTS)
	$(BIN)/python -m pytest -m clients tests/clients $(ARGS)

build/clients/.node: tests/clients/node/package.json
	@command -v npm >/dev/null || { echo "make: npm is missing; JavaScript clients need Node.js 20 or newer (Debian: apt-get install npm)"; exit 1; }
	@echo "make: installing JavaScript clients into build/clients/node"
	@mkdir -p build/clients/node && cp $< build/clients/node/
	@npm install --prefix build/clients/node --no-audit --no-fund --loglevel=error
	@touch $@

# Environments of their own: what these pin differs from what the server's tests do.
$(PYTHON_CLIENTS): build/clients/.%: tests/clients/python/%.txt
	@echo "make: installing $* into build/clients/$*"
	@$(PYTHON) -m venv --clear build/clients/$*
	@build/clients/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard native/*/*.cpp native/*/*.h native/*/*/*.h)
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.bench
	$(BIN)/dsv4 bench $(or $(ARGS),engine --models fp32)

llama-bench: $(VENV)/.python
	@sh scripts/llama_cpp.sh $(BIN)/python "$(LLAMA)" $(WORKERS) llama-bench llama-check

llama-server: $(VENV)/.python
	@sh scripts/llama_cpp.sh $(BIN)/python "$(LLAMA)" $(WORKERS) llama-server

trl: $(TRL)/.trl
	@echo "$(abspath $(TRL))"

# An environment of its own; torch and transformers are those of VENV, so that the contenders have the same.
$(TRL)/.trl: $(VENV)/.bench
	@echo "make: installing TRL into $(TRL)"
	@$(PYTHON) -m venv $(TRL)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>$(TRL)/lib/python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages/dsv4.pth
	@$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) "trl==1.16.0"
	@touch $@

# Only what runs native code in the process itself: the rest of the tests would take an hour under sanitizers.
SANITIZED := $(filter-out %/test_backends.py %/test_native_layout.py,$(wildcard tests/kernels/test_*.py)) \
	tests/model/test_native_backend.py tests/model/test_chunking.py
sanitize: $(VENV)/.test
	@command -v cmake >/dev/null && command -v g++ >/dev/null || { echo "make: sanitize needs cmake and g++ (Debian and Ubuntu: sudo apt-get install cmake g++)"; exit 1; }
	@$(PIP) nanobind
	@echo "make: building the native kernels with sanitizers into build/sanitize"
	@cmake -S native -B build/sanitize -DPython_EXECUTABLE="$(abspath $(BIN))/python" -DDSV4_SANITIZE=address,undefined >/dev/null
	@cmake --build build/sanitize --parallel $(WORKERS) >/dev/null
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(BIN)/python tests/kernels/sanitized.py build/sanitize/_native*.so $(SANITIZED) $(ARGS)

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install Python 3.11 or newer, or run make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V | cut -d' ' -f2); run make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# An editable install needs no repeating when Python code changes, only when the requirements or the C++ do.
$(VENV)/.run: $(VENV)/.python pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*.txt native/*/*.* native/*/*/*.*)
	@echo "make: installing into $(VENV) (torch is large: this takes some minutes once)"
	@$(PIP) --editable .[server]
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "make: installing what tests and checks need into $(VENV)"
	@$(call extra,test)
	@touch $@

$(VENV)/.train: $(VENV)/.run
	@$(call extra,train)
	@touch $@

# The benchmark runs the model's tests before it measures.
$(VENV)/.bench: $(VENV)/.test
	@$(call extra,bench)
	@touch $@
