"""
Preference pairs from where they are to what `distill.py`, `sft.py` and `grpo.py` read.

    python data/prepare.py --out runs/data                      # the published mixture, from the hub
    python data/prepare.py --out runs/data --source skywork=sky.parquet --source code=code.json \\
        --source math=math.jsonl                                # the same from files
    python data/prepare.py --out runs/mine --source my-pairs.jsonl --source team=hh.jsonl
    python data/prepare.py --out runs/hard --source runs/data/rl.jsonl --split 0 --rollouts runs/eval-rl

Writes OUT/distill.jsonl (12 %, for the oracle), OUT/rl.jsonl (the rest), OUT/rejects.jsonl (every row left
out, with its place and the reason), OUT/summary.txt and OUT/card.md. None has its name before all are whole.

The rows have any form that `lib.pairs.pair_of` reads; docs/data.md has a table of them. A row of RM-R1 that has
more to say than the comparison, or whose responses cannot be told apart, is handed on as it is. A tie stays, with
the label "tie": training leaves it out, and says how many.
"""

import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from judge import benchmarks
from lib.chat import encode, load_tokenizer
from lib.files import (
    Failure,
    Flags,
    atomic_write,
    is_hub_name,
    json_text,
    lock_folder,
    number,
    progress_bar,
    read_lines,
    read_rows,
    run_main,
)
from lib.pairs import check_pair, other_label, pair_of
from rubrics import PROTOCOLS, PromptStyle, chat_messages

# The published mixture (RM-R1, appendix F and table 5): the hub id of each source.
PUBLISHED = {
    "math": "xinlai/Math-Step-DPO-10K",
    "code": "Vezora/Code-Preference-Pairs",
    "skywork": "Skywork/Skywork-Reward-Preference-80K-v0.2",
}
# The kind of task that a source holds.
TYPES = {
    "magpie_pro_llama3.1": "reasoning",
    "code": "reasoning",
    "math": "reasoning",
    "offset_bias": "chat",
    "helpsteer2": "chat",
    "magpie_pro": "chat",
    "wildguard": "safety",
}
CODE_ROWS = 8000  # how many rows of the source `code` the published mixture has
CODE_SEED = 42  # of the published shuffle
RESULTS = ("distill.jsonl", "rl.jsonl", "rejects.jsonl", "summary.txt", "card.md")


def arguments():
    parser = Flags(__doc__)
    add = parser.add_argument
    add(
        "--out",
        required=True,
        help="folder for distill.jsonl, rl.jsonl, rejects.jsonl, summary.txt, card.md",
    )
    add(
        "--source",
        action="append",
        default=[],
        help="[NAME=]FILE or hub id, repeatable; default: the published three. Sources that are all named "
        "skywork, code or math are treated as published",
    )
    add("--split", type=number(float, 0, 1), default=0.12, help="share of pairs for the oracle")
    add("--seed", type=number(int, 0), default=0, help="seed of sides and split")
    add("--tokenizer", help="model folder or hub id: lengths in tokens instead of characters")
    add("--max-prompt", type=number(int, 1), help="longest prompt in tokens")
    add("--decontaminate", help="folder with benchmark files: report pairs whose prompt is in one")
    add("--drop-contaminated", action="store_true", help="leave those pairs out")
    add(
        "--rollouts", help="folder of an evaluation of these pairs with --votes: keep by difficulty"
    )
    add(
        "--keep",
        type=number(float, 0, 1),
        nargs=2,
        default=(0.01, 0.99),
        help="lowest and highest share of right rollouts to keep",
    )
    args = parser.parse_args()
    if args.max_prompt and not args.tokenizer:
        raise Failure(f"--max-prompt {args.max_prompt}: counts tokens, so name a --tokenizer")
    if args.keep[0] > args.keep[1]:
        raise Failure(f"--keep {args.keep[0]} {args.keep[1]}: the lowest share comes first")
    if args.keep != parser.get_default("keep") and not args.rollouts:
        raise Failure("--keep: shares of what? name an evaluation with --rollouts")
    if args.drop_contaminated and not args.decontaminate:
        raise Failure(
            "--drop-contaminated: name the folder of benchmark files with --decontaminate"
        )
    for flag, path in (("--decontaminate", args.decontaminate), ("--rollouts", args.rollouts)):
        if path and not Path(path).is_dir():
            raise Failure(f"{flag} {path}: no such folder")
    return args


