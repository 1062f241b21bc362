"""
Preference pairs from where they are to what `distill.py`, `sft.py` and `grpo.py` read.

    python data/prepare.py --out runs/data                      # the published mixture, from the hub
    python data/prepare.py --out runs/data --source skywork=sky.parquet --source code=code.json \\
        --source math=math.jsonl                                # the same from files
    python data/prepare.py --out runs/mine --source my-pairs.jsonl --source team=hh.jsonl
    python data/prepare.py --out runs/hard --source runs/data/rl.jsonl --split 0 --rollouts runs/eval-rl

Writes OUT/distill.jsonl (12 %, for the oracle), OUT/rl.jsonl (the rest), OUT/rejects.jsonl (every row left
out, with its place and the reason), OUT/summary.txt and OUT/card.md; none has its name before all are whole.

A row of any known form becomes two conversations, the preferred one and the other. What they share is the
context; what follows are the two responses. The forms, told by their fields:

    chosen, rejected      two conversations as messages (Skywork), two answers to a prompt (UltraFeedback),
                          two transcripts "\\n\\nHuman: ..." (HH), two turns after `conversations` (ShareGPT)
    input, accepted, rejected                                   code (Code-Preference-Pairs)
    prompt, initial_reason_steps, full_chosen, full_rejected    math (Math-Step-DPO)
    context or prompt, a, b, label                              ours
    context_messages, winner                                    RM-R1's; where its responses cannot be told
                                                                apart, the row is handed on as it is
"""
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import benchmarks
from files import Flags, beside, claim, fail, json_object, number, read_lines, rows_of
from rubrics import Pair, about, chat_messages, encode, messages_of, other, pair_of, text_of

# The published mixture (RM-R1, appendix F and table 5): hub id, and what kind of task a source holds.
PUBLISHED = {"math": "xinlai/Math-Step-DPO-10K", "code": "Vezora/Code-Preference-Pairs",
             "skywork": "Skywork/Skywork-Reward-Preference-80K-v0.2"}
TYPES = {"magpie_pro_llama3.1": "reasoning", "code": "reasoning", "math": "reasoning", "offset_bias": "chat",
         "helpsteer2": "chat", "magpie_pro": "chat", "wildguard": "safety"}
CODE_ROWS = 8000
WRITES = ("distill.jsonl", "rl.jsonl", "rejects.jsonl", "summary.txt", "card.md")


# ---------------------------------------------------------------- rows to two conversations

ROLES = {"human": "user", "Human": "user", "gpt": "assistant", "Assistant": "assistant"}


def conversations(row):
    """(preferred messages, other messages) of a row in any known form; ValueError says what is wrong."""
    if "full_chosen" in row:
        context, start = messages_of(row["prompt"]), row.get("initial_reason_steps", "")
        said = [start + row.get(k, "") for k in ("full_chosen", "full_rejected")]
    elif "accepted" in row:
        context, said = messages_of(row["input"]), [text_of(row, k) for k in ("accepted", "rejected")]
    elif "conversations" in row:
        turn = lambda t: {"role": ROLES.get(t["from"], t["from"]), "content": t["value"]}
        start = [turn(t) for t in row["conversations"]]
        return tuple(start + [turn(row[k])] for k in ("chosen", "rejected"))
    elif "chosen" in row and "rejected" in row:
        both = row["chosen"], row["rejected"]
        if all(isinstance(x, str) and "\n\nHuman:" in x for x in both):
            return tuple(map(transcript, both))
        if all(isinstance(x, list) and len(x) > 1 for x in both):  # whole conversations, prompt included
            return tuple([{"role": m["role"], "content": m["content"]} for m in x] for x in both)
        context = messages_of(row.get("context", row.get("prompt")))
        said = [text_of(row, k) for k in ("chosen", "rejected")]
    else:
        pair = pair_of(row, "")
        context, said = pair.context, [pair.a, pair.b] if pair.label == "A" else [pair.b, pair.a]
    return tuple([*context, {"role": "assistant", "content": x}] for x in said)


