"""Lives to be ended, for test_survival.py: imports torch and vLLM once, then forks a process that runs a
script's main() for every line of JSON that comes in. One line goes out when such a life has begun (its
process id), and one when it has ended (its exit status, negative for a signal).

    {"script": "grpo", "argv": [...], "log": FILE, "kill": [what, n, k] or null}

kill: SIGKILL from inside, at a place that a clock would hardly hit: ["sync", n, k] before the k-th tensor of
the n-th sync, ["save", n, 0] before the n-th tensor that a checkpoint writes.
"""
import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import torch
import vllm.model_executor.models.qwen2
import vllm.v1.worker.cpu_worker  # noqa: F401

import grpo  # noqa: F401
import policy as P
import sft  # noqa: F401

vllm.LLM                                    # imported at its first use: all of this is what takes long


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


for line in sys.stdin:
    life = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(life["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        if life["kill"]:
            arm(*life["kill"])
        sys.argv = [life["script"], *life["argv"]]
        try:
            importlib.import_module(life["script"]).main()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
