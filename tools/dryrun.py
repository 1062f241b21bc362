"""
A dry run: everything but the run, on any machine, what a card would hold, and what the run would cost.

    python tools/dryrun.py grpo.py --model Qwen/Qwen2.5-7B-Instruct --ranks 8       # 8 cards of 80 GB
    python tools/dryrun.py sft.py --ranks 16 --gb 141
    python tools/dryrun.py grpo.py --ranks 8 --card H100 --dollars-an-hour 2.5
    python tools/dryrun.py forks/gspo.py --ranks 8
    launch/rm-r1.sh 32b grpo --dry-run                       # as many ranks as it would start

The script's flags and data are read and checked. Then one update of its own code runs on fake tensors
(tools/trace.py). So what is printed is not a formula: every tensor that the step makes is counted while it
lives. Only what a card holds beyond the living tensors is estimated: what its allocator keeps, as calibrated
with the real CUDA allocator on a fake device. With --card the update's operations are counted, too, and
tools/cost.py estimates seconds, hours and a price from them.
"""

import importlib.util
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
import sft
from lib import dist as ranks
from lib import policy as network
from lib.chat import load_tokenizer
from lib.engine import AT_ONCE, AT_ONCE_ON_CPU
from lib.files import Failure, Flags, number, run_main
from lib.model_files import config_of, find_model, head_width, window_of
from rubrics import prompt_style
from tools.cost import CARDS, THIS, Sampling, Work, card_named, step_seconds
from tools.trace import CPU, grpo_update, made_up_groups, sft_update, trace

# Memory is counted in GiB. GB, which are 1e9 bytes, are in the names of cards and in rates alone.
GIB = 2**30

# What the allocator keeps: the blocks of embedding and head, gathered and reduced on streams of their own. In
# multiples of their fp32 bytes: 3.8 measured with 7B, 14B and 32B, 2.4 with expandable segments, rounded up.
KEPT, KEPT_EXPANDABLE = 4.0, 2.5
# The same under adapters, as a share of what comes and goes while they learn: .22 to .28 measured (1.5B to 14B
# whole, 32B on two ranks); with expandable segments .23 in shards, and .09 where a rank holds the whole base.
KEPT_ADAPTERS, KEPT_ADAPTERS_EXPANDABLE = 0.3, 0.25
# The driver, NCCL and vLLM's graphs.
BESIDE = 3 * GIB
# What vLLM needs on a card beside its weights and its cache.
ENGINE_OWN = 2 * GIB


def flags():
    parser = Flags(__doc__, allow_abbrev=False, epilog="All other flags go to the script.")
    arg = parser.add_argument
    arg("script", help="grpo.py, sft.py, or a fork of grpo.py")
    arg("--ranks", type=number(int, 1), default=1, help="ranks that the run would have")
    arg(
        "--gb",
        type=number(float, 0, above=True),
        help="memory of a card as its maker says it; default: of --card, of this one, else 80",
    )
    arg("--card", help=f"estimate time and price on {', '.join(CARDS)}, or {THIS} (measured)")
    arg(
        "--response",
        type=number(int, 1),
        default=800,
        help="mean tokens of a judgment, for the estimate (the published 14B run's: paper, figure 5)",
    )
    arg(
        "--dollars-an-hour",
        type=number(float, 0),
        help="price of a card, for the estimate",
    )
    return parser


def main():
    own, script_flags = flags().parse_known_args()
    path = Path(own.script)
    if not path.is_file():
        raise Failure(f"{path}: no such script")
    sys.argv = [str(path), *script_flags]
    if path.name == "sft.py":
        return dry_run(sft, own)
    if path.name == "grpo.py":
        return dry_run(grpo, own)

    # A fork replaces functions of grpo.py inside its own main, and calls grpo.main: which is now this one.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    fork = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fork)
    if getattr(fork, "grpo", None) is not grpo:
        raise Failure(f"{path}: neither grpo.py, nor sft.py, nor a fork that imports grpo")
    grpo.main = lambda: dry_run(grpo, own)
    fork.main()


