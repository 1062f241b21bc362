"""
The judge you use: compare two responses, rank several, reward a group; and the command line.

    from rmr1 import Judge
    judge = Judge("runs/demo/grpo/model", dtype="float32")             # or a hub id, or a server's URL
    judge.compare("What is 6 * 7 ?", "Here: 42", "Here: 45").verdict   # "A"
    judge.rank(prompt, responses, goal="best").order[0]                # the best one's place
    GRPOTrainer(..., reward_funcs=judge.reward)                        # TRL; judge.areward is its async twin

    python rmr1.py judge --model MODEL --question "What is 6 * 7 ?" --a "Here: 42" --b "Here: 45"
    python rmr1.py rank | reward | select --model MODEL --data lines.jsonl --journal journal.jsonl

The demo's judge knows the kinds of question that data/toy.py asks, in its few words, and no others.
"""
import asyncio
import functools
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
import threading
import warnings
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

import ranking
from askers import Answer, Journal, Refused, asker_of, flags, judged
from engine import seed_of
from files import Flags, digest, fail, lines_of, number
from rubrics import (Judgment, Pair, chat_messages, messages_of, other, prompt_form, read_pairs, response_of,
                     text_in, verbatim)


@dataclass
class Vote:
    """One judgment of two responses. first: the place of the one that was shown as A; verdict: "A" or "B" of
    what was shown, None where there is none (judgment.reason says why); prefers: the same in the words of a
    pair, whose places are 0 and 1; answer: what it cost."""
    first: int
    second: int
    judgment: Judgment
    answer: Answer

    @property
    def verdict(self):
        return self.judgment.verdict

    @property
    def prefers(self):
        return other(self.verdict) if self.first else self.verdict


@dataclass
class Comparison:
    """What the votes on two responses say; `ranking.verdict` has the definitions.

    verdict   "A", "B", "tie" or None, and then the reason; win: share of A in votes to come, low to high its
              90 % interval; consistent: do both orders say the same? share: of votes, those for the verdict
    vote      the first that spoke for the verdict; votes: all of them"""
    verdict: str | None
    reason: str
    win: float
    low: float
    high: float
    consistent: bool | None
    share: float | None
    vote: Vote | None
    votes: list


@dataclass
class Ranking:
    """What comparisons of n responses say; `ranking.rewards` has the definitions. order: places, the best
    first. reward (the expected win rate), stderr, low, high, best (the chance to be the best): a number for
    each, None where nothing about one could be read. votes: of responses in the places first and second."""
    order: list
    reward: list
    stderr: list
    low: list
    high: list
    best: list
    votes: list

    def numbers(self):
        return {name: getattr(self, name) for name in ("reward", "stderr", "low", "high", "best")}


