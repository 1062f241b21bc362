"""
What does a judgment buy: the best of N responses, the better of two; and what does a label by people add?

    OMP_NUM_THREADS=2 python bench/best_of_n.py                                # the demo's judge
    OMP_NUM_THREADS=2 python bench/best_of_n.py --model runs/demo/sft/model    # one that mostly looks
    OMP_NUM_THREADS=2 python bench/best_of_n.py --world criteria --model JUDGE --scorer SCORER

The first two print the tables of best of N, votes and labels, the third that of own rubrics, a shared one and scores.

**Best of N.** Questions of data/toy.py: every product that has 16 responses, as many on fruits and on last words.
Each gets N different responses: random openers, answers as often as the toy world writes them, each right with chance
.3, at least one and not all; a product has three right responses at most. right: share of the right responses. gain:
(quality of the pick - mean) / (best - mean), which is 1 for a right pick and 0 on average for a random one.
judgments, seconds: a question, while all questions of a row are ranked together.

**Own rubrics, a shared one, scores.** Beside a judge that compares, --scorer is one that has learned scores
(docs/forks.md). The same questions, 8 responses each. own, shared: `Judge.rank` by --model with this rubric; score:
the mean of so many `Judge.score` by --scorer. gain: as above, the mean over the responses that share the highest
value. auc: of a right and a wrong response to the same question, the share in which the right one has the higher
value, a tie half; auc over all: the same with responses to different questions too. judgments, prompt and completion
tokens: a question, with those that write its shared rubric, all counted as if no two questions were equal. orders
agree: of the couples of responses that were compared in both orders, those with the same winner in both. unread:
judgments without a verdict or a score. written: questions whose shared rubric could be read; the others are compared
by own rubrics.

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
from concurrent.futures import Future
from statistics import mean, stdev

import common
import toy
from judge import ranking
from lib.files import Flags, number, run_main
from lib.pairs import read_pairs
from rmr1 import RUBRICS_OF_A_GROUP, Judge, all_of, run_sync

RIGHT_SHARE = 0.3  # of the responses
TARGET = 0.9  # of the guarantee
GROUP_SIZE = 8  # responses of a question in the table of own rubrics, a shared one, scores
SAMPLES = (1, 4, 8)  # scores of a response
ROOM = {"looks": (56, 100), "criteria": (56, 160)}  # of a judgment, and with its prompt, in tokens


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


def responses_with(answers, rng, world):
    """Different responses with these answers, each answer behind a random opener, in random order."""
    responses = []
    for answer in rng.sample(answers, len(answers)):
        opener = rng.choice(toy.OPENERS)
        if world == "criteria":
            opener += f" {rng.choice(toy.MANNERS)}"
        responses.append(f"{opener} {answer}")
    return list(dict.fromkeys(responses))


def candidates(right, wrong, n, rng, world="looks"):
    """-> n different responses in random order, the quality of each: 1 where it is right, else 0"""
    right = responses_with(right, rng, world)
    wrong = responses_with(wrong, rng, world)
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


def draw_groups(n, rng, world):
    """-> [(question, n responses), ...], [the quality of each response, ...] of every question"""
    groups, qualities = [], []
    for question, right, wrong in questions():
        texts, quality = candidates(right, wrong, n, rng, world)
        groups.append((question, texts))
        qualities.append(quality)
    return groups, qualities


def forget(judge):
    """Each way pays for its own judgments."""
    judge.journal.answers.clear()
    judge.backend.engine.llm.reset_prefix_cache()


def best_of(judge, n, world):
    """A row for every way to choose one of n."""
    rng = random.Random(f"candidates {n}")
    groups, qualities = draw_groups(n, rng, world)
    yield {"": f"best of {n}: {len(groups)} questions", "right": mean(map(mean, qualities))}

    ways = {
        "knockout": ("best", 2 * (n - 1)),
        "ring, N": ("all", n),
        "ring, 2N": ("all", 2 * n),
        "ring, 4N": ("all", 4 * n),
    }
    for name, (goal, budget) in ways.items():
        forget(judge)
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


# ---------------------------------------------------------------- own rubrics, a shared one, scores


def way_rows(judge, scorer, world, most):
    """A row for every way to judge the responses to a question. most: questions at most"""
    rng = random.Random(f"candidates {GROUP_SIZE}")
    groups, qualities = draw_groups(GROUP_SIZE, rng, world)
    picked = rng.sample(range(len(groups)), min(most, len(groups)))
    groups = [groups[place] for place in picked]
    qualities = [qualities[place] for place in picked]
    yield {"": f"{len(groups)} questions, {GROUP_SIZE} responses each"}
    for rubric in RUBRICS_OF_A_GROUP:
        yield from rubric_rows(judge, groups, qualities, rubric)
    for samples in SAMPLES:
        yield score_row(scorer, groups, qualities, samples)


def rubric_rows(judge, groups, qualities, rubric):
    """A row for each schedule of comparisons with this rubric."""
    schedules = {"knockout": ("best", 2 * (GROUP_SIZE - 1)), "ring, 4N": ("all", 4 * GROUP_SIZE)}
    for name, (goal, budget) in schedules.items():
        work = (judge.arank(*group, goal, budget, rubric=rubric) for group in groups)
        rankings, costs = ask_afresh(judge, work)
        agreeing = []
        for found in rankings:
            agreeing += agreements(found.votes)
        row = {
            "": f"{rubric}: {name}",
            **goodness([found.reward for found in rankings], qualities),
            **{what: total / len(groups) for what, total in costs.items()},
            "orders agree": mean(agreeing) if agreeing else None,
            "unread": unread_share(rankings, "verdict"),
        }
        if rubric == "shared":
            row["written"] = mean(found.criteria is not None for found in rankings)
        yield row


def score_row(scorer, groups, qualities, samples):
    """The row of mean scores, each of so many samples."""
    singles = []
    for question, texts in groups:
        singles += [(question, text) for text in texts]
    work = (scorer.ascore(*single, samples=samples) for single in singles)
    scores, costs = ask_afresh(scorer, work)
    values = []
    for start in range(0, len(scores), GROUP_SIZE):
        values.append([found.score for found in scores[start : start + GROUP_SIZE]])
    return {
        "": f"score: {samples} a response",
        **goodness(values, qualities),
        **{what: total / len(groups) for what, total in costs.items()},
        "unread": unread_share(scores, "score"),
    }


def ask_afresh(judge, coroutines):
    """Results of coroutines that ask the judge, which has forgotten its answers, and what they cost together.

    A request that equals an earlier one is answered once, but counts again.
    """
    forget(judge)
    submit, sources = judge.submit, []

    def keep_sources(keyed_requests):
        new = submit(keyed_requests)
        sources.extend(source for source, _ in new)
        return new

    judge.submit = keep_sources
    seconds, results = common.timed(run_sync, all_of(coroutines))
    judge.submit = submit
    answers = [source.result() if isinstance(source, Future) else source for source in sources]
    costs = {
        "judgments": len(answers),
        "prompt tokens": sum(answer.prompt_tokens for answer in answers),
        "completion tokens": sum(answer.tokens for answer in answers),
        "seconds": seconds,
    }
    return results, costs


def goodness(values, qualities):
    """How well values tell right responses from wrong ones.

    values     [[number, ...], ...] of the responses to each question; None counts as the lowest
    qualities  the same of 1 and 0
    """
    gains, areas = [], []  # of each question
    all_values, all_quality = [], []
    for value, quality in zip(values, qualities):
        value = [number or 0 for number in value]  # all are above 0
        gains.append(gain_of_highest(value, quality))
        areas.append(auc(value, quality))
        all_values += value
        all_quality += quality
    return {
        **with_error("gain", gains),
        "auc": mean(areas),
        "auc over all": auc(all_values, all_quality),
    }


def gain_of_highest(values, quality):
    """Of a response with the highest value: the mean over those that share it."""
    highest = max(values)
    return mean(gain_of(quality, place) for place, value in enumerate(values) if value == highest)


def auc(values, quality):
    """The share of right responses' values above those of wrong ones, a tie half: the area under the ROC curve."""
    right, wrong = [], []
    for value, is_right in zip(values, quality):
        (right if is_right else wrong).append(value)
    above = []
    for of_right, of_wrong in itertools.product(right, wrong):
        above.append(0.5 if of_right == of_wrong else of_right > of_wrong)
    return mean(above)


