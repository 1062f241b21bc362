"""
Does `Engine.generate` cost more than vLLM's own `LLM.generate`?

    OMP_NUM_THREADS=2 python bench/sampling.py

One engine, the same token ids, seeds and lengths, in one process alternately, with an empty prefix cache each
time. vLLM is measured twice: with the log-probs that a trainer needs, as ours, and without.
"""
import random
import statistics
import tempfile

import common
import ranks as R
from files import Flags
from engine import Engine, seed_of


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--prompt", type=int, default=300, help="tokens of every prompt")
    arg("--answer", type=int, default=90, help="tokens of every answer")
    arg("--pairs", type=int, default=16, help="prompts")
    arg("--group", type=int, default=7, help="answers to each")
    arg("--model", help="folder of a model; default: a random one of 6 layers x 256")
    arg("--dtype", default="float32", help="of the computation")
    arg("--turns", type=int, default=7, help="turns of each, after one that warms up")
    arg("--json", help="where the numbers go; default: runs/bench/sampling.json")
    args = ap.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            common.write_model(folder, args.prompt + args.answer)
        R.start_ranks()
        engine = Engine(args.model or folder, args.prompt + args.answer, args.dtype, memory=0.5)
    rng = random.Random(0)
    prompts = [[rng.randrange(260, 400) for _ in range(args.prompt)] for _ in range(args.pairs)]
    prompts = [p for p in prompts for _ in range(args.group)]
    seeds = [seed_of(0, i) for i in range(len(prompts))]

    def ours():
        return [s.tokens for s in engine.generate(prompts, seeds, args.answer)]

    def raw(logprobs):
        params = [engine.vllm.SamplingParams(temperature=1.0, seed=s, logprobs=logprobs, detokenize=False,
                                             max_tokens=args.answer) for s in seeds]
        done = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(d.outputs[0].token_ids) for d in done]

    def timed(sample):
        engine.reset_cache()
        start = common.clock()
        texts = sample()
        return common.clock() - start, texts

    ways = {"ours": ours, "vLLM": lambda: raw(0), "vLLM, no log-probs": lambda: raw(None)}
    runs = {name: lambda way=way: timed(way) for name, way in ways.items()}
    warm = {name: run()[1] for name, run in runs.items()}
    assert len({str(texts) for texts in warm.values()}) == 1, "the ways sampled different texts"
    seconds = {name: [s for s, _ in turns] for name, turns in common.alternate(runs, args.turns).items()}

    tokens = sum(map(len, warm["ours"]))
    rows = [{"": name, "s": statistics.median(s), "fastest": min(s), "slowest": max(s),
             "tokens/s": tokens / statistics.median(s)} for name, s in seconds.items()]
    ratio = lambda name: common.spread([a / b for a, b in zip(seconds["ours"], seconds[name])])
    common.report("sampling", args, rows,
                  [f"ours / {name}, seconds of each turn: {ratio(name)}" for name in list(ways)[1:]])


if __name__ == "__main__":
    main()
