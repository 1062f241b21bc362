"""The numbers of bench/best_of_n.py for a judge whose verdicts, criteria and scores are simulated."""

import random
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import best_of_n as B

from judge.backends import Answer
from rmr1 import Judge
from rubrics import WRITE_CRITERIA, WRITE_SCORE


class Knows:
    """A backend that knows which responses are right, prefers the later text of two that are equally good, and
    scores a right one 9, another one 2. What it writes for a question are criteria, or not."""

    def __init__(self, world, rubric="<rubric>Truth 100%: right</rubric>"):
        self.rubric = rubric
        self.model = self.folder = None
        self.engine = SimpleNamespace(llm=SimpleNamespace(reset_prefix_cache=lambda: None))
        self.right = {}  # {question and response: is it right?}
        rng = random.Random(f"candidates {B.GROUP_SIZE}")
        for (question, texts), quality in zip(*B.draw_groups(B.GROUP_SIZE, rng, world)):
            self.right |= {(question, text): good for text, good in zip(texts, quality)}

    def about(self):
        return "knows"

    def submit(self, requests):
        futures = []
        for (system, user), *_ in requests:
            future = Future()
            future.set_result(self.answer(system["content"], user["content"].splitlines()))
            futures.append(future)
        return futures

    def answer(self, system, lines):
        question = lines[1]
        texts = [
            lines[n + 1]
            for n, line in enumerate(lines)
            if line.startswith("[The Start of the Chat")
        ]
        texts += [
            lines[n + 1] for n, line in enumerate(lines) if line.startswith("[The Start of Chatbot")
        ]
        if system == WRITE_CRITERIA:
            return Answer(self.rubric, "stop", 5, 50)
        if system == WRITE_SCORE:
            score = 9 if self.right[question, texts[0]] else 2
            return Answer(f"<answer>[[{score}]]</answer>", "stop", 3, 30)
        a, b = ((self.right[question, text], text) for text in texts)
        return Answer(f"<answer>[[{'A' if a > b else 'B'}]]</answer>", "stop", 7, 70)


@pytest.mark.parametrize("world", B.ROOM)
def test_a_judge_that_knows_picks_right_whichever_way_it_is_asked(world):
    judge = Judge(Knows(world), protocol="instruct")
    rows = list(B.way_rows(judge, judge, world, 12))
    head, *rows = rows
    assert head == {"": "12 questions, 8 responses each"}
    assert all(row["gain"] == 1 and row["unread"] == 0 for row in rows)
    # A knockout does not compare all, so it orders no more than the best.
    assert all(row["auc"] == 1 or "knockout" in row[""] for row in rows)
    rows = {row.pop(""): row for row in rows}
    assert {name: row["judgments"] for name, row in rows.items()} == {
        "own: knockout": 14, "own: ring, 4N": 32, "shared: knockout": 15, "shared: ring, 4N": 33,
        "score: 1 a response": 8, "score: 4 a response": 32, "score: 8 a response": 64,
    }  # fmt: skip
    for rubric, written in (("own", 0), ("shared", 1)):
        row = rows[f"{rubric}: ring, 4N"]
        assert row["prompt tokens"] == 32 * 70 + 50 * written
        assert row["completion tokens"] == 32 * 7 + 5 * written
        assert row["orders agree"] == 1 and row.get("written") == (written or None)
    assert rows["score: 4 a response"]["prompt tokens"] == 32 * 30
    assert rows["score: 4 a response"]["auc over all"] == 1


def test_a_question_without_criteria_is_counted():
    judge = Judge(Knows("looks", rubric="well"), protocol="instruct")
    with pytest.warns(UserWarning, match="no criteria could be read"):
        rows = list(B.way_rows(judge, judge, "looks", 2))
    assert [row["written"] for row in rows if "written" in row] == [0, 0]


def test_values_that_tell_nothing_gain_nothing():
    qualities = [(1, 0, 0, 0), (0, 1, 1, 0)]
    equal = B.goodness([[3] * 4, [None] * 4], qualities)
    assert equal["gain"] == pytest.approx(0) and equal["auc"] == 0.5
    # None is the lowest: a 3 ties three and beats two, and each of two Nones ties two.
    assert equal["auc over all"] == pytest.approx((3 * 0.5 + 2 + 2 * 2 * 0.5) / 15)
    turned = B.goodness([[1, 2, 2, 2], [5, 4, None, 5]], qualities)
    assert turned["gain"] == pytest.approx((-1 / 3 - 1) / 2) and turned["auc"] == 0


def test_auc_counts_couples_by_hand():
    assert B.auc([5, 5, 7, 1], [1, 0, 0, 1]) == 0.5 / 4
    # Within each question the order is right, and over both it is not.
    apart = B.goodness([[2, 1], [9, 8]], [(1, 0), (1, 0)])
    assert apart["auc"] == 1 and apart["auc over all"] == 3 / 4
    assert B.gain_of_highest([4, 4, 1, 1], (1, 0, 0, 0)) == pytest.approx((1 - 1 / 3) / 2)


def test_orders_agree_where_the_winner_is_the_same():
    def vote(first, second, verdict):
        return SimpleNamespace(first=first, second=second, verdict=verdict)

    votes = [
        vote(0, 1, "A"), vote(1, 0, "B"),  # 0 wins both
        vote(2, 1, "A"), vote(1, 2, "A"),  # the first one shown wins
        vote(0, 2, "A"),  # in one order
        vote(3, 0, "A"), vote(0, 3, None), vote(0, 3, "B"),
        vote(3, 0, "B"),  # not the first in its order
    ]  # fmt: skip
    assert sorted(B.agreements(votes)) == [False, True, True]
