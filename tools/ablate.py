"""
What matters: variants of a chain of commands, over seeds, and one table of their results.

    python tools/ablate.py --seeds 0 1 2              # assets/ablations.txt: the demo, and what differs from it
    python tools/ablate.py --only base "no KL"
    python tools/ablate.py --variant "mine: grpo forks/mine.py --flag 3"     # a fork: its script replaces grpo.py
    python tools/ablate.py --plan assets/ablations-7b.txt --print > jobs     # what can start now, a command a line
    sbatch --array 1-$(wc -l < jobs) --wrap 'sed -n ${SLURM_ARRAY_TASK_ID}p jobs | bash'
    python tools/ablate.py --table                    # of what has ended so far

A **stage** is a command that writes `@/NAME`; it needs the stages whose `@/NAME` it reads. The name of its folder
holds a digest of its command, in which the folders that it needs stand by their names. So variants that agree up to
some stage share it, and nothing but the commands says so. OUT/NAME-DIGEST.done appears when a stage has ended well,
with the commit and the seconds. Without that file the same command runs again, and its script resumes.
OUT/table.md, OUT/rows.jsonl (every row with its commands and commits) and OUT/table.png are made of the runs' files.
"""

import functools
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from judge import benchmarks
from judge.report import (
    by_bench,
    by_temperature,
    cell,
    measure,
    metrics_of,
    read_run,
    temperature_name,
)
from lib.files import (
    Failure,
    Flags,
    json_text,
    lock_folder,
    number,
    read_lines,
    read_text,
    run_main,
    write_lines,
)

# Seconds of a stage at the demo's size on two idle cores.
STAGE_SECONDS = {"data": 7, "sft": 90, "grpo": 35, "eval": 12}

# The columns beside the accuracy: {key among the numbers of judge/report.py: heading}.
OTHER_NUMBERS = {
    "right_in_both_orders": "right in both orders",
    "no_verdict": "no verdict",
    "tokens_per_judgment": "tokens a judgment",
}


# ---------------------------------------------------------------- variants and stages


@dataclass
class Variant:
    """A row of the table.

    changes   {stage: ["[script] flags", ...]}, the changes that all rows share first
    final     the stage that evaluates it; None for the last of the base
    against   the variant that it is compared with
    text      the line of the plan that says so
    """

    changes: dict
    final: str | None
    against: str
    text: str


@dataclass
class Stage:
    """A command, ready for a shell, its folder, and the folders that it needs."""

    folder: str
    command: str
    needs: list

    def done(self):
        """[commit, seconds] of a stage that has ended well, else None"""
        mark = Path(f"{self.folder}.done")
        return mark.read_text().split() if mark.is_file() else None

    def last_message(self):
        """The last error in the stage's output, or the last line."""
        log = Path(f"{self.folder}.log")
        text = read_text(log) if log.is_file() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "rror: " in line]
        message = (errors or lines or ["no output"])[-1]
        return " ".join(message.split())[:150]


def read_plan(lines):
    """The lines of a plan, see assets/ablations.txt -> [base command, ...], {name: Variant}"""
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    commands = [line for line in lines if "--out @/" in line]
    shared, variants = {}, {}
    for line in lines:
        if line in commands:
            continue
        name, colon, text = (part.strip() for part in line.partition(":"))
        if not colon:
            raise Failure(f"{line}: not NAME: changes")
        if name in variants:
            raise Failure(f"{line}: two variants have this name")
        changes = read_changes(text)
        if name == "all":
            shared = changes
        else:
            final, against = changes.pop("at", None), changes.pop("against", "base")
            both = {
                stage: [part[stage] for part in (shared, changes) if stage in part]
                for stage in {**shared, **changes}
            }
            variants[name] = Variant(both, final, against, text)
    return commands, variants


def read_changes(text):
    """ "grpo --beta 0; at eval-sft" -> {"grpo": "--beta 0", "at": "eval-sft"}"""
    changes = {}
    for part in text.split(";"):
        first_word, _, rest = part.strip().partition(" ")
        if first_word:
            changes[first_word] = rest.strip()
    return changes


def change_command(command, change):
    """The command with other flags, each in place of the one that it had, and with another script."""
    script, flags = re.fullmatch(r"(\S+\.py\b)?(.*)", change).groups()
    if script:
        command = re.sub(r"\S+\.py\b", script, command, count=1)
    for flag in re.findall(r"(?<!\S)--[\w-]+", flags):
        command = re.sub(rf" {flag}(?!\S)( (?!--)\S+)*", "", command)
    return f"{command} {flags.strip()}".strip()


