"""
Is this machine sound? `make check`: on cards that have never run this code, or on a CPU.

    python tools/check.py         # 140 s on two CPU cores; not yet run on a card

Runs the tests marked `check` on what is here: attention kernels, log-probs against transformers, weight sync after
sleep and wake, one rank against two, a killed run, tensor parallel (where there are two cards). Times GRPO steps
with random weights at the shapes of Qwen2.5-1.5B and 7B, or on a CPU at a shape that it can bear. Prints a table and
a line for the table of docs/speed.md, and writes a JSON file to attach to a bug report.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT / folder) for folder in (".", "tests", "data", "bench")]
import pytest
import torch

import common
from lib.files import Flags, json_text, run_main


@dataclass
class Shape:
    """A model, and the size of a GRPO step that is timed with it. pairs: in one step"""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool
    prompt: int
    answer: int
    pairs: int


SHAPES = {
    "1.5B": Shape(28, 1536, 8960, 12, 2, 151936, True, prompt=1000, answer=700, pairs=32),
    "7B": Shape(28, 3584, 18944, 28, 4, 152064, False, prompt=1000, answer=700, pairs=32),
    "5M": Shape(6, 256, 768, 8, 8, 437, False, prompt=300, answer=90, pairs=8),
}


# ---------------------------------------------------------------- tests


class TestRecorder:
    """A plugin of pytest that collects the outcomes of tests by the part of the machine that they are about."""

    __test__ = False  # its name looks like a class of tests

    def __init__(self):
        self.tests = defaultdict(list)
        self.seconds = defaultdict(float)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        outcome = yield
        report = outcome.get_result()
        part = item.get_closest_marker("check").args[0]
        self.seconds[part] += report.duration
        if report.when != "call" and report.outcome == "passed":
            return  # a fixture
        why = report.longrepr[2] if report.skipped else str(report.longrepr or "")[-1500:]
        self.tests[part].append(
            {
                "test": item.nodeid,
                "outcome": report.outcome,
                "why": why,
                "figures": dict(report.user_properties),
            }
        )
        if report.failed:
            print(f"FAILED {item.nodeid}\n{why}", flush=True)

    def rows(self):
        """A row of the table for every part."""
        for part, tests in self.tests.items():
            outcomes = [test["outcome"] for test in tests]
            result = "pass" if "passed" in outcomes else "skipped"
            if "failed" in outcomes:
                result = "FAIL"
            yield {
                "": part,
                "result": result,
                "tests": f"{outcomes.count('passed')} of {len(tests)}",
                "s": round(self.seconds[part]),
                "figure": "; ".join(figures_of(tests)),
            }


def figures_of(tests):
    """The largest of each figure that the tests of a part have recorded, then why some were skipped."""
    values = defaultdict(list)
    for test in tests:
        for name, value in test["figures"].items():
            values[name].append(value)
    figures = [f"{name} {max(numbers):.2g}" for name, numbers in values.items()]
    return figures + sorted({test["why"] for test in tests if test["outcome"] == "skipped"})


def run_tests():
    recorder = TestRecorder()
    marked = ["-m", "check", "-p", "no:cacheprovider", str(common.ROOT / "tests")]
    pytest.main(["-q", "--tb=no", *marked], plugins=[recorder])
    return recorder


# ---------------------------------------------------------------- timing


def write_random_model(folder, shape, layers):
    """The config.json and the tokenizer of a random Qwen2. -> tokenizer"""
    from transformers import Qwen2Config

    import toy

    tokenizer = toy.write_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=max(shape.vocabulary, len(tokenizer)),
        hidden_size=shape.hidden,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        intermediate_size=shape.inner,
        max_position_embeddings=shape.prompt + shape.answer,
        tie_word_embeddings=shape.tied,
        architectures=["Qwen2ForCausalLM"],
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(folder)
    return tokenizer


def time_steps(name, cards):
    """GRPO steps at a shape, by grpo.py itself on every card.

    -> a row: seconds a step, in all and by phase, tokens a second, memory
    """
    shape = SHAPES[name]
    layers = shape.layers
    if name == "7B" and cards < 8:  # sixteen bytes a parameter need eight cards
        layers, name = 4, "7B's width, 4 blocks"
    ranks = max(1, cards)
    with tempfile.TemporaryDirectory() as folder:
        model, pairs = Path(folder) / "model", Path(folder) / "pairs.jsonl"
        tokenizer = write_random_model(model, shape, layers)
        common.write_prompts(pairs, tokenizer, 3 * shape.pairs, shape.prompt)
        steps = common.run_ours(
            "grpo.py",
            ranks,
            ranks * 4 if cards else 2,
            model=model / "config.json",
            data=pairs,
            max_prompt=shape.prompt,
            max_response=shape.answer,
            batch=shape.pairs,
            mini_batch=shape.pairs,
            group_size=7,
            steps=3,
            reward="random",
            shard=ranks,
            dtype="bfloat16" if cards else "float32",
        )

    def median(column):
        return statistics.median(step[column] for step in steps[1:])  # the first one warms up

    size = f"prompt {shape.prompt}, answer {shape.answer}, {shape.pairs} x 7"
    row = {
        "": f"GRPO step, {name}, {size}, ranks: {ranks}",
        "result": "pass",
        "s/step": median("seconds"),
        "tokens/s": median("tokens_per_second"),
        "peak GiB": median("peak_gib"),
        "mismatch": median("mismatch_mean"),
    }
    for phase in ("sample", "score", "learn", "sync"):
        row[phase] = median(f"seconds_{phase}")
    return row


def time_shapes(names, cards):
    """A row for every shape; one that fails says why."""
    rows = []
    for name in names:
        print(f"timing {name}", flush=True)
        try:
            rows.append(time_steps(name, cards))
        except SystemExit as e:  # common.run ends with the last lines of what a step printed
            why = str(e.code)[-1500:]
            rows.append({"": f"GRPO step, {name}", "result": "FAIL", "figure": why})
            print(f"FAILED timing {name}\n{why}", flush=True)
    return rows


# ---------------------------------------------------------------- the report


def print_speed(row, machine):
    """A line for the table of docs/speed.md."""
    phases = ", ".join(f"{name} {row[name]:.2g}" for name in ("sample", "score", "learn", "sync"))
    where = machine["gpu"] or machine["cpu"]
    print(
        f"\n| {row['']} | `make check` on {where} | {row['s/step']:.3g} s ({phases}) "
        f"| {row['tokens/s']:,.0f} tokens/s, {row['peak GiB']:.1f} GiB |"
    )


def write_report(path, **content):
    """Everything that a bug report needs, as JSON."""
    prefixes = ("CUDA", "NCCL", "PYTORCH", "VLLM", "TORCH")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=common.ROOT, capture_output=True, text=True
    )
    content["commit"] = commit.stdout.strip()
    content["environment"] = {
        name: value for name, value in os.environ.items() if name.startswith(prefixes)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(content, indent=2) + "\n")


def main():
    parser = Flags(__doc__)
    arg = parser.add_argument
    arg("--json", default="runs/check.json", help="where the report goes")
    arg("--bench", action=argparse.BooleanOptionalAction, default=True, help="time GRPO steps too")
    args = parser.parse_args()
    began = time.monotonic()
    cards = torch.cuda.device_count()
    card = torch.cuda.get_device_name() if cards else "no card: the CPU path"
    print(f"{card}, cards: {cards}", flush=True)

    shapes = ["1.5B", "7B"] if cards else ["5M"]
    # The steps come first, because tests leave things on the card until this process ends.
    speeds = time_shapes(shapes if args.bench else [], cards)
    recorder = run_tests()

    rows = list(recorder.rows())
    print()
    common.table(rows)
    if speeds:
        common.table([{k: v for k, v in row.items() if k != "figure"} for row in speeds])
    machine = common.machine()
    for row in speeds:
        if row["result"] == "pass":
            print_speed(row, machine)
    path = Path(args.json)
    write_report(
        path,
        machine=machine,
        cards=cards,
        table=rows,
        bench=speeds,
        tests=recorder.tests,
    )
    bad = [row[""] for row in rows + speeds if row["result"] == "FAIL"]
    verdict = "NOT sound: " + "; ".join(bad) if bad else "sound"
    seconds = time.monotonic() - began
    print(f"\n{verdict}, in {seconds:.0f} s; {path} has all of it, for a bug report")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_main(main)
