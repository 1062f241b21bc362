"""
TRL's side of step.py and of `parts.py training`, which run it in TRL's own environment:

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl datasets
    trl/bin/python bench/trl_peer.py '{"kind": "grpo", ...}'                  # or by torchrun

Prints every step's seconds by phase, tokens, loss and gradient norm.
"""
import json
import os
import random
import sys
import tempfile

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from common import CUDA, clock, extra_gb, timed

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Clock(TrainerCallback):
    """A row for every optimizer step, from the log of the last one to its own. `phases` holds the seconds
    that wrapped methods took within it; memory is counted from the end of the one that is `last`."""

    def __init__(self):
        self.rows, self.phases, self.tokens = [], {}, 0

    def wrap(self, trainer, name, phase, last=False):
        method = getattr(trainer, name)

        def wrapped(*args, **kw):
            seconds, result = timed(method, *args, **kw)
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
            if last:
                self.extra = extra_gb()
            return result
        setattr(trainer, name, wrapped)

    def on_train_begin(self, *args, **kw):
        self.start, self.extra = clock(), extra_gb()

    def on_log(self, args, state, control, logs, **kw):
        if "loss" in logs:                              # and not the summary of the whole run
            now, numbers = clock(), {k: v for k, v in logs.items() if isinstance(v, (int, float))}
            self.rows.append(numbers | self.phases | {
                "seconds": now - self.start, "learn_gb": self.extra(),
                "tokens": logs["num_tokens"] - self.tokens})         # TRL counts them since the start
            self.start, self.phases, self.tokens = now, {}, logs["num_tokens"]


def plain(out, steps, lr=1e-6, seed=1, dtype="float32"):
    """What every trainer of TRL's is told, to be like ours: fp32 weights, AdamW, a norm of 1."""
    return dict(output_dir=out, use_cpu=not CUDA, bf16=dtype == "bfloat16", fp16=False, tf32=None,
                gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
                disable_tqdm=True, max_steps=steps, max_grad_norm=1.0, lr_scheduler_type="constant",
                learning_rate=lr, model_init_kwargs={"dtype": "float32"}, seed=seed)


def grpo(s, told, rows, record):
    """Phases: sample is transformers' generate; score the reference's log-probs and the rewards; learn the
    rest of the step, forward, backward and optimizer."""
    coin = lambda completions, **_: random.choices((1.0, -1.0), k=len(completions))
    config = GRPOConfig(**told, gradient_accumulation_steps=s["parts"], num_generations=s["group"], beta=1e-3,
                        per_device_train_batch_size=s["pairs"] * s["group"] // s["parts"] // RANKS,
                        max_completion_length=s["max_response"], loss_type="grpo", temperature=1.0)
    data = Dataset.from_list([{"prompt": row["context_messages"]} for row in rows])
    trainer = GRPOTrainer(model=s["model"], args=config, reward_funcs=coin, callbacks=[record],
                          train_dataset=data)
    record.wrap(trainer, "_generate_single_turn", "seconds_sample")
    record.wrap(trainer, "_generate_and_score_completions", "seconds_score", last=True)
    trainer.train()
    for row in record.rows:
        row["seconds_learn"] = row["seconds"] - row["seconds_score"]
        row["seconds_score"] -= row["seconds_sample"]
        row["length_mean"] = row["completions/mean_length"]


def sft(s, told, rows, record):
    """Packed rows of at most `length` tokens, one a micro-batch; TRL's loss is on completions only, too. Its
    default packing (best fit, no padding) wants flash attention, which needs a card; on a CPU, `sdpa` with
    position ids keeps the packed rows apart, by a mask of length x length, so a shorter row is faster."""
    data = Dataset.from_list([{"prompt": row["context_messages"], "completion": [
        {"role": "assistant", "content": row["winner"]}]} for row in rows])
    told["model_init_kwargs"]["attn_implementation"] = "flash_attention_2" if CUDA else "sdpa"
    config = SFTConfig(**told, packing=True, max_length=s["length"], per_device_train_batch_size=1,
                       gradient_accumulation_steps=s["tokens"] // s["length"] // RANKS)
    SFTTrainer(model=s["model"], args=config, train_dataset=data, callbacks=[record]).train()


def main():
    s, record = json.loads(sys.argv[1]), Clock()
    rows = [json.loads(line) for line in open(s["data"])]
    with tempfile.TemporaryDirectory() as out:
        told = plain(out, s["steps"], dtype=s["dtype"])
        {"grpo": grpo, "sft": sft}[s["kind"]](s, told, rows, record)
    for row in record.rows if RANK == 0 else ():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
