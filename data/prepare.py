"""
Preference pairs from where they are to what `distill.py`, `sft.py` and `grpo.py` read.

    python data/prepare.py --out runs/data                      # the published mixture, from the hub
    python data/prepare.py --out runs/data --source skywork=sky.parquet --source code=code.json \\
        --source math=math.jsonl                                # the same from files
    python data/prepare.py --out runs/mine --source my-pairs.jsonl --source team=hh.jsonl
    python data/prepare.py --out runs/hard --source runs/data/rl.jsonl --split 0 --rollouts runs/eval-rl

Writes OUT/distill.jsonl (12 %, for the oracle), OUT/rl.jsonl (the rest), OUT/rejects.jsonl (every row left
out, with its place and the reason), OUT/summary.txt and OUT/card.md. None has its name before all are whole.

A row of any known form becomes two conversations, the preferred one and the other. What they share is the
context; what follows are the two responses. The fields of a row tell its form:

    chosen, rejected      two conversations as messages (Skywork), two answers to a prompt (UltraFeedback),
                          two transcripts "\\n\\nHuman: ..." (HH), two turns after `conversations` (ShareGPT)
    input, accepted, rejected                                   code (Code-Preference-Pairs)
    prompt, initial_reason_steps, full_chosen, full_rejected    math (Math-Step-DPO)
    context or prompt, a, b, label                              ours
    context_messages, winner                                    RM-R1's; a row whose responses cannot be told
                                                                apart is handed on as it is
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
from judge import benchmarks
from lib.chat import encode, load_tokenizer
from lib.files import (
    Failure,
    Flags,
    atomic_write,
    is_hub_name,
    lock_folder,
    number,
    read_lines,
    read_rows,
    run_main,
)
from lib.pairs import (
    Pair,
    field_text,
    id_and_origin,
    is_message,
    messages_of,
    other_label,
    pair_of,
)
from rubrics import chat_messages

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
ROLES = {"human": "user", "Human": "user", "gpt": "assistant", "Assistant": "assistant"}
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
            if pair.messages is None:
                label = owed_label or first_label(args.seed, key, published)
                owed_label = None if owed_label else other_label(label)
                pair = pair if label == "A" else pair.swapped()
            part = split_of(args, key)
            files[out / f"{part}.jsonl"].write(json.dumps(pair.row()) + "\n")
            count_pair(counts, part, pair, length)
        if not counts["rows"]:
            raise Failure(nothing_left(sources, counts))
        summary = summarise(args, counts)
        files[out / "summary.txt"].write(summary)
        files[out / "card.md"].write(card(args, origins, published, summary))
    print(summary)


# ---------------------------------------------------------------- sources


def named_source(source):
    """(name, file or hub id) of a --source; without NAME= the file's own name."""
    name, equals, where = source.partition("=")
    return (name, where) if equals else (Path(source).stem, source)


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

    counts   gets overlaps with benchmarks, and rows left out by source and reason
    rejects  an open file that gets the place and the reason of every row left out
    key      bytes: what the pair says, whichever response stands first
    length   of the prompt: tokens, or characters without --tokenizer
    """
    benchmark_hashes = benchmark_grams(args.decontaminate) if args.decontaminate else None
    right_shares = difficulty(args.rollouts) if args.rollouts else None
    length_of = length_function(args.tokenizer)
    keys = set()  # of the pairs so far: memory holds these, not the pairs
    for name, where in sources:
        for place, row, error in tqdm(source_rows(name, where, published), desc=name, unit=" rows"):
            try:
                if error:
                    raise ValueError(error)
                key, pair = candidate(row, name, published)
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
                rejects.write(json.dumps(line) + "\n")
                continue
            keys.add(key)
            yield key, pair, length


def length_function(tokenizer_name):
    """A function of a pair: its prompt's length in tokens, or in characters without a tokenizer."""
    if tokenizer_name is None:
        return lambda pair: len(json.dumps(pair.messages or [pair.context, pair.a, pair.b]))
    tokenizer, _ = load_tokenizer(tokenizer_name)
    return lambda pair: len(encode(tokenizer, chat_messages(pair)))


