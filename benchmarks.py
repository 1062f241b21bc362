"""
The benchmarks: what their rows look like, which comparisons they ask for, how their numbers are computed.

A row is an **item**: a conversation and two or more responses. It asks for **comparisons** of two responses,
each a `Pair` that a judge sees in one order or both. What the judge said comes back as **wins**:
{(i, j): share of the comparison that response i won}, 1, 0, or 1/2 where no verdict could be read. Response i
is the better one by the benchmark's label, unless neither is (RewardBench 2's ties).

A **metric** is a weighted sum of plain means, {stratum: (weight, {item: value})}: every published number here
is one, so that values, missing parts and bootstrap intervals need one function each. A metric whose stratum
has no items has no value: parts of a benchmark are never averaged as if they were the whole.

Text and arithmetic only, no model.
"""
import hashlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from files import fail, files_under, json_object, rows_of
from rubrics import Pair, messages_of


# ---------------------------------------------------------------- rows to pairs

@dataclass(frozen=True)
class Row:
    """One item. responses: texts; compare: [(i, j), ...] of them, i better than j unless `tied` says neither
    is; subset: the part of the benchmark it belongs to; group: what a sample must take together."""
    item: str
    subset: str
    context: list
    responses: list
    compare: list
    group: str = ""
    about: dict = field(default_factory=dict)


def field_of(row, *names):
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"no field {names[0]}")


def texts(value):
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
        raise ValueError("subset or responses are not texts")
    return list(value)


def answer(value):
    """RMB's {"llm_name", "answer"}, or the answer itself in the hub's flat copy."""
    value = value.get("answer") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise ValueError("a response is not a text")
    return value


def rewardbench_row(row):
    subset, = texts([field_of(row, "subset")])
    return Row(f"{subset}/{field_of(row, 'id')}", subset, messages_of(field_of(row, "prompt")),
               texts([field_of(row, "chosen"), field_of(row, "rejected")]), [(0, 1)])


def rm_bench_row(row):
    chosen, rejected = texts(field_of(row, "chosen")), texts(field_of(row, "rejected"))
    if len(chosen) != 3 or len(rejected) != 3:
        raise ValueError("chosen and rejected are not three responses each")
    domain = next((d for d in RM_BENCH if field_of(row, "domain").startswith(d)), None)
    if domain is None:
        raise ValueError(f"unknown domain {row['domain']!r}")
    return Row(str(field_of(row, "id")), domain, messages_of(field_of(row, "prompt")), chosen + rejected,
               [(c, 3 + r) for c in range(3) for r in range(3)])


def rmb_row(row):
    kind, goal, *scenario = field_of(row, "category_path").split("/")
    context = messages_of([{"role": m["role"], "content": m["content"]}
                           for m in field_of(row, "conversation_input", "conversation")])
    if "bon_uid" in row:
        losers = [answer(x) for x in field_of(row, "loser_list", "rejected")]
        return Row(f"bon/{row['bon_uid']}", f"{goal.lower()} best-of-N", context,
                   [answer(field_of(row, "bon_best", "chosen")), *losers],
                   [(0, 1 + k) for k in range(len(losers))], about={"scenario": "/".join(scenario)})
    return Row(f"pair/{field_of(row, 'pair_uid')}", f"{goal.lower()} pairwise", context,
               [answer(field_of(row, "chosen")), answer(field_of(row, "reject", "rejected"))], [(0, 1)],
               about={"scenario": "/".join(scenario)})


def judgebench_row(row):
    source, label = field_of(row, "source"), field_of(row, "label")
    if label not in ("A>B", "B>A"):
        raise ValueError(f"unknown label {label!r}")
    category = next((c for s, c in JUDGEBENCH.items() if source.startswith(s)), None)
    if category is None:
        raise ValueError(f"unknown source {source!r}")
    split = "gpt" if "gpt" in field_of(row, "response_model") else "claude"
    return Row(f"{split}/{field_of(row, 'pair_id')}", f"{split} {category}",
               messages_of(field_of(row, "question")),
               texts([field_of(row, "response_A"), field_of(row, "response_B")]),
               [(0, 1) if label == "A>B" else (1, 0)])


