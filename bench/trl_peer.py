"""
TRL's side of grpo_step.py and sft_step.py, which run it in TRL's own environment:

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl datasets
    trl/bin/python bench/trl_peer.py '{"kind": "grpo", ...}' OUT.json         # or by torchrun

Every step's seconds by phase, loss and gradient norm go to OUT.json. It imports nothing of this project.
"""
import ctypes
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

CUDA = torch.cuda.is_available()
RANK, RANKS = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))


class Clock(TrainerCallback):
    """A row for every optimizer step, from the end of the last one to its own. `phases` holds the seconds
    that wrapped functions took within it; memory is counted from the end of `memory_from`."""

    def __init__(self):
        self.rows, self.phases, self.last = [], {}, None
        self.memory_from, self.held, self.peak = None, 0.0, 0.0

    def wrap(self, trainer, name):
        method = getattr(trainer, name)

        def timed(*args, **kw):
            start = self.now()
            result = method(*args, **kw)
            self.phases[name] = self.phases.get(name, 0.0) + self.now() - start
            if name == self.memory_from:
                self.peak = max(self.peak, top_gb())        # the mark begins anew
                self.held = mark_memory()
            return result
        setattr(trainer, name, timed)

    def now(self):
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args, **kw):
        self.last = self.now()

    def on_step_end(self, *args, **kw):
        now = self.now()
        self.peak = max(self.peak, top_gb())
        self.rows.append({"seconds": now - self.last, "peak_gb": self.peak,
                          "learn_gb": top_gb() - self.held} | self.phases)
        self.last, self.phases = now, {}

    def on_log(self, args, state, control, logs, **kw):
        if "loss" in logs:                              # and not the summary of the whole run
            self.rows[-1] |= {k: v for k, v in logs.items() if isinstance(v, (int, float))}


def mark_memory():
    """GB held now, from where on `top_gb` looks. What malloc keeps of freed memory would hide what is taken
    next, so it goes back first."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_gb("VmRSS")


def top_gb():
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else status_gb("VmHWM")


def status_gb(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def common(s, out):
    """What both trainers are told, to be like ours: fp32 weights, AdamW, a norm of 1, nothing saved."""
    return dict(output_dir=out, use_cpu=not CUDA, bf16=s["dtype"] == "bfloat16", fp16=False, tf32=None,
                gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
                disable_tqdm=True, max_steps=s["steps"], max_grad_norm=1.0, lr_scheduler_type="constant",
                learning_rate=1e-6, model_init_kwargs={"dtype": "float32"}, seed=1)


def grpo(s, out, clock):
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
    config = GRPOConfig(**common(s, out), gradient_accumulation_steps=parts,
                        per_device_train_batch_size=s["pairs"] * s["group"] // parts // RANKS,
                        num_generations=s["group"], beta=s["beta"],
                        max_completion_length=s["answer"], loss_type="grpo", temperature=1.0)
    trainer = GRPOTrainer(model=s["model"], reward_funcs=coin, args=config, processing_class=tokenizer,
                          train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=[clock])
    for name in ("_generate_single_turn", "_generate_and_score_completions"):
        clock.wrap(trainer, name)
    clock.memory_from = "_generate_and_score_completions"
    trainer.train()
    for row in clock.rows:
        sample, both = row.pop("_generate_single_turn"), row.pop("_generate_and_score_completions")
        row |= {"sample": sample, "score": both - sample, "learn": row["seconds"] - both}


def sft(s, out, clock):
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
    told = common(s, out)
    told["model_init_kwargs"]["attn_implementation"] = s["attention"]
    config = SFTConfig(**told, packing=True, max_length=s["length"], per_device_train_batch_size=1,
                       gradient_accumulation_steps=s["tokens"] // s["length"] // RANKS)
    trainer = SFTTrainer(model=s["model"], args=config, processing_class=tokenizer, callbacks=[clock],
                         train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}))
    trainer.train()
    before = 0
    for row in clock.rows:                              # TRL counts the tokens since the start
        row["tokens"], before = row["num_tokens"] - before, row["num_tokens"]


def main():
    s, clock = json.loads(sys.argv[1]), Clock()
    with tempfile.TemporaryDirectory() as out:
        {"grpo": grpo, "sft": sft}[s["kind"]](s, out, clock)
    if RANK == 0:
        Path(sys.argv[2]).write_text(json.dumps(clock.rows))


if __name__ == "__main__":
    main()