def stages_of(name, variant, base, out):
    """[Stage, ...] of a variant, each after those that it needs, its evaluation last; base: [command, ...]"""
    commands = {re.search(r"--out @/([\w-]+)", line)[1]: line for line in base}
    final = variant.final or list(commands)[-1]
    for stage in (final, *variant.changes):
        if stage not in commands:
            raise Failure(
                f"{name}: no command of the base writes @/{stage}; there are {', '.join(commands)}"
            )
    made = {}

    def make(stage):
        if stage not in made:
            changes = variant.changes.get(stage, [])
            command = functools.reduce(change_command, changes, commands[stage])
            needs = {n: make(n).folder for n in re.findall(r"@/([\w-]+)", command) if n != stage}
            command = re.sub(r"@/([\w-]+)", lambda match: needs.get(match[1], match[0]), command)
            folder = f"{out}/{stage}-{stage_digest(name, command, changes)}"
            command = command.replace(f"@/{stage}", folder)
            made[stage] = Stage(folder, command, list(needs.values()))
        return made[stage]

    make(final)
    return list(made.values())


def stage_digest(name, command, changes):
    """What a stage's folder is called by: its command, and the text of the fork that the command runs.

    A fork that was edited is another algorithm, and so another stage.
    """
    content = command
    forks = re.findall(r"^\S+\.py\b", "\n".join(changes), re.M)
    if forks:
        content += read_text(forks[-1], name)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


# ---------------------------------------------------------------- run


def shell_line(stage):
    """What a shell runs: the command, its output into a file, then the mark, with commit and seconds.

    A training run that a signal stops ends with exit code 0, too. It leaves OUT/stopped, and gets no mark.
    """
    folder = shlex.quote(stage.folder)
    return (
        f"SECONDS=0; mkdir -p {folder} && {{ {stage.command}; }} > {folder}.log 2>&1 && "
        f'test ! -e {folder}/stopped && echo "$(git describe --always --dirty) $SECONDS" > {folder}.done'
    )


