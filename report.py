"""
What evaluations say, from their files alone: every number, with tables, a page and comparisons of them.

    python eval.py report DIR1 DIR2 ... --out runs/report           # table.txt, report.html, curve.png
    python eval.py compare DIR1 DIR2                                # do two runs differ?

A **line** is a judgment as eval.py has written it. Lines of one temperature are measured together, those of
the lowest (greedy, where that was asked for) in all ways. No model, no torch.
"""
import csv
import itertools
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import benchmarks as B
from files import Flags, fail, number, read_lines, read_object, write_lines
from rubrics import judges_by_looks

ASSETS = Path(__file__).parent / "assets"


# ---------------------------------------------------------------- a run's files

def key_of(line):
    return line["id"], line["order"], float(line["temperature"]), line["vote"]


def lines_of(out):
    """{key: line} of the judgments that a folder has, those included that a run has not gathered yet."""
    return {key_of(x): x for path in (out / "judgments.jsonl", *sorted(out.glob("judgments.part*.jsonl")))
            for x in read_lines(path)}


def read_run(folder):
    """{"name", "config", "pairs" {id: pair}, "judgments" [line, ...], "left_out"} of an evaluation, which may
    be under way."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        fail(f"{folder / 'config.json'}: no such file; is {folder} the --out of an evaluation?")
    judgments = list(lines_of(folder).values())
    if not judgments:
        fail(f"{folder}: no judgments in it yet")
    return {"name": folder.resolve().name.removeprefix("eval-"),
            "config": read_object(folder / "config.json"),
            "pairs": {p["id"]: p for p in read_lines(folder / "pairs.jsonl")},
            "judgments": judgments, "left_out": read_lines(folder / "left_out.jsonl")}


def read_runs(folders):
    """Evaluations, each under a name of its own: the end of its path, as much as tells them apart."""
    paths = [Path(f).resolve() for f in folders]
    runs, depth = [read_run(path) for path in paths], 1
    while len({run["name"] for run in runs}) < len(set(paths)):
        for run, path in zip(runs, paths):
            run["name"] = "/".join(path.parts[-depth:])
        depth += 1
    return runs


def grouped(lines, of):
    """{of(line): its lines}"""
    out = defaultdict(list)
    for x in lines:
        out[of(x)].append(x)
    return out


def by_bench(run):
    return grouped(run["judgments"], lambda x: run["pairs"][x["id"]]["bench"])


def coolest(lines):
    """Those of the lowest temperature."""
    low = min(x["temperature"] for x in lines)
    return [x for x in lines if x["temperature"] == low]


# ---------------------------------------------------------------- measure

def wins_of(lines, rule="verdict"):
    """{order: {pair id: share of the comparison that response i won}}, by majority of the votes. At a tie
    the first vote decides, which is right in one half of them: with no winner all would count as wrong, as
    what cannot be read does, and two votes would be worse than one."""
    out = defaultdict(dict, {0: {}})
    votes = grouped(sorted(lines, key=lambda x: x["vote"]), lambda x: (x["order"], x["id"], x["swap"]))
    for (order, pair, swap), cast in votes.items():
        read = [x[rule] for x in cast if x[rule] in ("A", "B")]
        verdict = max(read, key=read.count, default=None)         # at a tie max takes the first
        out[order][pair] = float((verdict == "A") != swap) if verdict else 0.5
    return out


def metrics_of(bench, pairs, lines, rule="verdict", orders=None):
    """{name: metric} of one benchmark's judgments; orders as in `benchmarks.Bench`, whose own is the
    default."""
    spec, wins = B.BENCHES.get(bench, B.FILE), wins_of(lines, rule)
    orders, parts = orders or spec.orders, list(wins.values())
    if orders == "first":
        parts = parts[:1]
    elif orders == "join":
        parts = [{k: B.mean(part[k] for part in parts if k in part) for k in parts[0] | parts[-1]}]
    scored = {x["id"]: x for x in lines if None not in x.get("scores", [None])}
    views = []
    for part in parts:
        items = {}
        for key, share in part.items():
            p = pairs[key]
            it = items.setdefault(p["item"], B.Item(p["subset"], {}, p))
            it.wins[tuple(p["compare"])] = share
            if key in scored:
                sides = p["compare"][::-1] if scored[key]["swap"] else p["compare"]
                it.scores.update(zip(sides, scored[key]["scores"]))
        views.append(spec.score(items))
    return views[0] if len(views) == 1 else mean_of(*views)


def mean_of(one, two):
    """The metrics of two orders as one: every item's value is the mean of those it has."""
    out = {}
    for name, metric in one.items():
        out[name] = {}
        for stratum, (weight, values) in metric.items():
            others = two.get(name, {}).get(stratum, (0, {}))[1]
            out[name][stratum] = weight, {
                k: B.mean(v[k] for v in (values, others) if k in v) for k in values | others}
    return out


