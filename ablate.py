"""
What matters: variants of a chain of commands, over seeds, and one table of what they came to.

    python ablate.py --seeds 0 1 2                          # assets/ablations.txt: the demo, and what differs
    python ablate.py --only base "no KL"
    python ablate.py --variant "mine: grpo my_grpo.py --flag 3"          # a fork: its script in place of ours
    python ablate.py --plan assets/ablations-7b.txt --print > jobs  # what can start now, a command a line
    sbatch --array 1-$(wc -l < jobs) --wrap 'sed -n ${SLURM_ARRAY_TASK_ID}p jobs | bash'
    python ablate.py --table                                # of what has ended so far

A **stage** is a command that writes `@/NAME`, and needs those whose `@/NAME` it reads. Its folder is named by
a digest of its command, in which what it needs is named likewise: variants that agree up to some stage share
it, and nothing says so but the commands. OUT/NAME-DIGEST.done appears when it has ended well, with the commit
and the seconds; without that the same command runs again, and goes on as its script does. OUT/table.md,
OUT/rows.jsonl (every row with its commands and commits) and OUT/table.png come from the runs' own files.
"""
import functools
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import benchmarks as B
from files import Flags, claim, fail, number, read_lines, read_text, write_lines
from report import ASSETS, by_bench, cell, grouped, measure, metrics_of, read_run

TAKES = {"data": 7, "sft": 90, "grpo": 35, "eval": 12}       # seconds at the demo's size on two idle cores
OTHERS = ("right in both orders", "unread", "tokens a judgment")                 # of report.py's numbers


# ---------------------------------------------------------------- variants and stages

@dataclass
class Variant:
    """A row. changes: {stage: ["[script] flags", ...]}, first those that all have; at: its evaluation, None
    for the base's last; against: the variant that it is compared with; text: the line that says this"""
    changes: dict
    at: str | None
    against: str
    text: str


@dataclass
class Stage:
    """A command, ready for a shell, its folder, and the folders that it needs."""
    folder: str
    command: str
    needs: list

    def done(self):
        """[commit, seconds] where it has ended well, else None"""
        mark = Path(f"{self.folder}.done")
        return mark.read_text().split() if mark.is_file() else None

    def last_words(self):
        log = Path(f"{self.folder}.log")
        lines = list(filter(str.strip, read_text(log).splitlines())) if log.is_file() else []
        said = [x for x in lines if "rror: " in x] or lines or ["no output"]
        return " ".join(said[-1].split())[:150]


def read_plan(lines):
    """The lines of a plan, see assets/ablations.txt -> [base command, ...], {name: Variant}"""
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    commands, variants, common = [x for x in lines if "--out @/" in x], {}, {}
    for line in (x for x in lines if "--out @/" not in x):
        name, colon, text = map(str.strip, line.partition(":"))
        if not colon or name in variants:
            fail(f"{line}: " + ("two variants have this name" if colon else "not NAME: changes"))
        changes = dict(map(str.strip, x.strip().partition(" ")[::2]) for x in text.split(";") if x.strip())
        at, against = changes.pop("at", None), changes.pop("against", "base")
        if name == "all":
            common = changes
            continue
        both = {k: [c[k] for c in (common, changes) if k in c] for k in {**common, **changes}}
        variants[name] = Variant(both, at, against, text)
    return commands, variants


def changed(command, change):
    """The command with other flags, each in place of the one that it had, and another script."""
    script, flags = re.fullmatch(r"(\S+\.py\b)?(.*)", change).groups()
    command = re.sub(r"\S+\.py\b", script, command, count=1) if script else command
    for flag in re.findall(r"(?<!\S)--[\w-]+", flags):
        command = re.sub(rf" {flag}(?!\S)( (?!--)\S+)*", "", command)
    return f"{command} {flags.strip()}".strip()


def stages_of(name, variant, base, out):
    """[Stage, ...] of a variant, each after those that it needs, its evaluation last; base: [command, ...]"""
    commands, made = {re.search(r"--out @/([\w-]+)", line)[1]: line for line in base}, {}
    at = variant.at or list(commands)[-1]
    if unknown := [x for x in (at, *variant.changes) if x not in commands]:
        fail(f"{name}: no command of the base writes @/{unknown[0]}; there are {', '.join(commands)}")

    def make(stage):
        if stage not in made:
            text = functools.reduce(changed, variant.changes.get(stage, []), commands[stage])
            needs = {n: make(n).folder for n in re.findall(r"@/([\w-]+)", text) if n != stage}
            text = re.sub(r"@/([\w-]+)", lambda m: needs.get(m[1], m[0]), text)
            # A fork is what its file says now: edited, it is another stage.
            forks = re.findall(r"^\S+\.py\b", "\n".join(variant.changes.get(stage, [])), re.M)
            known = text + "".join(read_text(fork, name) for fork in forks[-1:])
            folder = f"{out}/{stage}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
            made[stage] = Stage(folder, text.replace(f"@/{stage}", folder), list(needs.values()))
        return made[stage]

    make(at)
    return list(made.values())


