"""
The report on evaluations, from their files alone: numbers, a table, a page, and comparisons of two runs.

    python eval.py report DIR1 DIR2 ... --out runs/report     # table.txt and report.html
    python eval.py report DIR1 --training runs/grpo           # and curve.png
    python eval.py compare DIR1 DIR2                          # do two runs differ?

A **line** is a judgment as eval.py has written it to judgments.jsonl. Lines of one temperature are measured
together. Those of the lowest temperature (greedy, where it was asked for) are measured in all ways. No model,
no torch.
"""

import csv
import itertools
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from judge import benchmarks
from judge.soundness import check_reasons, first_fault, is_sound, knows_reason
from lib.files import Failure, Flags, json_text, number, read_lines, read_object, write_lines
from lib.pairs import Pair
from rubrics import parse

PAGE_FOLDER = Path(__file__).parent

# The version of an evaluation's folder: of the keys in its config.json and of its lines.
EVALUATION_FORMAT = 3


# ---------------------------------------------------------------- a run's files

# What a line of each file has, whatever else it has.
TEXT_OR_NONE = (str, type(None))
JUDGMENT_FIELDS = {
    "id": str,
    "order": int,
    "swap": int,
    "temperature": (int, float),
    "vote": int,
    "label": TEXT_OR_NONE,
    "verdict": TEXT_OR_NONE,
    "reason": str,
    "official": TEXT_OR_NONE,
    "tokens": int,
    "rubric": list,
    "quotes": list,
    "text": str,
}
PAIR_FIELDS = {
    "id": str,
    "bench": str,
    "item": object,
    "subset": str,
    "compare": list,
    "context": list,
    "a": str,
    "b": str,
    "swap": int,
    "label": TEXT_OR_NONE,
}
LEFT_OUT_FIELDS = {"bench": str, "item": object, "reason": str}


def key_of(line):
    """What tells a judgment from the others of its folder."""
    return line["id"], line["order"], float(line["temperature"]), line["vote"]


def read_judgments(folder):
    """{key: line} of all judgments in a folder, also of those that its ranks have not gathered yet."""
    paths = [folder / "judgments.jsonl", *sorted(folder.glob("judgments.part*.jsonl"))]
    return {key_of(line): line for path in paths for line in read_lines(path, JUDGMENT_FIELDS)}


def check_format(folder, config):
    """Refuse an evaluation's folder that another version has written. Raises Failure that names it."""
    version = config.get("format", "none")
    if version != EVALUATION_FORMAT:
        raise Failure(
            f"{folder}: its config.json has format {version}, and this version of eval.py reads and "
            f"writes format {EVALUATION_FORMAT}; evaluate again, into another folder"
        )


def read_run(folder):
    """An evaluation, which may be under way. Raises Failure where the folder is none.

    -> {"name", "config", "pairs": {pair id: pair}, "judgments": [line, ...], "left_out": [row, ...]}
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise Failure(f"{path}: no such file; is {folder} the --out of an evaluation?")
    config = read_object(path)
    check_format(folder, config)
    judgments = list(read_judgments(folder).values())
    if not judgments:
        raise Failure(f"{folder}: no judgments in it yet")
    pairs = {pair["id"]: pair for pair in read_lines(folder / "pairs.jsonl", PAIR_FIELDS)}
    for line in judgments:
        if line["id"] not in pairs:
            raise Failure(
                f"{folder / 'pairs.jsonl'}: lacks the pair {line['id']}, which judgments.jsonl has"
            )
    return {
        "name": folder.resolve().name.removeprefix("eval-"),
        "config": config,
        "pairs": pairs,
        "judgments": judgments,
        "left_out": read_lines(folder / "left_out.jsonl", LEFT_OUT_FIELDS),
    }


def read_runs(folders):
    """Evaluations, each under a name of its own: as much of the end of its path as tells them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    runs = [read_run(path) for path in paths]
    depth = 1
    while len({run["name"] for run in runs}) < len(set(paths)):
        for run, path in zip(runs, paths):
            run["name"] = "/".join(path.parts[-depth:])
        depth += 1
    return runs


def grouped(lines, key):
    """{key: [line, ...]}"""
    groups = defaultdict(list)
    for line in lines:
        groups[key(line)].append(line)
    return groups


def by_bench(run):
    """{benchmark or file: its lines}"""
    return grouped(run["judgments"], lambda line: run["pairs"][line["id"]]["bench"])


def by_temperature(lines):
    """{temperature: its lines}, from the lowest temperature to the highest."""
    return dict(sorted(grouped(lines, lambda line: line["temperature"]).items()))


