"""The judge people use, on a simulated model: verdicts, rankings, rewards, one journal."""

import asyncio
import errno
import json
import re
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from unittest.mock import ANY

import pytest

import rmr1
from conftest import ROOT, Replies, call
from judge.backends import Answer
from judge.journal import Journal
from lib.files import Failure
from lib.pairs import Pair
from rmr1 import Judge
from rubrics import chat_messages
from serve.gateway import usage

SHOWN = re.compile(r"(?:Response\]\n|Chatbot [AB]: )(.*)\n\[The End")


def done(f, *args):
    future = Future()
    try:
        future.set_result(f(*args))
    except Exception as e:
        future.set_exception(e)
    return future


class Model:
    """Prefers the response that ends in the larger number, writes a judgment as it should be, and counts. says:
    (A's number, B's number, seed) -> "A", "B" or another text."""

    def __init__(self, says=lambda a, b, seed: "A" if a > b else "B"):
        self.says, self.asked = says, []

    def submit(self, requests):
        return [done(self.answer, *r) for r in requests]

    def answer(self, messages, seed, temperature):
        a, b = (float(x.split()[-1]) for x in SHOWN.findall(messages[-1]["content"]))
        self.asked.append((a, b, seed, temperature))
        said = self.says(a, b, seed)
        return Answer(
            f"<type>Chat</type><rubric>Size 100%</rubric><eval>x</eval><answer>[[{said}]]</answer>"
            if said in "AB"
            else said,
            "stop",
            7,
            11,
        )


def judge(says=None, **more):
    model = Model(says) if says else Model()
    return Judge(model, protocol="instruct", **more), model


def noisy(a, b, seed):
    """Right with a chance that grows with the difference: a function of the request's seed."""
    return "A" if (seed % 1000) / 1000 < 1 / (1 + 2.718 ** (b - a)) else "B"


def test_a_comparison_and_its_mirror_say_the_same():
    one, model = judge()
    x, y = one.compare("q", "is 5", "is 3"), one.compare("q", "is 3", "is 5")
    assert (x.verdict, y.verdict, x.consistent) == ("A", "B", True) and len(x.votes) == 2
    assert (x.win, x.low, x.high) == pytest.approx((1 - y.win, 1 - y.high, 1 - y.low))
    assert x.vote.judgment.rubric == [("Size", 100.0, "")] and model.asked[0][3] == 0.0
    assert {(v.first, v.second): v.verdict for v in x.votes} == {(0, 1): "A", (1, 0): "B"}


def test_votes_end_when_one_is_two_ahead_or_the_budget_is_spent():
    """A judge that always takes the first is asked to the end, and settles nothing."""
    first, model = judge(lambda a, b, seed: "A")
    found = first.compare("q", "is 5", "is 3", budget=6)
    assert (found.verdict, found.consistent, len(found.votes)) == ("tie", False, 6)
    assert found.reason == "as many votes for each" and found.low < found.win == 0.5 < found.high
    assert [t for *_, t in model.asked] == [0.0, 0.0] + [1.0] * 4, "the first of an order is greedy"
    assert len({seed for *_, seed, _ in model.asked}) == 6
    sampled, model = judge(greedy=False)
    sampled.compare("q", "is 5", "is 3")
    assert [t for *_, t in model.asked] == [1.0, 1.0]


def test_what_cannot_be_read_has_a_reason():
    found = judge(lambda *_: "both are fine")[0].compare("q", "is 5", "is 3", budget=2)
    assert (found.verdict, found.reason, found.vote) == (None, "no answer", None)
    ranked = judge(lambda *_: "both are fine")[0].rank("q", ["is 1", "is 2", "is 3"])
    assert ranked.reward == [None] * 3
    assert judge(lambda *_: "?")[0].reward(["q"] * 2, ["is 1", "is 2"]) == [None, None]


