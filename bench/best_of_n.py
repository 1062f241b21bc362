"""
What does a judgment buy: the best of N responses, the better of two; and what a label by people beside it?

    OMP_NUM_THREADS=2 python bench/best_of_n.py                                # the demo's judge
    OMP_NUM_THREADS=2 python bench/best_of_n.py --model runs/demo/sft/model    # one that mostly looks

**Best of N.** Questions of data/toy.py: every product that has 16 responses, as many on fruits and on last
words. Each gets N different responses: openers by lot, answers as often as the toy world writes them, each
right with chance .3, at least one and not all; a product has three right responses at most. right: share of
them; gain: (quality of the pick - mean) / (best - mean), 1 for a right pick, 0 on average for a lot;
judgments, seconds: a question, all of a row being ranked together.

**Votes.** Pairs of --data, each with --seeds seeds. accuracy counts a tie half; se is over pairs, their seeds
averaged; judgments: votes a pair. "T=1": all are sampled; "greedy first": all but the first in each order, as
in `Judge.compare`. Adaptive votes stop when a response is two ahead; all are votes of the 8, not asked again.

**Labels.** A share of the pairs gets people's label in place of the verdict of adaptive votes: those that
`rmr1.py select` picks, or as many by lot; means of --lots lots of each seed. drawn: how often the judge is
right by the labels that were drawn by lot (of select's a tenth), sd over lots, seeds. decided: share of all
verdicts that these labels guarantee to be right in .9; kept: share of the guarantees that are true.
"""
import itertools
import random
from statistics import mean, stdev

import common
import ranking
import toy
from files import Flags, number
from rmr1 import Judge, all_of, now
from rubrics import read_pairs

SHARE, TARGET = .3, .9


def questions():
    """-> [(question, right answers, wrong answers), ...], an answer as often as the toy world wrote it"""
    rng, found = random.Random("questions"), {"mul": {}, "count": {}, "endw": {}}
    for _ in range(20_000):
        kind, question, right, wrong, _ = toy.task(rng)
        if kind in found:
            some = found[kind].setdefault(question, (question, [], []))
            some[1].append(right)
            some[2].append(wrong)
    products = [x for _, x in sorted(found.pop("mul").items()) if 3 * (1 + len(set(x[2]))) > 16]
    others = [rng.choices(list(asked.values()), k=len(products)) for asked in found.values()]
    return products + sum(others, [])


def candidates(right, wrong, n, rng):
    """-> n different responses in random order, the quality of each: 1 where it is right, else 0"""
    dressed = lambda answers: list(dict.fromkeys(
        f"{rng.choice(toy.OPENERS)} {answer}" for answer in rng.sample(answers, len(answers))))
    right, wrong = dressed(right), dressed(wrong)
    k = max(1, n - len(wrong), min(sum(rng.random() < SHARE for _ in range(n)), n - 1, len(right)))
    return zip(*rng.sample([(text, 1) for text in right[:k]] + [(text, 0) for text in wrong[:n - k]], n))


def with_error(name, values):
    return {name: mean(values), "se": stdev(values) / len(values)**.5}


def best_of(judge, n):
    """A row for every way to choose one of n."""
    rng = random.Random(f"candidates {n}")
    texts, quality = zip(*(candidates(*some, n, rng) for _, *some in questions()))
    games = [(question, some) for (question, *_), some in zip(questions(), texts)]
    yield {"": f"best of {n}: {len(games)} questions", "right": mean(map(mean, quality))}
    gain = lambda worth, pick: (worth[pick] - mean(worth)) / (max(worth) - mean(worth))
    row = lambda way, picks: {"": f"best of {n}: {way}"} | with_error("gain", list(map(gain, quality, picks)))
    for name, *way in (("knockout", "best", 2 * (n - 1)), ("ring, N", "all", n), ("ring, 2N", "all", 2 * n),
                       ("ring, 4N", "all", 4 * n), ("active, 4N", "best", 4 * n)):
        judge.journal.answers.clear()                      # each way pays for its own judgments
        judge.asker.engine.reset_cache()
        seconds, ranked = common.timed(now, all_of(judge.arank(*game, *way) for game in games))
        yield row(name, [r.order[0] for r in ranked]) | {
            "judgments": mean(len(r.votes) for r in ranked), "seconds": seconds / len(games)}
    for name, worth in (("random", lambda text: 0), ("longest", len)):
        yield row(name, [max(range(n), key=lambda i: (worth(some[i]), rng.random())) for some in texts])


