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
import itertools
import math
import operator
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from files import fail, files_under, json_object, rows_of
from rubrics import Pair, messages_of


# ---------------------------------------------------------------- rows to items

@dataclass(frozen=True)
class Row:
    """One item. responses: texts; compare: [(i, j), ...] of them, i better than j unless `tied` says neither
    is; subset: the part of the benchmark it belongs to; group: what a sample takes together, such as a tied
    and a ref prompt of RewardBench 2."""
    item: str
    subset: str
    context: list
    responses: list
    compare: list
    about: dict = field(default_factory=dict)

    @property
    def group(self):
        return re.sub("^(ref|tied):", "", self.item)

    def __post_init__(self):
        if not isinstance(self.responses, list) or not all(
                isinstance(x, str) for x in (self.subset, *self.responses)):
            raise ValueError("subset or responses are not texts")


def rewardbench_row(row):
    return Row(f"{row['subset']}/{row['id']}", row["subset"], messages_of(row["prompt"]),
               [row["chosen"], row["rejected"]], [(0, 1)])


def rm_bench_row(row):
    if len(row["chosen"]) != 3 or len(row["rejected"]) != 3:
        raise ValueError("chosen and rejected are not three responses each")
    return Row(str(row["id"]), part_of("domain", row["domain"], RM_BENCH), messages_of(row["prompt"]),
               row["chosen"] + row["rejected"], [(c, 3 + r) for c in range(3) for r in range(3)])


def part_of(name, value, parts):
    """The one of the parts whose name begins a field's value."""
    for part in parts:
        if value.startswith(part):
            return part
    raise ValueError(f"unknown {name} {value!r}")


def rmb_row(row):
    """A row of the authors' files, whose answers are {"llm_name", "answer"}, or of the hub's flat copy, where
    they are texts under other names."""
    of_many = "bon_uid" in row
    best = row.get("bon_best", row.get("chosen"))
    losers = row.get("loser_list", row.get("reject", row.get("rejected")))
    responses = [best, *losers] if of_many else [best, losers]
    _, goal, *scenario = row["category_path"].split("/")
    context = messages_of([{"role": m["role"], "content": m["content"]}
                           for m in row.get("conversation_input", row.get("conversation"))])
    return Row(f"bon/{row['bon_uid']}" if of_many else f"pair/{row['pair_uid']}",
               f"{goal.lower()} {'best-of-N' if of_many else 'pairwise'}", context,
               [x["answer"] if isinstance(x, dict) else x for x in responses],
               [(0, k) for k in range(1, len(responses))], about={"scenario": "/".join(scenario)})


def judgebench_row(row):
    if row["label"] not in ("A>B", "B>A"):
        raise ValueError(f"unknown label {row['label']!r}")
    category = JUDGEBENCH[part_of("source", row["source"], JUDGEBENCH)]
    split = "gpt" if "gpt" in row["response_model"] else "claude"
    return Row(f"{split}/{row['pair_id']}", f"{split} {category}", messages_of(row["question"]),
               [row["response_A"], row["response_B"]], [(0, 1) if row["label"] == "A>B" else (1, 0)])


def rewardbench2_row(row):
    item, right, n = str(row["id"]), len(row["chosen"]), len(row["chosen"] + row["rejected"])
    compare = [(i, j) for i in range(right) for j in range(right, n)]
    if row["subset"] == "Ties":                     # a round robin: its rule needs a score for every response
        if not re.fullmatch(r"(ref|tied):\d+", item):
            raise ValueError(f"a Ties row with the id {item!r}, expected ref:NUMBER or tied:NUMBER")
        compare = list(itertools.combinations(range(n), 2))
    return Row(item, row["subset"], messages_of(row["prompt"]), row["chosen"] + row["rejected"], compare,
               about={"correct": right})


# ---------------------------------------------------------------- numbers

def process_judgement(text):
    """The published evaluation rule: [[A]] or [[B]] anywhere in the text, both or neither is an
    error (which counts as wrong). It disagrees with the training reward; we report it as `official`.
    -> "A", "B", "error" """
    a, b = "[[A]]" in text, "[[B]]" in text
    return "error" if a == b else "A" if a else "B"


def mean(values):
    """The plain mean; None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def value(metric):
    """Weighted sum of the strata's means; None where one has no items."""
    if not metric or missing(metric):
        return None
    return sum(weight * mean(values.values()) for weight, values in metric.values())


