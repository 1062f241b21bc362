"""
A training run: its flags, its folder, the order of its data, its metrics log, and how it ends.

| file in OUT     | written                                         | needed to go on                  |
|-----------------|-------------------------------------------------|----------------------------------|
| config.json     | when the loop begins: settings, script, digests | to tell whose folder it is       |
| state/step_N    | every --save-every steps, and at a signal:      | yes: weights and optimizer; all  |
|                 | the last two stay                               | else is a function of the step   |
| metrics.jsonl   | a line a step                                   | no; later lines are dropped      |
| samples.jsonl   | some judgments a step (grpo.py)                 | no                               |
| adapter/        | at the end, with --lora: in PEFT's format       | no                               |
| model/          | at the end, with judge.json, adapters merged    | no                               |
| stopped         | when a signal has ended the run                 | no                               |
| tensorboard/,   | with --log-to                                   | no                               |
| wandb/          |                                                 |                                  |
"""

import argparse
import gc
import hashlib
import importlib
import json
import math
import secrets
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from lib.chat import prompt_fingerprint
from lib.checkpoint import finished_checkpoints
from lib.dist import SIGNALS, be_patient, catch_signals, held_gib, phase, print0
from lib.files import (
    Failure,
    digest,
    first_line,
    json_text,
    lock_folder,
    number,
    read_lines,
    read_object,
    write_lines,
)
from lib.model_files import fingerprint
from lib.pairs import is_finite

# The version of a run's folder: of the keys in config.json and the columns of metrics.jsonl.
FORMAT = 3


def training_flags(parser, protocols, lr, **defaults):
    """The flags that a training run has, whatever it trains.

    lr        default of --lr where all weights are trained, see `learning_rate`
    defaults  of the others that differ between stages
    """
    count, positive = number(int, 1), number(float, 0, above=True)
    arg = parser.add_argument
    arg(
        "--model",
        help="what it starts from: folder, hub id, or FOLDER/config.json for random weights",
    )
    arg("--data", help="pairs to learn from: JSONL file or hub dataset")
    arg("--out", help="folder of this run")
    arg(
        "--lr",
        type=positive,
        help=f"peak learning rate (of other sizes: launch/rm-r1.sh); default: {lr:g}, "
        "and ten times that with --lora",
    )
    arg(
        "--lora",
        type=number(int, 0),
        default=0,
        metavar="RANK",
        help="train low-rank adapters of this rank, and freeze the weights; 0: train all weights",
    )
    arg = parser.add_argument_group("how it asks, and how it runs").add_argument
    arg(
        "--protocol",
        choices=protocols,
        help="prompt style of rows without published prompts; default: the model's (judge.json) or instruct",
    )
    arg(
        "--system-prompt",
        help="file with the system prompt, instead of the model's, the row's or ours",
    )
    arg(
        "--micro-tokens",
        type=count,
        default=16384,
        help="tokens a rank computes at once: lower it when memory runs out",
    )
    arg(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute activations in the backward pass",
    )
    arg(
        "--shard",
        type=count,
        help="ranks that hold one copy of the weights, e.g. a node's; default: all",
    )
    arg(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of the computation (trained weights are kept in fp32)",
    )
    arg(
        "--max-bad",
        type=count,
        default=5,
        help="updates in a row without a finite gradient that end a run",
    )
    arg(
        "--save-every",
        type=number(int, 0),
        help="steps between checkpoints for resuming, 0 for none",
    )
    arg(
        "--timeout",
        type=positive,
        default=60,
        help="minutes that a phase may take before the run is ended",
    )
    arg(
        "--log-to",
        choices=TRACKERS,
        help="show the numbers of metrics.jsonl there too, see docs/log.md; the library has to be installed",
    )
    arg("--seed", type=number(int, 0), help="of data order, samples and random weights")
    arg(
        "--skip-bad", action="store_true", help="report and leave out bad lines instead of stopping"
    )
    parser.set_defaults(**defaults)


TRACKERS = ("tensorboard", "trackio", "wandb")


def learning_rate(full, lora):
    """The default peak rate: adapters learn best at about ten times the rate of full training.

    Source: "LoRA Without Regret" (Thinking Machines, 2025), whose fit is 9.8.
    """
    return round(10 * full, 12) if lora else full


# ---------------------------------------------------------------- the folder

# Settings with which a run may go on in other ways. They change neither a step nor what is sampled, but for
# steps and epochs: a schedule that depends on the number of steps goes on as the new number has it.
MAY_DIFFER = set(
    "out model data val_data val_every system_prompt protocol micro_tokens recompute shard offload "
    "engine_memory tp max_mismatch max_bad save_every timeout skip_bad steps epochs log_to log_id".split()
)


