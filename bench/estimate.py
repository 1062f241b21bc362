"""
Do the seconds that tools/dryrun.py estimates for this machine agree with those of real steps?

    python bench/estimate.py                        # SFT and GRPO, a model of 25M parameters, in one process
    python bench/estimate.py sft.py --layers 12 --hidden 768 --turns 5

Estimate and run alternate, because a shared machine's speed drifts: each estimate measures the machine's rates
again (--card this). The model is random and every answer runs to the limit, so that lengths are known. The first
steps of a run are dropped. "ratio" is measured over estimated, of medians.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
from functools import partial

import common
from lib.files import Flags, run_main


def flags():
    parser = Flags(__doc__)
    arg = parser.add_argument
    arg("scripts", nargs="*", default=["sft.py", "grpo.py"], help="what to run: sft.py, grpo.py")
    arg("--answer", type=int, default=128, help="tokens of every answer")
    arg("--group-size", type=int, default=7, help="answers a prompt")
    arg("--steps", type=int, default=4, help="steps of a turn")
    arg("--warmup", type=int, default=2, help="how many of them are dropped")
    common.flags(arg)
    parser.set_defaults(layers=8, hidden=512, ranks=[1])
    return parser


def prepare(args, folder):
    """Write a model and data. -> {script: its flags}"""
    model, rl, traces = f"{folder}/model", f"{folder}/rl.jsonl", f"{folder}/sft.jsonl"
    tokenizer = common.write_model(model, args.prompt + args.answer, args)
    common.write_prompts(rl, tokenizer, args.batch * args.steps, args.prompt)
    # As many tokens as a step of GRPO samples.
    rows = args.batch * args.group_size
    length = lambda rng: rng.randint(args.prompt // 2, args.prompt)
    trace = lambda rng: rng.randint(args.answer // 2, args.answer)
    common.write_prompts(traces, tokenizer, rows * args.steps, length, trace)
    both = {"model": model, "dtype": args.dtype}
    return {
        "sft.py": both | {"data": traces, "batch": rows, "max_len": args.prompt + args.answer},
        "grpo.py": both
        | {
            "data": rl,
            "batch": args.batch,
            "mini_batch": args.batch // 2,
            "group_size": args.group_size,
            "max_prompt": args.prompt,
            "max_response": args.answer,
            "reward": "random",
        },
    }


def measured(args, script, settings):
    """-> {phase: median seconds}"""
    rows = common.run_ours(script, 1, args.threads, **settings)[args.warmup :]
    phases = [name for name in rows[0] if name.startswith("seconds")]
    return {name: statistics.median(row[name] for row in rows) for name in phases}


def estimated(args, script, settings):
    """What the dry run prints. -> {phase: seconds}"""
    words = [sys.executable, "tools/dryrun.py", script, "--card", "this"]
    words += ["--response", args.answer, "--no-recompute", "--shard", 1]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", value]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=common.ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("estimate")]
    print(line, file=sys.stderr)
    total, phases = re.search(r": ([\d.,e+-]+) s a step \((.*?)\)", line).groups()
    number = lambda text: float(text.replace(",", ""))
    found = re.findall(r"(\w+) (\d[\d.,e+-]*\d|\d)", phases)
    return {f"seconds_{name}": number(text) for name, text in found} | {"seconds": number(total)}


def main():
    args = flags().parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(args, folder)
        for script in args.scripts:
            settings = prepared[script]
            turns = common.alternate(
                {
                    "estimated": partial(estimated, args, script, settings),
                    "measured": partial(measured, args, script, settings),
                },
                args.turns,
            )
            for name in turns["measured"][0]:
                median = {
                    kind: statistics.median(turn.get(name, 0) for turn in results)
                    for kind, results in turns.items()
                }
                ratio = median["measured"] / median["estimated"] if median["estimated"] else None
                rows.append({"phase": f"{script} {name}", **median, "ratio": ratio})
    common.report(rows)


if __name__ == "__main__":
    run_main(main)