def lowest_temperature(lines):
    """The lines of the lowest temperature."""
    lowest = min(line["temperature"] for line in lines)
    return [line for line in lines if line["temperature"] == lowest]


# ---------------------------------------------------------------- from verdicts to metrics


def wins_of(lines, rule="verdict"):
    """{order: {pair id: share of the comparison that its first response won}}, by majority of the votes.

    rule  the field of a line that is its verdict: "verdict", or "official" for the published parser

    At a tie the first vote decides, which is right in half of the ties. Without a winner all ties would count
    as wrong, as missing verdicts do, and two votes would be worse than one.
    """
    wins = defaultdict(dict, {0: {}})
    by_vote = sorted(lines, key=lambda line: line["vote"])
    comparisons = grouped(by_vote, lambda line: (line["order"], line["id"], line["swap"]))
    for (order, pair, swap), votes in comparisons.items():
        verdicts = [vote[rule] for vote in votes if vote[rule] in ("A", "B")]
        if verdicts:
            verdict = max(verdicts, key=verdicts.count)  # at a tie max takes the first
            wins[order][pair] = float((verdict == "A") != swap)
        else:
            wins[order][pair] = 0.5
    return wins


def metrics_of(bench, pairs, lines, rule="verdict", orders=None):
    """{name: metric} of one benchmark's judgments.

    pairs   {pair id: pair}
    rule    see `wins_of`
    orders  how two orders combine, see `benchmarks.Bench`; default: as the benchmark has it
    """
    spec = benchmarks.bench_named(bench)
    orders = orders or spec.orders
    wins = list(wins_of(lines, rule).values())  # one dict for each order
    if orders == "first":
        wins = wins[:1]
    elif orders == "join":
        wins = [average_wins(wins[0], wins[-1])]

    scores = {x["id"]: x for x in lines if None not in x.get("scores", [None])}
    views = [spec.score(items_of(order, pairs, scores)) for order in wins]
    return views[0] if len(views) == 1 else average_metrics(*views)


def items_of(wins, pairs, scores):
    """{item's name: `benchmarks.Item`} from the wins in one order.

    wins    {pair id: share}
    scores  {pair id: line with the scores of both responses}, from a scalar judge
    """
    items = {}
    for key, share in wins.items():
        pair = pairs[key]
        item = items.setdefault(pair["item"], benchmarks.Item(pair["subset"], {}, pair))
        item.wins[tuple(pair["compare"])] = share
        if key in scores:
            line = scores[key]
            places = pair["compare"][::-1] if line["swap"] else pair["compare"]
            item.scores.update(zip(places, line["scores"]))
    return items


def average(name, first, second):
    """The mean of a value that one dict has, or both."""
    return benchmarks.mean(values[name] for values in (first, second) if name in values)


def average_wins(first, second):
    return {key: average(key, first, second) for key in first | second}


def average_metrics(first, second):
    """The metrics of two orders as one: every item's value is the mean of those that it has."""
    averages = {}
    for name, metric in first.items():
        averages[name] = {}
        for stratum, (weight, values) in metric.items():
            _, others = second.get(name, {}).get(stratum, (0, {}))
            averages[name][stratum] = weight, average_wins(values, others)
    return averages


# ---------------------------------------------------------------- the numbers


def measure(run):
    """{benchmark or file: its numbers, see `measure_one`} of an evaluation."""
    numbers = {}
    for bench, lines in by_bench(run).items():
        left_out = [row for row in run["left_out"] if row["bench"] == bench]
        numbers[bench] = measure_one(bench, run["pairs"], lines, left_out)
    return numbers


