"""
The two-pass oracle (RM-R1, section 3.2): judgments for SFT from pairs whose better response is known.

    python data/distill.py --data pairs.jsonl --out runs/data --teacher NAME --base-url URL --dry-run
    python data/distill.py --data runs/data/distill.jsonl --out runs/data --teacher NAME --base-url URL \\
        --teacher2 OTHER --base-url2 URL2
    python data/distill.py --data pairs.jsonl --out runs/mine --teacher Qwen/Qwen2.5-72B-Instruct

Pass 1 asks a teacher for a judgment and does not tell it the label. If the verdict is wrong, or the structure
is not that of a judgment, pass 2 gives a second teacher the right verdict and the failed judgment, in a
suffix that never reaches the training prompt. Its answer is checked as well, and must not let on that it was
told. What fails twice is kept apart. A teacher is an OpenAI-compatible server, or a local model by vLLM. A pair's
criteria stand in both prompts and stay in its row; its judgment must name the one that decided.

A teacher is asked with our instruct prompt, or with --system-prompt. A judge in a folder is asked as its judge.json
says, and a released RM-R1 checkpoint, by its id on the hub, with the published prompt (`rubrics.RELEASED`). One that
is asked by another protocol than instruct does not write all that a trace needs, and is refused.

Writes OUT/sft.jsonl (pairs with their trace), OUT/failed.jsonl, and every answer to OUT/journal.jsonl as it
comes: a killed run continues from there and pays for nothing twice. The journal finds an answer by its whole
request: another teacher, temperature, seed or length asks anew. A journal of another version of this project
is refused. The servers' keys come from OPENAI_API_KEY and OPENAI_API_KEY2.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from judge.backends import Answer, backend_flags, make_backend, read_answer
from judge.journal import Journal
from lib.chat import (
    encode,
    load_tokenizer,
    prompt_fingerprint,
    without_end_of_turn,
    without_thoughts,
)
from lib.files import (
    Failure,
    Flags,
    digest,
    json_text,
    lock_folder,
    number,
    progress_bar,
    read_lines,
    run_main,
    seed_of,
    write_lines,
)
from lib.model_files import find_model, fingerprint
from lib.pairs import read_pairs
from rubrics import RELEASED, PromptStyle, chat_messages, prompt_style

# What pass 2 adds to the user's message.
HINT = """

