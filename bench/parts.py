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

The model is a random one unless named, and every case runs in a fresh process. Extra memory is the peak beyond what
was held before. "/this" is the first way over the row's.
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

import common  # first, because it makes the other modules importable
from eval import judgment_line
from judge import benchmarks, report
from judge.backends import Answer, LocalBackend
from lib import packing
from lib.chat import encode, load_tokenizer
from lib.dist import all_max, all_sum, barrier, print0, start_ranks
from lib.engine import Engine
from lib.files import Flags, run_main, seed_of, write_lines
from lib.pairs import Pair, read_pairs
from lib.policy import DTYPES, TokenLogProbs, adamw, load_policy, optimizer_step
from rubrics import chat_messages, prompt_style

# ---------------------------------------------------------------- training


def training(args, ranks, answer, group_size):
    """Seconds of the slowest rank, and the most memory of any.

    score   a pass without gradient: the old log-probs, or the reference's
    update  forward, backward and optimizer step; "extra GiB" is its memory
    shared  a prompt is computed once for all of its answers, as grpo.py does; separate: once for each

    "of rate" compares a pass with its floor, the matrix products that it cannot do without, at the rate at which
    this machine multiplies large matrices of this type, all ranks at a time. A backward pass has twice the
    products of a forward pass.
    """
    rank, _, device = start_ranks()
    dtype = DTYPES[args.dtype]
    policy = load_policy(args.model, device, dtype, recompute=False)
    optim = adamw(policy, 1e-6, (0.9, 0.999), 0.01)
    rate = all_sum([matrix_rate(device, dtype)])[0]
    batches = {}  # {way: micro-batches of this rank}
    for way, groups in layouts(args, rank, ranks, answer, group_size).items():
        packed = packing.pack(groups, 16384, device)
        batches[way] = packing.equalise(packed, packing.dummy_batch(device))

    runs = {way: partial(one_pass, policy, optim, batches[way]) for way in batches}
    turns = common.alternate(runs, args.turns + 1)
    for way in batches:
        columns = zip(*turns[way][1:])  # the first turn warms up
        score, update, gib = all_max([statistics.median(column) for column in columns])
        my_tokens = sum(len(batch.tokens) for batch in batches[way])
        my_products = sum(matrix_products(policy.lm, batch) for batch in batches[way])
        tokens, products = all_sum([my_tokens, my_products])
        yield {
            "way": way,
            "tokens": int(tokens),
            "score s": score,
            "update s": update,
            "extra GiB": gib,
            "score of rate": products / score / rate,
            "update of rate": 3 * products / update / rate,
            "TFLOP/s": rate / 1e12,
        }
    barrier()


def layouts(args, rank, ranks, answer, group_size):
    """This rank's part of the random groups that all ranks draw. -> {way: [(prompt, [response, ...]), ...]}"""
    rng = random.Random(0)

    def draw(count):
        return [rng.randrange(260, 400) for _ in range(count)]

    groups = []
    for _ in range(args.batch):
        groups.append((draw(args.prompt), [draw(answer) for _ in range(group_size)]))
    shared = groups[rank::ranks]
    separate = [(prompt, [response]) for prompt, responses in shared for response in responses]
    return {"shared": shared, "separate": separate}


def matrix_rate(device, dtype):
    """Operations a second of this rank in products of large matrices, while all ranks multiply."""
    n = 8192 if common.CUDA else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)  # (n, n) each
    seconds = [common.timed(torch.matmul, a, b)[0] for _ in range(10)]
    return 2 * n**3 / statistics.median(seconds)


def matrix_products(model, batch):
    """Operations in the matrix products of a forward pass: the blocks for every token, the head for every
    response token, attention for every key that a query sees."""
    layers = model.model.layers
    block_weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    attention_width = layers[0].self_attn.q_proj.weight.shape[0]
    keys_seen = int((batch.positions + 1).sum())
    in_blocks = 2 * block_weights * len(batch.tokens)
    in_head = 2 * model.lm_head.weight.numel() * len(batch.src)
    in_attention = 4 * attention_width * len(layers) * keys_seen
    return in_blocks + in_head + in_attention


def one_pass(policy, optim, batches):
    """-> seconds to score, seconds of an update, GiB"""
    start = common.clock()
    with torch.no_grad():
        for batch in batches:
            policy(batch)
    score = common.clock() - start

    extra = common.extra_gib()
    start = common.clock()
    for batch in batches:
        policy(batch).sum().mul(1e-4).backward()
    optimizer_step(policy, optim, 1e-6, 1.0)
    return score, common.clock() - start, extra()