def transcript(text):
    """Messages of an HH transcript."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    return [{"role": ROLES[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]


def split_turns(chosen, rejected):
    """(context, preferred response, other response): the context is what both share, up to a user's message.
    Where they part earlier than at the last turn, a response holds all of the turns that follow."""
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    while n and chosen[n - 1]["role"] != "user":
        n -= 1
    if not n:
        raise ValueError("the conversations do not begin alike")
    if not all(isinstance(m.get("content"), str) for m in (*chosen, *rejected)):
        raise ValueError("a message is not a text")
    rest = []
    for part in (chosen[n:], rejected[n:]):
        if not part or part[-1]["role"] != "assistant":
            raise ValueError("a conversation does not end with a response")
        rest.append(part[0]["content"] if len(part) == 1 else "\n".join(
            ("User: " if m["role"] == "user" else "Assistant: ") + m["content"] for m in part))
    return chosen[:n], *rest


# ---------------------------------------------------------------- where rows come from

def source_rows(name, where, published):
    """(place, row) of one source. Code is cut as published: shuffled with seed 42, the first 8,000."""
    rows = ((f"{where}:{n}", row) for n, row in rows_of(where))
    if published and name == "code":
        count = sum(1 for _ in rows_of(where))
        order = np.random.default_rng(42).permutation(count)[:CODE_ROWS].tolist()   # as `datasets` shuffles
        drawn = set(order)
        kept = {at: row for at, row in enumerate(rows) if at in drawn}
        rows = (kept[at] for at in order)
    return rows


def grams(context):
    """Hashes of a prompt (its user messages) as a whole and of every run of 13 words in it; they mean nothing
    outside of this process. -> whole, {whole, run, ...}"""
    words = re.findall(r"\w+", " ".join(m["content"] for m in context if m["role"] == "user").lower())
    whole = hash((None, *words))                                    # None: not to be taken for a run
    return whole, {whole, *(hash(tuple(words[at:at + 13])) for at in range(len(words) - 12))}


def benchmark_grams(folder):
    """`grams` of all prompts of the benchmarks' files in a folder."""
    known = set()
    for name, bench in benchmarks.BENCHES.items():
        for path in benchmarks.files_of(folder, name):
            for row in benchmarks.understood(bench, path, rows_of(path))[0]:
                known |= grams(row.context)[1]
    if not known:
        fail(f"--decontaminate {folder}: no benchmark files in it")
    return known


def difficulty(run):
    """{pair id: share of its judgments that are right} of an evaluation with votes."""
    right = defaultdict(list)
    pairs, judgments = (read_lines(Path(run) / name) for name in ("pairs.jsonl", "judgments.jsonl"))
    try:
        names = {p["id"]: p["item"] for p in pairs}
        for line in judgments:
            right[names[line["id"]]].append(line["verdict"] == line["label"])
    except (KeyError, TypeError):
        fail(f"--rollouts {run}: its judgments are not those of its pairs")
    if not right:
        fail(f"--rollouts {run}: no judgments.jsonl in it; name the --out of an evaluation that has ended")
    return {item: sum(some) / len(some) for item, some in right.items()}


# ---------------------------------------------------------------- the work

def candidate(row, name, published):
    """(key, pair) of a source's row; ValueError says why it cannot be used. The key is what the pair is,
    whichever response stands first; A is the preferred one, unless the pair is a finished prompt."""
    row = json_object(row)
    if published and row.get("source") == "magpie_ultra":
        raise ValueError("magpie_ultra, dropped as published")
    if "context_messages" in row and not (pair := pair_of(row, "")).a:
        context, good, bad = pair.messages, "", ""
    else:
        context, good, bad = split_turns(*conversations(row))
        if not good.strip() or not bad.strip():
            raise ValueError("empty response")
        if good == bad:
            raise ValueError("equal responses")
        pair = Pair(context=context, a=good, b=bad, label="A", **about(row, ""))
    key = hashlib.sha256(json.dumps([context, *sorted((good, bad))]).encode()).digest()
    source = pair.source or name
    return key, replace(pair, id=pair.id or key.hex()[:16], source=source,
                        type=pair.type or TYPES.get(source, ""))


