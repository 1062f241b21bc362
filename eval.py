"""
How good a judge is: asks it about benchmarks or any file of pairs, and keeps every judgment.

    torchrun --nproc_per_node 8 eval.py --model runs/grpo/model --bench all --out DIR
    python eval.py --model MODEL --protocol instruct --bench rm-bench,rmb --data-dir files --out DIR
    python eval.py --model MODEL --data pairs.jsonl --both-orders --temperature 1 --votes 5 --out DIR
    python eval.py --model NAME --base-url http://localhost:8000/v1 --protocol instruct --bench all --out DIR
    python eval.py --model Skywork/Skywork-Reward-Llama-3.1-8B-v0.2 --scalar --bench rewardbench --out DIR
    python eval.py report DIR1 DIR2 ...                             # this and compare: see report.py

Writes DIR/pairs.jsonl (what was asked), DIR/judgments.jsonl (one line a judgment, as it comes),
DIR/left_out.jsonl and DIR/config.json; report.py computes every number from them. Killed and started again
with the same command, it judges what is still missing or has changed since.
"""
import errno
import hashlib
import json
import os
import random
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import benchmarks as B
from askers import Answer, Scalar, asker_of, flags, judged, without_user
from engine import check_tp, seed_of
from files import Flags, claim, digest, fail, fingerprint, number, read_lines, read_object, write_lines
from report import COMMANDS, as_text, key_of, lines_of, measure, read_run
from rubrics import chat_messages, prompt_form, read_pairs, verbatim


# ---------------------------------------------------------------- what to ask

def collect(args):
    """-> {pair id: pair}, [what was left out], [where it came from]. A pair's meta says which benchmark or
    file it is of, and whether its better response is B (`swap`): of a benchmark's pair, a hash of (seed, id)
    decides that; a file's pairs are shown as they are."""
    asked, left_out, origin = {}, [], []
    for name in args.bench:
        pairs, bad, where = B.load(name, args.data_dir, args.limit, args.seed)
        origin += where
        left_out += bad
        for p in pairs:
            swap = hashlib.sha256(f"{args.seed}/{p.id}".encode()).digest()[0] % 2 == 1
            p = p.swapped() if swap else p
            asked[p.id] = replace(p, meta=p.meta | {"swap": swap})
    for path in args.data:
        origin.append(path)
        for p in pairs_of(path, args):
            if p.id in asked:
                fail(f"{path}: two pairs have the id {p.meta['item']}")
            asked[p.id] = p
    return asked, left_out, origin


def pairs_of(path, args):
    """A file's pairs as `collect` gives them."""
    name = Path(path).stem
    name += " pairs" if name in B.BENCHES else ""                # which would be scored as the benchmark
    pairs = read_pairs(path, args.skip_bad, args.both_orders)
    if args.limit:
        drawn = random.Random(args.seed).sample(range(len(pairs)), min(args.limit, len(pairs)))
        pairs = [pairs[i] for i in sorted(drawn)]
    for p in pairs:
        about = {"type": p.type, "source": p.source, "swap": p.label == "B"}
        if "style_a" in p.meta and "style_b" in p.meta:
            better, worse = "ab" if p.label == "A" else "ba"
            about["styles"] = [p.meta[f"style_{better}"], p.meta[f"style_{worse}"]]
        yield replace(p, id=f"{name}/{p.id}", meta={"bench": name, "item": p.id, "subset": "",
                                                    "compare": [0, 1], **about})


def tasks(asked, args):
    """[(pair as shown, what its line begins with), ...]: order 0 is the one of `collect`, 1 the other.
    JudgeBench asks for both, a scalar judge knows no order, and greedy votes would all be the same."""
    out = []
    for pair in asked.values():
        both = args.both_orders or B.BENCHES.get(pair.meta["bench"], B.FILE).orders == "join"
        for order in (0, 1) if both and not args.scalar else (0,):
            shown = pair.swapped() if order else pair
            about = {"id": pair.id, "order": order, "swap": pair.meta["swap"] ^ bool(order)}
            for t in args.temperature:
                out += [(shown, about | {"temperature": t, "vote": vote, "label": shown.label})
                        for vote in range(args.votes if t > 0 else 1)]
    return sorted(out, key=lambda task: task[1]["temperature"])