def agreements(votes):
    """Of each two responses that have a verdict in both orders: is the winner the same? First votes count."""
    winners = defaultdict(dict)  # {the two responses: {the one shown first: the winner}}
    for vote in votes:
        if vote.verdict:
            winner = vote.first if vote.verdict == "A" else vote.second
            winners[frozenset((vote.first, vote.second))].setdefault(vote.first, winner)
    agree = []
    for of_order in winners.values():
        if len(of_order) == 2:
            first, second = of_order.values()
            agree.append(first == second)
    return agree


def unread_share(found, name):
    """The share of all judgments whose verdict or score could not be read. name: which of the two"""
    votes = [vote for one in found for vote in one.votes]
    return mean(getattr(vote.judgment, name) is None for vote in votes)


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
    arg("--world", choices=tuple(ROOM), default="looks", help="of data/toy.py: its responses")
    arg("--scorer", help="folder of a judge that scores: own rubrics, a shared one, scores")
    arg("--questions", type=number(int, 2), default=1000, help="with --scorer: at most so many")
    arg("--seeds", type=number(int, 1), default=4, help="seeds of the votes")
    arg("--draws", type=number(int, 2), default=25, help="random draws of labels for each seed")
    return parser


def judge_in(world, model):
    max_tokens, max_len = ROOM[world]
    return Judge(model, max_tokens=max_tokens, dtype="float32", max_len=max_len, memory=0.4)


def main():
    args = flags().parse_args()
    judge = judge_in(args.world, args.model)
    if args.scorer:
        scorer = judge_in(args.world, args.scorer)
        list(way_rows(judge, scorer, args.world, 2))  # warms up
        return common.report(list(way_rows(judge, scorer, args.world, args.questions)))

    pairs = read_pairs(args.data)
    judge.compare_all(pairs[:50])  # warms up
    rows = []
    for n in (2, 4, 8, 16):
        rows += best_of(judge, n, args.world)
    for mode in ("T=1", "greedy first"):
        rows += vote_rows(args, judge, pairs, mode)
    common.report(rows)


if __name__ == "__main__":
    run_main(main)