def rewardbench2_row(row):
    chosen, rejected = texts(field_of(row, "chosen")), texts(field_of(row, "rejected"))
    (subset,), item, n = texts([field_of(row, "subset")]), str(field_of(row, "id")), len(chosen + rejected)
    if subset == "Ties":                            # a round robin: its rule needs a score for every response
        if not re.fullmatch(r"(ref|tied):\d+", item):
            raise ValueError(f"a Ties row with the id {item!r}, expected ref:NUMBER or tied:NUMBER")
        compare = [(i, j) for i in range(n) for j in range(i + 1, n)]
    else:
        compare = [(i, j) for i in range(len(chosen)) for j in range(len(chosen), n)]
    return Row(item, subset, messages_of(field_of(row, "prompt")), chosen + rejected, compare,
               group=item.split(":")[-1], about={"correct": len(chosen)})


# ---------------------------------------------------------------- numbers

def value(metric):
    """Weighted sum of the strata's means; None where one has no items."""
    if not metric or not all(values for _, values in metric.values()):
        return None
    return sum(w * sum(v.values()) / len(v) for w, v in metric.values())


def missing(metric):
    return [stratum for stratum, (_, values) in metric.items() if not values]


def interval(metric, minus=None, draws=1000, seed=0):
    """95 % interval by a bootstrap over items, stratum by stratum; with `minus`, of the difference between
    two runs on the items that both have, paired. -> low, high, share of draws above 0"""
    rng, total = np.random.default_rng(seed), np.zeros(draws)
    for stratum, (weight, values) in metric.items():
        if minus is None:
            x = np.array(list(values.values()), float)
        else:
            other = minus.get(stratum, (0, {}))[1]
            x = np.array([v - other[k] for k, v in values.items() if k in other], float)
        for at in range(0, draws, 50) if len(x) else ():
            total[at:at + 50] += weight * x[rng.integers(len(x), size=(50, len(x)))].mean(1)
    return *np.quantile(total, (0.025, 0.975)).tolist(), float((total > 0).mean())


@dataclass
class Item:
    """What is known of an item when it is scored. scores: of each response, from a judge that gives some."""
    subset: str
    wins: dict
    about: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)


def won(share):
    return float(share > 0.5)


def split(items, key=lambda it: it.subset, score=lambda it: float(all(s > 0.5 for s in it.wins.values()))):
    """{subset: {item: score}}; the plain score of an item is 1 if its response beats every other it meets."""
    out = defaultdict(dict)
    for name, it in items.items():
        out[key(it)][name] = score(it)
    return out


def each(by, names):
    """One metric for each name, its own plain mean."""
    return {name: {name: (1, by[name])} for name in names if by.get(name)}


def macro(by, names):
    """The plain mean of the names' means."""
    return {name: (1 / len(names), by.get(name, {})) for name in names}


# RewardBench's subsets with the published counts (allenai/reward-bench, constants.py). math-prm has 447 items
# and counts as 984, as much as the six languages of code together.
REWARDBENCH = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164}}


def rewardbench(items):
    """Section: its subsets' accuracies weighted by the published counts. Overall (the paper's number): plain
    mean of the four sections. Micro: accuracy over all 2,985 items, math-prm at its true size."""
    by = split(items)
    sections = {name: {s: (n / sum(counts.values()), by.get(s, {})) for s, n in counts.items()}
                for name, counts in REWARDBENCH.items()}
    sizes = {s: 447 if s == "math-prm" else n for counts in REWARDBENCH.values() for s, n in counts.items()}
    out = {"overall": {s: (w / 4, v) for section in sections.values() for s, (w, v) in section.items()},
           "micro": {s: (n / 2985, by.get(s, {})) for s, n in sizes.items()}}
    for section, metric in sections.items():
        out |= {section: metric} | {f"{section}/{s}": m for s, m in each(by, metric).items()}
    return out


RM_BENCH = ("chat", "math", "code", "safety")
HARD, NORMAL, EASY = [(0, 1), (0, 2), (1, 2)], [(0, 0), (1, 1), (2, 2)], [(1, 0), (2, 0), (2, 1)]


