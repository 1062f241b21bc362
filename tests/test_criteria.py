"""Criteria that a user gives, one rubric for a group, and the score of one response, on a simulated judge."""

import asyncio
import json
import re
from concurrent.futures import Future

import pytest

import rmr1
from conftest import call
from judge.backends import Answer, no_answer
from lib.pairs import Pair
from rmr1 import Judge
from rubrics import WRITE_CRITERIA, WRITE_SCORE

RESPONSE = re.compile(r"Response\]\n(.*)\n\[The End")
CRITERIA = re.compile(
    r"\[The Start of the Criteria\]\n(.*)\n\[The End of the Criteria\]", re.DOTALL
)


class Model:
    """Judges numbers by criteria: the larger wins, or the smaller where the criteria say "small".

    A single response is as good as its number, and every second score is one less. It writes "Size 100%: large" as
    the criteria of a question.
    """

    def __init__(self, rubric="Size 100%: large"):
        self.rubric, self.asked = rubric, []

    def submit(self, requests):
        futures = []
        for request in requests:
            future = Future()
            future.set_result(self.answer(*request))
            futures.append(future)
        return futures

    def answer(self, messages, seed, temperature):
        system, user = (message["content"] for message in messages)
        criteria = CRITERIA.search(user)
        numbers = [int(text.split()[-1]) for text in RESPONSE.findall(user)]
        self.asked.append((numbers, criteria and criteria[1], temperature))
        if system == WRITE_CRITERIA:
            return Answer(f"<rubric>{self.rubric}</rubric>", "stop", 5)
        if system == WRITE_SCORE:
            score = numbers[0] - len(self.asked) % 2
            met = "met" if score > 5 else "not met"
            return Answer(f"<eval>Size: {met}</eval><answer>[[{score}]]</answer>", "stop", 9)
        larger = numbers[0] > numbers[1]
        wins = larger != bool(criteria and "small" in criteria[1])
        decided = "\nDecided by: Size" if criteria else ""
        return Answer(
            f"<eval>x{decided}</eval><answer>[[{'A' if wins else 'B'}]]</answer>", "stop", 7
        )


def judge(**more):
    model = Model()
    return Judge(model, protocol="instruct", **more), model


def test_the_verdict_follows_the_criteria():
    one, model = judge()
    assert one.compare("q", "is 5", "is 3").verdict == "A"
    found = one.compare("q", "is 5", "is 3", criteria="2 Size: small\n2 Tone: kind")
    assert found.verdict == "B"
    assert found.vote.judgment.decided_by == "Size"
    assert {asked for _, asked, _ in model.asked} == {None, "Size 50%: small\nTone 50%: kind"}
    pair = Pair("p", [{"role": "user", "content": "q"}], "is 5", "is 3", "A", criteria="small")
    assert one.compare(pair).verdict == "B"
    assert one.compare(pair, criteria="large").verdict == "B", "a pair's own come first"
    both = one.compare_all([("q", "is 5", "is 3"), pair], criteria="large")
    assert [comparison.verdict for comparison in both] == ["A", "B"]


def test_rankings_and_rewards_follow_the_criteria():
    one, _ = judge()
    texts = [f"is {n}" for n in (4, 1, 3)]
    assert one.rank("q", texts).order == [0, 2, 1]
    ranked = one.rank("q", texts, criteria=["Size 100%: small"])
    assert (ranked.order, ranked.criteria) == ([1, 2, 0], "Size 100%: small")
    rewards = one.reward(["q"] * 4, ["is 4", "is 1"] * 2, criteria=["small"] * 2 + [None] * 2)
    assert rewards[0] < rewards[1] and rewards[2] > rewards[3], (
        "each run of equal criteria is a group"
    )
    column = one.reward(["q"] * 2, ["is 4", "is 1"], criteria=("", ""))
    assert column[0] > column[1], "blank cells of a column"
    with pytest.raises(ValueError, match="2 prompts and 3 criteria"):
        one.reward(["q"] * 2, ["is 4", "is 1"], criteria=["small"] * 3)


def test_other_criteria_are_another_request(tmp_path):
    one, model = judge(journal=tmp_path / "journal.jsonl")
    for criteria in (None, "small", "large", "small"):
        one.compare("q", "is 5", "is 3", criteria=criteria)
    assert len(model.asked) == 6, "three criteria in two orders; the last are in the journal"


