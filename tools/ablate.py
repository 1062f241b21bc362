"""
What matters: variants of a chain of commands, over seeds, and one table of their results.

    python tools/ablate.py --seeds 0 1 2              # assets/ablations.txt: the demo, and what differs from it
    python tools/ablate.py --only base "no KL"
    python tools/ablate.py --variant "mine: grpo forks/mine.py --flag 3"     # a fork: its script replaces grpo.py
    python tools/ablate.py --plan assets/ablations-7b.txt --print > jobs     # what can start now, a command a line
    sbatch --array 1-$(wc -l < jobs) --wrap 'sed -n ${SLURM_ARRAY_TASK_ID}p jobs | bash'
    python tools/ablate.py --table                    # of what has ended so far
    python tools/ablate.py --plan assets/reasons.txt --rows assets/reasons.jsonl    # of rows that were kept: no run needed

A **stage** is a command that writes `@/NAME`; it needs the stages whose `@/NAME` it reads. The name of its folder
holds a digest of its command, in which the folders that it needs stand by their names. So variants that agree up to
some stage share it, and nothing but the commands says so. OUT/NAME-DIGEST.done appears when a stage has ended well,
with the commit, a digest of the code, and the seconds. Without that file the same command runs again, and its script
resumes. OUT/rows.jsonl has every row with its numbers, commands, commits and digests; OUT/table.md and the pictures
are made of these rows alone.
"""

import functools
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from judge import benchmarks
from judge.report import (
    UNSOUND_NAME,
    by_bench,
    by_temperature,
    cell,
    measure,
    metrics_of,
    read_run,
    sound_metrics,
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

# What the table shows where the plan has no line "show".
SHOWN = ("accuracy", "right_in_both_orders", "no_verdict", "tokens_per_judgment")

# Lines of a plan that are no variants.
SETTINGS = ("all", "show", "judges", "seconds", "at-once")

# The picture of the judges: {number: its name there, its mark}.
JUDGE_NUMBERS = {
    "source/agree": ("accuracy, shortcut says the right side", "C0o"),
    "source/part": ("accuracy, shortcut says the wrong side", "C3D"),
    "unsound_of_right/agree": ("unsound share of right verdicts (shortcut right)", "C7x"),
}


# ---------------------------------------------------------------- variants and stages


@dataclass
class Variant:
    """A row of the table.

    changes   {stage: ["[script] flags", ...]}, the changes that all rows share first
    final     the stage that evaluates it; None for the last of the base
    against   the variant that it is compared with
    seeds     how many of the --seeds it runs with, the first ones; None for all
    text      the line of the plan that says so
    """

    changes: dict
    final: str | None
    against: str
    seeds: int | None
    text: str


@dataclass
class AblationPlan:
    """A file of variants.

    base      the commands of a chain; none for the demo's
    variants  {name: Variant}
    show      names of numbers, the columns of the table, see `columns`
    judges    names of the variants in the picture of the judges
    seconds   {kind of a stage: seconds on one core, or on all where a stage uses all}
    at_once   how many stages run side by side
    """

    base: list
    variants: dict
    show: list
    judges: list
    seconds: dict
    at_once: int


@dataclass
class Stage:
    """A command, ready for a shell, its folder, and the folders that it needs."""

    folder: str
    command: str
    needs: list

    def done(self):
        """True for a stage that has ended well."""
        return Path(f"{self.folder}.done").is_file()

    def mark(self):
        """Of a stage that has ended well: (commit, digest of the code, seconds)"""
        commit, *code, seconds = Path(f"{self.folder}.done").read_text().split()
        return commit, " ".join(code), int(seconds)

    def last_message(self):
        """The last error in the stage's output, or the last line."""
        log = Path(f"{self.folder}.log")
        text = read_text(log) if log.is_file() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "rror: " in line]
        message = (errors or lines or ["no output"])[-1]
        return " ".join(message.split())[:150]


