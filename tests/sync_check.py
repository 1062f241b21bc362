"""Run by test_engine.py on one and on two ranks: engine and trainer must agree after every sync,
and the alarm must ring when a sync is incomplete. Prints one line of JSON from rank 0.

    torchrun --nproc_per_node 2 tests/sync_check.py FOLDER DTYPE TP [break]

TP: ranks that are one engine together. break: instead, the last rank's weights break off in the
middle of a sync, which must end the run before anything is sampled.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from lib import dist, packing
from lib import policy as P
from lib.engine import Engine
from lib.files import run_main, seed_of

PROMPT_TOKENS = (
    300  # more than two of the CPU cache's blocks: a stale cached prompt would be used again
)


class Setup:
    """An engine and a trainer's policy, on this rank."""

    def __init__(self, folder, dtype, tp):
        self.rank, self.world, self.device = dist.start_ranks()
        self.tp = tp
        self.dtype = P.DTYPES[dtype]
        self.policy = P.load_policy(folder, self.device, self.dtype)
        self.engine = Engine(folder, 400, dtype, weights="dummy", tp=tp)
        noise = torch.Generator().manual_seed(self.rank)
        self.prompts = [
            torch.randint(3, 300, (PROMPT_TOKENS,), generator=noise).tolist() for _ in range(4)
        ]

    def sync(self):
        self.engine.sync(self.policy, self.dtype)

    def mismatch(self):
        """(mean, max) difference of the log-probs of tokens sampled now, over all ranks."""
        twice = [prompt for prompt in self.prompts for _ in range(2)]
        samples = self.engine.generate(twice, [7 * i for i in range(8)], 20)
        groups = []
        for i, prompt in enumerate(self.prompts):
            groups.append((prompt, [s.tokens for s in samples[2 * i : 2 * i + 2]]))
        batches = packing.pack(groups, 10**9, self.device)
        batches = packing.equalise(batches, packing.dummy_batch(self.device))
        with torch.no_grad():
            trainer = torch.cat([self.policy(batch) for batch in batches]).cpu()
        sampler = torch.cat([torch.from_numpy(s.logprobs) for s in samples])
        difference = (trainer - sampler).abs()
        total, count = dist.all_sum([difference.sum(), len(difference)])
        return total / count, dist.all_max([difference.max()])[0]

    @torch.no_grad()
    def perturb(self, seed):
        """Another policy, and by as much everywhere: what an optimizer step does, only larger."""
        noise = torch.Generator().manual_seed(seed)
        std = self.policy.lm.config.initializer_range / 2
        for p in self.policy.parameters():
            p += P.shard_like(torch.randn(p.shape, generator=noise) * std, p)


def check_agreement(setup):
    """Mismatch after every sync, and after syncs that leave something out. -> {what: (mean,
    max)}"""
    out = {}
    engine, policy = setup.engine, setup.policy
    setup.sync()
    out["first"] = setup.mismatch()
    for n in range(3):
        engine.sleep()  # on a card: weights and cache leave it
        setup.perturb(n)
        setup.sync()
        out[f"after update {n}"] = setup.mismatch()

    # What the alarm is for: a tied model whose head is not sent under its own name, and a cache
    # that is not dropped.
    setup.perturb(10)
    whole = policy.weights
    policy.weights = lambda dtype=None: (x for x in whole(dtype) if x[0] != "lm_head.weight")
    setup.sync()
    out["without lm_head"] = setup.mismatch()
    policy.weights = whole

    setup.perturb(11)
    reset = engine.llm.reset_prefix_cache
    engine.llm.reset_prefix_cache = lambda: True
    setup.sync()
    out["without cache reset"] = setup.mismatch()
    engine.llm.reset_prefix_cache = reset
    setup.sync()
    out["repaired"] = setup.mismatch()
    return out


def check_samples(setup):
    """Samples are a function of prompt and seed. -> {what: result}"""
    out = {}
    engine, world = setup.engine, setup.world

    # One prompt, its samples spread over the ranks: no two texts are equal by accident.
    seeds = [seed_of(1, place, 0) for place in range(setup.rank, 8 * world, world)]
    by_rank = dist.all_gather(engine.generate([[7] * 30] * 8, seeds, 20))
    texts = {tuple(s.tokens) for samples in by_rank for s in samples}
    out["distinct over ranks"] = len(texts) / (8 * world)

    # The ranks of one engine yield the same samples for the same requests.
    requests = [([7] * 30, 5, 1.0), ([9] * 40, 6, 1.0)]
    mine = [(place, s.tokens.tolist()) for place, s in engine.stream(requests, 20)]
    by_rank = dist.all_gather(mine)
    out["same in one engine"] = setup.tp == 1 or by_rank[0] == by_rank[1]

    # Equal requests with different seeds differ, and a text does not depend on what else is in the
    # batch.
    eight = engine.generate([setup.prompts[0]] * 8, list(range(8)), 20)
    (alone,) = engine.generate([setup.prompts[0]], [3], 20)
    out["distinct"] = len({tuple(s.tokens) for s in eight})
    out["same alone"] = alone.tokens.tolist() == eight[3].tokens.tolist()

    try:
        engine.generate([setup.prompts[0], [5] * 400], [0, 1], 20)
        out["too long"] = "accepted"
    except ValueError as e:
        out["too long"] = str(e)
    return out


def check_stuck_cache(setup):
    setup.engine.llm.reset_prefix_cache = lambda: False
    try:
        setup.sync()
        return "accepted"
    except RuntimeError as e:
        return str(e)


def break_off(setup):
    """The weights of the last rank break off: its sync raises, and no rank comes to the line after
    it."""
    setup.sync()
    whole = setup.policy.weights

    def broken(dtype=None):
        for i, named in enumerate(whole(dtype)):
            if i == 5 and setup.rank == setup.world - 1:
                raise OSError("the weights were cut off")
            yield named

    setup.policy.weights = broken
    setup.sync()
    print("sampled", len(setup.engine.generate(setup.prompts, range(4), 5)), flush=True)


def main():
    folder, dtype, tp, *rest = sys.argv[1:]
    setup = Setup(folder, dtype, int(tp))
    if rest == ["break"]:
        break_off(setup)
        return
    out = {"head": str(setup.engine.llm.llm_engine.model_config.head_dtype)}
    out |= check_agreement(setup)
    out |= check_samples(setup)
    out["stuck cache"] = check_stuck_cache(setup)
    if setup.rank == 0:
        print(json.dumps(out))
    dist.barrier()


if __name__ == "__main__":
    run_main(main, dist.explain)