# ---------------------------------------------------------------- run

def line_of(stage):
    """What a shell runs: the command, its output into a file, and the mark, with commit and seconds, where it
    ended well. A training run that a signal stops ends well, too, but leaves OUT/stopped."""
    f = shlex.quote(stage.folder)
    return (f"SECONDS=0; mkdir -p {f} && {{ {stage.command}; }} > {f}.log 2>&1 && test ! -e {f}/stopped && "
            f'echo "$(git describe --always --dirty) $SECONDS" > {f}.done')


def run(todo, show):
    """Every stage, if what it needs is there; one that fails costs those that need it. Each runs in a process
    group of its own, which ends with this process: training writes a checkpoint first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for n, s in enumerate(todo, 1):
        if lost := [need for need in s.needs if not Path(f"{need}.done").is_file()]:
            print(f"[{n}/{len(todo)}] left out, as it needs {lost[0]}: {s.folder}")
            continue
        print(f"[{n}/{len(todo)}] {s.command}", flush=True)
        child = subprocess.Popen(["bash", "-c", line_of(s)], start_new_session=True)
        try:
            child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
            raise
        if not s.done():
            print(f"failed: {s.last_words()}", flush=True)
        show()                                             # the table grows with what has ended


# ---------------------------------------------------------------- the table

@functools.cache
def numbers(folder):
    """Of an evaluation: {temperature: its first metric, of several benchmarks their mean}, {name in OTHERS:
    number}"""
    run = read_run(folder)
    benches, heads = by_bench(run), {}
    for bench, lines in benches.items():
        for t, at in grouped(lines, lambda x: x["temperature"]).items():
            metric = next(iter(metrics_of(bench, run["pairs"], at).values()))
            heads.setdefault(t, {}).update({f"{bench}/{stratum}": (weight / len(benches), values)
                                            for stratum, (weight, values) in metric.items()})
    blocks = measure(run)[1].values()
    return heads, {name: mean(found) for name in OTHERS if (found := [b[name] for b in blocks if name in b])}


def compared(ours, theirs):
    """{seed: metric} of a row and of another -> mean and spread over seeds, and the difference of the two on
    the seeds and items that both have, with its 95 % interval, as `eval.py compare` has it."""
    each = [B.value(metric) for metric in ours.values()]
    out = {"value": mean(each), "spread": stdev(each) if len(each) > 1 else None}
    if seeds := [seed for seed in ours if seed in theirs]:
        # Together they are one metric: a seed's strata are strata of their own, so that pairs stay pairs.
        one, two = ({f"{k}/{stratum}": (weight / len(seeds), values) for k in seeds
                     for stratum, (weight, values) in metrics[k].items()} for metrics in (ours, theirs))
        one, two = B.common(one, two), B.common(two, one)
        out |= {"difference": B.value(one) - B.value(two), "interval": B.interval(one, minus=two)}
    return out


def row_of(name, variant, chains, results):
    """What rows.jsonl says of a variant. chains: {seed: [Stage, ...]}; results: {name: {seed: `numbers`}} of
    what has ended"""
    mine, other = results[name], results[variant.against] if variant.against != name else {}
    row = {"name": name, "changes": variant.text, "seeds": list(mine),
           "commands": {seed: [s.command for s in chain] for seed, chain in chains.items()}}
    if not mine:
        stuck = next(s for chain in chains.values() for s in chain if not s.done())
        begun = Path(f"{stuck.folder}.log").is_file()
        return row | {"status": f"not ended: {stuck.last_words()}" if begun else "not run yet"}
    row["accuracy"] = {}
    for t in sorted({t for heads, _ in mine.values() for t in heads}):
        ours, theirs = ({k: heads[t] for k, (heads, _) in x.items() if t in heads} for x in (mine, other))
        row["accuracy"][t] = compared(ours, theirs)
    for x in OTHERS:
        if found := [others[x] for _, others in mine.values() if x in others]:
            row[x] = mean(found)
    ended = [s for seed in mine for s in chains[seed]]
    tokens = [x.get("tokens", 0) for s in ended for x in read_lines(Path(s.folder) / "metrics.jsonl")]
    seconds = [int(s.done()[1]) for s in ended]
    return row | {"tokens learned": sum(tokens) / len(mine), "seconds": sum(seconds) / len(mine),
                  "commits": sorted({s.done()[0] for s in ended})}


def cells_of(row, temperatures):
    """A row of table.md"""
    cells = [row["name"], row["changes"] and f"`{row['changes']}`"]
    if "status" in row:
        return [*cells, row["status"]] + [""] * (2 * len(temperatures) + len(OTHERS) + 3)
    for t in temperatures:
        a = row["accuracy"].get(t, {"value": None, "spread": None})
        cells.append(cell(a["value"]) + (f" ± {a['spread']:.3f}" if a["spread"] is not None else ""))
        cells.append("{:+.3f} ({:+.3f} to {:+.3f})".format(a["difference"], *a["interval"])
                     if "difference" in a else "")
    return [*cells, *(cell(row.get(x)) for x in OTHERS), f"{row['tokens learned'] / 1e6:.2f}M",
            f"{row['seconds']:.0f}", ", ".join(map(str, row["seeds"])), ", ".join(row["commits"])]


def write_table(plan, chains, out, only):
    """rows.jsonl, table.md and table.png of what has ended. chains: {name: {seed: [Stage, ...]}}"""
    results = {name: {seed: numbers(s[-1].folder) for seed, s in some.items() if s[-1].done()}
               for name, some in chains.items()}
    rows = [row_of(name, variant, chains[name], results) for name, variant in plan.items()
            if name in only or results[name]]
    temperatures = sorted({t for row in rows for t in row.get("accuracy", ())})
    named = ["greedy" if t == 0 else f"T={t:g}" for t in temperatures]
    head = ["variant", "differs by", *(x for t in named for x in (t, "difference, 95 %")), *OTHERS,
            "tokens learned", "seconds", "seeds", "commit"]
    lines = [head, ["---"] * len(head), *(cells_of(row, temperatures) for row in rows)]
    write_lines(out / "table.md", (f"| {' | '.join(line)} |" for line in lines))
    write_lines(out / "rows.jsonl", map(json.dumps, rows))
    picture([row for row in rows if "accuracy" in row], zip(temperatures, named), out / "table.png")


def picture(rows, temperatures, path):
    """Each row's difference from what it is compared with, and its 95 % interval."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 1.2 + 0.3 * len(rows)), dpi=150, layout="tight")
    for i, (t, name) in enumerate(temperatures):
        for y, row in enumerate(rows):
            if "difference" in (a := row["accuracy"].get(t, {})):
                ax.plot(a["interval"], [y + 0.2 * i] * 2, f"C{3 * i}-", lw=1.5)
                ax.plot(a["difference"], y + 0.2 * i, f"C{3 * i}o", ms=4)
        ax.plot([], [], f"C{3 * i}o-", label=name)
    ax.axvline(0, color="0.6", lw=0.8, ls="--")
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.set_xlabel("difference in accuracy")
    if rows:
        ax.legend(frameon=False)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)
    plt.close(fig)


