"""
Checkpoints: what resuming a run needs, whole or absent, readable by any number of ranks.
"""

import math
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from lib.dist import FOREVER, all_gather, all_max, print0
from lib.files import Failure


class Checkpoints:
    """The checkpoints of a run, in folder/step_N: the weights that are trained, and the optimizer.

    Everything else is a function of the step. Any number of ranks can read them. They are whole or
    absent: written under another name, forced to the disk, and given their final name last, on all
    ranks together. The last `keep` stay. The writing goes on in the background, from a copy in host
    memory. A disk that is full or fails costs the new one and leaves the others as they are.
    """

    def __init__(self, policy, optim, folder, keep=2):
        self.policy = policy
        self.optim = optim
        self.folder = Path(folder)
        self.keep = keep
        # The background threads of all ranks talk in a group of their own, beside the training.
        self.group = dist.new_group(backend="gloo", timeout=FOREVER)
        self.writing = None  # (step, future) of a checkpoint under way

    def parts(self):
        model, optim = get_state_dict(self.policy, self.optim)
        # Both names of a tied pair count: torch's ignore_frozen_params would keep a frozen head.
        named = self.policy.named_parameters(remove_duplicate=False)
        trained = {name for name, parameter in named if parameter.requires_grad}
        model = {name: tensor for name, tensor in model.items() if name in trained}
        return {"model": model, "optim": optim}

    def load(self, steps=math.inf):
        """Continue a run of so many steps from its last whole checkpoint. A collective.

        -> the steps that it has made, 0 where there is none. Raises Failure for a checkpoint that
        is damaged or of another model, and where the run has made more steps already.
        """
        finished = finished_checkpoints(self.folder)
        if not finished:
            return 0
        last = finished[-1]
        step = int(last.name.removeprefix("step_"))
        if step > steps:
            raise Failure(
                f"{self.folder}: the run there has made {step} steps already, and this one is to have {steps}"
            )
        before = str(finished[-2]) if len(finished) > 1 else "the beginning"
        check_table(last / ".metadata", f"remove it to go on from {before}")

        parts = self.parts()
        try:
            dcp.load(parts, checkpoint_id=last)
        except CheckpointException as e:  # a file of it is missing or cut, or has other tensors
            raise Failure(
                f"{last}: this checkpoint is damaged, or of another model ({last_line(e)}); "
                f"remove it to go on from {before}"
            ) from e
        set_state_dict(
            self.policy,
            self.optim,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optim"],
            # Frozen weights are not there: they come from the model that the run started from. What
            # else a checkpoint lacks, `dcp.load` has refused.
            options=StateDictOptions(strict=False),
        )
        print0(f"resumed at step {step}")
        return step

    def save(self, step):
        """Begin to write the state after `step` steps. A collective.

        A checkpoint that is under way is waited for.
        """
        self.settle()
        tmp = self.folder / f"step_{step:06d}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        dist.barrier()
        future = dcp.async_save(self.parts(), checkpoint_id=tmp, process_group=self.group)
        self.writing = (step, future)

    def settle(self, wait=True):
        """Give a checkpoint its name once it is written on all ranks. A collective.

        wait  for one that is still being written; without it, that one is left for a later call
        -> False where it could not be written, on every rank alike
        """
        if self.writing is None:
            return True
        step, future = self.writing
        if not wait and all_max([not future.done()])[0]:  # on any rank
            return True
        self.writing = None

        errors = self.errors_of(future.result)  # where a rank could not write its part
        if not errors:
            errors = self.errors_of(lambda: self.finish(step) if dist.get_rank() == 0 else None)
        if errors and dist.get_rank() == 0:
            self.give_up(step, errors[0])
        dist.barrier()
        return not errors

    def errors_of(self, work):
        """Do this rank's part of a work. -> [why it failed, ...] of all ranks. A collective."""
        error = ""
        try:
            work()
        except (OSError, CheckpointException) as e:  # the latter where another rank's write failed
            error = last_line(e)
        return [text for text in all_gather(error) if text]

    def give_up(self, step, error):
        shutil.rmtree(self.folder / f"step_{step:06d}.tmp", ignore_errors=True)
        print(
            f"warning: no checkpoint after step {step}: {error}; earlier ones are whole",
            file=sys.stderr,
            flush=True,
        )

    def finish(self, step):
        """Name a checkpoint whose files are written and synced, and remove the oldest."""
        tmp, final = self.folder / f"step_{step:06d}.tmp", self.folder / f"step_{step:06d}"
        force_to_disk(tmp)
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        force_to_disk(self.folder)
        for old in finished_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)


def finished_checkpoints(folder):
    """The folders of whole checkpoints, oldest first.

    Others (step_N.tmp, step_backup) are left alone.
    """
    paths = Path(folder).glob("step_*")
    return sorted(path for path in paths if re.fullmatch(r"step_\d+", path.name))


def force_to_disk(path):
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_line(error):
    """The last line of an exception's text, where DCP repeats the error that it stands for."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1].strip()


# ---------------------------------------------------------------- the table of contents


# What the table of contents of a checkpoint is made of: (module, name).
TABLE_PARTS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


class TableReader(pickle.Unpickler):
    """Unpickles a table of contents, and raises Failure for a name that has no place in one."""

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in TABLE_PARTS:
            return super().find_class(module, name)
        raise Failure(
            f"names {module}.{name}, which no checkpoint of ours does; it has not been read"
        )


def check_table(path, remedy):
    """Raise Failure where the table of contents of a checkpoint is damaged, or could run something.

    DCP reads a checkpoint's tensors with `weights_only`, but its table is a pickle, and a pickle
    can run anything. remedy: what to do about a damaged one
    """
    try:
        with open(path, "rb") as f:
            TableReader(f).load()
    except Failure as failure:
        raise Failure(f"{path}: {failure}") from None
    except Exception as e:  # a pickle can be damaged in as many ways as it has operations
        raise Failure(
            f"{path.parent}: this checkpoint is damaged ({type(e).__name__} in its table of contents); {remedy}"
        ) from e
