"""
One update of a training script on fake tensors: the bytes that live and the operations that are computed.

Fake tensors have shapes and no values. The script's own code runs on them, as rank 0 of a group of ranks that
are not there, with the kernels of CUDA. So nothing here is a formula for a network: every tensor that the
update makes is counted while it lives, and every matrix product when it is called.

Letters: T packed tokens of a micro-batch, H heads, D head size.
"""

import argparse
import weakref
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import grpo
import sft
from lib import dist as ranks
from lib import packing
from lib import policy as network

CPU = torch.device("cpu")
# Products of the layers and of the head. Attention is counted by hand, in `attention_counted`.
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def made_up_groups(prompt, answer, group, tokens, world, micro_batches=2):
    """Groups that fill so many micro-batches of every rank; all have the same lengths.

    prompt, answer  lengths in tokens; group: answers a prompt
    tokens          of a micro-batch
    -> [(prompt ids, [answer ids, ...]), ...]
    """
    fit = max(1, tokens // (prompt + group * answer))  # groups in a micro-batch
    zeros = lambda count: np.zeros(count, np.int32)
    return [(zeros(prompt), [zeros(answer)] * group) for _ in range(micro_batches * fit * world)]


@dataclass
class Traced:
    """What one update of a rank holds and computes.

    lives       bytes that stay after loading: "weights", "reference", "Adam"
    frozen      bytes of the weights that adapters leave as they are (--lora); among "weights"
    peaks       most bytes that live in each phase
    operations  of matrix products and attention in each phase; a product and its addition are two
    """

    lives: dict = field(default_factory=dict)
    frozen: int = 0
    peaks: dict = field(default_factory=dict)
    operations: dict = field(default_factory=dict)


class Tracer(TorchDispatchMode):
    """Counts the bytes of all living storages, and the operations of all products, by phase.

    FSDP frees and refills a storage by its size, which no operation tells, so `resize_` is replaced by one
    that counts. A number that an operation would read off a fake tensor is 1.
    """

    def __init__(self):
        super().__init__()
        self.traced = Traced()
        self.sizes = {}  # bytes by storage
        self.now = 0  # bytes that live
        self.begin("loading")

    def begin(self, phase):
        """What is traced from here on is another phase of the step."""
        self.phase = phase
        self.traced.peaks[phase] = self.now
        self.traced.operations[phase] = 0

    def loaded(self, name):
        """What lives by now, and did not before, is `name`."""
        self.traced.lives[name] = self.now - sum(self.traced.lives.values())

    def set(self, key, size):
        size = -(-size // 512) * 512
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        peaks = self.traced.peaks
        peaks[self.phase] = max(peaks[self.phase], self.now)

    def drop(self, key):
        self.now -= self.sizes.pop(key, 0)

    def compute(self, operations):
        self.traced.operations[self.phase] += operations

    def see(self, t):
        t = t._local_tensor if isinstance(t, DTensor) else t
        storage = t.untyped_storage()  # a fake tensor's is on meta, whatever its own device
        if t.device.type != "meta" and storage._cdata not in self.sizes:
            weakref.finalize(storage, self.drop, storage._cdata)
            self.set(storage._cdata, storage.nbytes())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0
        out = func(*args, **kwargs)
        for t in tree_leaves((args, out)):
            if isinstance(t, torch.Tensor):
                self.see(t)
        if func.overloadpacket in PRODUCTS:
            self.compute(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
        return out

    def __enter__(self):
        resize = self.resize = torch.UntypedStorage.resize_
        self.varlen, self.bucketed = packing.varlen, packing.bucketed

        def followed(storage, size):
            resize(storage, size)
            if storage._cdata in self.sizes:
                self.set(storage._cdata, size)
            return storage

        torch.UntypedStorage.resize_ = followed
        packing.varlen = attention_counted(self, self.varlen)
        packing.bucketed = attention_counted(self, self.bucketed)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        packing.varlen, packing.bucketed = self.varlen, self.bucketed
        return super().__exit__(*error)


def attention_counted(tracer, attend):
    """Attention that tells the tracer its operations.

    torch's counter does not know kernels for rows of different lengths, and where it knows one it counts the
    pairs of tokens that a causal mask hides, which these kernels leave out. Forward: two products a pair.
    Backward: five, since the kernel computes the scores again (FlashAttention-2, arXiv 2307.08691).
    """

    def counted(q, k, v, plan, scaling, window):
        out = attend(q, k, v, plan, scaling, window)  # (T, H, D)
        heads, head_size = q.shape[1:]
        product = 2 * heads * head_size * visible_pairs(plan, window)  # operations
        tracer.compute(2 * product)
        if out.requires_grad:
            out.register_hook(lambda grad: tracer.compute(5 * product))
        return out

    return counted


def visible_pairs(plan, window):
    """Number of pairs of a query and a key that it sees.

    The last query of a span sees all of its keys, the one before it all but the last, and so on; with a
    window, no more than its length.
    """
    pairs = 0
    for span in plan.spans:
        seen = np.arange(len(span.keys) - span.count, len(span.keys)) + 1  # (queries,)
        pairs += int(np.minimum(seen, window or len(span.keys)).sum())
    return pairs


def trace(args, config, shard, world, groups, update):
    """Run one update on fake tensors. -> `Traced`

    groups  see `made_up_groups`
    update  of a script, see `grpo_update`
    """
    dtype = network.DTYPES[args.dtype]
    mesh = network.mesh_of(CPU, shard)
    tracer = Tracer()
    had_cuda, ranks.CUDA = ranks.CUDA, True  # the kernels of a card are called
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), tracer:
            build = partial(network.build_sharded, config, mesh, CPU, dtype)
            policy = build(recompute=args.recompute, lora=args.lora)
            tracer.loaded("weights")
            tracer.traced.frozen = sum(ranks.local_shard(p).nbytes for p in policy.frozen())
            reference = grpo.load_reference(policy, build, args) if hasattr(args, "beta") else None
            tracer.loaded("reference")
            optim = network.adamw(policy, 1e-6, (0.9, 0.95), 0.0)
            for p in optim.param_groups[0]["params"]:
                optim.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
            tracer.loaded("Adam")
            update(policy, reference, optim, groups, args, world, tracer)
            tracer.begin("syncing")
            for _ in policy.weights(dtype):
                pass
    finally:
        ranks.CUDA = had_cuda
    return tracer.traced


def grpo_update(policy, reference, optim, groups, args, world, tracer):
    """One update of grpo.py on made-up judgments. groups: see `made_up_groups`"""
    size = {"batch": len(groups), "mini_batch": len(groups)}
    args = argparse.Namespace(**vars(args) | size)
    rollouts = []
    for prompt, answers in groups:
        row = grpo.Row(None, prompt)
        rollouts.append(
            [
                grpo.Rollout(row, answer, np.zeros(len(answer), np.float32), True, None, 0.0)
                for answer in answers
            ]
        )
    advantage = torch.ones(len(groups), len(groups[0][1]))
    (update,) = grpo.split_into_updates(
        rollouts, advantage, args, CPU, 0, world, policy.lm.config.hidden_size
    )
    tracer.begin("reference")
    ref_logp = grpo.token_logprobs(reference, update)
    tracer.begin("scoring")
    old_logp = grpo.token_logprobs(policy, update)
    tracer.begin("learning")
    grpo.accumulate_gradients(policy, update, old_logp, ref_logp, args, world)
    network.optimizer_step(policy, optim, args.lr, clip=1.0)


def sft_update(policy, _, optim, groups, args, world, tracer):
    """One step of sft.py on made-up traces."""
    rows = [sft.Row(prompt, answer) for prompt, (answer,) in groups]
    tracer.begin("learning")
    batches = sft.split_into_batches(rows, args, CPU, 0, world, policy.lm.config.hidden_size)
    sft.accumulate_gradients(policy, batches, 1, world)
    network.optimizer_step(policy, optim, args.lr, args.grad_clip)
