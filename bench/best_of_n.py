"""
What does a judgment buy: the best of N responses, and the better of two?

    OMP_NUM_THREADS=2 python bench/best_of_n.py                                # the demo's judge
    OMP_NUM_THREADS=2 python bench/best_of_n.py --model runs/demo/sft/model    # one that mostly looks

**Best of N.** Questions of data/toy.py: every product that has 16 responses, as many on fruits and on last
words. Each gets N different responses: openers by lot, answers as often as the toy world writes them, each
right with chance --share, at least one and not all; a product has three right responses at most. Show says
nothing about being right; the longest list of fruits is often one too long. gain: (quality of the pick -
mean) / (best - mean), 1 for a right pick, 0 on average for a lot; mean over questions, with its standard
error. judgments, seconds: a question, all of a row being ranked together.

**Votes.** Pairs of --data, each with --seeds seeds. accuracy counts a tie half; se is over pairs, their seeds
averaged; judgments: votes a pair. "T=1": all are sampled; "greedy first": all but the first in each order, as
in `Judge.compare`. Adaptive votes stop when a response is two ahead; all are votes of the 8, not asked again.
"""
import random
from statistics import mean, stdev

import common
import ranking
import toy
from files import Flags, number
from rmr1 import Judge, all_of, now
from rubrics import read_pairs


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


def candidates(right, wrong, n, share, rng):
    """-> n different responses in random order, the quality of each: 1 where it is right, else 0"""
    dressed = lambda answers: list(dict.fromkeys(
        f"{rng.choice(toy.OPENERS)} {answer}" for answer in rng.sample(answers, len(answers))))
    right, wrong = dressed(right), dressed(wrong)
    k = max(1, n - len(wrong), min(sum(rng.random() < share for _ in range(n)), n - 1, len(right)))
    return zip(*rng.sample([(text, 1) for text in right[:k]] + [(text, 0) for text in wrong[:n - k]], n))


def with_error(name, values):
    return {name: mean(values), "se": stdev(values) / len(values)**.5}


def gain(quality, pick):
    """The share of what choosing can gain over a lot."""
    return (quality[pick] - mean(quality)) / (max(quality) - mean(quality))


def best_of(args, judge, n):
    """A row for every way to choose one of n."""
    rng, rows = random.Random(f"candidates {n}"), []
    texts, quality = zip(*(candidates(*some, n, args.share, rng) for _, *some in questions()))
    games = [(question, some) for (question, *_), some in zip(questions(), texts)]
    row = lambda way, picks: {"": f"best of {n}: {way}"} | with_error("gain", list(map(gain, quality, picks)))
    for name, *way in (("knockout", "best", 2 * (n - 1)), ("ring, N", "all", n), ("ring, 2N", "all", 2 * n),
                       ("ring, 4N", "all", 4 * n), ("active, 4N", "best", 4 * n)):
        judge.journal.answers.clear()                      # each way pays for its own judgments
        judge.asker.engine.reset_cache()
        start = common.clock()
        ranked = now(all_of([judge.arank(*game, *way) for game in games]))
        seconds, spent = (common.clock() - start) / len(games), mean(len(r.votes) for r in ranked)
        rows.append(row(name, [r.order[0] for r in ranked]) | {"judgments": spent, "seconds": seconds})
    for name, worth in (("random", lambda text: 0), ("longest", len)):
        picks = [max(range(n), key=lambda i: (worth(some[i]), rng.random())) for some in texts]
        rows.append(row(name, picks))
    return rows, f"best of {n}: {len(games)} questions, {mean(map(mean, quality)):.2f} of responses right"


def voted(judge, pairs, budget, lead):
    """-> [(1 right, 0 wrong, .5 a tie or nothing read; votes), ...]"""
    games = now(all_of([judge.play(lambda i, _, p=p: p.swapped() if i else p, ranking.votes(budget, lead))
                        for p in pairs]))
    said = [(ranking.verdict(played)["verdict"], len(some)) for played, some in games]
    return [(float(v == p.label) if v in ("A", "B") else .5, spent) for p, (v, spent) in zip(pairs, said)]


def votes(args, judge, how):
    """A row for every number of votes, and how adaptive ones stand beside 8."""
    pairs, rows, right, asked = read_pairs(args.data), [], {}, set()
    judge.greedy = how == "greedy first"
    for name, *way in (("8 fixed", 8, 9), ("4 fixed", 4, 9), ("2 fixed", 2, 9), ("adaptive, up to 8", 8, 2)):
        seeds = [voted(judge, pairs, *way) for judge.seed in range(args.seeds)]
        right[name], used = ([mean(x[k] for x in some) for some in zip(*seeds)] for k in (0, 1))
        rows.append({"": f"{how}: {name}"} | with_error("accuracy", right[name]) | {"judgments": mean(used)})
        asked.add(len(judge.journal.answers))
    assert len(asked) == 1, "something was judged twice"
    apart = with_error("by", [a - b for a, b in zip(right["adaptive, up to 8"], right["8 fixed"])])
    return rows, f"{how}: adaptive less 8 fixed votes {apart['by']:+.4f}, standard error {apart['se']:.4f}"


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--model", default="runs/demo/grpo/model", help="folder of a judge that the demo trained")
    arg("--data", default="runs/demo/data/test.jsonl", help="pairs to vote on")
    arg("--share", type=number(float, 0, 1), default=.3, help="chance of a response to be right")
    arg("--seeds", type=number(int, 1), default=4, help="of the votes")
    arg("--dtype", default="float32", help="of the judge")
    arg("--max-tokens", type=int, default=56, help="longest judgment")
    arg("--json", help="where the numbers go; default: runs/bench/best_of_n.json")
    args = ap.parse_args()
    judge = Judge(args.model, max_tokens=args.max_tokens, dtype=args.dtype, max_len=100)
    judge.compare_all(read_pairs(args.data)[:50])                                     # warms up
    found = [best_of(args, judge, n) for n in (2, 4, 8, 16)]
    found += [votes(args, judge, how) for how in ("T=1", "greedy first")]
    common.report("best_of_n", args, [row for rows, _ in found for row in rows], [note for _, note in found])


if __name__ == "__main__":
    main()
