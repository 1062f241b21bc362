"""
How fast is what needs no model?

    python bench/text.py prepare --rows 80000 [--tokenizer runs/demo/data/model]
    python bench/text.py recompute --judgments 100000

**prepare**: made-up preference rows of about 1,500 characters through data/prepare.py, a quarter of them,
then all: does memory stay flat? **recompute**: eval.py's numbers with their intervals from a made-up
RewardBench run, five votes a comparison, of 1,500 characters each.
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT

from files import Flags


def prepare(args, folder):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    text = lambda n: " ".join(rng.choices(words, k=n))
    for rows in (args.rows // 4, args.rows):
        path = folder / f"{rows}.jsonl"
        with open(path, "w") as f:
            for _ in range(rows):
                row = {"prompt": text(50), "chosen": text(100), "rejected": text(100)}
                f.write(json.dumps(row) + "\n")
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, ROOT / "data/prepare.py", "--out", folder / "out", "--source", path,
             *(["--tokenizer", args.tokenizer] if args.tokenizer else [])],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, "data/prepare.py failed"
        seconds = time.perf_counter() - start
        print(f"{rows:,} rows: {seconds:.1f} s, {rows / seconds:,.0f} rows/s, "
              f"at most {usage.ru_maxrss / 1024:,.0f} MB")


def recompute(args, folder):
    import benchmarks as B
    import eval as E
    subsets = [s for c in B.REWARDBENCH.values() for s in c]
    (folder / "config.json").write_text("{}")
    with open(folder / "pairs.jsonl", "w") as f, open(folder / "judgments.jsonl", "w") as g:
        for n in range(args.judgments // 5):
            key = f"rewardbench/{subsets[n % 23]}/{n}/0-1"
            f.write(json.dumps({"id": key, "bench": "rewardbench", "item": key, "subset": subsets[n % 23],
                                "compare": [0, 1], "context": [], "a": "x" * 500, "b": "y" * 500,
                                "swap": False, "label": "A"}) + "\n")
            for vote in range(5):
                g.write(json.dumps({
                    "id": key, "order": 0, "swap": False, "temperature": 1.0, "vote": vote, "label": "A",
                    "verdict": "AB"[(n * 7 + vote) % 3 == 0], "reason": "", "official": "A",
                    "finish": "stop", "tokens": 300, "prompt_tokens": 900, "prompt": "0" * 16,
                    "type": "Chat", "rubric": [["Help", 60.0]], "quotes": [1, 2],
                    "text": "z" * 1500}) + "\n")
    start = time.perf_counter()
    run = E.read_run(folder)
    read = time.perf_counter() - start
    E.measure(run)
    print(f"{len(run['judgments']):,} judgments: read in {read:.1f} s, every number with its interval in "
          f"{time.perf_counter() - start - read:.1f} s")


def main():
    ap = Flags(__doc__)
    ap.add_argument("what", choices=("prepare", "recompute"))
    ap.add_argument("--rows", type=int, default=80000, help="prepare: rows of the larger file")
    ap.add_argument("--tokenizer", help="prepare: count tokens with this one")
    ap.add_argument("--judgments", type=int, default=100000, help="recompute: of so many judgments")
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"prepare": prepare, "recompute": recompute}[args.what](args, Path(folder))


if __name__ == "__main__":
    main()