def rm_bench(items):
    """M[c][r]: accuracy with the right response in style c and the wrong one in style r (concise, detailed,
    markdown). Hard: mean of the cells where the right one is plainer; normal: equal; easy: showier. A
    domain's score is the mean of its nine cells; overall and hard, normal, easy are plain means over the four
    domains.

    official: what the released script computes. It reads its third file twice and its second never, so that
    in its place stand (0,1) := (0,2), (1,2) := (1,0), (2,0) := (2,1)."""
    def metric(cells, domains=RM_BENCH):
        mean = lambda it: [won(it.wins[c, 3 + r]) for c, r in cells if (c, 3 + r) in it.wins]
        by = split({k: it for k, it in items.items() if mean(it)},
                   score=lambda it: sum(mean(it)) / len(mean(it)))
        return macro(by, domains)
    slip = {(0, 1): (0, 2), (1, 2): (1, 0), (2, 0): (2, 1)}
    official = lambda cells: [slip.get(c, c) for c in cells]
    return {"overall": metric(HARD + NORMAL + EASY), "hard": metric(HARD), "normal": metric(NORMAL),
            "easy": metric(EASY), **{d: metric(HARD + NORMAL + EASY, (d,)) for d in RM_BENCH},
            **{f"cell/{c}{r}": metric([(c, r)]) for c in range(3) for r in range(3)},
            **{f"official script/{name}": metric(official(cells)) for name, cells in (
                ("overall", HARD + NORMAL + EASY), ("hard", HARD), ("normal", NORMAL), ("easy", EASY))}}


RMB = ("helpfulness best-of-N", "helpfulness pairwise", "harmlessness best-of-N", "harmlessness pairwise")


def rmb(items):
    """Pairwise: accuracy over pairs. Best-of-N: share of queries whose best response beats every loser.
    Overall: plain mean of the four sets."""
    by = split(items)
    scenes = split(items, key=lambda it: f"{it.subset}/{it.about.get('scenario', '')}")
    losers = lambda it: sum(won(s) for s in it.wins.values()) / len(it.wins)
    pairs = split(items, score=losers)
    return {"overall": macro(by, RMB), **{s: macro(by, (s,)) for s in RMB},
            **{f"losers beaten, a query's mean/{s}": {s: (1, pairs[s])} for s in RMB[::2] if pairs.get(s)},
            **{f"scenario/{s}": {s: (1, scenes[s])} for s in sorted(scenes)}}


JUDGEBENCH = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math",
              "livecodebench": "coding"}
JUDGEBENCH_GPT = {"knowledge": 154, "reasoning": 98, "math": 56, "coding": 42}


def judgebench(items):
    """A pair counts if its two orders together speak for the right response: both right, or one right and one
    without a verdict (ScalerLab/JudgeBench, metrics.py). Overall: accuracy over the 350 pairs of the GPT-4o
    split."""
    by = split(items)
    out = {"overall": {f"gpt {c}": (n / 350, by.get(f"gpt {c}", {})) for c, n in JUDGEBENCH_GPT.items()}}
    for kind in ("gpt", "claude"):
        out |= {f"{kind}/{c}": {c: (1, by[f"{kind} {c}"])} for c in JUDGEBENCH_GPT if f"{kind} {c}" in by}
    claude = {k: v for s, part in by.items() if s.startswith("claude") for k, v in part.items()}
    return out | ({"claude/all": {"claude": (1, claude)}} if claude else {})


REWARDBENCH2 = ("Factuality", "Focus", "Math", "Precise IF", "Safety", "Ties")


def rewardbench2(items):
    """Best of four: the right response beats the three others (in a round robin it is the only one with the
    most wins exactly then, so three comparisons do). Ties: see `ties`. Overall: plain mean of the six
    subsets."""
    by = split({k: it for k, it in items.items() if it.subset != "Ties"})
    parts = ties({k: it for k, it in items.items() if it.subset == "Ties"})
    by["Ties"] = parts.pop("Ties")
    return {"overall": macro(by, REWARDBENCH2), **{s: macro(by, (s,)) for s in REWARDBENCH2},
            **{f"Ties/{name}": {name: (1, values)} for name, values in parts.items() if values}}


