"""
What does a step of grpo.py cost, phase by phase, and what does TRL's GRPOTrainer take for the same step?

    python bench/grpo_step.py --trl /path/to/trl/bin/python                          # see trl_peer.py
    python bench/grpo_step.py --trl /path/to/trl/bin/python --prompt 100 --answer 128 --group 8
    python bench/grpo_step.py                                                        # ours alone

Same random model, prompts, group, lengths (every answer runs to the limit), reward without meaning, one
update, fp32, threads, in one process and spread over ranks (--ranks). Turns alternate, each fresh processes
whose first steps are dropped. TRL samples with its own transformers generate: its colocated vLLM cannot take
weights on a CPU ('Parameter' object has no attribute 'weight_loader'). Neither computes old log-probs apart
for a single update; both score the reference where --beta is not 0. TRL's samples go through its model all at
once or in parts (--peer-parts). Peak memory is that of rank 0's process, on a CPU with imports and, for ours,
the engine's cache.
"""
import statistics
import tempfile
from pathlib import Path

import common
from files import Flags

PHASES = ("sample", "score", "learn", "sync")


def arguments():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--trl", help="python of an environment with TRL; without it only ours is measured")
    arg("--prompt", type=int, default=300, help="tokens of every prompt")
    arg("--answer", type=int, default=90, help="tokens of every answer")
    arg("--group", type=int, default=7, help="answers a prompt")
    arg("--pairs", type=int, default=8, help="prompts a step")
    arg("--beta", type=float, default=1e-3, help="weight of the reference; 0: none")
    arg("--layers", type=int, default=6, help="of the model")
    arg("--hidden", type=int, default=256, help="its width")
    arg("--vocab", type=int, help="its vocabulary; default: the toy's few hundred")
    arg("--dtype", default="float32", help="of the computation")
    arg("--threads", type=int, default=2, help="of all ranks together")
    arg("--ranks", type=int, nargs="+", default=[1, 2], help="how many, of ours and of TRL's")
    arg("--steps", type=int, default=5, help="steps of a turn")
    arg("--warmup", type=int, default=2, help="of which dropped")
    arg("--turns", type=int, default=3, help="turns of each")
    arg("--peer-parts", type=int, nargs="+", default=[1, 2], help="parts of TRL's micro-batches to try")
    arg("--json", help="where the numbers go; default: runs/bench/grpo_step-PROMPT-ANSWER-GROUP.json")
    return ap.parse_args()


def ours(args, folder, ranks):
    """The steps of one run of grpo.py: seconds by phase, peak memory."""
    rows = common.run_ours(
        "grpo.py", ranks, args.threads, model=folder / "model", data=folder / "pairs.jsonl",
        max_prompt=args.prompt, max_response=args.answer, pairs=args.pairs, mini=args.pairs, group=args.group,
        steps=args.steps, beta=args.beta, dtype=args.dtype, reward="random", max_gap=0.01)
    return check([row | {p: row[f"seconds_{p}"] for p in PHASES} for row in rows], args)


def peer(args, folder, ranks, parts):
    """The same of TRL, the samples going through its model in `parts` parts."""
    told = {k: getattr(args, k) for k in ("pairs", "group", "answer", "beta", "dtype", "steps")}
    rows = common.run_peer(args.trl, ranks, args.threads, kind="grpo", model=str(folder / "model"),
                           data=str(folder / "pairs.jsonl"), peer_parts=parts, **told)
    return check([row | {"length_mean": row["completions/mean_length"]} for row in rows], args)


def check(rows, args):
    """The answers have the length that was asked for, and something is learned. (transformers has been seen
    to draw an end token now and then which is 30 nats below the others.)"""
    assert all(row["length_mean"] > 0.98 * args.answer and row["grad_norm"] > 0 for row in rows), rows
    return rows[args.warmup:]


def main():
    args = arguments()
    args.json = args.json or f"runs/bench/grpo_step-{args.prompt}-{args.answer}-{args.group}.json"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = common.write_model(folder / "model", args.prompt + args.answer, args.layers, args.hidden,
                                       args.vocab)
        common.write_prompts(folder / "pairs.jsonl", tokenizer, args.pairs * args.steps, args.prompt)
        runs = {}
        for ranks in args.ranks:
            runs[f"ours, ranks: {ranks}"] = lambda ranks=ranks: ours(args, folder, ranks)
            for parts in args.peer_parts if args.trl else ():
                runs[f"trl, ranks: {ranks}, micro-batches: {parts}"] = \
                    lambda ranks=ranks, parts=parts: peer(args, folder, ranks, parts)
        turns = common.alternate(runs, args.turns)

    def median(steps, key="seconds"):
        return statistics.median(s[key] for s in steps) if key in steps[0] else None

    tokens, rows = args.pairs * args.group * (args.prompt + args.answer), []
    for name, results in turns.items():
        steps = sum(results, [])
        rows.append({"": name, "s/step": median(steps)} | {p: median(steps, p) for p in PHASES} | {
            "tokens/s": tokens / median(steps), "peak GB": max(s["peak_gb"] for s in steps)})
    if not args.trl:
        rows.append({"": "trl (not run)"})
    common.report("grpo_step", args, rows, common.against(turns, median), args.trl)


if __name__ == "__main__":
    main()
