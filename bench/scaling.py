"""
How do time and memory of a training pass grow with the group, the answers and the ranks?

    python bench/scaling.py
    python bench/scaling.py --vocab 152064 --group 7 --answer 90 --ranks 1 --trl /path/to/trl/bin/python

score is a pass without gradient (the old log-probs, or the reference's); update is forward, backward and
optimizer step; extra memory is the peak of an update beyond what a rank held before it. `shared` computes a
prompt once for all of its answers, as grpo.py does; `separate` once for each answer, the same code told that
every answer has a prompt of its own. "of rate" is the floor's share of a pass: the matrix products that it
cannot do without (a backward pass has twice those of a forward pass, recomputation counts nothing), at the
rate at which this machine multiplies large matrices of this type, all ranks at a time. With --trl (see
trl_peer.py) also the learning phase of TRL's GRPOTrainer, all samples at once, score being its reference
pass; both ours and TRL's take one update.
"""
import json
import random
import statistics
import tempfile
from pathlib import Path

import common

import torch

import packing
import policy as P
import ranks as R
from files import Flags


def arguments():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--trl", help="python of an environment with TRL")
    arg("--prompt", type=int, default=300, help="tokens of every prompt")
    arg("--answer", type=int, nargs="+", default=[90, 300], help="tokens of every answer")
    arg("--group", type=int, nargs="+", default=[2, 7, 14], help="answers a prompt")
    arg("--ranks", type=int, nargs="+", default=[1, 2], help="how many; --threads are shared among them")
    arg("--pairs", type=int, default=4, help="prompts a pass, over all ranks")
    arg("--micro-tokens", type=int, default=16384, help="tokens a rank computes at once")
    arg("--repeats", type=int, default=3, help="passes of each kind, after one that warms up")
    arg("--case", type=json.loads, help="for its own use: the model's folder")
    common.model_flags(arg)
    return ap.parse_args()


def work(args):
    """What every rank does; rank 0 prints the rows, the slowest rank's time and the largest memory."""
    rank, world, device = R.start_ranks()
    policy = P.load(args.case, device, P.DTYPES[args.dtype], recompute=False)
    optim, rng = P.adamw(policy, 1e-6, (0.9, 0.999), 0.01), random.Random(0)
    rate, = R.all_sum([matrix_rate(device, P.DTYPES[args.dtype], 8192 if device.type == "cuda" else 2048)])
    for answer in args.answer:
        for group in args.group:
            ids = lambda n: [rng.randrange(260, 400) for _ in range(n)]
            groups = [(ids(args.prompt), [ids(answer) for _ in range(group)]) for _ in range(args.pairs)]
            separate = [(p, [r]) for p, rs in groups[rank::world] for r in rs]
            layouts = {"shared": groups[rank::world], "separate": separate}
            micros = {n: packing.level(packing.pack(g, args.micro_tokens, device), device)
                      for n, g in layouts.items()}
            runs = {n: lambda m=m: one_pass(policy, optim, m) for n, m in micros.items()}
            turns = common.alternate(runs, args.repeats + 1)
            for name, results in turns.items():
                best = [statistics.median(r[i] for r in results[1:]) for i in range(3)]
                score, update, gb = R.all_max(best)
                tokens, needed = R.all_sum([sum(len(b.tokens) for b in micros[name]),
                                            sum(products(policy.lm, b) for b in micros[name])])
                R.print0(json.dumps({"": name, "ranks": world, "answer": answer, "group": group,
                                     "tokens": int(tokens), "score s": score, "update s": update,
                                     "extra GB": gb, "score of rate": needed / score / rate,
                                     "update of rate": 3 * needed / update / rate, "TFLOP/s": rate / 1e12}))
    R.barrier()


def matrix_rate(device, dtype, n):
    """Operations a second of this rank in products of n x n matrices, the ranks all at it together."""
    a, b, seconds = (*torch.randn(2, n, n, device=device, dtype=dtype), [])
    for _ in range(10):
        start = common.clock()
        a @ b
        seconds.append(common.clock() - start)
    return 2 * n**3 / statistics.median(seconds)


def products(lm, batch):
    """Operations in the matrix products of a forward pass: the blocks for every token, the head for every
    response token, attention for every key that a query sees."""
    heads, keys = lm.model.layers[0].self_attn.q_proj.weight.shape[0], int((batch.positions + 1).sum())
    blocks = sum(p.numel() for p in lm.model.layers.parameters() if p.ndim == 2)
    return (2 * blocks * len(batch.tokens) + 2 * lm.lm_head.weight.numel() * len(batch.src)
            + 4 * heads * len(lm.model.layers) * keys)


def one_pass(policy, optim, micros):
    start = common.clock()
    with torch.no_grad():
        for b in micros:
            policy(b)
    score = common.clock() - start
    memory, start = common.Memory().start(), common.clock()
    for b in micros:
        policy(b).sum().mul(1e-4 * b.real).backward()
    P.optimizer_step(policy, optim, 1e-6, 1.0)
    return score, common.clock() - start, memory.peak()


def peer(args, folder, answer, group):
    """The score and learn phases of TRL's whole steps, without its sampling."""
    steps = common.run_peer(
        args.trl, 1, args.threads, kind="grpo", model=str(folder), data=str(folder / "pairs.jsonl"),
        peer_parts=1, steps=args.repeats + 1, pairs=args.pairs, group=group, answer=answer, beta=1e-3,
        dtype=args.dtype)[1:]
    median = lambda k: statistics.median(s[k] for s in steps)
    return {"": "TRL", "ranks": 1, "answer": answer, "group": group,
            "tokens": args.pairs * group * (args.prompt + answer), "score s": median("score"),
            "update s": median("learn"), "extra GB": median("learn_gb")}


def main():
    args = arguments()
    if args.case:
        return R.run(lambda: work(args))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = common.write_model(folder, args.prompt + max(args.answer), args.layers, args.hidden,
                                       args.vocab)
        common.write_prompts(folder / "pairs.jsonl", tokenizer, args.pairs * (args.repeats + 1), args.prompt)
        for ranks in args.ranks:
            rows += common.again(ranks, args.threads, str(folder))
        if args.trl:
            rows += [peer(args, folder, a, g) for a in args.answer for g in args.group]
    keyed = {(r["ranks"], r["answer"], r["group"], r[""]): r for r in rows}
    for row in rows:
        # How much of what separate sequences (or TRL) take does the shared prompt need?
        ours = keyed[row["ranks"], row["answer"], row["group"], "shared"]
        row |= {f"shared/this: {k}": ours[k] / row[k] for k in ("score s", "update s", "extra GB")}
    common.report("scaling", args, rows, peer=args.trl)


if __name__ == "__main__":
    main()
