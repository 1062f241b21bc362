"""
What does a judgment buy: the best of N responses, the better of two; and what does a label by people add?

    OMP_NUM_THREADS=2 python bench/best_of_n.py                                # the demo's judge
    OMP_NUM_THREADS=2 python bench/best_of_n.py --model runs/demo/sft/model    # one that mostly looks

**Best of N.** Questions of data/toy.py: every product that has 16 responses, as many on fruits and on last words.
Each gets N different responses: random openers, answers as often as the toy world writes them, each right with chance
.3, at least one and not all; a product has three right responses at most. right: share of the right responses. gain:
(quality of the pick - mean) / (best - mean), which is 1 for a right pick and 0 on average for a random one.
judgments, seconds: a question, while all questions of a row are ranked together.

**Votes.** Pairs of --data, each with --seeds seeds. accuracy counts a tie half; se is over pairs, their seeds
averaged; judgments: votes a pair. "T=1": all votes are sampled; "greedy first": all but the first in each order, as
in `Judge.compare`. Adaptive votes stop when a response is two ahead; all are among the 8 fixed ones, and are not
sampled again.

**Labels.** A share of the pairs gets people's label in place of the verdict of adaptive votes: those that
`rmr1.py select` picks, or random ones; means of --draws draws of each seed. wrong: share of the labelled pairs whose
verdict was wrong, a tie half. drawn: how often the judge is right by the labels that were drawn at random (of select's
a tenth), sd over draws and seeds. decided: share of all verdicts that these labels guarantee to be right in .9; kept:
share of the guarantees that hold. "T=1" is select with --no-greedy, "greedy first" without.
"""

import itertools
import random
from collections import defaultdict
from statistics import mean, stdev

import common
import toy
from judge import ranking
from lib.files import Flags, number, run_main
from lib.pairs import read_pairs
from rmr1 import Judge, all_of, run_sync

RIGHT_SHARE = 0.3  # of the responses
TARGET = 0.9  # of the guarantee


# ---------------------------------------------------------------- best of N


def questions():
    """-> [(question, right answers, wrong answers), ...], an answer as often as the toy world writes it"""
    rng = random.Random("questions")
    found = {kind: {} for kind in ("mul", "count", "endw")}  # {kind: {question: its row}}
    for _ in range(20_000):
        problem = toy.make_problem(rng)
        if problem.kind in found:
            row = (problem.question, [], [])
            row = found[problem.kind].setdefault(problem.question, row)
            row[1].append(problem.right)
            row[2].append(problem.wrong)

    products = []
    for _, row in sorted(found["mul"].items()):
        answers = 1 + len(set(row[2]))
        if len(toy.OPENERS) * answers > 16:
            products.append(row)
    others = []
    for kind in ("count", "endw"):
        others += rng.choices(list(found[kind].values()), k=len(products))
    return products + others


def responses_with(answers, rng):
    """Different responses with these answers, each answer behind a random opener, in random order."""
    responses = []
    for answer in rng.sample(answers, len(answers)):
        responses.append(f"{rng.choice(toy.OPENERS)} {answer}")
    return list(dict.fromkeys(responses))


def candidates(right, wrong, n, rng):
    """-> n different responses in random order, the quality of each: 1 where it is right, else 0"""
    right = responses_with(right, rng)
    wrong = responses_with(wrong, rng)
    drawn = sum(rng.random() < RIGHT_SHARE for _ in range(n))
    most = min(n - 1, len(right))
    least = max(1, n - len(wrong))
    rights = max(least, min(drawn, most))
    responses = [(text, 1) for text in right[:rights]]
    responses += [(text, 0) for text in wrong[: n - rights]]
    texts, quality = zip(*rng.sample(responses, n))
    return texts, quality


def gain_of(quality, pick):
    """Of a pick: 1 for the best response, 0 for one of mean quality."""
    average = mean(quality)
    return (quality[pick] - average) / (max(quality) - average)


def with_error(name, values):
    return {
        name: mean(values),
        "se": stdev(values) / len(values) ** 0.5,
    }