@pytest.mark.parametrize("criteria", ["", [], 7, "1 a: b\n1 c: d\ne"])
def test_unreadable_criteria_ask_for_nothing(criteria):
    one, model = judge()
    for ask in (
        lambda: one.compare("q", "is 5", "is 3", criteria=criteria),
        lambda: one.rank("q", ["is 5", "is 3"], criteria=criteria),
        lambda: one.score("q", "is 5", criteria=criteria),
    ):
        with pytest.raises(ValueError, match="criteria"):
            ask()
    assert not model.asked


def test_a_shared_rubric_is_written_once_and_without_the_responses():
    one, model = judge(rubric="shared")
    texts = [f"is {n}" for n in (4, 1, 3)]
    ranked = one.rank("q", texts)
    first, *others = model.asked
    assert first == ([], None, 0.0)
    assert {criteria for _, criteria, _ in others} == {"Size 100%: large"}
    assert (ranked.order, ranked.criteria) == ([0, 2, 1], "Size 100%: large")
    asked = len(model.asked)
    one.rank("q", texts[::-1])
    one.reward(["q"] * 3, texts)
    assert len(model.asked) == asked, "the same rubric, so the same requests"

    one.rank("q", texts, criteria="small")
    one.rank("another q", ["is 2", "is 2"])
    assert not any(numbers == [] for numbers, _, _ in model.asked[asked:]), "criteria come first"
    own, model = judge()
    own.reward(["q"] * 3, texts, rubric="shared")
    assert model.asked[0] == ([], None, 0.0)
    own.reward(["q"] * 3, texts, rubric=["a column", "of", "TRL"])
    assert own.rank("q", texts, rubric="shared").criteria == "Size 100%: large"
    with pytest.raises(ValueError, match="rubric: 'both' is not own or shared"):
        judge(rubric="both")
    with pytest.raises(ValueError, match="rubric: 'both' is not own or shared"):
        own.rank("q", texts, rubric="both")


def test_a_judge_that_fails_to_write_criteria_says_why():
    one, model = judge(rubric="shared")
    answer = model.answer

    def fails_once(messages, seed, temperature):
        if messages[0]["content"] == WRITE_CRITERIA:
            return no_answer("the server is down")
        return answer(messages, seed, temperature)

    model.answer = fails_once
    with pytest.warns(UserWarning, match="no answer from the server: the server is down"):
        assert one.rank("q", ["is 4", "is 1"]).order == [0, 1]


def test_a_question_without_readable_criteria_is_ranked_all_the_same():
    one, model = judge(rubric="shared")
    model.rubric = ""
    with pytest.warns(UserWarning, match="no criteria could be read"):
        ranked = one.rank("q", ["is 4", "is 1"])
    assert (ranked.order, ranked.criteria) == ([0, 1], None)


def test_a_score_is_a_mean_of_sampled_judgments():
    one, model = judge()
    found = one.score("q", "is 7", samples=4)
    assert found.score == 6.5
    assert found.stderr == pytest.approx((4 * 0.25 / 3) ** 0.5 / 2)
    assert found.met == {"Size": 1.0}
    assert [temperature for *_, temperature in model.asked] == [1.0] * 4
    assert len(found.votes) == 4 and found.votes[0].second is None
    half = one.score("q", "is 6", samples=2)
    assert (half.score, half.met) == (5.5, {"Size": 0.5})
    assert one.score("q", "is 3", samples=1).stderr is None
    scores = one.score_all([("q", "is 9"), ("q", "is 2")], samples=2)
    assert [round(score.score) for score in scores] == [8, 2]


def test_a_greedy_score_is_one_judgment():
    one, model = judge(temperature=0.0)
    found = one.score("q", "is 7", samples=4)
    assert (found.score, found.stderr, len(model.asked)) == (6, None, 1)


@pytest.mark.parametrize("single", ["qx", ("q",), ("q", "a", "b"), 7])
def test_singles_are_two_texts_each(single):
    with pytest.raises(ValueError, match=r"single 1 is not \(prompt, response\)"):
        judge()[0].score_all([single])


def test_a_judge_for_verl_goes_by_the_criteria_of_a_sample():
    compute_score = judge()[0].verl()
    info = {"question": "q"}
    large = asyncio.run(compute_score("", "is 5", "is 3", info))
    small = asyncio.run(compute_score("", "is 5", "is 3", info | {"criteria": "small"}))
    assert small["score"] < 0.5 < large["score"]