class Judge:
    """A judge to compare, rank and reward with, from anywhere; acompare, arank and areward are the same to
    await. Everything that can run together does, whoever asks for it.

    model        a folder or hub id; or a server's URL, which is asked for its first model
    base_url     an OpenAI-compatible server that has the model. It is asked in token ids where model is a
                 folder, else in chats, model being the server's name for it
    protocol     how it wants to be asked, where the model does not say so itself; system_prompt: a file
    journal      a file that keeps every judgment: what is in it is not asked again
    temperature  of the second and further votes in an order; the first is greedy, unless greedy=False
    seed         numbers are functions of it and of the texts: other responses' places change nothing
    more         max_len, dtype, memory of a local model (see `askers.Local`); at_once, patience of a server
    """

    def __init__(self, model, protocol=None, system_prompt=None, base_url=None, journal=None, temperature=1.0,
                 seed=0, max_tokens=8192, greedy=True, **more):
        if "://" in str(model):
            model, base_url = None, model
        self.asker, folder, about = model, None, None       # anything that answers as those of askers.py do
        if not hasattr(model, "submit"):
            at_hand = model if base_url and model and Path(model).is_dir() else None
            self.asker = asker_of(None if at_hand else model, base_url, max_tokens, folder=at_hand, **more)
            folder, model, about = self.asker.folder, self.asker.model, self.asker.about()
        self.form = prompt_form(folder, model, protocol, system_prompt)
        self.about, self.temperature, self.seed, self.greedy = [about, max_tokens], temperature, seed, greedy
        self.journal = Journal(Path(journal) if journal else None)
        self.under_way, self.lock = {}, threading.Lock()
        self.bar, self.used = tqdm(disable=True), Counter()

    async def answers(self, asked, heard=None):
        """Answers to [(messages, seed, temperature), ...], from the journal or else from the model, which is
        asked once for what several want. Who leaves cancels nothing: the answer goes into the journal."""
        keys, new, waiting = [digest([*self.about, *request]) for request in asked], {}, []
        with self.lock:
            for n, key in enumerate(keys):
                known = self.journal.found(key)
                self.used["cached"] += known is not None
                if not known and key not in self.under_way:
                    new[key], self.under_way[key] = n, Future()
                waiting.append(known or self.under_way[key])
        try:
            told = {"heard": lambda n, text: heard([*new.values()][n], text)} if heard else {}
            futures = self.asker.submit([asked[n] for n in new.values()], **told)
        except BaseException as e:                              # nobody may wait for ever
            futures = [Future() for _ in new]
            for future in futures:
                future.set_exception(e)
        for key, future in zip(new, futures, strict=True):
            future.add_done_callback(functools.partial(self.keep, key))
        got = [await asyncio.shield(asyncio.wrap_future(a)) if isinstance(a, Future) else a for a in waiting]
        return [replace(a, origin="shared") if a.origin == "new" and new.get(key) != n else a
                for n, (key, a) in enumerate(zip(keys, got))]

    def keep(self, key, future):
        """An answer has come: into the journal, then to all who wait for it."""
        try:
            answer, error = future.result(), None
            if not answer.failed:
                self.journal.add(key, answer)
        except BaseException as e:
            answer, error = None, e
        with self.lock:
            kept = self.under_way.pop(key)
            self.bar.update()
            if answer:
                self.used.update(judgments=1, prompt_tokens=answer.prompt_tokens,
                                 completion_tokens=answer.tokens)
        (kept.set_exception if error else kept.set_result)(error or answer)

    async def play(self, shown, game, heard=None):
        """A schedule of ranking.py, played, all of a round together. shown: (i, j) -> the `Pair` that shows
        response i as A and j as B. heard(k, i, what) is told of vote k, which shows i first: "" as it begins,
        what there is of its text, at last the `Vote`. -> what was played [(i, j, result), ...], [Vote]"""
        before, votes = Counter(), []

        async def ask(places):
            asked = []
            for place in places:
                messages, n = chat_messages(shown(*place), *self.form), before[place]
                heat = 0.0 if self.greedy and not n else self.temperature
                asked.append((messages, seed_of(self.seed, digest(messages), n), heat))
                before[place] += 1
            told, first = heard and (lambda n, text: heard(first + n, places[n][0], text)), len(votes)
            for n in range(len(places)) if heard else ():
                told(n, "")
            for n, a in enumerate(await self.answers(asked, told)):
                votes.append(Vote(*places[n], judged(a), a))
                if heard:
                    told(n, votes[-1])
            return [None if v.verdict is None else float(v.verdict == "A") for v in votes[-len(places):]]

        return await ranking.play(game, ask), votes

    async def acompare(self, prompt, a, b, budget=8, heard=None):
        """Which of two responses is better? prompt: a text or messages; a, b: texts, or messages that end in
        one. One vote in each order, more only while neither is two ahead and the budget lasts. heard: see
        `play`. -> `Comparison`"""
        pair = Pair("", messages_of(prompt), response_of(a), response_of(b), None)
        if pair.a == pair.b:
            return Comparison("tie", "the responses are equal", 0.5, 0.5, 0.5, None, None, None, [])
        return await self.apair(pair, budget, heard)

    async def apair(self, pair, budget=8, heard=None):
        """`acompare` for a `Pair`, in its published prompt if it has one; where its responses cannot be told
        apart in that, there is one vote, in the order that it has."""
        played, votes = await self.play(lambda i, _: pair.swapped() if i else pair,
                                        ranking.votes(budget if pair.a else 1), heard)
        says = ranking.verdict(played)
        speaks = next((v for v in votes if v.verdict and v.prefers == says["verdict"]), None)
        reason = {"tie": "as many votes for each", None: votes[0].judgment.reason}.get(says["verdict"], "")
        return Comparison(**says | {"reason": reason, "vote": speaks, "votes": votes})

    async def arank(self, prompt, responses, goal="all", budget=None):
        """How good are several responses beside each other? goal: "all" wants a reward for each, "best" the
        best one. budget: judgments, four a response unless given. Equal ones are judged once. -> `Ranking`"""
        texts, n = [response_of(r) for r in responses], len(responses)
        keys = sorted(set(texts), key=lambda t: digest([self.seed, t]))     # no place in the list has a say
        if n < 2:
            raise ValueError(f"{n} responses: a ranking needs two or more")
        if len(keys) == 1:                                                  # all are equal
            return Ranking([*range(n)], [0.5] * n, [0.0] * n, [0.5] * n, [0.5] * n, [1.0] * n, [])
        context, names = messages_of(prompt), [f"{self.seed}/{t}" for t in keys]
        played, votes = await self.play(lambda i, j: Pair("", context, keys[i], keys[j], None),
                                        ranking.schedule(names, budget, goal))
        for v in votes:
            v.first, v.second = texts.index(keys[v.first]), texts.index(keys[v.second])
        read = {i for *pair, won in played if won is not None for i in pair}
        places = [keys.index(t) for t in texts]
        numbers = {name: [float(some[i]) if i in read else None for i in places]
                   for name, some in ranking.rewards(names, played).items()}
        order = sorted(range(n), key=lambda i: -(numbers["reward"][i] or 0))            # a rate is above 0
        return Ranking(order=order, votes=votes, **numbers)

    async def areward(self, prompts, completions, **_):
        """A reward for every completion: its expected win rate against the others to the same prompt, which
        stand in a row, as trainers have them. None where nothing could be read, or where a completion is
        empty or alone: TRL then gives it no advantage. Goes into TRL's `reward_funcs`."""
        groups = groups_of(prompts, completions)
        if any(len(some) == 1 for _, some in groups):
            warnings.warn("a completion is alone: nothing to compare it with; let per_device_train_batch_size"
                          " x steps_per_generation be a multiple of num_generations", stacklevel=2)
        return [r for some, _ in await all_of(self.agroup(*group) for group in groups) for r, _ in some]

    async def agroup(self, prompt, completions):
        """-> [(reward, stderr), ...] of the completions to one prompt, and the votes"""
        known = [i for i, c in enumerate(completions) if text_in(c)]
        ranked = await self.arank(prompt, [completions[i] for i in known]) if len(known) > 1 else None
        found = dict(zip(known, zip(ranked.reward, ranked.stderr))) if ranked else {}
        return [found.get(i, (None, None)) for i in range(len(completions))], ranked.votes if ranked else []

    def verl(self):
        """A `compute_score` for verl, which shows a reward function one sample at a time: the share of votes
        that it wins against `ground_truth`, for the prompt in `extra_info["question"]`."""
        async def compute_score(data_source, solution_str, ground_truth, extra_info, **_):
            if not text_in(solution_str):
                return {"score": 0.0, "read": 0.0}
            found = await self.acompare(extra_info["question"], solution_str, ground_truth)
            return {"score": found.win if found.verdict else 0.5, "read": float(found.verdict is not None)}
        return compute_score

    def compare(self, prompt, a, b, budget=8):
        return now(self.acompare(prompt, a, b, budget))

    def compare_all(self, pairs, budget=8):
        """`compare` for many (prompt, a, b), or `Pair`s, together. -> [Comparison, ...]"""
        return now(all_of(self.apair(p, budget) if isinstance(p, Pair) else self.acompare(*p, budget)
                          for p in pairs))

    def rank(self, prompt, responses, goal="all", budget=None):
        return now(self.arank(prompt, responses, goal, budget))

    def reward(self, prompts, completions, **more):
        return now(self.areward(prompts, completions, **more))