def measure(run):
    """All numbers of a run: (its name, {benchmark or file: {number's name: value}}), in the order in which
    they are printed."""
    out = {}
    for bench, lines in by_bench(run).items():
        left_out = [x for x in run["left_out"] if x["bench"] == bench]
        out[bench] = measure_one(bench, run["pairs"], lines, left_out)
    return run["name"], out


def measure_one(bench, pairs, lines, left_out):
    main = coolest(lines)
    metrics = metrics_of(bench, pairs, main)
    head, wins = next(iter(metrics)), wins_of(main)
    shown = lambda metric: "partial" if B.value(metric) is None else B.value(metric)
    headline = lambda some, **how: shown(metrics_of(bench, pairs, some, **how)[head])
    named = lambda name, t: f"{name}, greedy" if t == 0 else f"{name}, T={t:g}"
    reasons = lambda rows: Counter(x["reason"].split(":")[0] for x in rows).most_common()
    temperatures = sorted(grouped(lines, lambda x: x["temperature"]).items())
    out = {"judgments": len(lines)}
    for t, at in temperatures:
        metric = (metrics_of(bench, pairs, at) if len(temperatures) > 1 else metrics)[head]
        out[named(head, t)] = shown(metric)
        if B.value(metric) is not None:
            out[f"{named(head, t)}, 95 %"] = B.interval(metric)
    out |= {name: shown(metric) for name, metric in metrics.items() if name != head}
    if lost := B.missing(metrics[head]):
        out["partial, without"] = ", ".join(lost)

    for t, at in temperatures:
        last = max(x["vote"] for x in at)
        for k in range(1, last + 2, 2) if last else ():
            if some := [x for x in at if x["vote"] < k]:                   # a run under way may lack them
                out[f"votes/{head}, best of {k}, T={t:g}"] = headline(some)
                out[f"votes/tokens, best of {k}, T={t:g}"] = sum(x["tokens"] for x in some) / len(
                    {(x["id"], x["order"]) for x in some})

    if 1 in wins:
        both = {k: (wins[0][k], wins[1][k]) for k in wins[0] if k in wins[1]}
        if B.BENCHES.get(bench, B.FILE).orders == "first":
            out[f"{head}, mean of both orders"] = headline(main, orders="mean")
        out["right in both orders"] = B.mean(x == y == 1 for k, (x, y) in both.items() if pairs[k]["label"])
        out["same verdict in both orders"] = B.mean(x == y != 0.5 for x, y in both.values())
    out["official parser"] = headline([x for x in main if x["vote"] == 0], rule="official")
    unread = [x for x in lines if x["verdict"] is None]
    out["unread"] = len(unread) / len(lines)
    out |= {f"unread/{reason}": n / len(lines) for reason, n in reasons(unread)}
    read = [x for x in main if x["verdict"]]
    out["says A"] = B.mean(x["verdict"] == "A" for x in read)
    out["tokens a judgment"] = B.mean(x["tokens"] for x in lines)
    for t, at in temperatures if "style/hard" in metrics else ():
        looks = [judges_by_looks(x["rubric"]) for x in at]
        out[f"by looks/{named('share', t)}"] = B.mean(looks)
        out[f"by looks/{named('accuracy of the others', t)}"] = B.mean(
            x["verdict"] == x["label"] for x, by_looks in zip(at, looks) if not by_looks)
    if quotes := sum(x["quotes"][1] for x in read):
        out["quotes word for word"] = sum(x["quotes"][0] for x in read) / quotes
    return out | {f"left out/{reason}": n for reason, n in reasons(left_out)}


