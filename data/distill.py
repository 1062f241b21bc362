"""
The two-pass oracle (RM-R1, section 3.2): judgments for SFT from pairs whose better response is known.

    python data/distill.py --data pairs.jsonl --out runs/data --teacher NAME --base-url URL --dry-run
    python data/distill.py --data runs/data/distill.jsonl --out runs/data --teacher NAME --base-url URL \\
        --teacher2 OTHER --base-url2 URL2
    python data/distill.py --data pairs.jsonl --out runs/mine --teacher Qwen/Qwen2.5-72B-Instruct

Pass 1 asks a teacher for a judgment without telling it the label. Where the verdict is wrong or the structure
is not that of a judgment, pass 2 shows a second teacher the right verdict and the failed judgment, in a
suffix that never reaches the training prompt; its answer is checked as well, and must not let on that it was
told. What fails twice is kept apart. A teacher is an OpenAI-compatible server, or a local model by vLLM.

Writes OUT/sft.jsonl (pairs with their trace), OUT/failed.jsonl, and every answer to OUT/journal.jsonl as it
comes: a killed run continues from there and pays for nothing twice. An answer counts for what it was asked:
another teacher, temperature, seed or length asks anew, as does a journal from before all these were in its
keys. Keys come from OPENAI_API_KEY and OPENAI_API_KEY2.
"""
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from askers import Answer, Journal, asker_of, flags, judged
from engine import seed_of
from files import Flags, claim, digest, fail, number, read_lines, write_lines
from rubrics import chat_messages, encode, read_pairs, read_system

# What pass 2 adds to the user's message.
TOLD = """

For your information only: the better response is [[{label}]]. An earlier judgment failed ({reason}):
[The Start of the Earlier Judgment]
{judgment}
[The End of the Earlier Judgment]
Write the judgment anew, in the required format, with reasons of your own that lead to [[{label}]]. Write as \
if you had found the verdict by yourself: mention neither this note nor the earlier judgment."""

LEAK = re.compile(
    r"earlier judg|previous judg|prior judg|for your information|(?:the|this) note\b|"
    r"i (?:was|am|have been) (?:told|given)|as (?:you )?(?:stated|told|provided|instructed|indicated)|"
    r"(?:provided|given|stated|correct|right|known) (?:verdict|label)|ground[- ]truth|"
    r"the better response is (?:already )?(?:known|given)|"
    r"(?:verdict|label|answer) (?:is|was) (?:given|provided)",
    re.IGNORECASE)


# ---------------------------------------------------------------- checks

def fault(text, finish, label, told=False):
    """Why an answer cannot be a trace, "" if it can; finish as in `askers.Answer`. One parser for everything:
    the verdict is right and the parts that its task type asks for are there (section 3.2: solution for
    reasoning, weighted rubric for chat)."""
    j = judged(Answer(text, finish))
    weighted = any(weight is not None for _, weight, _ in j.rubric)
    faults = {j.reason.split(":")[0]: j.verdict is None,
              "wrong verdict": j.verdict != label,
              "no task type": j.type not in ("Chat", "Reasoning"),
              "no solution": j.type == "Reasoning" and not j.solution,
              "no weighted rubric": j.type == "Chat" and not weighted,
              "no comparison": not j.eval,
              "it lets on that it was told": told and LEAK.search(text)}
    return next((why for why, found in faults.items() if found), "")


def trace_of(text):
    """What SFT learns to write: the answer without thoughts before it and without an end-of-turn token."""
    return re.sub(r"<\|[^|<>]*\|>\s*$", "", text.rpartition("</think>")[2]).strip()


def hint(messages, label, judgment, reason):
    """The messages of pass 2. The list of pass 1 stays as it is: the suffix belongs to the teacher only."""
    last = {**messages[-1], "content": messages[-1]["content"] + TOLD.format(
        label=label, reason=reason, judgment=judgment[-4000:])}
    return [*messages[:-1], last]


# ---------------------------------------------------------------- asking, with a journal