def groups_of(prompts, completions):
    """-> [(prompt, [completion, ...]), ...]: runs of equal prompts"""
    runs = itertools.groupby(zip(prompts, completions, strict=True), key=lambda both: both[0])
    return [(prompt, [completion for _, completion in run]) for prompt, run in runs]


async def all_of(coroutines):
    """Their results, in order. Each begins in a turn of its own, for the loop may serve others: 512 groups
    that begin in one turn would hold it for seconds."""
    tasks = []
    try:
        for coroutine in coroutines:
            tasks.append(asyncio.ensure_future(coroutine))
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def now(coroutine):
    """The result of a coroutine, from wherever it is wanted: also within a running loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


# ---------------------------------------------------------------- the command line

def show(pair, found):
    """A comparison for a person to read: what was asked, the judgment, its quotes held against the responses,
    the verdict and how sure it is. In colour on a terminal, unless NO_COLOR is set."""
    colour, width = sys.stdout.isatty() and not os.environ.get("NO_COLOR"), shutil.get_terminal_size().columns
    paint = lambda text, code: f"\033[{code}m{text}\033[0m" if colour and text else text
    wide = lambda text: "\n".join(
        textwrap.fill(line, min(100, width), initial_indent="  ", subsequent_indent="  ")
        for line in text.strip("\n").splitlines())
    vote = found.vote or found.votes[0]
    j, shown = vote.judgment, pair.swapped() if vote.first else pair

    criteria = []
    for name, weight, text in j.rubric:
        bar = "█" * round((weight or 0) / 5)
        criteria.append(f"  {'' if weight is None else f'{weight:g} %':>6} {paint(f'{bar:<20}', 36)} {name}"
                        + (f": {text}" if text else ""))
    question = "\n".join(f"{m['role']}: {m['content']}" for m in pair.context)
    parts = {"question": wide(question), "response A": wide(shown.a), "response B": wide(shown.b),
             "task": wide(j.type), "solution": wide(j.solution), "rubric": "\n".join(criteria),
             "why these": wide(j.justify), "comparison": wide(j.eval),
             "what it wrote": wide("" if j.solution or j.rubric or j.eval else j.text)}
    for title, text in parts.items():
        if text.strip():
            print(f"{paint(title, 1)}\n{text}\n")
    quotes = [(side, q.strip()) for side in "AB" for q in j.quotes[side]]
    for (side, quote), there in zip(quotes, verbatim(j, shown)):
        print(paint(f"  {side}: {quote}" + "  (not in the response)" * (not there), 32 if there else 31))
    print(f"verdict: {found.verdict or f'none ({found.reason})'}, {found.win:.2f} of votes to come for A "
          f"({found.low:.2f} to {found.high:.2f}), judgments: {len(found.votes)}"
          + {True: ", the orders agree", False: ", the orders do not agree", None: ""}[found.consistent]
          + (", shown here with A and B the other way round" if vote.first else "")
          + (f", people preferred {pair.label}" if pair.label else ""))


def judgment_as_json(j, pair, first):
    """A judgment for a program. Quotes are of `pair`'s a or b, of which `first` was shown as A."""
    shown = pair.swapped() if first else pair
    quotes = [("ab"[(side == "B") != first], quote.strip()) for side in "AB" for quote in j.quotes[side]]
    return {"type": j.type, "rubric": [dict(zip(("name", "weight", "text"), item)) for item in j.rubric],
            "justify": j.justify, "solution": j.solution, "eval": j.eval,
            "quotes": [{"of": of, "text": quote, "found": found}
                       for (of, quote), found in zip(quotes, verbatim(j, shown))]}