def read_plan(lines):
    """The lines of a plan, see assets/ablations.txt -> AblationPlan"""
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    base = [line for line in lines if "--out @/" in line]
    settings, texts = {}, {}
    for line in lines:
        if line in base:
            continue
        name, colon, text = (part.strip() for part in line.partition(":"))
        if not colon:
            raise Failure(f"{line}: not NAME: changes")
        if name in texts or name in settings:
            raise Failure(f"{line}: two variants have this name")
        (settings if name in SETTINGS else texts)[name] = text

    shared = read_changes(settings.get("all", ""))
    seconds = read_changes(settings.get("seconds", ""))
    return AblationPlan(
        base,
        {name: read_variant(name, text, shared, next(iter(texts))) for name, text in texts.items()},
        read_names(settings.get("show", "")) or list(SHOWN),
        read_names(settings.get("judges", "")),
        {kind: whole_number("seconds", text) for kind, text in seconds.items()},
        whole_number("at-once", settings.get("at-once", "1")),
    )


def read_variant(name, text, shared, first):
    """A variant's text, the changes that all variants share, and the name of the plan's first one -> Variant"""
    changes = read_changes(text)
    final, against = changes.pop("at", None), changes.pop("against", first)
    seeds = changes.pop("seeds", None)
    both = {
        stage: [part[stage] for part in (shared, changes) if stage in part]
        for stage in {**shared, **changes}
    }
    return Variant(both, final, against, seeds and whole_number(f"{name}: seeds", seeds), text)


def read_names(text):
    """ "greedy accuracy; T=1 accuracy" -> ["greedy accuracy", "T=1 accuracy"]"""
    return [name.strip() for name in text.split(";") if name.strip()]


def whole_number(name, text):
    """Raises Failure for anything but a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise Failure(f"{name} {text}: expected a whole number from 1")
    return int(text)


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


# A shell's words for the digest of the code: the names and contents of all Python files here but the tests, as they
# are, committed or not. Files that git ignores are left out. Sorted, so that a commit alone changes nothing.
CODE_DIGEST = (
    "$(git ls-files -z --cached --others --exclude-standard '*.py' ':!tests/' "
    "| LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c -8)"
)


def shell_line(stage):
    """What a shell runs: the command, its output into a file, then the mark, with commit, code and seconds.

    A training run that a signal stops ends with exit code 0, too. It leaves OUT/stopped, and gets no mark.
    Commit and code are those at the start: what is edited later has not run.
    """
    folder = shlex.quote(stage.folder)
    return (
        f'SECONDS=0; RAN="$(git describe --always --dirty) {CODE_DIGEST}"; '
        f"mkdir -p {folder} && {{ {stage.command}; }} > {folder}.log 2>&1 && "
        f'test ! -e {folder}/stopped && echo "$RAN $SECONDS" > {folder}.done'
    )


def child_environment(at_once):
    """Environment variables of a stage: `python` is the one that runs this; with others beside it, one thread.

    Threads that wait for work by spinning take the core that another stage would use.
    """
    bin_folder = str(Path(sys.executable).parent)
    variables = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    if at_once > 1:
        variables |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return variables


def start_stage(stage, at_once):
    """-> Popen, in a process group of its own"""
    return subprocess.Popen(
        ["bash", "-c", shell_line(stage)], start_new_session=True, env=child_environment(at_once)
    )


def run_stages(waiting, after_each, at_once=1):
    """Run every stage once its needs are there, the first of the list first, `at_once` side by side.

    A stage that fails costs those that need it, and no others. When this process ends, the process groups of
    the stages get SIGTERM: training then writes a checkpoint.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    queue, running = list(waiting), {}  # running: {Stage's folder: (Stage, Popen)}
    begin = time.monotonic()

    def say(text):
        ended = len(waiting) - len(queue) - len(running)
        print(
            f"[{ended}/{len(waiting)}, {(time.monotonic() - begin) / 60:.0f} min] {text}",
            flush=True,
        )

    try:
        while queue or running:
            for stage in list(queue):
                absent = [need for need in stage.needs if not Path(f"{need}.done").is_file()]
                coming = {*running, *(other.folder for other in queue)}
                if absent and not coming & set(absent):
                    queue.remove(stage)
                    say(f"left out, as it needs {absent[0]}: {stage.folder}")
                elif not absent and len(running) < at_once:
                    queue.remove(stage)
                    say(stage.command)
                    running[stage.folder] = stage, start_stage(stage, at_once)
            time.sleep(0.05)
            for stage, child in list(running.values()):
                if child.poll() is not None:
                    del running[stage.folder]
                    if not stage.done():
                        say(f"failed: {stage.folder}: {stage.last_message()}")
                    after_each()  # the table grows with what has ended
    except BaseException:
        for _, child in running.values():
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
        for _, child in running.values():
            child.wait()
        raise


