"""
What does a step of grpo.py or sft.py cost, and what do TRL's trainers take for the same step?

    python bench/step.py grpo --trl /path/to/trl/bin/python                          # see trl_peer.py
    python bench/step.py grpo --trl /path/to/trl/bin/python --prompt 100 --answer 128 --group 8
    python bench/step.py sft --trl /path/to/trl/bin/python
    python bench/step.py grpo                                                        # ours alone

Same random model, data, fp32, threads, in one process and spread over ranks (--ranks). Turns alternate, each
fresh processes whose first steps are dropped. Peak memory is that of rank 0's process, on a CPU with imports
and, for ours, the engine's cache.

**grpo**: prompts, group, lengths (every answer runs to the limit), a reward without meaning, one update. TRL
samples with its own transformers generate: its colocated vLLM cannot take weights on a CPU ('Parameter'
object has no attribute 'weight_loader'). Neither computes old log-probs apart for a single update; both score
the reference where --beta is not 0. TRL's samples go through its model at once or in parts (--peer-parts).

**sft**: tokens a second; loss on the traces only, no recomputation, about as many tokens a step. What TRL
allows on a CPU: its packing (best fit, no padding) is made for flash attention, which needs a card; with
`sdpa` or `eager` it warns, and transformers makes a mask out of the position ids that keeps the packed rows
apart. That mask is length x length, so TRL gets the best of several lengths of a packed row (--peer-length).
"""
import statistics
import tempfile
from functools import partial
from pathlib import Path

import common
from files import Flags

PHASES = ("sample", "score", "learn", "sync")


def arguments():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("kind", choices=("grpo", "sft"))
    arg("--trl", help="python of an environment with TRL; without it only ours is measured")
    arg("--prompt", type=int, nargs="+", help="tokens of a prompt: 300; sft: fewest and most, 100 300")
    arg("--answer", type=int, default=90, help="grpo: tokens of every answer")
    arg("--group", type=int, default=7, help="grpo: answers a prompt")
    arg("--pairs", type=int, default=8, help="grpo: prompts a step")
    arg("--beta", type=float, default=1e-3, help="grpo: weight of the reference; 0: none")
    arg("--peer-parts", type=int, nargs="+", default=[1, 2], help="grpo: TRL's micro-batches to try")
    arg("--trace", type=int, nargs=2, default=(30, 150), help="sft: fewest and most tokens of a trace")
    arg("--tokens", type=int, default=8192, help="sft: tokens a step, roughly for ours")
    arg("--micro-tokens", type=int, default=4096, help="sft: of which ours computes at once")
    arg("--peer-length", type=int, nargs="+", default=[512, 1024, 2048], help="sft: TRL's packed rows to try")
    arg("--peer-attention", default="sdpa", help="sft: on CUDA flash_attention_2")
    arg("--ranks", type=int, nargs="+", default=[1, 2], help="how many, of ours and of TRL's")
    arg("--steps", type=int, default=6, help="steps of a turn")
    arg("--warmup", type=int, default=2, help="of which dropped")
    arg("--turns", type=int, default=3, help="turns of each")
    common.model_flags(arg)
    return ap.parse_args()


def grpo(args, folder, write):
    """-> our run and TRL's, (ranks, ...) -> a row a step; what TRL tries, in words; what turns compare"""
    prompt, = args.prompt or [300]
    tokens = args.pairs * args.group * (prompt + args.answer)
    tokenizer = write(prompt + args.answer)
    common.write_prompts(folder / "data.jsonl", tokenizer, args.pairs * args.steps, prompt)

    def ours(ranks):
        rows = common.run_ours(
            "grpo.py", ranks, args.threads, model=folder / "model", data=folder / "data.jsonl",
            max_prompt=prompt, max_response=args.answer, pairs=args.pairs, mini=args.pairs,
            group=args.group, steps=args.steps, beta=args.beta, dtype=args.dtype, reward="random",
            max_gap=0.01)
        return check([row | {p: row[f"seconds_{p}"] for p in PHASES} for row in rows])

    def peer(ranks, parts):
        told = {k: getattr(args, k) for k in ("pairs", "group", "answer", "beta")}
        rows = run_peer(args, ranks, folder, kind="grpo", peer_parts=parts, **told)
        return check([row | {"length_mean": row["completions/mean_length"]} for row in rows])

    def check(rows):
        # transformers has been seen to draw an end token now and then which is 30 nats below the others.
        assert all(row["length_mean"] > 0.98 * args.answer for row in rows), rows
        return [row | {"tokens": tokens} for row in rows]

    return ours, peer, {f"micro-batches: {n}": n for n in args.peer_parts}, seconds


def sft(args, folder, write):
    low, high = args.prompt or (100, 300)
    rows = round(args.tokens / ((low + high) / 2 + sum(args.trace) / 2))
    common.write_prompts(folder / "data.jsonl", write(max(2048, *args.peer_length)), rows * args.steps,
                         lambda rng: rng.randint(low, high), lambda rng: rng.randint(*args.trace))

    def ours(ranks):
        return common.run_ours(
            "sft.py", ranks, args.threads, model=folder / "model", data=folder / "data.jsonl",
            max_len=high + args.trace[1], batch=rows, micro_tokens=args.micro_tokens, lr=1e-6,
            dtype=args.dtype)

    def peer(ranks, length):
        return run_peer(args, ranks, folder, kind="sft", length=length, tokens=args.tokens,
                        attention=args.peer_attention)

    return ours, peer, {f"rows of {n}": n for n in args.peer_length}, rate


def run_peer(args, ranks, folder, **told):
    return common.run_peer(args.trl, ranks, args.threads, model=str(folder / "model"),
                           data=str(folder / "data.jsonl"), dtype=args.dtype, steps=args.steps, **told)


def seconds(steps):
    return statistics.median(s["seconds"] for s in steps)


def rate(steps):
    return sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write = lambda window: common.write_model(folder / "model", window, args.layers, args.hidden,
                                                  args.vocab)
        ours, peer, tries, measure = {"grpo": grpo, "sft": sft}[args.kind](args, folder, write)
        runs = {}
        for ranks in args.ranks:
            runs[f"ours, ranks: {ranks}"] = partial(ours, ranks)
            for words, value in tries.items() if args.trl else ():
                runs[f"trl, ranks: {ranks}, {words}"] = partial(peer, ranks, value)
        turns = common.alternate(runs, args.turns)

    table = []
    for name, results in turns.items():
        assert all(row["grad_norm"] > 0 for rows in results for row in rows), results
        results[:] = [rows[args.warmup:] or rows[-1:] for rows in results]
        steps = sum(results, [])
        phases = {p: statistics.median(s[p] for s in steps) for p in PHASES if p in steps[0]}
        table.append({"": name, "s/step": seconds(steps)} | phases | {
            "tokens/s": statistics.median(map(rate, results)),
            "tokens/step": statistics.mean(s["tokens"] for s in steps), "loss": steps[0]["loss"],
            "peak GB": max(s["peak_gb"] for s in steps)})
    if not args.trl:
        table.append({"": "trl (not run)"})
    ratio = lambda a, b: common.spread([measure(x) / measure(y) for x, y in zip(turns[a], turns[b])])
    notes = [f"{a} / {b}, {measure.__name__} of each turn: {ratio(a, b)}"
             for a in turns if a.startswith("ours") for b in turns if b.startswith("trl")]
    common.report(f"step-{args.kind}", args, table, notes, args.trl)


if __name__ == "__main__":
    main()
