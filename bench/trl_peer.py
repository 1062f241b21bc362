"""
TRL's side of step.py and scaling.py, which run it in TRL's own environment:

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl datasets
    trl/bin/python bench/trl_peer.py '{"kind": "grpo", ...}' OUT.json         # or by torchrun

Every step's seconds by phase, loss and gradient norm go to OUT.json. Of this project it imports common.py.
"""
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from common import Memory, clock

CUDA = torch.cuda.is_available()
RANK, RANKS = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))


class Clock(TrainerCallback):
    """A row for every optimizer step, from the end of the last one to its own. `phases` holds the seconds
    that wrapped functions took within it; memory is counted from the end of the one that is `last`."""

    def __init__(self):
        self.rows, self.phases, self.start, self.memory, self.peak = [], {}, None, Memory(), 0.0

    def wrap(self, trainer, name, last=False):
        method = getattr(trainer, name)

        def timed(*args, **kw):
            start = clock()
            result = method(*args, **kw)
            self.phases[name] = self.phases.get(name, 0.0) + clock() - start
            if last:
                self.peak = max(self.peak, self.memory.top())        # the mark begins anew
                self.memory.start()
            return result
        setattr(trainer, name, timed)

    def on_train_begin(self, *args, **kw):
        self.start = clock()

    def on_step_end(self, *args, **kw):
        now, self.peak = clock(), max(self.peak, self.memory.top())
        self.rows.append({"seconds": now - self.start, "peak_gb": self.peak,
                          "learn_gb": self.memory.peak()} | self.phases)
        self.start, self.phases = now, {}

    def on_log(self, args, state, control, logs, **kw):
        if "loss" in logs:                              # and not the summary of the whole run
            self.rows[-1] |= {k: v for k, v in logs.items() if isinstance(v, (int, float))}


def shared(s, out):
    """What both trainers are told, to be like ours: fp32 weights, AdamW, a norm of 1, nothing saved."""
    return dict(output_dir=out, use_cpu=not CUDA, bf16=s["dtype"] == "bfloat16", fp16=False, tf32=None,
                gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
                disable_tqdm=True, max_steps=s["steps"], max_grad_norm=1.0, lr_scheduler_type="constant",
                learning_rate=1e-6, model_init_kwargs={"dtype": "float32"}, seed=1)


def grpo(s, out, record):
    """Phases: sample is transformers' generate; score the reference's log-probs and the rewards; learn the
    rest of the step, forward, backward and optimizer."""
    from trl import GRPOConfig, GRPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(s["model"])
    chats = [json.loads(line)["context_messages"] for line in open(s["data"])]
    texts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    rng = random.Random(0)

    def coin(completions, **kw):
        return [rng.choice((1.0, -1.0)) for _ in completions]

    parts = s["peer_parts"]
    config = GRPOConfig(**shared(s, out), gradient_accumulation_steps=parts,
                        per_device_train_batch_size=s["pairs"] * s["group"] // parts // RANKS,
                        num_generations=s["group"], beta=s["beta"],
                        max_completion_length=s["answer"], loss_type="grpo", temperature=1.0)
    trainer = GRPOTrainer(model=s["model"], reward_funcs=coin, args=config, processing_class=tokenizer,
                          train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=[record])
    record.wrap(trainer, "_generate_single_turn")
    record.wrap(trainer, "_generate_and_score_completions", last=True)
    trainer.train()
    for row in record.rows:
        sample, both = row.pop("_generate_single_turn"), row.pop("_generate_and_score_completions")
        row |= {"sample": sample, "score": both - sample, "learn": row["seconds"] - both}


def sft(s, out, record):
    """Packed rows of at most `length` tokens, one a micro-batch. TRL's default packing (best fit, no
    padding) wants flash attention; on a CPU, `sdpa` with position ids keeps the packed rows apart, by a mask
    of length x length, so a shorter row is faster. Loss on the traces only, as ours."""
    from trl import SFTConfig, SFTTrainer
    tokenizer = AutoTokenizer.from_pretrained(s["model"])
    ids, labels = [], []
    for row in map(json.loads, open(s["data"])):
        prompt = tokenizer.apply_chat_template(row["context_messages"], add_generation_prompt=True,
                                               tokenize=True, return_dict=False)
        trace = tokenizer.encode(row["winner"], add_special_tokens=False) + [tokenizer.eos_token_id]
        ids.append(prompt + trace)
        labels.append([-100] * len(prompt) + trace)
    told = shared(s, out)
    told["model_init_kwargs"]["attn_implementation"] = s["attention"]
    config = SFTConfig(**told, packing=True, max_length=s["length"], per_device_train_batch_size=1,
                       gradient_accumulation_steps=s["tokens"] // s["length"] // RANKS)
    trainer = SFTTrainer(model=s["model"], args=config, processing_class=tokenizer, callbacks=[record],
                         train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}))
    trainer.train()
    before = 0
    for row in record.rows:                              # TRL counts the tokens since the start
        row["tokens"], before = row["num_tokens"] - before, row["num_tokens"]


def main():
    s, record = json.loads(sys.argv[1]), Clock()
    with tempfile.TemporaryDirectory() as out:
        {"grpo": grpo, "sft": sft}[s["kind"]](s, out, record)
    if RANK == 0:
        Path(sys.argv[2]).write_text(json.dumps(record.rows))


if __name__ == "__main__":
    main()