def voted(judge, pairs, budget, lead):
    """-> [what `ranking.verdict` says of a pair; right: 1, 0, .5 for a tie or nothing read; spent: votes]"""
    games = now(all_of([judge.play(lambda i, _, p=p: p.swapped() if i else p, ranking.votes(budget, lead))
                        for p in pairs]))
    found = [ranking.verdict(played) | {"spent": len(some)} for played, some in games]
    return [f | {"right": float(f["verdict"] == p.label) if f["verdict"] in ("A", "B") else .5}
            for f, p in zip(found, pairs)]


def votes(args, judge, pairs, how):
    """A row for every number of votes, and for what labels are worth beside the adaptive ones."""
    right, asked = {}, set()
    judge.greedy = how == "greedy first"
    for name, *way in (("8 fixed", 8, 9), ("4 fixed", 4, 9), ("2 fixed", 2, 9), ("adaptive, up to 8", 8, 2)):
        seeds = [voted(judge, pairs, *way) for judge.seed in range(args.seeds)]
        right[name], spent = ([mean(f[k] for f in some) for some in zip(*seeds)] for k in ("right", "spent"))
        yield {"": f"{how}: {name}"} | with_error("accuracy", right[name]) | {"judgments": mean(spent)}
        asked.add(len(judge.journal.answers))
    assert len(asked) == 1, "something was judged twice"
    yield {"": f"{how}: adaptive less 8 fixed"} | with_error(
        "accuracy", [a - b for a, b in zip(right[name], right["8 fixed"])])
    yield from labels(args, pairs, seeds, how)


def bought(found, drawn, disputed):
    """What labels of some pairs are worth. -> what is right then; by those drawn: accuracy, decided, kept"""
    right, share = [f["right"] for f in found], [f["share"] or 0 for f in found]
    lowest = ranking.guarantee([(share[i], right[i] == 1) for i in drawn], TARGET)
    sure, labelled = [r for r, s in zip(right, share) if lowest and s >= lowest], {*drawn, *disputed}
    return ([1 if i in labelled else r for i, r in enumerate(right)], mean(right[i] for i in drawn),
            len(sure) / len(found), mean(sure) >= TARGET if sure else None)


def labels(args, pairs, seeds, how):
    """A row for every share of pairs whose label is bought, picked by `select` or by lot.
    seeds: what the votes of each say of the pairs"""
    for percent in (5, 10, 20, 30, 50):
        after, count = {}, len(pairs) * percent // 100
        for way in ("select", "by lot"):
            some = []
            for found, lot in itertools.product(seeds, range(args.lots)):
                keys = [f"{lot}/{p.id}" for p in pairs]
                picked = (ranking.by_lot(keys)[:count], []) if way == "by lot" else \
                    ranking.select(keys, [f["win"] for f in found], count)
                some.append(bought(found, *picked))
            corrected, drawn, decided, kept = zip(*some)
            after[way], kept = [mean(x) for x in zip(*corrected)], [k for k in kept if k is not None]
            yield {"": f"{how}: {percent} % {way}"} | with_error("accuracy", after[way]) | {
                "drawn": mean(drawn), "sd": stdev(drawn), "decided": mean(decided),
                "kept": mean(kept) if kept else None}
        yield {"": f"{how}: {percent} % select less by lot"} | with_error(
            "accuracy", [a - b for a, b in zip(*after.values())])


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--model", default="runs/demo/grpo/model", help="folder of a judge that the demo trained")
    arg("--data", default="runs/demo/data/test.jsonl", help="pairs to vote on")
    arg("--seeds", type=number(int, 1), default=4, help="of the votes")
    arg("--lots", type=number(int, 2), default=25, help="of the labels, for each seed")
    args = ap.parse_args()
    judge, pairs = Judge(args.model, max_tokens=56, dtype="float32", max_len=100), read_pairs(args.data)
    judge.compare_all(pairs[:50])                                                     # warms up
    rows = [row for n in (2, 4, 8, 16) for row in best_of(judge, n)]
    for how in ("T=1", "greedy first"):
        rows += votes(args, judge, pairs, how)
    common.report(rows)


if __name__ == "__main__":
    main()
