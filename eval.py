"""
How good a judge is: benchmarks or any file of pairs, and reports that need no model.

    torchrun --nproc_per_node 8 eval.py --model runs/grpo/model --bench all --out DIR
    python eval.py --model MODEL --protocol instruct --bench rm-bench,rmb --data-dir files --out DIR
    python eval.py --model MODEL --data pairs.jsonl --both-orders --temperature 1 --votes 5 --out DIR
    python eval.py --model NAME --base-url http://localhost:8000/v1 --protocol instruct --bench all --out DIR
    python eval.py --model Skywork/Skywork-Reward-Llama-3.1-8B-v0.2 --scalar --bench rewardbench --out DIR
    python eval.py report DIR1 DIR2 ... --out runs/report           # tables and a page, from the files alone
    python eval.py compare DIR1 DIR2                                # do two runs differ?

Writes DIR/pairs.jsonl (what was asked), DIR/judgments.jsonl (one line a judgment, as it comes),
DIR/left_out.jsonl and DIR/config.json, and computes every number from them. Killed and started again with the
same command, it judges what is still missing or has changed since.
"""
import errno
import hashlib
import json
import os
import random
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import benchmarks as B
from askers import Local, Scalar, Server, without_user
from engine import check_tp, seed_of
from files import Flags, claim, digest, fail, fingerprint, number, read_lines, read_object, write_lines
from rubrics import (PROTOCOLS, chat_messages, judges_by_looks, parse, process_judgement, prompt_form,
                     read_pairs, verbatim)


# ---------------------------------------------------------------- what to ask

def collect(args):
    """-> {pair id: (pair, swapped)}, [what was left out], [where it came from]. Of a benchmark's pair,
    response i is the better one and a hash of (seed, id) decides whether it is shown as B; a file's pairs are
    shown as they are."""
    asked, left_out, origin = {}, [], []
    for name in args.bench:
        pairs, bad, where = B.load(name, args.data_dir, args.limit, args.seed)
        origin += where
        left_out += bad
        for p in pairs:
            swap = hashlib.sha256(f"{args.seed}/{p.id}".encode()).digest()[0] % 2 == 1
            asked[p.id] = (p.swapped() if swap else p, swap)
    for path in args.data:
        name = Path(path).stem
        name += " pairs" if name in B.BENCHES else ""            # which would be scored as the benchmark
        origin.append(path)
        pairs = read_pairs(path, args.skip_bad)
        if args.limit:
            drawn = random.Random(args.seed).sample(range(len(pairs)), min(args.limit, len(pairs)))
            pairs = [pairs[i] for i in sorted(drawn)]
        for p in pairs:
            if args.both_orders and p.messages is not None and not p.a:
                fail(f"--both-orders: {path} has finished prompts whose responses cannot be told apart, the "
                     f"first is {p.id}")
            about = {"type": p.type, "source": p.source}
            if "style_a" in p.meta and "style_b" in p.meta:
                styles = [p.meta["style_a"], p.meta["style_b"]]
                about["styles"] = styles if p.label == "A" else styles[::-1]
            key = f"{name}/{p.id}"
            meta = {"bench": name, "item": p.id, "subset": "", "compare": [0, 1], **about}
            if key in asked:
                fail(f"{path}: two pairs have the id {p.id}")
            asked[key] = (replace(p, id=key, meta=meta), p.label == "B")
    return asked, left_out, origin


def tasks(asked, args):
    """[(pair as shown, order, swap, temperature, vote), ...]: order 0 is the one of `collect`, 1 the other.
    JudgeBench asks for both, a scalar judge knows no order, and greedy votes would all be the same."""
    out = []
    for pair, swap in asked.values():
        join = pair.meta["bench"] in B.BENCHES and B.BENCHES[pair.meta["bench"]].orders == "join"
        for order in (0, 1) if not args.scalar and (args.both_orders or join) else (0,):
            shown = pair.swapped() if order else pair
            for t in args.temperature:
                out += [(shown, order, swap ^ bool(order), t, v) for v in range(args.votes if t > 0 else 1)]
    return sorted(out, key=lambda x: x[3])


