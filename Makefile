# Each target does all its own set-up in $(VENV); nothing outside it is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt
OLDEST_TRITON := 3.6.0
TRANSFORMERS := 4.57.6 5.17.0

.PHONY: demo test test-transformers bench kernels lint format clean

demo: $(VENV)/.installed  ## a picture, a video and a mixed batch through the whole stack (MODEL=<dir or hub id>)
	$(BIN)/python -m keye_model demo $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.installed-test  ## the test suite
	$(BIN)/python -m pytest tests -n 2

test-transformers: $(VENV)/.installed-test $(TRANSFORMERS:%=test-transformers-%)  ## every release that is named above, and the installed one; whole models under torch.compile
	KEYE_TEST_TRANSFORMERS=1 $(BIN)/python -m pytest tests/integrations/test_transformers*.py

test-transformers-%: $(VENV)/.installed-test $(VENV)/transformers-%
	KEYE_TEST_TRANSFORMERS=1 PYTHONPATH=$(VENV)/transformers-$* $(BIN)/python -m pytest tests/integrations/test_transformers*.py

bench: $(VENV)/.installed-bench  ## small shapes on a CPU, real shapes on a GPU
	$(BIN)/python -m pytest benchmarks

kernels: $(VENV)/.installed $(VENV)/triton-$(OLDEST_TRITON)  ## what every kernel compiles to, without a GPU
	TRITON_CACHE_DIR=$(VENV)/triton-cache $(BIN)/python -m benchmarks.kernels \
		--triton $(VENV)/triton-$(OLDEST_TRITON) --write docs/kernels.md

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

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
