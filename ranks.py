"""
The life of a run: ranks that start, agree, stop and die together, its checkpoints and its diary.

Everything here works on one rank as on many. Functions that are collectives say so: all ranks call them, in
the same order.
"""
import argparse
import atexit
import errno
import gc
import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

from files import claim, fail, fingerprint, number, read_lines, write_lines
from rubrics import PROTOCOLS


# ---------------------------------------------------------------- flags

def flags(ap, **defaults):
    """The flags that a training run has, whatever it trains, with those defaults that are its own."""
    arg, count, positive = ap.add_argument, number(int, 1), number(float, 0, above=True)
    arg("--model", help="what it starts from: folder, hub id, or FOLDER/config.json for random weights")
    arg("--data", help="pairs to learn from: JSONL file or hub dataset")
    arg("--out", help="folder of this run")
    arg("--lr", type=positive, help="peak learning rate (of other sizes: launch/rm-r1.sh)")
    arg = ap.add_argument_group("how it asks, and how it runs").add_argument
    arg("--protocol", choices=PROTOCOLS,
        help="prompt form of rows without published prompts; default: the model's (judge.json) or instruct")
    arg("--system-prompt", help="file with the system prompt, instead of the model's, the row's or ours")
    arg("--micro-tokens", type=count, default=16384,
        help="tokens a rank computes at once: lower it when memory runs out")
    arg("--recompute", action=argparse.BooleanOptionalAction, default=True,
        help="recompute activations in the backward pass")
    arg("--shard", type=count, help="ranks that hold one copy of the weights, e.g. a node's; default: all")
    arg("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
        help="of the computation (weights are kept in fp32)")
    arg("--max-bad", type=count, default=5, help="updates in a row without finite gradient that end a run")
    arg("--save-every", type=number(int, 0), help="steps between checkpoints for resuming, 0 for none")
    arg("--timeout", type=positive, default=60, help="minutes that a phase may take before the run is ended")
    arg("--seed", type=number(int, 0), help="of data order, samples and random weights")
    arg("--skip-bad", action="store_true", help="report and leave out bad lines instead of stopping")
    arg("--dry-run", nargs="*", type=positive, metavar=("RANKS", "GB"), help=(
        "do everything but the run: count data and steps, and trace what a card of so many GB (default: this "
        "one, else 80) will hold on so many ranks (default: those that are started)"))
    ap.set_defaults(**defaults)


# ---------------------------------------------------------------- ranks

CUDA = torch.cuda.is_available()              # whose kernels are called; a dry run calls a card's without one
FOREVER = timedelta(days=7)                    # how long ranks wait for each other: `watch` knows better


def start_ranks(minutes=None, dry_run=None):
    """Join the process group that torchrun describes, or make one of a single rank. With `minutes`, no phase
    (see `phase`) may take longer. dry_run: the flag's value, for a group of ranks that are not there; one
    process pretends to be all that were started. -> rank, world, device"""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        fail(f"torch {torch.__version__}: 2.13 or newer is needed, which the vllm of requirements.txt brings")
    phase("start")
    if dry_run is not None:
        if quiet():
            raise SystemExit(0)
        from torch.testing._internal.distributed.fake_pg import FakeStore
        world = int(dry_run[0] if dry_run else os.environ.get("WORLD_SIZE", 1))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        return 0, world, torch.device("cpu")
    if minutes:
        threading.Thread(target=watch, args=(minutes,), daemon=True).start()
    if "RANK" not in os.environ:                           # port 0: any that is free
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if CUDA and (cards := torch.cuda.device_count()) < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        fail(f"{os.environ['LOCAL_WORLD_SIZE']} ranks on a machine with {cards} cards: one card a rank, so "
             f"start --nproc_per_node {cards}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
        # Sums of bf16 products in fp32 to their end, as `policy.TokenLogProbs` counts on.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if not dist.is_initialized():
        # Both backends: parameters and gradients travel by NCCL, counts and flags may stay on the host. Not
        # bound to a device: every group that vLLM makes, most of a single rank, would then split a
        # communicator off at once (76 splits on 8 ranks), where it makes one when it has something to send.
        dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=FOREVER)
    return dist.get_rank(), dist.get_world_size(), device


def quiet():
    """Is this a rank that draws no progress bars and says nothing but errors? One does it for all."""
    return int(os.environ.get("RANK", 0)) != 0


def print0(*args, **kw):
    if not quiet():
        print(*args, **kw, flush=True)


def all_reduce(op, values):
    """Sum or maximum of each of a list of numbers over all ranks, as floats. In float64, so that counts stay
    exact."""
    t = torch.tensor([float(v) for v in values], dtype=torch.float64)
    dist.all_reduce(t, op)
    return t.tolist()


all_sum, all_max = partial(all_reduce, dist.ReduceOp.SUM), partial(all_reduce, dist.ReduceOp.MAX)


def all_gather(thing, group=None):
    """What every rank (of a group) has, in the order of the ranks. Travels pickled, over the host."""
    out = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, thing, group)
    return out


