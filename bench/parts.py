"""
What do the parts cost, each by itself?

    python bench/parts.py training        # how do time and memory of a pass grow with group, answers, ranks?
    python bench/parts.py sampling        # does Engine.generate cost more than vLLM's own LLM.generate?
    python bench/parts.py evaluation --model runs/demo/grpo/model --answer 56
    python bench/parts.py sync            # what does it cost to give the engine the trainer's weights?
    python bench/parts.py logprobs        # what do log-probs over a large vocabulary cost?
    python bench/parts.py loading         # how much host memory does loading take, over all ranks?
    python bench/parts.py prepare         # data/prepare.py on made-up rows: does memory stay flat?
    python bench/parts.py recompute       # all numbers of a made-up evaluation, with their intervals

The model is a random one unless named, every case a fresh process. Extra memory is the peak beyond what was
held before; "/this" is the first way over the row's.
"""
import gc
import inspect
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
from functools import partial

import torch

import common       # which finds the others
import benchmarks
import packing
import policy as P
import ranks as R
import report
from askers import Answer, Local
from engine import Engine, seed_of
from eval import line_of
from files import Flags, write_lines
from rubrics import Pair, chat_messages, encode, prompt_form, read_pairs


def training(args, ranks, answer, group):
    """score is a pass without gradient (the old log-probs, or the reference's); update is forward, backward
    and optimizer step, and has the extra memory: the slowest rank's seconds, the largest memory. `shared`
    computes a prompt once for all of its answers, as grpo.py does, `separate` once for each.

    "of rate" is the floor's share of a pass: the matrix products that it cannot do without (a backward pass
    has twice those of a forward pass), at the rate at which this machine multiplies large matrices of this
    type, all ranks at a time."""
    rank, _, device = R.start_ranks()
    policy = P.load(args.model, device, P.DTYPES[args.dtype], recompute=False)
    optim, rng = P.adamw(policy, 1e-6, (0.9, 0.999), 0.01), random.Random(0)
    rate, = R.all_sum([matrix_rate(device, P.DTYPES[args.dtype])])
    ids = lambda n: [rng.randrange(260, 400) for _ in range(n)]
    shared = [(ids(args.prompt), [ids(answer) for _ in range(group)]) for _ in range(args.pairs)][rank::ranks]
    layouts = {"shared": shared, "separate": [(p, [r]) for p, rs in shared for r in rs]}
    micros = {name: packing.level(packing.pack(g, 16384, device), device) for name, g in layouts.items()}
    turns = common.alternate({name: partial(one_pass, policy, optim, m) for name, m in micros.items()},
                             args.turns + 1)
    for name, (_, *results) in turns.items():
        score, update, gb = R.all_max([statistics.median(x) for x in zip(*results)])
        tokens, needed = R.all_sum([sum(len(b.tokens) for b in micros[name]),
                                    sum(products(policy.lm, b) for b in micros[name])])
        yield {"way": name, "tokens": int(tokens), "score s": score, "update s": update, "extra GB": gb,
               "score of rate": needed / score / rate, "update of rate": 3 * needed / update / rate,
               "TFLOP/s": rate / 1e12}
    R.barrier()


def matrix_rate(device, dtype):
    """Operations a second of this rank in products of large matrices, the ranks all at it together."""
    n = 8192 if common.CUDA else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / statistics.median(common.timed(torch.matmul, a, b)[0] for _ in range(10))


def products(lm, batch):
    """Operations in the matrix products of a forward pass: the blocks for every token, the head for every
    response token, attention for every key that a query sees."""
    heads, keys = lm.model.layers[0].self_attn.q_proj.weight.shape[0], int((batch.positions + 1).sum())
    blocks = sum(p.numel() for p in lm.model.layers.parameters() if p.ndim == 2)
    return (2 * blocks * len(batch.tokens) + 2 * lm.lm_head.weight.numel() * len(batch.src)
            + 4 * heads * len(lm.model.layers) * keys)


def one_pass(policy, optim, micros):
    """-> seconds to score, seconds of an update, GB"""
    start = common.clock()
    with torch.no_grad():
        for b in micros:
            policy(b)
    score = common.clock() - start
    extra, start = common.extra_gb(), common.clock()
    for b in micros:
        policy(b).sum().mul(1e-4 * b.real).backward()
    P.optimizer_step(policy, optim, 1e-6, 1.0)
    return score, common.clock() - start, extra()