def gate(args, overlaps):
    """A function that raises ValueError where --rollouts or --decontaminate leave a pair out, and counts
    overlaps with benchmarks."""
    known = benchmark_grams(args.decontaminate) if args.decontaminate else None
    shares = difficulty(args.rollouts) if args.rollouts else None

    def check(pair):
        if shares is not None and pair.id not in shares:
            raise ValueError("difficulty unknown: no rollouts")
        if shares is not None and not args.keep[0] <= shares[pair.id] <= args.keep[1]:
            raise ValueError(f"difficulty: {shares[pair.id]:.2f} of its rollouts are right")
        if args.decontaminate:
            whole, some = grams(pair.messages or pair.context)
            if not known.isdisjoint(some):
                overlap = "exact" if whole in known else "13-gram"
                overlaps[overlap] += 1
                if args.drop_contaminated:
                    raise ValueError(f"in a benchmark: {overlap}")
    return check


def usable(args, sources, published, counts, left_out):
    """(key, pair, length) of every row that can be used; of the others place and reason go to the open file
    `left_out`. Length: tokens of the prompt, or characters without a tokenizer."""
    check, seen = gate(args, counts["overlap"]), set()
    length = lambda pair: len(json.dumps(pair.messages or [pair.context, pair.a, pair.b]))
    if args.tokenizer:
        import policy
        tokenizer, _ = policy.load_tokenizer(args.tokenizer)
        length = lambda pair: len(encode(tokenizer, chat_messages(pair)))
    for name, where in sources:
        for place, row in tqdm(source_rows(name, where, published), desc=name, unit=" rows"):
            try:
                key, pair = candidate(row, name, published)
                if key in seen:
                    raise ValueError("duplicate")
                check(pair)
                size = length(pair)
                if args.max_prompt and size > args.max_prompt:
                    raise ValueError(f"overlong: {size} tokens")
            except (ValueError, TypeError, AttributeError, KeyError) as e:
                reason = str(e) if isinstance(e, ValueError) else f"wrong schema: {type(e).__name__} {e}"
                counts["left out"][name, reason.split(":")[0]] += 1
                left_out.write(json.dumps({"place": place, "source": name, "reason": reason}) + "\n")
                continue
            seen.add(key)
            yield key, pair, size