def main():
    args = arguments()
    out = Path(args.out)
    sources = [named_source(source) for source in args.source] or list(PUBLISHED.items())
    published = all(name in PUBLISHED for name, _ in sources)
    check_overwriting(out, sources)
    lock_folder(out)
    # The card asks the hub, so it asks before the work and not after hours of it.
    origins = [origin_of(name, where) for name, where in sources]

    counts = defaultdict(Counter)  # what: {value: number of rows}
    owed_label = None
    with atomic_write(*(out / name for name in RESULTS)) as files:
        rejects = files[out / "rejects.jsonl"]
        for key, pair, length in usable_pairs(args, sources, published, counts, rejects):
            # The second of every two pairs gets the side that the first did not get, so labels balance. A
            # published prompt keeps its sides.
            if pair.messages is None and pair.label:  # a tie stays as it is
                label = owed_label or first_label(args.seed, key, published)
                owed_label = None if owed_label else other_label(label)
                pair = pair if label == "A" else pair.swapped()
            part = split_of(args, key)
            files[out / f"{part}.jsonl"].write(json_text(pair.row()) + "\n")
            count_pair(counts, part, pair, length)
        if not counts["rows"]:
            raise Failure(nothing_left(sources, counts))
        summary = summarise(args, counts)
        files[out / "summary.txt"].write(summary)
        files[out / "card.md"].write(card(args, origins, published, summary))
    print(summary)


# ---------------------------------------------------------------- sources


def named_source(source):
    """(name, file or hub id) of a --source; without NAME= the file's own name, which may have an = in it."""
    name, equals, where = source.partition("=")
    is_named = equals and not Path(source).exists()
    return (name, where) if is_named else (Path(source).stem, source)


def check_overwriting(out, sources):
    """Raises Failure if a result, or the file it is written as, is one of the sources."""
    for name in RESULTS:
        for path in (out / name, out / f"{name}.tmp"):
            for _, where in sources:
                if path.exists() and Path(where).exists() and path.samefile(where):
                    raise Failure(
                        f"--out {out}: would overwrite its own source {where}; give another folder"
                    )


def origin_of(name, where):
    """A line of the card's table: name, place, sha256 or revision, licence."""
    mark, licence = "unknown", "as its owner gives it"
    if Path(where).is_file():
        with open(where, "rb") as file:
            mark = hashlib.file_digest(file, "sha256").hexdigest()
    elif is_hub_name(where):
        from huggingface_hub import dataset_info

        try:
            info = dataset_info(where)
            mark, licence = info.sha, (info.card_data or {}).get("license", licence)
        except (
            Exception
        ):  # no network, though the rows may be cached: the card is not worth the run
            mark = "unknown, the hub gave no answer"
    return f"| {name} | {where} | {mark} | {licence} |"


def source_rows(name, where, published):
    """Yield (place, row, error) for the rows of one source, as `read_rows` does."""
    rows = published_code_rows(where) if published and name == "code" else read_rows(where)
    for row_number, row, error in rows:
        yield f"{where}:{row_number}", row, error


def published_code_rows(where):
    """The rows of the source `code` that were published: the first 8,000 of `datasets`' shuffle by seed 42."""
    row_count = sum(1 for _ in read_rows(where))
    order = np.random.default_rng(CODE_SEED).permutation(row_count)[:CODE_ROWS].tolist()
    chosen = set(order)
    rows = {place: row for place, row in enumerate(read_rows(where)) if place in chosen}
    return [rows[place] for place in order]


# ---------------------------------------------------------------- from a row to a pair


def usable_pairs(args, sources, published, counts, rejects):
    """Yield (key, pair, length) for every row that can be used.

    counts   gets overlaps with benchmarks, rows with parts that were joined or renamed, and rows left out by
             source and reason
    rejects  an open file that gets the place and the reason of every row left out
    key      bytes: what the pair says, whichever response stands first
    length   of the prompt: tokens, or characters without --tokenizer
    """
    benchmark_hashes = benchmark_grams(args.decontaminate) if args.decontaminate else None
    right_shares = difficulty(args.rollouts) if args.rollouts else None
    length_of = length_function(args.tokenizer)
    keys, ids = set(), set()  # of the pairs so far: memory holds these, not the pairs
    for name, where in sources:
        for place, row, error in progress_bar(
            source_rows(name, where, published), name, unit=" rows"
        ):
            notes = set()
            try:
                if error:
                    raise ValueError(error)
                key, pair = candidate(row, name, published, notes)
                if key in keys:
                    raise ValueError("duplicate")
                if right_shares is not None:
                    check_difficulty(pair, right_shares, args.keep)
                if benchmark_hashes is not None:
                    check_overlap(pair, benchmark_hashes, counts["overlap"], args.drop_contaminated)
                length = length_of(pair)
                if args.max_prompt and length > args.max_prompt:
                    raise ValueError(f"overlong: {length} tokens")
            # Readers raise ValueError for a row that is not what it should be. Any other exception is a slip
            # in a reader, and must not look like a bad row.
            except ValueError as unusable:
                reason = str(unusable)
                counts["left out"][name, reason.split(":")[0]] += 1
                line = {"place": place, "source": name, "reason": reason}
                rejects.write(json_text(line) + "\n")
                continue
            keys.add(key)
            if (
                pair.id in ids
            ):  # two sources count their rows alike, and eval.py tells pairs by their ids
                pair = replace(pair, id=f"{pair.id}-{key.hex()[:8]}")
            ids.add(pair.id)
            counts["joined or renamed"].update((name, note) for note in notes)
            yield key, pair, length


