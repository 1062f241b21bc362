"""Lives of scripts: imports torch and vLLM once, which takes longer than most tests, and then forks a process, or
one for each rank, for every line of JSON that comes in. Two lines go out: the process ids when such a life has
begun, the exit status when it has ended (negative for a signal; of several ranks, of the first that failed).

    {"argv": [script, ...], "ranks": 1, "env": {...}, "out": FILE, "err": FILE, "kill": [what, n, k] or null}

kill: SIGKILL from inside, at a place that a clock would hardly hit: ["sync", n, k] before the k-th tensor of
the n-th sync, ["save", n, 0] before the n-th tensor that a checkpoint writes.
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
import policy as P
import sft  # noqa: F401

vllm.LLM                                    # imported at its first use: all of this is what takes long
vllm.platforms.cpu.GiB_bytes //= 4          # its smallest cache takes a second to clear in every life


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(what, n, k):
    weights, save, seen = P.Policy.weights, torch.save, [0]

    def deadly_weights(self, dtype=None):
        seen[0] += 1
        for i, named in enumerate(weights(self, dtype)):
            if (seen[0], i) == (n, k):
                die()
            yield named

    def deadly_save(*args, **kw):
        seen[0] += 1
        if seen[0] == n:
            die()
        save(*args, **kw)

    if what == "sync":
        P.Policy.weights = deadly_weights
    else:
        torch.save = deadly_save


def live(life, rank, port):
    """One rank's life, as `python script ...` or torchrun would have it. -> exit status"""
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(life[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(life["env"])
    if life["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(life["ranks"]),
                       "LOCAL_WORLD_SIZE": str(life["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if life["kill"]:
        arm(*life["kill"])
    sys.argv = life["argv"]
    sys.path[:0] = [str((ROOT / life["argv"][0]).parent)]
    try:
        runpy.run_path(str(ROOT / life["argv"][0]), run_name="__main__")
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return 1 if isinstance(e.code, str) else e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    life = json.loads(line)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(life["ranks"]):
        children.append(os.fork())
        if children[-1] == 0:
            sys.exit(live(life, rank, port))      # as any script: threads are waited for, exit functions run
    print(*children, flush=True)
    status = 0
    while children:
        child, ended = os.wait()
        children.remove(child)
        status = status or os.waitstatus_to_exitcode(ended)
        if status:                              # one rank's end is the others', as under torchrun
            for other in children:
                os.kill(other, signal.SIGTERM)
    print(status, flush=True)