# ---------------------------------------------------------------- ask

def judge(args):
    """Ask for every judgment that the folder does not have yet, and write each as it comes."""
    import ranks
    asked, left_out, origin = collect(args)
    todo, out = tasks(asked, args), Path(args.out)
    if not todo:
        fail("nothing to judge" + (f": {left_out[0]['item']}: {left_out[0]['reason']}" if left_out else ""))
    rank, world, _ = ranks.start_ranks()
    config = settings(args, world) | {"data": origin}
    prompts = {}                                       # of a pair in an order: its votes share one

    def chat(shown, order):
        if (shown.id, order) not in prompts:
            prompts[shown.id, order] = [shown.context, shown.a, shown.b] if args.scalar else \
                chat_messages(shown, config["protocol"], config["system"])
        return prompts[shown.id, order]

    # A file that is asked in full says which of its pairs there are.
    whole = set() if args.limit else {p.meta["bench"] for p, _ in asked.values()} - set(B.BENCHES)
    done = open_run(out, config, asked, left_out, whole, chat, rank)
    # A prompt's votes stay on one rank, whose cache then has it.
    place = {key: n for n, key in enumerate(dict.fromkeys((x[0].id, x[1]) for x in todo))}
    # The ranks of one tensor-parallel engine ask the same; the first of them writes.
    engine, engines, writes = rank // args.tp, world // args.tp, rank % args.tp == 0
    mine = [x for x in todo if place[x[0].id, x[1]] % engines == engine and key_of(*x) not in done]
    bar = tqdm(total=len(mine), desc="judge", disable=ranks.quiet(), smoothing=0)
    right, failed, why = 0, 0, "no answer on another rank, or the files were changed meanwhile"
    ranks.phase("judge")
    work, = ranks.all_sum([len(mine)])                # building an engine is a collective: all do, or none
    with open(out / f"judgments.part{rank}.jsonl" if writes else os.devnull, "a") as f:
        for at, line in answers(args, mine, chat) if work else ():
            if isinstance(line, str):                  # why there is no answer: another run asks again
                failed, why = failed + 1, line
            else:
                shown, order, swap, temperature, vote = mine[at]
                f.write(json.dumps({"id": shown.id, "order": order, "swap": swap, "temperature": temperature,
                                    "vote": vote, "label": shown.label, **line}) + "\n")
                f.flush()
                right += line["verdict"] is not None and line["verdict"] == shown.label
            bar.update()
            bar.set_postfix_str(f"accuracy {right / max(1, bar.n - failed):.3f}", refresh=False)
    bar.close()
    ranks.barrier()                                   # everyone has written
    if rank == 0:
        there = merge(out, [key_of(*x) for x in todo])
        if there:
            print_table([measure(read_run(out))])
        if lost := sum(key_of(*x) not in there for x in todo):
            fail(f"{lost} of {len(todo)} judgments: {why}; the same command asks for them again")
    ranks.barrier()


def settings(args, world):
    """What judgments depend on beside their pairs, for config.json: a folder has those of one kind only."""
    import policy
    protocol = system = folder = None
    if not args.scalar:
        folder = None if args.base_url else policy.resolve(args.model)
        check_tp(args.tp, world, folder and policy.config_of(folder))
        protocol, system = prompt_form(folder, args.model, args.protocol, args.system_prompt)
    return {"model": args.model, "weights": fingerprint(args.model, folder),
            "base_url": args.base_url and without_user(args.base_url), "scalar": args.scalar,
            "protocol": protocol, "system": system, "max_tokens": args.max_tokens, "max_len": args.max_len,
            "dtype": args.dtype, "seed": args.seed}


def answers(args, mine, chat):
    """Yields (place in `mine`, the rest of its line, or why no answer came)."""
    if args.scalar:
        yield from scalar_answers(args, mine, chat)
        return
    judge = Server(args.base_url, args.model, args.max_tokens, args.at_once) if args.base_url else \
        Local(args.model, args.max_tokens, args.max_len, args.dtype, args.engine_memory, args.seed, args.tp)
    requests = ((chat(shown, order), seed_of(args.seed, shown.id, order, t, vote), t)
                for shown, order, _, t, vote in mine)
    for at, a in judge.answers(requests):
        shown, order, *_ = mine[at]
        yield at, a.finish if a.failed else line_of(a, shown, chat(shown, order))


