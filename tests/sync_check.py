"""Run by test_engine.py on one and on two ranks: engine and trainer must agree after every sync, and the
alarm must ring when a sync is incomplete. Prints one line of JSON from rank 0.

    torchrun --nproc_per_node 2 tests/sync_check.py FOLDER DTYPE TP

TP: ranks that are one engine together.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import packing
import policy as P
import ranks as R
from engine import Engine, seed_of

folder, dtype, tp = sys.argv[1], P.DTYPES[sys.argv[2]], int(sys.argv[3])
rank, world, device = R.start_ranks()
policy = P.load(folder, device, dtype)
tied = policy.lm.config.tie_word_embeddings
engine = Engine(folder, 400, sys.argv[2], weights="dummy", tp=tp)
g = torch.Generator().manual_seed(rank)
# Longer than two of the CPU cache's blocks of 128, so that a stale cached prompt would be used again.
prompts = [torch.randint(3, 300, (300,), generator=g).tolist() for _ in range(4)]


def gap():
    """(mean, max) difference of the log-probs of tokens sampled now, over all ranks."""
    samples = engine.generate([p for p in prompts for _ in range(2)], [7 * i for i in range(8)], 20)
    groups = [(p, [s.tokens for s in samples[2 * i:2 * i + 2]]) for i, p in enumerate(prompts)]
    with torch.no_grad():
        ours = torch.cat([policy(m) for m in packing.level(packing.pack(groups, 10**9, device), device)]).cpu()
    d = (ours - torch.tensor([x for s in samples for x in s.logprobs])).abs()
    total, n = R.all_sum([d.sum(), len(d)])
    return total / n, R.all_max([d.max()])[0]


def perturb(seed):
    """Another policy, and by as much everywhere: what an optimizer step does, only larger."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            full = torch.randn(p.shape, generator=noise) * policy.lm.config.initializer_range / 2
            p += P.distribute_tensor(full.to(p.device, p.dtype), p.device_mesh, p.placements,
                                     src_data_rank=None)


out = {"head": str(engine.llm.llm_engine.model_config.head_dtype)}
engine.sync(policy, dtype)
out["first"] = gap()
for n in range(3):
    engine.sleep()                                     # on a card: weights and cache leave it
    perturb(n)
    engine.sync(policy, dtype)
    out[f"after update {n}"] = gap()

# What the alarm is for: a tied model whose head is not sent under its own name; a cache that is not dropped.
perturb(10)
whole = policy.weights
policy.weights = lambda dtype=None: (x for x in whole(dtype) if x[0] != "lm_head.weight")
engine.sync(policy, dtype)
out["without lm_head"] = gap()
policy.weights = whole
perturb(11)
reset, engine.reset_cache = engine.reset_cache, lambda: None
engine.sync(policy, dtype)
out["without cache reset"] = gap()
engine.reset_cache = reset
engine.sync(policy, dtype)
out["repaired"] = gap()

# Weights that break off midway leave a layer with q and without k. A second sync repairs it; broken twice, it
# is an error, and nothing has been sampled.
def breaks(times):
    left = [times]

    def weights(dtype=None):
        for i, named in enumerate(whole(dtype)):
            if i == 5 and left[0]:
                left[0] -= 1
                raise OSError("the weights were cut off")
            yield named
    return weights


perturb(20)
policy.weights = breaks(1)
engine.sync(policy, dtype)
out["after a broken sync"] = gap()
policy.weights = breaks(2)
try:
    engine.sync(policy, dtype)
    out["broken twice"] = "accepted"
except RuntimeError as e:
    out["broken twice"] = str(e)
policy.weights = whole
engine.sync(policy, dtype)
out["after all"] = gap()

# One prompt, its samples spread over the ranks: no two texts are equal by accident.
seeds = [seed_of(1, place, 0) for place in range(rank, 8 * world, world)]
mine = engine.generate([[7] * 30] * 8, seeds, 20)
out["distinct over ranks"] = len({tuple(s.tokens) for part in R.all_gather(mine) for s in part}) / (8 * world)
# The ranks of one engine yield the same samples for the same requests.
asked = [([7] * 30, 5, 1.0), ([9] * 40, 6, 1.0)]
texts = R.all_gather([(at, s.tokens) for at, s in engine.stream(asked, 20)])
out["same in one engine"] = tp == 1 or texts[0] == texts[1]

# Seeds: equal requests with different seeds differ, and a text does not depend on what else is in the batch.
one = engine.generate([prompts[0]] * 8, list(range(8)), 20)
two = engine.generate([prompts[0]], [3], 20)
out["distinct"] = len({tuple(s.tokens) for s in one})
out["same alone"] = two[0].tokens == one[3].tokens
try:
    engine.generate([prompts[0], [5] * 400], [0, 1], 20)
    out["too long"] = "accepted"
except ValueError as e:
    out["too long"] = str(e)
engine.llm.reset_prefix_cache = lambda: False
try:
    engine.sync(policy, dtype)
    out["stuck cache"] = "accepted"
except RuntimeError as e:
    out["stuck cache"] = str(e)
if rank == 0:
    print(json.dumps(out))
R.run(R.barrier)