def run_stages(waiting, after_each):
    """Run every stage whose needs are there. A stage that fails costs those that need it, and no others.

    Each runs in a process group of its own, which gets SIGTERM when this process ends: training then
    writes a checkpoint.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for place, stage in enumerate(waiting, 1):
        progress = f"[{place}/{len(waiting)}]"
        absent = [need for need in stage.needs if not Path(f"{need}.done").is_file()]
        if absent:
            print(f"{progress} left out, as it needs {absent[0]}: {stage.folder}")
            continue
        print(f"{progress} {stage.command}", flush=True)
        child = subprocess.Popen(["bash", "-c", shell_line(stage)], start_new_session=True)
        try:
            child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
            raise
        if not stage.done():
            print(f"failed: {stage.last_message()}", flush=True)
        after_each()  # the table grows with what has ended


# ---------------------------------------------------------------- the table


@dataclass
class Result:
    """Of one evaluation.

    accuracy  {temperature: its main metric, the mean of several benchmarks'}
    others    {key in OTHER_NUMBERS: number}
    """

    accuracy: dict
    others: dict


@functools.cache
def read_result(folder):
    """The numbers of an evaluation's folder. -> Result"""
    run = read_run(folder)
    benches = by_bench(run)
    accuracy = {}
    for bench, judgments in benches.items():
        main_metric = benchmarks.bench_named(bench).main_metric
        for temperature, lines in by_temperature(judgments).items():
            metric = metrics_of(bench, run["pairs"], lines)[main_metric]
            merged = accuracy.setdefault(temperature, {})
            merged.update(as_part(metric, prefix=bench, count=len(benches)))

    measured = measure(run).values()  # the numbers of each benchmark
    others = {}
    for key in OTHER_NUMBERS:
        values = [numbers[key] for numbers in measured if numbers.get(key) is not None]
        if values:
            others[key] = fmean(values)
    return Result(accuracy, others)


def as_part(metric, prefix, count):
    """A metric as one of `count` whose mean is another metric; prefix: makes its strata differ from theirs."""
    return {
        f"{prefix}/{stratum}": (weight / count, values)
        for stratum, (weight, values) in metric.items()
    }


def as_one(metrics):
    """{seed: metric} as one metric. A seed's strata are strata of their own, so that pairs stay pairs."""
    merged = {}
    for seed, metric in metrics.items():
        merged.update(as_part(metric, prefix=seed, count=len(metrics)))
    return merged


def compare_over_seeds(ours, theirs):
    """{seed: metric} of a row and of another -> mean and standard deviation over seeds; and the difference of
    the two on the seeds and items that both have, with its 95 % interval, as `eval.py compare` has it."""
    values = [benchmarks.value(metric) for metric in ours.values()]
    found = {"value": fmean(values), "std": stdev(values) if len(values) > 1 else None}
    seeds = [seed for seed in ours if seed in theirs]
    if seeds:
        mine = as_one({seed: ours[seed] for seed in seeds})
        other = as_one({seed: theirs[seed] for seed in seeds})
        mine, other = benchmarks.common(mine, other), benchmarks.common(other, mine)
        found["difference"] = benchmarks.value(mine) - benchmarks.value(other)
        found["interval"] = benchmarks.interval(mine, minus=other)
    return found


def row_of(name, variant, chains, results):
    """What rows.jsonl says of a variant.

    chains   {seed: [Stage, ...]}
    results  {name: {seed: Result}} of what has ended
    """
    mine = results[name]
    row = {
        "name": name,
        "changes": variant.text,
        "seeds": list(mine),
        "commands": {seed: [stage.command for stage in chain] for seed, chain in chains.items()},
    }
    if not mine:
        return row | {"status": status_of(chains)}
    other = results[variant.against] if variant.against != name else {}
    row["accuracy"] = {}
    for temperature in sorted({t for result in mine.values() for t in result.accuracy}):
        row["accuracy"][temperature] = compare_over_seeds(
            at_temperature(mine, temperature), at_temperature(other, temperature)
        )
    for key in OTHER_NUMBERS:
        values = [result.others[key] for result in mine.values() if key in result.others]
        if values:
            row[key] = fmean(values)
    return row | row_cost([stage for seed in mine for stage in chains[seed]], len(mine))


def status_of(chains):
    """Why a variant has no numbers."""
    stage = next(stage for chain in chains.values() for stage in chain if not stage.done())
    begun = Path(f"{stage.folder}.log").is_file()
    return f"not ended: {stage.last_message()}" if begun else "not run yet"


def at_temperature(results, temperature):
    """{seed: Result} -> {seed: metric}"""
    return {
        seed: result.accuracy[temperature]
        for seed, result in results.items()
        if temperature in result.accuracy
    }


def row_cost(stages, seeds):
    """Of stages that have ended, of some seeds: tokens and seconds a seed, and the commits that ran them."""
    tokens, seconds = 0, 0
    for stage in stages:
        lines = read_lines(Path(stage.folder) / "metrics.jsonl")
        tokens += sum(line.get("tokens") or 0 for line in lines)
        seconds += int(stage.done()[1])
    return {
        "tokens learned": tokens / seeds,
        "seconds": seconds / seeds,
        "commits": sorted({stage.done()[0] for stage in stages}),
    }


def table_heads(temperatures):
    heads = ["variant", "differs by"]
    for temperature in temperatures:
        heads += [temperature_name(temperature), "difference, 95 %"]
    return [*heads, *OTHER_NUMBERS.values(), "tokens learned", "seconds", "seeds", "commit"]


def table_cells(row, temperatures):
    """A row of table.md, a cell for each of `table_heads`."""
    cells = [row["name"], row["changes"] and f"`{row['changes']}`"]
    if "status" in row:
        empty = len(table_heads(temperatures)) - 3
        return [*cells, row["status"], *[""] * empty]
    for temperature in temperatures:
        found = row["accuracy"].get(temperature, {})
        value = cell(found.get("value"))
        if found.get("std") is not None:
            value += f" ± {found['std']:.3f}"
        difference = ""
        if "difference" in found:
            low, high = found["interval"]
            difference = f"{found['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        cells += [value, difference]
    cells += [cell(row.get(key)) for key in OTHER_NUMBERS]
    cells += [f"{row['tokens learned'] / 1e6:.2f}M", f"{row['seconds']:.0f}"]
    cells += [", ".join(str(seed) for seed in row["seeds"]), ", ".join(row["commits"])]
    return cells


def write_table(plan, chains, out, only):
    """rows.jsonl, table.md and table.png of what has ended. chains: {name: {seed: [Stage, ...]}}"""
    results = {
        name: {seed: read_result(c[-1].folder) for seed, c in by_seed.items() if c[-1].done()}
        for name, by_seed in chains.items()
    }
    rows = [
        row_of(name, variant, chains[name], results)
        for name, variant in plan.items()
        if name in only or results[name]
    ]
    temperatures = sorted({t for row in rows for t in row.get("accuracy", ())})
    heads = table_heads(temperatures)
    lines = [heads, ["---"] * len(heads), *(table_cells(row, temperatures) for row in rows)]
    write_lines(out / "table.md", (f"| {' | '.join(line)} |" for line in lines))
    write_lines(out / "rows.jsonl", map(json_text, rows))
    draw_differences([row for row in rows if "accuracy" in row], temperatures, out / "table.png")


def draw_differences(rows, temperatures, path):
    """A picture of each row's difference from what it is compared with, and of its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.3 * len(rows)), dpi=150, layout="tight")
    for place, temperature in enumerate(temperatures):
        colour = f"C{3 * place}"
        for line, row in enumerate(rows):
            found = row["accuracy"].get(temperature, {})
            if "difference" in found:
                height = line + 0.2 * place
                axes.plot(found["interval"], [height, height], f"{colour}-", lw=1.5)
                axes.plot(found["difference"], height, f"{colour}o", ms=4)
        axes.plot([], [], f"{colour}o-", label=temperature_name(temperature))
    axes.axvline(0, color="0.6", lw=0.8, ls="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel("difference in accuracy")
    if rows:
        axes.legend(frameon=False)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


# ---------------------------------------------------------------- the command line


def demo_commands(seed):
    """The commands of `make demo`, with @ for its folder."""
    make = subprocess.run(
        ["make", "-n", "demo", "DEMO=@", f"SEED={seed}", "READY="],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return [line for line in make.stdout.splitlines() if "--out @/" in line]


def arguments():
    parser = Flags(__doc__)
    arg = parser.add_argument
    arg(
        "--plan",
        default=str(ROOT / "assets/ablations.txt"),
        help="file of variants, and of the base's commands, {seed} in them, if it is not the demo",
    )
    arg(
        "--variant",
        action="append",
        default=[],
        help='one more, "NAME: changes"; may be given again',
    )
    arg("--seeds", type=number(int, 0), nargs="+", default=[0], help="each variant runs with each")
    arg(
        "--only",
        nargs="+",
        metavar="NAME",
        help="run these; the table has them, and what has ended",
    )
    arg("--out", default="runs/ablate", help="folder of all runs and of the table")
    arg("--print", action="store_true", help="print what can start now, and run nothing")
    arg("--table", action="store_true", help="write the table, and run nothing")
    return parser.parse_args()


def chains_of(plan, base, seeds, out):
    """The stages of every variant and seed. base: commands; none for the demo's -> {name: {seed: [Stage, ...]}}"""
    bases = {}
    for seed in seeds:
        bases[seed] = [line.replace("{seed}", str(seed)) for line in base] or demo_commands(seed)
    return {
        name: {seed: stages_of(name, variant, bases[seed], out) for seed in seeds}
        for name, variant in plan.items()
    }


def main():
    args = arguments()
    base, plan = read_plan([*read_text(args.plan, "--plan").splitlines(), *args.variant])
    only = args.only or list(plan)
    for name in (*only, *(variant.against for variant in plan.values())):
        if name not in plan:
            raise Failure(f"{name}: no such variant; there are {', '.join(plan)}")
    chains = chains_of(plan, base, args.seeds, args.out)

    # Variants share stages, so a folder stands here once.
    stages = {s.folder: s for seed in args.seeds for name in only for s in chains[name][seed]}
    waiting = [stage for stage in stages.values() if not stage.done()]
    if args.print:
        for stage in waiting:
            if all(Path(f"{need}.done").is_file() for need in stage.needs):
                print(shell_line(stage))
        return

    lock_folder(args.out)
    kinds = [Path(stage.folder).name.split("-")[0] for stage in waiting]
    minutes = sum(STAGE_SECONDS.get(kind, 60) for kind in kinds) / 60
    print(
        f"{len(only)} rows, {len(args.seeds)} seeds: {len(stages)} commands, {len(waiting)} of them to run, "
        f"at the demo's size in about {minutes:.0f} minutes",
        flush=True,
    )
    update_table = functools.partial(write_table, plan, chains, Path(args.out), only)
    if not args.table:
        run_stages(waiting, update_table)
    update_table()
    print(f"wrote {args.out}/table.md, rows.jsonl, table.png")
    if not args.table and not all(stage.done() for stage in waiting):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