# ---------------------------------------------------------------- the table


@dataclass
class Result:
    """Of one evaluation.

    metrics  {name: metric}; they have intervals. "greedy accuracy" is the mean of several benchmarks' main ones
    numbers  {name: number, or {fault: share}}
    """

    metrics: dict
    numbers: dict


@functools.cache
def read_result(folder):
    """The numbers of an evaluation's folder. -> Result"""
    run = read_run(folder)
    metrics, numbers = {}, {}  # {name: {benchmark: metric or number}}
    for bench, judgments in by_bench(run).items():
        for temperature, lines in by_temperature(judgments).items():
            for name, metric in metrics_in_plans(bench, run["pairs"], lines).items():
                full_name = f"{temperature_name(temperature)} {name}"
                metrics.setdefault(full_name, {})[bench] = metric
    for bench, measured in measure(run).items():
        for name, value in other_numbers(measured).items():
            numbers.setdefault(name, {})[bench] = value
    return Result(
        {name: as_one(by_bench) for name, by_bench in metrics.items()},
        {name: mean_number(by_bench.values()) for name, by_bench in numbers.items()},
    )


def metrics_in_plans(bench, pairs, lines):
    """{name in a plan: metric} of a benchmark's judgments at one temperature, without those that have no value."""
    main_metric = benchmarks.bench_named(bench).main_metric
    metrics = {}
    for name, metric in metrics_of(bench, pairs, lines).items():
        metrics["accuracy" if name == main_metric else name] = metric
    for name, metric in sound_metrics(pairs, lines).items():
        name, slash, source = name.partition("/")
        name = "unsound_of_right" if name == UNSOUND_NAME else "right_and_sound"
        metrics[f"{name}{slash}{source}"] = metric
    return {name: x for name, x in metrics.items() if benchmarks.value(x) is not None}


def other_numbers(measured):
    """The numbers of a benchmark that have no interval, under their names in a plan.

    measured  as `judge.report.measure_one` has it: {name: number}, and of soundness {temperature: {name: number}}
    """
    numbers = {name: x for name, x in measured.items() if type(x) in (int, float)}
    for temperature, sound in measured.get("sound", {}).items():
        parts = {"": sound}
        parts |= {f"/{source}": part for source, part in sound.get("by_source", {}).items()}
        for suffix, part in parts.items():
            for name, value in part.items():
                if type(value) in (int, float) or name == "faults":
                    numbers[f"{temperature} {name}{suffix}"] = value
    return numbers


def mean_number(values):
    """The mean of numbers, or of shares {name: share}, in which a name that is not there has 0."""
    values = list(values)
    if not isinstance(values[0], dict):
        return fmean(values)
    names = {name: None for shares in values for name in shares}
    means = {name: fmean(shares.get(name, 0) for shares in values) for name in names}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def as_one(metrics):
    """{seed or benchmark: metric} as one metric, their mean. Strata keep apart, so that pairs stay pairs."""
    return {
        f"{prefix}/{stratum}": (weight / len(metrics), values)
        for prefix, metric in metrics.items()
        for stratum, (weight, values) in metric.items()
    }


