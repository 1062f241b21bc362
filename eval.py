"""
How good a judge is: accuracy on a file of pairs, and reports that need no model.

    python eval.py --model runs/demo/grpo/model --data runs/demo/data/test.jsonl \\
        --out runs/demo/eval-grpo ...                                       # see Makefile
    torchrun --nproc_per_node 8 eval.py --model MODEL --data test.jsonl \\
        --out DIR                                                           # every rank judges a slice
    python eval.py report runs/demo/eval-* --training runs/demo/grpo \\
        --out runs/demo                                                     # tables, curve, page of judgments

Writes one line a judgment to DIR/judgments.jsonl, and computes every number from those lines alone.
"""
import argparse
import html
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import policy
from rmr1 import Engine, seed_of, text_of
from rubrics import PROTOCOLS, chat_messages, encode, fail, parse, process_judgement, read_pairs, read_system


# ---------------------------------------------------------------- judge

def judge_file(args):
    """Judge every pair at every temperature, in one or both orders, and write the judgments as they are."""
    pairs = read_pairs(args.data, args.skip_bad)[:args.limit]
    system, folder = read_system(args.system_prompt), policy.resolve(args.model)
    tokenizer, stop = policy.load_tokenizer(folder)
    rank, world, device = policy.start_ranks()
    if args.both_orders and (fixed := sum(p.messages is not None and not p.a for p in pairs)):
        fail(f"--both-orders: {fixed} pairs of {args.data} come as finished prompts whose responses cannot "
             "be told apart")
    random, dtype = args.model.endswith("config.json"), policy.DTYPES[args.dtype]
    window = min(args.max_len or 10**9, policy.window_of(folder))

    orders = [("ab", p) for p in pairs] + [("ba", p.swapped()) for p in pairs if args.both_orders]
    prompts = [(order, p, encode(tokenizer, chat_messages(p, args.protocol, system))) for order, p in orders]
    todo = [(t, *x) for t in args.temperature for x in prompts if len(x[2]) < window]
    if not todo:
        fail(f"no prompt leaves room in a window of {window} tokens (--max-len, or the model's own)")
    mine = todo[rank::world]
    engine = Engine(folder, window, args.dtype, "dummy" if random else "auto")
    if random:                                     # the folder has no weights: bring them, as training does
        engine.sync(policy.load(args.model, device, dtype, args.seed, trainable=False), dtype)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    parts = [out / f"judgments.part{r}" for r in range(world)]
    samples = engine.generate([prompt for *_, prompt in mine],
                              [seed_of(args.seed, p.id, order, t) for t, order, p, _ in mine],
                              args.max_tokens, [t for t, *_ in mine], stop, progress=rank == 0)
    with open(parts[rank], "w") as f:
        for (temperature, order, pair, prompt), s in zip(mine, samples):
            text = text_of(tokenizer, prompt, s)
            j = parse(text, s.finished)
            f.write(json.dumps({
                "id": pair.id, "order": order, "temperature": temperature, "label": pair.label,
                "verdict": j.verdict, "reason": j.reason, "official": process_judgement(text),
                "source": pair.source, "type": pair.type, "finished": s.finished, "tokens": len(s.tokens),
                "style_a": pair.meta.get("style_a"), "style_b": pair.meta.get("style_b"),
                "question": pair.context[-1]["content"], "a": pair.a, "b": pair.b, "text": text}) + "\n")
    policy.stop_ranks()                            # everyone has written
    if rank == 0:
        lines = [p.read_text().splitlines(keepends=True) for p in parts]
        tmp = out / "judgments.jsonl.tmp"
        tmp.write_text("".join(lines[i % world][i // world] for i in range(len(todo))))
        tmp.rename(out / "judgments.jsonl")
        for p in parts:
            p.unlink()
        if len(prompts) * len(args.temperature) > len(todo):
            print(f"{len(prompts) - len(todo) // len(args.temperature)} prompts leave no room in a window of "
                  f"{window} tokens: not judged")
        print_table([(out.name, measure(read_judgments(out)))])


# ---------------------------------------------------------------- measure

def read_judgments(folder):
    path = Path(folder) / "judgments.jsonl"
    if not path.is_file():
        fail(f"{path}: no such file; is {folder} the --out of an evaluation?")
    with open(path) as f:
        return [json.loads(line) for line in f]


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def measure(rows):
    """All numbers of one evaluation, {name: value}, in the order in which they are printed.

    Accuracy: right verdicts over all judgments, an unread verdict being wrong. Greedy rows (temperature 0)
    and sampled rows are kept apart; where both orders were judged, both count."""
    right = lambda r: r["verdict"] == r["label"]
    temperatures = sorted({r["temperature"] for r in rows})
    main = [r for r in rows if r["temperature"] == temperatures[0]]        # greedy, where that was asked for
    out = {"judgments": len(rows)}
    for temperature in temperatures:
        at = [r for r in rows if r["temperature"] == temperature]
        out["accuracy, greedy" if temperature == 0 else f"accuracy, T={temperature:g}"] = share(
            map(right, at))
        if temperature == temperatures[0]:
            for key in ("type", "source"):
                values = sorted({r[key] for r in at if r[key]})
                for value in values if len(values) > 1 else []:
                    out[f"  {key} {value}"] = share(right(r) for r in at if r[key] == value)
    orders = {}
    for r in main:
        orders.setdefault(r["id"], []).append(right(r))
    if both := [o for o in orders.values() if len(o) == 2]:
        out["right in both orders"] = share(all(o) for o in both)
    out["official rule"] = share(r["official"] == r["label"] for r in main)
    out["unread"] = share(r["verdict"] is None for r in rows)
    for reason, n in Counter(r["reason"] for r in rows if r["verdict"] is None).most_common():
        out[f"  {reason}"] = n / len(rows)
    read = [r for r in main if r["verdict"]]
    out["says A"] = share(r["verdict"] == "A" for r in read)
    out["tokens a judgment"] = sum(r["tokens"] for r in rows) / len(rows)
    if all(r["style_a"] is not None for r in rows):
        out |= style_cells(main)
    judgments = [parse(r["text"], r["finished"]) for r in main]
    looks = [bool(j.rubric) and all(name.lower().startswith("style") for name, *_ in j.rubric)
             for j in judgments]
    if any(looks) or "style hard" in out:          # by looks: all the weight of the rubric is on style
        out["judges by looks"] = share(looks)
        out["accuracy of the others"] = share(right(r) for r, l in zip(main, looks) if not l)
    out["quotes word for word"] = share(q.strip() in r[side.lower()] for r, j in zip(main, judgments)
                                        if j.verdict for side in "AB" for q in j.quotes[side])
    return out


def style_cells(rows):
    """RM-Bench's view: the mean of M[style of the right response][style of the wrong one] over the cells
    where the right one is plainer (hard), as showy (normal) or showier (easy)."""
    cells = {}
    for r in rows:
        right, wrong = (r["style_a"], r["style_b"]) if r["label"] == "A" else (r["style_b"], r["style_a"])
        cells.setdefault((right, wrong), []).append(r["verdict"] == r["label"])
    mean = lambda keep: share([share(v) for (c, w), v in cells.items() if keep(c, w)])
    return {"style hard": mean(lambda c, w: c < w), "style normal": mean(lambda c, w: c == w),
            "style easy": mean(lambda c, w: c > w)}


def print_table(runs, file=sys.stdout):
    """runs: [(name, measures), ...] -> one column a run, in the order of the names' first appearance."""
    names = list(dict.fromkeys(k for _, m in runs for k in m))
    wide = max(len(n) for n in names)
    cell = lambda v: ("" if v is None else f"{v:,}" if isinstance(v, int) else
                      f"{v:.1f}" if v > 1 else f"{v:.3f}")
    columns = [max(10, len(name) + 2) for name, _ in runs]
    print(" " * wide + "".join(f"{name:>{w}}" for (name, _), w in zip(runs, columns)), file=file)
    for n in names:
        print(f"{n:<{wide}}" + "".join(f"{cell(m.get(n)):>{w}}" for (_, m), w in zip(runs, columns)),
              file=file)


# ---------------------------------------------------------------- report

def report(args):
    """Table, curve and page from what evaluations and training have written."""
    runs = [(Path(folder).name.removeprefix("eval-"), read_judgments(folder)) for folder in args.runs]
    table = [(name, measure(rows)) for name, rows in runs]
    print_table(table)
    if args.out:
        out = Path(args.out)
        with open(out / "table.txt", "w") as f:
            print_table(table, f)
        (out / "judgments.html").write_text(page(runs, table, args.examples))
        if args.training:
            curve(Path(args.training) / "metrics.jsonl", table, out / "curve.png")
        print(f"\nwrote {out}/table.txt, {out}/judgments.html"
              + (f", {out}/curve.png" if args.training else ""))


def curve(metrics, table, path):
    """Accuracy over GRPO steps, what was sampled and what was held out, in one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if not metrics.is_file():
        fail(f"{metrics}: no such file; is --training the --out of a training run?")
    rows = [json.loads(line) for line in open(metrics)]
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


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Sampled judgments</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
pre{white-space:pre-wrap;font:13px/1.45 ui-monospace,monospace;margin:.3rem 0}
section{border-top:1px solid #ddd;padding:1rem 0} .row{display:flex;gap:1rem;flex-wrap:wrap} .row>div{flex:1 1 250px;min-width:0}
.card{border-left:4px solid #bbb;padding:.2rem .8rem;background:#f7f7f7} .right{border-color:#2a8f4f} .wrong{border-color:#c0392b}
.unread{border-color:#d9a400} h2{font-size:1rem;margin:.2rem 0} .tag{color:#888} q{background:#fff2b8;quotes:none}
.best{font-weight:600} small{color:#666}
</style><h1>Sampled judgments</h1><p>The same test pairs, judged greedily at each stage. Green: the verdict people gave; red: the
other one; yellow: none that can be read. Quotes are marked. Every number is in <code>table.txt</code>.</p><pre>%s</pre>%s</html>"""


def page(runs, table, examples):
    """A self-contained page: some pairs with the judgment of every run beside each other."""
    text = io.StringIO()
    print_table(table, text)
    keyed = [(name, {(r["id"], r["order"]): r for r in rows
                     if r["temperature"] == min(x["temperature"] for x in rows)})
             for name, rows in runs]
    shown = list(keyed[-1][1])[:examples]
    sections = []
    for key in shown:
        first = keyed[-1][1][key]
        sides = "".join(f"<div><small{' class=best' if first['label'] == s else ''}>Response {s}"
                        f"{' (preferred)' if first['label'] == s else ''}</small>"
                        f"<pre>{html.escape(first[s.lower()])}</pre></div>" for s in "AB")
        cards = ""
        for name, rows in keyed:
            if r := rows.get(key):
                kind = ("unread" if r["verdict"] is None else
                        "right" if r["verdict"] == r["label"] else "wrong")
                cards += (f'<div class="card {kind}"><h2>{html.escape(name)}: '
                          f'{r["verdict"] or html.escape(r["reason"])}</h2>'
                          f'<pre>{marked(r["text"])}</pre></div>')
        sections.append(f"<section><h2>{html.escape(first['question'])}</h2><div class=row>{sides}</div>"
                        f"<div class=row>{cards}</div></section>")
    return PAGE % (html.escape(text.getvalue()), "".join(sections))


def marked(text):
    """A judgment as HTML: quotes highlighted, tags grey; no more than 4,000 characters of it."""
    text = re.sub(r"&lt;(quote_[AB])&gt;(.*?)&lt;/\1&gt;", r"&lt;\1&gt;<q>\2</q>&lt;/\1&gt;",
                  html.escape(text[:4000]), flags=re.S)
    return re.sub(r"&lt;/?\w+&gt;", r"<span class=tag>\g<0></span>", text)


def main():
    if sys.argv[1:2] == ["report"]:
        ap = argparse.ArgumentParser(prog="eval.py report",
                                     description="tables, curve and page from finished evaluations",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        ap.add_argument("runs", nargs="+", help="folders of evaluations, in the order of their columns")
        ap.add_argument("--training", help="folder of a training run, for the curve")
        ap.add_argument("--out", help="folder for table.txt, judgments.html and curve.png")
        ap.add_argument("--examples", type=int, default=12, help="pairs on the page")
        return report(ap.parse_args(sys.argv[2:]))
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arg = ap.add_argument
    arg("--model", required=True, help="folder, hub id, or FOLDER/config.json for random weights")
    arg("--data", required=True, help="pairs: JSONL file or hub dataset")
    arg("--out", required=True, help="folder for judgments.jsonl")
    arg("--protocol", choices=PROTOCOLS, default="instruct",
        help="prompt form, for rows without published prompts")
    arg("--system-prompt", help="file with the system prompt, instead of ours or the published row's")
    arg("--temperature", type=float, nargs="+", default=[0.0],
        help="0 for greedy; several are judged one after the other")
    arg("--both-orders", action="store_true", help="judge every pair a second time with A and B swapped")
    arg("--max-tokens", type=int, default=8192, help="longest judgment in tokens")
    arg("--max-len", type=int, help="window in tokens; default: the model's")
    arg("--limit", type=int, help="only the first pairs")
    arg("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
    arg("--seed", type=int, default=0, help="of sampled judgments and random weights")
    arg("--skip-bad", action="store_true", help="report and leave out bad lines instead of stopping")
    judge_file(ap.parse_args())


if __name__ == "__main__":
    main()
