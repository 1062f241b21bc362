"""How much better a response is, from the row to the report; and ties, which are kept and teach nothing."""

import json
import sys

import pytest

import eval as evaluation
import prepare
import rmr1
from judge import benchmarks
from lib.files import Failure, read_lines
from lib.pairs import pair_of, read_pairs, strength_of

BOTH = {"prompt": "q", "chosen": "good", "rejected": "bad"}
HELPSTEER = {"context": "q", "response1": "one", "response2": "two"}
HELPSTEER2 = {"prompt": "q", "response_1": "one", "response_2": "two"}
OURS = {"prompt": "q", "a": "one", "b": "two"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row, label, strength",
    [
        (HELPSTEER | {"overall_preference": -3}, "A", 3),
        (HELPSTEER | {"overall_preference": 1}, "B", 1),
        (HELPSTEER | {"overall_preference": 0}, None, None),
        (HELPSTEER2 | {"preference_strength": -2}, "A", 2),
        (HELPSTEER2 | {"preference_strength": 3}, "B", 3),
        (HELPSTEER2 | {"preference_strength": 0}, None, None),
        (OURS | {"label": "B", "meta": {"strength": 2}}, "B", 2),
        (OURS | {"label": "B"}, "B", None),
        (OURS | {"label": "tie"}, None, None),
        # Where a row has a label, nothing else makes it a tie.
        (OURS | {"label": "A", "overall_preference": 0}, "A", None),
        (OURS | {"label": "A", "score_chosen": 7, "score_rejected": 7}, "A", None),
        # Too large for a float, so it says a side and no strength.
        (HELPSTEER | {"overall_preference": -(10**400)}, "A", None),
    ],
)
def test_a_row_keeps_its_strength(row, label, strength):
    pair = pair_of(row, "1")
    assert (pair.label, pair.meta.get("strength")) == (label, strength)
    assert pair.swapped().meta == pair.meta
    again = pair_of(pair.row(), "1")
    assert again == pair, "as it is written"


@pytest.mark.parametrize(
    "scores, strength",
    [
        ((8.5, 6), 2.5),
        ((7, 7), 0),
        ((3, 8), None),
        ((float("nan"), 1), None),
        (("8", "6"), None),
        ((10**400, 0.5), None),
    ],
)
@pytest.mark.parametrize(
    "names", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")]
)
def test_scores_of_both_responses_are_a_strength(names, scores, strength):
    row = BOTH | dict(zip(names, scores))
    assert strength_of(row) == strength
    pair = pair_of(row, "1")
    better = None if strength == 0 else "good"
    assert {"A": pair.a, "B": pair.b, None: None}[pair.label] == better


def test_turns_of_helpsteer2_are_messages():
    """As its card has them; everywhere else such a line is a text."""
    prompt = "One?\n<extra_id_1>Assistant\n1\n2\n<extra_id_1>User\nMore?"
    row = HELPSTEER2 | {"prompt": prompt, "preference_strength": 1}
    turns = [("user", "One?"), ("assistant", "1\n2"), ("user", "More?")]
    context = pair_of(row, "1").context
    assert [(turn["role"], turn["content"]) for turn in context] == turns
    assert pair_of(OURS | {"label": "A", "prompt": prompt}, "1").context[0]["content"] == prompt

    unanswered = prompt.rpartition("\n<extra_id_1>User")[0]
    with pytest.raises(ValueError, match="does not end with a user message"):
        pair_of(row | {"prompt": unanswered}, "1")


@pytest.mark.parametrize("score", [None, "2", float("nan")])
def test_a_preference_that_is_none_is_refused(score):
    with pytest.raises(ValueError, match="preference_strength is .*no preference"):
        pair_of(HELPSTEER2 | {"preference_strength": score}, "1")


@pytest.mark.parametrize("row", [OURS, OURS | {"label": None}, OURS | {"label": "both"}])
def test_a_missing_or_unknown_label_is_no_tie(row):
    with pytest.raises(ValueError, match="unknown label"):
        pair_of(row, "1")