def difference_of(ours, theirs):
    """Of two lists of accuracies, one each for every pair."""
    return with_error("accuracy", [a - b for a, b in zip(ours, theirs)])


def best_of(judge, n):
    """A row for every way to choose one of n."""
    rng = random.Random(f"candidates {n}")
    groups, qualities = [], []  # [(question, texts), ...], the quality of each text
    for question, right, wrong in questions():
        texts, quality = candidates(right, wrong, n, rng)
        groups.append((question, texts))
        qualities.append(quality)
    yield {"": f"best of {n}: {len(groups)} questions", "right": mean(map(mean, qualities))}

    ways = {
        "knockout": ("best", 2 * (n - 1)),
        "ring, N": ("all", n),
        "ring, 2N": ("all", 2 * n),
        "ring, 4N": ("all", 4 * n),
    }
    for name, (goal, budget) in ways.items():
        judge.journal.answers.clear()  # each way pays for its own judgments
        judge.backend.engine.llm.reset_prefix_cache()
        work = all_of(judge.arank(*group, goal, budget) for group in groups)
        seconds, rankings = common.timed(run_sync, work)
        gains = []
        for quality, found in zip(qualities, rankings):
            gains.append(gain_of(quality, found.order[0]))
        yield {
            "": f"best of {n}: {name}",
            **with_error("gain", gains),
            "judgments": mean(len(found.votes) for found in rankings),
            "seconds": seconds / len(groups),
        }

    random_gains, longest_gains = [], []
    for (_, texts), quality in zip(groups, qualities):
        random_gains.append(gain_of(quality, rng.randrange(n)))
        longest_gains.append(gain_of(quality, longest_of(texts, rng)))
    yield {"": f"best of {n}: random"} | with_error("gain", random_gains)
    yield {"": f"best of {n}: longest"} | with_error("gain", longest_gains)


def longest_of(texts, rng):
    """The place of the longest text, of several a random one."""
    longest = max(map(len, texts))
    places = [place for place, text in enumerate(texts) if len(text) == longest]
    return rng.choice(places)


# ---------------------------------------------------------------- votes


def vote_on_pairs(judge, pairs, budget, lead):
    """What `ranking.verdict` says of each pair, with "right": 1, 0, or .5 for a tie or nothing read, and
    "spent": its votes."""

    def votes_on(pair):
        def pair_in_order(first, _):
            return pair.swapped() if first else pair

        return judge.collect_votes(pair_in_order, ranking.pair_schedule(budget, lead))

    collected = run_sync(all_of(votes_on(pair) for pair in pairs))
    outcomes = []
    for pair, (results, votes) in zip(pairs, collected):
        outcome = ranking.verdict(results)
        outcome["spent"] = len(votes)
        outcome["right"] = 0.5
        if outcome["verdict"] in ("A", "B"):
            outcome["right"] = float(outcome["verdict"] == pair.label)
        outcomes.append(outcome)
    return outcomes


def mean_over_seeds(outcomes, key):
    """[[outcome of each pair], ...] of each seed -> the mean of a number for each pair"""
    return [mean(outcome[key] for outcome in of_pair) for of_pair in zip(*outcomes)]


def vote_rows(args, judge, pairs, mode):
    """A row for every number of votes, and for what labels are worth beside the adaptive ones."""
    ways = {
        "8 fixed": (8, 9),
        "4 fixed": (4, 9),
        "2 fixed": (2, 9),
        "adaptive, up to 8": (8, 2),
    }  # {name: (budget, lead)}
    right, sampled = {}, set()
    judge.greedy = mode == "greedy first"
    for name, (budget, lead) in ways.items():
        outcomes = []
        for judge.seed in range(args.seeds):
            outcomes.append(vote_on_pairs(judge, pairs, budget, lead))
        right[name] = mean_over_seeds(outcomes, "right")
        yield {
            "": f"{mode}: {name}",
            **with_error("accuracy", right[name]),
            "judgments": mean(mean_over_seeds(outcomes, "spent")),
        }
        sampled.add(len(judge.journal.answers))
    assert len(sampled) == 1, "something was judged twice"

    yield {
        "": f"{mode}: adaptive less 8 fixed",
        **difference_of(right["adaptive, up to 8"], right["8 fixed"]),
    }
    yield from label_rows(args, pairs, outcomes, mode)