def ask(teacher, wanted, journal, args, desc):
    """Answers for {key: messages}, from the journal or else from the teacher: its name, and a function that
    builds it when there is something to ask. -> {key: row}; keys without an answer are missing."""
    from tqdm import tqdm                   # here: data/toy.py --show, which imports this, needs no package
    name, build = teacher
    seeds = {key: seed_of(args.seed, *key) for key in wanted}
    asked = {key: digest([name, messages, seeds[key], args.temperature, args.max_tokens])
             for key, messages in wanted.items()}
    todo = [key for key in wanted if asked[key] not in journal.answers]
    requests = ((wanted[key], seeds[key], args.temperature) for key in todo)
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc=desc)
    read = written = 0
    for at, answer in build().answers(requests) if todo else ():
        if answer.failed:
            journal.failed = answer.finish
        else:
            journal.add(asked[todo[at]], answer, key=list(todo[at]), teacher=name)
            read, written = read + answer.prompt_tokens, written + answer.tokens
        bar.update()
        bar.set_postfix_str(cost(read, written, args.price), refresh=False)
    bar.close()
    return {key: journal.answers[asked[key]] for key in wanted if asked[key] in journal.answers}


def cost(read, written, price, before=""):
    """Dollars of so many tokens as a text, "" without a price: dollars a million tokens, read and written."""
    return f"{before}${(read * price[0] + written * price[1]) / 1e6:,.2f}" if any(price) else ""


# ---------------------------------------------------------------- the two passes

def distill(pairs, first, second, journal, args):
    """-> traces {pair id: (text, pass)}, failures {pair id: (text, reason)}, counts by reason.
    first, second: teachers as in `ask`; without a second one there is no second pass."""
    system = read_system(args.system_prompt)
    messages = {p.id: chat_messages(p, "instruct", system) for p in pairs}
    traces, failures, why = {}, {}, Counter()
    for turn, teacher, samples in ((1, first, args.samples), (2, second, 1)):
        if teacher is None:
            break
        answers = ask(teacher, {(p.id, turn, k): messages[p.id] for p in pairs for k in range(samples)},
                      journal, args, f"pass {turn}")
        asked, pairs = pairs, []
        for p in asked:
            failures.pop(p.id, None)                       # it gets a second chance
            rows = [answers[p.id, turn, k] for k in range(samples) if (p.id, turn, k) in answers]
            if not rows:
                why[f"pass {turn}: no answer from the teacher"] += 1
                continue
            faults = [fault(r["text"], r["finish"], p.label, told=turn == 2) for r in rows]
            good = [r["text"] for r, f in zip(rows, faults) if not f]
            if good and len(good) >= args.agree * len(rows):
                traces[p.id] = trace_of(good[0]), turn
            elif good:                                     # right, but not often enough: a guess
                failures[p.id] = good[0], "too few of its samples agree"
            else:
                failures[p.id] = rows[0]["text"], faults[0]
                messages[p.id] = hint(messages[p.id], p.label, *failures[p.id])
                pairs.append(p)
            if p.id in failures:
                why[f"pass {turn}: {failures[p.id][1]}"] += 1
    return traces, failures, why


def too_long(traces, args):
    """The length filter: ids whose trace has more than --max-trace tokens (of --tokenizer) or words."""
    if not args.max_trace:
        return set()
    count = lambda text: len(text.split())
    if args.tokenizer:
        import policy
        tokenizer, _ = policy.load_tokenizer(args.tokenizer)
        count = lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    return {i for i, (text, _) in traces.items() if count(text) > args.max_trace}