def measure_one(bench, pairs, lines, left_out):
    """All numbers of one benchmark's judgments, for JSON. Shares are from 0 to 1.

    bench, pairs  as in `metrics_of`
    lines         its judgments
    left_out      its rows of left_out.jsonl

    -> {
    judgments                   how many there are
    main_metric                 its name: "overall", or "accuracy" of a file
    temperature                 the lowest one's name; all numbers that name none are of it
    accuracy                    {temperature: main metric}, the temperature as "greedy" or "T=1"
    interval                    {temperature: (low, high)}, 95 %, where the main metric is whole
    metrics                     {name: value} of the other metrics
    missing                     the parts without items, which leave the main metric without a value
    votes                       {temperature: {votes: {"accuracy", "tokens" of a comparison}}}
    mean_of_both_orders         main metric; where both orders were judged, and only the first counts
    right_in_both_orders        share of the pairs; where both orders were judged
    same_verdict_in_both_orders share of the pairs; where both orders were judged
    official_parser             main metric of the first votes, as the published parser reads them
    no_verdict                  share of all judgments, of all temperatures
    no_verdict_reasons          {reason: share of all judgments}
    says_a                      share of the verdicts
    tokens_per_judgment         of all temperatures
    by_looks                    {temperature: {"share", "accuracy_of_others"}}, where responses have styles
    quotes_word_for_word        share of the quotes; where there are quotes
    sound                       {temperature: see `sound_numbers`}, where reasons can be checked
    left_out                    {reason: rows}
    }

    None is the value of a metric where parts of the benchmark are missing, and of a share of nothing.
    """
    lowest = lowest_temperature(lines)
    return {
        "judgments": len(lines),
        **accuracy_numbers(bench, pairs, lines),
        "votes": vote_numbers(bench, pairs, lines),
        **order_numbers(bench, pairs, lowest),
        "official_parser": main_value(
            bench, pairs, [line for line in lowest if line["vote"] == 0], rule="official"
        ),
        **verdict_numbers(lines, lowest),
        "by_looks": looks_numbers(bench, pairs, lines),
        **quote_numbers(lowest),
        "sound": sound_numbers(pairs, lines),
        "left_out": count_reasons(left_out),
    }


def temperature_name(temperature):
    return "greedy" if temperature == 0 else f"T={temperature:g}"


def main_value(bench, pairs, lines, **how):
    """The main metric's value by these judgments."""
    metrics = metrics_of(bench, pairs, lines, **how)
    return benchmarks.value(metrics[benchmarks.bench_named(bench).main_metric])


def accuracy_numbers(bench, pairs, lines):
    """The metrics: the main one at every temperature, the others at the lowest."""
    main = benchmarks.bench_named(bench).main_metric
    metrics = {
        temperature_name(temperature): metrics_of(bench, pairs, some)
        for temperature, some in by_temperature(lines).items()
    }
    lowest = next(iter(metrics))
    main_metrics = {name: some[main] for name, some in metrics.items()}
    accuracy = {name: benchmarks.value(metric) for name, metric in main_metrics.items()}
    return {
        "main_metric": main,
        "temperature": lowest,
        "accuracy": accuracy,
        "interval": {
            name: benchmarks.interval(metric)
            for name, metric in main_metrics.items()
            if accuracy[name] is not None
        },
        "metrics": {
            name: benchmarks.value(metric)
            for name, metric in metrics[lowest].items()
            if name != main
        },
        "missing": benchmarks.missing(main_metrics[lowest]),
    }


def vote_numbers(bench, pairs, lines):
    """Majorities of 1, 3, 5 ... votes from the same samples, at every temperature that has several votes."""
    numbers = {}
    for temperature, some in by_temperature(lines).items():
        count = 1 + max(line["vote"] for line in some)
        if count == 1:
            continue
        name = temperature_name(temperature)
        numbers[name] = {}
        for k in range(1, count + 1, 2):
            votes = [line for line in some if line["vote"] < k]
            if not votes:  # a run under way may lack them
                continue
            comparisons = {(line["id"], line["order"]) for line in votes}
            numbers[name][k] = {
                "accuracy": main_value(bench, pairs, votes),
                "tokens": sum(line["tokens"] for line in votes) / len(comparisons),
            }
    return numbers


def order_numbers(bench, pairs, lines):
    """What the second order says; {} where there is none."""
    wins = wins_of(lines)
    if 1 not in wins:
        return {}
    both = {key: (wins[0][key], wins[1][key]) for key in wins[0] if key in wins[1]}
    with_label = [shares for key, shares in both.items() if pairs[key]["label"]]
    numbers = {
        "right_in_both_orders": benchmarks.mean(
            first == second == 1 for first, second in with_label
        ),
        "same_verdict_in_both_orders": benchmarks.mean(
            first == second != 0.5 for first, second in both.values()
        ),
    }
    if benchmarks.bench_named(bench).orders == "first":
        numbers["mean_of_both_orders"] = main_value(bench, pairs, lines, orders="mean")
    return numbers


def verdict_numbers(lines, lowest):
    """How many judgments have no verdict and why, which letter the others name, and what they cost."""
    without = [line for line in lines if line["verdict"] is None]
    verdicts = [line["verdict"] for line in lowest if line["verdict"]]
    return {
        "no_verdict": len(without) / len(lines),
        "no_verdict_reasons": {
            reason: count / len(lines) for reason, count in count_reasons(without).items()
        },
        "says_a": benchmarks.mean(verdict == "A" for verdict in verdicts),
        "tokens_per_judgment": benchmarks.mean(line["tokens"] for line in lines),
    }


