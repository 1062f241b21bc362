"""
Is the evaluation as fast as vLLM itself, and are its numbers recomputed in seconds?

    python bench/eval_throughput.py --model runs/demo/grpo/model --data runs/demo/data/test.jsonl
    python bench/eval_throughput.py --recompute 100000

Alternates between `rmr1.Local` with everything that `eval.py` does to an answer (decode, parse, write a line)
and one `LLM.generate` call of vLLM on the same token ids with the same seeds, in one process, and prints
medians and their ratio.
"""
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import benchmarks as B
import eval as E
from files import Flags, fail
from askers import Local
from engine import seed_of
from rubrics import chat_messages, encode, prompt_form, read_pairs


def throughput(args):
    pairs = read_pairs(args.data)[:args.pairs]
    judge = Local(args.model, args.max_tokens, args.max_len, "float32")
    form = prompt_form(judge.folder, args.model, args.protocol)
    chats = [chat_messages(p, *form) for p in pairs]
    mine = [(p, 0, False, 1.0, 0) for p in pairs]
    ids = [encode(judge.tokenizer, c) for c in chats]
    seeds = [seed_of(0, p.id, 0, 1.0, 0) for p in pairs]
    params = [judge.engine.vllm.SamplingParams(temperature=1.0, seed=s, stop_token_ids=judge.stop,
                                               detokenize=False,
                                               max_tokens=min(args.max_tokens, judge.window - len(i)))
              for s, i in zip(seeds, ids)]

    def ours():
        with open(Path(tempfile.gettempdir()) / "eval_throughput.jsonl", "w") as f:
            for at, a in judge.answers((c, s, 1.0) for c, s in zip(chats, seeds)):
                f.write(json.dumps(E.line_of(a, mine[at][0], chats[at])) + "\n")
                f.flush()

    def raw():
        judge.engine.llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)

    seconds = {"ours": [], "raw": []}
    for turn in range(args.repeats + 1):
        for name, run in (("ours", ours), ("raw", raw)) if turn % 2 else (("raw", raw), ("ours", ours)):
            judge.engine.reset_cache()
            start = time.perf_counter()
            run()
            if turn:                                     # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    ours, raw = (len(pairs) / statistics.median(seconds[k]) for k in ("ours", "raw"))
    ratios = [r / o for r, o in zip(seconds["raw"], seconds["ours"])]
    print(f"{len(pairs)} judgments, medians of {args.repeats}: eval {ours:.1f}/s, raw vLLM {raw:.1f}/s, "
          f"ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


def recompute(count):
    """A made-up RewardBench run of `count` judgments, five votes a comparison, of 1,500 characters each."""
    subsets = [s for c in B.REWARDBENCH.values() for s in c]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "config.json").write_text("{}")
        with open(out / "pairs.jsonl", "w") as f, open(out / "judgments.jsonl", "w") as g:
            for n in range(count // 5):
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
        run = E.read_run(out)
        read = time.perf_counter() - start
        E.measure(run)
        print(f"{len(run['judgments']):,} judgments: read in {read:.1f} s, every number with its interval in "
              f"{time.perf_counter() - start - read:.1f} s")


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--model", help="folder of a judge")
    arg("--data", help="file of pairs")
    arg("--protocol", help="prompt form, for a model without a judge.json")
    arg("--pairs", type=int, default=500, help="how many of them")
    arg("--max-tokens", type=int, default=56, help="longest judgment")
    arg("--max-len", type=int, default=100, help="window")
    arg("--repeats", type=int, default=7, help="turns of each")
    arg("--recompute", type=int, help="instead: recompute the numbers of so many judgments")
    args = ap.parse_args()
    if not args.recompute and not (args.model and args.data):
        fail("name a judge and its pairs: --model and --data (or --recompute)")
    recompute(args.recompute) if args.recompute else throughput(args)


if __name__ == "__main__":
    main()