def test_equal_and_empty_responses():
    one, model = judge()
    found = one.compare("q", "is 5", "is 5")
    assert (found.verdict, found.reason) == ("tie", "the responses are equal") and not model.asked
    assert one.rank("q", ["is 5"] * 3).reward == [0.5] * 3 and not model.asked
    for bad, why in (
        ("  ", "b is empty"),
        (None, "two responses"),
        ([], "b does not end with"),
        ([{"role": "assistant", "content": None}], "b, message 1 has no content"),
    ):
        with pytest.raises(ValueError, match=why):
            one.compare("q", "is 5", bad)
    with pytest.raises(ValueError, match="1 responses: a ranking needs two or more"):
        one.rank("q", ["is 5"])
    with pytest.raises(ValueError, match="the context"):
        one.compare("", "is 5", "is 3")


@pytest.mark.parametrize("goal", ["all", "best"])
def test_a_ranking_is_a_function_of_the_texts(goal):
    """Permuting the responses permutes the numbers to the last bit, equal ones share theirs and are judged once,
    and another seed is another draw."""
    texts = [f"is {n}" for n in (4, 1, 3, 0, 2, 3)]
    ranked = judge(noisy)[0].rank("q", texts, goal)
    again, model = judge(noisy)
    order = [3, 5, 0, 2, 4, 1]
    turned = again.rank("q", [texts[i] for i in order], goal)
    for name in ("reward", "stderr", "low", "high", "best"):
        assert getattr(turned, name) == [getattr(ranked, name)[i] for i in order], name
    assert ranked.reward[2] == ranked.reward[5] and len(model.asked) == len(ranked.votes)
    assert all(a != b for a, b, *_ in model.asked), "equal responses are never compared"
    assert judge(noisy, seed=1)[0].rank("q", texts, goal).reward != ranked.reward


def test_a_ranking_finds_the_order_and_the_best():
    texts = [f"is {n}" for n in (4, 1, 3, 0, 2)]
    ranked = judge()[0].rank("q", texts)
    assert ranked.order == [0, 2, 4, 1, 3] and ranked.best[0] > 0.7
    assert all(low < r < high for low, r, high in zip(ranked.low, ranked.reward, ranked.high))
    assert judge()[0].rank("q", texts, goal="best", budget=8).order[0] == 0
    places = {(v.first, v.second) for v in ranked.votes}
    assert places <= {(i, j) for i in range(5) for j in range(5) if i != j}
    assert all((v.verdict == "A") == (texts[v.first] > texts[v.second]) for v in ranked.votes)


def test_rewards_go_by_runs_of_equal_prompts():
    """As TRL calls it: texts, or messages; extra columns; a prompt that comes again later is another group; one alone
    gets None and a warning."""
    one, model = judge()
    chat = lambda role, text: [{"role": role, "content": text}]
    prompts = ["p"] * 3 + ["q"] * 2 + ["p"]
    completions = ["is 1", "is 2", "is 3", "is 9", "is 8", "is 7"]
    with pytest.warns(UserWarning, match="multiple of num_generations"):
        rewards = one.reward(
            prompts=prompts, completions=completions, completion_ids=[[0]] * 6, trainer_state=None
        )
    assert rewards[0] < rewards[1] < rewards[2] and rewards[3] > rewards[4] and rewards[5] is None
    asked = len(model.asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_chat = asyncio.run(
            one.areward(
                [chat("user", p) for p in prompts[:5]],
                [chat("assistant", c) for c in completions[:5]],
                answer=[1] * 5,
            )
        )
    assert as_chat == rewards[:5] and len(model.asked) == asked, (
        "the same requests are in the journal"
    )


def test_an_empty_completion_ends_no_training():
    one, _ = judge()
    rewards = one.reward(["q"] * 4, ["is 1", "", "is 3", "  "])
    assert rewards[0] < rewards[2] and rewards[1] is rewards[3] is None
    assert one.reward(["q"] * 2, ["", "is 3"]) == [None, None]


def test_verl_sees_one_sample_at_a_time():
    score = judge()[0].verl()
    ask = lambda solution: asyncio.run(score("data", solution, "is 5", {"question": "q"}))
    assert ask("is 7")["score"] > 0.5 > ask("is 3")["score"] and ask("is 7")["read"] == 1.0
    assert ask(" ") == {"score": 0.0, "read": 0.0}, "an empty answer ends no training"


class Slow(Model):
    """Answers when it is told to."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def submit(self, requests):
        futures = [Future() for _ in requests]
        self.waiting += zip(futures, requests)
        return futures

    def go_on(self):
        while self.waiting:
            future, request = self.waiting.pop()
            future.set_result(self.answer(*request))


def until(happens):
    deadline = time.time() + 20
    while not happens():
        assert time.time() < deadline
        time.sleep(0.001)


def test_what_is_asked_at_the_same_time_is_under_way_together():
    """By one call, and by several threads; what two of them want is asked for once."""
    one, model = Judge(slow := Slow(), protocol="instruct"), slow
    with ThreadPoolExecutor(9) as pool:
        many = pool.submit(one.compare_all, [("q", f"is {n}", "is 50") for n in range(100)], 2)
        until(lambda: len(model.waiting) == 198)  # 50 against 50 is a tie
        same = [pool.submit(one.compare, "q", f"is {n}", "is 50", 2) for n in range(4, 12)]
        until(lambda: len(one.under_way) == 198 and sum(f.running() for f in same) == 8)
        time.sleep(0.05)
        model.go_on()
        found = many.result()
        assert [f.result().verdict for f in same] == [c.verdict for c in found[4:12]]
    assert [c.verdict for c in found] == [
        "A" if n > 50 else "tie" if n == 50 else "B" for n in range(100)
    ]
    assert len(model.asked) == 198


def test_who_leaves_loses_no_judgment():
    """A caller that is cancelled: what it asked for is in the journal when it comes again, and others still get it."""

    async def go():
        one = Judge(model := Slow(), protocol="instruct")
        first, second = (asyncio.create_task(one.acompare("q", "is 5", "is 3")) for _ in range(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        model.go_on()
        assert (await second).verdict == (await one.acompare("q", "is 5", "is 3")).verdict == "A"
        assert first.cancelled() and len(model.asked) == 2

    asyncio.run(go())


def test_what_several_want_costs_once():
    """Two callers at once, and one who comes later: all tokens are the first one's, as the judge counts them."""

    async def go():
        one = Judge(model := Slow(), protocol="instruct")
        both = [asyncio.create_task(one.acompare("q", "is 5", "is 3")) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        model.go_on()
        found = [await both[0], await both[1], await one.acompare("q", "is 5", "is 3")]
        costs = [usage(c.votes) for c in found]
        assert [(c["judgments"], c["shared"], c["cached"]) for c in costs] == [
            (2, 0, 0),
            (2, 2, 0),
            (2, 0, 2),
        ]
        assert [c["completion_tokens"] for c in costs] == [14, 0, 0] and costs[0][
            "prompt_tokens"
        ] == 22
        assert one.used == {
            "judgments": 2,
            "cached": 2,
            "prompt_tokens": 22,
            "completion_tokens": 14,
        }

    asyncio.run(go())


def test_many_groups_leave_the_loop_to_others():
    """Each begins in a turn of its own, and somebody else's turns come between. Who leaves ends them all."""
    turns = []

    async def group(n):
        turns.append(n)
        await asyncio.sleep(60 if n == 9 else 0)
        return n

    async def health():
        while True:
            turns.append("health")
            await asyncio.sleep(0)

    async def go():
        other = asyncio.create_task(health())
        assert await rmr1.all_of(group(n) for n in range(8)) == [*range(8)]
        assert all(turns[turns.index(n) + 1] == "health" for n in range(8))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(rmr1.all_of([group(9), group(9)]), 0.1)
        other.cancel()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())


def test_a_failure_reaches_everybody_who_waits():
    class Broken:
        def submit(self, requests):
            raise ConnectionError("gone")

    one = Judge(Broken(), protocol="instruct")
    for _ in range(2):
        with pytest.raises(ConnectionError, match="gone"):
            one.compare_all([("q", "is 1", "is 2"), ("q", "is 3", "is 4")])
    assert not one.under_way


def test_a_journal_is_asked_before_the_model(tmp_path):
    """Killed in a line and started again: the same numbers, and only what is missing is asked for. Another seed,
    temperature or length asks anew; an answer that failed is no answer."""
    path, texts = tmp_path / "journal.jsonl", [f"is {n}" for n in range(5)]
    one, model = judge(noisy, journal=path)
    ranked = one.rank("q", texts)
    lines = path.read_text().splitlines()
    assert (
        len(lines) == len(model.asked) == len(ranked.votes) and json.loads(lines[0])["tokens"] == 7
    )
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    again, model = judge(noisy, journal=path)
    assert again.rank("q", texts).reward == ranked.reward and len(model.asked) == 1
    for other in ({"seed": 1}, {"max_tokens": 9}):
        fresh, model = judge(noisy, journal=path, **other)
        fresh.rank("q", texts)
        assert len(model.asked) == len(lines)


def test_a_journal_of_another_version_is_refused(tmp_path):
    """Its answers could not be found, and all would be bought again. The file stays as it is."""
    answer = {"text": "x", "finish": "stop", "tokens": 1, "prompt_tokens": 1}
    for key in ({"asked": "0123"}, {"key": ["p0", 1, 0], "asked": "0123"}, {"key": ["p0", 1, 0]}):
        path = tmp_path / "journal.jsonl"
        lines = json.dumps({"request": "4567", **answer}) + "\n" + json.dumps(key | answer) + "\n"
        path.write_text(lines)
        with pytest.raises(Failure, match="journal.jsonl: a journal of another version") as failure:
            Journal(path)
        assert "give another file" in str(failure.value) and path.read_text() == lines


def test_a_journal_is_only_added_to(tmp_path):
    """A cut line goes, a link stays a link, two users of one process lose nothing, another process is refused."""
    path, link = tmp_path / "journal.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    one, two = Journal(link), Journal(link)
    one.add("a", Answer("x", "stop"))
    two.add("b", Answer("y", "stop"))
    one.add("c", Answer("z", "stop"))
    with open(path, "a") as f:
        f.write('{"request": "d", "te')
    again = Journal(link)
    again.add("e", Answer("w", "stop"))
    assert link.is_symlink() and sorted(Journal(path).answers) == ["a", "b", "c", "e"]
    command = "import sys; sys.path.insert(0, sys.argv[1]); from judge.journal import *; from pathlib import Path; "
    command += "Journal(Path(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", command, str(ROOT), str(path)], capture_output=True, text=True
    )
    assert done.returncode and "another process writes there" in done.stderr


@pytest.mark.parametrize(
    "content", ["my only notes", "a line\nand another\n", '{"request": "x"}\n', "[1]\n"]
)
def test_what_is_no_journal_is_refused_and_stays(content, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(Failure, match="notes.txt"):
        Journal(path)
    assert path.read_text() == content


def test_a_comparison_wants_a_vote():
    one, _ = judge()
    with pytest.raises(ValueError, match="a budget of 0 votes"):
        one.compare("q", "is 1", "is 2", budget=0)


def test_a_device_is_no_journal():
    with pytest.raises(Failure, match="is no plain file"):
        Journal(Path("/dev/null"))


def test_a_full_disk_under_the_journal_is_a_failure(tmp_path):
    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    one, _ = judge(journal=tmp_path / "journal.jsonl")
    one.journal.file = Full()
    with pytest.raises(Failure, match="journal.jsonl: cannot be written .No space left"):
        one.compare("q", "is 5", "is 3")
    assert not one.under_way


def test_a_vote_is_handed_out_as_soon_as_it_is_whole():
    """Numbered as asked for, told of as they come: the second of a round before the first where that is slower."""

    async def go():
        one = Judge(model := Slow(), protocol="instruct")
        votes = []
        task = asyncio.create_task(
            one.acompare("q", "is 5", "is 3", on_vote=lambda *vote: votes.append(vote))
        )
        while len(model.waiting) < 2:
            await asyncio.sleep(0)
        (first, request), (second, swapped) = model.waiting
        second.set_result(model.answer(*swapped))
        while not votes:
            await asyncio.sleep(0)
        assert [number for number, _ in votes] == [1] and not task.done()
        first.set_result(model.answer(*request))
        found = await task
        assert [number for number, _ in votes] == [1, 0]
        assert [vote for _, vote in sorted(votes, key=lambda v: v[0])] == found.votes
        assert [(v.first, v.verdict, v.prefers) for v in found.votes] == [
            (0, "A", "A"),
            (1, "B", "A"),
        ]

    asyncio.run(go())


def test_votes_are_numbered_over_all_rounds():
    """Also those from the journal, and each once."""
    one, _ = judge(lambda a, b, seed: "A")
    for _ in range(2):
        votes = {}
        found = asyncio.run(
            one.acompare(
                "q", "is 5", "is 3", budget=6, on_vote=lambda n, vote: votes.update({n: vote})
            )
        )
        assert [votes[n] for n in range(6)] == found.votes and len(votes) == 6


def test_a_pair_is_compared_as_its_texts_are():
    """In a prompt of its own, if it has one; where that cannot be swapped, by one vote."""
    one, model = judge()
    context = [{"role": "user", "content": "q"}]
    pair = Pair("1", context, "is 5", "is 3", "A")
    assert one.compare(pair) == replace(one.compare("q", "is 5", "is 3"), votes=ANY, vote=ANY)
    assert len(model.asked) == 2, "the same requests are in the journal"
    finished = Pair("2", [], "", "", "A", messages=chat_messages(pair))
    found = one.compare(finished)
    assert (found.verdict, len(found.votes), found.consistent) == ("A", 1, None)


def test_in_a_running_loop_too():
    async def notebook():
        return judge()[0].compare("q", "is 5", "is 3").verdict

    assert asyncio.run(notebook()) == "A"


# ---------------------------------------------------------------- the command line


@pytest.fixture
def cli(monkeypatch):
    """rmr1.py with the simulated model in place of the one that is named."""
    monkeypatch.setattr(
        rmr1,
        "judge_of",
        lambda args, *_: Judge(
            Model(),
            protocol="instruct",
            journal=args.journal,
            seed=args.seed,
            temperature=args.temperature,
        ),
    )
    return lambda *args, ok=True: call(rmr1, *args, "--model", "m", ok=ok)


def test_judge_for_programs_and_for_people(cli, tmp_path, monkeypatch):
    """A line of JSON each, or a page without colour where no terminal is, no wider than it."""
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": "q", "a": f"is {n}", "b": "is 5", "label": "A"}) + "\n"
            for n in (7, 3)
        )
    )
    rows = [json.loads(x) for x in cli("judge", "--data", data, "--json").stdout.splitlines()]
    assert [r["verdict"] for r in rows] == ["A", "B"] and [
        v["order"] for v in rows[0]["votes"]
    ] == ["AB", "BA"]
    monkeypatch.setenv("COLUMNS", "60")
    page = cli("judge", "--question", "word " * 60, "--a", "is 7", "--b", "is 5").stdout
    assert "rubric\n   100 % ████████████████████ Size" in page and "\033" not in page
    assert (
        "verdict: A, expected win rate of A: 0.75 (0.37 to 0.98), judgments: 2, the orders agree"
        in page
    )
    assert max(map(len, page.split("verdict: ")[0].splitlines())) <= 60


def test_a_quote_that_is_not_in_its_response_is_flagged(capsys):
    text = (
        "<type>Chat</type><rubric>Size 60%: big\nTone 40%</rubric><eval><quote_A>is 7</quote_A> and "
        "<quote_B>is 9</quote_B></eval><answer>[[A]]</answer>"
    )

    class Quotes(Model):
        def answer(self, *_):
            return Answer(text, "stop", 1, 1)

    pair = Pair("1", [{"role": "user", "content": "q"}], "is 7", "is 5", None)
    rmr1.print_comparison(
        pair, Judge(Quotes(), protocol="instruct").compare_all([pair], budget=1)[0]
    )
    out = capsys.readouterr().out
    assert "A: is 7\n" in out and "B: is 9  (not in the response)" in out


def test_rank_writes_a_line_for_each_and_asks_for_nothing_twice(cli, tmp_path):
    data, journal = tmp_path / "rows.jsonl", tmp_path / "journal.jsonl"
    data.write_text(
        '{"id": "x", "prompt": "q", "responses": ["is 1", "is 3", "is 2"]}\n'
        '{"prompt": "q", "responses": ["is 5", "is 4"]}\n'
    )
    first = cli("rank", "--data", data, "--journal", journal).stdout
    rows = [json.loads(x) for x in first.splitlines()]
    assert [(r["id"], r["order"]) for r in rows] == [("x", [1, 2, 0]), (2, [0, 1])]
    kept = journal.read_text()
    assert (
        cli("rank", "--data", data, "--journal", journal).stdout == first
        and journal.read_text() == kept
    )


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"prompt": "q", "responses": ["x"]}', "rows.jsonl:1: 1 responses; 2 to 32 are ranked"),
        (
            json.dumps({"prompt": "q", "responses": [f"is {n}" for n in range(100)]}),
            "100 responses; 2 to 32 are ranked (--most), each line asks for up to 400 judgments",
        ),
        ('{"prompt": "q", "responses": ["x", ""]}', "rows.jsonl:1: response 2 is empty"),
        ('{"prompt": "q", "responses": 3}', "rows.jsonl:1: "),
        ('{"responses": ["x", "y"]}', "the context is missing"),
        ("[1]", "one JSON value"),
        ("nonsense", "not a JSON object"),
    ],
)
def test_bad_lines_get_one_sentence(line, complaint, cli, tmp_path):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    done = cli("rank", "--data", tmp_path / "rows.jsonl", ok=False)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("error: ") == 1
    assert not done.stdout


def test_equal_responses_on_the_command_line(cli):
    done = cli("judge", "--question", "q", "--a", "is 1", "--b", "is 1", ok=False)
    assert done.returncode == 2 and "--a and --b are equal" in done.stderr


def test_rewards_of_lines_keep_their_order(cli, tmp_path):
    """Groups are runs of one prompt; a bad line goes to the rejects and leaves the rest as it is, or ends the run;
    killed and started again, nothing is judged twice, and other sizes of a batch change nothing."""
    data, rejects, journal = (
        tmp_path / x for x in ("rows.jsonl", "rejects.jsonl", "journal.jsonl")
    )
    rows = [
        {"prompt": p, "completion": f"is {n}"} for p, n in zip("ppppqqqr", (1, 4, 2, 3, 9, 8, 7, 5))
    ]
    lines = [*map(json.dumps, rows)]
    data.write_text(
        "\n".join([*lines[:2], '{"prompt": "p", "completion": " "}', *lines[2:], "nonsense"]) + "\n"
    )
    with pytest.warns(UserWarning, match="nothing to compare it with"):
        first = cli("reward", "--data", data, "--rejects", rejects, "--journal", journal).stdout
    got = {r["line"]: r["reward"] for r in map(json.loads, first.splitlines())}
    assert list(got) == [1, 2, 4, 5, 6, 7, 8, 9] and got[9] is None
    assert got[1] < got[4] < got[5] < got[2] and got[6] > got[7] > got[8]
    assert [
        (r["line"], r["reason"]) for r in map(json.loads, rejects.read_text().splitlines())
    ] == [(3, "completion is empty"), (10, "not a JSON object")]
    kept = journal.read_text()
    with pytest.warns(UserWarning):
        again = cli(
            "reward", "--data", data, "--rejects", rejects, "--journal", journal, "--at-once", 1
        ).stdout
    assert again == first and journal.read_text() == kept
    done = cli("reward", "--data", data, ok=False)
    assert done.returncode == 2 and "rows.jsonl:3: completion is empty" in done.stderr


def test_standard_input_is_read_as_it_comes(cli, monkeypatch):
    import io

    lines = "".join(
        json.dumps({"prompt": "q", "completion": f"is {n}"}) + "\n" for n in (3, 1, 2)
    ).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    got = [json.loads(x)["reward"] for x in cli("reward", "--data", "-").stdout.splitlines()]
    assert got[0] > got[2] > got[1]


def test_pairs_worth_a_label(cli, tmp_path, monkeypatch):
    """Those that the votes dispute come first, near-duplicates once, a tenth by lot; and what people may expect."""
    monkeypatch.setattr(
        rmr1, "judge_of", lambda args, *_: Judge(Model(noisy), protocol="instruct", temperature=1.0)
    )
    data = tmp_path / "pairs.jsonl"
    pairs = [
        {"prompt": f"q{n}", "a": f"is {n / 100}", "b": "is 1", "label": "AB"[n < 100]}
        for n in range(0, 400, 2)
        if n != 100
    ]
    pairs += [{"prompt": "Q0!", "a": "is 0.0", "b": "is 1"}, {"prompt": "q", "a": "x", "b": "x"}]
    data.write_text("".join(json.dumps(p) + "\n" for p in pairs))
    done = cli("select", "--data", data, "--count", 30, "--target", 0.8)
    rows = [json.loads(x) for x in done.stdout.splitlines()]
    assert [r["why"] for r in rows] == ["drawn"] * 3 + ["disputed"] * 27
    disputed = [abs(r["win"] - 0.5) for r in rows[3:]]
    assert (
        disputed == sorted(disputed)
        and disputed[0] == 0
        and len({r["prompt"].lower().strip("!") for r in rows}) == 30
    )
    assert (
        "199 pairs have a label; with 90% confidence, people agree with at least 80% of verdicts that got at least"
        in done.stderr
    )


@pytest.mark.parametrize("flags, greedy", [((), True), (("--no-greedy",), False)])
def test_all_votes_of_a_selection_may_be_sampled(flags, greedy, tmp_path, monkeypatch):
    """A judge whose greedy judgments are a habit agrees with itself; only sampled votes dispute them."""
    model = Model()
    model.model, model.folder, model.about = "m", None, lambda: None
    monkeypatch.setattr(rmr1, "make_backend", lambda *_, **__: model)
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": "q", "a": "is 1", "b": f"is {n}"} for n in (2, 3, 4)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ask = ("select", "--data", data, "--model", "m", "--protocol", "instruct", "--base-url", "x")
    call(rmr1, *ask, *flags)
    assert (0.0 in {temperature for *_, temperature in model.asked}) == greedy


@pytest.fixture
def no_key():
    """A server that knows nobody."""

    class Closed(Replies):
        def do_GET(self):
            self.reply(401, {"error": {"message": "no such key"}})

        do_POST = do_GET

    s = ThreadingHTTPServer(("127.0.0.1", 0), Closed)
    threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}/v1"
    s.shutdown()


@pytest.mark.parametrize("command", ["judge", "rank", "reward", "select"])
def test_a_wrong_key_is_one_sentence(command, no_key, tmp_path):
    pair = {"a": "x", "b": "y", "label": "A"}
    rows = {
        "judge": [pair],
        "select": [pair, pair | {"a": "z"}],
        "rank": [{"responses": ["x", "y"]}],
        "reward": [{"completion": "x"}, {"completion": "y"}],
    }[command]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": "q", **row}) + "\n" for row in rows)
    )
    done = call(
        rmr1,
        command,
        "--model",
        "m",
        "--protocol",
        "instruct",
        "--base-url",
        no_key,
        "--data",
        tmp_path / "rows.jsonl",
        ok=False,
    )
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and not done.stdout
    assert "no such key" in done.stderr and "OPENAI_API_KEY" in done.stderr


def test_a_model_that_does_not_say_how_it_wants_to_be_asked(no_key):
    done = call(
        rmr1,
        "judge",
        "--model",
        "m",
        "--base-url",
        no_key,
        "--question",
        "q",
        "--a",
        "x",
        "--b",
        "y",
        ok=False,
    )
    assert (
        done.returncode == 2
        and "--model m: no judge.json says how it wants to be asked" in done.stderr
    )


def test_what_will_happen_is_said_first(no_key):
    done = call(
        rmr1,
        "judge",
        "--model",
        "m",
        "--protocol",
        "instruct",
        "--base-url",
        no_key,
        "--question",
        "q",
        "--a",
        "x",
        "--b",
        "y",
        ok=False,
    )
    assert done.stderr.startswith(f"1 pairs, up to 8 judgments each, by {no_key}\n")
