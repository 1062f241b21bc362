"""The world `criteria` of data/toy.py: labels follow the criterion that is given, tests and training are apart, and
the oracle's texts are read back by the one parser."""

import hashlib
import json
import random
import re
from types import SimpleNamespace

import pytest

import distill
import toy as T
from lib.pairs import other_label, pair_of
from rubrics import PromptStyle, chat_messages, parse, written_criteria

TRUTH = {"solution", "criterion", "target", "quote_a", "quote_b", "value_a", "value_b"}
NAMES = (*T.SEEN, T.UNSEEN, T.ANSWER)


@pytest.fixture(scope="module")
def world():
    return make_world()


def make_world(**changes):
    """-> {split: [pair, ...]}, [trace of each pair of "sft"], [row of one response or none, ...]"""
    args = arguments(**changes)
    splits = T.make_splits(args)
    traces = T.oracle(splits["sft"], args.seed, 0.5, args.world)
    return splits, traces, T.single_rows(splits, args.seed)


def arguments(**changes):
    args = {"world": "criteria", "kinds": None, "seed": 0, "test_seed": 1, "sft": 300, "rl": 200}
    args |= {"test": 30, "style": None, "slips": 0.25, "parting": 0.0, "sft_parting": 0.3}
    return SimpleNamespace(**args | {"truth": 1.0, "given": 0.5} | changes)


def right_answer(pair):
    """The side whose answer is right, found anew from the question."""
    question = pair.context[0]["content"]
    numbers = [int(word) for word in re.findall(r"\d+", question)]
    said = {side: pair.meta[f"answer_{side.lower()}"] for side in "AB"}
    tests = {
        "add": lambda text: int(text) == sum(numbers),
        "mul": lambda text: int(text) == numbers[0] * numbers[1],
        "max": lambda text: int(text) == max(numbers),
        "count": lambda text: len(text.split()) == numbers[0],
        "endw": lambda text: text.split()[-1] == question.split()[-2],
    }
    (side,) = [side for side, text in said.items() if tests[pair.meta["kind"]](text)]
    return side


def preferred(pair):
    """The side that the words of the criteria prefer, found from the responses alone."""
    name, _, wanted = pair.criteria.partition(" 100%: ")
    openers = dict(zip(T.STYLES, T.OPENERS))
    if name == "Manners":
        met = [wanted in text.split() for text in (pair.a, pair.b)]
    elif name == "Style":
        met = [text.startswith(openers[wanted]) for text in (pair.a, pair.b)]
    else:
        return right_answer(pair)
    assert sum(met) == 1
    return "A" if met[0] else "B"


def test_labels_follow_the_criterion_and_without_one_the_answer(world):
    splits, _, _ = world
    for pair in sum((splits[name] for name in ("sft", "rl", "val", "test")), []):
        assert pair.label == (preferred(pair) if pair.criteria else right_answer(pair))
        assert bool(pair.criteria) == ("given" in pair.meta)
        assert len(TRUTH & set(pair.meta)) == (0 if pair.criteria else 6)
    pairs = splits["sft"]
    given = [pair for pair in pairs if pair.criteria]
    assert 0.4 < len(given) / len(pairs) < 0.6
    parts = [pair for pair in given if pair.label != right_answer(pair)]
    assert 0.25 < len(parts) / len(given) < 0.5  # a quarter of the criteria is the answer


def test_the_five_rows_of_a_test_are_one_pair_and_its_two_criteria_disagree(world):
    tests = world[0]["test"]
    assert len(tests) == 150 and len({pair.id for pair in tests}) == 150
    for group in zip(*[iter(tests)] * 5):
        plain, first, second, held_out, unseen = group
        sources = [pair.source for pair in group]
        assert sources == ["plain", "first", "second", "held-out", "unseen"]
        assert len({(str(pair.context), pair.a, pair.b) for pair in group}) == 1
        assert first.label == plain.label == other_label(second.label)
        assert held_out.meta["given"] == T.HELD_OUT[plain.meta["kind"]]
        assert unseen.meta["given"] == T.UNSEEN
        assert T.UNSEEN not in (first.meta["given"], second.meta["given"])
    kinds = {pair.meta["kind"] for pair in tests}
    assert kinds == set(T.KINDS["criteria"])