@functools.cache
def compare_over_seeds(name, ours, theirs):
    """A number over the seeds of a row, and of the row that it is compared with, if another.

    ours, theirs  ((seed, folder of an evaluation), ...)

    -> {"value": mean, "std": over seeds, or None}; of a metric also "difference", on the seeds and items that both
    have, and its 95 % "interval", as `eval.py compare` has it. {} where no evaluation has the number.
    """
    mine, other = (
        {seed: number_of(read_result(folder), name) for seed, folder in folders}
        for folders in (ours, theirs)
    )
    mine, other = ({s: x for s, x in some.items() if x is not None} for some in (mine, other))
    if not mine:
        return {}
    is_metric = any(name in read_result(folder).metrics for _, folder in ours)
    if not is_metric and isinstance(next(iter(mine.values())), dict):
        return {"shares": mean_number(mine.values())}
    values = [benchmarks.value(x) if is_metric else x for x in mine.values()]
    found = {"value": fmean(values), "std": stdev(values) if len(values) > 1 else None}
    seeds = [seed for seed in mine if seed in other]
    if is_metric and seeds:
        mine = as_one({seed: mine[seed] for seed in seeds})
        other = as_one({seed: other[seed] for seed in seeds})
        mine, other = benchmarks.common(mine, other), benchmarks.common(other, mine)
        here, there = benchmarks.value(mine), benchmarks.value(other)
        if here is not None and there is not None:  # on the common items no verdict may be right
            found["difference"] = here - there
            found["interval"] = benchmarks.interval(mine, minus=other)
    return found


def number_of(result, name):
    """A metric or a number of a Result; None if it has none of this name."""
    return result.metrics.get(name, result.numbers.get(name))


def row_of(name, plan, chains, ended):
    """What rows.jsonl says of a variant.

    chains   {seed: [Stage, ...]}
    ended    {variant: ((seed, folder of its evaluation), ...)}
    """
    variant, mine = plan.variants[name], ended[name]
    row = {
        "name": name,
        "changes": variant.text,
        "seeds": [seed for seed, _ in mine],
        "commands": {seed: [stage.command for stage in chain] for seed, chain in chains.items()},
    }
    if not mine:
        return row | {"status": status_of(chains)}
    other = ended[variant.against] if variant.against != name else ()
    row["numbers"] = {}
    for wanted in wanted_numbers(plan, [folder for _, folder in mine]):
        found = compare_over_seeds(wanted, mine, other)
        if found:
            row["numbers"][wanted] = found
    return row | row_cost([stage for seed in row["seeds"] for stage in chains[seed]], len(mine))


def wanted_numbers(plan, folders):
    """The numbers that table and pictures need, of those that evaluations have."""
    names = {}
    for folder in folders:
        result = read_result(folder)
        names |= dict.fromkeys([*result.metrics, *result.numbers])
    wanted = {*plan.show, *JUDGE_NUMBERS, "accuracy"}
    return [name for name in names if {name, without_temperature(name)} & wanted]


def without_temperature(name):
    """ "T=1 source/part" -> "source/part"; a name without a temperature stays"""
    first, _, rest = name.partition(" ")
    return rest or first


def status_of(chains):
    """Why a variant has no numbers."""
    stage = next(stage for chain in chains.values() for stage in chain if not stage.done())
    begun = Path(f"{stage.folder}.log").is_file()
    return f"not ended: {stage.last_message()}" if begun else "not run yet"


def row_cost(stages, seeds):
    """Of stages that have ended, of some seeds: tokens and seconds a seed, and the commits and code that ran them."""
    tokens = 0
    for stage in stages:
        lines = read_lines(Path(stage.folder) / "metrics.jsonl")
        tokens += sum(line.get("tokens") or 0 for line in lines)
    commits, codes, seconds = zip(*(stage.mark() for stage in stages))
    return {
        "tokens learned": tokens / seeds,
        "seconds": sum(seconds) / seeds,
        "commits": sorted(set(commits)),
        "code": sorted(set(codes)),
    }


def columns(show, rows):
    """The names of the numbers that the table shows. A name without a temperature stands for all of them, from the
    lowest temperature to the highest."""
    names = dict.fromkeys(name for row in rows for name in row.get("numbers", ()))
    found = []
    for wanted in show:
        if wanted in names or " " in wanted:
            found.append(wanted)
        else:
            some = [name for name in names if without_temperature(name) == wanted]
            found += sorted(some, key=temperature_of)
    return found


def temperature_of(name):
    """Of a number's name; 0 for greedy"""
    match = re.match(r"T=(\S+) ", name)
    return float(match[1]) if match else 0


