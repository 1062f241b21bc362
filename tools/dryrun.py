"""
A dry run: everything but the run, on any machine, and what a card would hold.

    python tools/dryrun.py grpo.py --model Qwen/Qwen2.5-7B-Instruct --ranks 8       # 8 cards of 80 GB
    python tools/dryrun.py sft.py --ranks 16 --gb 141
    python tools/dryrun.py forks/gspo.py --ranks 8
    launch/rm-r1.sh 32b grpo --dry-run                       # as many ranks as it would start

The script's flags and data are read and checked. Then one update of its own code runs on fake tensors (shapes
without values), as rank 0 of a group of ranks that are not there, with the kernels of CUDA. So what is printed
is not a formula: every tensor that the step makes is counted while it lives. Only what a card holds beyond
the living tensors is estimated: what its allocator keeps, as calibrated with the real CUDA allocator on a
fake device.
"""

import argparse
import importlib.util
import os
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
import sft
from lib import dist as ranks
from lib import policy as network
from lib.chat import load_tokenizer
from lib.files import Failure, Flags, number, run_main
from lib.model_files import config_of, find_model, head_width, window_of
from rubrics import prompt_style

GB = 2**30
CPU = torch.device("cpu")

# What the allocator keeps: the blocks of embedding and head, gathered and reduced on streams of their own. In
# multiples of their fp32 bytes: 3.8 measured with 7B, 14B and 32B, 2.4 with expandable segments, rounded up.
KEPT, KEPT_EXPANDABLE = 4.0, 2.5
# The driver, NCCL and vLLM's graphs.
BESIDE = 3 * GB


def flags():
    parser = Flags(__doc__, allow_abbrev=False, epilog="All other flags go to the script.")
    arg = parser.add_argument
    arg("script", help="grpo.py, sft.py, or a fork of grpo.py")
    arg("--ranks", type=number(int, 1), default=1, help="ranks that the run would have")
    arg(
        "--gb",
        type=number(float, 0, above=True),
        help="memory of a card; default: of this one, else 80",
    )
    return parser


def main():
    own, script_flags = flags().parse_known_args()
    path = Path(own.script)
    if not path.is_file():
        raise Failure(f"{path}: no such script")
    sys.argv = [str(path), *script_flags]
    if path.name == "sft.py":
        return dry_run(sft, own.ranks, own.gb)
    if path.name == "grpo.py":
        return dry_run(grpo, own.ranks, own.gb)

    # A fork replaces functions of grpo.py inside its own main, and calls grpo.main: which is now this one.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    fork = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fork)
    if getattr(fork, "grpo", None) is not grpo:
        raise Failure(f"{path}: neither grpo.py, nor sft.py, nor a fork that imports grpo")
    grpo.main = lambda: dry_run(grpo, own.ranks, own.gb)
    fork.main()


def dry_run(script, world, card_gb):
    """Do everything that a script's run does before its first step, and trace one step."""
    args = script.arguments()
    folder = find_model(args.model, weights=False)
    tokenizer, _ = load_tokenizer(folder)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    config = config_of(folder)
    shard = ranks.shard_size(args.shard)
    style = prompt_style(folder, args.model, args.protocol, args.system_prompt, default="instruct")
    data = script.read_data(args, tokenizer, style, config, world)
    network.check_family(config, CPU)

    plan = grpo_plan(args, data) if script is grpo else sft_plan(args, data)
    parameters = print_plan(plan, config)
    tokens = max(args.micro_tokens, min(window_of(config), plan.longest))
    start = time.monotonic()
    groups = made_up_groups(plan, tokens, world)
    update = grpo_update if script is grpo else sft_update
    lives, peaks = trace(args, config, shard, world, groups, update)
    print(
        f"traced on fake tensors in {time.monotonic() - start:.0f} s: rank 0 of {world}, shards of {shard}, "
        f"{args.dtype}, micro-batches of {tokens:,} tokens"
    )
    check_fit(args, lives, peaks, parameters, config, plan.longest, shard, card_gb)


# ---------------------------------------------------------------- what a run does


@dataclass
class StepPlan:
    """What a run would do.

    prompts  lengths in tokens, sorted
    group    texts a prompt, of `answer` tokens at most
    longest  tokens of the longest prompt with its text
    """

    prompts: np.ndarray
    group: int
    answer: int
    steps: int
    rows: int
    what: str
    does: str
    longest: int


