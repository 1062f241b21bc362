"""
What does it cost to give the engine the trainer's weights, by size of the model?

    OMP_NUM_THREADS=2 python bench/sync.py

A random Qwen2 of each size, fp32 weights in the trainer, as in training, and an engine in --dtype. Extra
memory is the peak during a sync beyond what trainer and engine hold. Its share of a GRPO step is the column
`sync` of grpo_step.py. Each size is a fresh process.
"""
import json
import statistics
import sys
import tempfile

import common
from common import ROOT

import policy as P
import ranks as R
from files import Flags
from engine import Engine

# layers, width, vocabulary: with tied embeddings about 5, 100, 500 and 1,500 million parameters
SIZES = {"5M": (6, 256, None), "100M": (12, 512, 152064), "500M": (24, 1024, 152064),
         "1.5B": (28, 1920, 152064)}


def case(size, dtype, repeats):
    layers, hidden, vocab = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        common.write_model(folder, 512, layers, hidden, vocab, weights=False)
        *_, device = R.start_ranks()
        policy = P.load(f"{folder}/config.json", device, P.DTYPES["float32"])
        engine = Engine(folder, 512, dtype, weights="dummy", memory=0.5)
    engine.sync(policy, P.DTYPES[dtype])                   # the first one also allocates
    engine.sleep()
    seconds, memory = [], common.Memory().start()
    for _ in range(repeats):
        start = common.clock()
        engine.sync(policy, P.DTYPES[dtype])
        seconds.append(common.clock() - start)
        engine.sleep()
    extra = memory.peak()
    n = sum(p.numel() for p in policy.parameters())
    gb = n * P.DTYPES[dtype].itemsize / 2**30
    return {"": size, "parameters (M)": n / 1e6, "s": statistics.median(seconds), "fastest": min(seconds),
            "slowest": max(seconds), "GB": gb, "GB/s": gb / statistics.median(seconds), "extra GB": extra}


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--sizes", nargs="+", choices=SIZES, default=["5M", "100M", "500M"], help="1.5B wants 16 GB")
    arg("--dtype", choices=P.DTYPES, default="bfloat16", help="of the engine, and of what travels")
    arg("--repeats", type=int, default=7, help="syncs of each size, after one that warms up")
    arg("--threads", type=int, default=2, help="of a process")
    arg("--case", help="for its own use: one size")
    arg("--json", help="where the numbers go; default: runs/bench/sync.json")
    args = ap.parse_args()
    if args.case:
        return print(json.dumps(case(args.case, args.dtype, args.repeats)))
    rows = []
    for size in args.sizes:
        print(size, file=sys.stderr)
        told = ["--case", size, "--dtype", args.dtype, "--repeats", args.repeats]
        out = common.run(sys.executable, 1, args.threads, ROOT / "bench/sync.py", *told)
        rows.append(json.loads(next(line for line in out.splitlines()[::-1] if line.startswith("{"))))
    common.report("sync", args, rows)


if __name__ == "__main__":
    main()
