"""
TRL's side of step.py and of `parts.py training`, which run it in TRL's own environment:

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl datasets
    trl/bin/python bench/trl_peer.py '{"kind": "grpo", ...}'                  # or by torchrun

Prints a line of JSON for every step: seconds by phase, tokens, loss, gradient norm.
"""

import json
import os
import random
import sys
import tempfile

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from common import CUDA, clock, extra_gib, timed

RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))


class Clock(TrainerCallback):
    """A row for every optimizer step: all that TRL logs, and seconds, memory and tokens since the last one.

    A method that is wrapped adds its seconds to the row, under its phase. With `last` the count of the
    learning phase's memory begins at its end.
    """

    def __init__(self):
        self.rows, self.phases, self.tokens = [], {}, 0

    def wrap(self, trainer, name, phase, last=False):
        method = getattr(trainer, name)

        def wrapped(*args, **kw):
            seconds, result = timed(method, *args, **kw)
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
            if last:
                self.extra = extra_gib()
            return result

        setattr(trainer, name, wrapped)

    def on_train_begin(self, *args, **kw):
        self.start, self.extra = clock(), extra_gib()

    def on_log(self, args, state, control, logs, **kw):
        if "loss" not in logs:  # the summary of the whole run
            return
        now = clock()
        row = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        row |= self.phases
        row["seconds"] = now - self.start
        row["learn_gib"] = self.extra()
        row["tokens"] = logs["num_tokens"] - self.tokens  # TRL counts them since the start
        self.rows.append(row)
        self.start, self.phases, self.tokens = now, {}, logs["num_tokens"]


def plain(out, steps, lr=1e-6, seed=1, dtype="float32"):
    """Settings for every trainer of TRL that make it like ours: fp32 weights, AdamW, a norm of 1."""
    return dict(
        output_dir=out,
        use_cpu=not CUDA,
        bf16=dtype == "bfloat16",
        fp16=False,
        tf32=None,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        max_steps=steps,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        learning_rate=lr,
        model_init_kwargs={"dtype": "float32"},
        seed=seed,
    )


def random_rewards(completions, **_):
    return random.choices((1.0, -1.0), k=len(completions))


def run_grpo(settings, common, rows, recorder):
    """Phases: sample is transformers' generate; score the reference's log-probs and the rewards; learn the
    rest of the step: forward, backward and optimizer."""
    samples = settings["batch"] * settings["group_size"]
    config = GRPOConfig(
        **common,
        gradient_accumulation_steps=settings["parts"],
        num_generations=settings["group_size"],
        beta=1e-3,
        per_device_train_batch_size=samples // settings["parts"] // RANKS,
        max_completion_length=settings["max_response"],
        loss_type="grpo",
        temperature=1.0,
    )
    trainer = GRPOTrainer(
        model=settings["model"],
        args=config,
        reward_funcs=random_rewards,
        callbacks=[recorder],
        train_dataset=Dataset.from_list([{"prompt": row["context_messages"]} for row in rows]),
    )
    recorder.wrap(trainer, "_generate_single_turn", "seconds_sample")
    recorder.wrap(trainer, "_generate_and_score_completions", "seconds_score", last=True)
    trainer.train()
    for row in recorder.rows:
        row["seconds_learn"] = row["seconds"] - row["seconds_score"]
        row["seconds_score"] -= row["seconds_sample"]
        row["length_mean"] = row["completions/mean_length"]


def conversation(row):
    completion = {"role": "assistant", "content": row["winner"]}
    return {"prompt": row["context_messages"], "completion": [completion]}


def run_sft(settings, common, rows, recorder):
    """Packed rows of at most `length` tokens, one a micro-batch; TRL's loss is on completions only, too.

    TRL's default packing (best fit, no padding) wants flash attention, which needs a card. On a CPU, `sdpa`
    with position ids keeps the packed rows apart, by a mask of length x length: a shorter row is faster.
    """
    common["model_init_kwargs"]["attn_implementation"] = "flash_attention_2" if CUDA else "sdpa"
    config = SFTConfig(
        **common,
        packing=True,
        max_length=settings["length"],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings["tokens"] // settings["length"] // RANKS,
    )
    trainer = SFTTrainer(
        model=settings["model"],
        args=config,
        train_dataset=Dataset.from_list([conversation(row) for row in rows]),
        callbacks=[recorder],
    )
    trainer.train()


def main():
    settings, recorder = json.loads(sys.argv[1]), Clock()
    rows = [json.loads(line) for line in open(settings["data"])]
    run = {"grpo": run_grpo, "sft": run_sft}[settings["kind"]]
    with tempfile.TemporaryDirectory() as out:
        run(settings, plain(out, settings["steps"], dtype=settings["dtype"]), rows, recorder)
    if RANK == 0:
        for row in recorder.rows:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