def open_run(args, folder, pairs, judge_json):
    """Lock the folder of a training run, or refuse it.

    A folder that holds another run is refused, which would be continued on other data or at other rates, or
    by another script. So is a finished model without a checkpoint to go on from, which would be lost.

    folder      of the model that the run starts from
    pairs       what it learns from
    judge_json  how the trained judge wants to be asked
    -> the content of config.json, for `RunLog`
    """
    check_tracker(getattr(args, "log_to", None))
    out, model = Path(args.out), Path(args.out) / "model"
    script = Path(sys.argv[0])
    config = vars(args) | {
        "format": FORMAT,
        "script": script.name,
        # A fork that was edited meanwhile is another algorithm.
        "script_digest": digest(script.read_text(encoding="utf-8")) if script.is_file() else None,
        "weights": fingerprint(args.model, folder),
        "tokenizer": prompt_fingerprint(folder),
        "judge": judge_json,
        "pairs_digest": hashlib.sha256(repr(pairs).encode(errors="replace")).hexdigest()[:16],
    }
    config = json.loads(json.dumps(config))
    start = {folder.resolve(), Path(args.model).resolve()}
    if start & {model.resolve(), (out / "adapter").resolve()}:
        raise Failure(
            f"--out {out}: its model is the one that this run starts from, which would be lost"
        )

    if any(out.glob("judgments*.jsonl")):
        raise Failure(f"--out {out}: holds an evaluation; give another folder")
    checkpoints = finished_checkpoints(out / "state")
    old = read_object(out / "config.json") if (out / "config.json").is_file() else {}
    if checkpoints or read_lines(out / "metrics.jsonl"):
        refuse_another_run(out, old, config)
    elif old and "script" not in old:
        raise Failure(
            f"--out {out}: its config.json is not of a run (of a model?) and would be lost; give another folder"
        )
    if model.exists() and not checkpoints:
        raise Failure(
            f"--out {out}: holds a finished run, without a checkpoint to go on from; give another folder, "
            "or remove it"
        )
    lock_folder(out)
    return config


def refuse_another_run(out, old, config):
    """Raise a `Failure` where the settings of the run in a folder are not this run's."""
    if old.get("format") != FORMAT:
        raise Failure(
            f"--out {out}: holds a run of another version of this project (its config.json has the format "
            f"{old.get('format')}, now {FORMAT}); give another folder, or remove it"
        )
    keys = ["script", "script_digest", *sorted(config | old)]  # the first that differs is named
    differs = [k for k in keys if k not in MAY_DIFFER and old.get(k) != config.get(k)]
    if differs:
        was, now = (str(c.get(differs[0]))[:80] for c in (old, config))
        raise Failure(
            f"--out {out}: holds a run with another {differs[0]} ({was}, now {now}), which this one would "
            "continue; give another folder, or remove it"
        )


# ---------------------------------------------------------------- steps