def line_of(a, shown, messages):
    """What judgments.jsonl says about an answer, but for which comparison it belongs to."""
    j = parse(a.text, a.finish != "cut off")
    quotes = verbatim(j, shown)
    return {"verdict": j.verdict, "reason": j.reason if a.finish in ("stop", "cut off") else a.finish,
            "official": process_judgement(a.text), "finish": a.finish, "tokens": a.tokens,
            "prompt_tokens": a.prompt_tokens, "prompt": digest(messages), "type": j.type,
            "rubric": [[name, weight] for name, weight, _ in j.rubric], "quotes": [sum(quotes), len(quotes)],
            "text": a.text}


def scalar_answers(args, mine, chat):
    """A reward model scores every conversation once; the higher score is the verdict."""
    places, conversations = defaultdict(list), []
    for at, (shown, *_) in enumerate(mine):
        for side, response in (("A", shown.a), ("B", shown.b)):
            conversation = [*shown.context, {"role": "assistant", "content": response}]
            if (key := digest(conversation)) not in places:
                conversations.append(conversation)
            places[key].append((at, side))
    got, uses = defaultdict(dict), list(places.values())
    for place, score in Scalar(args.model, args.dtype).scores(conversations):
        for at, side in uses[place]:
            got[at][side] = score
            if len(got[at]) == 2:
                a, b = got[at]["A"], got[at]["B"]
                reason = ("longer than the model's window" if None in (a, b) else
                          "equal scores" if a == b else "")
                verdict = None if reason else "A" if a > b else "B"
                yield at, {"verdict": verdict, "reason": reason, "official": verdict or "error",
                           "finish": reason or "stop", "tokens": 0, "prompt_tokens": 0,
                           "prompt": digest(chat(*mine[at][:2])), "type": "", "rubric": [],
                           "quotes": [0, 0], "scores": [a, b], "text": ""}


# ---------------------------------------------------------------- a run's folder

def key_of(shown, order, swap, temperature, vote):
    return shown.id, order, float(temperature), vote


def line_key(line):
    return line["id"], line["order"], float(line["temperature"]), line["vote"]


def open_run(out, config, asked, left_out, whole, chat, rank):
    """Make the run's folder or check that it is this run's. Judgments of texts or labels that are others now,
    and of pairs that are no longer in a file of `whole`, leave it. -> keys of the judgments it has"""
    path = out / "config.json"
    if rank == 0:
        claim(out)
    if path.is_file() and any(p.stat().st_size for p in out.glob("judgments*.jsonl")):
        old = read_object(path)
        if differs := [k for k in config if k != "data" and old.get(k) != config[k]]:
            was, now = (str(c.get(differs[0]))[:80] for c in (old, config))
            fail(f"--out {out}: holds judgments with another {differs[0]} ({was}, now {now}); give another "
                 "folder or remove it")

    def current(line):
        pair, _ = asked.get(line["id"], (None, None))
        if pair is None:
            return line["id"].split("/")[0] not in whole
        if line["order"] and pair.messages is not None and not pair.a:      # cannot be swapped, as it is now
            return False
        shown = pair.swapped() if line["order"] else pair
        return line["label"] == shown.label and line["prompt"] == digest(chat(shown, line["order"]))

    if rank == 0:
        write_lines(path, [json.dumps(config, indent=2)])
        merge(out, keep=current)
        known = {p["id"]: p for p in read_lines(out / "pairs.jsonl") if p["bench"] not in whole}
        for pair, swap in asked.values():
            known[pair.id] = {"id": pair.id, **pair.meta, "context": pair.context, "a": pair.a, "b": pair.b,
                              "swap": swap, "label": pair.label}
        write_lines(out / "pairs.jsonl", map(json.dumps, known.values()))
        gone = {(x["bench"], x["item"]): x for x in read_lines(out / "left_out.jsonl") + left_out}
        write_lines(out / "left_out.jsonl", map(json.dumps, gone.values()))
    import ranks
    ranks.barrier()
    return {line_key(line) for line in read_lines(out / "judgments.jsonl")}


