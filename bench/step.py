"""
What does a step of grpo.py or sft.py cost, and what do TRL's trainers take for the same step?

    python bench/step.py grpo --trl /path/to/trl/bin/python                          # see trl_peer.py
    python bench/step.py grpo --trl /path/to/trl/bin/python --prompt 100 --answer 128 --group-size 8
    python bench/step.py sft --trl /path/to/trl/bin/python

Both get the same random model, data, type, and threads, in one process and on several ranks (--ranks). Turns
alternate; each is made of fresh processes, whose first steps are dropped. "ours/this" compares the turns in seconds
a step (grpo) or tokens a second (sft).

**grpo**: every answer runs to the limit, the reward is random, a step has one update. TRL samples with transformers,
because its colocated vLLM cannot take weights on a CPU ('Parameter' object has no attribute 'weight_loader').
Neither computes old log-probs apart for a single update; both score the reference. TRL's samples go through its
model at once or in parts (--peer-parts).

**sft**: prompts of 100 to 300 tokens, traces of 30 to 150, the loss on the traces only, no recomputation, about
8,192 tokens a step, of which ours computes 4,096 at once. TRL gets the best of several lengths of a packed row
(--peer-length); trl_peer.py says why a longer row costs it more on a CPU.
"""

import json
import statistics
import tempfile
from functools import partial

import common
from lib.files import Flags, run_main

SFT_TOKENS = 8192  # of a step


def flags():
    parser = Flags(__doc__)
    arg = parser.add_argument
    arg("kind", choices=("grpo", "sft"))
    arg("--answer", type=int, default=90, help="grpo: tokens of every answer")
    arg("--group-size", type=int, default=7, help="grpo: answers a prompt")
    arg(
        "--peer-parts", type=int, nargs="+", default=[1, 2], help="grpo: TRL's micro-batches to try"
    )
    arg(
        "--peer-length",
        type=int,
        nargs="+",
        default=[512, 1024, 2048],
        help="sft: TRL's packed rows to try",
    )
    arg("--steps", type=int, default=6, help="steps of a turn")
    arg("--warmup", type=int, default=2, help="how many of them are dropped")
    common.flags(arg)
    return parser


def prepare_grpo(args, model, data):
    """Write a model and its data. -> flags of grpo.py, {name: settings of trl_peer.py to try}"""
    tokenizer = common.write_model(model, args.prompt + args.answer, args)
    common.write_prompts(data, tokenizer, args.batch * args.steps, args.prompt)
    settings = {
        "max_prompt": args.prompt,
        "max_response": args.answer,
        "batch": args.batch,
        "mini_batch": args.batch,
        "group_size": args.group_size,
        "steps": args.steps,
        "reward": "random",
        "max_mismatch": 0.01,
    }
    return settings, {f"micro-batches: {n}": {"parts": n} for n in args.peer_parts}


def prepare_sft(args, model, data):
    """The same for sft.py."""
    rows = round(SFT_TOKENS / (200 + 90))  # mean lengths of a prompt and a trace
    tokenizer = common.write_model(model, max(450, *args.peer_length), args)
    common.write_prompts(
        data,
        tokenizer,
        rows * args.steps,
        length=lambda rng: rng.randint(100, 300),
        trace=lambda rng: rng.randint(30, 150),
    )
    settings = {"max_len": 450, "batch": rows, "micro_tokens": 4096, "lr": 1e-6}
    tries = {
        f"rows of {length}": {"length": length, "tokens": SFT_TOKENS} for length in args.peer_length
    }
    return settings, tries


def run_turns(args):
    """-> {name: [steps of each turn]}, warm-up left out"""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"model": f"{folder}/model", "data": f"{folder}/data.jsonl"}
        prepare = {"grpo": prepare_grpo, "sft": prepare_sft}[args.kind]
        settings, tries = prepare(args, **files)
        settings |= files | {"dtype": args.dtype}
        for ranks in args.ranks:
            runs[f"ours, ranks: {ranks}"] = partial(
                common.run_ours, f"{args.kind}.py", ranks, args.threads, **settings
            )
            if not args.trl:
                continue
            for name, more in tries.items():
                peer = settings | {"kind": args.kind, "steps": args.steps} | more
                command = ["bench/trl_peer.py", json.dumps(peer)]
                runs[f"trl, ranks: {ranks}, {name}"] = partial(
                    common.run, args.trl, ranks, args.threads, *command
                )
        turns = common.alternate(runs, args.turns)
    return {
        name: [rows[args.warmup :] or rows[-1:] for rows in results]
        for name, results in turns.items()
    }


def seconds_of(steps):
    return statistics.median(step["seconds"] for step in steps)


def tokens_per_second(steps):
    return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)


def row_of(name, turns, measure):
    """The line of the table for turns[name]. measure: steps of a turn -> what "ours/this" compares"""
    steps = [step for turn in turns[name] for step in turn]
    row = {"": name, "s/step": seconds_of(steps)}
    for phase in ("sample", "score", "learn", "sync"):
        if f"seconds_{phase}" in steps[0]:
            row[phase] = statistics.median(step[f"seconds_{phase}"] for step in steps)
    row["tokens/s"] = statistics.median(map(tokens_per_second, turns[name]))
    row["tokens/step"] = statistics.mean(step["tokens"] for step in steps)
    row["loss"] = steps[0]["loss"]
    for ours in turns:
        if ours.startswith("ours"):
            row[f"{ours}/this"] = common.ratio(map(measure, turns[ours]), map(measure, turns[name]))
    return row


def main():
    args = flags().parse_args()
    turns = run_turns(args)
    for results in turns.values():
        for step in (step for turn in results for step in turn):
            # transformers has been seen to draw, now and then, an end token 30 nats below the others.
            length = step.get("length_mean", args.answer)
            assert step["grad_norm"] > 0 and length > 0.98 * args.answer, step
    measure = {"grpo": seconds_of, "sft": tokens_per_second}[args.kind]
    common.report([row_of(name, turns, measure) for name in turns], args.trl)


if __name__ == "__main__":
    run_main(main)