def test_what_is_no_score_has_a_reason():
    one, _ = judge()
    found = one.score("q", "is 77", samples=2)
    assert (found.score, found.stderr) == (None, None)
    assert found.reason == "answer is no number from [[1]] to [[10]]"
    with pytest.raises(ValueError, match="a budget of 0 samples"):
        one.score("q", "is 7", samples=0)
    with pytest.raises(ValueError, match="the response is empty"):
        one.score("q", " ")
    single = Pair("p", [{"role": "user", "content": "q"}], "is 5", None, None)
    with pytest.raises(ValueError, match="without two responses"):
        one.compare(single)


# ---------------------------------------------------------------- the command line


@pytest.fixture
def command(monkeypatch):
    """Runs rmr1.py with a simulated model; it has the model as `command.model`."""

    def run_command(*args, ok=True):
        run_command.model = Model()
        monkeypatch.setattr(rmr1, "make_backend", lambda *_, **__: about(run_command.model))
        return call(rmr1, *args, "--model", "m", "--protocol", "instruct", ok=ok)

    return run_command


def about(model):
    model.model, model.folder, model.about = "m", None, lambda: "m"
    return model


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_commands_judge_by_a_file_of_criteria(command, tmp_path):
    asked = tmp_path / "criteria.txt"
    asked.write_text("Size 100%: small\n")
    pair = ("--question", "q", "--a", "is 5", "--b", "is 3")
    text = command("judge", *pair, "--criteria", asked).stdout
    assert "verdict: B" in text and "Size 100%: small" in text
    line = json.loads(command("judge", *pair, "--criteria", asked, "--json").stdout)
    assert line["votes"][0]["judgment"]["decided_by"] == "Size"

    groups = write(
        tmp_path / "groups.jsonl",
        {"prompt": "q", "responses": ["is 4", "is 1"]},
        {"prompt": "q", "responses": ["is 4", "is 1"], "criteria": "large"},
    )
    lines = [
        json.loads(line)
        for line in command("rank", "--data", groups, "--criteria", asked).stdout.splitlines()
    ]
    assert [(line["order"], line["criteria"]) for line in lines] == [
        ([1, 0], "Size 100%: small"),
        ([0, 1], "large"),
    ]
    completions = write(
        tmp_path / "completions.jsonl",
        {"prompt": "q", "completion": "is 4"},
        {"prompt": "q", "completion": "is 1"},
    )
    lines = command("reward", "--data", completions, "--criteria", asked).stdout.splitlines()
    low, high = (json.loads(line)["reward"] for line in lines)
    assert low < high


def test_the_rank_command_shares_a_rubric(command, tmp_path):
    groups = write(tmp_path / "groups.jsonl", {"prompt": "q", "responses": ["is 4", "is 1"]})
    line = json.loads(command("rank", "--data", groups, "--rubric", "shared").stdout)
    assert line["criteria"] == "Size 100%: large"


def test_the_score_command_writes_a_line_for_each(command, tmp_path):
    rows = write(
        tmp_path / "rows.jsonl",
        {"id": "x", "prompt": "q", "response": "is 9"},
        {"prompt": "q", "response": "is 3", "criteria": "small"},
    )
    lines = command("score", "--data", rows, "--samples", 2).stdout.splitlines()
    first, second = map(json.loads, lines)
    assert (first["id"], first["score"], first["judgments"]) == ("x", 8.5, 2)
    assert (second["id"], second["score"]) == (2, 2.5)
    assert {criteria for _, criteria, _ in command.model.asked} == {None, "small"}
    one = json.loads(command("score", "--question", "q", "--response", "is 7").stdout)
    assert one["score"] == 6.5
    question = '{"role": "assistant", "content": "x"}'
    one = json.loads(command("score", "--question", question, "--response", "is 7").stdout)
    assert one["score"] == 6.5, "a text of the command line is taken word for word"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("score",), "name a response: --question and --response, neither blank, or --data"),
        (("score", "--question", "q", "--response", " "), "name a response"),
        (("score", "--question", "q", "--data", "x"), "--question: not read beside --data"),
        (("judge", "--criteria", "no-such-file"), "--criteria no-such-file"),
    ],
)
def test_a_wrong_use_is_one_sentence(command, args, sentence):
    done = command(*args, ok=False)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_a_file_of_mixed_criteria_names_its_line(command, tmp_path):
    asked = tmp_path / "criteria.txt"
    asked.write_text("1 Size: small\n1 Tone: kind\n\nkind\n")
    done = command("rank", "--data", "x", "--criteria", asked, ok=False)
    assert done.returncode == 2
    assert f"--criteria {asked}: criteria, line 3: 'kind' is not" in done.stderr
