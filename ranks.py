"""
The life of a run: ranks that start, agree, stop and die together, its checkpoints and its diary.

Everything here works on one rank as on many. Functions that are collectives say so: all ranks call them, in
the same order.
"""
import gc
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from rubrics import fail, read_lines, write_lines


# ---------------------------------------------------------------- ranks

def start_ranks(minutes=None):
    """Join the process group that torchrun describes, or make one of a single rank. With `minutes`, no phase
    (see `phase`) may take longer. -> rank, world, device"""
    phase("start")
    if minutes:
        threading.Thread(target=watch, args=(minutes,), daemon=True).start()
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Both backends: parameters and gradients travel by NCCL, counts and flags may stay on the host.
        # They wait for each other as long as it takes: what is too long, `watch` knows better.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=timedelta(days=7))
    return dist.get_rank(), dist.get_world_size(), device


def print0(*args, **kw):
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kw, flush=True)


def all_sum(values):
    """Sum of a list of numbers over all ranks, as floats. In float64, so that counts stay exact."""
    return all_reduce(values, dist.ReduceOp.SUM)


def all_max(values):
    """Maximum of a list of numbers over all ranks, as floats."""
    return all_reduce(values, dist.ReduceOp.MAX)


def all_reduce(values, op):
    t = torch.tensor([float(v) for v in values], dtype=torch.float64)
    dist.all_reduce(t, op)
    return t.tolist()


def all_gather(thing, group=None):
    """What every rank (of a group) has, in the order of the ranks. Travels pickled, over the host."""
    out = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, thing, group)
    return out


def barrier():
    """Wait for the others. Also the way to leave: a rank that exits early would look like a crash to them."""
    dist.barrier()


CAUGHT = []                                                # signals that asked this rank for an end