def test_training_has_neither_the_held_out_combinations_nor_the_unseen_criterion(world):
    splits, _, rows = world
    assert {T.HELD_OUT[kind] for kind in T.KINDS["criteria"]} == set(T.SEEN)
    met = {"sft": set(), "rl": set(), "score": set()}
    for split, names in met.items():
        for pair in splits[split]:
            if pair.criteria:
                names.add((pair.meta["kind"], pair.meta["given"]))
    kinds = T.KINDS["criteria"]
    wanted = {(kind, name) for kind in kinds for name in (*T.SEEN, T.ANSWER)}
    wanted -= {(kind, T.HELD_OUT[kind]) for kind in kinds}
    assert met["sft"] == met["rl"] == wanted and met["score"] <= wanted
    assert {row["meta"].get("given") for row in rows} <= {None, *T.SEEN, T.ANSWER}


def test_no_question_with_both_answers_is_in_training_and_in_a_test():
    splits = T.make_splits(arguments(kinds=["endw"], sft=2000, test=60))
    asked = {}
    for split, pairs in splits.items():
        asked[split] = {
            (pair.context[0]["content"], frozenset((pair.meta["answer_a"], pair.meta["answer_b"])))
            for pair in pairs
        }
    for split in ("sft", "rl", "write", "score"):
        assert not asked[split] & (asked["test"] | asked["val"])


@pytest.mark.parametrize("name", NAMES)
def test_a_thinker_follows_the_criterion_in_both_orders(name):
    seen = 0
    for index in range(60):
        plain = T.make_pair(0, "x", index, world="criteria")
        if not T.winner_by(plain.meta, name):
            continue
        pair = T.with_criterion(plain, name)
        for ordered in (pair, pair.swapped()):
            text = T.think(ordered)
            judgment = parse(text)
            assert judgment.verdict == ordered.label == preferred(ordered)
            assert not judgment.rubric and not judgment.solution
            assert judgment.type.lower() == ordered.type
            first_line = ordered.criteria.partition("\n")[0]
            assert first_line.startswith(judgment.decided_by) and judgment.decided_by
            for side, response in (("A", ordered.a), ("B", ordered.b)):
                (quote,) = judgment.quotes[side]
                assert quote in response
            assert not distill.fault(text, "stop", ordered)
            seen += 1
    assert seen > 20


def test_who_ignores_the_criterion_goes_by_the_answer():
    for index in range(60):
        plain = T.make_pair(0, "x", index, world="criteria")
        for name in filter(lambda name: T.winner_by(plain.meta, name), T.SEEN):
            pair = T.with_criterion(plain, name)
            judgment = parse(T.ignore(pair))
            assert judgment.verdict == plain.label and not judgment.decided_by
            assert T.habit_of(T.ignore(pair), pair) == "by the answer instead"
        pair = T.with_criterion(plain, T.ANSWER)
        assert T.ignore(pair) == T.think(pair)


def test_half_of_the_first_pass_is_lazy_and_half_of_what_it_gets_wrong_is_repaired(world):
    splits, traces, _ = world
    habits = {True: [], False: []}
    for pair, trace in zip(splits["sft"], traces):
        habits[bool(pair.criteria)].append(T.habit_of(trace, pair))
        right = parse(trace).verdict == pair.label
        assert right or habits[bool(pair.criteria)][-1] in ("by looks", "by the answer instead")
    # Of .5 by looks half is wrong, and half of that repaired. A judgment that names no criterion is never right.
    assert 0.25 < habits[False].count("by looks") / len(habits[False]) < 0.5
    assert 0.1 < habits[True].count("by the answer instead") / len(habits[True]) < 0.3