def count_reasons(rows):
    """{reason: how many rows have it}, the most frequent first. A reason ends at a colon: details follow."""
    return dict(Counter(row["reason"].split(":")[0] for row in rows).most_common())


def judges_by_looks(rubric):
    """True if all the weight of a rubric, (criterion, ...) items, is on style.

    Such a judgment looks instead of thinking; the synthetic world of data/toy.py counts these.
    """
    return bool(rubric) and all(name.lower().startswith("style") for name, *_ in rubric)


def looks_numbers(bench, pairs, lines):
    """How many judgments go by looks, and how many of the others are right; {} without styles."""
    if "style/hard" not in metrics_of(bench, pairs, lowest_temperature(lines)):
        return {}
    numbers = {}
    for temperature, some in by_temperature(lines).items():
        others = [line for line in some if not judges_by_looks(line["rubric"])]
        numbers[temperature_name(temperature)] = {
            "share": 1 - len(others) / len(some),
            "accuracy_of_others": benchmarks.mean(
                line["verdict"] == line["label"] for line in others
            ),
        }
    return numbers


def quote_numbers(lines):
    """The share of quotes that stand word for word in the response that they name; {} without quotes."""
    counts = [line["quotes"] for line in lines if line["verdict"]]
    quotes = sum(total for _, total in counts)
    if not quotes:
        return {}
    return {"quotes_word_for_word": sum(exact for exact, _ in counts) / quotes}


# ---------------------------------------------------------------- right for a sound reason


@dataclass(frozen=True)
class Reasons:
    """What could be checked of the reasons of one judgment.

    source  of its pair
    known   True if everything is known that makes the reason sound, see judge/soundness.py
    right   True if its verdict is
    checks  {check: does it hold?}
    fault   a short name of the first that does not; ""
    """

    line: dict
    source: str
    known: bool
    right: bool
    checks: dict
    fault: str


def reasons_of(row, line):
    """The `Reasons` of a judgment, read again from its text. row: its pair's, from pairs.jsonl

    Nothing of it is stored with the judgment, so another definition of a sound reason needs no new judgments.
    """
    pair = displayed_pair(row, line["order"])
    judgment = parse(line["text"], line.get("finish", "stop") == "stop")
    checks = check_reasons(judgment, pair)
    return Reasons(
        line=line,
        source=str(row.get("source") or ""),
        known=knows_reason(pair),
        right=line["verdict"] is not None and line["verdict"] == line["label"],
        checks=checks,
        fault=first_fault(judgment, pair, checks),
    )


def displayed_pair(row, order):
    """The `Pair` of a row of pairs.jsonl as the judge saw it, with what is known of it as its meta."""
    pair = Pair(
        id=row["id"],
        context=row["context"],
        a=row["a"],
        b=row["b"],
        label=row["label"],
        type=str(row.get("type") or ""),
        trace=row.get("trace"),
        criteria=row.get("criteria"),
        meta=row,
    )
    # The trace is wanted for its criteria, which hold in both orders.
    return replace(pair.swapped(), trace=pair.trace) if order else pair


def checked_reasons(pairs, lines):
    """[`Reasons`, ...] of the judgments of which something can be checked.

    Where the truth of some pairs is known, only those: a proxy that holds says less than that.
    """
    found = []
    for line in lines:
        if line["label"] and "scores" not in line:
            reasons = reasons_of(pairs[line["id"]], line)
            if reasons.checks:
                found.append(reasons)
    known = [reasons for reasons in found if reasons.known]
    return known or found


def sound_numbers(pairs, lines):
    """{temperature: the numbers of `sound_shares`, of all orders and votes, with two more}; {} without checks.

    checks     the names of what was checked, in their order
    by_source  {source of the pairs: the same shares}, where there are several
    """
    numbers = {}
    for temperature, some in by_temperature(lines).items():
        found = checked_reasons(pairs, some)
        if not found:
            continue
        sources = grouped(found, lambda reasons: reasons.source)
        numbers[temperature_name(temperature)] = {
            **sound_shares(found),
            "checks": list(dict.fromkeys(name for reasons in found for name in reasons.checks)),
            "by_source": {
                source: sound_shares(part)
                for source, part in sorted(sources.items())
                if len(sources) > 1
            },
        }
    return numbers


