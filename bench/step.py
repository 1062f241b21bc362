"""
What does a step of grpo.py or sft.py cost, and what do TRL's trainers take for the same step?

    python bench/step.py grpo --trl /path/to/trl/bin/python                          # see trl_peer.py
    python bench/step.py grpo --trl /path/to/trl/bin/python --prompt 100 --answer 128 --group 8
    python bench/step.py sft --trl /path/to/trl/bin/python

Same random model, data, fp32, threads, in one process and spread over ranks (--ranks). Turns alternate, each
fresh processes whose first steps are dropped. "ours/this": of each turn, seconds a step, or tokens a second.

**grpo**: every answer runs to the limit, a reward without meaning, one update. TRL samples with transformers:
its colocated vLLM cannot take weights on a CPU ('Parameter' object has no attribute 'weight_loader'). Neither
computes old log-probs apart for a single update; both score the reference. TRL's samples go through its model
at once or in parts (--peer-parts).

**sft**: tokens a second; prompts of 100 to 300 tokens, traces of 30 to 150, loss on the traces only, no
recomputation, about 8,192 tokens a step, of which ours computes 4,096 at once. TRL gets the best of several
lengths of a packed row (--peer-length): what a row costs it on a CPU, trl_peer.py says.
"""
import json
import statistics
import tempfile
from functools import partial

import common
from files import Flags


def grpo(args, model, data):
    """Write both. -> flags of our script, which trl_peer.py is told too; what else it is, by what is tried"""
    tokenizer = common.write_model(model, args.prompt + args.answer, args)
    common.write_prompts(data, tokenizer, args.pairs * args.steps, args.prompt)
    flags = dict(max_prompt=args.prompt, max_response=args.answer, pairs=args.pairs, mini=args.pairs,
                 group=args.group, steps=args.steps, reward="random", max_gap=0.01)
    return flags, {f"micro-batches: {n}": {"parts": n} for n in args.peer_parts}


def sft(args, model, data):
    """The same for sft.py."""
    rows, tokenizer = round(8192 / (200 + 90)), common.write_model(model, max(450, *args.peer_length), args)
    common.write_prompts(data, tokenizer, rows * args.steps, lambda rng: rng.randint(100, 300),
                         lambda rng: rng.randint(30, 150))
    flags = dict(max_len=450, batch=rows, micro_tokens=4096, lr=1e-6)
    return flags, {f"rows of {n}": {"length": n, "tokens": 8192} for n in args.peer_length}


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("kind", choices=("grpo", "sft"))
    arg("--answer", type=int, default=90, help="grpo: tokens of every answer")
    arg("--group", type=int, default=7, help="grpo: answers a prompt")
    arg("--peer-parts", type=int, nargs="+", default=[1, 2], help="grpo: TRL's micro-batches to try")
    arg("--peer-length", type=int, nargs="+", default=[512, 1024, 2048], help="sft: TRL's packed rows to try")
    arg("--steps", type=int, default=6, help="steps of a turn")
    arg("--warmup", type=int, default=2, help="of which dropped")
    common.flags(arg)
    args, runs = ap.parse_args(), {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"model": f"{folder}/model", "data": f"{folder}/data.jsonl"}
        flags, tries = {"grpo": grpo, "sft": sft}[args.kind](args, **files)
        flags |= files | {"dtype": args.dtype}
        for ranks in args.ranks:
            runs[f"ours, ranks: {ranks}"] = partial(
                common.run_ours, f"{args.kind}.py", ranks, args.threads, **flags)
            for words, tried in tries.items() if args.trl else ():
                told = flags | {"kind": args.kind, "steps": args.steps} | tried
                runs[f"trl, ranks: {ranks}, {words}"] = partial(
                    common.run, args.trl, ranks, args.threads, "bench/trl_peer.py", json.dumps(told))
        turns = {name: [rows[args.warmup:] or rows[-1:] for rows in results]
                 for name, results in common.alternate(runs, args.turns).items()}

    seconds = lambda steps: statistics.median(s["seconds"] for s in steps)
    rate = lambda steps: sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)
    measure, table = {"grpo": seconds, "sft": rate}[args.kind], []
    for name, results in turns.items():
        steps = sum(results, [])
        for row in steps:
            # transformers has been seen to draw an end token now and then which is 30 nats below the others.
            assert row["grad_norm"] > 0 and row.get("length_mean", args.answer) > 0.98 * args.answer, row
        phases = {p: statistics.median(s[f"seconds_{p}"] for s in steps)
                  for p in ("sample", "score", "learn", "sync") if f"seconds_{p}" in steps[0]}
        table.append({"": name, "s/step": seconds(steps)} | phases | {
            "tokens/s": statistics.median(map(rate, results)),
            "tokens/step": statistics.mean(s["tokens"] for s in steps), "loss": steps[0]["loss"]} | {
            f"{ours}/this": common.ratio(map(measure, turns[ours]), map(measure, results))
            for ours in turns if ours.startswith("ours")})
    common.report(table, args.trl)


if __name__ == "__main__":
    main()
