"""
How good a judge is: judge benchmarks or any file of pairs, keep every judgment, and report.

    torchrun --nproc_per_node 8 eval.py --model runs/grpo/model --bench all --out DIR
    python eval.py --model MODEL --protocol instruct --bench rm-bench,rmb --data-dir files --out DIR
    python eval.py --model MODEL --data pairs.jsonl --both-orders --temperature 1 --votes 5 --out DIR
    python eval.py --model NAME --base-url http://localhost:8000/v1 --protocol instruct --bench all --out DIR
    python eval.py --model Skywork/Skywork-Reward-Llama-3.1-8B-v0.2 --scalar --bench rewardbench --out DIR
    python eval.py report DIR1 DIR2 ...         # table, page and curve: judge/report.py
    python eval.py compare DIR1 DIR2            # do two runs differ?

Writes DIR/pairs.jsonl (the comparisons), DIR/judgments.jsonl (one line a judgment, as it comes),
DIR/left_out.jsonl and DIR/config.json; the report computes every number from these files. A run that was
killed goes on with the same command: it judges what is missing, and what has changed since. What could not be
judged counts as wrong and is listed.
"""

import contextlib
import difflib
import errno
import hashlib
import math
import os
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from judge import benchmarks
from judge.backends import (
    Answer,
    ScalarBackend,
    backend_flags,
    make_backend,
    read_answer,
    read_url,
)
from judge.report import (
    EVALUATION_FORMAT,
    JUDGMENT_FIELDS,
    LEFT_OUT_FIELDS,
    PAIR_FIELDS,
    check_format,
    compare,
    key_of,
    measure,
    read_judgments,
    read_run,
    report,
    table_text,
    unjudged_text,
)
from judge.soundness import TRUTH
from lib.chat import prompt_fingerprint
from lib.files import (
    Failure,
    Flags,
    digest,
    json_text,
    lock_folder,
    number,
    output_in_file,
    progress_bar,
    read_lines,
    read_object,
    run_main,
    seed_of,
    write_lines,
)
from lib.model_files import config_of, find_model, fingerprint
from lib.pairs import Pair, read_pairs
from rubrics import PromptStyle, chat_messages, prompt_style, verbatim

# torch is imported where models run: `eval.py report` and `eval.py compare` need none.


def flags():
    parser = Flags(
        __doc__,
        epilog="eval.py report DIR ... and eval.py compare DIR DIR read what was written; "
        "each has --help",
    )
    arg = parser.add_argument
    backend_flags(
        parser, "model protocol system-prompt base-url at-once max-tokens max-len dtype seed"
    )
    arg(
        "--bench",
        default="",
        help=f"NAME or NAME@REVISION, with commas: {', '.join(benchmarks.BENCHES)}; or all",
    )
    arg("--data-dir", help="folder with the benchmarks' files instead of the hub")
    arg(
        "--data",
        nargs="+",
        default=[],
        help="files of pairs: JSONL, JSON, parquet, or a hub dataset",
    )
    arg("--out", required=True, help="folder of this run")
    arg("--scalar", action="store_true", help="the model is a reward model that gives a number")
    arg(
        "--temperature",
        type=number(float, 0),
        nargs="+",
        default=[0.0],
        help="0 for greedy; one or several",
    )
    arg(
        "--votes",
        type=number(int, 1),
        default=1,
        help="judgments of a comparison above temperature 0; the majority decides, the first at a tie",
    )
    arg(
        "--both-orders",
        action="store_true",
        help="judge every pair a second time with A and B swapped",
    )
    arg(
        "--limit", type=number(int, 1), help="only so many items of every subset, drawn by the seed"
    )
    arg(
        "--engine-memory",
        type=number(float, 0, 1, above=True),
        default=0.9,
        help="share of a card for vLLM",
    )
    arg("--tp", type=number(int, 1), default=1, help="ranks that judge with one engine together")
    arg(
        "--skip-bad",
        action="store_true",
        help="report and leave out bad lines of --data, and go on",
    )
    return parser