def dry_run(script, own):
    """Do everything that a script's run does before its first step, and trace one step.

    own  the flags of the dry run itself
    """
    args = script.arguments()
    card = card_named(own.card, network.DTYPES[args.dtype]) if own.card else None
    folder = find_model(args.model, weights=False)
    tokenizer, _ = load_tokenizer(folder)
    world = own.ranks
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    config = config_of(folder)
    shard = ranks.shard_size(args.shard)
    style = prompt_style(folder, args.model, args.protocol, args.system_prompt, default="instruct")
    data = script.read_data(args, tokenizer, style, config, world)
    network.check_family(config, CPU)

    plan = grpo_plan(args, data, own.response) if script is grpo else sft_plan(args, data)
    parameters = print_plan(plan, config)
    tokens = max(args.micro_tokens, min(window_of(config), plan.longest))
    start = time.monotonic()
    update = grpo_update if script is grpo else sft_update
    run = partial(trace, args, config, shard, world, update=update)
    traced = run(groups=largest_groups(plan, tokens, world))
    print(
        f"traced on fake tensors in {time.monotonic() - start:.0f} s: rank 0 of {world}, shards of {shard}, "
        f"{args.dtype}, micro-batches of {tokens:,} tokens"
    )
    gb = own.gb or (card and card.gb)
    check_fit(args, traced, parameters, config, plan.longest, shard, gb)
    if card:
        print_cost(args, own, card, plan, config, parameters, traced, run, tokens)


# ---------------------------------------------------------------- what a run does


@dataclass
class StepPlan:
    """What a run would do.

    prompts  lengths in tokens, sorted
    group    texts a prompt, of `answer` tokens at most, and of `mean_answer` on average
    rows     prompts of a step, for so many updates
    longest  tokens of the longest prompt with its text
    """

    prompts: np.ndarray
    group: int
    answer: int
    mean_answer: int
    steps: int
    rows: int
    updates: int
    what: str
    does: str
    longest: int


def grpo_plan(args, data, response):
    return StepPlan(
        prompts=np.sort([len(row.prompt) for row in data.rows]),
        group=args.group_size,
        answer=args.max_response,
        mean_answer=min(response, args.max_response),
        steps=data.steps,
        rows=args.batch,
        updates=args.batch // args.mini_batch,
        what=f"pairs x {args.group_size} judgments, {args.batch // args.mini_batch} updates each",
        does="writes",
        longest=max(len(row.prompt) for row in data.rows) + args.max_response,
    )