def ties(items):
    """RewardBench 2's rule for prompts with many right answers (tied) beside a like prompt with one (ref). A
    response's score is its share of wins in the round robin, or what a scalar judge gave it.

    accurate: every right answer outscores every wrong one, in tied and in ref.
    preferred: the gap between right and wrong in tied exceeds the spread among the right ones; hard: the
    smaller gap of tied and ref does. score = .3 tied + .3 ref + .2 preferred + .2 hard + .01
    tanh(gap / spread - 1)
    -> {part: {prompt number: value}}, "Ties" being the score"""
    parts = {name: {} for name in ("Ties", "ref accurate", "tied accurate", "preferred", "preferred, hard")}
    gaps = {}
    for name, it in items.items():
        n = it.about["correct"]
        scores = it.scores or round_robin(it.wins)
        right = [s for i, s in scores.items() if i < n]
        wrong = [s for i, s in scores.items() if i >= n]
        if right and wrong:
            gaps[name] = min(right) - max(wrong), max(right) - min(right)
    for number in sorted({name.split(":")[1] for name in gaps}):
        if f"ref:{number}" not in gaps or f"tied:{number}" not in gaps:
            continue                            # the rule needs both; the table says how many prompts counted
        (ref, _), (tied, spread) = gaps[f"ref:{number}"], gaps[f"tied:{number}"]
        low = min(ref, tied)
        margin = math.tanh(low / spread - 1) if spread else float(np.sign(low))
        values = (ref > 0, tied > 0, tied > spread, low > spread)
        for part, v in zip(list(parts)[1:], values):
            parts[part][number] = float(v)
        parts["Ties"][number] = sum(w * v for w, v in zip((.3, .3, .2, .2), values)) + .01 * margin
    return parts


def round_robin(wins):
    """Each response's mean share of the comparisons it took part in."""
    shares = defaultdict(list)
    for (i, j), share in wins.items():
        shares[i].append(share)
        shares[j].append(1 - share)
    return {i: sum(s) / len(s) for i, s in shares.items()}


def pair_file(items):
    """Accuracy over pairs, by type and by source, and where responses have styles (the synthetic world)
    RM-Bench's view of them: hard, normal, easy as above, each the mean of its cells."""
    by = split(items, key=lambda it: "all")
    out = {"accuracy": {"all": (1, by["all"])}}
    for key in ("type", "source"):
        part = split(items, key=lambda it: str(it.about.get(key) or ""))
        if len(part) > 1:
            out |= {f"{key}/{k}": {k: (1, v)} for k, v in sorted(part.items()) if k}
    if all(type(s) is int for it in items.values() for s in it.about.get("styles", [None])):
        cells = split(items, key=lambda it: tuple(it.about["styles"]))
        for name, keep in (("hard", int.__lt__), ("normal", int.__eq__), ("easy", int.__gt__)):
            some = [c for c in cells if keep(*c)]
            if some:
                out[f"style/{name}"] = macro(cells, some)
    return out


# ---------------------------------------------------------------- the list

@dataclass(frozen=True)
class Bench:
    """sources: [(hub dataset, split), ...]. orders: how a comparison's two orders combine where both were
    judged: "first": only the first counts, as published; "mean": an item's value is the mean of both; "join":
    their wins are averaged before an item is scored."""
    sources: list
    row: object
    score: object
    orders: str
    items: int = 0


BENCHES = {
    "rewardbench": Bench([("allenai/reward-bench", "filtered")], rewardbench_row, rewardbench, "first", 2985),
    "rm-bench": Bench([("THU-KEG/RM-Bench", "train")], rm_bench_row, rm_bench, "first", 1327),
    # A flat copy of the authors' repository, which is on no hub itself.
    "rmb": Bench([("ilgee/RMB-Pairwise", "test"), ("ilgee/RMB-BoN", "test")], rmb_row, rmb, "first", 20917),
    "judgebench": Bench([("ScalerLab/JudgeBench", "gpt"), ("ScalerLab/JudgeBench", "claude")], judgebench_row,
                        judgebench, "join", 620),
    "rewardbench2": Bench([("allenai/reward-bench-2", "test")], rewardbench2_row, rewardbench2, "first",
                          1865)}
FILE = Bench([], None, pair_file, "mean")

# Papers' numbers (RM-R1 v4, tables 1 and 6 to 8), in percent: model -> {benchmark or benchmark/part: number}.
SECTIONS = {"rewardbench": ("Chat", "Chat Hard", "Safety", "Reasoning"),
            "rm-bench": ("chat", "math", "code", "safety", "easy", "normal", "hard"), "rmb": RMB}