def sound_shares(found):
    """How often a verdict is right, and how often its reasons are sound as well, for JSON.

    found  [`Reasons`, ...], not empty

    judgments         how many there are
    right             share of them with the right verdict
    right_and_sound   share of them with the right verdict, and every check holds
    unsound_of_right  share of the right verdicts for which a check does not hold; None of none
    faults            {fault: share of the right verdicts for which it is the first}, the most frequent first
    """
    right = [reasons for reasons in found if reasons.right]
    sound = [reasons for reasons in right if is_sound(reasons.checks)]
    faults = Counter(reasons.fault for reasons in right if reasons.fault)
    return {
        "judgments": len(found),
        "right": len(right) / len(found),
        "right_and_sound": len(sound) / len(found),
        "unsound_of_right": 1 - len(sound) / len(right) if right else None,
        "faults": {fault: count / len(right) for fault, count in faults.most_common()},
    }


def sound_metrics(pairs, lines):
    """{name: metric} of the judgments that are right for a sound reason, and of the right ones that are not sound.

    Of all pairs under the table's names, and of each source under NAME/SOURCE where there are several; {} without
    checks.
    """
    found = checked_reasons(pairs, lines)
    if not found:
        return {}
    parts = {"": found}
    sources = grouped(found, lambda reasons: reasons.source)
    if len(sources) > 1:
        parts |= {f"/{source}": part for source, part in sorted(sources.items())}
    metrics = {}
    for suffix, part in parts.items():
        sound, unsound = reasons_metrics(pairs, part)
        metrics[sound_name(found[0].known) + suffix] = sound
        metrics[UNSOUND_NAME + suffix] = unsound
    return metrics


def reasons_metrics(pairs, found):
    """The metrics "right and sound" and "unsound share of the right", over items. found: [`Reasons`, ...]

    An item's right judgments are a part of all its judgments, and its unsound ones a part of the right ones.
    """
    items = grouped(found, lambda reasons: pairs[reasons.line["id"]]["item"])
    sound_values, unsound_values = {}, {}
    for item, some in items.items():
        right = [reasons for reasons in some if reasons.right]
        sound = sum(is_sound(reasons.checks) for reasons in right)
        sound_values[item] = sound / len(some)
        unsound_values[item] = (len(right) - sound, len(right))
    return {"": (1, sound_values)}, {"": (1, unsound_values)}


UNSOUND_NAME = "unsound share of the right"


def sound_name(known):
    """What the table calls judgments that are right and pass the checks: only the truth makes a reason sound."""
    return "right for a sound reason" if known else "right, and no fault found"


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class TableRow:
    """The place of a number in a report.

    heading  what it stands under; "" at the margin
    unit     for the page, which writes shares in percent: "share", "interval", "count", "tokens", "text"
    """

    heading: str
    name: str
    unit: str = "share"


def table_rows(numbers):
    """{`TableRow`: value} of one benchmark's numbers, in the order in which they are printed."""
    main = numbers["main_metric"]
    rows = {TableRow("", "judgments", "count"): numbers["judgments"]}
    for temperature, accuracy in numbers["accuracy"].items():
        rows[TableRow("", f"{main}, {temperature}")] = or_partial(accuracy)
        if temperature in numbers["interval"]:
            row = TableRow("", f"{main}, {temperature}, 95 %", "interval")
            rows[row] = numbers["interval"][temperature]
    for name, metric in numbers["metrics"].items():
        section, slash, part = name.partition("/")
        row = TableRow(section, part) if slash else TableRow("", name)
        rows[row] = or_partial(metric)
    if numbers["missing"]:
        rows[TableRow("", "partial, without", "text")] = ", ".join(numbers["missing"])

    for temperature, majorities in numbers["votes"].items():
        for k, majority in majorities.items():
            which = f"best of {k}, {temperature}"
            rows[TableRow("votes", f"{main}, {which}")] = or_partial(majority["accuracy"])
            rows[TableRow("votes", f"tokens, {which}", "tokens")] = majority["tokens"]

    if "mean_of_both_orders" in numbers:
        row = TableRow("", f"{main}, mean of both orders")
        rows[row] = or_partial(numbers["mean_of_both_orders"])
    if "right_in_both_orders" in numbers:
        rows[TableRow("", "right in both orders")] = numbers["right_in_both_orders"]
        rows[TableRow("", "same verdict in both orders")] = numbers["same_verdict_in_both_orders"]
    rows[TableRow("", "official parser")] = or_partial(numbers["official_parser"])
    rows[TableRow("", "no verdict")] = numbers["no_verdict"]
    for reason, share in numbers["no_verdict_reasons"].items():
        rows[TableRow("no verdict", reason)] = share
    rows[TableRow("", "says A")] = numbers["says_a"]
    rows[TableRow("", "tokens a judgment", "tokens")] = numbers["tokens_per_judgment"]

    for temperature, looks in numbers["by_looks"].items():
        rows[TableRow("by looks", f"share, {temperature}")] = looks["share"]
        row = TableRow("by looks", f"accuracy of the others, {temperature}")
        rows[row] = looks["accuracy_of_others"]
    if "quotes_word_for_word" in numbers:
        rows[TableRow("", "quotes word for word")] = numbers["quotes_word_for_word"]
    rows |= sound_rows(numbers["sound"])
    for reason, count in numbers["left_out"].items():
        rows[TableRow("left out", reason, "count")] = count
    return rows