def lines_of(out):
    """{key: line} of the judgments that a folder has, those included that a run has not gathered yet."""
    return {line_key(x): x for path in (out / "judgments.jsonl", *sorted(out.glob("judgments.part*.jsonl")))
            for x in read_lines(path)}


def merge(out, order=(), keep=lambda line: True):
    """Gather what the ranks have written into judgments.jsonl: the lines to keep, in the order of the keys
    given first. -> {key: line}"""
    parts, found = sorted(out.glob("judgments.part*.jsonl")), lines_of(out)
    lines = {k: x for k, x in found.items() if keep(x)}
    if stale := len(found) - len(lines):
        print(f"{out}: {stale} judgments are of texts or labels that have changed or gone, and are dropped")
    if parts or stale:
        keys = list(dict.fromkeys([k for k in order if k in lines] + list(lines)))
        write_lines(out / "judgments.jsonl", (json.dumps(lines[k]) for k in keys))
    for path in parts:
        path.unlink()
    return lines


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
    names, depth = [p.name.removeprefix("eval-") for p in paths], 1
    while len(set(names)) < len(set(paths)):
        names, depth = ["/".join(p.parts[-depth:]) for p in paths], depth + 1
    return [read_run(path) | {"name": name} for path, name in zip(paths, names)]


# ---------------------------------------------------------------- measure

def majority(verdicts):
    """The verdict of most votes, None if A and B have as many."""
    a, b = verdicts.count("A"), verdicts.count("B")
    return None if a == b else "A" if a > b else "B"


def wins_of(lines, rule="verdict"):
    """{order: {pair id: share of the comparison that response i won}}, by majority of the votes. At a tie
    the first vote decides, which is right in one half of them: with no winner all would count as wrong, as
    what cannot be read does, and two votes would be worse than one."""
    cast = defaultdict(list)
    for line in sorted(lines, key=lambda x: x["vote"]):
        cast[line["order"], line["id"], line["swap"]].append(line[rule])
    out = defaultdict(dict)
    for (order, pair, swap), verdicts in cast.items():
        verdict = majority(verdicts) or next((v for v in verdicts if v in ("A", "B")), None)
        out[order][pair] = 0.5 if verdict is None else float((verdict == "A") != swap)
    return out


def metrics_of(bench, pairs, lines, rule="verdict", orders=None):
    """{name: metric} of one benchmark's judgments; orders as in `benchmarks.Bench`, whose own is the
    default."""
    spec = B.BENCHES.get(bench, B.FILE)
    wins, orders = wins_of(lines, rule) or {0: {}}, orders or spec.orders
    scores = {line["id"]: line for line in lines if line.get("scores")}
    if orders == "join":
        both = defaultdict(list)
        for part in wins.values():
            for pair, share in part.items():
                both[pair].append(share)
        wins = {0: {pair: sum(s) / len(s) for pair, s in both.items()}}
    elif orders == "first":
        wins = {0: wins[0]}
    views = []
    for part in wins.values():
        items = {}
        for pair, share in part.items():
            p = pairs[pair]
            it = items.setdefault(p["item"], B.Item(p["subset"], {}, p))
            it.wins[tuple(p["compare"])] = share
            if pair in scores and None not in scores[pair]["scores"]:
                i, j = p["compare"][::-1] if scores[pair]["swap"] else p["compare"]
                it.scores[i], it.scores[j] = scores[pair]["scores"]
        views.append(spec.score(items))
    return views[0] if len(views) == 1 else mean_of(views)