def length_function(tokenizer_name):
    """A function of a pair: its prompt's length in tokens, or in characters without a tokenizer."""
    if tokenizer_name is None:
        return lambda pair: len(json.dumps(pair.messages or [pair.context, pair.a, pair.b]))
    tokenizer, _ = load_tokenizer(tokenizer_name)
    return lambda pair: len(encode(tokenizer, chat_messages(pair)))


def candidate(row, name, published, notes):
    """(key, pair) of a row, whose preferred response is A unless it is a published prompt.

    name   the source's; a row that names its own has that one
    notes  a set that gets what was joined or renamed

    Raises ValueError for a row of no use.
    """
    if published and row.get("source") == "magpie_ultra":
        raise ValueError("magpie_ultra, dropped as published")
    pair = pair_of(row, "", notes)
    can_be_written_anew = pair.messages is None or says_no_more(pair)
    if pair.a and can_be_written_anew:
        pair = pair.swapped() if pair.label == "B" else pair
        # A prompt is written anew, and a trace would name the sides of the old one.
        if pair.messages or pair.trace or pair.meta:
            meta = {name: pair.meta[name] for name in ("answer", "strength") if name in pair.meta}
            pair = replace(pair, messages=None, trace=None, meta=meta)
            check_pair(pair)
        said = [pair.context, *sorted((pair.a, pair.b))]
    else:
        said = [pair.messages, "", ""]
    if pair.criteria:  # the same pair under other criteria is another one
        said.append(pair.criteria)
    key = hashlib.sha256(json.dumps(said).encode()).digest()
    source = pair.source or name
    return key, replace(
        pair,
        id=pair.id or key.hex()[:16],
        source=source,
        type=pair.type or TYPES.get(source, ""),
    )


def says_no_more(pair):
    """Is a published prompt nothing but the comparison, alone or with instructions of ours?

    Other instructions, earlier turns and text around the comparison would be lost if it were written anew.
    """
    unpublished = replace(pair, messages=None)
    ours = [chat_messages(unpublished, PromptStyle(protocol)) for protocol in PROTOCOLS]
    comparison_alone = ours[0][1:]
    return pair.messages in [comparison_alone, *ours]


# ---------------------------------------------------------------- benchmarks and difficulty


def grams(context):
    """Hashes of a prompt's words, of the user's messages only. -> whole prompt, {whole, every 13 words}

    The hashes are Python's own, so they mean nothing outside of this process.
    """
    contents = [message["content"] for message in context if message["role"] == "user"]
    words = re.findall(r"\w+", " ".join(contents).lower())
    whole = hash(
        (None, *words)
    )  # None: a prompt of 13 words differs from the same words inside another
    runs = {hash(tuple(words[start : start + 13])) for start in range(len(words) - 12)}
    return whole, {whole, *runs}


def benchmark_grams(folder):
    """`grams` of all prompts in the benchmarks' files in a folder."""
    hashes = set()
    for name, bench in benchmarks.BENCHES.items():
        for path in benchmarks.files_of(folder, name):
            rows, _ = benchmarks.parse_rows(bench, path, read_rows(path))
            for row in rows:
                hashes |= grams(row.context)[1]
    if not hashes:
        raise Failure(f"--decontaminate {folder}: no benchmark files in it")
    return hashes


def check_overlap(pair, benchmark_hashes, overlaps, drop):
    """Count a pair whose prompt shares words with a benchmark. With `drop`, raise ValueError for it."""
    whole, hashes = grams(pair.messages or pair.context)
    if benchmark_hashes.isdisjoint(hashes):
        return
    overlap = "exact" if whole in benchmark_hashes else "13-gram"
    overlaps[overlap] += 1
    if drop:
        raise ValueError(f"in a benchmark: {overlap}")