def table_cells(row, names, differing):
    """A row of table.md, a cell for each of its heads. differing: the numbers that have a column of differences."""
    cells = [row["name"], row["changes"] and f"`{row['changes']}`"]
    if "status" in row:
        return [*cells, row["status"], *[""] * (len(names) + len(differing) + 4)]
    for name in names:
        found = row["numbers"].get(name, {})
        cells.append(value_cell(found))
        if name in differing:
            cells.append(difference_cell(found))
    cells += [f"{row['tokens learned'] / 1e6:.2f}M", f"{row['seconds']:.0f}"]
    cells += [", ".join(str(seed) for seed in row["seeds"])]
    return [*cells, ", ".join(row["commits"]), ", ".join(row["code"])]


def value_cell(found):
    """A number, over several seeds with its standard deviation; or the four largest shares of faults."""
    if "shares" in found:
        largest = list(found["shares"].items())[:4]
        return ", ".join(f"{name} {share:.3f}" for name, share in largest)
    std = found.get("std")
    return cell(found.get("value")) + (f" ± {std:.3f}" if std is not None else "")


def difference_cell(found):
    if "difference" not in found:
        return ""
    low, high = found["interval"]
    return f"{found['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def rows_of_runs(plan, chains, only):
    """The rows of what has ended, and of what was asked for. chains: {name: {seed: [Stage, ...]}}"""
    ended = {
        name: tuple((seed, c[-1].folder) for seed, c in by_seed.items() if all(s.done() for s in c))
        for name, by_seed in chains.items()
    }
    return [
        row_of(name, plan, chains[name], ended)
        for name in plan.variants
        if name in only or ended[name]
    ]


def write_table(rows, show, path):
    """table.md, of nothing but the rows."""
    names = columns(show, rows)
    all_numbers = [row.get("numbers", {}) for row in rows]
    differing = [n for n in names if any("difference" in some.get(n, {}) for some in all_numbers)]
    heads = ["variant", "differs by"]
    for name in names:
        heads += [name.replace("_", " "), *["difference, 95 %"] * (name in differing)]
    heads += ["tokens learned", "seconds", "seeds", "commit", "code"]
    lines = [heads, ["---"] * len(heads), *(table_cells(row, names, differing) for row in rows)]
    write_lines(path, (f"| {' | '.join(line)} |" for line in lines))


def draw_pictures(rows, judges, out):
    """table.png, and judges.png where the plan names judges -> [path, ...]"""
    rows = [row for row in rows if "numbers" in row]
    draw_differences(rows, columns(["accuracy"], rows), out / "table.png")
    by_name = {row["name"]: row for row in rows}
    shown = [by_name[name] for name in judges if name in by_name]
    if not shown:
        return [out / "table.png"]
    draw_judges(shown, out / "judges.png")
    return [out / "table.png", out / "judges.png"]


def draw_differences(rows, names, path):
    """A picture of each row's difference from what it is compared with, and of its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.3 * len(rows)), dpi=150, layout="tight")
    for place, name in enumerate(names):
        colour = f"C{3 * place}"
        for line, row in enumerate(rows):
            found = row["numbers"].get(name, {})
            if "difference" in found:
                height = line + 0.2 * place
                axes.plot(found["interval"], [height, height], f"{colour}-", lw=1.5)
                axes.plot(found["difference"], height, f"{colour}o", ms=4)
        axes.plot([], [], f"{colour}o-", label=name)
    axes.axvline(0, color="0.6", lw=0.8, ls="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel("difference in accuracy")
    if rows:
        axes.legend(frameon=False)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def draw_judges(rows, path):
    """A picture of what judges get right where shortcut and true way agree and where they part, and of how many of
    the right verdicts are unsound. A panel for each temperature; a bar is a standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = columns(JUDGE_NUMBERS, rows)
    panels = list(dict.fromkeys(name.partition(" ")[0] for name in names)) or [""]
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(1.5 + 3.6 * len(panels), 1.4 + 0.36 * len(rows)),
        dpi=150,
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, panel in zip(grid[0], panels):
        axes.axvline(0.5, color="0.6", lw=0.8, ls="--")
        for place, (name, (label, mark)) in enumerate(JUDGE_NUMBERS.items()):
            found = [row["numbers"].get(f"{panel} {name}", {}) for row in rows]
            points = [(line, some) for line, some in enumerate(found) if "value" in some]
            axes.errorbar(
                [some["value"] for _, some in points],
                [line + 0.16 * (place - 1) for line, _ in points],
                xerr=[some["std"] or 0 for _, some in points],
                fmt=mark,
                ms=5,
                lw=1.2,
                label=label,
            )
        axes.set(title=panel, xlim=(-0.03, 1.03), xlabel="share of judgments")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    grid[0][0].invert_yaxis()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=1)
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
    arg(
        "--at-once",
        type=number(int, 1),
        help="stages side by side, each with one thread if there are several; default: the plan's",
    )
    arg("--print", action="store_true", help="print what can start now, and run nothing")
    arg("--table", action="store_true", help="write table and pictures, and run nothing")
    arg("--rows", help="write them of this file of rows, an earlier rows.jsonl, and run nothing")
    return parser.parse_args()