# ---------------------------------------------------------------- the table

def names_of(table):
    """table: [(run's name, {benchmark: numbers}), ...] -> {benchmark: the names of all runs' numbers}, each
    after those that stand before it in its own run."""
    out = defaultdict(list)
    for _, blocks in table:
        for bench, numbers in blocks.items():
            at = 0
            for name in numbers:
                if name not in out[bench]:
                    out[bench].insert(at, name)
                at = out[bench].index(name) + 1
    return out


def as_text(table):
    """A block a benchmark, one column a run."""
    lines = []
    for bench, names in names_of(table).items():
        names = [n for n in names if not n.startswith(("cell/", "scenario/"))]
        label = {n: "  " + n.partition("/")[2] if "/" in n else n for n in names}
        runs = [(name, blocks[bench], max(13, len(name) + 2)) for name, blocks in table if bench in blocks]
        wide, heading = max(map(len, label.values())) + 1, None
        lines.append(f"{bench:<{wide}}" + "".join(f"{name:>{w}}" for name, _, w in runs))
        for n in names:
            group = n.split("/")[0]
            if "/" in n and group != heading and group not in names:
                lines.append(group)
            heading = group
            lines.append(f"{label[n]:<{wide}}" + "".join(f"{cell(m.get(n)):>{w}}" for _, m, w in runs))
        lines.append("")
    return "\n".join(lines)


def cell(v):
    if v is None or isinstance(v, str):
        return v or ""
    if isinstance(v, tuple):
        return f"{v[0]:.3f}-{v[1]:.3f}"
    if isinstance(v, int):
        return f"{v:,}"
    return f"{v:.1f}" if v > 1.01 else f"{v:.3f}"


# ---------------------------------------------------------------- the commands

def report(argv):
    """Table, page and curve from what evaluations and training have written."""
    ap = Flags(prog="eval.py report", description=report.__doc__)
    arg = ap.add_argument
    arg("runs", nargs="+", help="folders of evaluations, in the order of their columns")
    arg("--training", help="folder of a training run, for the curve")
    arg("--out", help="folder for table.txt, report.html and curve.png; default: the last run's")
    arg("--examples", type=number(int, 0), default=200, help="comparisons of every benchmark on the page")
    args = ap.parse_args(argv)
    runs, out = read_runs(args.runs), Path(args.out or args.runs[-1])
    table = [measure(run) for run in runs]
    text, page = as_text(table), (ASSETS / "report.html").read_text()
    print(text)
    # "</" would end the script that holds the data.
    data = json.dumps(page_data(runs, table, args.examples)).replace("</", "<\\/")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_lines(out / "table.txt", [text])
        write_lines(out / "report.html", [page.replace("/*DATA*/null", data)])
        if args.training:
            curve(Path(args.training) / "metrics.jsonl", out / "curve.png")
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror})")
    print(f"wrote {out}/table.txt, {out}/report.html" + (f", {out}/curve.png" if args.training else ""))