# ---------------------------------------------------------------- ask

def judge(args):
    """Ask for every judgment that the folder does not have yet, and write each as it comes."""
    import ranks
    asked, left_out, origin = collect(args)
    todo, out = tasks(asked, args), Path(args.out)
    if not todo:
        fail("nothing to judge" + (f": {left_out[0]['item']}: {left_out[0]['reason']}" if left_out else ""))
    rank, world, _ = ranks.start_ranks()
    config = settings(args, world) | {"data": origin}

    def chat(shown):
        return [shown.context, shown.a, shown.b] if args.scalar else \
            chat_messages(shown, config["protocol"], config["system"])

    open_run(args, config, asked, left_out, chat, rank)
    ranks.barrier()
    done = {key_of(line) for line in read_lines(out / "judgments.jsonl")}
    # A prompt's votes stay on one rank, whose cache then has it.
    place = {prompt: n for n, prompt in enumerate(dict.fromkeys((x["id"], x["order"]) for _, x in todo))}
    # The ranks of one tensor-parallel engine ask the same; the first of them writes.
    engine, engines, writes = rank // args.tp, world // args.tp, rank % args.tp == 0
    mine = [(shown, x) for shown, x in todo
            if place[x["id"], x["order"]] % engines == engine and key_of(x) not in done]
    bar = tqdm(total=len(mine), desc="judge", disable=ranks.quiet(), smoothing=0)
    right, failed, why = 0, 0, "no answer on another rank, or the files were changed meanwhile"
    ranks.phase("judge")
    work, = ranks.all_sum([len(mine)])                # building an engine is a collective: all do, or none
    # Kept to the end: when vLLM's engine is collected, it takes the ranks' process group with it.
    asker = asker_of(
        args.model, args.base_url, args.max_tokens, at_once=args.at_once, max_len=args.max_len,
        dtype=args.dtype, memory=args.engine_memory, seed=args.seed, tp=args.tp
    ) if work and not args.scalar else None
    with open(out / f"judgments.part{rank}.jsonl" if writes else os.devnull, "a") as f:
        for line in answers(args, asker, mine, chat) if work else ():
            if isinstance(line, str):                  # why there is no answer: another run asks again
                failed, why = failed + 1, line
            else:
                f.write(json.dumps(line) + "\n")
                f.flush()
                right += line["verdict"] is not None and line["verdict"] == line["label"]
            bar.update()
            bar.set_postfix_str(f"accuracy {right / max(1, bar.n - failed):.3f}", refresh=False)
    bar.close()
    ranks.barrier()                                   # everyone has written
    if rank == 0:
        keys = [key_of(x) for _, x in todo]
        there = merge(out, keys)
        if there:
            print(as_text([measure(read_run(out))]))
        if lost := sum(key not in there for key in keys):
            fail(f"{lost} of {len(todo)} judgments: {why}; the same command asks for them again")
    ranks.barrier()


def settings(args, world):
    """What judgments depend on beside their pairs, for config.json: a folder has those of one kind only."""
    import policy
    protocol = system = folder = None
    if not args.scalar:
        folder = None if args.base_url else policy.resolve(args.model)
        check_tp(args.tp, world, folder and policy.config_of(folder))
        protocol, system = prompt_form(folder, args.model, args.protocol, args.system_prompt)
    return {"model": args.model, "weights": fingerprint(args.model, folder),
            "base_url": args.base_url and without_user(args.base_url), "scalar": args.scalar,
            "protocol": protocol, "system": system, "max_tokens": args.max_tokens, "max_len": args.max_len,
            "dtype": args.dtype, "seed": args.seed}