def prepare(args):
    sources = [s.split("=", 1) if "=" in s else (Path(s).stem, s) for s in args.source]
    sources = sources or list(PUBLISHED.items())
    published = {name for name, _ in sources} <= set(PUBLISHED)
    out, counts, owed = Path(args.out), defaultdict(Counter), None
    for path in (out / f"{name}{end}" for name in WRITES for end in ("", ".tmp")):
        for _, where in sources:
            if path.exists() and Path(where).exists() and path.samefile(where):
                fail(f"--out {out}: would overwrite its own source {where}; give another folder")
    claim(out)
    drawn = lambda what, key: hashlib.sha256(f"{args.seed}/{what}/".encode() + key).digest()
    with beside(*(out / name for name in WRITES)) as files:
        rows = usable(args, sources, published, counts, left_out=files[out / "rejects.jsonl"])
        for key, pair, size in rows:
            # As published, sides alternate. Else the first of every two pairs is dealt by a hash of its
            # content and the second gets the other side: labels balance, and cannot be foretold.
            if pair.messages is None:
                label = owed or ("A" if published else "AB"[drawn("side", key)[0] % 2])
                owed = None if owed else other(label)
                pair = pair if label == "A" else pair.swapped()
            # By content, so that a pair stays on its side of the split when rows are added around it.
            part = "distill" if int.from_bytes(drawn("split", key)[:8]) / 2**64 < args.split else "rl"
            files[out / f"{part}.jsonl"].write(json.dumps(pair.row()) + "\n")
            turns = "finished" if pair.messages else "multi" if len(pair.context) > 1 else "single"
            for what, value in (("rows", part), ("source", pair.source), ("turns", turns),
                                ("type", pair.type or "unknown"), ("label", pair.label),
                                ("length", size // 64)):
                counts[what][value] += 1
        if not counts["rows"]:
            fail(f"{', '.join(where for _, where in sources)}: no pair is left" + "".join(
                f"; most often: {reason}" for (_, reason), _ in counts["left out"].most_common(1)))
        summary = summarise(args, counts)
        files[out / "summary.txt"].write(summary)
        files[out / "card.md"].write(card(args, sources, published, summary))
    print(summary)


def summarise(args, counts):
    """The summary as text: pairs by part, source, type, turns and label; lengths; rows left out, and why."""
    total = counts["rows"].total()
    lines = [f"{total:,} pairs"]
    for what in ("rows", "source", "type", "turns", "label"):
        lines += [f"  {what:<8}{value:<43}{n:>9,}{n / total:>8.1%}"
                  for value, n in sorted(counts[what].items())]
    sizes = list(counts["length"].elements())
    median, most, longest = 64 * np.quantile(sizes, (.5, .95, 1), method="inverted_cdf")
    lines.append(f"  length  median {median:,}, 95 % below {most + 64:,}, longest about {longest:,} "
                 f"{'tokens' if args.tokenizer else 'characters'} (prompt with both responses)")
    if args.decontaminate:
        lines.append(f"  in a benchmark: {counts['overlap']['exact']:,} prompts word for word, "
                     f"{counts['overlap']['13-gram']:,} share 13 words")
    lines.append(f"{counts['left out'].total():,} rows left out")
    lines += [f"  {source + ': ' + reason:<51}{n:>9,}"
              for (source, reason), n in sorted(counts["left out"].items())]
    return "\n".join(lines) + "\n"


def card(args, sources, published, summary):
    """The data card: where rows come from, how they were made, under which terms."""
    lines = ["# Data card", "",
             "Preference pairs for a reasoning reward model, written by `data/prepare.py`.", "",
             "| source | from | sha256 or revision | licence |", "|---|---|---|---|"]
    for name, where in sources:
        path, licence = Path(where), "as its owner gives it"
        if path.is_file():
            mark = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
        else:
            from huggingface_hub import dataset_info
            info = dataset_info(where)
            mark, licence = info.sha, (info.card_data or {}).get("license", licence)
        lines.append(f"| {name} | {where} | {mark} | {licence} |")
    lines += ["", f"Sides: {'alternating, as published' if published else 'balanced, dealt by a hash'}. "
              f"Split: {args.split:.0%} to distill.jsonl by a hash of seed {args.seed} and the content. "
              "Command line: `" + " ".join(["python data/prepare.py", *sys.argv[1:]]) + "`.",
              "", "```", summary.rstrip(), "```", ""]
    return "\n".join(lines)


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--out", required=True,
        help="folder for distill.jsonl, rl.jsonl, rejects.jsonl, summary.txt, card.md")
    arg("--source", action="append", default=[],
        help="[NAME=]FILE or hub id, repeatable; default: the published three. Named skywork, code and math "
             "only, they are treated as published")
    arg("--split", type=number(float, 0, 1), default=0.12, help="share of pairs for the oracle")
    arg("--seed", type=number(int, 0), default=0, help="of sides and split")
    arg("--tokenizer", help="model folder or hub id: lengths in tokens instead of characters")
    arg("--max-prompt", type=number(int, 1), help="longest prompt in tokens")
    arg("--decontaminate", help="folder with benchmark files: report pairs whose prompt is in one")
    arg("--drop-contaminated", action="store_true", help="and leave them out")
    arg("--rollouts", help="folder of an evaluation of these pairs with --votes: keep by difficulty")
    arg("--keep", type=number(float, 0, 1), nargs=2, default=(0.01, 0.99),
        help="lowest and highest share of right rollouts to keep")
    args = ap.parse_args()
    if args.max_prompt and not args.tokenizer:
        fail(f"--max-prompt {args.max_prompt}: counts tokens, so name a --tokenizer")
    if args.keep[0] > args.keep[1]:
        fail(f"--keep {args.keep[0]} {args.keep[1]}: the lowest share comes first")
    if args.keep != ap.get_default("keep") and not args.rollouts:
        fail("--keep: shares of what? name an evaluation with --rollouts")
    if args.drop_contaminated and not args.decontaminate:
        fail("--drop-contaminated: name the folder of benchmark files with --decontaminate")
    for flag, path in (("--decontaminate", args.decontaminate), ("--rollouts", args.rollouts)):
        if path and not Path(path).is_dir():
            fail(f"{flag} {path}: no such folder")
    prepare(args)


if __name__ == "__main__":
    main()
