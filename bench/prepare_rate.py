"""
How fast are pairs prepared, and does memory stay flat?

    python bench/prepare_rate.py --rows 80000 [--tokenizer runs/demo/data/model]

Writes made-up preference rows of about 1,500 characters and runs `data/prepare.py` on a quarter of them and
on all. """
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


def main():
    ap = Flags(__doc__)
    ap.add_argument("--rows", type=int, default=80000, help="rows of the larger file")
    ap.add_argument("--tokenizer", help="count tokens with this one")
    args = ap.parse_args()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    text = lambda n: " ".join(rng.choices(words, k=n))
    with tempfile.TemporaryDirectory() as folder:
        for rows in (args.rows // 4, args.rows):
            path = Path(folder) / f"{rows}.jsonl"
            with open(path, "w") as f:
                for _ in range(rows):
                    row = {"prompt": text(50), "chosen": text(100), "rejected": text(100)}
                    f.write(json.dumps(row) + "\n")
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, ROOT / "data/prepare.py", "--out", Path(folder) / "out", "--source", path,
                 *(["--tokenizer", args.tokenizer] if args.tokenizer else [])],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, _, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            print(f"{rows:,} rows: {seconds:.1f} s, {rows / seconds:,.0f} rows/s, "
                  f"at most {usage.ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