def missing(metric):
    return [stratum for stratum, (_, values) in metric.items() if not values]


def common(metric, other):
    """A metric on the items that another run has as well."""
    return {s: (weight, {k: v for k, v in values.items() if k in other.get(s, (0, {}))[1]})
            for s, (weight, values) in metric.items()}


def interval(metric, minus=None):
    """95 % interval by a bootstrap over items, stratum by stratum; with `minus`, another run's metric on the
    same items, of the difference between the two. -> low, high"""
    rng, total = np.random.default_rng(0), np.zeros(1000)
    for stratum, (weight, values) in metric.items():
        other = minus[stratum][1] if minus else dict.fromkeys(values, 0)
        x = np.array([v - other[k] for k, v in values.items()], float)
        if len(x):
            total += [weight * x[rng.integers(len(x), size=len(x))].mean() for _ in total]
    return tuple(np.quantile(total, (0.025, 0.975)).tolist())


@dataclass
class Item:
    """What is known of an item when it is scored. scores: of each response, from a judge that gives some."""
    subset: str
    wins: dict
    about: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)


def split(items, key=lambda it: it.subset, score=lambda it: float(all(s > 0.5 for s in it.wins.values()))):
    """{subset: {item: score}}, without items whose score is None. The plain score of an item is 1 if its
    response beats every other it meets."""
    out = defaultdict(dict)
    for name, it in items.items():
        if (points := score(it)) is not None:
            out[key(it)][name] = points
    return out


def each(kind, by, names=None):
    """{kind/part: metric}, one for each part (of the names) that has items: its own plain mean."""
    return {f"{kind}/{name}": {name: (1, by[name])} for name in names or by if by.get(name)}


def macro(by, names):
    """The plain mean of the names' means."""
    return {name: (1 / len(names), by.get(name, {})) for name in names}


def overall(by, names):
    """The plain mean of all names, and every name."""
    return {"overall": macro(by, names)} | {name: macro(by, [name]) for name in names}


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
        out |= {section: metric} | each(section, by, metric)
    return out


RM_BENCH = ("chat", "math", "code", "safety")
# Styles of the right and the wrong response, 0 the plainest: hard is where the right one is plainer.
VIEWS = {"hard": operator.lt, "normal": operator.eq, "easy": operator.gt}


def rm_bench(items):
    """M[c][r]: accuracy with the right response in style c and the wrong one in style r (concise, detailed,
    markdown). Hard: mean of the cells where the right one is plainer; normal: equal; easy: showier. A
    domain's score is the mean of its nine cells; overall and hard, normal, easy are plain means over the four
    domains.

    official: what the released script computes. It reads its third file twice and its second never, so that
    in its place stand (0,1) := (0,2), (1,2) := (1,0), (2,0) := (2,1)."""
    def metric(cells, domains=RM_BENCH):
        points = lambda it: mean(it.wins[c, 3 + r] > 0.5 for c, r in cells if (c, 3 + r) in it.wins)
        return macro(split(items, score=points), domains)

    cells = list(itertools.product(range(3), repeat=2))
    views = {"overall": cells} | {name: [c for c in cells if keep(*c)] for name, keep in VIEWS.items()}
    slip = {(0, 1): (0, 2), (1, 2): (1, 0), (2, 0): (2, 1)}
    return {**{name: metric(some) for name, some in views.items()},
            **{domain: metric(cells, [domain]) for domain in RM_BENCH},
            **{f"cell/{c}{r}": metric([(c, r)]) for c, r in cells},
            **{f"official script/{name}": metric([slip.get(c, c) for c in some])
               for name, some in views.items()}}


RMB = ("helpfulness best-of-N", "helpfulness pairwise", "harmlessness best-of-N", "harmlessness pairwise")


def rmb(items):
    """Pairwise: accuracy over pairs. Best-of-N: share of queries whose best response beats every loser.
    Overall: plain mean of the four sets."""
    by = split(items)
    scenes = split(items, key=lambda it: f"{it.subset}/{it.about.get('scenario', '')}")
    beaten = split(items, score=lambda it: mean(s > 0.5 for s in it.wins.values()))
    return (overall(by, RMB) | each("losers beaten, a query's mean", beaten, RMB[::2])
            | each("scenario", scenes, sorted(scenes)))


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
        out |= each(kind, {c: by[f"{kind} {c}"] for c in JUDGEBENCH_GPT})
    claude = {k: it for k, it in items.items() if it.subset.startswith("claude")}
    return out | each("claude", split(claude, key=lambda it: "all"))