def catch_signals():
    """From here on SIGTERM and SIGUSR1 (what schedulers send before they kill) ask for an end at the next
    step instead of being one."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: CAUGHT.append(signal.Signals(n).name))


def asked_to_stop():
    """Has any rank been asked for an end? A collective: all ranks leave at the same step."""
    return all_max([len(CAUGHT)])[0] > 0


def leave(state, out, step):
    """The end that a signal asked for: a checkpoint after `step` steps, and OUT/stopped, which says so to
    whoever starts jobs (torchrun's exit code cannot). state: the run's `Checkpoints`."""
    state.save(step)
    done = state.settle()
    if dist.get_rank() == 0:
        why = ", ".join(CAUGHT) or "a signal on another rank"
        (Path(out) / "stopped").write_text(f"step {step}: {why}\n")
    print0(f"stopped by a signal after {step} steps"
           + ("; the same command goes on from there" if done else ""))
    barrier()


def goes_on(state, step, bad, args):
    """What follows every step, `step` of them being done and the last `bad` updates in a row being without a
    finite gradient: the end of a run that only makes bad ones, the end that a signal asked for, or a
    checkpoint where one is due. -> False at the end"""
    if bad >= args.max_bad:
        state.save(step)
        state.settle()
        fail(f"{bad} updates in a row had no finite gradient (--max-bad), the last in step {step - 1}; they "
             "were skipped, and a checkpoint was written")
    if asked_to_stop():
        leave(state, args.out, step)
        return False
    state.after(step, args.save_every)
    return True


NOW = ["start", time.monotonic()]                          # what this rank is doing, and since when


def phase(name):
    """From here on this rank is in another phase of its work. -> seconds that the last one took"""
    last, NOW[:] = NOW[1], (name, time.monotonic())
    return NOW[1] - last


def watch(minutes):
    """A thread that ends this rank when one phase takes longer than `minutes`: a hung collective, engine or
    reward would else wait for ever, and the launcher ends the other ranks when one has ended."""
    while time.monotonic() - NOW[1] < 60 * minutes:
        time.sleep(min(5, 6 * minutes))
    here = str(Path(__file__).parent)
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    at = next((f for f in reversed(frames) if f.filename.startswith(here)), frames[-1])
    print(f"error: rank {os.environ.get('RANK', 0)} has been in the phase '{NOW[0]}' for more than "
          f"{minutes:g} minutes (--timeout), at {Path(at.filename).name}:{at.lineno}: it waits for another "
          "rank, or hangs itself; the same command goes on from the last checkpoint", file=sys.stderr,
          flush=True)
    os._exit(1)


def run(main):
    """main() as the life of a rank. One of several ends with it, at once: libraries would wait for the others
    after an error, and their threads live on while the interpreter is taken apart around them, in which a
    rank that was done has been seen to abort ("terminate called without an active exception"). A rank alone
    that is well ends as any script does, so that a profiler can write what it has. Losing the others is one
    line, so that the first error stays on top."""
    code, alone = 0, int(os.environ.get("WORLD_SIZE", 1)) == 1
    try:
        main()
    except SystemExit as e:                                  # a sentence of `fail`, or argparse's
        code = e.code
    except Exception as e:
        code, rank = 1, os.environ.get("RANK", 0)
        lost = re.search("(?i)connection (closed|reset|refused)|peer", str(e))
        if isinstance(e, RuntimeError) and lost and not alone:
            said = f"rank {rank}: lost another rank in the phase '{NOW[0]}'; its own error says why"
        else:
            said = f"error in rank {rank}, in the phase '{NOW[0]}':\n{traceback.format_exc()}"
        print(said, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if alone and code != 1:
        sys.exit(code)
    os._exit(code)


def quiet():
    """Are progress bars off here? One rank draws them."""
    return int(os.environ.get("RANK", 0)) != 0


def draw(count, batch, step, seed):
    """The rows of a step: `batch` indices below `count`, every epoch shuffled anew, an incomplete
    last batch dropped. A function of its arguments, so that a resumed run meets what the
    uninterrupted one would have met."""
    per_epoch = count // batch
    epoch, at = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[at * batch:(at + 1) * batch].tolist()


def shards(asked):
    """How many ranks hold one copy of the weights together: all, unless --shard says otherwise."""
    world = dist.get_world_size()
    if asked and (asked < 1 or world % asked):
        fail(f"--shard {asked} does not divide the {world} ranks")
    return asked or world


def card_bytes(device):
    """The memory of this rank's card; None on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def peak_memory_gb(device):
    """Most memory this rank has held: on the card, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------- checkpoints

class Checkpoints:
    """What resuming needs (weights and optimizer; everything else is a function of the step), readable by any
    number of ranks, in folder/step_N.

    They are whole or absent: written beside, synced, and given their final name last, on all ranks together;
    the last `keep` stay. The writing goes on in the background, from a copy in host memory. A disk that is
    full or fails costs the new one and leaves the others as they are.
    """

    def __init__(self, policy, optim, folder, keep=2):
        self.policy, self.optim, self.folder, self.keep = policy, optim, Path(folder), keep
        self.group = dist.new_group(backend="gloo")      # the writers of all ranks speak among themselves
        self.writing = None                              # (step, future) of a checkpoint under way

    def parts(self):
        return dict(zip(("model", "optim"), get_state_dict(self.policy, self.optim)))

    def load(self):
        """Continue from the last whole one. -> its step, 0 where there is none"""
        states = whole_states(self.folder)
        if not states:
            return 0
        check_table(states[-1] / ".metadata")
        parts = self.parts()
        dcp.load(parts, checkpoint_id=states[-1])
        set_state_dict(self.policy, self.optim, model_state_dict=parts["model"],
                       optim_state_dict=parts["optim"])
        return int(states[-1].name.removeprefix("step_"))

    def save(self, step):
        """Begin to write the state after `step` steps; one that is under way is waited for."""
        self.settle()
        tmp = self.folder / f"step_{step:06d}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        dist.barrier()
        self.writing = step, dcp.async_save(self.parts(), checkpoint_id=tmp, process_group=self.group)

    def after(self, step, every):
        """Due after a step: name a checkpoint that all ranks have written, and begin one every `every`."""
        self.settle(wait=False)
        if every and step % every == 0:
            self.save(step)

    def settle(self, wait=True):
        """Give a checkpoint that is written on all ranks its name. -> False where it could not be written,
        on every rank alike"""
        if not self.writing or not wait and all_max([not self.writing[1].done()])[0]:
            return True
        (step, future), self.writing, why = self.writing, None, ""
        final, tmp = self.folder / f"step_{step:06d}", self.folder / f"step_{step:06d}.tmp"
        try:
            future.result()
        except (OSError, CheckpointException) as e:        # the latter where another rank's write failed
            said = [line.strip() for line in str(e).splitlines() if line.strip()]
            why = said[-1] if said else type(e).__name__
        failed, = all_max([bool(why)])
        if dist.get_rank() == 0 and failed:
            shutil.rmtree(tmp, ignore_errors=True)
            print(f"warning: no checkpoint after step {step}: {why or 'a write failed on another rank'}; "
                  "earlier ones are whole", file=sys.stderr, flush=True)
        elif dist.get_rank() == 0:
            sync(tmp)                                      # its files were synced as they were written
            shutil.rmtree(final, ignore_errors=True)
            tmp.rename(final)
            sync(self.folder)
            for old in whole_states(self.folder)[:-self.keep]:
                shutil.rmtree(old)
        dist.barrier()
        return not failed


def check_table(path):
    """A checkpoint's tensors are read with `weights_only`, but its table of contents is a pickle, and a
    pickle can run anything: this one may name nothing but the parts of such a table."""
    ours = "torch.distributed.checkpoint."
    allowed = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
               (ours + "filesystem", "_StorageInfo")} | {(ours + "metadata", name) for name in (
                   "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
                   "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")}

    class Table(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in allowed or module == "torch" and isinstance(
                    getattr(torch, name, None), torch.dtype):
                return super().find_class(module, name)
            fail(f"{path}: names {module}.{name}, which no checkpoint of ours does; it has not been read")

    with open(path, "rb") as f:
        Table(f).load()


def sync(folder):
    """Force a folder's names onto the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def whole_states(folder):
    return sorted(p for p in Path(folder).glob("step_*") if p.suffix != ".tmp")


# ---------------------------------------------------------------- the run's diary

class Diary:
    """`metrics.jsonl` of a run, one line a step, and its `config.json`, written by rank 0. A resumed run
    drops the lines that it is about to write again."""

    def __init__(self, out, first_step, config):
        self.path, self.seconds, self.timed = Path(out) / "metrics.jsonl", {}, None
        if dist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            (Path(out) / "config.json").write_text(json.dumps(config, indent=2))
            (Path(out) / "stopped").unlink(missing_ok=True)
            write_lines(self.path, (json.dumps(r) for r in read_lines(self.path) if r["step"] < first_step))
        # Python collects its garbage between steps, on all ranks at once, not in the middle of one rank's
        # work while the others wait; what is there by now stays and is never looked through again.
        gc.collect()
        gc.freeze()
        gc.disable()

    def phase(self, name):
        """The next phase of a step begins, "" for what is not timed."""
        seconds = phase(name or "between")
        if self.timed:
            self.seconds[f"seconds_{self.timed}"] = self.seconds.get(f"seconds_{self.timed}", 0) + seconds
        self.timed = name

    def write(self, **row):
        """One line: the row, the seconds of the phases since the last line, and tokens a second."""
        self.phase("")
        if "tokens" in row:
            row["tokens_per_second"] = row["tokens"] / sum(self.seconds.values())
        if dist.get_rank() == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(row | self.seconds) + "\n")
        self.seconds = {}
        gc.collect()