FAULTS_SHOWN = 6  # of the most frequent ones


def sound_rows(sound):
    """As `table_rows`, of the numbers "sound". The heading says what was checked where not all is known."""
    rows = {}
    for temperature, numbers in sound.items():
        known = "target" in numbers["checks"]
        heading = "reasons" if known else f"reasons, by {', '.join(numbers['checks'])}"
        parts = {"": numbers} | {
            f"{source}: ": part for source, part in numbers["by_source"].items()
        }
        if not known:
            rows[TableRow(heading, f"judgments, {temperature}", "count")] = numbers["judgments"]
        for part, shares in parts.items():
            rows[TableRow(heading, f"{part}right, {temperature}")] = shares["right"]
            row = TableRow(heading, f"{part}{sound_name(known)}, {temperature}")
            rows[row] = shares["right_and_sound"]
            row = TableRow(heading, f"{part}{UNSOUND_NAME}, {temperature}")
            rows[row] = shares["unsound_of_right"]
            for fault, share in itertools.islice(shares["faults"].items(), FAULTS_SHOWN):
                rows[TableRow(heading, f"{part}  {fault}, {temperature}")] = share
    return rows


def or_partial(metric):
    return "partial" if metric is None else metric


def merged_rows(columns):
    """The rows of several columns, each behind the row that it follows in its own column."""
    rows_in_order = []
    for column in columns:
        place = 0
        for row in column:
            if row not in rows_in_order:
                rows_in_order.insert(place, row)
            place = rows_in_order.index(row) + 1
    return rows_in_order


def columns_of(table):
    """{benchmark: [(run's name, {`TableRow`: value}), ...]}

    table  [(run's name, `measure` of it), ...]
    """
    columns = defaultdict(list)
    for name, benches in table:
        for bench, numbers in benches.items():
            columns[bench].append((name, table_rows(numbers)))
    return columns


def table_text(table):
    """A block for every benchmark, with a column for every run; see `columns_of`."""
    lines = []
    for bench, columns in columns_of(table).items():
        lines += [*block_lines(bench, columns), ""]
    return "\n".join(lines)


def block_lines(bench, columns):
    """The lines of one benchmark's block. The smallest parts, cells and scenarios, are left to the page."""
    rows = merged_rows([column for _, column in columns])
    rows = [row for row in rows if row.heading not in ("cell", "scenario")]
    labels = {row: f"  {row.name}" if row.heading else row.name for row in rows}
    label_width = max(map(len, labels.values())) + 1
    widths = [max(13, len(name) + 2) for name, _ in columns]

    names = [f"{name:>{width}}" for (name, _), width in zip(columns, widths)]
    lines = [f"{bench:<{label_width}}" + "".join(names)]
    at_margin = {row.name for row in rows if not row.heading}
    last_heading = None
    for row in rows:
        # A section that has a number of its own needs no line for its name.
        if row.heading and row.heading != last_heading and row.heading not in at_margin:
            lines.append(row.heading)
        last_heading = row.heading
        cells = [f"{cell(column.get(row)):>{width}}" for (_, column), width in zip(columns, widths)]
        lines.append(f"{labels[row]:<{label_width}}" + "".join(cells))
    return lines


UNJUDGED_SHOWN = 10  # lines of a list on a terminal; the folder has all of them


def unjudged_text(run, folder):
    """What has no judgment, and why, as lines; "" where there is nothing. These count as wrong.

    folder  of the run, which the last line names where there are more than are shown
    """
    reasons = {}  # {pair's id: why its first such line is no judgment}
    for line in run["judgments"]:
        finish = line.get("finish", "stop")
        has_scores = None not in line.get("scores", [None])  # of a scalar judge, and equal
        if finish not in ("stop", "truncated") and not has_scores:
            reasons.setdefault(line["id"], finish)
    if not reasons:
        return ""
    lines = [f"{run['name']}: {len(reasons)} pairs could not be judged, and count as wrong:"]
    for pair_id, reason in itertools.islice(reasons.items(), UNJUDGED_SHOWN):
        lines.append(f"  {pair_id}: {' '.join(reason.split())[:200]}")
    if len(reasons) > UNJUDGED_SHOWN:
        more = len(reasons) - UNJUDGED_SHOWN
        lines.append(f"  and {more} more, in {folder}/judgments.jsonl")
    return "\n".join(lines) + "\n\n"