def published(overall, rb=(), rm=(), rmb=()):
    out = dict(zip(("rewardbench", "rm-bench", "rmb"), overall))
    for bench, numbers in zip(SECTIONS, (rb, rm, rmb)):
        out |= {f"{bench}/{part}": n for part, n in zip(SECTIONS[bench], numbers)}
    return out


PAPER = {
    "RM-R1-Qwen-Instruct-7B": published((85.2, 70.2, 66.4), (94.1, 74.6, 85.2, 86.7),
        (66.6, 67.0, 54.6, 92.6, 79.2, 71.7, 59.7), (54.3, 74.0, 60.8, 76.5)),
    "RM-R1-Qwen-Instruct-14B": published((88.2, 76.1, 69.2), (93.6, 80.5, 86.9, 92.0),
        (75.6, 75.4, 60.6, 93.6, 82.6, 77.5, 68.8), (59.4, 77.6, 62.0, 77.8)),
    "RM-R1-Qwen-Instruct-32B": published((91.4, 79.1, 73.0), (95.3, 83.1, 91.9, 95.2),
        (75.3, 80.2, 66.8, 93.9, 86.3, 80.5, 70.4), (63.6, 79.1, 68.2, 80.9)),
    "RM-R1-DeepSeek-Distilled-Qwen-7B": published((80.1, 72.4, 55.1), (88.9, 66.2, 78.4, 87.0),
        (64.0, 83.9, 56.2, 85.3, 75.9, 73.1, 68.1), (45.1, 65.8, 42.9, 66.4)),
    "RM-R1-DeepSeek-Distilled-Qwen-14B": published((88.9, 81.5, 68.5), (91.3, 79.4, 89.3, 95.5),
        (71.8, 90.5, 69.5, 94.1, 86.2, 83.6, 74.4), (59.3, 76.5, 61.3, 76.9)),
    "RM-R1-DeepSeek-Distilled-Qwen-32B": published((90.9, 83.9, 69.8), (95.3, 80.3, 91.1, 96.8),
        (74.2, 91.8, 74.1, 95.4, 89.5, 85.4, 76.7), (62.0, 78.2, 61.8, 77.1)),
    "GPT-4o-0806": published(
        (86.7, 72.5, 73.8), (96.1, 76.1, 86.6, 88.1), (67.2, 67.5, 63.6, 91.7, 83.4, 75.6, 58.7)),
    "Gemini-1.5-pro": published(
        (88.2, 75.2, 56.5), (92.3, 80.6, 87.9, 92.0), (71.6, 73.9, 63.7, 91.3, 83.1, 77.6, 64.7)),
    "Claude-3.5-sonnet-0620": published((84.2, 61.0, 70.6), (), (), (70.5, 83.8, 51.8, 76.4)),
    "INF-ORM-Llama3.1-70B (scalar)": published((95.1, 70.9, 70.5), (96.6, 91.0, 93.6, 99.1),
        (66.3, 65.6, 56.8, 94.8, 91.8, 76.1, 44.8), (65.0, 79.8, 60.7, 76.7)),
    "Skywork-Reward-Llama-3.1-8B (scalar)": published(
        (92.5, 70.1, 69.3), (), (69.5, 60.6, 54.5, 95.7, 89.0, 74.7, 46.6)),
    "Skywork-Critic-Llama-3.1-70B": published((93.3, 71.9, 65.5), (96.6, 87.9, 93.1, 95.5)),
    "Self-taught-evaluator-70B": published((90.2, 71.4, 67.0), (96.9, 85.1, 89.6, 88.4),
        (73.4, 65.7, 56.3, 90.4, 80.2, 74.5, 59.7), (61.6, 78.6, 54.6, 73.3)),
    "DeepSeek-GRM-27B": published((86.0, None, 69.0), (94.1, 78.3, 88.0, 83.8), (), (62.3, 80.5, 57.0, 76.1)),
    "JudgeLRM": published((75.2, 64.7, 53.1), (92.9, 56.4, 78.2, 73.6),
        (59.9, 59.9, 51.9, 87.3, 73.2, None, 54.8), (36.3, 69.9, 36.3, 67.4))}


# ---------------------------------------------------------------- load