def peer(args, ranks, answer, group):
    """TRL's row: the score (the reference's pass) and learn phases of whole steps, all samples at once."""
    steps, (tokenizer, _) = args.turns + 1, P.load_tokenizer(args.model)
    with tempfile.NamedTemporaryFile() as f:
        common.write_prompts(f.name, tokenizer, args.pairs * steps, args.prompt)
        _, *rows = common.run(args.trl, ranks, args.threads, "bench/trl_peer.py", json.dumps(dict(
            kind="grpo", model=args.model, data=f.name, dtype=args.dtype, steps=steps, pairs=args.pairs,
            group=group, max_response=answer, parts=1)))
    median = lambda k: statistics.median(row[k] for row in rows)
    return {"way": "TRL", "tokens": int(median("tokens")), "score s": median("seconds_score"),
            "update s": median("seconds_learn"), "extra GB": median("learn_gb")}


def race(engine, ways, turns, unit, count=None):
    """Ways to do the same, in turn, after a turn that warms up. count: `unit`s in each, else its tokens."""
    def afresh(way):
        engine.reset_cache()
        return common.timed(way)

    results = common.alternate({name: partial(afresh, way) for name, way in ways.items()}, turns + 1)
    warm = [first[1] for first, *_ in results.values()]
    assert all(texts == warm[-1] for texts in warm if texts), "the ways sampled different texts"
    count = count or sum(map(len, warm[-1]))
    seconds = {name: [s for s, _ in some[1:]] for name, some in results.items()}
    for name, s in seconds.items():
        yield {"way": name, "s": statistics.median(s), "fastest": min(s), "slowest": max(s),
               f"{unit}/s": count / statistics.median(s), "ours/this": common.ratio(seconds["ours"], s)}


def raw(engine, prompts, seeds, answer, logprobs=None, stop=()):
    """One call of vLLM's own."""
    params = [engine.vllm.SamplingParams(
        temperature=1.0, seed=seed, logprobs=logprobs, detokenize=False, stop_token_ids=list(stop),
        max_tokens=min(answer, engine.max_len - len(prompt))) for prompt, seed in zip(prompts, seeds)]
    done = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(d.outputs[0].token_ids) for d in done]


def sampling(args, answer, group):
    """One engine, the same token ids, seeds and lengths, alternately, with an empty prefix cache each time;
    vLLM with the log-probs that a trainer needs, as ours, and without."""
    R.start_ranks()
    engine, rng = Engine(args.model, args.prompt + answer, args.dtype, memory=0.5), random.Random(0)
    prompts = [[rng.randrange(260, 400) for _ in range(args.prompt)] for _ in range(args.pairs)]
    prompts = [p for p in prompts for _ in range(group)]
    seeds = [seed_of(0, i) for i in range(len(prompts))]
    ways = {"ours": lambda: [s.tokens for s in engine.generate(prompts, seeds, answer)],
            "vLLM": lambda: raw(engine, prompts, seeds, answer, 0),
            "vLLM, no log-probs": lambda: raw(engine, prompts, seeds, answer)}
    return race(engine, ways, args.turns, "tokens")


def evaluation(args, answer):
    """The same for `askers.Local` with all that eval.py does to an answer: decode, parse, write a line."""
    pairs, judge = read_pairs(args.data), Local(args.model, answer, None, args.dtype)
    form = prompt_form(judge.folder, args.model, default="instruct")
    chats = [chat_messages(p, *form) for p in pairs]
    ids, seeds = [encode(judge.tokenizer, c) for c in chats], [seed_of(0, p.id, 0, 1.0, 0) for p in pairs]

    def ours():
        with tempfile.TemporaryFile("w") as f:
            for at, a in judge.answers((c, s, 1.0) for c, s in zip(chats, seeds)):
                print(json.dumps(line_of(a, pairs[at], chats[at])), file=f, flush=True)

    ways = {"ours": ours, "vLLM": lambda: raw(judge.engine, ids, seeds, answer, stop=judge.stop)}
    return race(judge.engine, ways, args.turns, "judgments", len(pairs))