# ---------------------------------------------------------------- labels


def with_labels(outcomes, drawn, disputed):
    """What labels of some pairs are worth. drawn, disputed: their places

    -> right      of each pair, those with a label included
       wrong      share of the labelled pairs whose verdict was wrong
       drawn      accuracy of the judge by the drawn labels
       decided    share of the pairs that they guarantee
       kept       does the guarantee hold? None where there is none
    """
    right = [outcome["right"] for outcome in outcomes]
    share = [outcome["share"] or 0 for outcome in outcomes]
    drawn_labels = [(share[place], right[place] == 1) for place in drawn]
    lowest = ranking.guarantee(drawn_labels, TARGET)
    sure = []  # are the guaranteed verdicts right?
    if lowest:
        sure = [right[place] for place in range(len(right)) if share[place] >= lowest]
    labelled = {*drawn, *disputed}
    return {
        "right": [1 if place in labelled else r for place, r in enumerate(right)],
        "wrong": 1 - mean(right[place] for place in labelled),
        "drawn": mean(right[place] for place in drawn),
        "decided": len(sure) / len(outcomes),
        "kept": mean(sure) >= TARGET if sure else None,
    }


def pick_pairs(way, keys, outcomes, count):
    """-> places of the drawn and of the disputed pairs, `count` together"""
    if way == "at random":
        return ranking.in_hash_order(keys)[:count], []
    return ranking.select_pairs(keys, [outcome["win"] for outcome in outcomes], count)


def label_rows(args, pairs, outcomes_of_seeds, mode):
    """A row for every share of pairs whose label is bought, picked by `select` or at random."""
    for percent in (5, 10, 20, 30, 50):
        count = len(pairs) * percent // 100
        accuracy = {}
        for way in ("select", "at random"):
            columns = defaultdict(list)
            for outcomes, draw in itertools.product(outcomes_of_seeds, range(args.draws)):
                keys = [f"{draw}/{pair.id}" for pair in pairs]
                found = with_labels(outcomes, *pick_pairs(way, keys, outcomes, count))
                for name, value in found.items():
                    columns[name].append(value)
            accuracy[way] = [mean(values) for values in zip(*columns["right"])]
            kept = [value for value in columns["kept"] if value is not None]
            yield {
                "": f"{mode}: {percent} % {way}",
                **with_error("accuracy", accuracy[way]),
                "wrong": mean(columns["wrong"]),
                "drawn": mean(columns["drawn"]),
                "sd": stdev(columns["drawn"]),
                "decided": mean(columns["decided"]),
                "kept": mean(kept) if kept else None,
            }
        yield {
            "": f"{mode}: {percent} % select less at random",
            **difference_of(accuracy["select"], accuracy["at random"]),
        }


def flags():
    parser = Flags(__doc__)
    arg = parser.add_argument
    arg("--model", default="runs/demo/grpo/model", help="folder of a judge that the demo trained")
    arg("--data", default="runs/demo/data/test.jsonl", help="pairs to vote on")
    arg("--seeds", type=number(int, 1), default=4, help="seeds of the votes")
    arg("--draws", type=number(int, 2), default=25, help="random draws of labels for each seed")
    return parser


def main():
    args = flags().parse_args()
    judge = Judge(args.model, max_tokens=56, dtype="float32", max_len=100)
    pairs = read_pairs(args.data)
    judge.compare_all(pairs[:50])  # warms up
    rows = []
    for n in (2, 4, 8, 16):
        rows += best_of(judge, n)
    for mode in ("T=1", "greedy first"):
        rows += vote_rows(args, judge, pairs, mode)
    common.report(rows)


if __name__ == "__main__":
    run_main(main)
