"""
What do the parts of a run cost, each by itself?

    python bench/parts.py sampling        # does Engine.generate cost more than vLLM's own LLM.generate?
    python bench/parts.py evaluation --model runs/demo/grpo/model --data runs/demo/data/test.jsonl
    python bench/parts.py sync            # what does it cost to give the engine the trainer's weights?
    python bench/parts.py logprobs        # what do log-probs over a large vocabulary cost?
    python bench/parts.py logprobs --hidden 3584 --dtype bfloat16 --vocab 152064 \\
        --tokens 512 1024 16384 --plain-gb 12                       # the width of a 7B model
    python bench/parts.py loading         # how much host memory does loading take, over all ranks?

Every case is a fresh process. Extra memory is the peak beyond what was held before.

**sampling**: one engine, the same token ids, seeds and lengths, alternately, with an empty prefix cache each
time. vLLM is measured twice: with the log-probs that a trainer needs, as ours, and without. **evaluation** is
the same for `askers.Local` with all that eval.py does to an answer: decode, parse, write a line.

**sync**: a random Qwen2 of each size, fp32 weights in the trainer, as in training, and an engine in --dtype.
Its share of a GRPO step is the column `sync` of step.py.

**logprobs**: forward and backward through the head only: hidden states in, gradients of hidden states and
head out, less these two gradients, which every way has to give. Chunked is policy.py's TokenLogProbs; the
plain way makes one tensor of all logits, its fp32 log-softmax, and gathers, unless it would not fit.

**loading**: a random Qwen2 (bf16, saved to disk first) is read into fp32 shards by every rank. What the ranks
hold together when it is done, and the most they ever held, beyond what they held before, over the size of the
fp32 weights. Pages of the file are counted apart: the kernel takes them back when it needs them.
"""
import gc
import json
import random
import shutil
import statistics
import tempfile
import threading
from pathlib import Path

import common

import torch

import policy as P
import ranks as R
from engine import Engine, seed_of
from files import Flags, fail

# layers, width, vocabulary: with tied embeddings about 5, 100, 500 and 1,500 million parameters
SIZES = {"5M": (6, 256, None), "100M": (12, 512, 152064), "500M": (24, 1024, 152064),
         "1.5B": (28, 1920, 152064)}


def race(engine, ways, repeats, unit, count):
    """Ways to do the same, in turn, after a turn that warms up. count: `unit`s in each, None: its tokens."""
    def timed(way):
        engine.reset_cache()
        start = common.clock()
        texts = way()
        return common.clock() - start, texts

    runs = {name: lambda way=way: timed(way) for name, way in ways.items()}
    turns = common.alternate(runs, repeats + 1)
    warm = [first[1] for first, *_ in turns.values()]
    assert all(texts == warm[-1] for texts in warm if texts), "the ways sampled different texts"
    count = count or sum(map(len, warm[-1]))
    seconds = {name: [s for s, _ in results[1:]] for name, results in turns.items()}
    for name, s in seconds.items():
        yield {"": name, "s": statistics.median(s), "fastest": min(s), "slowest": max(s),
               f"{unit}/s": count / statistics.median(s),
               "ours/this": common.spread([a / b for a, b in zip(seconds["ours"], s)])}


def raw(engine, prompts, seeds, limits, logprobs=None, stop=()):
    """One call of vLLM's own."""
    params = [engine.vllm.SamplingParams(temperature=1.0, seed=seed, logprobs=logprobs, detokenize=False,
                                         max_tokens=limit, stop_token_ids=list(stop))
              for seed, limit in zip(seeds, limits)]
    done = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(d.outputs[0].token_ids) for d in done]


def sampling(args):
    answer = args.answer or 90
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            common.write_model(folder, args.prompt + answer)
        R.start_ranks()
        engine = Engine(args.model or folder, args.prompt + answer, args.dtype, memory=0.5)
    rng = random.Random(0)
    prompts = [[rng.randrange(260, 400) for _ in range(args.prompt)] for _ in range(args.pairs or 16)]
    prompts = [p for p in prompts for _ in range(args.group)]
    seeds, limits = [seed_of(0, i) for i in range(len(prompts))], [answer] * len(prompts)
    ways = {"ours": lambda: [s.tokens for s in engine.generate(prompts, seeds, answer)],
            "vLLM": lambda: raw(engine, prompts, seeds, limits, 0),
            "vLLM, no log-probs": lambda: raw(engine, prompts, seeds, limits)}
    return race(engine, ways, args.turns, "tokens", None)