def chains_of(plan, seeds, out):
    """The stages of every variant and seed -> {name: {seed: [Stage, ...]}}"""
    bases = {}
    for seed in seeds:
        commands = [line.replace("{seed}", str(seed)) for line in plan.base]
        bases[seed] = commands or demo_commands(seed)
    return {
        name: {seed: stages_of(name, variant, bases[seed], out) for seed in seeds[: variant.seeds]}
        for name, variant in plan.variants.items()
    }


def check_names(names, plan):
    """Raises Failure for a name that no variant of the plan has."""
    for name in names:
        if name not in plan.variants:
            raise Failure(f"{name}: no such variant; there are {', '.join(plan.variants)}")


def expected_minutes(stages, plan, at_once):
    """A text: how long the stages take by the plan's seconds of each kind; "" where it has none."""
    if not plan.seconds:
        return ""
    kinds = [Path(stage.folder).name.split("-")[0] for stage in stages]
    minutes = sum(plan.seconds.get(kind, 0) for kind in kinds) / 60
    return f", in about {minutes / at_once:.0f} minutes"


def table_of_rows(args, plan, only):
    """--rows: table and pictures of rows that were kept."""
    path = Path(args.rows)
    read_text(path, "--rows")  # complains where there is no such file
    rows = read_lines(path, {"name": str, "changes": str})
    rows = [row for row in rows if row["name"] in only]
    lock_folder(args.out)
    write_table(rows, plan.show, Path(args.out) / "table.md")
    pictures = draw_pictures(rows, plan.judges, Path(args.out))
    print(f"wrote {args.out}/table.md, {', '.join(path.name for path in pictures)}")


def main():
    args = arguments()
    plan = read_plan([*read_text(args.plan, "--plan").splitlines(), *args.variant])
    only = args.only or list(plan.variants)
    check_names([*only, *plan.judges, *(v.against for v in plan.variants.values())], plan)
    if args.rows:
        return table_of_rows(args, plan, only)
    chains = chains_of(plan, args.seeds, args.out)

    # Variants share stages, so a folder stands here once.
    stages = {
        stage.folder: stage
        for seed in args.seeds
        for name in only
        for stage in chains[name].get(seed, ())
    }
    waiting = [stage for stage in stages.values() if not stage.done()]
    if args.print:
        for stage in waiting:
            if all(Path(f"{need}.done").is_file() for need in stage.needs):
                print(shell_line(stage))
        return

    lock_folder(args.out)
    at_once = args.at_once or plan.at_once
    print(
        f"{len(only)} rows, {len(args.seeds)} seeds: {len(stages)} commands, {len(waiting)} of them to run, "
        f"{at_once} at once{expected_minutes(waiting, plan, at_once)}",
        flush=True,
    )
    out = Path(args.out)

    def update_table():
        rows = rows_of_runs(plan, chains, only)
        write_lines(out / "rows.jsonl", map(json_text, rows))
        write_table(rows, plan.show, out / "table.md")
        return rows

    if not args.table:
        run_stages(waiting, update_table, at_once)
    pictures = draw_pictures(update_table(), plan.judges, out)
    spent = sum(stage.mark()[2] for stage in stages.values() if stage.done()) / 60
    print(f"wrote {out}/table.md, rows.jsonl, {', '.join(path.name for path in pictures)}")
    print(f"the commands took {spent:.1f} minutes, one after the other")
    if not args.table and not all(stage.done() for stage in waiting):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