def grpo_plan(args, data):
    return StepPlan(
        prompts=np.sort([len(row.prompt) for row in data.rows]),
        group=args.group_size,
        answer=args.max_response,
        steps=data.steps,
        rows=args.batch,
        what=f"pairs x {args.group_size} judgments, {args.batch // args.mini_batch} updates each",
        does="writes",
        longest=max(len(row.prompt) for row in data.rows) + args.max_response,
    )


def sft_plan(args, data):
    return StepPlan(
        prompts=np.sort([len(row.prompt) for row in data.rows]),
        group=1,
        answer=max(len(row.trace) for row in data.rows),
        steps=data.steps,
        rows=args.batch,
        what="traces",
        does="learns from",
        longest=max(len(row.prompt) + len(row.trace) for row in data.rows),
    )


@dataclass
class Parameters:
    """Numbers of parameters: of the model, and of what lies outside of its blocks."""

    all: int
    outside: int


def print_plan(plan, config):
    """Print what a run would read and do. -> `Parameters` of the model"""
    lengths = plan.prompts
    print(
        f"prompts: half have up to {lengths[len(lengths) // 2]:,} tokens, 90 % up to "
        f"{lengths[len(lengths) * 9 // 10]:,}, the longest {lengths[-1]:,}"
    )
    print(
        f"steps: {plan.steps:,} of {plan.rows:,} {plan.what}; a step reads about "
        f"{plan.rows * int(lengths.mean()):,} tokens and {plan.does} up to "
        f"{plan.rows * plan.group * plan.answer:,}"
    )
    lm = network.build_policy(config, torch.float32, CPU)[0].lm
    count = sum(p.numel() for p in lm.parameters())
    in_blocks = sum(p.numel() for p in lm.model.layers.parameters())
    print(
        f"model: {config.model_type}, {count / 1e9:.3g} billion parameters, {len(lm.model.layers)} blocks of "
        f"width {config.hidden_size:,}, {config.vocab_size:,} words"
    )
    return Parameters(count, count - in_blocks)