def evaluation(args):
    from askers import Local
    from eval import line_of
    from rubrics import chat_messages, encode, prompt_form, read_pairs
    pairs, answer = read_pairs(args.data)[:args.pairs or 500], args.answer or 56
    judge = Local(args.model, answer, args.max_len, args.dtype)
    form = prompt_form(judge.folder, args.model, args.protocol)
    chats = [chat_messages(p, *form) for p in pairs]
    ids, seeds = [encode(judge.tokenizer, c) for c in chats], [seed_of(0, p.id, 0, 1.0, 0) for p in pairs]
    limits = [min(answer, judge.window - len(i)) for i in ids]

    def ours():
        with tempfile.TemporaryFile("w") as f:
            for at, a in judge.answers((c, s, 1.0) for c, s in zip(chats, seeds)):
                f.write(json.dumps(line_of(a, pairs[at], chats[at])) + "\n")
                f.flush()

    ways = {"ours": ours, "vLLM": lambda: raw(judge.engine, ids, seeds, limits, stop=judge.stop)}
    return race(judge.engine, ways, args.turns, "judgments", len(pairs))


def sync(args, size):
    layers, hidden, vocab = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        common.write_model(folder, 512, layers, hidden, vocab, weights=False)
        *_, device = R.start_ranks()
        policy = P.load(f"{folder}/config.json", device, torch.float32)
        engine = Engine(folder, 512, args.dtype, weights="dummy", memory=0.5)
    engine.sync(policy, P.DTYPES[args.dtype])                   # the first one also allocates
    engine.sleep()
    seconds, memory = [], common.Memory().start()
    for _ in range(args.turns):
        start = common.clock()
        engine.sync(policy, P.DTYPES[args.dtype])
        seconds.append(common.clock() - start)
        engine.sleep()
    extra = memory.peak()
    n = sum(p.numel() for p in policy.parameters())
    gb = n * P.DTYPES[args.dtype].itemsize / 2**30
    yield {"": size, "parameters (M)": n / 1e6, "s": statistics.median(seconds), "fastest": min(seconds),
           "slowest": max(seconds), "GB": gb, "GB/s": gb / statistics.median(seconds), "extra GB": extra}