def vote_as_json(v, pair):
    """A `Vote`; its verdict is in the words of what was shown, prefers in those of `pair`."""
    return {"order": "BA" if v.first else "AB", "verdict": v.verdict,
            "prefers": v.prefers and v.prefers.lower(), "reason": v.judgment.reason,
            "tokens": v.answer.tokens, "text": v.judgment.text,
            "judgment": judgment_as_json(v.judgment, pair, v.first)}


def as_json(found, pair):
    """A `Comparison`."""
    numbers = {k: v for k, v in vars(found).items() if k != "vote"}
    return numbers | {"votes": [vote_as_json(v, pair) for v in found.votes]}


def judge_of(args, what, least=None):
    """The judge that is named. Says first what it will do; a bar shows how long, after the first answers."""
    known = f", less what is in {args.journal}" if args.journal and os.path.exists(args.journal) else ""
    print(f"{what}, by {args.base_url or args.model}{known}", file=sys.stderr)
    judge = Judge(args.model, args.protocol, args.system_prompt, args.base_url, args.journal,
                  args.temperature, args.seed, args.max_tokens, max_len=args.max_len, dtype=args.dtype)
    judge.bar = tqdm(total=least, unit=" judgments", leave=False, disable=None)      # on a terminal only
    return judge


def judge(args):
    """Judge a pair, or all of a file, in both orders: for a person to read, or a line of JSON each."""
    if args.data:
        pairs = read_pairs(args.data)
        if args.line and args.line > len(pairs):
            fail(f"--line {args.line}: {args.data} has {len(pairs)} pairs")
        pairs = pairs[args.line - 1:args.line] if args.line else pairs
    elif args.question and args.a and args.b:
        pairs = [Pair("command line", [{"role": "user", "content": args.question}], args.a, args.b, None)]
        if args.a == args.b:
            fail("--a and --b are equal")
    else:
        fail("name a pair: --question, --a and --b, or --data")
    judge = judge_of(args, f"{len(pairs)} pairs, up to {args.budget} judgments each", len(pairs))
    for pair, found in zip(pairs, judge.compare_all(pairs, args.budget)):
        if all(v.verdict is None and not v.judgment.text for v in found.votes):
            fail(found.reason)
        print(json.dumps({"id": pair.id} | as_json(found, pair))) if args.json else show(pair, found)