For your information only: the better response is [[{label}]]. An earlier judgment failed ({reason}):
[The Start of the Earlier Judgment]
{judgment}
[The End of the Earlier Judgment]
Write the judgment anew, in the required format, with reasons of your own that lead to [[{label}]]. Write as \
if you had found the verdict by yourself: mention neither this note nor the earlier judgment."""

# How a judgment lets on that its writer was told the label.
LEAK = re.compile(
    r"earlier judg|previous judg|prior judg|for your information|(?:the|this) note\b|"
    r"i (?:was|am|have been) (?:told|given)|as (?:you )?(?:stated|told|provided|instructed|indicated)|"
    r"(?:provided|given|stated|correct|right|known) (?:verdict|label)|ground[- ]truth|"
    r"the better response is (?:already )?(?:known|given)|"
    r"(?:verdict|label|answer) (?:is|was) (?:given|provided)",
    re.IGNORECASE,
)
TOO_FEW_AGREE = "too few of its samples agree"
# For --dry-run: tokens of a judgment, and one pair in how many needs pass 2 (the paper's share).
JUDGMENT_TOKENS = 800
PAIRS_PER_REPAIR = 4


def arguments():
    parser = Flags(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="pairs with labels")
    add("--out", required=True, help="folder for sft.jsonl, failed.jsonl and journal.jsonl")
    add(
        "--teacher",
        required=True,
        help="model of pass 1: a server's name for it, or a folder or hub id",
    )
    backend_flags(parser, "base-url system-prompt at-once seed max-tokens max-len dtype")
    add("--teacher2", help="model of pass 2; default: that of pass 1. 'none': no second pass")
    add("--base-url2", help="its server; default: that of pass 1")
    add("--samples", type=number(int, 1), default=1, help="judgments of pass 1 for each pair")
    add(
        "--agree",
        type=number(float, 0, 1),
        default=0.0,
        help="least share of them that must be right",
    )
    add(
        "--max-trace",
        type=number(int, 1),
        help="leave out longer traces: tokens of --tokenizer, else words",
    )
    add("--tokenizer", help="model folder or hub id, to count tokens")
    add("--temperature", type=number(float, 0), default=1.0, help="of the teachers")
    add(
        "--price",
        type=number(float, 0),
        nargs=2,
        default=(0, 0),
        help="dollars a million tokens, read and written",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print counts, tokens and estimated cost, and ask nothing",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="report and leave out bad lines instead of stopping",
    )
    return parser.parse_args()


def main():
    args = arguments()
    pairs = read_pairs(args.data, args.skip_bad)
    if len({pair.id for pair in pairs}) < len(pairs):
        raise Failure(
            f"{args.data}: two pairs have the same id, so their answers could be mixed up"
        )
    out = Path(args.out)
    if args.dry_run:
        return print_estimate(pairs, out, args)

    first, second = teachers(args)
    lock_folder(out)
    journal = Journal(out / "journal.jsonl")
    traces, failures, reasons = distill(pairs, first, second, journal, args)
    for pair_id in too_long(traces, args):
        text, _ = traces.pop(pair_id)
        failures[pair_id] = text, "longer than --max-trace"
        reasons["filter: longer than --max-trace"] += 1
    write_results(out, pairs, traces, failures)
    print_results(out, pairs, traces, failures, reasons, journal, args.price)
    missing = len(pairs) - len(traces) - len(failures)
    if missing:
        raise Failure(
            f"{missing} pairs got no answer from a teacher ({journal.failed}); the same command asks again"
        )


# ---------------------------------------------------------------- teachers


@dataclass
class Teacher:
    """Who writes judgments.

    name   identifies its answers in the journal
    build  makes its backend; called when there is something to ask, because a local model takes minutes
    style  how it is asked, see `teacher_style`
    """

    name: str
    build: Callable
    style: PromptStyle = PromptStyle("instruct")


def teachers(args):
    """The teachers of both passes; the second is None with --teacher2 none."""
    first = teacher_of(args, args.teacher, args.base_url, "OPENAI_API_KEY")
    if args.teacher2 == "none":
        return first, None
    model = args.teacher2 or args.teacher
    url = args.base_url2 or args.base_url
    own = "2" if args.base_url2 else ""
    return first, teacher_of(args, model, url, f"OPENAI_API_KEY{own}", f"--base-url{own}")


def teacher_of(args, model, url, key_name, flag="--base-url"):
    def build():
        return make_backend(
            model,
            url,
            args.max_tokens,
            at_once=args.at_once,
            key=os.environ.get(key_name),
            max_len=args.max_len,
            dtype=args.dtype,
            flag=flag,
        )

    style = teacher_style(args, model, url)
    name = model
    if not url:  # a local model's answers depend on its precision, its window and its files too
        name += f" in {args.dtype}, window {args.max_len or 'its own'}"
        if Path(model).exists():
            folder = find_model(model)
            name += f", files {fingerprint(model, folder)} {prompt_fingerprint(folder)}"
    return Teacher(name, build, style)


def teacher_style(args, model, url):
    """How a teacher is asked, in both passes. Raises Failure for one whose answers cannot be traces.

    A system prompt of --system-prompt comes before what a judge was trained with, its protocol included.
    """
    protocol = "instruct" if args.system_prompt else None
    folder = None if url else model
    style = prompt_style(folder, model, protocol, args.system_prompt, default="instruct")
    if style.protocol != "instruct":
        raise Failure(
            f"teacher {model}: it is a judge of the protocol {style.protocol}, which does not ask for all parts of "
            "a trace; name a file with a system prompt that does: --system-prompt"
        )
    return style


def ask_teacher(teacher, requests, journal, args, title):
    """Answers from the journal or else from the teacher.

    requests  {key: messages}; a key is (pair id, pass, sample)
    title     of the progress bar

    Returns {key: the journal's row}. Keys without an answer are missing.
    """
    seeds = {key: seed_of(args.seed, *key) for key in requests}
    digests = {}
    for key, messages in requests.items():
        whole = [teacher.name, messages, seeds[key], args.temperature, args.max_tokens]
        digests[key] = digest(whole)
    new_keys = [key for key in requests if digests[key] not in journal.answers]
    new_requests = ((requests[key], seeds[key], args.temperature) for key in new_keys)
    answers = teacher.build().answers(new_requests) if new_keys else ()

    tokens_read = tokens_written = 0
    bar = progress_bar(None, title, total=len(requests), initial=len(requests) - len(new_keys))
    for place, answer in answers:
        key = new_keys[place]
        if answer.failed:
            journal.failed = answer.finish
        else:
            journal.add(digests[key], answer, key=list(key), teacher=teacher.name)
            tokens_read += answer.prompt_tokens
            tokens_written += answer.tokens
        bar.update()
        bar.set_postfix_str(cost(tokens_read, tokens_written, args.price), refresh=False)
    bar.close()
    rows = {key: journal.answers.get(digests[key]) for key in requests}
    return {key: row for key, row in rows.items() if row is not None}


def cost(tokens_read, tokens_written, price, before=""):
    """The cost of tokens as a text; "" without a price.

    price  dollars a million tokens, read and written
    """
    if not any(price):
        return ""
    dollars = (tokens_read * price[0] + tokens_written * price[1]) / 1e6
    return f"{before}${dollars:,.2f}"


# ---------------------------------------------------------------- the two passes


def distill(pairs, first, second, journal, args):
    """Judgments for pairs, by two passes.

    first, second  `Teacher`s; no second pass if the second is None

    Returns traces {pair id: (text, pass)}, failures {pair id: (text, reason)} and a Counter of reasons. A pair
    without an answer is in neither.
    """
    traces, failures, reasons = {}, {}, Counter()
    for turn, teacher, samples in ((1, first, args.samples), (2, second, 1)):
        if teacher is None:
            break
        messages = {pair.id: chat_messages(pair, teacher.style) for pair in pairs}
        if turn == 2:
            for pair in pairs:
                hinted = with_hint(messages[pair.id], pair.label, *failures[pair.id])
                messages[pair.id] = hinted
        keys = [(pair.id, turn, sample) for pair in pairs for sample in range(samples)]
        requests = {key: messages[key[0]] for key in keys}
        answers = ask_teacher(teacher, requests, journal, args, f"pass {turn}")

        to_repair = []
        for pair in pairs:
            failures.pop(pair.id, None)  # of pass 1: this is the pair's second chance
            keys = [(pair.id, turn, sample) for sample in range(samples)]
            rows = [answers[key] for key in keys if key in answers]
            if not rows:
                reasons[f"pass {turn}: no answer from the teacher"] += 1
                continue
            text, reason = best_answer(rows, pair, turn, args.agree)
            if not reason:
                traces[pair.id] = trace_of(text), turn
                continue
            failures[pair.id] = text, reason
            reasons[f"pass {turn}: {reason}"] += 1
            if reason != TOO_FEW_AGREE:  # a right judgment needs no repair
                to_repair.append(pair)
        pairs = to_repair
    return traces, failures, reasons


def best_answer(rows, pair, turn, least_share):
    """(text, reason) of the first answer that can be a trace, with reason ""; else of the first answer.

    Where too few of a pair's answers are right, a right one may be a guess and fails too.
    """
    texts = [row["text"] for row in rows]
    faults = [fault(row["text"], row["finish"], pair, told=turn == 2) for row in rows]
    right = [text for text, reason in zip(texts, faults) if not reason]
    if not right:
        return texts[0], faults[0]
    return right[0], "" if len(right) >= least_share * len(rows) else TOO_FEW_AGREE


def fault(text, finish, pair, told=False):
    """Why an answer cannot be a trace; "" if it can.

    finish  as in `Answer`
    told    the teacher knew the label

    The verdict must be right, and the parts that were asked for must be there. The parser is the one that
    training uses.
    """
    judgment = read_answer(Answer(text, finish))
    if judgment.verdict is None:
        return judgment.reason.split(":")[0]
    if judgment.verdict != pair.label:
        return "wrong verdict"
    missing = missing_part(judgment, pair)
    if missing:
        return missing
    if told and LEAK.search(text):
        return "it lets on that it was told"
    return ""


def missing_part(judgment, pair):
    """Which part a judgment lacks; "" for none.

    Of a pair with criteria it names one of them, and writes none of its own. Else it has what its task type asks for (section 3.2):
    a solution for reasoning, a weighted rubric for chat.
    """
    has_weights = any(weight is not None for _, weight, _ in judgment.rubric)
    if not judgment.eval:
        return "no comparison"
    if pair.criteria:
        return fault_by_criteria(judgment, pair.criteria)
    if judgment.type not in ("Chat", "Reasoning"):
        return "no task type"
    if judgment.type == "Reasoning" and not judgment.solution:
        return "no solution"
    if judgment.type == "Chat" and not has_weights:
        return "no weighted rubric"
    return ""


def fault_by_criteria(judgment, criteria):
    """What is wrong with a judgment by criteria that were given; "" for nothing."""
    if judgment.rubric:
        return "a rubric of its own"
    if not judgment.decided_by:
        return "no criterion that decided"
    # Of criteria with weights the names are known.
    names = [re.fullmatch(r"(.+) [\d.]+%:.*", line) for line in criteria.splitlines()]
    known = [name[1].lower() for name in names if name]
    if len(known) == len(names) and judgment.decided_by.lower() not in known:
        return "decided by none of its criteria"
    return ""


def trace_of(text):
    """What SFT learns to write: the answer without the thoughts before it and without an end-of-turn token.

    A server's tokenizer is not at hand, so the end is known by its looks. sft.py asks the student's own
    tokenizer for any control token that is left.
    """
    return without_end_of_turn(without_thoughts(text) or "").strip()


def with_hint(messages, label, judgment, reason):
    """The messages of pass 2, a new list: the hint belongs to the teacher, and never to the training prompt."""
    *before, last = messages
    hint = HINT.format(label=label, reason=reason, judgment=judgment[-4000:])
    return [*before, {**last, "content": last["content"] + hint}]


# ---------------------------------------------------------------- results


def too_long(traces, args):
    """The ids whose trace is longer than --max-trace, in tokens of --tokenizer, else in words."""
    if not args.max_trace:
        return []
    if args.tokenizer:
        tokenizer, _ = load_tokenizer(args.tokenizer)

    def length(text):
        if args.tokenizer:
            return len(tokenizer.encode(text, add_special_tokens=False))
        return len(text.split())

    return [pair_id for pair_id, (text, _) in traces.items() if length(text) > args.max_trace]


def write_results(out, pairs, traces, failures):
    """Write sft.jsonl and failed.jsonl. A pair without an answer is in neither file."""
    good, bad = [], []
    for pair in pairs:
        if pair.id in traces:
            text, turn = traces[pair.id]
            good.append(json_text(pair.row(text, meta={"pass": turn})))
        elif pair.id in failures:
            text, reason = failures[pair.id]
            bad.append(json_text(pair.row(judgment=text, reason=reason)))
    write_lines(out / "sft.jsonl", good)
    write_lines(out / "failed.jsonl", bad)


def print_results(out, pairs, traces, failures, reasons, journal, price):
    """Print how many traces came from which pass, what they cost, and why others failed."""
    rows = journal.answers.values()
    tokens_read = sum(row["prompt_tokens"] for row in rows)
    tokens_written = sum(row["tokens"] for row in rows)
    passes = Counter(turn for _, turn in traces.values())
    dollars = cost(tokens_read, tokens_written, price, ", ")
    print(
        f"{out}/sft.jsonl: {len(traces)} traces of {len(pairs)} pairs, {passes[1]} from pass 1, "
        f"{passes[2]} from pass 2; {len(failures)} failed\n"
        f"{len(rows)} answers, {tokens_read:,} tokens read, {tokens_written:,} written{dollars}"
    )
    for reason, times in reasons.most_common():
        print(f"  {times:>7,}  {reason}")


def print_estimate(pairs, out, args):
    """Print what a run would ask and cost. Without --tokenizer a token is taken to be 4 characters."""
    style = PromptStyle()
    # The published prompt would have to be downloaded: ours stands for it.
    if args.system_prompt or RELEASED.get(args.teacher) != "instruct":
        style = teacher_style(args, args.teacher, args.base_url)
    if args.tokenizer:
        tokenizer, _ = load_tokenizer(args.tokenizer)
    prompt_tokens = 0
    for pair in progress_bar(pairs, "count", leave=False):
        messages = chat_messages(pair, style)
        if args.tokenizer:
            prompt_tokens += len(encode(tokenizer, messages))
        else:
            prompt_tokens += sum(len(message["content"]) for message in messages) // 4

    requests = len(pairs) * args.samples
    repairs = len(pairs) // PAIRS_PER_REPAIR
    repair_tokens = (prompt_tokens + JUDGMENT_TOKENS * len(pairs)) // PAIRS_PER_REPAIR
    tokens_read = prompt_tokens * args.samples + repair_tokens
    tokens_written = JUDGMENT_TOKENS * (requests + repairs)
    answers = len(read_lines(out / "journal.jsonl"))
    dollars = cost(tokens_read, tokens_written, args.price, ", ")
    print(
        f"{len(pairs)} pairs: {requests} requests in pass 1, "
        f"about {repairs} in pass 2; {answers} answers are in the journal\n"
        f"about {tokens_read:,} tokens to read and {tokens_written:,} to write"
        + (dollars or "; give --price for the cost")
    )


if __name__ == "__main__":
    run_main(main)