def logprobs(args, vocab, tokens, way):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = lambda *shape: torch.randn(*shape, device=device, dtype=P.DTYPES[args.dtype]).requires_grad_()
    torch.manual_seed(0)
    states, head = make(tokens, args.hidden), make(vocab, args.hidden)
    with torch.no_grad():
        head.mul_(args.hidden ** -0.5)
    targets = torch.randint(vocab, (tokens,), device=device)
    memory, start = common.Memory().start(), common.clock()
    if way == "chunked":
        logp = P.TokenLogProbs.apply(states, head, targets, 1.0, None)
    else:
        logp = (states @ head.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    logp.sum().backward()
    seconds, gradients = common.clock() - start, (states.nbytes + head.nbytes) / 2**30
    yield {"words": str(vocab), "tokens": str(tokens), f"{way} s": seconds,
           f"{way} GB": memory.peak() - gradients, f"{way} logp": logp.mean().item()}


def beside(rows):
    """The two ways of `logprobs` in one row."""
    both = {}
    for row in rows:
        both.setdefault((row["words"], row["tokens"]), {}).update(row)
    for row in both.values():
        if "plain s" in row:
            assert abs(row.pop("plain logp") - row["chunked logp"]) < 0.02, "the two ways disagree"
            row |= {"time": row["chunked s"] / row["plain s"], "memory": row["chunked GB"] / row["plain GB"]}
        del row["chunked logp"]
    return list(both.values())


def loading(args, size):
    rank, world, device = R.start_ranks()
    folder = Path(tempfile.gettempdir()) / f"loading-{size}"
    if rank == 0:
        tokenizer = common.write_model(folder / "made", 512, *SIZES[size], weights=False)
        tokenizer.save_pretrained(folder / "made")
    R.barrier()
    made = P.load(folder / "made/config.json", device, torch.bfloat16, trainable=False)
    P.save_model(made, folder / "made", folder / "model", torch.bfloat16)
    del made
    gc.collect()                                      # modules refer to themselves
    memory, most, done = common.Memory().start(), [0], threading.Event()
    before = memory.status("RssAnon")

    def look():                                       # the kernel keeps no mark of this one
        while not done.wait(0.002):
            most[0] = max(most[0], memory.status("RssAnon") - before)

    threading.Thread(target=look, daemon=True).start()
    start = common.clock()
    policy = P.load(folder / "model", device, torch.float32)
    seconds, peak, held = common.clock() - start, memory.peak(), memory.now()
    done.set()
    gb = 4 * sum(p.numel() for p in policy.parameters()) / 2**30
    peak, held, own = R.all_sum([peak, held, most[0]])
    if rank == 0:
        shutil.rmtree(folder)
        yield {"": size, "ranks": str(world), "fp32 GB": gb, "s": seconds, "held / size": held / gb,
               "peak / size": own / gb, "with pages of the file": peak / gb}
    R.barrier()


PARTS = {part.__name__: part for part in (sampling, evaluation, sync, logprobs, loading)}


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("part", choices=PARTS)
    arg("--model", help="sampling, evaluation: its folder; sampling: default a random one of 6 layers x 256")
    arg("--data", help="evaluation: file of pairs")
    arg("--protocol", help="evaluation: prompt form, for a model without a judge.json")
    arg("--max-len", type=int, default=100, help="evaluation: window")
    arg("--pairs", type=int, help="sampling, evaluation: prompts; default: 16, 500")
    arg("--prompt", type=int, default=300, help="sampling: tokens of every prompt")
    arg("--answer", type=int, help="sampling, evaluation: most tokens of an answer; default: 90, 56")
    arg("--group", type=int, default=7, help="sampling: answers to each prompt")
    arg("--sizes", nargs="+", choices=SIZES, help="sync, loading: parameters, roughly; 1.5B wants 16 GB")
    arg("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 16384], help="logprobs: response tokens")
    arg("--vocab", type=int, nargs="+", default=[32000, 152064], help="logprobs: words")
    arg("--hidden", type=int, default=256, help="logprobs: width of the hidden states")
    arg("--plain-gb", type=float, default=14, help="logprobs: memory that the plain way may take")
    arg("--dtype", choices=P.DTYPES, help="of the computation; default: float32, sync: bfloat16")
    arg("--turns", type=int, default=7, help="turns of each, after one that warms up")
    arg("--ranks", type=int, default=2, help="loading: how many")
    arg("--threads", type=int, default=2, help="of all ranks together")
    arg("--case", type=json.loads, help="for its own use")
    arg("--json", help="where the numbers go; default: runs/bench/PART.json")
    args = ap.parse_args()
    if args.part == "evaluation" and not (args.model and args.data):
        fail("name a judge and its pairs: --model and --data")
    args.dtype = args.dtype or ("bfloat16" if args.part == "sync" else "float32")
    if args.case is not None:
        return R.run(lambda: [R.print0(json.dumps(row)) for row in PARTS[args.part](args, **args.case)])
    cases = [{}]
    if args.part in ("sync", "loading"):
        sizes = ["5M", "100M", "500M"] if args.part == "sync" else ["500M"]
        cases = [{"size": size} for size in args.sizes or sizes]
    if args.part == "logprobs":                  # the plain way: logits, log-softmax, their gradients
        cases = [{"vocab": vocab, "tokens": tokens, "way": way}
                 for vocab in args.vocab for tokens in args.tokens for way in ("chunked", "plain")
                 if way == "chunked" or tokens * vocab * 4 * 4 / 2**30 < args.plain_gb]
    ranks = args.ranks if args.part == "loading" else 1
    rows = sum([common.again(ranks, args.threads, case) for case in cases], [])
    common.report(args.part, args, beside(rows) if args.part == "logprobs" else rows)


if __name__ == "__main__":
    main()