def arguments(argv=None):
    args = flags().parse_args(argv)
    if args.bench == "all":
        args.bench = list(benchmarks.BENCHES)
    else:
        args.bench = [name for name in args.bench.split(",") if name]
    for name in args.bench:
        if name.split("@")[0] not in benchmarks.BENCHES:
            raise Failure(
                f"--bench {name}: no such benchmark; there are {', '.join(benchmarks.BENCHES)}"
            )
    if not args.bench and not args.data:
        raise Failure("name something to judge: --bench or --data")
    if args.votes > 1 and max(args.temperature) == 0:
        raise Failure(
            f"--votes {args.votes}: votes at temperature 0 are all the same; give --temperature 1"
        )
    if len(set(args.temperature)) < len(args.temperature):
        raise Failure("--temperature: each once")
    if args.scalar and (args.votes > 1 or args.both_orders or args.base_url or args.tp > 1):
        raise Failure("--scalar: a reward model has no votes, no order, no server and no --tp")
    return args


FILE_COMMANDS = {"report": report, "compare": compare}


def file_command():
    """The function of the command that reads what evaluations have written, or None for an evaluation."""
    return FILE_COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None


def check_command(words):
    """Refuse a first word that is no flag: a misspelt command, not an evaluation that lacks flags."""
    for word in words:
        if not word.startswith("-"):
            near = difflib.get_close_matches(word, FILE_COMMANDS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Failure(f"{word}: unknown command, there are {', '.join(FILE_COMMANDS)}{hint}")


def main():
    command = file_command()
    if command:
        return command(sys.argv[2:])
    check_command(sys.argv[1:2])
    args = arguments()
    try:
        evaluate(args)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Failure(
            f"--out {args.out}: {e.strerror}; the judgments so far are kept, and the same command goes on"
        )


def evaluate(args):
    """Ask for every judgment that the folder lacks, write each one as it comes, and print the table."""
    from lib.dist import all_sum, barrier, phase, start_ranks

    out = Path(args.out)
    pairs, left_out, origins = collect_pairs(args)
    tasks = list_tasks(pairs, args)
    if not tasks:
        example = f": {left_out[0]['item']}: {left_out[0]['reason']}" if left_out else ""
        raise Failure(f"nothing to judge{example}")
    with_criteria = [pair.id for pair in pairs.values() if pair.criteria]
    if args.scalar and with_criteria:
        raise Failure(
            f"--scalar: a reward model is asked without criteria, and {with_criteria[0]} is judged by criteria of its own"
        )
    rank, world, _ = start_ranks()
    config = settings(args, world) | {"data": origins}
    style = None if args.scalar else PromptStyle(config["protocol"], config["system"])
    open_folder(out, config)
    barrier()  # all ranks have looked at the folder
    if rank == 0:
        update_folder(args, config, pairs, left_out, style)
    barrier()

    my_tasks = tasks_of_engine(tasks, out, rank // args.tp, world // args.tp)
    phase("judge")
    # All ranks must build an engine together, or none.
    (work,) = all_sum([len(my_tasks)])
    # Keep a reference until the end: garbage-collecting the engine destroys the process group.
    backend = None
    if work and not args.scalar:
        with output_of_loading(args, rank):
            backend = build_backend(args)
    lines = judgment_lines(args, backend, my_tasks, style) if work else ()
    bar = progress_bar(None, "judge", total=len(my_tasks), smoothing=0)
    judged = right = 0
    # The ranks of one tensor-parallel engine get the same answers, so the first of them writes.
    writes = rank % args.tp == 0
    with open(out / f"judgments.part{rank}.jsonl" if writes else os.devnull, "a") as file:
        for line in lines:
            file.write(json_text(line) + "\n")
            file.flush()
            judged += 1
            right += line["verdict"] is not None and line["verdict"] == line["label"]
            bar.update()
            bar.set_postfix_str(f"accuracy {right / judged:.3f}", refresh=False)
    bar.close()

    barrier()  # all ranks have written
    if rank == 0:
        gather(out, tasks)
    barrier()


# ---------------------------------------------------------------- what to judge


def collect_pairs(args):
    """The comparisons of all benchmarks and files -> {pair id: pair}, [what was left out], [where it came from]

    A pair's meta says which benchmark or file it is from. "swap" means: the better response is B. For a
    benchmark's pair a hash of (seed, id) decides that. A file's pairs keep their order.
    """
    pairs, left_out, origins = {}, [], []
    for name in args.bench:
        bench_pairs, bad_rows, sources = benchmarks.load(name, args.data_dir, args.limit, args.seed)
        origins += sources
        left_out += bad_rows
        for pair in bench_pairs:
            mark = hashlib.sha256(f"{args.seed}/{pair.id}".encode()).digest()
            swap = mark[0] % 2 == 1
            pair = pair.swapped() if swap else pair
            pairs[pair.id] = replace(pair, meta=pair.meta | {"swap": swap})
    for path in args.data:
        origins.append(path)
        for pair in pairs_of_file(path, args, left_out):
            if pair.id in pairs:
                raise Failure(f"{path}: two pairs have the id {pair.meta['item']}")
            pairs[pair.id] = pair
    return pairs, left_out, origins


def pairs_of_file(path, args, left_out):
    """Yields a file's pairs, with the meta of `collect_pairs`. Its ties are added to `left_out`."""
    name = Path(path).stem
    if name in benchmarks.BENCHES:  # it would be scored as the benchmark
        name += " pairs"
    all_pairs = read_pairs(path, args.skip_bad, args.both_orders, ties=True)
    pairs = [pair for pair in all_pairs if pair.label]
    for pair in all_pairs:
        if not pair.label:
            reason = "a tie: neither response is better"
            left_out.append({"bench": name, "item": pair.id, "reason": reason})
    if args.limit:
        count = min(args.limit, len(pairs))
        places = random.Random(args.seed).sample(range(len(pairs)), count)
        pairs = [pairs[i] for i in sorted(places)]
    for pair in pairs:
        meta = {
            "bench": name,
            "item": pair.id,
            "subset": "",
            "compare": [0, 1],
            "type": pair.type,
            "source": pair.source,
            "swap": pair.label == "B",  # "swap" means: the better response is B
            **{name: value for name, value in pair.meta.items() if name in TRUTH},
        }
        if "strength" in pair.meta:
            meta["strength"] = pair.meta["strength"]
        if "style_a" in pair.meta and "style_b" in pair.meta:
            styles = [pair.meta["style_a"], pair.meta["style_b"]]
            meta["styles"] = styles if pair.label == "A" else styles[::-1]  # the better one's first
        yield replace(pair, id=f"{name}/{pair.id}", meta=meta)


@dataclass
class Task:
    """A judgment to ask for.

    pair    in the order in which the judge sees it
    fields  what its line in judgments.jsonl begins with
    """

    pair: Pair
    fields: dict


def list_tasks(pairs, args):
    """[`Task`, ...] of pairs, {pair id: pair}. Order 0 is that of `collect_pairs`, order 1 the other one.

    JudgeBench asks for both orders. A scalar judge knows no order, and greedy votes would all be the same.
    """
    tasks = []
    for pair in pairs.values():
        both = args.both_orders or benchmarks.bench_named(pair.meta["bench"]).orders == "join"
        for order in (0, 1) if both and not args.scalar else (0,):
            displayed = pair.swapped() if order else pair
            swap = pair.meta["swap"] ^ bool(order)
            for temperature in args.temperature:
                for vote in range(args.votes if temperature > 0 else 1):
                    fields = {
                        "id": pair.id,
                        "order": order,
                        "swap": swap,
                        "temperature": temperature,
                        "vote": vote,
                        "label": displayed.label,
                    }
                    tasks.append(Task(displayed, fields))
    return sorted(tasks, key=lambda task: task.fields["temperature"])


def tasks_of_engine(tasks, out, engine, engines):
    """The tasks that fall to an engine, without those that the folder has. A line that failed is asked for again.

    All votes on a prompt go to one engine, whose prefix cache then has the prompt.
    """
    lines = read_lines(out / "judgments.jsonl", JUDGMENT_FIELDS)
    existing = {key_of(line) for line in lines if not line.get("failed")}
    prompts = dict.fromkeys((task.fields["id"], task.fields["order"]) for task in tasks)
    place = {prompt: n for n, prompt in enumerate(prompts)}
    return [
        task
        for task in tasks
        if place[task.fields["id"], task.fields["order"]] % engines == engine
        and key_of(task.fields) not in existing
    ]


# ---------------------------------------------------------------- judge


def settings(args, world):
    """What judgments depend on besides their pairs, for config.json: all judgments in a folder share these."""
    from lib.engine import check_tp

    protocol = system = None
    folder = None if args.base_url else find_model(args.model)
    if not args.scalar:
        check_tp(args.tp, world, folder and config_of(folder))
        style = prompt_style(folder, args.model, args.protocol, args.system_prompt)
        protocol, system = style.protocol, style.system
    return {
        "format": EVALUATION_FORMAT,
        "model": args.model,
        "weights": fingerprint(args.model, folder),
        "tokenizer": prompt_fingerprint(folder),
        "base_url": args.base_url and read_url(args.base_url)[0],
        "scalar": args.scalar,
        "protocol": protocol,
        "system": system,
        "max_tokens": args.max_tokens,
        "max_len": args.max_len,
        "dtype": args.dtype,
        "seed": args.seed,
    }


def prompt_of(pair, style):
    """The chat messages for a pair; for a scalar judge (style None) the texts that it scores."""
    if style is None:
        return [pair.context, pair.a, pair.b]
    return chat_messages(pair, style)


def output_of_loading(args, rank):
    """What libraries print while a model loads goes to a file of the run's folder."""
    if args.base_url:
        return contextlib.nullcontext()
    log = Path(args.out) / f"engine.rank{rank}.log"
    if rank == 0:
        print(f"vLLM takes half a minute to start (its messages: {log})", file=sys.stderr)
    return output_in_file(log)


def build_backend(args):
    return make_backend(
        args.model,
        args.base_url,
        args.max_tokens,
        at_once=args.at_once,
        max_len=args.max_len,
        dtype=args.dtype,
        memory=args.engine_memory,
        seed=args.seed,
        tp=args.tp,
    )


def judgment_lines(args, backend, tasks, style):
    """Yields lines of judgments.jsonl as answers come."""
    if args.scalar:
        yield from scalar_lines(args, tasks, style)
        return

    def requests():
        for task in tasks:
            fields = task.fields
            seed = seed_of(
                args.seed, fields["id"], fields["order"], fields["temperature"], fields["vote"]
            )
            yield prompt_of(task.pair, style), seed, fields["temperature"]

    for place, answer in backend.answers(requests()):
        task = tasks[place]
        prompt = prompt_of(task.pair, style)
        yield task.fields | judgment_line(answer, task.pair, prompt)


def judgment_line(answer, pair, prompt):
    """The fields of judgments.jsonl that an answer decides; a `Task` has the others.

    pair    in the order in which the judge saw it
    prompt  see `prompt_of`

    A failed answer has a line too: numbers of the others alone would be too good.
    """
    judgment = read_answer(answer)
    quotes = verbatim(judgment, pair)
    line = {
        "verdict": judgment.verdict,
        "reason": judgment.reason,
        "official": benchmarks.process_judgement(answer.text),
        "finish": answer.finish,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "prompt": digest(prompt),
        "type": judgment.type,
        "rubric": [[name, weight] for name, weight, _ in judgment.rubric],
        "quotes": [sum(quotes), len(quotes)],
        "text": answer.text,
    }
    return line | {"failed": True} if answer.failed else line


def scalar_lines(args, tasks, style):
    """As `judgment_lines`, from a reward model. It scores every conversation once, even if several pairs have
    it."""
    conversations = {}  # {digest: messages}
    uses = defaultdict(list)  # {digest: [(place of a task, side), ...]}
    for place, task in enumerate(tasks):
        for side, response in (("A", task.pair.a), ("B", task.pair.b)):
            conversation = [*task.pair.context, {"role": "assistant", "content": response}]
            mark = digest(conversation)
            conversations[mark] = conversation
            uses[mark].append((place, side))

    marks = list(conversations)
    backend = ScalarBackend(args.model, args.dtype)
    scores = defaultdict(dict)  # {place of a task: {side: score}}
    for n, score in backend.scores(list(conversations.values())):
        for place, side in uses[marks[n]]:
            scores[place][side] = score
            if len(scores[place]) == 2:
                yield scalar_line(tasks[place], scores[place]["A"], scores[place]["B"], style)


def scalar_line(task, a, b, style):
    """The line of a task from the scores of its responses: the higher one is the verdict. A score is None where
    the conversation is longer than the model's window."""
    verdict, reason = None, ""
    if a is None or b is None:
        reason = "longer than the model's window"
    elif a == b:
        reason = "equal scores"
    elif not (math.isfinite(a) and math.isfinite(b)):
        reason = "a score is not a number"
    else:
        verdict = "A" if a > b else "B"
    answer = Answer("", reason or "stop")
    line = task.fields | judgment_line(answer, task.pair, prompt_of(task.pair, style))
    return line | {
        "verdict": verdict,
        "reason": reason,
        "official": verdict or "error",
        "scores": [a, b],
    }


# ---------------------------------------------------------------- a run's folder


def open_folder(out, config):
    """Make and lock the run's folder, on every rank. Raises Failure where it is of another run or version."""
    lock_folder(out)
    path = out / "config.json"
    if not path.is_file():
        return
    old = read_object(path)
    check_format(f"--out {out}", old)
    if "script" in old:
        raise Failure(f"--out {out}: holds a training run ({old['script']}); give another folder")
    if all(line.get("failed") for line in read_judgments(out).values()):
        return
    for key in config | old:
        was, now = old.get(key, "absent"), config.get(key, "absent")
        if was != now and key != "data":
            was, now = str(was)[:80], str(now)[:80]
            raise Failure(
                f"--out {out}: holds judgments with another {key} ({was}, now {now}); give another "
                "folder or remove it"
            )


def update_folder(args, config, pairs, left_out, style):
    """Write config, pairs and left-out rows of this command to its folder, and drop judgments that have become
    stale: of a text or label that has changed, or of a pair that is no longer in its file."""
    out = Path(args.out)
    write_lines(out / "config.json", [json_text(config, indent=2)])

    # Without --limit we read the whole file, so a saved pair that is not in it was deleted.
    files = {pair.meta["bench"] for pair in pairs.values()} - set(benchmarks.BENCHES)
    whole_files = set() if args.limit else files
    merge(out, keep=lambda line: is_current(line, pairs, whole_files, style))

    rows = {row["id"]: row for row in read_lines(out / "pairs.jsonl", PAIR_FIELDS)}
    rows = {key: row for key, row in rows.items() if row["bench"] not in whole_files}
    for pair in pairs.values():
        rows[pair.id] = {
            "id": pair.id,
            **pair.meta,
            "context": pair.context,
            "a": pair.a,
            "b": pair.b,
            "label": pair.label,
        }
        if pair.trace:  # an oracle's: the report compares its criteria with the judge's
            rows[pair.id]["trace"] = pair.trace
        if pair.criteria:
            rows[pair.id]["criteria"] = pair.criteria
    write_lines(out / "pairs.jsonl", map(json_text, rows.values()))

    reasons = read_lines(out / "left_out.jsonl", LEFT_OUT_FIELDS) + left_out
    unique = {(row["bench"], row["item"]): row for row in reasons}
    write_lines(out / "left_out.jsonl", map(json_text, unique.values()))


def is_current(line, pairs, whole_files, style):
    """True if a judgment is of a pair as it is now.

    Its pair may be missing from `pairs`. If its file was read only in part (--limit), or not at all, the
    judgment is kept.
    """
    pair = pairs.get(line["id"])
    if pair is None:
        return line["id"].split("/")[0] not in whole_files
    try:
        displayed = pair.swapped() if line["order"] else pair
    except ValueError:  # as it is now, it cannot be swapped
        return False
    return line["label"] == displayed.label and line["prompt"] == digest(
        prompt_of(displayed, style)
    )


def merge(out, order=(), keep=lambda line: True):
    """Gather the files of all ranks in judgments.jsonl -> {key: line}

    order  keys whose lines come first
    keep   says of a line whether it stays
    """
    parts = sorted(out.glob("judgments.part*.jsonl"))
    all_lines = read_judgments(out)
    lines = {key: line for key, line in all_lines.items() if keep(line)}
    stale = len(all_lines) - len(lines)
    if stale:
        print(
            f"{out}: {stale} judgments are of texts or labels that have changed or gone, and are dropped"
        )
    if parts or stale:
        lines = {key: lines[key] for key in [*order, *lines] if key in lines}
        write_lines(out / "judgments.jsonl", map(json_text, lines.values()))
    for path in parts:
        path.unlink()
    return lines


def gather(out, tasks):
    """Merge what the ranks have written, in the order of the tasks. Print the table and what was not judged.

    Raises Failure where asking again may help, with the last reason.
    """
    keys = [key_of(task.fields) for task in tasks]
    lines = merge(out, keys)
    if lines:
        run = read_run(out)
        print(table_text([(run["name"], measure(run))]))
        print(unjudged_text(run, out), end="")
    reason = "no answer on another rank, or the files were changed meanwhile"
    lost = 0
    for key in keys:
        line = lines.get(key, {"failed": True, "reason": reason})
        if line.get("failed"):
            lost += 1
            reason = line["reason"]
    if lost:
        raise Failure(
            f"{lost} of {len(tasks)} judgments: {reason}; they count as wrong, and the same command asks "
            "for them again"
        )


if __name__ == "__main__":
    if file_command():
        run_main(main)
    else:
        from lib.dist import explain

        run_main(main, explain)