def answers(args, asker, mine, chat):
    """Yields the lines of judgments.jsonl, as they come, or why no answer came (str)."""
    if args.scalar:
        yield from scalar_answers(args, mine, chat)
        return
    requests = ((chat(shown), seed_of(args.seed, x["id"], x["order"], x["temperature"], x["vote"]),
                 x["temperature"]) for shown, x in mine)
    for at, a in asker.answers(requests):
        shown, x = mine[at]
        yield a.finish if a.failed else x | line_of(a, shown, chat(shown))


def line_of(a, shown, messages):
    """What judgments.jsonl says about an answer, but for which comparison it belongs to."""
    j = judged(a)
    quotes = verbatim(j, shown)
    return {"verdict": j.verdict, "reason": j.reason,
            "official": B.process_judgement(a.text), "finish": a.finish, "tokens": a.tokens,
            "prompt_tokens": a.prompt_tokens, "prompt": digest(messages), "type": j.type,
            "rubric": [[name, weight] for name, weight, _ in j.rubric], "quotes": [sum(quotes), len(quotes)],
            "text": a.text}


def scalar_answers(args, mine, chat):
    """A reward model scores every conversation once; the higher score is the verdict. Yields as `answers`."""
    uses, conversations, scores = defaultdict(list), {}, defaultdict(dict)
    for at, (shown, _) in enumerate(mine):
        for side, response in (("A", shown.a), ("B", shown.b)):
            conversation = [*shown.context, {"role": "assistant", "content": response}]
            conversations[digest(conversation)] = conversation
            uses[digest(conversation)].append((at, side))
    uses = list(uses.values())
    for place, score in Scalar(args.model, args.dtype).scores(list(conversations.values())):
        for at, side in uses[place]:
            scores[at][side] = score
            if len(scores[at]) == 2:
                shown, x = mine[at]
                a, b = scores[at]["A"], scores[at]["B"]
                verdict, reason = None, ""
                if None in (a, b):
                    reason = "longer than the model's window"
                elif a == b:
                    reason = "equal scores"
                else:
                    verdict = "A" if a > b else "B"
                yield x | line_of(Answer("", reason or "stop"), shown, chat(shown)) | {
                    "verdict": verdict, "reason": reason, "official": verdict or "error", "scores": [a, b]}


# ---------------------------------------------------------------- a run's folder

def open_run(args, config, asked, left_out, chat, rank):
    """Make the run's folder or check, on every rank, that it is this run's. Judgments of texts or labels that
    are others now leave it, and so do those of pairs that are no longer in their file."""
    out, path = Path(args.out), Path(args.out) / "config.json"
    claim(out)
    if path.is_file() and any(p.stat().st_size for p in out.glob("judgments*.jsonl")):
        old = read_object(path)
        if differs := [k for k in config if k != "data" and old.get(k) != config[k]]:
            was, now = (str(c.get(differs[0]))[:80] for c in (old, config))
            fail(f"--out {out}: holds judgments with another {differs[0]} ({was}, now {now}); give another "
                 "folder or remove it")
    if rank != 0:
        return
    # A file that is asked in full says which of its pairs there are.
    whole = set() if args.limit else {p.meta["bench"] for p in asked.values()} - set(B.BENCHES)

    def current(line):
        pair = asked.get(line["id"])
        if pair is None:
            return line["id"].split("/")[0] not in whole
        try:
            shown = pair.swapped() if line["order"] else pair
        except ValueError:                              # cannot be swapped, as it is now
            return False
        return line["label"] == shown.label and line["prompt"] == digest(chat(shown))

    write_lines(path, [json.dumps(config, indent=2)])
    merge(out, keep=current)
    known = {p["id"]: p for p in read_lines(out / "pairs.jsonl") if p["bench"] not in whole}
    for p in asked.values():
        known[p.id] = {"id": p.id, **p.meta, "context": p.context, "a": p.a, "b": p.b, "label": p.label}
    write_lines(out / "pairs.jsonl", map(json.dumps, known.values()))
    gone = {(x["bench"], x["item"]): x for x in read_lines(out / "left_out.jsonl") + left_out}
    write_lines(out / "left_out.jsonl", map(json.dumps, gone.values()))


