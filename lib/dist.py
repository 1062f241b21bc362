"""
Distributed setup: ranks that start, exchange numbers and end together; signals, the watchdog.

Everything here works on one rank as on many. Functions that are collectives say so: all ranks call
them, in the same order.
"""

import errno
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from lib.files import Failure, is_our_file, rank_count, this_rank

CUDA = torch.cuda.is_available()  # CUDA's kernels are called; a dry run sets it without a card
FOREVER = timedelta(days=7)  # how long ranks wait for each other: the watchdog ends them earlier


# ---------------------------------------------------------------- ranks


def start_ranks(minutes=None):
    """Join torchrun's process group, or make one of a single rank. -> rank, world, device

    minutes  that a phase (see `phase`) may take, before the watchdog ends this rank
    """
    check_torch()
    phase("start")
    if minutes:
        threading.Thread(target=watchdog, args=(minutes,), daemon=True).start()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="0",  # any that is free
        )
    device = torch.device("cpu")
    if CUDA:
        device = first_use_of_card()
    if not dist.is_initialized():
        # Both backends: parameters and gradients travel by NCCL, counts and flags may stay on the
        # host. Not bound to a device: every group that vLLM makes, most of a single rank, would
        # then split a communicator off at once (76 splits on 8 ranks), where it makes one when it
        # has something to send.
        dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=FOREVER)
    return dist.get_rank(), dist.get_world_size(), device


def check_torch():
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < (2, 13):
        raise Failure(
            f"torch {torch.__version__}: 2.13 or newer is needed, which the vllm of requirements.txt brings"
        )


def first_use_of_card():
    """Make this rank's card the current one. -> its device"""
    cards = torch.cuda.device_count()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cards < local_ranks:
        raise Failure(
            f"{local_ranks} ranks on a machine with {cards} cards: one card a rank, so start "
            f"--nproc_per_node {cards}"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # Sums of bf16 products in fp32 to their end, as `policy.TokenLogProbs` counts on.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def quiet():
    """Is this a rank that draws no progress bars and prints only errors? Rank 0 prints for all."""
    return this_rank() != 0


def print0(*args, **settings):
    """print on rank 0."""
    if not quiet():
        print(*args, **settings, flush=True)


def all_reduce(op, values):
    """Sum or maximum of each of a list of numbers over all ranks. A collective. -> floats

    In float64, so that counts stay exact.
    """
    numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)  # (values,)
    dist.all_reduce(numbers, op)
    return numbers.tolist()


def all_sum(values):
    """Sum of each of a list of numbers over all ranks, see `all_reduce`."""
    return all_reduce(dist.ReduceOp.SUM, values)


def all_max(values):
    """Maximum of each of a list of numbers over all ranks, see `all_reduce`."""
    return all_reduce(dist.ReduceOp.MAX, values)


def all_gather(thing, group=None):
    """What every rank (of a group) has, in the order of the ranks.

    A collective; travels pickled, by the host.
    """
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, thing, group)
    return gathered


def barrier():
    """Wait until every rank is here. A collective.

    Also the way to leave: a rank that exits early looks like a crash to the others.
    """
    dist.barrier()


def be_patient():
    """Set the timeout of every process group to FOREVER.

    The groups of FSDP's copies, of checkpoints and of vLLM would give up after 10 or 30 minutes,
    which a slow disk or a long judgment on one rank can take.
    """
    set_timeout = getattr(dist, "set_timeout", None)  # public since torch 2.14
    if set_timeout is None:
        set_timeout = dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):
        set_timeout(FOREVER, group)


def shard_size(requested=None):
    """How many ranks hold one copy of the weights together: all, unless --shard says otherwise.

    Raises Failure where that does not divide the ranks.
    """
    world = dist.get_world_size()
    if requested is None:
        return world
    if world % requested:
        raise Failure(f"--shard {requested} does not divide the {world} ranks")
    return requested


def held_gib():
    """Memory in use, in GiB: of this rank's card, or the most that this process has had on a CPU.

    A card's memory is counted whoever uses it: vLLM unmaps its part without telling torch's
    counters.
    """
    if CUDA:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------- tensors in shards
# A sharded parameter is a DTensor, of which a rank has some rows. One that lies whole on every rank
# is a plain tensor.


def shard_like(full, parameter):
    """A full tensor, the same on every rank, in the shards of a parameter. Nothing is sent."""
    full = full.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return full
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def local_shard(parameter):
    """This rank's rows of a parameter, in the parameter's own memory."""
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def full_tensor(tensor):
    """All rows of a tensor in shards. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_of(shard, parameter):
    """The full tensor whose rows on this rank are `shard`, and which lies like a parameter. A collective."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()


# ---------------------------------------------------------------- signals

SIGNALS = []  # names of the signals that this rank has caught


def catch_signals():
    """From here on a signal asks for an end after this step, instead of being the end.

    Signals are SIGTERM, SIGUSR1 (what schedulers send before they kill) and the first Ctrl-C.
    """

    def note(number, _):
        SIGNALS.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            print0(
                "\nCtrl-C: ends after this step with a checkpoint; once more ends now",
                file=sys.stderr,
            )
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, note)


def signal_caught():
    """Has any rank caught a signal? A collective."""
    return bool(all_max([len(SIGNALS)])[0])


# ---------------------------------------------------------------- the watchdog, and what an error means


class CurrentPhase:
    """What this rank is doing, and since when (time.monotonic)."""

    name = "start"
    since = time.monotonic()


def phase(name):
    """This rank begins another phase of its work. -> seconds that the last one took"""
    now = time.monotonic()
    seconds = now - CurrentPhase.since
    CurrentPhase.name, CurrentPhase.since = name, now
    return seconds


def watchdog(minutes):
    """A thread's work: end this rank when one phase takes longer than `minutes`.

    A hung collective, engine or reward would otherwise wait for ever. The launcher ends the other
    ranks when one has ended.
    """
    while time.monotonic() - CurrentPhase.since < 60 * minutes:
        time.sleep(min(5, 6 * minutes))  # every 5 s, or ten times within a short limit

    # Where the main thread stands: the innermost line of this project, or else of a library.
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    ours = [frame for frame in frames if is_our_file(frame.filename)]
    place = (ours or frames)[-1]
    print(
        f"error in rank {this_rank()}: it has been in the phase '{CurrentPhase.name}' for more than "
        f"{minutes:g} minutes (--timeout), at {Path(place.filename).name}:{place.lineno}: it waits for "
        "another rank, or hangs itself; the same command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def explain(error):
    """The text that `run_main` prints for an exception that is no `Failure`.

    A full card, a full disk and the loss of another rank get one sentence, so that the first error
    stays on top. Anything else gets its traceback. All name the phase of the work.
    """
    message = str(error)
    where = f"in the phase '{CurrentPhase.name}'"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{where}: {message.splitlines()[0]} Lower --micro-tokens, then the longest text (sft.py: --max-len; "
            "grpo.py: --max-prompt and --max-response), or --engine-memory, where vLLM asked; grpo.py has "
            "--offload, too. tools/dryrun.py says what a card will hold"
        )
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in message:
        return f"{where}: the disk is full; what is whole stays"
    lost = re.search("(?i)connection (closed|reset|refused)|by peer", message)
    if isinstance(error, RuntimeError) and lost and rank_count() > 1:
        return f"lost another rank {where}; its own error says why"
    lines = traceback.format_exception(error)
    return f"{where}:\n{''.join(lines).rstrip()}"
