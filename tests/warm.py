"""
Scripts run for tests without the start of Python, torch and vLLM, which takes longer than most tests.

How it works. conftest.py starts this file once, at its first use, and talks to it through pipes. It imports
what every script imports, torch and vLLM above all, some ten seconds on two cores, and then waits. A line of
JSON on standard input asks for one run of a script:

    {"argv": [script, ...], "ranks": 1, "env": {...}, "out": FILE, "err": FILE, "kill": [what, n, k] or null}

For each line it forks, once a rank. A child has the imports already, puts its output into the files, takes
the environment of the line and the script's argv, sets torchrun's variables where there are several ranks,
and runs the script as `__main__`. Two lines go out: the process ids when the run has begun, so that a test
can send a signal, and the exit status when it has ended (negative for a signal; of several ranks, of the
first that failed, and the others get SIGTERM, as under torchrun).

What differs from a fresh process. Modules that were imported here are not imported again: a change of a file
while tests run goes unnoticed, and what a module does at its import has been done in this process. So
everything here must survive a fork: no thread, no process group, no engine and no CUDA before it. Where there
are cards, and where a test says `fresh=True`, conftest.run starts real processes instead. A constant of
vLLM, the smallest size of its cache on a CPU, is a quarter of its own, which saves a second a run.

"kill" ends the run by SIGKILL from inside, at a place that a clock would hardly hit: ["sync", n, k] before
the k-th tensor of the n-th sync, ["save", n, 0] before the n-th tensor that a checkpoint writes.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import torch
import vllm.model_executor.models.qwen2
import vllm.platforms.cpu
import vllm.v1.worker.cpu_worker

import eval  # noqa: F401
import grpo  # noqa: F401
import sft  # noqa: F401
from lib.policy import Policy

vllm.LLM  # imported at its first use: all of this is what takes long
vllm.platforms.cpu.GiB_bytes //= 4  # its smallest cache takes a second to clear in every run


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(what, n, k):
    """Have this process die at a place, see "kill" above."""
    if what == "sync":
        die_in_sync(n, k)
    else:
        die_in_save(n)


def die_in_sync(n, k):
    weights = Policy.weights
    syncs = 0

    def deadly_weights(self, dtype=None):
        nonlocal syncs
        syncs += 1
        for i, named in enumerate(weights(self, dtype)):
            if (syncs, i) == (n, k):
                die()
            yield named

    Policy.weights = deadly_weights


def die_in_save(n):
    save = torch.save
    tensors = 0

    def deadly_save(*args, **settings):
        nonlocal tensors
        tensors += 1
        if tensors == n:
            die()
        save(*args, **settings)

    torch.save = deadly_save


def run_rank(order, rank, port):
    """One rank of a run, as `python script ...` or torchrun would have it. -> exit status"""
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(order["env"])
    if order["ranks"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(order["ranks"]),
            "LOCAL_WORLD_SIZE": str(order["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if order["kill"]:
        arm(*order["kill"])
    sys.argv = order["argv"]
    script = ROOT / sys.argv[0]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
            return 1
        return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main():
    for line in sys.stdin:
        order = json.loads(line)
        port = free_port()
        children = []
        for rank in range(order["ranks"]):
            child = os.fork()
            if child == 0:
                # As any script ends: its threads are waited for, its exit functions run.
                sys.exit(run_rank(order, rank, port))
            children.append(child)
        print(*children, flush=True)

        status = 0
        while children:
            child, ended = os.wait()
            children.remove(child)
            status = status or os.waitstatus_to_exitcode(ended)
            if status:  # one rank's end is the others', as under torchrun
                for other in children:
                    os.kill(other, signal.SIGTERM)
        print(status, flush=True)


main()