def sft_plan(args, data):
    traces = [len(row.trace) for row in data.rows]
    return StepPlan(
        prompts=np.sort([len(row.prompt) for row in data.rows]),
        group=1,
        answer=max(traces),
        mean_answer=sum(traces) // len(traces),
        steps=data.steps,
        rows=args.batch,
        updates=1,
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


def largest_groups(plan, tokens, world):
    """Groups that fill micro-batches to the brim: prompts of the usual length, and long answers."""
    prompt = int(np.median(plan.prompts))
    answer = max(1, min(plan.answer, (tokens - prompt) // plan.group))
    return made_up_groups(prompt, answer, plan.group, tokens, world)


# ---------------------------------------------------------------- memory of a card


def check_fit(args, traced, parameters, config, longest, shard, card_gb=None):
    """From living bytes to a card's; a `Failure` names the flag to change where they do not fit.

    longest  tokens of a prompt with its answer; shard: ranks that hold one copy of the weights
    """
    card = card_bytes(card_gb)
    is_grpo = hasattr(args, "engine_memory")
    learning, kept = learning_memory(args, traced, parameters)
    held = {"learning": (learning, learning + kept + BESIDE)}
    if is_grpo:
        sampling = sampling_memory(args, traced, parameters, card)
        held["sampling"] = (sampling, sampling + BESIDE)

    print("a rank has " + ", ".join(f"{k} {gib(v)}" for k, v in traced.lives.items() if v))
    if getattr(args, "offload", False):
        print(f"what it keeps in host memory (--offload) takes up to {gib(host_memory(traced))}")
    for name, (live, total) in held.items():
        print(
            f"  {name:<9} {live / GIB:6.1f} GiB live, about {total / GIB:.0f} of the card's {card / GIB:.1f}"
        )
    has = f"more than the card's {gib(card)}"
    offload = ", give --offload" if is_grpo and not args.offload else ""
    ranks_more = f", or use more than {shard} ranks"
    if held["learning"][1] > card:
        raise Failure(
            f"learning would take {has}: {lower_the_tokens(args, longest)}"
            + ("" if args.recompute else ", leave out --no-recompute")
            + ("" if expandable() else ", set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
            + ("" if args.lora else f"{offload}, train adapters (--lora 32)")
            + ranks_more
        )
    if not is_grpo:
        print(f"it fits, with {(card - held['learning'][1]) / GIB:.0f} GiB to spare")
        return

    free = (card - idle_memory(args, traced) - BESIDE) / card  # share that vLLM can have
    needs, share = engine_memory(args, parameters, config, longest), args.engine_memory * card
    if needs > share:
        raise Failure(
            f"vLLM needs about {needs / GIB:.0f} GiB, more than --engine-memory {args.engine_memory:g} of "
            f"the card: raise it (the trainer leaves {free:.2f}){offload}, or spread an engine over more "
            f"ranks than --tp {args.tp}"
        )
    if held["sampling"][1] > card:
        raise Failure(
            f"sampling would take {has}: lower --engine-memory {args.engine_memory:g} (the trainer leaves "
            f"{free:.2f}){offload}{ranks_more}"
        )
    cache = share - engine_weights(args, parameters) - ENGINE_OWN
    print(
        f"it fits, with {(card - max(total for _, total in held.values())) / GIB:.0f} GiB to spare; vLLM's cache "
        f"holds {cache / token_bytes(args, config) / longest:.0f} sequences of {longest:,} tokens, and "
        f"--engine-memory may be up to {free:.2f}"
    )


def lower_the_tokens(args, longest):
    """What to lower where a micro-batch is too large. A single sequence is never cut."""
    if longest <= args.micro_tokens:
        return f"lower --micro-tokens {args.micro_tokens}"
    if hasattr(args, "max_len"):
        flags_to_lower = f"--max-len {args.max_len}"
    else:
        flags_to_lower = f"--max-prompt {args.max_prompt} and --max-response {args.max_response}"
    return f"lower {flags_to_lower} (a sequence of {longest:,} tokens is computed at once)"


def gib(count):
    """A number of bytes in words."""
    return f"{count / GIB:.1f} GiB"


def host_memory(traced):
    """Bytes that --offload keeps in host memory for a rank: frozen weights in one piece, and Adam's moments."""
    return traced.frozen + traced.lives["reference"] + traced.lives["Adam"]


def card_bytes(gb):
    if gb:
        return gb * 1e9
    return torch.cuda.get_device_properties(0).total_memory if ranks.CUDA else 80e9


def expandable():
    return "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")


def learning_memory(args, traced, parameters):
    """-> bytes that live at the peak of an update, bytes that the allocator keeps beside them"""
    offload = getattr(args, "offload", False)
    live = traced.peaks["learning"] - (traced.lives["reference"] if offload else 0)
    if args.lora:
        share = KEPT_ADAPTERS_EXPANDABLE if expandable() else KEPT_ADAPTERS
        return live, share * (live - sum(traced.lives.values()))
    return live, (KEPT_EXPANDABLE if expandable() else KEPT) * 4 * parameters.outside


def idle_memory(args, traced):
    """Bytes of the trainer that stay on a card while vLLM samples."""
    lives = traced.lives
    if args.offload:
        return lives["weights"] - traced.frozen
    return lives["weights"] + lives["reference"] + lives["Adam"]


def sampling_memory(args, traced, parameters, card):
    """Bytes of a card while vLLM samples, or gets its weights. Its weights wake before a sync, its cache after.

    A frozen weight that waits in host memory comes to the card for its turn in the sync; it is part of the
    embedding's or the head's size at most.
    """
    idle = idle_memory(args, traced)
    gathered = traced.peaks["syncing"] - sum(traced.lives.values())
    if args.offload and traced.frozen:
        gathered += parameters.outside * network.DTYPES[args.dtype].itemsize
    weights = engine_weights(args, parameters)
    return max(idle + gathered + weights, idle + args.engine_memory * card)


def engine_memory(args, parameters, config, longest):
    """Bytes that vLLM needs at least on a card: its part of the weights, the cache of one text, and its own."""
    return engine_weights(args, parameters) + longest * token_bytes(args, config) + ENGINE_OWN


def engine_weights(args, parameters):
    """Bytes of the weights that an engine has on a card."""
    return parameters.all * network.DTYPES[args.dtype].itemsize / args.tp


def token_bytes(args, config):
    """Bytes that the keys and values of a token take in an engine's cache on a card."""
    keys = config.num_key_value_heads * head_width(config) * config.num_hidden_layers
    return 2 * keys * network.DTYPES[args.dtype].itemsize / args.tp


# ---------------------------------------------------------------- time and price


def print_cost(args, own, card, plan, config, parameters, traced, run, tokens):
    """Print the work of a step, and an estimate of its seconds, of the run's hours, and of their price.

    run     traces groups, see `trace`
    tokens  of a micro-batch
    """
    score, learn = operations_of_step(run, plan, plan.group, tokens, own.ranks)
    lives, each = traced.lives, network.DTYPES[args.dtype].itemsize
    sampling = None
    if plan.group > 1:
        sampling = sampling_work(args, own, card, plan, config, parameters)
    offload = getattr(args, "offload", False)
    work = Work(
        score=score,
        learn=learn,
        # Weights, gradients and moments are read and written by the optimizer, gradients also before it.
        updated=5 * lives["Adam"] * plan.updates,
        sync=parameters.all * each,
        # Adam goes both ways. A frozen copy stays: it comes for learning, and the adapters' base for the sync.
        moved=lives["reference"] + 2 * (lives["Adam"] + traced.frozen) if offload else 0,
        sampling=sampling,
    )
    total = own.ranks * (score + learn)
    said = f"work of a step: {total:.3g} operations on all ranks"
    if sampling:
        alone = own.ranks * sum(operations_of_step(run, plan, 1, tokens, own.ranks))
        said += (
            f" ({alone / total:.2f} times as many with a prompt for every judgment); "
            f"{plan.rows * plan.group * plan.mean_answer:,} tokens are sampled after "
            f"{plan.rows * int(plan.prompts.mean()):,} of prompts; {work.sync / GIB:.3g} GiB of weights "
            "go to each engine"
        )
    print(said)

    seconds = step_seconds(work, card, own.ranks)
    hours = plan.steps * sum(seconds.values()) / 3600
    phases = ", ".join(f"{name} {digits(value)}" for name, value in seconds.items())
    price = ""
    if own.dollars_an_hour is not None:
        price = f", ${hours * own.ranks * own.dollars_an_hour:,.0f}"
    print(
        f"estimate on {own.ranks} x {own.card}: {digits(sum(seconds.values()))} s a step ({phases}), "
        f"{digits(hours)} hours a run{price}; it assumes {assumptions(card, plan, sampling)}"
    )
    longest = max(seconds.values()) / 60
    if 2 * longest > args.timeout:  # an estimate may be half of the truth
        print(
            f"a phase of a step may take more than {longest:.0f} minutes: give --timeout "
            f"{math.ceil(4 * longest)}, or the watchdog takes it for a rank that hangs"
        )


def digits(value):
    """Three digits of a number, or all before its point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def operations_of_step(run, plan, group, tokens, world):
    """Operations of a rank for a step, traced at the mean lengths. -> score, learn

    group  judgments that share a prompt; 1: each has its own, as other trainers compute it
    """
    lengths = int(plan.prompts.mean()), plan.mean_answer
    groups = made_up_groups(*lengths, group, tokens, world, micro_batches=1)
    operations = run(groups=groups).operations
    # In the first update the learning pass gives the log-probs of the policy that sampled.
    own_passes = 1 - 1 / plan.updates
    score = operations.get("reference", 0) + own_passes * operations.get("scoring", 0)
    share = plan.rows * plan.group / (len(groups) * group)  # of a step's judgments that were traced
    return score * share, operations["learning"] * share


def sampling_work(args, own, card, plan, config, parameters):
    """What falls to a card of an engine in a step. -> `Sampling`"""
    engines = own.ranks / args.tp
    samples = plan.rows * plan.group / engines
    prompt, answer = int(plan.prompts.mean()), plan.mean_answer
    weights, token = engine_weights(args, parameters), token_bytes(args, config)
    most, cache = AT_ONCE, args.engine_memory * card.gb * 1e9 - weights - ENGINE_OWN
    if own.card == THIS and not ranks.CUDA:
        most, cache = AT_ONCE_ON_CPU, GIB
    room = cache / (token * (prompt / plan.group + answer))  # a group shares its prompt
    return Sampling(
        prompts=plan.rows / engines,
        samples=samples,
        prompt=prompt,
        answer=answer,
        longest=plan.answer,
        parameters=parameters.all / args.tp,
        weights=weights,
        token=token,
        at_once=max(1, min(most, samples, room)),
    )


def assumptions(card, plan, sampling):
    """What an estimate takes for granted, in words."""
    said = (
        f"{card.computed:.0%} of {card.math / 1e12:.3g} TFLOP/s and {card.read:.0%} of "
        f"{card.reads / 1e9:,.0f} GB/s"
    )
    if sampling:
        said += (
            f", judgments of {plan.mean_answer:,} tokens on average, the longest of {plan.answer:,}, "
            f"and {sampling.at_once:.0f} at once in an engine"
        )
    return said


if __name__ == "__main__":
    run_main(main)
