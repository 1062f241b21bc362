"""
What do the log-probs over a large vocabulary cost, in chunks (Policy.forward) and the plain way?

    OMP_NUM_THREADS=2 python bench/logprobs.py
    OMP_NUM_THREADS=2 python bench/logprobs.py --hidden 3584 --dtype bfloat16 --vocab 152064 \\
        --tokens 512 1024 16384 --plain-gb 12                       # the width of a 7B model

Forward and backward through the head only: hidden states in, gradients of hidden states and head out. Extra
memory is the peak beyond what was held before (hidden states and head), less the two gradients, which every
way has to give. The plain way makes one tensor of all logits, its fp32 log-softmax, and gathers; where it
would not fit it is not run, and its memory is the largest measured one times the tokens, marked by ~.
Each case is a fresh process.
"""
import json
import sys
from types import SimpleNamespace

import common
from common import ROOT

import torch

import policy as P
from files import Flags


def case(way, tokens, vocab, hidden, dtype):
    """-> {"s": seconds, "gb": extra memory, "logp": mean log-prob}"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = lambda *shape: torch.randn(*shape, device=device, dtype=P.DTYPES[dtype]).requires_grad_()
    torch.manual_seed(0)
    states, head = make(tokens, hidden), make(vocab, hidden)
    with torch.no_grad():
        head.mul_(hidden ** -0.5)
    targets = torch.randint(vocab, (tokens,), device=device)
    # Policy.forward as it is, with a body that has its answer ready.
    lm = SimpleNamespace(model=lambda **kw: SimpleNamespace(last_hidden_state=states[None]),
                         lm_head=SimpleNamespace(weight=head))
    batch = SimpleNamespace(tokens=targets, positions=targets, plan=None, targets=targets,
                            src=torch.arange(tokens, device=device))

    def plain():
        return (states @ head.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    memory = common.Memory().start()
    start = common.clock()
    logp = plain() if way == "plain" else P.Policy.forward(SimpleNamespace(lm=lm), batch)
    logp.sum().backward()
    seconds = common.clock() - start
    gradients = (states.nbytes + head.nbytes) / 2**30
    return {"s": seconds, "gb": memory.peak() - gradients, "logp": logp.mean().item()}


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 16384], help="response tokens")
    arg("--vocab", type=int, nargs="+", default=[32000, 152064], help="words")
    arg("--hidden", type=int, default=256, help="width of the hidden states")
    arg("--dtype", choices=P.DTYPES, default="float32", help="of hidden states and head")
    arg("--plain-gb", type=float, default=14, help="memory that the plain way may take")
    arg("--threads", type=int, default=2, help="of a process")
    arg("--case", help="for its own use: one case, as JSON")
    arg("--json", help="where the numbers go; default: runs/bench/logprobs-HIDDEN.json")
    args = ap.parse_args()
    if args.case:
        return print(json.dumps(case(**json.loads(args.case))))
    args.json = args.json or f"runs/bench/logprobs-{args.hidden}.json"

    def measure(way, tokens, vocab):
        told = {"way": way, "tokens": tokens, "vocab": vocab, "hidden": args.hidden, "dtype": args.dtype}
        print(f"{way}: {tokens} tokens, {vocab} words", file=sys.stderr)
        return json.loads(common.run(sys.executable, 1, args.threads, ROOT / "bench/logprobs.py", "--case",
                                     json.dumps(told)).splitlines()[-1])

    rows = []
    for vocab in args.vocab:
        last = None
        for tokens in args.tokens:
            ours = measure("chunked", tokens, vocab)
            row = {"words": str(vocab), "tokens": str(tokens), "chunked s": ours["s"],
                   "chunked GB": ours["gb"]}
            if tokens * vocab * 4 * 4 / 2**30 < args.plain_gb:       # logits, log-softmax, their gradients
                plain = last = measure("plain", tokens, vocab) | {"tokens": tokens}
                assert abs(plain["logp"] - ours["logp"]) < 0.02, "the two ways disagree"
                row |= {"plain s": plain["s"], "plain GB": plain["gb"], "time": ours["s"] / plain["s"],
                        "memory": ours["gb"] / plain["gb"]}
            elif last:
                gb = last["gb"] * tokens / last["tokens"]
                row |= {"plain GB": f"~{gb:.3g}", "memory": f"~{ours['gb'] / gb:.3g}"}
            rows.append(row)
    common.report("logprobs", args, rows, ["~: not measured, in proportion to the tokens",
                                           "time, memory: chunked / plain"])


if __name__ == "__main__":
    main()
