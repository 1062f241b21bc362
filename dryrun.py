"""
Everything but the run: `sft.py ... --dry-run` and `grpo.py ... --dry-run`, on any machine.

    python grpo.py --model Qwen/Qwen2.5-7B-Instruct --dry-run 8            # 8 ranks, cards of 80 GB
    launch/rm-r1.sh 32b grpo --dry-run                                     # as many ranks as it would start

Data are read and counted; then one update of the script's own code runs on fake tensors (shapes without
values) as rank 0 of a group of ranks that are not there, with the kernels of CUDA. So what is printed is not
a formula: every tensor that the step makes is counted while it lives. Only what a card holds beyond the
living tensors is reckoned: what its allocator keeps, as measured with that of CUDA over a device that
computes nothing.
"""
import os
import time
import weakref

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import policy as P
import ranks as R
from files import fail

GB = 2**30
# The allocator keeps the blocks of embedding and head, gathered and reduced on streams of their own: 3.8
# times their fp32 bytes (7B, 14B and 32B, to a tenth), 2.4 times with expandable segments. Beside it are the
# driver, NCCL and vLLM's graphs.
KEPT, BESIDE = {True: 2.5, False: 4.0}, 3 * GB


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that live, and their peak in each phase. FSDP frees and refills a
    storage by its size, which no operation tells: `resize_` is followed. What an operation would read off a
    fake tensor is 1."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.phase, self.peaks = {}, 0, "loading", {}

    def set(self, key, size):
        size = -(-size // 512) * 512
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)

    def drop(self, key):
        self.now -= self.sizes.pop(key, 0)

    def see(self, t):
        t = t._local_tensor if isinstance(t, DTensor) else t
        storage = t.untyped_storage()               # a fake tensor's is on meta, whatever its own device
        if t.device.type != "meta" and storage._cdata not in self.sizes:
            weakref.finalize(storage, self.drop, storage._cdata)
            self.set(storage._cdata, storage.nbytes())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, out)):
            if isinstance(t, torch.Tensor):
                self.see(t)
        return out

    def __enter__(self):
        resize = self.resize = torch.UntypedStorage.resize_

        def followed(storage, size):
            resize(storage, size)
            if storage._cdata in self.sizes:
                self.set(storage._cdata, size)
            return storage

        torch.UntypedStorage.resize_ = followed
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)


MEMORY = Memory()


def phase(name):
    """What is traced from here on is another phase of the step."""
    MEMORY.phase = name
    MEMORY.peaks[name] = MEMORY.now