def rank(args):
    """Rank the responses of every line beside each other: a line of numbers for each."""
    def read(row):
        responses = [response_of(r) for r in row.get("responses") or ()]
        if not 2 <= len(responses) <= args.most:
            raise ValueError(f"{len(responses)} responses; 2 to {args.most} are ranked (--most), each line "
                             f"asks for up to {args.budget or 4 * len(responses)} judgments")
        return row.get("id"), messages_of(row.get("prompt")), responses

    rows = list(lines_of(args.data, read)) or fail(f"{args.data}: no lines in it")
    most = sum(args.budget or 4 * len(some) for _, (*_, some) in rows)
    judge = judge_of(args, f"{len(rows)} lines of responses, up to {most:,} judgments")
    ranked = now(all_of(judge.arank(prompt, some, args.goal, args.budget) for _, (_, prompt, some) in rows))
    for (line, (id, *_)), r in zip(rows, ranked):
        print(json.dumps({"id": line if id is None else id, "order": r.order, **r.numbers(),
                          "judgments": len(r.votes)}))


def reward(args):
    """Reward every line's completion beside the others to its prompt, which stand in a row: a line each."""
    judge, batch = judge_of(args, "up to four judgments a completion"), []

    def flush():
        rewards = judge.reward([p for _, (p, _) in batch], [c for _, (_, c) in batch])
        for (line, _), r in zip(batch, rewards):
            print(json.dumps({"line": line, "reward": r}), flush=True)

    with open(args.rejects or os.devnull, "w") as rejects:
        read = lambda row: (messages_of(row.get("prompt")), response_of(row.get("completion")))
        for item in lines_of(args.data, read, rejects if args.rejects else None):
            # Between two groups, and as many of them together as keep an engine busy.
            if len(batch) >= args.at_once and batch[-1][1][0] != item[1][0]:
                flush()
                batch.clear()
            batch.append(item)
    if batch:
        flush()