def peer(args, ranks, answer, group_size):
    """TRL's row: the score phase (the reference's pass) and the learn phase of whole steps, all samples at once."""
    steps = args.turns + 1
    tokenizer, _ = load_tokenizer(args.model)
    with tempfile.NamedTemporaryFile() as f:
        common.write_prompts(f.name, tokenizer, args.batch * steps, args.prompt)
        settings = {
            "kind": "grpo",
            "model": args.model,
            "data": f.name,
            "dtype": args.dtype,
            "steps": steps,
            "batch": args.batch,
            "group_size": group_size,
            "max_response": answer,
            "parts": 1,
        }
        command = ["bench/trl_peer.py", json.dumps(settings)]
        _, *rows = common.run(args.trl, ranks, args.threads, *command)

    def median(column):
        return statistics.median(row[column] for row in rows)

    return {
        "way": "TRL",
        "tokens": int(median("tokens")),
        "score s": median("seconds_score"),
        "update s": median("seconds_learn"),
        "extra GiB": median("learn_gib"),
    }


# ---------------------------------------------------------------- sampling


def race(engine, ways, turns, unit, count=None):
    """Ways to do the same, {name: function}, in turn, each with an empty prefix cache.

    unit   what is counted for a rate: "tokens" of the texts that the ways return, or `count` of something else
    Yields a row for each way. The first turn warms up; its texts have to agree.
    """

    def run_afresh(way):
        engine.llm.reset_prefix_cache()
        return common.timed(way)

    runs = {name: partial(run_afresh, way) for name, way in ways.items()}
    results = common.alternate(runs, turns + 1)
    seconds, texts = {}, []
    for name, turns_of_way in results.items():
        texts.append(turns_of_way[0][1])
        seconds[name] = [turn[0] for turn in turns_of_way[1:]]
    assert all(some == texts[-1] for some in texts if some), "the ways sampled different texts"
    count = count or sum(len(text) for text in texts[-1])
    for name, turns in seconds.items():
        yield {
            "way": name,
            "s": statistics.median(turns),
            "fastest": min(turns),
            "slowest": max(turns),
            f"{unit}/s": count / statistics.median(turns),
            "ours/this": common.ratio(seconds["ours"], turns),
        }


def plain_vllm(engine, prompts, seeds, answer, logprobs=None, stop=()):
    """One call of vLLM's own. -> [token ids, ...]"""
    parameters = []
    for prompt, seed in zip(prompts, seeds):
        parameters.append(
            engine.vllm.SamplingParams(
                temperature=1.0,
                seed=seed,
                logprobs=logprobs,
                detokenize=False,
                stop_token_ids=list(stop),
                max_tokens=min(answer, engine.max_len - len(prompt)),
            )
        )
    inputs = [{"prompt_token_ids": list(map(int, prompt))} for prompt in prompts]
    outputs = engine.llm.generate(inputs, parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def sampling(args, answer, group_size):
    """One engine, the same token ids, seeds and lengths. vLLM with the log-probs that a trainer needs, as ours,
    and without."""
    start_ranks()
    engine = Engine(args.model, args.prompt + answer, args.dtype, memory=0.5)
    rng = random.Random(0)
    prompts = []
    for _ in range(args.batch):
        prompt = [rng.randrange(260, 400) for _ in range(args.prompt)]
        prompts += [prompt] * group_size
    seeds = [seed_of(0, place) for place in range(len(prompts))]

    def ours():
        return [list(sample.tokens) for sample in engine.generate(prompts, seeds, answer)]

    ways = {
        "ours": ours,
        "vLLM": partial(plain_vllm, engine, prompts, seeds, answer, logprobs=0),
        "vLLM, no log-probs": partial(plain_vllm, engine, prompts, seeds, answer),
    }
    return race(engine, ways, args.turns, "tokens")


def evaluation(args, answer):
    """The same for `LocalBackend`, with all that eval.py does to an answer: decode, parse, write a line."""
    pairs = read_pairs(args.data)
    backend = LocalBackend(args.model, answer, None, args.dtype)
    style = prompt_style(backend.folder, args.model, default="instruct")
    chats = [chat_messages(pair, style) for pair in pairs]
    prompts = [encode(backend.tokenizer, chat) for chat in chats]
    seeds = [seed_of(0, pair.id, 0, 1.0, 0) for pair in pairs]

    def ours():
        requests = ((chat, seed, 1.0) for chat, seed in zip(chats, seeds))
        with tempfile.TemporaryFile("w") as f:
            for place, response in backend.answers(requests):
                line = judgment_line(response, pairs[place], chats[place])
                print(json.dumps(line), file=f, flush=True)

    ways = {
        "ours": ours,
        "vLLM": partial(plain_vllm, backend.engine, prompts, seeds, answer, stop=backend.stop),
    }
    return race(backend.engine, ways, args.turns, "judgments", len(pairs))


def sync(args):
    """fp32 weights in the trainer, as in training, and an engine in --dtype."""
    *_, device = start_ranks()
    dtype = DTYPES[args.dtype]
    policy = load_policy(args.model, device, torch.float32)
    engine = Engine(args.model, 512, args.dtype, weights="dummy", memory=0.5)
    engine.sync(policy, dtype)  # the first one also allocates
    engine.sleep()
    seconds = []
    extra = common.extra_gib()
    for _ in range(args.turns):
        seconds.append(common.timed(engine.sync, policy, dtype)[0])
        engine.sleep()
    parameters = sum(p.numel() for p in policy.parameters())
    gib = parameters * dtype.itemsize / 2**30
    yield {
        "parameters (M)": parameters / 1e6,
        "s": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "GiB": gib,
        "GiB/s": gib / statistics.median(seconds),
        "extra GiB": extra(),
    }


# ---------------------------------------------------------------- log-probs and loading


def logprobs(args, tokens, way):
    """Forward and backward passes through the head only: from hidden states to gradients of hidden states and head.

    Memory is counted without these two gradients, which every way has to give. Chunked is policy.py's. The
    plain way makes one tensor of all logits, takes its log-softmax in fp32, and gathers.
    """
    words = args.vocab or 152064
    device = "cuda" if common.CUDA else "cpu"

    def normal(*shape):
        return torch.randn(*shape, device=device, dtype=DTYPES[args.dtype])

    torch.manual_seed(0)
    hidden = normal(tokens, args.hidden).requires_grad_()  # (R, hidden)
    head = normal(words, args.hidden).mul_(args.hidden**-0.5).requires_grad_()  # (V, hidden)
    targets = torch.randint(words, (tokens,), device=device)  # (R,)
    extra = common.extra_gib()
    start = common.clock()
    if way == "chunked":
        logp = TokenLogProbs.apply(hidden, head, targets, 1.0, None)  # (R,)
    else:
        logits = (hidden @ head.T).float()  # (R, V)
        logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]  # (R,)
        del logits
    logp.sum().backward()
    seconds = common.clock() - start
    gradients_gib = (hidden.nbytes + head.nbytes) / 2**30
    yield {
        "words": words,
        "s": seconds,
        "GiB": extra() - gradients_gib,
        "logp": logp.mean().item(),
    }


