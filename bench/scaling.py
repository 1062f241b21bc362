"""
How do time and memory of a training pass grow with the group, the answers and the ranks?

    python bench/scaling.py
    python bench/scaling.py --vocab 152064 --group 7 --answer 90 --ranks 1 --trl /path/to/trl/bin/python

score is a pass without gradient (the old log-probs, or the reference's); update is forward, backward and
optimizer step; extra memory is the peak of an update beyond what a rank held before it. `shared` computes a
prompt once for all of its answers, as grpo.py does; `separate` once for each answer, the same code told that
every answer has a prompt of its own. With --trl (see trl_peer.py) also the learning phase of TRL's
GRPOTrainer, all samples at once, score being its reference pass; both ours and TRL's take one update.
"""
import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

import common
from common import ROOT

import torch

import policy as P
import ranks as R


def arguments():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arg = ap.add_argument
    arg("--trl", help="python of an environment with TRL")
    arg("--prompt", type=int, default=300, help="tokens of every prompt")
    arg("--answer", type=int, nargs="+", default=[90, 300], help="tokens of every answer")
    arg("--group", type=int, nargs="+", default=[2, 7, 14], help="answers a prompt")
    arg("--ranks", type=int, nargs="+", default=[1, 2], help="how many; --threads are shared among them")
    arg("--pairs", type=int, default=4, help="prompts a pass, over all ranks")
    arg("--micro-tokens", type=int, default=16384, help="tokens a rank computes at once")
    arg("--layers", type=int, default=6, help="of the model")
    arg("--hidden", type=int, default=256, help="its width")
    arg("--vocab", type=int, help="its vocabulary; default: the toy's few hundred")
    arg("--dtype", choices=P.DTYPES, default="float32", help="of the computation")
    arg("--threads", type=int, default=2, help="of all ranks together")
    arg("--repeats", type=int, default=3, help="passes of each kind, after one that warms up")
    arg("--worker", help="for its own use: the model's folder")
    arg("--json", help="where the numbers go; default: runs/bench/scaling.json")
    return ap.parse_args()


def work(args):
    """What every rank does; rank 0 prints the rows, the slowest rank's time and the largest memory."""
    rank, world, device = R.start_ranks()
    policy = P.load(args.worker, device, P.DTYPES[args.dtype], recompute=False)
    optim, rng = P.adamw(policy, 1e-6, (0.9, 0.999), 0.01), random.Random(0)
    for answer in args.answer:
        for group in args.group:
            ids = lambda n: [rng.randrange(260, 400) for _ in range(n)]
            groups = [(ids(args.prompt), [ids(answer) for _ in range(group)]) for _ in range(args.pairs)]
            separate = [(p, [r]) for p, rs in groups[rank::world] for r in rs]
            layouts = {"shared": groups[rank::world], "separate": separate}
            micros = {n: P.level(P.pack(g, args.micro_tokens, device), device) for n, g in layouts.items()}
            runs = {n: lambda m=m: one_pass(policy, optim, m) for n, m in micros.items()}
            turns = common.alternate(runs, args.repeats + 1)
            for name, results in turns.items():
                best = [statistics.median(r[i] for r in results[1:]) for i in range(3)]
                score, update, gb = R.all_max(best)
                R.print0(json.dumps({"": name, "ranks": world, "answer": answer, "group": group,
                                     "tokens": int(R.all_sum([sum(len(b.tokens) for b in micros[name])])[0]),
                                     "score s": score, "update s": update, "extra GB": gb}))
    R.barrier()


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
    told = {"kind": "grpo", "model": str(folder), "data": str(folder / "pairs.jsonl"), "peer_parts": 1,
            "steps": args.repeats + 1, "group": group, "answer": answer, "beta": 1e-3}
    told |= {k: getattr(args, k) for k in ("pairs", "dtype")}
    steps = common.run_peer(args.trl, told, args.threads)[1:]
    median = lambda k: statistics.median(s[k] for s in steps)
    return {"": "TRL", "ranks": 1, "answer": answer, "group": group,
            "tokens": args.pairs * group * (args.prompt + answer), "score s": median("score"),
            "update s": median("learn"), "extra GB": median("learn_gb")}


def main():
    args = arguments()
    if args.worker:
        return work(args)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = common.write_model(folder, args.prompt + max(args.answer), args.layers, args.hidden,
                                       args.vocab)
        common.write_prompts(folder / "pairs.jsonl", tokenizer, args.pairs * (args.repeats + 1), args.prompt)
        for ranks in args.ranks:
            out = common.run([
                sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks,
                ROOT / "bench/scaling.py", *sys.argv[1:], "--worker", folder], args.threads // ranks)
            rows += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
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
