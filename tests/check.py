"""
Is this machine sound? `make check`: on cards that have never run this code, or on a CPU.

    python tests/check.py                                                  # about ten minutes

The tests marked `check`, pointed at what is here: attention kernels, log-probs against transformers, weight
sync after sleep and wake, one rank against two, a killed run, tensor parallel (where there are two cards).
Then GRPO steps with random weights at the shapes of Qwen2.5-1.5B and 7B (on a CPU: one that it can bear),
timed. Prints a table, a line for docs/speed.md's table, and writes a JSON file to attach to a bug report.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "bench")]
import common
import pytest
import torch

from files import Flags

# name: (blocks, width, inner, heads, key heads, words), prompt, answer, pairs
SHAPES = {"1.5B": ((28, 1536, 8960, 12, 2, 151936), 1000, 700, 32),
          "7B": ((28, 3584, 18944, 28, 4, 152064), 1000, 700, 32),
          "5M": ((6, 256, 768, 8, 8, 437), 300, 90, 8)}


class Parts:
    """What a plugin hears of pytest's tests, gathered by the part that each belongs to."""

    def __init__(self):
        self.tests, self.seconds = defaultdict(list), defaultdict(float)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        part = item.get_closest_marker("check").args[0]
        self.seconds[part] += report.duration
        if report.when == "call" or report.outcome != "passed":
            why = report.longrepr[2] if report.skipped else str(report.longrepr or "")[-1500:]
            self.tests[part].append({"test": item.nodeid, "outcome": report.outcome, "why": why,
                                     "figures": dict(report.user_properties)})
            if report.failed:
                print(f"FAILED {item.nodeid}\n{why}", flush=True)

    def rows(self):
        for part, tests in self.tests.items():
            outcomes = [t["outcome"] for t in tests]
            figures = defaultdict(list)
            for t in tests:
                for k, v in t["figures"].items():
                    figures[k].append(v)
            said = [f"{k} {max(v):.2g}" for k, v in figures.items()]
            said += sorted({t["why"] for t in tests if t["outcome"] == "skipped"})
            yield {"": part, "result": "FAIL" if "failed" in outcomes else
                   "pass" if "passed" in outcomes else "skipped",
                   "tests": f"{outcomes.count('passed')} of {len(tests)}", "s": round(self.seconds[part]),
                   "figure": "; ".join(said)}


def speed(name, cards):
    """GRPO steps at a shape, by grpo.py itself on every card. 7B's sixteen bytes a parameter want eight cards
    or four blocks. -> row of seconds a step by phase, tokens a second, memory"""
    import toy
    from transformers import Qwen2Config
    (blocks, width, inner, heads, keys, words), prompt, answer, pairs = SHAPES[name]
    if name == "7B" and cards < 8:
        blocks, name = 4, "7B's width, 4 blocks"
    ranks = max(1, cards)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = toy.write_tokenizer(folder / "model")
        Qwen2Config(vocab_size=max(words, len(tokenizer)), hidden_size=width, num_hidden_layers=blocks,
                    num_attention_heads=heads, num_key_value_heads=keys, intermediate_size=inner,
                    max_position_embeddings=prompt + answer, tie_word_embeddings=name == "1.5B",
                    architectures=["Qwen2ForCausalLM"], bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id).save_pretrained(folder / "model")
        common.write_prompts(folder / "pairs.jsonl", tokenizer, 3 * pairs, prompt)
        steps = common.run_ours(
            "grpo.py", ranks, 2 if not cards else ranks * 4, model=folder / "model/config.json",
            data=folder / "pairs.jsonl", max_prompt=prompt, max_response=answer, pairs=pairs, mini=pairs,
            group=7, steps=3, reward="random", shard=ranks, **({} if cards else {"dtype": "float32"}))[1:]
    median = lambda k: statistics.median(s[k] for s in steps)
    return {"": f"GRPO step, {name}, prompt {prompt}, answer {answer}, {pairs} x 7, ranks: {ranks}",
            "result": "pass", "s/step": median("seconds"), "tokens/s": median("tokens_per_second"), "peak GB": median("peak_gb"),
            "gap": median("gap_mean")} | {k: median(f"seconds_{k}") for k in ("sample", "score", "learn", "sync")}


def main():
    ap = Flags(__doc__)
    ap.add_argument("--json", default="runs/check.json", help="where the report goes")
    ap.add_argument("--bench", action=argparse.BooleanOptionalAction, default=True, help="time GRPO steps too")
    args = ap.parse_args()
    cards, began, parts = torch.cuda.device_count(), time.monotonic(), Parts()
    print(f"{torch.cuda.get_device_name() if cards else 'no card: the CPU path'}, cards: {cards}", flush=True)
    bench = []                          # first, because tests leave things on the card until this process ends
    for name in (("1.5B", "7B") if cards else ("5M",)) if args.bench else ():
        print(f"timing {name}", flush=True)
        try:
            bench.append(speed(name, cards))
        except SystemExit as e:                    # common.run's: what a step that failed has said
            bench.append({"": f"GRPO step, {name}", "result": "FAIL", "figure": str(e.code)[-1500:]})
            print(f"FAILED timing {name}\n{bench[-1]['figure']}", flush=True)
    pytest.main(["-q", "--tb=no", "-m", "check", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[parts])
    rows = list(parts.rows())
    print()
    common.table(rows)
    if bench:
        common.table([{k: v for k, v in row.items() if k != "figure"} for row in bench])
    here = common.machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for row in (b for b in bench if "s/step" in b):
        print(f"\n| {row['']} | `make check` on {here['gpu'] or here['cpu']} | {row['s/step']:.3g} s (sample "
              f"{row['sample']:.2g}, score {row['score']:.2g}, learn {row['learn']:.2g}, sync {row['sync']:.2g}) "
              f"| {row['tokens/s']:,.0f} tokens/s, {row['peak GB']:.1f} GB |")
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k.startswith(("CUDA", "NCCL", "PYTORCH", "VLLM", "TORCH"))}
    path.write_text(json.dumps({
        "machine": here, "cards": cards, "commit": commit.stdout.strip(), "environment": environment,
        "table": rows, "bench": bench, "tests": parts.tests}, indent=2) + "\n")
    bad = [r[""] for r in rows + bench if r.get("result") == "FAIL"]
    print(f"\n{'sound' if not bad else 'NOT sound: ' + '; '.join(bad)}, in {time.monotonic() - began:.0f} s; "
          f"{path} has all of it, for a bug report")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
