"""
How much host memory does loading take, over all ranks, against the size of the model?

    torchrun --nproc_per_node 2 bench/loading.py

A random Qwen2 (--size, bf16, saved to disk first) is read into fp32 shards by every rank. What the ranks hold
together when it is done, and the most they ever held, beyond what they held before, over the size of the fp32
weights. Pages of the file are counted apart: the kernel takes them back when it needs them.
"""
import gc
import shutil
import tempfile
import threading
from pathlib import Path

import common

import torch

import policy as P
from files import Flags
import ranks as R

SIZES = {"5M": (6, 256), "100M": (24, 512), "500M": (24, 1152)}


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--size", choices=SIZES, default="500M", help="parameters, roughly")
    arg("--json", help="where the numbers go; default: runs/bench/loading.json")
    args = ap.parse_args()
    rank, world, device = R.start_ranks()
    folder = Path(tempfile.gettempdir()) / f"loading-{args.size}"
    if rank == 0:
        tokenizer = common.write_model(folder / "made", 512, *SIZES[args.size], vocab=32000, weights=False)
        tokenizer.save_pretrained(folder / "made")
    R.barrier()
    made = P.load(folder / "made/config.json", device, torch.bfloat16, trainable=False)
    P.save_model(made, folder / "made", folder / "model", torch.bfloat16)
    del made
    gc.collect()                                      # modules refer to themselves
    memory, most, done = common.Memory().start(), [0], threading.Event()
    before = memory.status("RssAnon")

    def look():                                       # the kernel keeps no mark of this one
        while not done.wait(0.002):
            most[0] = max(most[0], memory.status("RssAnon") - before)

    threading.Thread(target=look, daemon=True).start()
    start = common.clock()
    policy = P.load(folder / "model", device, torch.float32)
    seconds, peak, held = common.clock() - start, memory.peak(), memory.now()
    done.set()
    size = 4 * sum(p.numel() for p in policy.parameters()) / 2**30
    peak, held, own = R.all_sum([peak, held, most[0] / 2**30])
    if rank == 0:
        shutil.rmtree(folder)
        common.report("loading", args, [{"": args.size, "ranks": str(world), "fp32 GB": size, "s": seconds,
                                         "held / size": held / size, "peak / size": own / size,
                                         "with pages of the file": peak / size}])
    R.barrier()


if __name__ == "__main__":
    R.run(main)