def mean_of(views):
    """The metrics of two orders as one: every item's value is the mean of those it has."""
    out = {}
    for name in views[0]:
        out[name] = {}
        for stratum in views[0][name]:
            parts = [v[name].get(stratum, (0, {})) for v in views if name in v]
            keys = dict.fromkeys(k for _, values in parts for k in values)
            seen = {k: [values[k] for _, values in parts if k in values] for k in keys}
            out[name][stratum] = parts[0][0], {k: sum(v) / len(v) for k, v in seen.items()}
    return out


def shown(metric):
    """A metric's value; "partial" where a part of it has no items."""
    return "partial" if B.value(metric) is None else B.value(metric)


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def measure(run):
    """All numbers of a run: (its name, {benchmark or file: {number's name: value}}), in the order in which
    they are printed."""
    by = defaultdict(list)
    for line in run["judgments"]:
        by[run["pairs"][line["id"]]["bench"]].append(line)
    return run["name"], {bench: measure_one(bench, run["pairs"], lines, [
        x for x in run["left_out"] if x["bench"] == bench]) for bench, lines in by.items()}


def measure_one(bench, pairs, lines, left_out):
    temperatures = sorted({x["temperature"] for x in lines})
    main = [x for x in lines if x["temperature"] == temperatures[0]]       # greedy, where that was asked for
    one = [x for x in main if x["vote"] == 0]
    metrics = metrics_of(bench, pairs, main)
    head = next(iter(metrics))
    named = lambda name, t: f"{name}, greedy" if t == 0 else f"{name}, T={t:g}"
    out = {"judgments": len(lines)}
    for t in temperatures:
        metric = metrics if t == temperatures[0] else metrics_of(
            bench, pairs, [x for x in lines if x["temperature"] == t])
        out[named(head, t)] = shown(metric[head])
        if B.value(metric[head]) is not None:
            out[f"{named(head, t)}, 95 %"] = B.interval(metric[head])[:2]
    for name, metric in metrics.items():
        if name != head:
            out[name] = shown(metric)
    if lost := B.missing(metrics[head]):
        out["partial, without"] = ", ".join(lost)

    votes = max(x["vote"] for x in lines) + 1
    for t in temperatures if votes > 1 else ():
        at = [x for x in lines if x["temperature"] == t]
        if max(x["vote"] for x in at) == 0:
            continue
        for k in range(1, max(x["vote"] for x in at) + 2, 2):
            if not (some := [x for x in at if x["vote"] < k]):             # a run under way may lack them
                continue
            out[f"votes/{head}, best of {k}, T={t:g}"] = shown(metrics_of(bench, pairs, some)[head])
            out[f"votes/tokens, best of {k}, T={t:g}"] = sum(x["tokens"] for x in some) / len(
                {(x["id"], x["order"]) for x in some})
    wins = wins_of(main)
    if len(wins) == 2:
        both = [(wins[0][k], wins[1][k]) for k in wins[0] if k in wins[1]]
        labelled = [(wins[0][k], wins[1][k]) for k in wins[0] if k in wins[1] and pairs[k]["label"]]
        if B.BENCHES.get(bench, B.FILE).orders == "first":
            out[f"{head}, mean of both orders"] = shown(metrics_of(bench, pairs, main, orders="mean")[head])
        out["right in both orders"] = share(a == b == 1 for a, b in labelled)
        out["same verdict in both orders"] = share(a == b != 0.5 for a, b in both)
    out["official parser"] = shown(metrics_of(bench, pairs, one, rule="official")[head])
    out["unread"] = share(x["verdict"] is None for x in lines)
    for reason, n in Counter(x["reason"].split(":")[0] for x in lines if x["verdict"] is None).most_common():
        out[f"unread/{reason}"] = n / len(lines)
    out["says A"] = share(x["verdict"] == "A" for x in main if x["verdict"])
    out["tokens a judgment"] = sum(x["tokens"] for x in lines) / len(lines)
    if "style/hard" in metrics:
        for t in temperatures:
            at = [(x, judges_by_looks(x["rubric"])) for x in lines if x["temperature"] == t]
            out[f"by looks/{named('share', t)}"] = share(looks for _, looks in at)
            out[f"by looks/{named('accuracy of the others', t)}"] = share(
                x["verdict"] == x["label"] for x, looks in at if not looks)
    if quotes := sum(x["quotes"][1] for x in main if x["verdict"]):
        out["quotes word for word"] = sum(x["quotes"][0] for x in main if x["verdict"]) / quotes
    for reason, n in Counter(x["reason"].split(":")[0] for x in left_out).most_common():
        out[f"left out/{reason}"] = n
    return out