# ---------------------------------------------------------------- the command line

def demo_commands(seed):
    """The commands of `make demo`, with @ for its folder."""
    make = subprocess.run(["make", "-n", "demo", "DEMO=@", f"SEED={seed}", "READY="], capture_output=True,
                          text=True, check=True, cwd=Path(__file__).parent)
    return [line for line in make.stdout.splitlines() if "--out @/" in line]


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--plan", default=str(ASSETS / "ablations.txt"),
        help="file of variants, and of the base's commands, {seed} in them, if it is not the demo")
    arg("--variant", action="append", default=[], help='one more, "NAME: changes"; may be given again')
    arg("--seeds", type=number(int, 0), nargs="+", default=[0], help="each variant runs with each")
    arg("--only", nargs="+", metavar="NAME", help="run these; the table has them, and what has ended")
    arg("--out", default="runs/ablate", help="folder of all runs and of the table")
    arg("--print", action="store_true", help="print what can start now, and run nothing")
    arg("--table", action="store_true", help="write the table, and run nothing")
    args = ap.parse_args()
    base, plan = read_plan([*read_text(args.plan, "--plan").splitlines(), *args.variant])
    if unknown := [n for n in (*(args.only or ()), *(v.against for v in plan.values())) if n not in plan]:
        fail(f"{unknown[0]}: no such variant; there are {', '.join(plan)}")
    bases = {k: [x.replace("{seed}", str(k)) for x in base] or demo_commands(k) for k in args.seeds}
    chains = {n: {k: stages_of(n, v, bases[k], args.out) for k in args.seeds} for n, v in plan.items()}
    asked = {s.folder: s for k in args.seeds for n in args.only or plan for s in chains[n][k]}
    todo = [s for s in asked.values() if not s.done()]
    if args.print:
        for s in todo:
            if all(Path(f"{need}.done").is_file() for need in s.needs):
                print(line_of(s))
        return
    claim(args.out)
    show = lambda: write_table(plan, chains, Path(args.out), args.only or plan)
    seconds = sum(TAKES.get(Path(s.folder).name.split("-")[0], 60) for s in todo)
    print(f"{len(args.only or plan)} rows, {len(args.seeds)} seeds: {len(asked)} commands, {len(todo)} of "
          f"them to run, at the demo's size in about {seconds / 60:.0f} minutes", flush=True)
    if not args.table:
        run(todo, show)
    show()
    print(f"wrote {args.out}/table.md, rows.jsonl, table.png")
    if not args.table and any(not s.done() for s in todo):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