def made_up_groups(plan, tokens, world):
    """Groups that fill two micro-batches of every rank: prompts of the usual length, and answers of one length.

    tokens  of a micro-batch
    -> [(prompt ids, [answer ids, ...]), ...]
    """
    prompt = int(np.median(plan.prompts))
    answer = max(1, min(plan.answer, (tokens - prompt) // plan.group))
    fit = max(1, tokens // (prompt + plan.group * answer))  # groups in a micro-batch
    zeros = lambda count: np.zeros(count, np.int32)
    return [(zeros(prompt), [zeros(answer)] * plan.group) for _ in range(2 * fit * world)]


# ---------------------------------------------------------------- memory that lives


class Memory(TorchDispatchMode):
    """Counts the bytes of all living storages, and their peak in each phase.

    FSDP frees and refills a storage by its size, which no operation tells, so `resize_` is replaced by one
    that counts. A number that an operation would read off a fake tensor is 1.
    """

    def __init__(self):
        super().__init__()
        self.sizes = {}  # bytes by storage
        self.now = 0  # bytes that live
        self.phase = "loading"
        self.peaks = {}  # bytes by phase

    def set(self, key, size):
        size = -(-size // 512) * 512
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)

    def begin(self, phase):
        """What is traced from here on is another phase of the step."""
        self.phase = phase
        self.peaks[phase] = self.now

    def drop(self, key):
        self.now -= self.sizes.pop(key, 0)

    def see(self, t):
        t = t._local_tensor if isinstance(t, DTensor) else t
        storage = t.untyped_storage()  # a fake tensor's is on meta, whatever its own device
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


def trace(args, config, shard, world, groups, update):
    """Run one update on fake tensors.

    update  of a script, see `grpo_update`
    -> bytes of a rank: what lives after loading ("weights", "reference", "Adam"), peaks by phase
    """
    dtype = network.DTYPES[args.dtype]
    mesh = network.mesh_of(CPU, shard)
    memory, lives = Memory(), {}

    def loaded(name):
        lives[name] = memory.now - sum(lives.values())

    had_cuda, ranks.CUDA = ranks.CUDA, True  # the kernels of a card are called
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), memory:
            policy = network.build_sharded(config, mesh, CPU, dtype, recompute=args.recompute)
            loaded("weights")
            reference = None
            if getattr(args, "beta", 0):
                reference = network.build_sharded(config, mesh, CPU, dtype, trainable=False)
            loaded("reference")
            optim = network.adamw(policy, 1e-6, (0.9, 0.95), 0.0)
            for p in policy.parameters():
                optim.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
            loaded("Adam")
            update(policy, reference, optim, groups, args, world, memory)
            memory.begin("syncing")
            for _ in policy.weights(dtype):
                pass
    finally:
        ranks.CUDA = had_cuda
    return lives, memory.peaks


def grpo_update(policy, reference, optim, groups, args, world, memory):
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
    memory.begin("scoring")
    ref_logp = grpo.token_logprobs(reference, update)
    old_logp = grpo.token_logprobs(policy, update)
    memory.begin("learning")
    grpo.accumulate_gradients(policy, update, old_logp, ref_logp, args, world)
    network.optimizer_step(policy, optim, args.lr, clip=1.0)


def sft_update(policy, _, optim, groups, args, world, memory):
    """One step of sft.py on made-up traces."""
    rows = [sft.Row(prompt, trace) for prompt, (trace,) in groups]
    memory.begin("learning")
    batches = sft.split_into_batches(rows, args, CPU, 0, world, policy.lm.config.hidden_size)
    sft.accumulate_gradients(policy, batches, 1, world)
    network.optimizer_step(policy, optim, args.lr, args.grad_clip)


# ---------------------------------------------------------------- memory of a card


def check_fit(args, lives, peaks, parameters, config, longest, shard, card_gb=None):
    """From living bytes to a card's; a `Failure` names the flag to change where they do not fit.

    longest  tokens of a prompt with its answer; shard: ranks that hold one copy of the weights
    """
    card = card_bytes(card_gb)
    is_grpo = hasattr(args, "engine_memory")
    learning, kept = learning_memory(args, lives, peaks, parameters)
    held = {"learning": (learning, learning + kept + BESIDE)}
    if is_grpo:
        sampling = sampling_memory(args, lives, peaks, parameters, card)
        held["sampling"] = (sampling, sampling + BESIDE)

    print("a rank has " + ", ".join(f"{k} {v / GB:.1f} GB" for k, v in lives.items() if v))
    for name, (live, total) in held.items():
        print(
            f"  {name:<9} {live / GB:6.1f} GB live, about {total / GB:.0f} GB of the card's {card / GB:.0f}"
        )
    has = f"more than the card's {card / GB:.0f} GB"
    offload = ", give --offload" if is_grpo and not args.offload else ""
    more = f"{offload}, or use more than {shard} ranks"
    if held["learning"][1] > card:
        raise Failure(
            f"learning would take {has}: lower --micro-tokens {args.micro_tokens}"
            + ("" if args.recompute else ", leave out --no-recompute")
            + ("" if expandable() else ", set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
            + more
        )
    if is_grpo:
        needs, share = engine_memory(args, parameters, config, longest), args.engine_memory * card
        if needs > share:
            raise Failure(
                f"vLLM needs about {needs / GB:.0f} GB, more than --engine-memory {args.engine_memory:g} of "
                f"the card: raise it, or spread an engine over more ranks than --tp {args.tp}"
            )
        if held["sampling"][1] > card:
            raise Failure(
                f"sampling would take {has}: lower --engine-memory {args.engine_memory:g}{more}"
            )
    print(f"it fits, with {(card - max(total for _, total in held.values())) / GB:.0f} GB to spare")


def card_bytes(gb):
    if gb:
        return gb * 1e9
    return torch.cuda.get_device_properties(0).total_memory if ranks.CUDA else 80e9


def expandable():
    return "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")


def learning_memory(args, lives, peaks, parameters):
    """-> bytes that live at the peak of an update, bytes that the allocator keeps beside them"""
    offload = getattr(args, "offload", False)
    live = peaks["learning"] - (lives["reference"] if offload else 0)
    return live, (KEPT_EXPANDABLE if expandable() else KEPT) * 4 * parameters.outside


def sampling_memory(args, lives, peaks, parameters, card):
    """Bytes of a card while vLLM samples, or gets its weights. Its weights wake before a sync, its cache after."""
    idle = lives["weights"] + (0 if args.offload else lives["reference"] + lives["Adam"])
    gathered = peaks["syncing"] - sum(lives.values())
    weights = parameters.all * network.DTYPES[args.dtype].itemsize / args.tp
    return max(idle + gathered + weights, idle + args.engine_memory * card)


def engine_memory(args, parameters, config, longest):
    """Bytes that vLLM needs at least on a card: its part of the weights, the cache of one text, and 2 GB."""
    each = network.DTYPES[args.dtype].itemsize
    keys = config.num_key_value_heads * head_width(config) * config.num_hidden_layers
    cache = longest * 2 * each * keys  # keys and values
    return (parameters.all * each + cache) / args.tp + 2 * GB


if __name__ == "__main__":
    run_main(main)