def page_data(runs, table, examples):
    """What the page shows: all numbers, the papers', and of every benchmark up to `examples` comparisons with
    each run's judgments of them, drawn evenly from those that the last run got right, wrong and not read."""
    shown, rng = {}, random.Random(0)
    for lines in by_bench(runs[-1]).values():
        kinds = grouped([x for x in coolest(lines) if x["vote"] == x["order"] == 0],
                        lambda x: (x["verdict"] is None, x["verdict"] == x["label"])).values()
        turns = itertools.zip_longest(*(rng.sample(kind, len(kind)) for kind in kinds))
        drawn = [x["id"] for turn in turns for x in turn if x]
        shown |= {key: [] for key in drawn[:examples]}
    for place, run in enumerate(runs):
        for x in itertools.chain(*map(coolest, by_bench(run).values())):
            if x["id"] in shown and x["vote"] == 0:
                shown[x["id"]].append({"run": place, "scores": x.get("scores"), **{k: x[k] for k in (
                    "order", "swap", "temperature", "verdict", "reason", "label", "tokens", "text")}})
    pairs = {k: p for run in runs for k, p in run["pairs"].items()}
    papers = csv.DictReader((ASSETS / "papers.csv").read_text().splitlines())
    parts = [name.partition("/") for name in papers.fieldnames]
    return {"runs": [{"name": name, "config": run["config"], "sets": blocks}
                     for run, (name, blocks) in zip(runs, table)],
            "rows": names_of(table),
            "paper": {row.pop("judge"): {k: float(v) for k, v in row.items() if v} for row in papers},
            "sections": {bench: [part for b, _, part in parts if b == bench and part] for bench in B.BENCHES},
            "examples": [{"judgments": judgments, **{k: pairs[key][k] for k in (
                "id", "bench", "subset", "context", "a", "b", "swap", "label")}}
                for key, judgments in shown.items()]}


def curve(metrics, path):
    """Accuracy over GRPO steps, what was sampled and what was held out, in one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if not metrics.is_file():
        fail(f"{metrics}: no such file; is --training the --out of a training run?")
    rows = read_lines(metrics)
    fig, ax = plt.subplots(figsize=(7, 4), dpi=150, layout="tight")
    for key, label, style in (("accuracy", "sampled while training, T=1", "C0.-"),
                              ("val_accuracy", "held-out pairs, greedy", "C3o-"),
                              ("unread", "unread verdicts", "C7:")):
        if points := [(r["step"], r[key]) for r in rows if key in r]:
            ax.plot(*zip(*points), style, label=label, lw=1.5, ms=5)
    ax.axhline(0.5, color="0.6", lw=0.8, ls="--", label="a coin")
    ax.set(xlabel="GRPO step", ylabel="share of judgments", ylim=(-0.02, 1.02),
           title="Accuracy while training")
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.08))
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)


def compare(argv):
    """Do two runs differ? Every main number's difference on the items that both have, with its interval."""
    ap = Flags(prog="eval.py compare", description=compare.__doc__)
    ap.add_argument("runs", nargs=2, help="folders of two evaluations")
    ap.add_argument("--all", action="store_true", help="every subset, not only the main numbers")
    args = ap.parse_args(argv)
    runs = read_runs(args.runs)
    first, second = map(by_bench, runs)
    both = [bench for bench in first if bench in second]
    if not both:
        fail(f"{args.runs[0]} and {args.runs[1]} have no benchmark in common")
    w, v = (max(14, len(run["name"]) + 2) for run in runs)
    print(f"{'':<44}{runs[0]['name']:>{w}}{runs[1]['name']:>{v}}{'difference':>14}{'95 % interval':>20}")
    for bench in both:
        one, two = (metrics_of(bench, run["pairs"], coolest(lines[bench]))
                    for run, lines in zip(runs, (first, second)))
        for name in one:
            if name not in two or "/" in name and not args.all:
                continue
            a, b = B.common(one[name], two[name]), B.common(two[name], one[name])
            x, y = B.value(a), B.value(b)
            if x is None or y is None:
                continue
            low, high = B.interval(b, minus=a)
            says = "differ" if low > 0 or high < 0 else "no difference shown"
            print(f"{bench + ' ' + name:<44}{x:>{w}.3f}{y:>{v}.3f}{y - x:>+14.3f}"
                  f"{f'{low:+.3f} to {high:+.3f}':>20}  {says}")


COMMANDS = {"report": report, "compare": compare}