REWARDBENCH2 = ("Factuality", "Focus", "Math", "Precise IF", "Safety", "Ties")


def rewardbench2(items):
    """Best of four: the right response beats the three others (in a round robin it is the only one with the
    most wins exactly then, so three comparisons do). Ties: see `ties`. Overall: plain mean of the six
    subsets."""
    by = split({k: it for k, it in items.items() if it.subset != "Ties"})
    parts = ties({k: it for k, it in items.items() if it.subset == "Ties"})
    by["Ties"] = parts.pop("Ties", {})
    return overall(by, REWARDBENCH2) | each("Ties", parts)


def ties(items):
    """RewardBench 2's rule for prompts with many right answers (tied) beside a like prompt with one (ref). A
    response's score is its share of wins in the round robin, or what a scalar judge gave it.

    accurate: every right answer outscores every wrong one, in tied and in ref.
    preferred: the gap between right and wrong in tied exceeds the spread among the right ones; hard: the
    smaller gap of tied and ref does. score = .3 tied + .3 ref + .2 preferred + .2 hard + .01
    tanh(gap / spread - 1)
    -> {part: {prompt number: value}}, "Ties" being the score"""
    parts, gaps = defaultdict(dict), {}
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
        for part, weight, holds in (("ref accurate", .3, ref > 0), ("tied accurate", .3, tied > 0),
                                    ("preferred", .2, tied > spread), ("preferred, hard", .2, low > spread)):
            parts[part][number] = float(holds)
            parts["Ties"][number] = parts["Ties"].get(number, .01 * margin) + weight * holds
    return parts


def round_robin(wins):
    """Each response's mean share of the comparisons it took part in."""
    shares = defaultdict(list)
    for (i, j), share in wins.items():
        shares[i].append(share)
        shares[j].append(1 - share)
    return {i: mean(s) for i, s in shares.items()}


def pair_file(items):
    """Accuracy over pairs, by type and by source, and where responses have styles (the synthetic world)
    RM-Bench's view of them: hard, normal, easy as above, each the mean of its cells."""
    out = {"accuracy": macro(split(items, key=lambda it: "all"), ["all"])}
    for key in ("type", "source"):
        part = split(items, key=lambda it: str(it.about.get(key) or ""))
        if len(part) > 1:
            out |= each(key, part, sorted(filter(None, part)))
    if all(type(s) is int for it in items.values() for s in it.about.get("styles", [None])):
        cells = split(items, key=lambda it: tuple(it.about["styles"]))
        for name, keep in VIEWS.items():
            if some := [c for c in cells if keep(*c)]:
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


BENCHES = {
    "rewardbench": Bench([("allenai/reward-bench", "filtered")], rewardbench_row, rewardbench, "first"),
    "rm-bench": Bench([("THU-KEG/RM-Bench", "train")], rm_bench_row, rm_bench, "first"),
    # A flat copy of the authors' repository, which is on no hub itself.
    "rmb": Bench([("ilgee/RMB-Pairwise", "test"), ("ilgee/RMB-BoN", "test")], rmb_row, rmb, "first"),
    "judgebench": Bench([("ScalerLab/JudgeBench", "gpt"), ("ScalerLab/JudgeBench", "claude")], judgebench_row,
                        judgebench, "join"),
    "rewardbench2": Bench([("allenai/reward-bench-2", "test")], rewardbench2_row, rewardbench2, "first")}
FILE = Bench([], None, pair_file, "mean")


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
        groups = defaultdict(dict)                         # of a subset: their lots
        for _, r in rows:
            groups[r.subset][r.group] = hashlib.sha256(f"{seed}/{r.group}".encode()).digest()
        drawn = {subset: set(sorted(lots, key=lots.get)[:limit]) for subset, lots in groups.items()}
        rows = [(source, r) for source, r in rows if r.group in drawn[r.subset]]
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
            bad[f"{source}:{number}"] = f"wrong schema: {'no field ' if isinstance(e, KeyError) else ''}{e}"
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