def cell(value):
    """A number as text. Shares have three digits, larger numbers (tokens) one."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, tuple):
        low, high = value
        return f"{low:.3f}-{high:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1f}" if value > 1.01 else f"{value:.3f}"  # a score of Ties can be 1.01


# ---------------------------------------------------------------- eval.py report


def report_arguments(argv):
    parser = Flags(prog="eval.py report", description=report.__doc__)
    arg = parser.add_argument
    arg("runs", nargs="+", help="folders of evaluations, in the order of their columns")
    arg("--training", help="folder of a training run, for the curve")
    arg("--out", help="folder for table.txt, report.html and curve.png; default: the last run's")
    arg(
        "--examples",
        type=number(int, 0),
        default=200,
        help="comparisons of every benchmark on the page",
    )
    return parser.parse_args(argv)


def report(argv):
    """Table, page and curve from what evaluations and training have written."""
    args = report_arguments(argv)
    runs = read_runs(args.runs)
    out = Path(args.out or args.runs[-1])
    table = [(run["name"], measure(run)) for run in runs]
    text = table_text(table)
    for run, folder in zip(runs, args.runs):
        unjudged = unjudged_text(run, folder)
        text += f"\n{unjudged}" if unjudged else ""
    print(text)

    page = (PAGE_FOLDER / "report.html").read_text()
    # "</" would end the script that holds the data.
    data = json_text(page_data(runs, table, args.examples)).replace("</", "<\\/")
    files = [out / "table.txt", out / "report.html"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_lines(out / "table.txt", [text])
        write_lines(out / "report.html", [page.replace("/*DATA*/null", data)])
        if args.training:
            files.append(out / "curve.png")
            draw_curve(Path(args.training) / "metrics.jsonl", files[-1])
    except OSError as e:
        raise Failure(f"--out {out}: cannot be written ({e.strerror})")
    print("wrote", ", ".join(map(str, files)))


def page_data(runs, table, count):
    """What the page shows, for JSON: all numbers, the papers' numbers, and examples.

    table  see `columns_of`
    count  comparisons of every benchmark among the examples
    """
    columns = columns_of(table)
    return {
        "runs": [
            {"name": name, "config": run["config"], "numbers": numbers}
            for run, (name, numbers) in zip(runs, table)
        ],
        "tables": {bench: page_rows(columns[bench], runs) for bench in columns},
        "papers": read_papers(),
        "examples": page_examples(runs, count),
    }


def page_rows(columns, runs):
    """A benchmark's table on the page: [{"heading", "name", "unit", "values": one for each run}, ...]"""
    by_run = dict(columns)
    return [
        {
            "heading": row.heading,
            "name": row.name,
            "unit": row.unit,
            "values": [by_run.get(run["name"], {}).get(row) for run in runs],
        }
        for row in merged_rows(by_run.values())
    ]


def read_papers():
    """The numbers of RM-R1's tables, in percent -> [{"judge", "numbers": {benchmark: {part: number}}}, ...]

    The overall number of a benchmark has the part "".
    """
    papers = []
    for row in csv.DictReader((PAGE_FOLDER / "papers.csv").read_text().splitlines()):
        numbers = defaultdict(dict)
        judge = row.pop("judge")
        for column, text in row.items():
            bench, _, part = column.partition("/")
            if text:
                numbers[bench][part] = float(text)
        papers.append({"judge": judge, "numbers": numbers})
    return papers


def draw_examples(run, count):
    """Ids of pairs, up to `count` of every benchmark, drawn evenly from those whose first judgment is right,
    wrong, or without a verdict."""
    rng = random.Random(0)
    ids = []
    for lines in by_bench(run).values():
        first = [x for x in lowest_temperature(lines) if x["vote"] == x["order"] == 0]
        kinds = grouped(first, lambda x: (x["verdict"] is None, x["verdict"] == x["label"]))
        permutations = [rng.sample(kind, len(kind)) for kind in kinds.values()]
        # One of each kind in turn, as long as it has any.
        turns = itertools.zip_longest(*permutations)
        sample = [line["id"] for turn in turns for line in turn if line]
        ids += sample[:count]
    return ids