def difficulty(run):
    """{pair id: share of its judgments that are right} of an evaluation with votes."""
    pairs = read_lines(Path(run) / "pairs.jsonl", {"id": str, "item": str})
    verdict = (str, type(None))
    fields = {"id": str, "verdict": verdict, "label": verdict}
    judgments = read_lines(Path(run) / "judgments.jsonl", fields)
    right = defaultdict(list)
    items = {pair["id"]: pair["item"] for pair in pairs}
    for line in judgments:
        if line["id"] not in items:
            raise Failure(f"--rollouts {run}: its judgments are not those of its pairs")
        right[items[line["id"]]].append(line["verdict"] == line["label"])
    if not right:
        raise Failure(
            f"--rollouts {run}: no judgments.jsonl in it; name the --out of an evaluation that has ended"
        )
    return {item: sum(results) / len(results) for item, results in right.items()}


def check_difficulty(pair, right_shares, keep):
    """Raises ValueError for a pair that is too easy, too hard, or was not judged."""
    share = right_shares.get(pair.id)
    if share is None:
        raise ValueError("difficulty unknown: no rollouts")
    if not keep[0] <= share <= keep[1]:
        raise ValueError(f"difficulty: {share:.2f} of its rollouts are right")


# ---------------------------------------------------------------- sides and split


def content_hash(seed, purpose, key):
    return hashlib.sha256(f"{seed}/{purpose}/".encode() + key).digest()


def first_label(seed, key, published):
    """The label of the first of two pairs: A as published, where sides alternate, else a hash of the content.

    A label that is a hash cannot be foretold from the place of its row.
    """
    return "A" if published else "AB"[content_hash(seed, "side", key)[0] % 2]


def split_of(args, key):
    """The file of a pair, by a hash of its content, so that it stays there when rows are added around it."""
    fraction = int.from_bytes(content_hash(args.seed, "split", key)[:8]) / 2**64
    return "distill" if fraction < args.split else "rl"


# ---------------------------------------------------------------- summary and card


def count_pair(counts, part, pair, length):
    turns = "published prompt" if pair.messages else "multi" if len(pair.context) > 1 else "single"
    counts["rows"][part] += 1
    counts["source"][pair.source] += 1
    counts["type"][pair.type or "unknown"] += 1
    counts["turns"][turns] += 1
    counts["label"][pair.label or "tie"] += 1
    counts["length"][length // 64] += 1


def nothing_left(sources, counts):
    """The sentence for a run without a usable row."""
    sentence = f"{', '.join(where for _, where in sources)}: no pair is left"
    for (_, reason), _ in counts["left out"].most_common(1):
        sentence += f"; most often: {reason}"
    return sentence


def summarise(args, counts):
    """The summary as text: pairs by part, source, type, turns and label; lengths; rows left out, and why."""
    total = counts["rows"].total()
    lines = [f"{total:,} pairs"]
    for what in ("rows", "source", "type", "turns", "label"):
        for value, rows in sorted(counts[what].items()):
            lines.append(f"  {what:<8}{value:<43}{rows:>9,}{rows / total:>8.1%}")

    lengths = list(counts["length"].elements())
    quantiles = np.quantile(lengths, (0.5, 0.95, 1), method="inverted_cdf")
    median, most, longest = 64 * quantiles
    unit = "tokens" if args.tokenizer else "characters"
    lines.append(
        f"  length  median {median:,}, 95 % below {most + 64:,}, longest about {longest:,} "
        f"{unit} (prompt with both responses)"
    )
    if args.decontaminate:
        exact, partial = counts["overlap"]["exact"], counts["overlap"]["13-gram"]
        lines.append(
            f"  in a benchmark: {exact:,} prompts word for word, {partial:,} share 13 words"
        )
    for (source, note), rows in sorted(counts["joined or renamed"].items()):
        lines.append(f"  {source + ': ' + note:<51}{rows:>9,}")
    lines.append(f"{counts['left out'].total():,} rows left out")
    for (source, reason), rows in sorted(counts["left out"].items()):
        lines.append(f"  {source + ': ' + reason:<51}{rows:>9,}")
    return "\n".join(lines) + "\n"


def card(args, origins, published, summary):
    """The data card: where rows come from, how they were made, under which terms."""
    sides = "alternating, as published" if published else "balanced, dealt by a hash"
    command = " ".join(["python data/prepare.py", *sys.argv[1:]])
    return "\n".join(
        [
            "# Data card",
            "",
            "Preference pairs for a reasoning reward model, written by `data/prepare.py`.",
            "",
            "| source | from | sha256 or revision | licence |",
            "|---|---|---|---|",
            *origins,
            "",
            f"Sides: {sides}. "
            f"Split: {args.split:.0%} to distill.jsonl by a hash of seed {args.seed} and the content. "
            f"Command line: `{command}`.",
            "",
            "```",
            summary.rstrip(),
            "```",
            "",
        ]
    )


if __name__ == "__main__":
    run_main(main)