def print_table(table, file=None):
    """table: [(run's name, {benchmark: numbers}), ...] -> a block a benchmark, one column a run."""
    for bench in dict.fromkeys(b for _, blocks in table for b in blocks):
        runs = [(name, blocks[bench]) for name, blocks in table if bench in blocks]
        names = [n for n in merged([list(m) for _, m in runs]) if not n.startswith(("cell/", "scenario/"))]
        label = lambda n: "  " + n.split("/", 1)[1] if "/" in n else n
        wide = max(len(label(n)) for n in names) + 1
        columns = [max(13, len(name) + 2) for name, _ in runs]
        print(f"{bench:<{wide}}" + "".join(f"{name:>{w}}" for (name, _), w in zip(runs, columns)), file=file)
        heading = None
        for n in names:
            group = n.split("/")[0] if "/" in n else None
            if group not in (None, heading) and group not in names:
                print(group, file=file)
            heading = group
            cells = (f"{cell(m.get(n)):>{w}}" for (_, m), w in zip(runs, columns))
            print(f"{label(n):<{wide}}" + "".join(cells), file=file)
        print(file=file)


def merged(lists):
    """The union of several ordered lists, each name after those that stand before it in its own list."""
    out = []
    for names in lists:
        at = 0
        for n in names:
            if n in out:
                at = out.index(n) + 1
            else:
                out.insert(at, n)
                at += 1
    return out


def cell(v):
    if v is None or isinstance(v, str):
        return v or ""
    if isinstance(v, (tuple, list)):
        return f"{v[0]:.3f}-{v[1]:.3f}"
    return f"{v:,}" if isinstance(v, int) else f"{v:.1f}" if v > 1.01 else f"{v:.3f}"


# ---------------------------------------------------------------- report and compare

def report(args):
    """Table, page and curve from what evaluations and training have written."""
    runs = read_runs(args.runs)
    table = [measure(run) for run in runs]
    print_table(table)
    out = Path(args.out or args.runs[-1])
    page = (Path(__file__).parent / "assets" / "report.html").read_text()
    # "</" would end the script that holds the data.
    data = json.dumps(page_data(runs, table, args.examples)).replace("</", "<\\/")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "table.txt", "w") as f:
            print_table(table, f)
        write_lines(out / "report.html", [page.replace("/*DATA*/null", data)])
        if args.training:
            curve(Path(args.training) / "metrics.jsonl", out / "curve.png")
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror})")
    print(f"wrote {out}/table.txt, {out}/report.html" + (f", {out}/curve.png" if args.training else ""))


def page_data(runs, table, examples):
    """What the page shows: all numbers, the papers', and of every benchmark up to `examples` comparisons with
    each run's judgments of them, drawn evenly from those that the last run got right, wrong and not read."""
    shown = {}
    for bench in table[-1][1]:
        kinds = defaultdict(list)
        for x in runs[-1]["judgments"]:
            if runs[-1]["pairs"][x["id"]]["bench"] == bench and x["vote"] == 0 and x["order"] == 0:
                kinds[x["verdict"] is None, x["verdict"] == x["label"]].append(x["id"])
        rng, picked = random.Random(0), []
        lists = [rng.sample(k, len(k)) for k in map(list, map(dict.fromkeys, kinds.values()))]
        while len(picked) < examples and any(lists):
            picked += [k.pop() for k in lists if k]
        shown |= dict.fromkeys(picked[:examples])
    judgments, coolest = defaultdict(list), [min(x["temperature"] for x in run["judgments"]) for run in runs]
    for place, run in enumerate(runs):
        for x in run["judgments"]:
            if x["id"] in shown and x["vote"] == 0 and x["temperature"] == coolest[place]:
                judgments[x["id"]].append({"run": place, **{k: x[k] for k in (
                    "order", "swap", "temperature", "verdict", "reason", "label", "tokens", "text")},
                    "scores": x.get("scores")})
    pairs = {k: p for run in runs for k, p in run["pairs"].items() if k in shown}
    return {"runs": [{"name": name, "config": run["config"], "sets": blocks}
                     for run, (name, blocks) in zip(runs, table)],
            "rows": {b: merged([list(blocks[b]) for _, blocks in table if b in blocks])
                     for b in dict.fromkeys(b for _, blocks in table for b in blocks)},
            "paper": B.PAPER, "sections": B.SECTIONS,
            "examples": [{**{k: pairs[i][k] for k in (
                "id", "bench", "subset", "context", "a", "b", "swap", "label")}, "judgments": judgments[i]}
                for i in shown]}