def test_the_criteria_of_a_question_are_those_that_a_shared_rubric_gives():
    for index in range(40):
        plain = T.make_pair(0, "x", index, world="criteria")
        pair = T.with_criterion(plain, T.ANSWER)
        assert pair.criteria == written_criteria(parse(T.think(plain)))
        trace = T.own_criteria(plain.meta)
        assert pair.criteria == written_criteria(parse(trace))
        assert pair.label == plain.label


def test_single_rows_are_read_back(world):
    _, _, rows = world
    assert [row["source"] for row in rows] == ["write"] * 30 + ["score"] * 150
    for number, row in enumerate(json.loads(json.dumps(rows))):
        pair = pair_of(row, number, singles=True)
        assert pair.trace and not pair.b and pair.label is None
        if row["source"] == "write":
            assert not pair.a and not pair.criteria
            assert written_criteria(parse(pair.trace)) and "<eval>" not in pair.trace
            continue
        judgment = parse(pair.trace, single=True)
        ((name, met),) = judgment.met
        assert judgment.quotes["A"][0] in pair.a
        if pair.criteria and not judgment.rubric:
            assert pair.criteria.startswith(name)
        if "Style 100%: polish" in pair.trace:
            assert (judgment.score - 1) // 3 in (pair.meta["style_a"], pair.meta["style_a"] + 1)
        else:
            assert met == (judgment.score > 5)


def test_a_sound_score_is_above_five_where_the_criterion_is_met():
    rng = random.Random(0)
    scores = {True: set(), False: set()}
    for index in range(300):
        plain = T.make_pair(0, "x", index, world="criteria")
        name = NAMES[index % 6]
        pair = T.with_criterion(plain, name) if T.winner_by(plain.meta, name) else plain
        judgment = parse(T.score_by_criterion(pair, rng), single=True)
        met = pair.label == "A"
        assert [is_met for _, is_met in judgment.met] == [met]
        assert bool(judgment.rubric or judgment.solution) == (pair.criteria is None)
        scores[met].add(judgment.score)
    assert scores == {True: {6, 7, 8, 9, 10}, False: {1, 2, 3, 4, 5}}


def test_no_share_of_given_criteria_is_the_control():
    splits, traces, rows = make_world(given=0, sft=60, rl=40, test=5)
    for split in ("sft", "rl", "val", "write", "score"):
        assert not any(pair.criteria for pair in splits[split])
    assert not any("criteria" in row for row in rows)
    assert not any("Decided by" in trace for trace in traces)
    assert sum(bool(pair.criteria) for pair in splits["test"]) == 20  # its tests are the same
    assert splits["test"] == make_world(sft=60, rl=40, test=5)[0]["test"]


def test_every_word_of_the_world_is_a_token_of_its_own():
    pieces = T.all_pieces("criteria")
    style = PromptStyle(system=T.SYSTEM)
    splits, traces, rows = make_world(sft=100, rl=20, test=20)
    pairs = [*sum(splits.values(), []), *(pair_of(row, 0, singles=True) for row in rows)]
    texts = [*traces, *(row["trace"] for row in rows)]
    texts += [message["content"] for pair in pairs for message in chat_messages(pair, style)]
    for text in texts:
        assert set(re.findall(T.PIECES, text)) <= pieces, text


# Rows and vocabulary of the other worlds, by the code before there was this one.
BEFORE = {
    "looks": "c3c4f2894c61328a",
    "leap": "85ac6962d20ce52f",
    "shortcut": "63ce7f047980f415",
    "steps": "75ef1aa8cc17c6ac",
}


@pytest.mark.parametrize("name", BEFORE)
def test_the_other_worlds_are_as_they_were(name):
    """A digest of a small world's rows, and of its vocabulary."""
    splits, traces, rows = make_world(world=name, sft=100, rl=40, test=10)
    assert not rows
    pairs = [pair.row() for split in ("sft", "rl", "val", "test") for pair in splits[split]]
    text = json.dumps([pairs, traces, sorted(T.all_pieces(name))])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == BEFORE[name]