LINE_FIELDS = "order swap temperature verdict reason label tokens text".split()
EXAMPLE_FIELDS = "id bench subset context a b swap label".split()


def page_examples(runs, count):
    """Comparisons that the last run has judged, each with every run's first judgments of it."""
    judgments = {pair_id: [] for pair_id in draw_examples(runs[-1], count)}
    for place, run in enumerate(runs):
        for lines in by_bench(run).values():
            for line in lowest_temperature(lines):
                if line["vote"] == 0 and line["id"] in judgments:
                    reasons = reasons_of(run["pairs"][line["id"]], line)
                    example = {
                        "run": place,
                        "scores": line.get("scores"),
                        "checks": {} if "scores" in line else reasons.checks,
                        "fault": "" if "scores" in line else reasons.fault,
                        "decided_by": parse(line["text"]).decided_by,
                        **{name: line[name] for name in LINE_FIELDS},
                    }
                    judgments[line["id"]].append(example)

    pairs = {}
    for run in runs:
        pairs |= run["pairs"]
    examples = []
    for pair_id, some in judgments.items():
        row = pairs[pair_id]
        example = {name: row[name] for name in EXAMPLE_FIELDS}
        examples.append(example | {"criteria": row.get("criteria"), "judgments": some})
    return examples


CURVES = (  # a column of metrics.jsonl, its label, its style
    ("accuracy", "sampled while training, T=1", "C0.-"),
    ("val_accuracy", "held-out pairs, greedy", "C3o-"),
    ("no_verdict", "no verdict", "C7:"),
)


def draw_curve(metrics, path):
    """Accuracy over GRPO steps, sampled and held out, in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not metrics.is_file():
        raise Failure(f"{metrics}: no such file; is --training the --out of a training run?")
    rows = read_lines(metrics, {"step": int})
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="tight")
    for column, label, style in CURVES:
        # A column is absent where it was not measured, and null where it was no finite number.
        points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
        if points:
            steps, values = zip(*points)
            axes.plot(steps, values, style, label=label, lw=1.5, ms=5)
    axes.axhline(0.5, color="0.6", lw=0.8, ls="--", label="a coin")
    axes.set(
        xlabel="GRPO step",
        ylabel="share of judgments",
        ylim=(-0.02, 1.02),
        title="Accuracy while training",
    )
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.08))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


# ---------------------------------------------------------------- eval.py compare


def compare(argv):
    """Do two runs differ? Every main number's difference on the items that both have, with its interval."""
    parser = Flags(prog="eval.py compare", description=compare.__doc__)
    parser.add_argument("runs", nargs=2, help="folders of two evaluations")
    parser.add_argument(
        "--all", action="store_true", help="every subset, not only the main numbers"
    )
    args = parser.parse_args(argv)
    first, second = read_runs(args.runs)
    first_lines, second_lines = by_bench(first), by_bench(second)
    benches = [bench for bench in first_lines if bench in second_lines]
    if not benches:
        raise Failure(f"{args.runs[0]} and {args.runs[1]} have no benchmark in common")

    first_width, second_width = (max(14, len(run["name"]) + 2) for run in (first, second))
    print(
        f"{'':<44}{first['name']:>{first_width}}{second['name']:>{second_width}}"
        f"{'difference':>14}{'95 % interval':>20}"
    )
    for bench in benches:
        metrics = []
        for run, lines in ((first, first_lines), (second, second_lines)):
            lowest = lowest_temperature(lines[bench])
            metrics.append(
                metrics_of(bench, run["pairs"], lowest) | sound_metrics(run["pairs"], lowest)
            )
        for name, x, y, low, high in differences(*metrics):
            if "/" in name and not args.all:
                continue
            conclusion = "differ" if low > 0 or high < 0 else "no difference shown"
            print(
                f"{bench + ' ' + name:<44}{x:>{first_width}.3f}{y:>{second_width}.3f}"
                f"{y - x:>+14.3f}{f'{low:+.3f} to {high:+.3f}':>20}  {conclusion}"
            )


def differences(first, second):
    """Yields (name, value in the first, value in the second, low, high) of every metric that both runs have,
    on the items that both have; low to high is the 95 % interval of second minus first."""
    for name in first:
        if name not in second:
            continue
        ours = benchmarks.common(first[name], second[name])
        theirs = benchmarks.common(second[name], first[name])
        x, y = benchmarks.value(ours), benchmarks.value(theirs)
        if x is not None and y is not None:
            yield name, x, y, *benchmarks.interval(theirs, minus=ours)