def compare(args):
    """Do two runs differ? Every main number's difference on the items that both have, with its interval."""
    first, second = read_runs(args.runs)
    benches = [list(dict.fromkeys(run["pairs"][x["id"]]["bench"] for x in run["judgments"]))
               for run in (first, second)]
    both = [b for b in benches[0] if b in benches[1]]
    if not both:
        fail(f"{args.runs[0]} and {args.runs[1]} have no benchmark in common")
    w, v = (max(14, len(run["name"]) + 2) for run in (first, second))
    print(f"{'':<44}{first['name']:>{w}}{second['name']:>{v}}{'difference':>14}{'95 % interval':>20}")
    for bench in both:
        metrics = []
        for run in (first, second):
            lines = [x for x in run["judgments"] if run["pairs"][x["id"]]["bench"] == bench]
            coolest = min(x["temperature"] for x in lines)
            metrics.append(metrics_of(bench, run["pairs"], [x for x in lines if x["temperature"] == coolest]))
        for name in metrics[0]:
            if name not in metrics[1] or "/" in name and not args.all:
                continue
            a, b = (common(m, other) for m, other in zip((metrics[0][name], metrics[1][name]),
                                                       (metrics[1][name], metrics[0][name])))
            if B.value(a) is None or B.value(b) is None:
                continue
            low, high, _ = B.interval(b, minus=a)
            says = "differ" if low > 0 or high < 0 else "no difference shown"
            x, y = B.value(a), B.value(b)
            print(f"{bench + ' ' + name:<44}{x:>{w}.3f}{y:>{v}.3f}{y - x:>+14.3f}"
                  f"{f'{low:+.3f} to {high:+.3f}':>20}  {says}")


def common(metric, other):
    """A metric on the items that another run has as well."""
    return {s: (w, {k: v for k, v in values.items() if k in other.get(s, (0, {}))[1]})
            for s, (w, values) in metric.items()}