def be_patient():
    """FOREVER for every group there is: those of FSDP's copies, of checkpoints and of vLLM would give up
    after 10 or 30 minutes, which a slow disk or a long judgment on one rank can take."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout     # since 2.14
    for group in list(dist.distributed_c10d._world.pg_map):
        set_timeout(FOREVER, group)


barrier = dist.barrier           # also the way to leave: a rank that exits early looks like a crash to others
CAUGHT = []                                                # signals that asked this rank for an end


def catch_signals():
    """From here on SIGTERM, SIGUSR1 (what schedulers send before they kill) and the first Ctrl-C ask for an
    end at the next step instead of being one."""
    def note(number, _):
        CAUGHT.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            print0("\nCtrl-C: ends after this step with a checkpoint; once more ends now", file=sys.stderr)
            signal.signal(number, signal.default_int_handler)

    for caught in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(caught, note)


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

    def end():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)

    atexit.register(end)         # after a script's own: what comes then is a page of libraries on their leaks
    try:
        main()
    except SystemExit as e:                                  # a sentence of `fail`, or argparse's
        code = e.code
    except KeyboardInterrupt:
        code = 130
        print0("\ninterrupted; the same command goes on from what is on disk", file=sys.stderr)
    except Exception as e:
        rank, where = os.environ.get("RANK", 0), f"in the phase '{NOW[0]}'"
        lost = re.search("(?i)connection (closed|reset|refused)|peer", str(e))
        code, said = 1, f"error in rank {rank}, {where}:"
        if isinstance(e, torch.OutOfMemoryError):
            said += (f" {str(e).splitlines()[0]} Lower --micro-tokens (or --engine-memory, where vLLM asked),"
                     " or give --offload; --dry-run says what a card will hold")
        elif getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e):
            said += " the disk is full; what is whole stays"
        elif isinstance(e, RuntimeError) and lost and not alone:
            said = f"rank {rank}: lost another rank {where}; its own error says why"
        else:
            said += f"\n{traceback.format_exc()}"
        print(said, file=sys.stderr)
    if alone and code != 1:
        sys.exit(code)
    end()


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
    if asked and world % asked:
        fail(f"--shard {asked} does not divide the {world} ranks")
    return asked or world


def held_gb():
    """Memory in use: of the card, by whoever it is (vLLM unmaps its part behind the back of torch's
    counters), or the most that this process has had on a CPU."""
    if CUDA:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
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
        self.group = dist.new_group(backend="gloo", timeout=FOREVER)            # in which their writers speak
        self.writing = None                              # (step, future) of a checkpoint under way

    def parts(self):
        return dict(zip(("model", "optim"), get_state_dict(self.policy, self.optim)))

    def load(self, steps=math.inf):
        """Continue a run of so many steps from the last whole one. -> its step, 0 where there is none"""
        states = whole_states(self.folder)
        if not states:
            return 0
        step = int(states[-1].name.removeprefix("step_"))
        if step > steps:
            fail(f"{self.folder}: the run there has made {step} steps already, and this one is to have "
                 f"{steps}")
        try:
            check_table(states[-1] / ".metadata")
            parts = self.parts()
            dcp.load(parts, checkpoint_id=states[-1])
        except (Exception, CheckpointException) as e:        # a file of it is missing or cut
            fail(f"{states[-1]}: this checkpoint is damaged, or of another model ({type(e).__name__}); "
                 "remove it to go on from " + (str(states[-2]) if len(states) > 1 else "the beginning"))
        set_state_dict(self.policy, self.optim, model_state_dict=parts["model"],
                       optim_state_dict=parts["optim"])
        print0(f"resumed at step {step}")
        return step

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
            why = (str(e).strip() or type(e).__name__).splitlines()[-1].strip()
        failed = [theirs for theirs in all_gather(why) if theirs]
        if dist.get_rank() == 0 and failed:
            shutil.rmtree(tmp, ignore_errors=True)
            print(f"warning: no checkpoint after step {step}: {failed[0]}; earlier ones are whole",
                  file=sys.stderr, flush=True)
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
    return sorted(p for p in Path(folder).glob("step_*") if re.fullmatch(r"step_\d+", p.name))


# ---------------------------------------------------------------- the run's diary

# What of a run's settings changes neither its steps nor what is sampled: a run may go on with others.
MAY_DIFFER = set("out model data val_data val_every system_prompt protocol micro_tokens recompute shard "
                 "offload engine_memory tp max_gap max_bad save_every timeout skip_bad dry_run steps "
                 "epochs".split())


def open_run(args, folder, pairs, form):
    """Claim a training run's folder, or refuse it: a folder that holds another run, which would be continued
    on other data or at other rates, or a finished model, which would be lost.

    folder: of the model it starts from; pairs: what it learns from; form: how the judge is asked
    -> what config.json says about the run, for `Diary`
    """
    out, model = Path(args.out), Path(args.out) / "model"
    config = vars(args) | {"weights": fingerprint(args.model, folder), "form": form, "pairs_digest":
                           hashlib.sha256(repr(pairs).encode(errors="replace")).hexdigest()[:16]}
    config = json.loads(json.dumps(config))
    if model.exists() and model.resolve() == folder.resolve():
        fail(f"--out {out}: its model is the one that this run starts from, which would be lost")
    begun = whole_states(out / "state")
    if begun or read_lines(out / "metrics.jsonl"):
        old = json.loads((out / "config.json").read_text()) if (out / "config.json").is_file() else {}
        if differs := [k for k in config if k in old and k not in MAY_DIFFER and old[k] != config[k]]:
            was, now = (str(c[differs[0]])[:80] for c in (old, config))
            fail(f"--out {out}: holds a run with another {differs[0]} ({was}, now {now}), which this one "
                 "would continue; give another folder, or remove it")
    if model.exists() and not begun:
        fail(f"--out {out}: holds a finished run, without a checkpoint to go on from; give another folder, "
             "or remove it")
    claim(out)
    return config


def steps_of(diary, state, first, steps, args):
    """The numbers of a run's steps from `first`, and what comes between them: the end of a run that makes bad
    updates only, or ends on one; the end that a signal to any rank asked for, with OUT/stopped to say so to
    whoever starts jobs (torchrun's exit code cannot); or a checkpoint, where one is due. A collective."""
    be_patient()
    catch_signals()
    # Python collects its garbage between steps, on all ranks at once, not in the middle of one rank's work
    # while the others wait; what is there by now stays and is never looked through again.
    gc.collect()
    gc.freeze()
    gc.disable()
    for step in (bar := tqdm(range(first, steps), "steps", steps, initial=first, disable=quiet())):
        yield step
        gc.collect()
        bar.set_postfix({k: f"{diary.last[k]:.3f}" for k in ("loss", "accuracy", "unread", "kl")
                         if k in diary.last})
        done, asked = step + 1, all_max([len(CAUGHT)])[0]
        failed = diary.bad >= args.max_bad or diary.bad and done == steps
        if not (asked or failed):
            state.after(done, args.save_every)
            continue
        state.save(done)
        whole = state.settle()
        if failed:
            fail(f"{diary.bad} updates in a row had no finite gradient (--max-bad), the last in step {step}; "
                 "they were skipped, a checkpoint was written, and no model")
        if dist.get_rank() == 0:
            why = ", ".join(CAUGHT) or "a signal on another rank"
            (Path(args.out) / "stopped").write_text(f"step {done}: {why}\n")
        print0(f"stopped by a signal after {done} steps"
               + ("; the same command goes on from there" if whole else ""))
        barrier()
        raise SystemExit(0)
    state.settle()


class Diary:
    """`metrics.jsonl` of a run, one line a step, `samples.jsonl` with some of what it sampled, and its
    `config.json`, written by rank 0. A resumed run drops the lines that it is about to write again."""

    def __init__(self, out, first_step, config):
        self.out, self.seconds, self.timed, self.peak, self.bad, self.last = Path(out), {}, None, 0.0, 0, {}
        if dist.get_rank() == 0:
            write_lines(self.out / "config.json", [json.dumps(config, indent=2)])
            (self.out / "stopped").unlink(missing_ok=True)
            for path in (self.out / "metrics.jsonl", *self.out.glob("samples.jsonl")):
                write_lines(path, (json.dumps(r) for r in read_lines(path) if r["step"] < first_step))

    def phase(self, name):
        """The next phase of a step begins, "" for what is not timed."""
        # Within a phase what the card holds only grows, so its end is its peak.
        seconds, self.peak = phase(name or "between"), max(self.peak, held_gb())
        if self.timed:
            self.seconds[f"seconds_{self.timed}"] = self.seconds.get(f"seconds_{self.timed}", 0) + seconds
        self.timed = name

    def write(self, norms=(), **row):
        """One line: the row, the seconds of the phases since the last line, tokens a second, and the most
        memory that this rank's card (on a CPU: this process) has held at the end of any phase so far.
        norms: of the step's updates, to count how many in a row had no finite gradient."""
        for norm in norms:
            self.bad = 0 if math.isfinite(norm) else self.bad + 1
        self.phase("")
        if "tokens" in row:
            row["tokens_per_second"] = row["tokens"] / sum(self.seconds.values())
        self.append("metrics.jsonl", [row | self.seconds | {"peak_gb": self.peak}])
        self.seconds, self.last = {}, row

    def show(self, step, groups, tokenizer, count=4):
        """Some of what a step sampled, for a person to read: a judgment of each of the first groups."""
        self.append("samples.jsonl", (                     # read by the one rank that writes
            {"step": step, "pair": r.pair.id, "label": r.pair.label, "verdict": r.verdict,
             "reward": r.reward if math.isfinite(r.reward) else None, "finished": r.finished,
             "text": tokenizer.decode(r.tokens)}
            for r in (group[step % len(group)] for group in groups[:count])))

    def append(self, name, rows):
        if dist.get_rank() == 0:
            with open(self.out / name, "a") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