def made_up(prompts, group, longest, tokens, world):
    """Groups that fill two micro-batches of every rank to the brim: prompts of the usual length, `group`
    answers each, none longer than `longest`. -> [(prompt ids, [answer ids, ...]), ...]"""
    prompt = int(np.median([len(p) for p in prompts]))
    answer = max(1, min(longest, (tokens - prompt) // group))
    each = max(1, tokens // (prompt + group * answer))
    return [([0] * prompt, [[0] * answer] * group) for _ in range(2 * each * world)]


def trace(args, config, shard, world, shown, rehearse):
    """-> bytes of a rank: what lives after loading (weights, reference, Adam), peaks by phase"""
    device, dtype, cuda, lives = torch.device("cpu"), P.DTYPES[args.dtype], R.CUDA, {}
    meshes = P.mesh_of(device, shard)

    def loaded(name):
        lives[name] = MEMORY.now - sum(lives.values())

    R.CUDA = True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), MEMORY:
            policy = P.sharded(config, meshes, device, dtype, recompute=args.recompute)
            loaded("weights")
            reference = P.sharded(config, meshes, device, dtype, trainable=False) \
                if getattr(args, "beta", 0) else None
            loaded("reference")
            optim = P.adamw(policy, 1e-6, (0.9, 0.95), 0.0)
            for p in policy.parameters():
                optim.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
            loaded("Adam")
            rehearse(policy, reference, optim, shown, args, world)
            phase("syncing")
            for _ in policy.weights(dtype):
                pass
    finally:
        R.CUDA = cuda
    return lives, MEMORY.peaks


def show(args, config, shard, steps, prompts, group, longest, rehearse):
    """Print what a run would do and what its cards would hold, and refuse what cannot fit by the flag to
    change.

    prompts  [prompt ids, ...] of the data; group: judgments (or traces) a prompt, of `longest` tokens at most
    rehearse (policy, reference, optim, groups, args, world): one update by the script's own code
    """
    world, grpo = dist.get_world_size(), hasattr(args, "engine_memory")
    lengths = np.sort([len(p) for p in prompts])
    print(f"prompts: half have up to {lengths[len(lengths) // 2]:,} tokens, 90 % up to "
          f"{lengths[len(lengths) * 9 // 10]:,}, the longest {lengths[-1]:,}")
    rows = args.pairs if grpo else args.batch
    what, does = (f"pairs x {group} judgments, {rows // args.mini} updates each", "writes") if grpo else \
        ("traces", "learns from")
    print(f"steps: {steps:,} of {rows:,} {what}; a step reads about {rows * int(lengths.mean()):,} tokens "
          f"and {does} up to {rows * group * longest:,}")
    lm = P.build(config, P.DTYPES[args.dtype], torch.device("cpu"))[0].lm
    n = sum(p.numel() for p in lm.parameters())
    print(f"model: {config.model_type}, {n / 1e9:.3g} billion parameters, {len(lm.model.layers)} blocks of "
          f"width {config.hidden_size:,}, {config.vocab_size:,} words")

    tokens = max(args.micro_tokens, min(P.window_of(config), int(lengths[-1]) + longest))
    start = time.monotonic()
    shown = made_up(prompts, group, longest, tokens, world)
    lives, peaks = trace(args, config, shard, world, shown, rehearse)
    print(f"traced on fake tensors in {time.monotonic() - start:.0f} s: rank 0 of {world}, shards of {shard}"
          f", {args.dtype}, micro-batches of {tokens:,} tokens")
    blocks = sum(p.numel() for p in lm.model.layers.parameters())
    judge(args, lives, peaks, (n, n - blocks), config, longest + int(lengths[-1]), shard)


def judge(args, lives, peaks, parameters, config, window, shard):
    """From living bytes to a card's, and what to change where they do not fit. parameters: of the model, and
    of what lies outside of its blocks."""
    each = P.DTYPES[args.dtype].itemsize
    weights = parameters[0] * each
    card = args.dry_run[1] * 1e9 if len(args.dry_run) > 1 else \
        torch.cuda.get_device_properties(0).total_memory if R.CUDA else 80e9
    grpo, away = hasattr(args, "engine_memory"), getattr(args, "offload", False)
    tight = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    idle = lives["weights"] + (0 if away else lives["reference"] + lives["Adam"])
    learning = peaks["learning"] - (lives["reference"] if away else 0)
    held = {"learning": (learning, learning + KEPT[tight] * 4 * parameters[1] + BESIDE)}
    if grpo:
        share = args.engine_memory * card
        # vLLM's weights wake before a sync, its cache after it.
        sampling = max(idle + peaks["syncing"] - sum(lives.values()) + weights / args.tp, idle + share)
        held["sampling"] = sampling, sampling + BESIDE
    print("a rank has " + ", ".join(f"{k} {v / GB:.1f} GB" for k, v in lives.items() if v))
    for name, (live, all_) in held.items():
        print(f"  {name:<9} {live / GB:6.1f} GB live, about {all_ / GB:.0f} GB of the card's {card / GB:.0f}")
    has = f"more than the card's {card / GB:.0f} GB"
    more = ("" if away or not grpo else ", give --offload") + f", or use more than {shard} ranks"
    if held["learning"][1] > card:
        fail(f"learning would take {has}: lower --micro-tokens {args.micro_tokens}"
             + ("" if args.recompute else ", leave out --no-recompute")
             + ("" if tight else ", set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True") + more)
    if grpo:
        keys = config.num_key_value_heads * P.head_width(config) * config.num_hidden_layers
        cache = window * 2 * each * keys
        needs = (weights + cache) / args.tp + 2 * GB
        if needs > share:
            fail(f"vLLM needs about {needs / GB:.0f} GB, more than --engine-memory {args.engine_memory:g} of "
                 f"the card: raise it, or spread an engine over more ranks than --tp {args.tp}")
        if held["sampling"][1] > card:
            fail(f"sampling would take {has}: lower --engine-memory {args.engine_memory:g}{more}")
    print(f"it fits, with {(card - max(x for _, x in held.values())) / GB:.0f} GB to spare")