def write_results(out, pairs, traces, failures, why, journal, args):
    """sft.jsonl, failed.jsonl and the counts; a pair without an answer is in neither file, and an error."""
    write_lines(out / "sft.jsonl", (
        json.dumps(p.row(traces[p.id][0], meta={"pass": traces[p.id][1]}))
        for p in pairs if p.id in traces))
    write_lines(out / "failed.jsonl", (
        json.dumps(p.row(judgment=failures[p.id][0], reason=failures[p.id][1]))
        for p in pairs if p.id in failures))
    rows = journal.answers.values()
    read, written = (sum(r[k] for r in rows) for k in ("prompt_tokens", "tokens"))
    passes = Counter(k for _, k in traces.values())
    print(f"{out}/sft.jsonl: {len(traces)} traces of {len(pairs)} pairs, {passes[1]} from pass 1, "
          f"{passes[2]} from pass 2; {len(failures)} failed\n"
          f"{len(rows)} answers, {read:,} tokens read, {written:,} written"
          + cost(read, written, args.price, ", "))
    for reason, n in why.most_common():
        print(f"  {n:>7,}  {reason}")
    if missing := len(pairs) - len(traces) - len(failures):
        fail(f"{missing} pairs got no answer from a teacher ({journal.failed}); the same command asks again")


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--data", required=True, help="pairs with labels")
    arg("--out", required=True, help="folder for sft.jsonl, failed.jsonl and journal.jsonl")
    arg("--teacher", required=True, help="model of pass 1: a server's name for it, or a folder or hub id")
    flags(ap, "base-url system-prompt at-once seed max-tokens max-len dtype")
    arg("--teacher2", help="model of pass 2; default: that of pass 1. 'none': no second pass")
    arg("--base-url2", help="its server; default: that of pass 1")
    arg("--samples", type=number(int, 1), default=1, help="judgments of pass 1 for each pair")
    arg("--agree", type=number(float, 0, 1), default=0.0, help="least share of them that must be right")
    arg("--max-trace", type=number(int, 1), help="leave out longer traces: tokens of --tokenizer, else words")
    arg("--tokenizer", help="model folder or hub id, to count tokens")
    arg("--temperature", type=number(float, 0), default=1.0, help="of the teachers")
    arg("--price", type=number(float, 0), nargs=2, default=(0, 0),
        help="dollars a million tokens, read and written")
    arg("--dry-run", action="store_true", help="print counts, tokens and estimated cost, and ask nothing")
    arg("--skip-bad", action="store_true", help="report and leave out bad lines instead of stopping")
    args = ap.parse_args()
    pairs = read_pairs(args.data, args.skip_bad)
    if len({p.id for p in pairs}) < len(pairs):
        fail(f"{args.data}: two pairs have the same id, so their answers could be mixed up")
    out = Path(args.out)
    if args.dry_run:
        return dry_run(pairs, out, args)

    def teacher(model, url, key):
        name = model if url else f"{model} in {args.dtype}, window {args.max_len or 'its own'}"
        return name, lambda: asker_of(model, url, args.max_tokens, at_once=args.at_once,
                                      key=os.environ.get(key), max_len=args.max_len, dtype=args.dtype)

    first = teacher(args.teacher, args.base_url, "OPENAI_API_KEY")
    second = None if args.teacher2 == "none" else teacher(
        args.teacher2 or args.teacher, args.base_url2 or args.base_url,
        "OPENAI_API_KEY2" if args.base_url2 else "OPENAI_API_KEY")
    claim(out)
    journal = Journal(out / "journal.jsonl")
    traces, failures, why = distill(pairs, first, second, journal, args)
    for i in too_long(traces, args):
        failures[i] = traces.pop(i)[0], "longer than --max-trace"
        why["filter: longer than --max-trace"] += 1
    write_results(out, pairs, traces, failures, why, journal, args)


def dry_run(pairs, out, args):
    """What a run would ask and cost: prompts are counted by --tokenizer, else at 4 characters a token; a
    judgment is taken to have 800 tokens, and a quarter to need pass 2 (the paper's share)."""
    system = read_system(args.system_prompt)
    count = lambda m: sum(len(x["content"]) for x in m) // 4
    if args.tokenizer:
        import policy
        tokenizer, _ = policy.load_tokenizer(args.tokenizer)
        count = lambda m: len(encode(tokenizer, m))
    from tqdm import tqdm
    prompt = sum(count(chat_messages(p, "instruct", system)) for p in tqdm(pairs, desc="count", leave=False))
    done = len(read_lines(out / "journal.jsonl"))
    read = prompt * args.samples + (prompt + 800 * len(pairs)) // 4
    written = 800 * (len(pairs) * args.samples + len(pairs) // 4)
    print(f"{len(pairs)} pairs: {len(pairs) * args.samples} requests in pass 1, "
          f"about {len(pairs) // 4} in pass 2; {done} answers are in the journal\n"
          f"about {read:,} tokens to read and {written:,} to write"
          + (cost(read, written, args.price, ", ") or "; give --price for the cost"))


if __name__ == "__main__":
    main()