def merge(out, order=(), keep=lambda line: True):
    """Gather what the ranks have written into judgments.jsonl: the lines to keep, in the order of the keys
    given first. -> {key: line}"""
    parts, found = sorted(out.glob("judgments.part*.jsonl")), lines_of(out)
    lines = {k: x for k, x in found.items() if keep(x)}
    if stale := len(found) - len(lines):
        print(f"{out}: {stale} judgments are of texts or labels that have changed or gone, and are dropped")
    if parts or stale:
        lines = {k: lines[k] for k in [*order, *lines] if k in lines}
        write_lines(out / "judgments.jsonl", map(json.dumps, lines.values()))
    for path in parts:
        path.unlink()
    return lines


# ---------------------------------------------------------------- the command line

def arguments():
    ap = Flags(__doc__, epilog="eval.py report DIR ... and eval.py compare DIR DIR read what was written; "
                               "each has --help")
    arg = ap.add_argument
    flags(ap, "model protocol system-prompt base-url at-once max-tokens max-len dtype seed")
    arg("--bench", default="", help=f"NAME or NAME@REVISION, with commas: {', '.join(B.BENCHES)}; or all")
    arg("--data-dir", help="folder with the benchmarks' files instead of the hub")
    arg("--data", nargs="+", default=[], help="files of pairs: JSONL, JSON, parquet, or a hub dataset")
    arg("--out", required=True, help="folder of this run")
    arg("--scalar", action="store_true", help="the model is a reward model that gives a number")
    arg("--temperature", type=number(float, 0), nargs="+", default=[0.0], help="0 for greedy; one or several")
    arg("--votes", type=number(int, 1), default=1,
        help="judgments of a comparison above temperature 0; the majority decides, the first at a tie")
    arg("--both-orders", action="store_true", help="judge every pair a second time with A and B swapped")
    arg("--limit", type=number(int, 1), help="only so many items of every subset, drawn by the seed")
    arg("--engine-memory", type=number(float, 0, 1, above=True), default=0.9, help="share of a card for vLLM")
    arg("--tp", type=number(int, 1), default=1, help="ranks that judge with one engine together")
    arg("--skip-bad", action="store_true", help="report and leave out bad lines of --data, and go on")
    args = ap.parse_args()
    args.bench = list(B.BENCHES) if args.bench == "all" else [b for b in args.bench.split(",") if b]
    if unknown := [b for b in args.bench if b.split("@")[0] not in B.BENCHES]:
        fail(f"--bench {unknown[0]}: no such benchmark; there are {', '.join(B.BENCHES)}")
    if not args.bench and not args.data:
        fail("name something to judge: --bench or --data")
    if args.votes > 1 and max(args.temperature) == 0:
        fail(f"--votes {args.votes}: votes at temperature 0 are all the same; give --temperature 1")
    if len(set(args.temperature)) < len(args.temperature):
        fail("--temperature: each once")
    if args.scalar and (args.votes > 1 or args.both_orders or args.base_url or args.tp > 1):
        fail("--scalar: a reward model has no votes, no order, no server and no --tp")
    return args


FROM_FILES = [[name] for name in COMMANDS]             # no ranks, no torch


def main():
    if sys.argv[1:2] in FROM_FILES:
        return COMMANDS[sys.argv[1]](sys.argv[2:])
    args = arguments()
    try:
        judge(args)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"--out {args.out}: {e.strerror}; the judgments so far are kept, and the same command goes on")


if __name__ == "__main__":
    if sys.argv[1:2] in FROM_FILES:
        main()
    else:
        import ranks
        ranks.run(main)
