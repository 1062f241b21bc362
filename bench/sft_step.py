"""
How many tokens a second does sft.py learn from, and how many TRL's SFTTrainer with packed rows?

    python bench/sft_step.py --trl /path/to/trl/bin/python      # see trl_peer.py
    python bench/sft_step.py                                    # ours alone

Same random model, rows, loss (on the traces only), fp32, threads, no recomputation; about as many tokens a
step. Turns alternate, each a fresh process whose first steps are dropped. What TRL allows on a CPU: its
packing (best fit, no padding) is made for flash attention, which needs a card; with `sdpa` or `eager` it
warns, and transformers makes a mask out of the position ids that keeps the packed rows apart. That mask is
length x length, so TRL gets the best of several lengths of a packed row.
"""
import statistics
import tempfile
from pathlib import Path

import common
from files import Flags


def arguments():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--trl", help="python of an environment with TRL; without it only ours is measured")
    arg("--prompt", type=int, nargs=2, default=(100, 300), help="fewest and most tokens of a prompt")
    arg("--trace", type=int, nargs=2, default=(30, 150), help="fewest and most tokens of a trace")
    arg("--tokens", type=int, default=8192, help="tokens a step, roughly for ours")
    arg("--micro-tokens", type=int, default=4096, help="of which ours computes at once")
    arg("--peer-length", type=int, nargs="+", default=[512, 1024, 2048], help="TRL's packed rows to try")
    arg("--peer-attention", default="sdpa", help="on CUDA: flash_attention_2")
    arg("--layers", type=int, default=6, help="of the model")
    arg("--hidden", type=int, default=256, help="its width")
    arg("--vocab", type=int, help="its vocabulary; default: the toy's few hundred")
    arg("--dtype", default="float32", help="of the computation")
    arg("--threads", type=int, default=2, help="of all ranks together")
    arg("--ranks", type=int, nargs="+", default=[1, 2], help="how many, of ours and of TRL's")
    arg("--steps", type=int, default=6, help="steps of a turn")
    arg("--warmup", type=int, default=2, help="of which dropped")
    arg("--turns", type=int, default=3, help="turns of each")
    arg("--json", help="where the numbers go; default: runs/bench/sft_step.json")
    return ap.parse_args()


def ours(args, folder, rows, ranks):
    return check(common.run_ours(
        "sft.py", ranks, args.threads, model=folder / "model", data=folder / "traces.jsonl",
        max_len=args.prompt[1] + args.trace[1], batch=rows, micro_tokens=args.micro_tokens, lr=1e-6,
        dtype=args.dtype), args)


def peer(args, folder, ranks, length):
    told = {k: getattr(args, k) for k in ("dtype", "steps", "tokens")}
    return check(common.run_peer(
        args.trl, ranks, args.threads, kind="sft", model=str(folder / "model"),
        data=str(folder / "traces.jsonl"), length=length, attention=args.peer_attention, **told), args)


def check(rows, args):
    assert all(row["grad_norm"] > 0 for row in rows), rows
    return rows[args.warmup:] or rows[-1:]


def rate(steps):
    return sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)


def main():
    args = arguments()
    rows = round(args.tokens / (sum(args.prompt) / 2 + sum(args.trace) / 2))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = common.write_model(folder / "model", max(2048, *args.peer_length), args.layers,
                                       args.hidden, args.vocab)
        common.write_prompts(folder / "traces.jsonl", tokenizer, rows * args.steps,
                             lambda rng: rng.randint(*args.prompt), lambda rng: rng.randint(*args.trace))
        runs = {}
        for ranks in args.ranks:
            runs[f"ours, ranks: {ranks}"] = lambda ranks=ranks: ours(args, folder, rows, ranks)
            for n in args.peer_length if args.trl else ():
                runs[f"trl, ranks: {ranks}, rows of {n}"] = \
                    lambda ranks=ranks, n=n: peer(args, folder, ranks, n)
        turns = common.alternate(runs, args.turns)

    table = []
    for name, results in turns.items():
        steps = sum(results, [])
        table.append({"": name, "tokens/s": statistics.median(rate(t) for t in results),
                      "tokens/step": statistics.mean(s["tokens"] for s in steps),
                      "s/step": statistics.median(s["seconds"] for s in steps), "loss": steps[0]["loss"],
                      "peak GB": max(s["peak_gb"] for s in steps)})
    if not args.trl:
        table.append({"": "trl (not run)"})
    common.report("sft_step", args, table, common.against(turns, rate), args.trl)


if __name__ == "__main__":
    main()