def select(args):
    """Select the pairs whose labels are worth most: those that the judge disputes, and a tenth by lot."""
    def read(row):
        context = messages_of(row.get("context", row.get("prompt")))
        return row, Pair("", context, response_of(row.get("a")), response_of(row.get("b")), row.get("label"))

    once = {}                                   # of pairs that differ in case and punctuation only, one
    for _, (row, pair) in lines_of(args.data, read):
        words = re.findall(r"\w+", json.dumps([pair.context, *sorted((pair.a, pair.b))]).lower())
        if pair.a != pair.b:
            once.setdefault(" ".join(words), (row, pair))
    once or fail(f"{args.data}: no pairs in it")
    judge = judge_of(args, f"{len(once)} pairs, up to {args.budget} judgments each", len(once))
    found = judge.compare_all([pair for _, pair in once.values()], args.budget)
    rows, wins = [row for row, _ in once.values()], [f.win for f in found]
    drawn, disputed = ranking.select(list(once), wins, min(args.count, len(rows)))
    for why, places in (("drawn", drawn), ("disputed", disputed)):
        for i in places:
            print(json.dumps(rows[i] | {"why": why, "win": wins[i], "verdict": found[i].verdict}))
    known = [(f.share, f.verdict == pair.label) for f, (_, pair) in zip(found, once.values())
             if pair.label in ("A", "B") and f.share is not None]
    if known:
        share = ranking.guarantee(known, args.target)
        where = "at no share of the votes" if share is None else (
            f"for which at least {share:.2f} of the votes speak, "
            f"{sum(s >= share for s, _ in known) / len(known):.0%} of these pairs")
        print(f"{len(known)} pairs have a label; with confidence .9, people agree with {args.target:g} "
              f"of the verdicts {where}", file=sys.stderr)


def main():
    ap = Flags(__doc__)
    commands = ap.add_subparsers(required=True, metavar="judge | rank | reward | select")
    forms = {judge: 'pairs (or --question, --a, --b)', rank: '{"prompt": ..., "responses": [...]}',
             reward: '{"prompt": ..., "completion": ...}',
             select: '{"prompt": ..., "a": ..., "b": ...}, "label" or not'}
    for run, form in forms.items():
        one = commands.add_parser(run.__name__, help=run.__doc__.split(":")[0], description=run.__doc__)
        arg = one.add_argument
        arg("--data", required=run is not judge, help=f"a file of lines, or - for standard input: {form}")
        if run is judge:
            arg("--question", help="the client's question")
            arg("--a", help="response A")
            arg("--b", help="response B")
            arg("--line", type=number(int, 1), help="which of the file's pairs, from 1; default: all")
            arg("--json", action="store_true", help="a line of JSON for each, for programs")
        elif run is rank:
            arg("--goal", choices=("all", "best"), default="all", help="a reward for each, or the best one")
            arg("--most", type=number(int, 2), default=32, help="responses of a line at most")
        elif run is reward:
            arg("--rejects", help="file for lines that cannot be read, and why; default: they end the run")
            arg("--at-once", type=number(int, 1), default=1024, help="completions judged together")
        else:
            arg("--count", type=number(int, 1), default=100, help="how many pairs to select")
            arg("--target", type=number(float, 0.5, 1), default=0.9, help="agreement to be guaranteed")
        if run is not reward:
            arg("--budget", type=number(int, 1), default=None if run is rank else 8,
                help="judgments of a pair (rank: of a line, four a response unless given) at most")
        flags(one, "model protocol system-prompt base-url journal temperature seed max-tokens max-len dtype")
        one.set_defaults(run=run)
    args = ap.parse_args()
    try:
        args.run(args)
    except Refused as e:
        fail(str(e))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)               # threads that wait for a server are not waited for