def load(name, data_dir=None, limit=None, seed=0):
    """The comparisons of one benchmark, `name` or `name@revision`, from the hub or from files under data_dir
    in the original schemas. limit: that many items of every subset, drawn by a hash of (seed, item).

    -> pairs, left out [{bench, item, reason}, ...], where it came from
    Bad rows and what cannot be judged (an empty response, equal ones) are left out, never fatal."""
    name, _, revision = name.partition("@")
    rows, left_out, origin = [], {}, []
    for source, numbered in sources(name, data_dir, revision or None):
        origin.append(source)
        some, bad = understood(BENCHES[name], source, numbered)
        rows += [(source, r) for r in some]
        left_out |= bad
    if limit:
        groups = defaultdict(set)
        for _, r in rows:
            groups[r.subset].add(r.group or r.item)
        drawn = {(s, g) for s, some in groups.items() for g in sorted(
            some, key=lambda g: hashlib.sha256(f"{seed}/{g}".encode()).digest())[:limit]}
        rows = [(source, r) for source, r in rows if (r.subset, r.group or r.item) in drawn]
    pairs, seen = [], {}
    for source, r in rows:
        if r.item in seen:
            left_out |= {r.item: "the same item a second time"} if seen[r.item] == source else {
                source: "a file that repeats items of files before it"}
            continue
        seen[r.item] = source
        for i, j in r.compare:
            a, b = r.responses[i], r.responses[j]
            if reason := ("empty response" if not a.strip() or not b.strip() else
                          "equal responses" if a == b else ""):
                left_out[f"{r.item} ({i} against {j})"] = reason
                continue
            tied = r.subset == "Ties" and (i < r.about["correct"]) == (j < r.about["correct"])
            pairs.append(Pair(f"{name}/{r.item}/{i}-{j}", r.context, a, b, None if tied else "A",
                              source=r.subset, meta={"bench": name, "item": r.item, "subset": r.subset,
                                                     "compare": [i, j], **r.about}))
    return pairs, [{"bench": name, "item": i, "reason": why} for i, why in left_out.items()], origin


def understood(bench, source, numbered):
    """The rows of a source that are the benchmark's, and {place: why} of those that are not, one for them all
    if none is. RM-Bench's own files have their rows' domain in their name only (chat_filtered.json)."""
    rows, bad = [], {}
    for number, raw in numbered:
        try:
            rows.append(bench.row({"domain": Path(source).stem} | json_object(raw)))
        except (ValueError, TypeError, AttributeError, KeyError) as e:
            bad[f"{source}:{number}"] = f"wrong schema: {e}"
    if len(bad) > 1 and not rows:
        bad = {source: f"a file without a row of the benchmark: {len(bad)} rows, {min(bad.values())}"}
    return rows, bad


def sources(name, data_dir, revision):
    """(where from, rows with their numbers) of a benchmark's files or hub splits."""
    if data_dir is None:
        for dataset, part in BENCHES[name].sources:
            yield f"{dataset}@{revision or 'main'}:{part}", rows_of(dataset, part, revision)
        return
    if not Path(data_dir).is_dir():
        fail(f"--data-dir {data_dir}: no such folder")
    files = files_of(data_dir, name)
    if not files:
        fail(f"--data-dir {data_dir}: no file or folder in it has a name that begins with {name} (.json, "
             ".jsonl or .parquet files)")
    for path in files:
        yield str(path.relative_to(data_dir)), rows_of(path)


def files_of(folder, name):
    """The files of a benchmark under a folder, told by their names; none twice, by whatever links."""
    some = [p for p in files_under(folder) if p.suffix in (".json", ".jsonl", ".parquet")
            and bench_of(p.relative_to(folder)) == name]
    return sorted({p.resolve(): p for p in sorted(some, reverse=True)}.values())


def bench_of(path):
    """Which benchmark a file belongs to: the one whose name begins the name of the file or of the outermost
    folder, the longest if several do. RM-Bench's own file is called total_dataset.json."""
    plain = lambda s: re.sub(r"[^a-z0-9]", "", s.lower())
    for part in path.parts:
        start = plain(part)
        if start.startswith("totaldataset"):
            return "rm-bench"
        if fits := [b for b in BENCHES if start.startswith(plain(b))]:
            return max(fits, key=len)
    return None