@pytest.mark.parametrize(
    "strength", ["much", None, True, 0, -2, float("nan"), float("inf"), 10**400]
)
def test_a_strength_is_a_finite_number_above_0(strength, tmp_path):
    row = OURS | {"label": "A", "meta": {"strength": strength}}
    path = write(tmp_path / "pairs.jsonl", [OURS | {"label": "A"}, row])
    with pytest.raises(Failure, match="pairs.jsonl:2: the strength in its meta is .*above 0"):
        read_pairs(path)


@pytest.mark.parametrize(
    "equal", [{"score_chosen": 7, "score_rejected": 7}, {"overall_preference": 0}]
)
def test_a_published_row_is_no_tie(equal):
    """It has a winner, and cannot be written without one."""
    row = {"context_messages": [{"role": "user", "content": "q"}], "winner": "model_a"}
    assert pair_of(row, "1").label == "A"
    with pytest.raises(ValueError, match="scores are equal"):
        pair_of(row | equal, "1")


def test_training_leaves_ties_out_and_says_how_many(tmp_path, capsys):
    rows = [OURS | {"label": label} for label in ("A", "tie", "B", "tie")]
    path = write(tmp_path / "pairs.jsonl", rows)
    assert [pair.label for pair in read_pairs(path)] == ["A", "B"]
    assert f"{path}: 2 ties left out" in capsys.readouterr().err
    assert [pair.label for pair in read_pairs(path, ties=True)] == ["A", None, "B", None]
    assert not capsys.readouterr().err

    with pytest.raises(Failure, match="no pairs in it"):
        read_pairs(write(path, rows[1:2]))


def test_prepare_keeps_ties_and_strengths(tmp_path, monkeypatch):
    rows = [
        {**HELPSTEER, "context": f"q {score} {n}", "overall_preference": score}
        for score in (-3, -1, 0, 2)
        for n in range(2)
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    command = [
        "prepare.py",
        "--source",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--split",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", command)
    prepare.main()
    path = tmp_path / "out/rl.jsonl"
    pairs = read_pairs(path, ties=True)
    assert sorted(pair.meta.get("strength", 0) for pair in pairs) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [pair.label for pair in pairs].count(None) == 2
    assert len([line for line in read_lines(path) if line["label"] == "tie"]) == 2
    assert "tie" in (tmp_path / "out/summary.txt").read_text()


def test_an_evaluation_lists_ties_and_reports_by_strength(tmp_path):
    rows = [HELPSTEER | {"overall_preference": score} for score in (-3, -1, 0, 2)]
    path = write(tmp_path / "rows.jsonl", rows)
    args = evaluation.arguments(["--model", "m", "--data", str(path), "--out", str(tmp_path)])
    pairs, left_out, _ = evaluation.collect_pairs(args)
    assert [row["item"] for row in left_out] == ["rows-3"] and "a tie" in left_out[0]["reason"]
    assert len(pairs) == 3

    right = {1: 0.0, 2: 1.0, 3: 1.0}
    items = {
        key: benchmarks.Item("", {(0, 1): right[pair.meta["strength"]]}, pair.meta)
        for key, pair in pairs.items()
    }
    metrics = benchmarks.pair_file(items)
    found = {name: benchmarks.value(m) for name, m in metrics.items() if "strength" in name}
    assert found == {"strength/1": 0, "strength/2": 1, "strength/3": 1}


def test_a_tie_can_be_judged(tmp_path):
    class Flags:
        data, line, skip_bad = write(tmp_path / "p.jsonl", [OURS | {"label": "tie"}]), None, False
        question = a = b = None

    (pair,) = rmr1.pairs_to_judge(Flags)
    assert pair.label is None


def test_a_tie_can_be_selected(tmp_path):
    """Its row is printed as it is, and its label is counted for nobody."""
    rows = [OURS | {"prompt": "q", "label": "tie"}, OURS | {"prompt": "r", "label": "B"}]
    found, pairs, _ = rmr1.different_pairs(write(tmp_path / "p.jsonl", rows))
    assert list(found) == rows and [pair.label for pair in pairs] == [None, "B"]