def candidate(row, name, published):
    """(key, pair) of a row, whose preferred response is A unless it is a published prompt.

    name  the source's; a row that names its own has that one. Raises ValueError for a row of no use.
    """
    if published and row.get("source") == "magpie_ultra":
        raise ValueError("magpie_ultra, dropped as published")
    prompt_pair = pair_of(row, "") if "context_messages" in row else None
    if prompt_pair and not prompt_pair.a:
        pair, said = prompt_pair, [prompt_pair.messages, "", ""]
    else:
        context, preferred, rejected = split_turns(*conversations(row))
        if not preferred.strip() or not rejected.strip():
            raise ValueError("empty response")
        if preferred == rejected:
            raise ValueError("equal responses")
        fields = id_and_origin(row, "")
        del fields["meta"]  # what it says of A and B would name the wrong sides
        pair = Pair(context=context, a=preferred, b=rejected, label="A", **fields)
        said = [context, *sorted((preferred, rejected))]
    key = hashlib.sha256(json.dumps(said).encode()).digest()
    source = pair.source or name
    return key, replace(
        pair,
        id=pair.id or key.hex()[:16],
        source=source,
        type=pair.type or TYPES.get(source, ""),
    )


def conversations(row):
    """(preferred messages, other messages) of a row in any known form. Raises ValueError."""
    if "full_chosen" in row:  # Math-Step-DPO
        context = messages_of(row.get("prompt"))
        start = optional_text(row, "initial_reason_steps")
        responses = [start + optional_text(row, name) for name in ("full_chosen", "full_rejected")]
    elif "accepted" in row:  # Code-Preference-Pairs
        context = messages_of(row.get("input"))
        responses = [field_text(row, name) for name in ("accepted", "rejected")]
    elif "conversations" in row:
        return sharegpt_conversations(row)
    elif "chosen" in row and "rejected" in row:
        return preferred_conversations(row)
    else:
        pair = pair_of(row, "")
        context = pair.context
        responses = [pair.a, pair.b] if pair.label == "A" else [pair.b, pair.a]
    return with_responses(context, responses)


def with_responses(context, responses):
    return tuple([*context, {"role": "assistant", "content": text}] for text in responses)


def preferred_conversations(row):
    """`conversations` of a row with `chosen` and `rejected`."""
    both = [row["chosen"], row["rejected"]]
    if all(isinstance(value, str) and "\n\nHuman:" in value for value in both):  # HH
        return tuple(transcript(text) for text in both)
    if all(isinstance(value, list) and len(value) > 1 for value in both):  # the prompt is in them
        if not all(map(is_message, both[0] + both[1])):
            raise ValueError("a message is not {role, content}")
        return tuple(
            [{"role": m["role"], "content": m["content"]} for m in value] for value in both
        )
    context = messages_of(row.get("context", row.get("prompt")))
    return with_responses(context, [field_text(row, name) for name in ("chosen", "rejected")])


def transcript(text):
    """The messages of an HH transcript."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    speakers, contents = parts[1::2], parts[2::2]
    return [
        {"role": ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(speakers, contents)
    ]


def sharegpt_conversations(row):
    """`conversations` of a row whose turns are {"from", "value"}."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise ValueError("conversations is not a list")
    context = [sharegpt_message(turn) for turn in turns]
    return tuple([*context, sharegpt_message(row.get(name))] for name in ("chosen", "rejected"))


def sharegpt_message(turn):
    if not isinstance(turn, dict):
        raise ValueError("a turn is not {from, value}")
    speaker, content = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or not isinstance(content, str):
        raise ValueError("a turn is not {from, value}")
    return {"role": ROLES.get(speaker, speaker), "content": content}


def optional_text(row, name):
    """A row's field, "" without it. Raises ValueError if it is no text."""
    text = row.get(name, "")
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a text")
    return text


def split_turns(chosen, rejected):
    """(context, preferred response, other response) of two conversations.

    The context is what both share, up to a message of the user. Where the conversations part earlier than at
    the last turn, a response holds all of the turns that follow.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise ValueError("the conversations do not begin alike")
    return chosen[:shared], turns_text(chosen[shared:]), turns_text(rejected[shared:])


def turns_text(turns):
    """One turn of the assistant as it is; several turns with their speakers. Raises ValueError."""
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("a conversation does not end with a response")
    if len(turns) == 1:
        return turns[0]["content"]
    lines = []
    for message in turns:
        speaker = "User" if message["role"] == "user" else "Assistant"
        lines.append(f"{speaker}: {message['content']}")
    return "\n".join(lines)


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
    pairs = read_lines(Path(run) / "pairs.jsonl")
    judgments = read_lines(Path(run) / "judgments.jsonl")
    right = defaultdict(list)
    try:
        items = {pair["id"]: pair["item"] for pair in pairs}
        for line in judgments:
            right[items[line["id"]]].append(line["verdict"] == line["label"])
    except (KeyError, TypeError):  # files of something else
        raise Failure(f"--rollouts {run}: its judgments are not those of its pairs")
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
    counts["label"][pair.label] += 1
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