def draw_batch(count, batch, step, seed):
    """Places of the rows of a step: `batch` of `count`, an incomplete last batch of an epoch dropped.

    Every epoch is shuffled anew. The draw is a function of its arguments, so a resumed run meets the rows
    that the uninterrupted one would have met.
    """
    epoch, place = divmod(step, count // batch)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[place * batch : (place + 1) * batch].tolist()


def begin_loop():
    """Prepare this rank for its steps: patient collectives, signals, garbage between steps only."""
    be_patient()
    catch_signals()
    # Python collects its garbage between steps, on all ranks at once, not in the middle of one rank's work
    # while the others wait. What is there by now stays, and is never looked through again.
    gc.collect()
    gc.freeze()
    gc.disable()


class RunLog:
    """`metrics.jsonl` of a run, one line a step, and its `config.json`, written by rank 0.

    A resumed run drops the lines that it is about to write again. With --log-to the numbers go there, too.
    """

    def __init__(self, out, first_step, config):
        self.out = Path(out)
        self.bad_updates = 0  # in a row, without a finite gradient
        self.last = {}  # the last line
        self.timed, self.seconds, self.peak_gib = None, {}, 0.0
        self.track = self.end_track = None
        if dist.get_rank() == 0:
            config |= tracked_as(self.out, first_step, config.get("log_to"))
            if config.get("log_to"):
                self.track, self.end_track = open_tracker(self.out, first_step, config)
            write_lines(self.out / "config.json", [json_text(config, indent=2)])
            (self.out / "stopped").unlink(missing_ok=True)
            for path in (self.out / "metrics.jsonl", self.out / "samples.jsonl"):
                rows = read_lines(path, {"step": int})
                rows = [row for row in rows if row["step"] < first_step]
                if path.exists() or path.name == "metrics.jsonl":  # which every run has
                    write_lines(path, map(json_text, rows))

    def phase(self, name):
        """The next phase of a step begins; "" for what is not timed."""
        seconds = phase(name or "between")
        # At the end of each phase: the engine wakes at the end of "sync", and gradients live until "learn" ends.
        self.peak_gib = max(self.peak_gib, held_gib())
        if self.timed:
            column = f"seconds_{self.timed}"
            self.seconds[column] = self.seconds.get(column, 0) + seconds
        self.timed = name

    def write(self, row, norms=()):
        """Write one line: the row, the seconds of the phases since the last line, tokens a second, and the
        most memory that this rank's card (on a CPU: this process) has held at the end of any phase so far.

        norms  gradient norms of the step's updates, to count those in a row that were not finite
        """
        for norm in norms:
            self.bad_updates = 0 if math.isfinite(norm) else self.bad_updates + 1
        self.phase("")
        if "tokens" in row:
            row = row | {"tokens_per_second": row["tokens"] / sum(self.seconds.values())}
        line = row | self.seconds | {"peak_gib": self.peak_gib}
        self.append("metrics.jsonl", [line])
        if self.track:
            step = line.pop("step")
            numbers = {name: value for name, value in line.items() if is_finite(value)}
            self.tell_tracker(self.track, numbers, step)
        self.seconds, self.last = {}, row

    def close(self):
        """No more lines come."""
        if self.end_track:
            self.tell_tracker(self.end_track)

    def tell_tracker(self, tell, *given):
        """Call a function of --log-to's library. If it fails, the run says so once and goes on without the library."""
        try:
            tell(*given)
        except Exception as error:  # a network, a quota, a full disk: no reason to lose a run
            self.track = self.end_track = None
            print(
                f"--log-to: {first_line(error)}; the run goes on without it, and metrics.jsonl has every line",
                file=sys.stderr,
                flush=True,
            )

    def append(self, name, rows):
        """Add lines to a file of the run. rows: an iterable, read by the one rank that writes"""
        if dist.get_rank() == 0:
            with open(self.out / name, "a") as f:
                f.writelines(json_text(row) + "\n" for row in rows)

    def headline(self, *columns):
        """Some columns of the last line, as the progress bar shows them."""
        return {name: f"{self.last[name]:.3f}" for name in columns if name in self.last}

    def diverged(self, max_bad, last):
        """Have the last updates had no finite gradient: `max_bad` of them, or any where the run ends?"""
        return self.bad_updates >= max_bad or (last and self.bad_updates > 0)

    def divergence(self, step, saved):
        checkpoint = "a checkpoint was written" if saved else "no checkpoint could be written"
        return (
            f"{self.bad_updates} updates in a row had no finite gradient (--max-bad), the last in step {step}; "
            f"they were skipped, {checkpoint}, and no model"
        )

    def stopped(self, done, saved):
        """A signal to any rank has ended the run after `done` steps. saved: is there a checkpoint of them?

        OUT/stopped says so to whoever starts jobs, since torchrun's exit code cannot.
        """
        if dist.get_rank() == 0:
            why = ", ".join(SIGNALS) or "a signal on another rank"
            (self.out / "stopped").write_text(f"step {done}: {why}\n")
        print0(
            f"stopped by a signal after {done} steps"
            + ("; the same command goes on from there" if saved else "")
        )
        self.close()
        dist.barrier()  # a rank that leaves early looks like a crash to the others


# ---------------------------------------------------------------- --log-to


def check_tracker(name):
    """Raises Failure where the library of --log-to cannot be imported. name: None for no library"""
    try:
        if name:
            importlib.import_module(name)
    except ImportError as error:
        raise Failure(f"--log-to {name}: {first_line(error)}; pip install {name}") from error


def tracked_as(out, first_step, log_to):
    """{"log_id": the name of this run at a tracker}; {} for a run that has none.

    A run that goes on keeps that of its config.json, also while it goes without --log-to. A new run has a new one.
    """
    path = out / "config.json"
    old = read_object(path) if first_step and path.is_file() else {}
    name = old.get("log_id") or (log_to and f"{out.name}-{secrets.token_hex(4)}")
    return {"log_id": name} if name else {}


def open_tracker(out, first_step, config):
    """Open --log-to's library for this run. -> a function of (numbers, step), a function that ends it"""
    name, run_id = config["log_to"], config["log_id"]
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier part of this run has written from this step on is hidden.
            writer = SummaryWriter(out / "tensorboard", purge_step=first_step)

            def track(numbers, step):
                for column, value in numbers.items():
                    writer.add_scalar(column, value, step)
                writer.flush()

            return track, writer.close
        library = importlib.import_module(name)
        more = {"id": run_id, "dir": out} if name == "wandb" else {}
        library.init(project="rmr1", name=run_id, config=config, resume="allow", **more)
    except Exception as error:  # no key, no network, a folder that cannot be written
        raise Failure(f"--log-to {name}: {first_line(error)}") from error
    return library.log, library.finish