def sync(args):
    """fp32 weights in the trainer, as in training, and an engine in --dtype."""
    *_, device = R.start_ranks()
    policy, dtype = P.load(args.model, device, torch.float32), P.DTYPES[args.dtype]
    engine = Engine(args.model, 512, args.dtype, weights="dummy", memory=0.5)
    engine.sync(policy, dtype)                                  # the first one also allocates
    engine.sleep()
    seconds, extra = [], common.extra_gb()
    for _ in range(args.turns):
        seconds.append(common.timed(engine.sync, policy, dtype)[0])
        engine.sleep()
    n, s = sum(p.numel() for p in policy.parameters()), statistics.median(seconds)
    gb = n * dtype.itemsize / 2**30
    yield {"parameters (M)": n / 1e6, "s": s, "fastest": min(seconds), "slowest": max(seconds), "GB": gb,
           "GB/s": gb / s, "extra GB": extra()}


def logprobs(args, tokens, way):
    """Forward and backward through the head only: hidden states in, gradients of hidden states and head out,
    less these two gradients, which every way has to give. Chunked is policy.py's; the plain way makes one
    tensor of all logits, its fp32 log-softmax, and gathers."""
    words, device = args.vocab or 152064, "cuda" if common.CUDA else "cpu"
    make = lambda *shape: torch.randn(*shape, device=device, dtype=P.DTYPES[args.dtype])
    torch.manual_seed(0)
    states = make(tokens, args.hidden).requires_grad_()
    head = make(words, args.hidden).mul_(args.hidden ** -0.5).requires_grad_()
    targets = torch.randint(words, (tokens,), device=device)
    extra, start = common.extra_gb(), common.clock()
    if way == "chunked":
        logp = P.TokenLogProbs.apply(states, head, targets, 1.0, None)
    else:
        logp = (states @ head.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    logp.sum().backward()
    seconds, gradients = common.clock() - start, (states.nbytes + head.nbytes) / 2**30
    yield {"words": words, "s": seconds, "GB": extra() - gradients, "logp": logp.mean().item()}


def loading(args, ranks):
    """Every rank reads a bf16 model from disk into fp32 shards. What the ranks hold together when it is done,
    and the most they ever held, beyond what they held before, over the size of the fp32 weights. Pages of the
    file are counted apart: the kernel takes them back when it needs them."""
    *_, device = R.start_ranks()
    P.load(args.model, device, torch.float32)         # what this imports and allocates once is not counted
    gc.collect()                                      # modules refer to themselves
    extra, own, done = common.extra_gb(), [common.of_process("RssAnon")], threading.Event()

    def look():                                       # the kernel keeps no mark of this one
        while not done.wait(0.002):
            own.append(common.of_process("RssAnon"))

    threading.Thread(target=look, daemon=True).start()
    seconds, policy = common.timed(P.load, args.model, device, torch.float32)
    done.set()
    own.append(common.of_process("RssAnon"))
    gb = 4 * sum(p.numel() for p in policy.parameters()) / 2**30
    held, peak, with_pages = R.all_sum([own[-1] - own[0], max(own) - own[0], extra()])
    yield {"fp32 GB": gb, "s": seconds, "held / size": held / gb, "peak / size": peak / gb,
           "with pages of the file": with_pages / gb}
    R.barrier()


def prepare(args):
    """Preference rows of about 1,500 characters: a quarter of them, then all."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    text = lambda n: " ".join(rng.choices(words, k=n))
    # Through a small process: a child's mark of memory begins at what its parent holds.
    small = ("import resource as r, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); "
             """print('{"kB": %d}' % r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss)""")
    more = ["--tokenizer", args.tokenizer] if args.tokenizer else []
    for rows in (20000, 80000):
        with tempfile.TemporaryDirectory() as folder:
            write_lines(f"{folder}/rows.jsonl", (json.dumps(
                {"prompt": text(50), "chosen": text(100), "rejected": text(100)}) for _ in range(rows)))
            seconds, (peak,) = common.timed(
                common.run, sys.executable, 1, 1, "-c", small, sys.executable, "data/prepare.py", *more,
                "--out", folder, "--source", f"{folder}/rows.jsonl")
        yield {"rows": rows, "s": seconds, "rows/s": rows / seconds, "peak MB": peak["kB"] / 1024}


def recompute(args):
    """A RewardBench run of 100,000 judgments, five a comparison, of 1,500 characters each."""
    pair = {"bench": "rewardbench", "compare": [0, 1], "context": [], "a": "x" * 500, "b": "y" * 500,
            "swap": False, "label": "A"}
    line = {"order": 0, "swap": False, "temperature": 1.0, "label": "A"} | line_of(
        Answer("z" * 1500, "stop", 300, 900), Pair("", [], pair["a"], pair["b"], "A"), [])
    subsets = [subset for chapter in benchmarks.REWARDBENCH.values() for subset in chapter]
    keys = [f"rewardbench/{subsets[n % len(subsets)]}/{n}/0-1" for n in range(20000)]
    with tempfile.TemporaryDirectory() as folder:
        write_lines(f"{folder}/config.json", ["{}"])
        write_lines(f"{folder}/pairs.jsonl", (
            json.dumps(pair | {"id": key, "item": key, "subset": key.split("/")[1]}) for key in keys))
        write_lines(f"{folder}/judgments.jsonl", (
            json.dumps(line | {"id": key, "vote": vote, "verdict": "AB"[(n * 7 + vote) % 3 == 0]})
            for n, key in enumerate(keys) for vote in range(5)))
        read, run = common.timed(report.read_run, folder)
        numbers, _ = common.timed(report.measure, run)
    yield {"judgments": len(run["judgments"]), "read s": read, "numbers s": numbers}


def main():
    parts = training, sampling, evaluation, sync, logprobs, loading, prepare, recompute
    parts = {part.__name__: part for part in parts}
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("part", choices=parts)
    arg("--model", help="its folder; default: a random one")
    arg("--data", default="runs/demo/data/test.jsonl", help="evaluation: file of pairs")
    arg("--answer", type=int, nargs="+", default=[90], help="tokens of every answer; evaluation: the most")
    arg("--group", type=int, nargs="+", default=[7], help="training, sampling: answers to each prompt")
    arg("--tokens", type=int, nargs="+", default=[512, 2048], help="logprobs: response tokens")
    arg("--ways", dest="way", nargs="+", choices=("chunked", "plain"), default=["chunked", "plain"],
        help="logprobs: at 152,064 words the plain way wants 2.4 GB for 1,000 tokens")
    arg("--tokenizer", help="prepare: count tokens with this one")
    arg("--case", type=json.loads, help="for its own use")
    common.flags(arg)
    args = ap.parse_args()
    part = parts[args.part]
    if args.case is not None:
        return R.run(lambda: [R.print0(json.dumps(row)) for row in part(args, **args.case)])
    # What a part takes are flags of several values: all of their combinations are a case each.
    _, *axes = inspect.signature(part).parameters
    rows, cases = [], [dict(zip(axes, case)) for case in itertools.product(*(vars(args)[k] for k in axes))]
    with tempfile.TemporaryDirectory() as folder:
        if not args.model and args.part not in ("logprobs", "prepare", "recompute"):
            common.write_model(folder, max(512, args.prompt + max(args.answer)), args)
        args.model = args.model or folder
        for case in cases:
            print(case, file=sys.stderr, flush=True)
            rows += [case | row for row in common.run(
                sys.executable, case.get("ranks", 1), args.threads, __file__, *sys.argv[1:],
                "--model", args.model, "--case", json.dumps(case))]
            if args.part == "training" and args.trl and case["ranks"] == 1:
                rows.append(case | peer(args, **case))
    for row in rows if args.part in ("training", "logprobs") else ():
        if row["way"] == rows[0]["way"]:                        # the first of the ways to do the same
            first = row
        assert abs(first.get("logp", 0) - row.get("logp", 0)) < 0.02, "the ways disagree"
        row |= {f"{first['way']}/this: {k}": first[k] / row[k]
                for k in ("score s", "update s", "extra GB", "s", "GB") if k in row}
    common.report(rows, args.trl)


if __name__ == "__main__":
    main()