def loading(args, ranks):
    """Every rank reads a bf16 model from disk into fp32 shards.

    The table has what the ranks hold together when it is done, and the most that they ever held, beyond what
    they held before, over the size of the fp32 weights. Pages of the file are counted apart, because the kernel
    takes them back when it needs them.
    """
    *_, device = start_ranks()
    load_policy(args.model, device, torch.float32)  # what this allocates once is not counted
    gc.collect()  # modules refer to themselves
    extra = common.extra_gib()
    done = threading.Event()
    own = [common.process_gib("RssAnon")]

    def watch():  # the kernel keeps no peak of RssAnon
        while not done.wait(0.002):
            own.append(common.process_gib("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    seconds, policy = common.timed(load_policy, args.model, device, torch.float32)
    done.set()
    own.append(common.process_gib("RssAnon"))
    size = 4 * sum(p.numel() for p in policy.parameters()) / 2**30
    held = own[-1] - own[0]
    peak = max(own) - own[0]
    held, peak, with_pages = all_sum([held, peak, extra()])
    yield {
        "fp32 GiB": size,
        "s": seconds,
        "held / size": held / size,
        "peak / size": peak / size,
        "with pages of the file": with_pages / size,
    }
    barrier()


# ---------------------------------------------------------------- scripts without a model

# Runs its arguments as a command and prints the most memory that this took. A small process, because a child's
# peak begins at what its parent holds.
PRINT_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=2)
print('{"kB": %d}' % resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def prepare(args):
    """Preference rows of about 1,500 characters: a quarter of them, then all."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]

    def text(count):
        return " ".join(rng.choices(words, k=count))

    more = ["--tokenizer", args.tokenizer] if args.tokenizer else []
    for rows in (20000, 80000):
        lines = (
            json.dumps({"prompt": text(50), "chosen": text(100), "rejected": text(100)})
            for _ in range(rows)
        )
        with tempfile.TemporaryDirectory() as folder:
            source = f"{folder}/rows.jsonl"
            write_lines(source, lines)
            command = [sys.executable, "data/prepare.py", "--out", folder, "--source", source]
            wrapped = [sys.executable, 1, 1, "-c", PRINT_PEAK, *command, *more]
            seconds, (peak,) = common.timed(common.run, *wrapped)
        yield {"rows": rows, "s": seconds, "rows/s": rows / seconds, "peak MB": peak["kB"] / 1024}


def recompute(args):
    """A RewardBench run of 100,000 judgments, five a comparison, of 1,500 characters each."""
    with tempfile.TemporaryDirectory() as folder:
        write_evaluation(folder, pairs=20000, votes=5)
        read, run = common.timed(report.read_run, folder)
        numbers, _ = common.timed(report.measure, run)
    yield {"judgments": len(run["judgments"]), "read s": read, "numbers s": numbers}


def write_evaluation(folder, pairs, votes):
    """The folder of an evaluation on RewardBench."""
    pair = {
        "bench": "rewardbench",
        "compare": [0, 1],
        "context": [],
        "a": "x" * 500,
        "b": "y" * 500,
        "swap": False,
        "label": "A",
    }
    response = Answer("z" * 1500, "stop", 300, 900)
    line = {"order": 0, "swap": False, "temperature": 1.0, "label": "A"}
    line |= judgment_line(response, Pair("", [], pair["a"], pair["b"], "A"), [])
    subsets = [subset for chapter in benchmarks.REWARDBENCH.values() for subset in chapter]
    pair_lines, judgment_lines = [], []
    for n in range(pairs):
        subset = subsets[n % len(subsets)]
        key = f"rewardbench/{subset}/{n}/0-1"
        pair_lines.append(json.dumps(pair | {"id": key, "item": key, "subset": subset}))
        for vote in range(votes):
            verdict = "B" if (n * 7 + vote) % 3 == 0 else "A"
            judgment_lines.append(json.dumps(line | {"id": key, "vote": vote, "verdict": verdict}))
    write_lines(f"{folder}/config.json", [json.dumps({"format": report.EVALUATION_FORMAT})])
    write_lines(f"{folder}/pairs.jsonl", pair_lines)
    write_lines(f"{folder}/judgments.jsonl", judgment_lines)


# ---------------------------------------------------------------- the command line

PARTS = {
    "training": training,
    "sampling": sampling,
    "evaluation": evaluation,
    "sync": sync,
    "logprobs": logprobs,
    "loading": loading,
    "prepare": prepare,
    "recompute": recompute,
}
WITHOUT_MODEL = ("logprobs", "prepare", "recompute")


def flags():
    parser = Flags(__doc__)
    arg = parser.add_argument
    arg("part", choices=PARTS)
    arg("--model", help="its folder; default: a random one")
    arg("--data", default="runs/demo/data/test.jsonl", help="evaluation: file of pairs")
    arg(
        "--answer",
        type=int,
        nargs="+",
        default=[90],
        help="tokens of every answer; evaluation: the most",
    )
    arg(
        "--group-size",
        type=int,
        nargs="+",
        default=[7],
        help="training, sampling: answers to each prompt",
    )
    arg("--tokens", type=int, nargs="+", default=[512, 2048], help="logprobs: response tokens")
    arg(
        "--ways",
        dest="way",
        nargs="+",
        choices=("chunked", "plain"),
        default=["chunked", "plain"],
        help="logprobs: at 152,064 words the plain way wants 1.6 GiB for 1,000 tokens",
    )
    arg("--tokenizer", help="prepare: count tokens with this one")
    arg("--case", type=json.loads, help="for its own use")
    common.flags(arg)
    return parser


def cases_of(args):
    """The parameters of a part are flags of several values; each combination is a case. -> [{name: value}, ...]"""
    _, *names = inspect.signature(PARTS[args.part]).parameters
    combinations = itertools.product(*(getattr(args, name) for name in names))
    return [dict(zip(names, values)) for values in combinations]


def run_case(args, case):
    """In a fresh process, or one for each rank. -> rows"""
    print(case, file=sys.stderr, flush=True)
    command = [__file__, *sys.argv[1:], "--model", args.model, "--case", json.dumps(case)]
    rows = common.run(sys.executable, case.get("ranks", 1), args.threads, *command)
    if args.part == "training" and args.trl and case["ranks"] == 1:
        rows.append(peer(args, **case))
    return [case | row for row in rows]


def add_ratios(rows):
    """Compare every row with the first way to do the same, which stands before it."""
    columns = ("score s", "update s", "extra GiB", "s", "GiB")
    for row in rows:
        if row["way"] == rows[0]["way"]:
            first = row
        assert abs(first.get("logp", 0) - row.get("logp", 0)) < 0.02, "the ways disagree"
        for column in columns:
            if column in row:
                row[f"{first['way']}/this: {column}"] = first[column] / row[column]


def main():
    args = flags().parse_args()
    if args.case is not None:  # the fresh process of a case
        for row in PARTS[args.part](args, **args.case):
            print0(json.dumps(row))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if not args.model and args.part not in WITHOUT_MODEL:
            common.write_model(folder, max(512, args.prompt + max(args.answer)), args)
        args.model = args.model or folder
        for case in cases_of(args):
            rows += run_case(args, case)
    if args.part in ("training", "logprobs"):
        add_ratios(rows)
    common.report(rows, args.trl)


if __name__ == "__main__":
    run_main(main)