def curve(metrics, path):
    """Accuracy over GRPO steps, what was sampled and what was held out, in one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if not metrics.is_file():
        fail(f"{metrics}: no such file; is --training the --out of a training run?")
    rows = read_lines(metrics)
    fig, ax = plt.subplots(figsize=(7, 4), dpi=150)
    for key, label, style in (("accuracy", "sampled while training, T=1", "C0.-"),
                              ("val_accuracy", "held-out pairs, greedy", "C3o-"),
                              ("unread", "unread verdicts", "C7:")):
        points = [(r["step"], r[key]) for r in rows if key in r]
        if points:
            ax.plot(*zip(*points), style, label=label, lw=1.5, ms=5)
    ax.axhline(0.5, color="0.6", lw=0.8, ls="--", label="a coin")
    ax.set(xlabel="GRPO step", ylabel="share of judgments", ylim=(-0.02, 1.02),
           title="Accuracy while training")
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.08))
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path)


FROM_FILES = (["report"], ["compare"])                # commands that have no ranks and do without torch


def arguments(ap):
    arg = ap.add_argument
    arg("--model", required=True,
        help="folder, hub id, FOLDER/config.json for random weights, or a server's name for it")
    arg("--bench", default="",
        help=f"benchmarks, comma-separated, NAME or NAME@REVISION: {', '.join(B.BENCHES)}; or all")
    arg("--data-dir", help="folder with the benchmarks' files instead of the hub")
    arg("--data", nargs="+", default=[], help="files of pairs: JSONL, JSON, parquet, or a hub dataset")
    arg("--out", required=True, help="folder of this run")
    arg("--protocol", choices=PROTOCOLS,
        help="prompt form; default: what the model was trained with (its judge.json)")
    arg("--system-prompt", help="file with the system prompt, instead of the model's or the published row's")
    arg("--base-url", help="ask an OpenAI-compatible server; its key comes from OPENAI_API_KEY")
    arg("--at-once", type=number(int, 1), default=64, help="requests under way at a server")
    arg("--scalar", action="store_true", help="the model is a reward model that gives a number, not a judge")
    arg("--temperature", type=number(float, 0), nargs="+", default=[0.0],
        help="0 for greedy; several are judged side by side")
    arg("--votes", type=number(int, 1), default=1,
        help="judgments of a comparison above temperature 0; the majority decides, the first at a tie")
    arg("--both-orders", action="store_true", help="judge every pair a second time with A and B swapped")
    arg("--limit", type=number(int, 1), help="only so many items of every subset, drawn by the seed")
    arg("--max-tokens", type=number(int, 1), default=8192, help="longest judgment in tokens")
    arg("--max-len", type=number(int, 2),
        help="longest prompt + judgment in tokens; default: the model's window")
    arg("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the computation")
    arg("--engine-memory", type=number(float, 0, 1, above=True), default=0.9,
        help="share of each card for vLLM")
    arg("--tp", type=number(int, 1), default=1,
        help="ranks that judge with one engine together (tensor parallel)")
    arg("--seed", type=number(int, 0), default=0, help="of orders, samples, --limit and random weights")
    arg("--skip-bad", action="store_true",
        help="report and leave out bad lines of --data instead of stopping")
    args = ap.parse_args()
    args.bench = list(B.BENCHES) if args.bench == "all" else [b for b in args.bench.split(",") if b]
    if unknown := [b for b in args.bench if b.split("@")[0] not in B.BENCHES]:
        fail(f"--bench {unknown[0]}: no such benchmark; there are {', '.join(B.BENCHES)}")
    if not args.bench and not args.data:
        fail("name something to judge: --bench or --data")
    if args.votes > 1 and max(args.temperature) == 0:
        fail(f"--votes {args.votes}: votes at temperature 0 are all the same; give --temperature 1")
    if len(set(args.temperature)) < len(args.temperature):
        fail("--temperature: each once")
    if args.scalar and (args.votes > 1 or args.both_orders or args.base_url or args.tp > 1):
        fail("--scalar: a reward model has no votes, no order, no server and no --tp")
    return args


def main():
    command = sys.argv[1] if sys.argv[1:2] in FROM_FILES else None
    ap = Flags(__doc__, prog=f"eval.py {command}" if command else None, epilog=None if command else
               "eval.py report DIR ... and eval.py compare DIR DIR read what was written; each has --help")
    arg = ap.add_argument
    if command == "report":
        arg("runs", nargs="+", help="folders of evaluations, in the order of their columns")
        arg("--training", help="folder of a training run, for the curve")
        arg("--out", help="folder for table.txt, report.html and curve.png; default: the last run's")
        arg("--examples", type=number(int, 0), default=200, help="comparisons of every benchmark on the page")
        return report(ap.parse_args(sys.argv[2:]))
    if command == "compare":
        arg("runs", nargs=2, help="folders of two evaluations")
        arg("--all", action="store_true", help="every subset, not only the main numbers")
        return compare(ap.parse_args(sys.argv[2:]))
    args = arguments(ap)
    try:
        judge(args)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"--out {args.out}: {e.strerror}; the judgments so far are kept, and the same command goes on")


if __name__ == "__main__":
    if sys.argv[1:2] in FROM_FILES:
        main()
    else:
        import ranks
        ranks.run(main)
