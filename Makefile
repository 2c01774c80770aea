# Each target sets up what it needs in .venv; PYTHON names the interpreter to make it from, VENV another place for it.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help quickstart test test-gpu bench bench-gpu lint format
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed  ## train, reload, fine-tune with LoRA and generate, on real text (5 minutes on two cores)
	$(RUN) examples/quickstart.py $(ARGS)

test: $(VENV)/.installed  ## everything a machine without a GPU can run
	$(RUN) -m pytest -m "not gpu" -n 2 --dist worksteal $(ARGS)

test-gpu: $(VENV)/.installed  ## what needs a CUDA device
	$(RUN) -m pytest -m gpu $(ARGS)

bench: $(VENV)/.installed  ## the torch rule against transformers' own, on this CPU
	$(RUN) benchmarks/bench_cpu.py $(ARGS)

bench-gpu: $(VENV)/.installed  ## the kernels against their peers, on this GPU
	$(RUN) benchmarks/bench_ops.py $(ARGS)
	$(RUN) benchmarks/bench_decode.py $(ARGS)

lint: $(VENV)/.installed  ## ruff: format and checks
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

format: $(VENV)/.installed  ## mend what ruff can mend
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .
