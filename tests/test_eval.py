"""Evaluation: what counts, what is written, what survives, who may judge."""

import contextlib
import errno
import fcntl
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

import eval as E
from conftest import ROOT, SHARED, Replies, call, environment, run, save_qwen2
from judge import benchmarks as B
from judge import report as R
from judge.backends import Answer, LocalBackend, ServerBackend, make_backend
from lib.files import Failure
from lib.model_files import fingerprint
from lib.pairs import Pair

RB = [
    {
        "id": i,
        "subset": s,
        "prompt": f"q {s} {i}",
        "chosen": "the good one",
        "rejected": f"a bad one {i}",
    }
    for s in ("hep-go", "hep-js")
    for i in range(6)
]


def line(id, order, swap, verdict, label, vote=0, t=0.0, **more):
    return {
        "id": id,
        "order": order,
        "swap": swap,
        "temperature": t,
        "vote": vote,
        "label": label,
        "verdict": verdict,
        "reason": "" if verdict else "no answer",
        "official": verdict or "error",
        "tokens": 10,
        "rubric": [],
        "quotes": [1, 2],
        "text": "",
        **more,
    }


def pair(id, styles=(0, 0), label="A"):
    return {
        "id": id,
        "bench": "f",
        "item": id,
        "subset": "",
        "compare": [0, 1],
        "type": "",
        "source": "",
        "styles": list(styles),
        "context": [],
        "a": "x",
        "b": "y",
        "label": label,
    }


def test_measures_by_hand():
    """Three pairs in both orders, greedy: one right in both, one that says A twice, one without a
    verdict and then right. The preferred response is A in the first order of 1 and 2, B in that of 3."""
    lines = [
        line("1", 0, False, "A", "A"),
        line("1", 1, True, "B", "B"),
        line("2", 0, False, "A", "A"),
        line("2", 1, True, "A", "B"),
        line("3", 0, True, None, "B"),
        line("3", 1, False, "A", "A"),
    ]
    m = R.measure_one(
        "f",
        {p["id"]: p for p in (pair("1", (0, 2)), pair("2", (1, 1)), pair("3", (1, 0)))},
        lines,
        [],
    )
    assert m["accuracy"] == {"greedy": pytest.approx(4 / 6)} and m["main_metric"] == "accuracy"
    assert m["right_in_both_orders"] == 1 / 3 and m["same_verdict_in_both_orders"] == 1 / 3
    assert m["no_verdict"] == 1 / 6 and m["no_verdict_reasons"] == {"no answer": 1 / 6}
    assert m["says_a"] == 4 / 5 and m["tokens_per_judgment"] == 10
    assert m["quotes_word_for_word"] == 0.5 and m["by_looks"]["greedy"]["share"] == 0
    styles = [m["metrics"][f"style/{view}"] for view in ("hard", "normal", "easy")]
    assert styles == [1.0, 0.5, 0.5]


def test_the_table_lays_numbers_out_in_one_order():
    """The rows of two runs are merged, each behind the row that it follows in its own run; the reasons of
    judgments without a verdict stand below their row."""
    pairs = {i: pair(i) for i in "12"}
    greedy = [line("1", 0, False, "A", "A"), line("2", 0, False, None, "A")]
    votes = [line(i, 0, False, "A", "A", vote=k, t=1.0) for i in "12" for k in range(3)]
    left_out = [{"bench": "f", "item": "3", "reason": "empty response"}]
    table = [
        ("one", {"f": R.measure_one("f", pairs, greedy, [])}),
        ("two", {"f": R.measure_one("f", pairs, greedy + votes, left_out)}),
    ]
    rows = [x.rstrip() for x in R.table_text(table).splitlines()]
    names = [re.split(r"\s{2,}", x.strip())[0] for x in rows if x]
    assert names == [
        "f",
        "judgments",
        "accuracy, greedy",
        "accuracy, greedy, 95 %",
        "accuracy, T=1",
        "accuracy, T=1, 95 %",
        "style",
        "normal",
        "votes",
        "accuracy, best of 1, T=1",
        "tokens, best of 1, T=1",
        "accuracy, best of 3, T=1",
        "tokens, best of 3, T=1",
        "official parser",
        "no verdict",
        "no answer",
        "says A",
        "tokens a judgment",
        "quotes word for word",
        "left out",
        "empty response",
    ]
    cells = {x.split("  ")[0]: x.split()[-2:] for x in rows if x}
    assert cells["no verdict"] == ["0.500", "0.125"] and cells["judgments"] == ["2", "8"]


def test_votes_are_a_majority_of_the_same_samples():
    """Verdicts of five votes, right being A: A B B A A. One vote: right; three: wrong; five: right. What could
    not be read has no vote."""
    lines = [line("1", 0, False, v, "A", vote=k, t=1.0) for k, v in enumerate("ABBAA")]
    m = R.measure_one("f", {"1": pair("1")}, lines, [])
    assert {k: v["accuracy"] for k, v in m["votes"]["T=1"].items()} == {1: 1, 3: 0, 5: 1}
    assert {k: v["tokens"] for k, v in m["votes"]["T=1"].items()} == {1: 10, 3: 30, 5: 50}
    assert m["accuracy"]["T=1"] == 1
    lines = [
        line("1", 0, False, v, "A", vote=k, t=1.0)
        for k, v in enumerate((None, "B", "A", "A", None))
    ]
    m = R.measure_one("f", {"1": pair("1")}, lines, [])
    assert {k: v["accuracy"] for k, v in m["votes"]["T=1"].items()} == {1: 0, 3: 0, 5: 1}


def test_at_a_tie_of_votes_the_first_decides():
    """Three pairs of two votes, of which one is right, two times the first: as with one vote. Votes without
    a verdict decide nothing."""
    votes = "AB", "AB", "BA", (None, None)
    lines = [
        line(i, 0, False, v, "A", vote=k, t=1.0) for i in range(4) for k, v in enumerate(votes[i])
    ]
    m = R.measure_one("f", {i: pair(i) for i in range(4)}, lines[::-1], [])
    assert m["accuracy"]["T=1"] == m["votes"]["T=1"][1]["accuracy"] == 1 / 2


def test_the_first_order_counts_as_published_and_the_mean_stands_beside_it():
    """RewardBench judged in both orders by a judge that always says A."""
    lines, pairs = [], {}
    for counts in B.REWARDBENCH.values():
        for n, s in enumerate(counts):
            pairs[s] = pair(s) | {"bench": "rewardbench", "subset": s}
            swap = n == 0  # the first subset of each section is shown swapped
            lines += [
                line(s, 0, swap, "A", "B" if swap else "A"),
                line(s, 1, not swap, "A", "A" if swap else "B"),
            ]
    m = R.measure_one("rewardbench", pairs, lines, [])
    assert m["mean_of_both_orders"] == pytest.approx(0.5) and m["right_in_both_orders"] == 0
    assert m["metrics"]["Chat"] == pytest.approx(258 / 358)
    assert m["accuracy"]["greedy"] > 0.6 and m["says_a"] == 1


def test_a_partial_benchmark_says_what_is_missing():
    pairs = {"x": pair("x") | {"bench": "rewardbench", "subset": "hep-go"}}
    m = R.measure_one("rewardbench", pairs, [line("x", 0, False, "A", "A")], [])
    assert m["accuracy"] == {"greedy": None} and m["interval"] == {}
    assert m["metrics"]["Reasoning"] is None and m["metrics"]["Reasoning/hep-go"] == 1
    assert "math-prm" in m["missing"]
    rows = [x.split() for x in R.table_text([("run", {"rewardbench": m})]).splitlines()]
    assert ["overall,", "greedy", "partial"] in rows and ["Reasoning", "partial"] in rows


def test_quotes_are_compared_with_the_displayed_responses():
    """One of A's two is B's; B's marker was displayed with a space in it. A published prompt's are not known."""
    text = (
        "<eval><quote_A>al</quote_A><quote_A>beta</quote_A><quote_B> beta [ Client Question]</quote_B>"
        "</eval><answer>[[A]]</answer>"
    )
    for a, b, messages, quotes in (
        ("alpha", "beta [Client Question]", None, [2, 3]),
        ("beta [Client Question]", "alpha", None, [1, 3]),
        ("", "", [], [0, 0]),
    ):
        displayed = Pair("1", [{"role": "user", "content": "q"}], a, b, "A", messages=messages)
        assert E.judgment_line(Answer(text, "stop"), displayed, [])["quotes"] == quotes


def test_groups_without_a_name_or_with_a_number_for_one(tmp_path):
    """What parquet makes of a missing text, in a folder that another writer has filled."""
    types = (None, "math", 3, ["x"])
    texts = {"context": [], "a": "x", "b": "y", "swap": False}
    pairs = [{**pair(str(n)), **texts, "type": t, "source": t} for n, t in enumerate(types)]
    (tmp_path / "config.json").write_text('{"format": 3}')
    for name, rows in (
        ("pairs", pairs),
        ("judgments", [line(p["id"], 0, False, "A", "A", text="") for p in pairs]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    m = E.measure(E.read_run(tmp_path))["f"]
    assert (m["accuracy"]["greedy"], m["metrics"]["type/math"], m["metrics"]["source/3"]) == (
        1,
        1,
        1,
    )
    assert "type/None" not in m["metrics"]


def write_evaluation(folder):
    """A folder with one judgment, as far as reports need it."""
    folder.mkdir()
    (folder / "config.json").write_text('{"format": 3, "model": "m"}')
    pairs = pair("1") | {"context": [], "a": "x", "b": "y", "swap": False}
    (folder / "pairs.jsonl").write_text(json.dumps(pairs) + "\n")
    judgment = line("1", 0, False, "A", "A", text="", finish="stop")
    (folder / "judgments.jsonl").write_text(json.dumps(judgment) + "\n")


def test_a_training_run_is_no_place_for_an_evaluation(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 3, "script": "grpo.py"}')
    with pytest.raises(Failure, match="holds a training run"):
        E.open_folder(tmp_path, {"format": 3})


@pytest.mark.parametrize(
    "config", [{}, {"format": 1}, {"format": "3"}, {"model": "m", "format": 4}]
)
def test_a_folder_of_another_format_is_refused(config, tmp_path):
    """By the report, by the comparison and by a run that would go on in it; each names the folder, and the
    run changes nothing in it."""
    for name in ("new", "old"):
        write_evaluation(tmp_path / name)
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    save_qwen2(tmp_path / "m", True)
    files = lambda: {p.name: p.read_bytes() for p in (tmp_path / "old").glob("*.json*")}
    before = files()
    data = write(tmp_path / "e.jsonl", ("1", *GOOD, "A"))
    new, old, page = (tmp_path / name for name in ("new", "old", "page"))
    call(E, "report", new, "--out", page)
    for command in (
        ("report", new, old, "--out", page),
        ("compare", old, new),
        ("--scalar", "--model", tmp_path / "m", "--data", data, "--out", old),
    ):
        done = call(E, *command, ok=False)
        assert done.returncode == 2 and done.stderr.count("error: ") == 1
        assert f"{old}: its config.json has format {config.get('format', 'none')}" in done.stderr
    assert files() == before


def test_report_and_compare_import_no_torch(tmp_path):
    """Where torch cannot be imported at all."""
    write_evaluation(tmp_path / "run")
    for command in (["report", tmp_path / "run"], ["compare", *[tmp_path / "run"] * 2]):
        program = f"""
import sys
sys.modules["torch"] = None
sys.argv = {["eval.py", *map(str, command)]!r}
import runpy
runpy.run_path("eval.py", run_name="__main__")
"""
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "accuracy" in done.stdout


# ---------------------------------------------------------------- servers


class Judge(Replies):
    """An OpenAI-compatible server that has bad days: every third request meets a limit, an error or an empty
    answer before it is served; a prompt with `too long` in it is refused; one with `think` comes with
    reasoning beside."""

    calls, fail_with = 0, (429, 500, "empty")
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Judge.lock:
            Judge.calls += 1
            n = Judge.calls
        text = body["messages"][-1]["content"]
        if self.headers["Authorization"] == "Bearer wrong":
            return self.reply(401, {"error": {"message": "no such key"}})
        if "too long" in text:
            return self.reply(400, {"error": {"message": "context length exceeded"}})
        trouble = (
            Judge.fail_with[n // 3 % len(Judge.fail_with)]
            if n % 3 == 0 and Judge.fail_with
            else None
        )
        if isinstance(trouble, int):
            return self.reply(trouble, {"error": {"message": "later"}})
        first = (
            text.index("the good one") < text.index("a bad one") if "the good one" in text else True
        )
        message = {
            "role": "assistant",
            "content": None
            if trouble == "empty"
            else f"<type>Chat</type><eval>.</eval><answer>[[{'A' if first else 'B'}]]</answer>",
        }
        if "hep-js" in text:
            message["reasoning_content"] = "is it <answer>[[B]]</answer> or <answer>[[A]]</answer>?"
        self.reply(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
            },
        )


@pytest.fixture
def server():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
    Judge.calls, Judge.fail_with = 0, (429, 500)
    yield f"http://127.0.0.1:{s.server_port}/v1"
    s.shutdown()


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "files").mkdir()
    rows = [*RB, {**RB[0], "id": 90, "chosen": ""}, {**RB[0], "id": 91, "prompt": "too long"}]
    (tmp_path / "files/rewardbench.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "files"


def ask(server, bench, out, *more, **kw):
    return call(
        E,
        "--model",
        "any",
        "--base-url",
        server,
        "--protocol",
        "instruct",
        "--bench",
        "rewardbench",
        "--data-dir",
        bench,
        "--out",
        out,
        "--both-orders",
        *more,
        **kw,
    )


def test_a_server_with_limits_and_errors(server, bench, tmp_path):
    out = ask(server, bench, tmp_path / "run").stdout
    got = E.read_run(tmp_path / "run")
    m = E.measure(got)["rewardbench"]
    assert len(got["judgments"]) == 26 and m["metrics"]["Reasoning/hep-js"] == 1
    assert m["metrics"]["Reasoning/hep-go"] == pytest.approx(6 / 7)
    assert m["no_verdict_reasons"]["refused by the server"] == 2 / 26
    assert any("context length exceeded" in x["reason"] for x in got["judgments"])
    assert m["left_out"]["empty response"] == 1 and "partial, without" in out
    js = next(x for x in got["judgments"] if "hep-js" in x["id"])
    assert js["text"].startswith("<think>") and js["official"] == "error" and js["tokens"] == 7


def test_what_got_no_answer_counts_as_wrong_and_is_asked_again(
    server, bench, tmp_path, monkeypatch
):
    """The table is of all judgments, not of those that the server gave; the list names the others. They are asked
    for again, those alone, and then the folder is as if nothing had happened."""
    monkeypatch.setattr("judge.backends.FIRST_WAIT", 1e9)  # one try each
    Judge.fail_with = (500,)
    done = ask(server, bench, tmp_path / "run", ok=False)
    got = E.read_run(tmp_path / "run")
    failed = [x for x in got["judgments"] if x.get("failed")]
    assert done.returncode == 2 and len(got["judgments"]) == 26 and 0 < len(failed) < 26
    assert f"error: {len(failed)} of 26 judgments: no answer from the server: 500" in done.stderr
    assert all(x["verdict"] is None and x["id"] in done.stdout for x in failed)
    numbers = E.measure(got)["rewardbench"]
    assert numbers["no_verdict_reasons"]["no answer from the server"] == len(failed) / 26
    report_text = call(E, "report", tmp_path / "run").stdout
    assert all(x["id"] in report_text for x in failed)

    Judge.fail_with, Judge.calls = (), 0
    done = ask(server, bench, tmp_path / "run")
    assert Judge.calls == len(failed) and "no answer" not in done.stdout
    ask(server, bench, tmp_path / "whole")
    same = [(tmp_path / name / "judgments.jsonl").read_text() for name in ("run", "whole")]
    assert same[0] == same[1]


def test_a_wrong_key_stops_at_once(server, bench, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    done = ask(server, bench, tmp_path / "run", ok=False)
    assert done.returncode == 2 and "no such key" in done.stderr and "OPENAI_API_KEY" in done.stderr


def test_keys_and_paths_in_data_stay_where_they_belong(server, bench, tmp_path, monkeypatch):
    """A key reaches neither the run folder nor the output; ids and sources that are paths write nowhere
    else."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    paths = "../../escaped", str(tmp_path / "escaped"), "../pairs.jsonl"
    (inside / "pairs.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "prompt": f"q{n}",
                    "a": "the good one",
                    "b": "a bad one",
                    "label": "A",
                    "id": path,
                    "source": path,
                }
            )
            + "\n"
            for n, path in enumerate(paths)
        )
    )
    before = set(tmp_path.rglob("*"))
    done = ask(server, bench, inside / "run", "--data", inside / "pairs.jsonl")
    call(E, "report", inside / "run", "--out", inside / "report")
    new = set(tmp_path.rglob("*")) - before
    ours = {inside / "run", inside / "report"}
    assert new and all(ours & {p, *p.parents} for p in new)
    assert len(E.read_run(inside / "run")["judgments"]) == 32
    assert not any(
        "sk-secret" in text
        for text in (done.stdout, done.stderr, *(p.read_text() for p in new if p.is_file()))
    )


def test_no_protocol_is_guessed_from_a_name(server, bench, tmp_path):
    done = call(
        E,
        "--model",
        "RM-R1-Qwen2.5-Instruct-7B",
        "--base-url",
        server,
        "--bench",
        "rewardbench",
        "--data-dir",
        bench,
        "--out",
        tmp_path / "run",
        ok=False,
    )
    assert (
        done.returncode == 2
        and "give --protocol instruct" in done.stderr
        and not (tmp_path / "run").exists()
    )


def test_other_settings_need_another_folder(server, bench, tmp_path):
    ask(server, bench, tmp_path / "run")
    done = ask(server, bench, tmp_path / "run", "--seed", 5, ok=False)
    assert done.returncode == 2 and "holds judgments with another seed (0, now 5)" in done.stderr


def test_every_setting_of_either_side_is_compared(server, bench, tmp_path):
    """A folder whose config has a key that this version lacks, or lacks one that it has, is another run's."""
    Judge.fail_with = ()
    ask(server, bench, tmp_path / "run")
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    for other, words in (
        (config | {"top_p": 0.9}, "another top_p (0.9, now absent)"),
        ({k: v for k, v in config.items() if k != "max_len"}, "another max_len (absent, now None)"),
    ):
        path.write_text(json.dumps(other))
        done = ask(server, bench, tmp_path / "run", ok=False)
        assert done.returncode == 2 and words in done.stderr
    path.write_text(json.dumps(config | {"data": ["elsewhere"]}))
    Judge.calls = 0
    ask(server, bench, tmp_path / "run")
    assert Judge.calls == 0


GOOD = "the good one", "a bad one"


def write(path, *rows):
    """A file of pairs without ids: ((question, a, b, label), ...)."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(json.dumps(dict(zip(("prompt", "a", "b", "label"), r))) + "\n" for r in rows)
    )
    return path


def judged(server, out, *data, ok=True):
    """-> what was printed, {question: verdict} by the folder"""
    Judge.calls, Judge.fail_with = 0, ()
    said = call(
        E,
        "--model",
        "any",
        "--base-url",
        server,
        "--protocol",
        "instruct",
        "--out",
        out,
        "--data",
        *data,
        ok=ok,
    )
    got = E.read_run(out)
    return said, {
        got["pairs"][x["id"]]["context"][0]["content"]: x["verdict"] for x in got["judgments"]
    }


def test_what_has_changed_is_asked_again(server, tmp_path):
    """Ids are line numbers here. A line is taken out, a label mended, then another file has the name; pairs
    of other files stay, and so does what has not changed."""
    one, two, three = ("1", *GOOD, "A"), ("2", *GOOD[::-1], "B"), ("3", *GOOD, "A")
    out, other = tmp_path / "run", write(tmp_path / "other.jsonl", ("4", *GOOD, "A"))
    judged(server, out, write(tmp_path / "e.jsonl", one, two, three), other)
    said, verdicts = judged(server, out, write(tmp_path / "e.jsonl", two, three))
    assert verdicts == {"2": "B", "3": "A", "4": "A"} and Judge.calls == 2
    assert "3 judgments are of texts or labels that have changed or gone" in said.stdout
    said, _ = judged(server, out, write(tmp_path / "e.jsonl", two, ("3", *GOOD, "B")))
    assert Judge.calls == 1 and E.measure(E.read_run(out))["e"]["accuracy"]["greedy"] == 0.5
    _, verdicts = judged(server, out, write(tmp_path / "x/e.jsonl", ("5", *GOOD, "A")))
    assert verdicts == {"5": "A", "4": "A"} and Judge.calls == 1
    judged(server, out, tmp_path / "x/e.jsonl", other)
    assert Judge.calls == 0


def test_criteria_are_kept_and_others_are_asked_anew(server, tmp_path):
    """A pair's criteria stand in its prompt, in pairs.jsonl and in the report; to change them makes its judgment
    stale, and no other's."""

    def rows(*criteria):
        path = write(tmp_path / "e.jsonl", *((f"{n}", *GOOD, "A") for n in range(len(criteria))))
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        for row, text in zip(rows, criteria):
            row |= {} if text is None else {"criteria": text}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    out = tmp_path / "run"
    judged(server, out, rows("2 Tone: kind\n6 Facts: right", None, "brief"))
    assert Judge.calls == 3
    kept = E.read_run(out)
    asked = [kept["pairs"][line["id"]].get("criteria") for line in kept["judgments"]]
    assert asked == ["Tone 25%: kind\nFacts 75%: right", None, "brief"]
    decided = {"text": "<eval>x\nDecided by: Facts</eval><answer>[[A]]</answer>"}
    run = kept | {"judgments": [line | decided for line in kept["judgments"]]}
    examples = {x["context"][0]["content"]: x for x in R.page_examples([run], 10)}
    assert [examples[name]["criteria"] for name in "012"] == asked
    assert {x["judgments"][0]["decided_by"] for x in examples.values()} == {"Facts"}

    judged(server, out, rows(["1 Tone: kind", "3 Facts: right"], None, "brief"))
    assert Judge.calls == 0, "the same weights in other words"
    for other, calls in (("long", 1), (None, 1), ("long", 1)):
        said, _ = judged(server, out, rows("1 Tone: kind\n3 Facts: right", None, other))
        assert Judge.calls == calls and "1 judgments are of texts" in said.stdout
        assert E.read_run(out)["pairs"]["e/e-3"].get("criteria") == other


def test_two_evaluations_do_not_share_a_folder(server, bench, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = ask(server, bench, tmp_path / "run", ok=False)
    assert (
        done.returncode == 2 and "another run is writing there" in done.stderr and Judge.calls == 0
    )
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_judgments_that_vanish_are_missed(server, bench, tmp_path, monkeypatch):
    def answers(*a):
        for n, x in enumerate(real(*a)):
            yield x
            if n == 3:
                (tmp_path / "run/judgments.part0.jsonl").unlink()

    real, Judge.fail_with = E.judgment_lines, ()
    monkeypatch.setattr(E, "judgment_lines", answers)
    done = ask(server, bench, tmp_path / "run", ok=False)
    assert done.returncode == 2 and "error: 26 of 26 judgments: " in done.stderr


def test_a_full_disk_keeps_what_is_there(server, bench, tmp_path, monkeypatch):
    def answers(*a):
        for n, x in enumerate(real(*a)):
            yield x
            if n == 3:
                raise OSError(errno.ENOSPC, "No space left on device")

    real, Judge.fail_with = E.judgment_lines, ()
    monkeypatch.setattr(E, "judgment_lines", answers)
    done = ask(server, bench, tmp_path / "run", "--at-once", 1, ok=False)
    assert (
        done.returncode == 2 and f"--out {tmp_path / 'run'}: No space left on device" in done.stderr
    )
    monkeypatch.setattr(E, "judgment_lines", real)
    Judge.calls = 0
    ask(server, bench, tmp_path / "run")
    assert (
        len(E.read_run(tmp_path / "run")["judgments"]) == 26 and Judge.calls <= 22 + 2
    )  # two asked twice


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written(out, server, bench, tmp_path):
    (tmp_path / "file").write_text("")
    Judge.fail_with = ()
    ask(server, bench, tmp_path / "good")
    for done in (
        ask(server, bench, tmp_path / out, ok=False),
        call(E, "report", tmp_path / "good", "--out", tmp_path / out, ok=False),
    ):
        assert done.returncode == 2 and f"--out {tmp_path / out}: cannot be written" in done.stderr


def test_a_file_with_a_benchmarks_name_is_a_file(server, tmp_path):
    judged(
        server,
        tmp_path / "run",
        write(tmp_path / "rmb.jsonl", ("1", *GOOD, "A"), ("2", *GOOD, "B")),
    )
    ((bench, m),) = E.measure(E.read_run(tmp_path / "run")).items()
    assert bench == "rmb pairs" and m["accuracy"]["greedy"] == 0.5


def test_reports_of_runs_under_way_and_of_the_same_name(server, bench, tmp_path):
    Judge.fail_with = ()
    for name in ("one", "two"):
        ask(server, bench, tmp_path / name / "eval")
    run = tmp_path / "one/eval"  # as a kill leaves it: not gathered, a line cut
    rows = (run / "judgments.jsonl").read_text().splitlines(keepends=True)
    (run / "judgments.jsonl").unlink()
    (run / "judgments.part0.jsonl").write_text("".join(rows[:9]) + rows[9][:30])
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo/metrics.jsonl").write_text('{"step": 0, "accuracy": 0.5}\n{"step": 1, "acc')
    out = call(
        E,
        "report",
        run,
        tmp_path / "two/eval",
        "--training",
        tmp_path / "grpo",
        "--out",
        tmp_path / "page",
    ).stdout
    assert out.splitlines()[0].split()[-2:] == ["one/eval", "two/eval"]
    assert next(x for x in out.splitlines() if x.startswith("judgments")).split() == [
        "judgments",
        "9",
        "26",
    ]
    assert (run / "judgments.part0.jsonl").exists()  # its run may be alive, and gathers them itself
    assert "one/eval" in call(E, "compare", run, tmp_path / "two/eval").stdout
    (run / "judgments.part0.jsonl").write_text("")
    for command in (("report", run), ("compare", tmp_path / "two/eval", run)):
        done = call(E, *command, ok=False)
        assert done.returncode == 2 and f"{run}: no judgments in it yet" in done.stderr


@pytest.mark.parametrize(
    "name, harm, complaint",
    [
        ("pairs", None, "pairs.jsonl: lacks the pair 1"),
        ("pairs", lambda row: row.pop("bench"), "pairs.jsonl:1: has no bench"),
        ("pairs", lambda row: row.update(id=7), "pairs.jsonl:1: id is '7'"),
        ("judgments", lambda row: row.pop("swap"), "judgments.jsonl:1: has no swap"),
        ("judgments", lambda row: row.pop("verdict"), "judgments.jsonl:1: has no verdict"),
        ("judgments", lambda row: row.update(temperature="0"), "temperature is '0'"),
        ("judgments", lambda row: row.update(tokens=None), "tokens is 'None'"),
        ("left_out", lambda row: row.clear(), "left_out.jsonl:1: has no bench"),
    ],
)
def test_a_damaged_evaluation_is_named_by_file_and_line(name, harm, complaint, tmp_path):
    """Its files were cut, edited, or are another program's."""
    folder = tmp_path / "run"
    write_evaluation(folder)
    path = folder / f"{name}.jsonl"
    row = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    if harm:
        harm(row)
        path.write_text(json.dumps(row) + "\n")
    for command in (("report", folder), ("compare", folder, folder)):
        done = call(E, *command, ok=False)
        assert done.returncode == 2 and complaint in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_curve_leaves_out_what_was_no_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "accuracy": null}\n{"step": 1, "accuracy": 0.5, "no_verdict": NaN}\n'
    )
    R.draw_curve(path, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    path.write_text('{"accuracy": 0.5}\n')
    with pytest.raises(Failure, match="metrics.jsonl:1: has no step"):
        R.draw_curve(path, tmp_path / "curve.png")


@pytest.mark.parametrize(
    "word, hint",
    [("repot", "did you mean report?"), ("comapre", "did you mean compare?"), ("runs/eval", "")],
)
def test_a_misspelt_command_is_named(word, hint):
    done = call(E, word, "DIR", ok=False)
    assert done.returncode == 2 and f"error: {word}: unknown command" in done.stderr
    assert done.stderr.strip().endswith(hint)


def test_help_names_report_and_compare():
    said = call(E, "--help").stdout
    assert "eval.py report" in said and "eval.py compare" in said


def test_runs_compare_and_report(server, bench, tmp_path):
    for name in ("one", "two"):
        ask(server, bench, tmp_path / name)
    path = tmp_path / "two/judgments.jsonl"  # the second judge gets hep-go wrong
    rows = R.read_lines(path)
    for x in rows:
        if "hep-go" in x["id"]:
            x["verdict"] = {"A": "B", "B": "A"}.get(x["verdict"])
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    out = call(E, "compare", "--all", tmp_path / "one", tmp_path / "two").stdout
    go, js = (
        [x for x in out.splitlines() if f"Reasoning/{s}" in x][0] for s in ("hep-go", "hep-js")
    )
    assert go.endswith("  differ") and js.endswith("no difference shown")
    call(E, "report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "page")
    page = (tmp_path / "page/report.html").read_text()
    assert (
        "/*DATA*/null" not in page
        and "RM-R1-Qwen-Instruct-32B" in page
        and page.count("</script>") == 1
    )


# ---------------------------------------------------------------- bad servers


class Odd(Replies):
    """A server that says `body`, or what it makes of a request."""

    status, body, kind, asked = 200, b"", "application/json", []
    retry_after, headers_out = None, {}

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Odd.asked.append(request)
        said = Odd.body(self, request) if callable(Odd.body) else (Odd.status, Odd.body)
        if said is None:  # it has answered by itself
            return
        status, body = said
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(ConnectionError):  # who asked has gone
            self.send_response(status)
            self.send_header("Content-Type", Odd.kind)
            if Odd.retry_after is not None:
                self.send_header("Retry-After", Odd.retry_after)
            for name, value in Odd.headers_out.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


@pytest.fixture
def odd():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
    Odd.asked.clear()
    Odd.kind, Odd.headers_out = "application/json", {}
    yield f"http://127.0.0.1:{s.server_port}/v1"
    s.shutdown()


def reply(text, **more):
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        ],
    } | more


def answers(url, *prompts, **kw):
    """What `ServerBackend` makes of prompts, in their order."""
    got = ServerBackend(url, "m", 9, patience=0, **kw).answers(
        ([{"role": "user", "content": p}], n, 0.0) for n, p in enumerate(prompts)
    )
    return [a for _, a in sorted(got, key=lambda x: x[0])]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Sign in</html>",
        3,
        ["x"],
        None,
        "x",
        {},
        {"choices": None},
        {"choices": []},
        {"choices": ["x"]},
        {"choices": [{"text": "x"}]},
        {"choices": [{"message": None}]},
        b"data: {}\n\ndata: [DONE]\n\n",
        b"",
        reply(None),
        reply([]),
        reply(7),
        b"{",
        b"[" * 100_000,
        b"\xff",
    ],
    ids=lambda x: str(x)[:40],
)
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_what_is_no_answer_is_asked_for_again(body, kind, odd):
    Odd.body, Odd.kind = lambda *_: (200, body), kind
    (a,) = answers(odd, "q")
    assert a.failed and a.finish.startswith("no answer from the server: ") and a.text == ""


@pytest.mark.parametrize(
    "usage, tokens",
    [
        (None, (0, 0)),
        ({}, (0, 0)),
        ({"prompt_tokens": 3}, (0, 3)),
        ({"completion_tokens": None}, (0, 0)),
        ({"completion_tokens": "x", "prompt_tokens": 4}, (0, 4)),
        ([1], (0, 0)),
    ],
)
def test_tokens_that_a_server_does_not_count_are_none(usage, tokens, odd):
    Odd.body = lambda *_: (200, reply("x", usage=usage))
    (a,) = answers(odd, "q")
    assert not a.failed and (a.text, a.tokens, a.prompt_tokens) == ("x", *tokens)
    Odd.body = lambda *_: (200, {"choices": [{"message": {"content": "x"}}], "usage": usage})
    assert answers(odd, "q") == [a]  # with nothing but what is needed


def refusal(sentence):
    return 400, {"error": {"message": sentence}}


def test_a_server_that_refuses_everything_is_an_end(odd, tmp_path):
    """Not thousands of wrong judgments: its sentence, and the folder is still free for other settings."""
    Odd.body = lambda *_: refusal("'temperature' does not support 0; request 17")
    data = write(tmp_path / "e.jsonl", *((f"{n}", *GOOD, "A") for n in range(100)))
    common = (
        "--model",
        "m",
        "--base-url",
        odd,
        "--protocol",
        "instruct",
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--at-once",
        4,
    )
    done = call(E, *common, ok=False)
    assert done.returncode == 2 and len(Odd.asked) < 20
    assert "'temperature' does not support 0" in done.stderr and done.stderr.count("error: ") == 1
    Odd.body = lambda *_: (200, reply("<answer>[[A]]</answer>"))
    call(E, *common, "--max-tokens", 99)
    assert len(E.read_run(tmp_path / "run")["judgments"]) == 100


def test_a_refusal_of_one_prompt_is_final(odd):
    """Whatever words it has, and whether the prompt comes alone, first or last: a harmless prompt is answered, so
    it is not the settings."""
    Odd.body = lambda _, request: (
        refusal("no")
        if (text := request["messages"][0]["content"]) == "bad"
        else refusal("This model's maximum context length is 9 tokens")
        if text == "long"
        else (200, reply(text))
    )
    for prompts in (
        ("bad",),
        ("long",),
        ("fine", "bad"),
        ("bad", "long", "fine", "bad"),
        ["bad"] * 4,
    ):
        for prompt, a in zip(prompts, answers(odd, *prompts), strict=True):
            assert not a.failed and (a.text == prompt) is (prompt == "fine")
            assert a.finish.startswith("stop" if prompt == "fine" else "refused by the server: 400")


def test_a_prompt_that_leaves_less_room_than_the_limit_gets_what_there_is(odd):
    Odd.body = lambda _, request: (
        refusal(
            "maximum context length is 12 tokens, you requested 18 (9 in the messages, 9 in the completion)"
        )
        if "max_tokens" in request
        else (200, reply("x"))
    )
    assert answers(odd, "q")[0].text == "x" and "max_completion_tokens" not in Odd.asked[-1]


def test_the_field_that_newer_models_want(odd):
    Odd.body = lambda _, request: (
        refusal(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
            "instead."
        )
        if "max_tokens" in request
        else (200, reply("x"))
    )
    assert [a.text for a in answers(odd, "q", "r", "s", "t", at_once=1)] == ["x"] * 4
    assert len(Odd.asked) == 5 and Odd.asked[-1]["max_completion_tokens"] == 9


@pytest.mark.parametrize("seconds", ["0", "", "soon", "\u00b2", "-1"])
def test_a_server_that_says_retry_at_once_is_not_flooded(seconds, odd, monkeypatch):
    """The waits grow as if it had said nothing; 2 s brought 1,682 requests before there was a floor."""
    monkeypatch.setattr(Odd, "retry_after", seconds)
    Odd.body = lambda *_: (429, {"error": {"message": "later"}})
    backend = ServerBackend(odd, "m", 9, patience=2)
    ((_, answer),) = backend.answers([([{"role": "user", "content": "q"}], 0, 0.0)])
    assert answer.failed and "429" in answer.finish and 2 <= len(Odd.asked) <= 5


def test_the_wait_that_a_server_asks_for_is_kept(odd, monkeypatch):
    monkeypatch.setattr(Odd, "retry_after", "3")
    Odd.body = lambda *_: (429, {"error": {"message": "later"}})
    backend = ServerBackend(odd, "m", 9, patience=2)
    ((_, answer),) = backend.answers([([{"role": "user", "content": "q"}], 0, 0.0)])
    assert answer.failed and len(Odd.asked) == 1, "it would take longer than our patience"


def test_unknown_settings_of_a_backend_are_refused(odd):
    """Named, for a server as for a folder. The settings of the other kind are known, and mean nothing."""
    for where in ({"base_url": odd}, {}):
        with pytest.raises(TypeError, match="pacience"):
            make_backend("m", **where, pacience=3)
    assert make_backend("m", odd, max_len=9, dtype="float32", at_once=3, patience=4).at_once == 3


def test_greedy_chats_have_one_seed_and_sampled_ones_their_own(odd):
    Odd.body = lambda *_: (200, reply("x"))
    chat = [{"role": "user", "content": "q"}]
    requests = [(chat, 2**40 + 5, 1.0), (chat, 6, 0.0)]
    for future in ServerBackend(odd, "m", 9).submit(requests):
        assert future.result(20).text == "x"
    assert {(r["temperature"], r["seed"]) for r in Odd.asked} == {(1.0, 5), (0.0, 0)}
    assert not any("stream" in request for request in Odd.asked)


@pytest.mark.parametrize(
    "status, sentence", [(400, "context length exceeded"), (401, "no"), (400, "no")]
)
def test_a_server_that_repeats_what_is_secret(status, sentence, odd, tmp_path, monkeypatch):
    """In its error it names the key, or name and password of the URL, as they came and in the header."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    data = write(tmp_path / "e.jsonl", ("1", *GOOD, "A"), ("2", *GOOD, "A"), ("3", *GOOD, "A"))
    seen = []
    Odd.body = lambda h, _: (
        seen.append(h.headers["Authorization"])
        or (status, {"error": {"message": f"{sentence}: {seen[-1]}, {more}"}})
    )
    for name, url, more in (
        ("key", odd, ""),
        ("password", odd.replace("//", "//me:p4ss%21@"), "sk-secret me:p4ss%21 p4ss!"),
    ):
        done = call(
            E,
            "--model",
            "m",
            "--base-url",
            url,
            "--protocol",
            "instruct",
            "--data",
            data,
            "--out",
            tmp_path / name,
            ok=False,
        )
        call(E, "report", tmp_path / name, ok=False)
        texts = [done.stdout, done.stderr, *(p.read_text() for p in (tmp_path / name).iterdir())]
        assert any("***" in x for x in texts)
        assert not [x for x in texts for s in ("secret", "p4ss", seen[-1].split()[1]) if s in x]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/v1",
        "nonsense",
        "http://[",
        "http://x:y/v1",
        "http://me:pass@127.0.0.1:9/v1",
    ],
)
def test_nobody_listens(url, tmp_path):
    import rmr1

    start = time.time()
    done = call(
        rmr1,
        "judge",
        "--model",
        "m",
        "--protocol",
        "instruct",
        "--base-url",
        url,
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
        and f"--base-url {url.replace('me:pass@', '')}: nobody answers" in done.stderr
    )
    assert time.time() - start < 5


def test_a_server_that_hangs_is_not_waited_for_all_day(odd):
    limits = ServerBackend(odd, "m", 9).session.timeout
    assert limits.sock_connect <= 10 and limits.sock_read <= limits.total <= 3600


def test_ctrl_c_does_not_wait_for_a_server(odd):
    came, over = threading.Event(), threading.Event()
    Odd.body = lambda *_: (came.set(), over.wait(60)) and (200, reply("x"))
    process = subprocess.Popen(
        [
            sys.executable,
            "rmr1.py",
            "judge",
            "--model",
            "m",
            "--protocol",
            "instruct",
            "--base-url",
            odd,
            "--question",
            "q",
            "--a",
            "x",
            "--b",
            "y",
        ],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert came.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130 and "Traceback" not in process.stderr.read()
    finally:
        over.set()
        process.kill()


def test_token_ids_of_the_same_settings_travel_together(odd, monkeypatch):
    """Greedy prompts whatever their seeds, sampled ones by seed, each with the room that its window leaves; the
    answers come to their own requests, in whatever order the server lists them."""
    from judge import backends

    def complete(_, request):
        choices = [
            {"index": n, "token_ids": prompt, "finish_reason": "stop"}
            for n, prompt in enumerate(request["prompt"])
        ]
        return 200, {"choices": choices[::-1]}

    Odd.body = complete
    monkeypatch.setattr(backends, "encode", lambda _, messages: np.array(messages))
    monkeypatch.setattr(backends, "decode_sample", lambda _, ids, tokens: str(tokens))
    backend = ServerBackend(odd, "m", max_tokens=5)
    backend.folder, backend.tokenizer, backend.stop, backend.window = "folder", None, [7], 8
    backend.vocabulary = 100
    requests = [
        ([1, 2], 1, 0.0),
        ([3, 4], 2, 0.0),
        ([1] * 8, 3, 0.0),
        ([1, 2], 4, 1.0),
        ([1] * 6, 5, 0.0),
        ([3, 4], 4, 1.0),
        ([3, 4], 9, 1.0),
    ]
    answers = [future.result(20) for future in backend.submit(requests)]
    assert answers[2].finish == "prompt leaves no room for a judgment in the window of 8 tokens"
    for (prompt, *_), answer in zip(requests, answers):
        assert answer is answers[2] or (answer.text, answer.finish) == (str(prompt), "stop")
    settings = {(r["temperature"], r["seed"], r["max_tokens"]): len(r["prompt"]) for r in Odd.asked}
    assert settings == {(0.0, 0, 5): 2, (0.0, 0, 2): 1, (1.0, 4, 5): 2, (1.0, 9, 5): 1}
    assert all((r["top_p"], r["top_k"], r["stop_token_ids"]) == (1, -1, [7]) for r in Odd.asked)


def test_a_prompt_as_long_as_the_window(monkeypatch):
    from judge import backends

    local = LocalBackend.__new__(LocalBackend)
    local.window, local.max_tokens, local.tokenizer, local.stop = 4, 1, None, []
    local.engine = SimpleNamespace(stream=lambda prompts, *a, **k: iter([*prompts][:0]))
    monkeypatch.setattr(backends, "encode", lambda _, messages: messages)
    said = [a.finish for _, a in local.answers(([0] * n, 0, 0.0) for n in (4, 5))]
    assert said == [
        "prompt leaves no room for a judgment in the window of 4 tokens",
        "prompt longer than the window of 4 tokens",
    ]


# ---------------------------------------------------------------- local models

LOCAL = ("--dtype", "float32", "--max-tokens", 32, "--max-len", 200)


def test_a_killed_evaluation_goes_on_and_ends_the_same(toy, tmp_path):
    """SIGKILL after the first judgments are on disk; the second run asks for the rest only, and the files are
    those of a run that nobody killed."""
    args = (
        "eval.py",
        *LOCAL,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "rl.jsonl",
        "--temperature",
        1,
        "--votes",
        3,
    )
    run(*args, "--out", tmp_path / "whole")
    whole = (tmp_path / "whole/judgments.jsonl").read_text()
    process = subprocess.Popen(
        [sys.executable, *map(str, args), "--out", tmp_path / "cut"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    part, deadline = tmp_path / "cut/judgments.part0.jsonl", time.time() + 120
    while (
        process.poll() is None
        and time.time() < deadline
        and not (part.exists() and part.stat().st_size > 500)
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(part, "a") as f:
        f.write('{"id": "rl/rl-9", "order": 0, "te')  # cut in the middle of a line
    before = len(R.read_lines(part))
    out = run(*args, "--out", tmp_path / "cut")
    assert 0 < before < 64 * 3 and f"/{64 * 3 - before}" in out.stderr.replace(" ", "")
    assert (tmp_path / "cut/judgments.jsonl").read_text() == whole and not part.exists()


def test_two_ranks_judge_as_one_and_overlong_prompts_count(toy, tmp_path):
    args = (
        "eval.py",
        "--dtype",
        "float32",
        "--max-tokens",
        8,
        "--max-len",
        24,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "test.jsonl",
        "--temperature",
        0,
        1,
    )
    run(*args, "--out", tmp_path / "one")
    run(*args, "--out", tmp_path / "two", ranks=2)
    whole, path = (tmp_path / "one/judgments.jsonl").read_text(), tmp_path / "two/judgments.jsonl"
    assert path.read_text() == whole
    path.write_text(
        "".join(whole.splitlines(keepends=True)[1:])
    )  # one missing: a rank has nothing to do
    run(*args, "--out", tmp_path / "two", ranks=2)
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    m = E.measure(E.read_run(tmp_path / "one"))["test"]
    assert 0 < m["no_verdict_reasons"]["prompt longer than the window of 24 tokens"] < 1
    assert m["judgments"] == 32


@pytest.mark.parametrize(
    "a, b, verdict, reason",
    [
        (2.0, 1.0, "A", ""),
        (1.0, 2.0, "B", ""),
        (1.0, 1.0, None, "equal scores"),
        (None, 1.0, None, "longer than the model's window"),
        (math.nan, 1.0, None, "a score is not a number"),
        (1.0, math.nan, None, "a score is not a number"),
        (math.inf, 1.0, None, "a score is not a number"),
    ],
)
def test_the_verdict_of_two_scores(a, b, verdict, reason):
    pair = Pair("1", [{"role": "user", "content": "q"}], *GOOD, "A")
    line = E.scalar_line(E.Task(pair, {}), a, b, E.PromptStyle())
    assert (line["verdict"], line["reason"]) == (verdict, reason)


def test_a_scalar_reward_model(toy, tmp_path):
    """A random classifier: verdicts are those of its scores, computed by transformers one by one."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    model = tmp_path / "scalar"
    shutil.copytree(toy / "model", model)
    config = Qwen2Config.from_pretrained(toy / "model")
    config.num_labels = 1
    torch.manual_seed(0)
    net = Qwen2ForSequenceClassification(config).eval()
    net.save_pretrained(model)
    call(
        E,
        "--scalar",
        "--model",
        model,
        "--dtype",
        "float32",
        "--data",
        toy / "test.jsonl",
        "--out",
        tmp_path / "run",
    )
    got, tokenizer = E.read_run(tmp_path / "run"), AutoTokenizer.from_pretrained(model)
    assert len(got["judgments"]) == 16
    assert got["config"]["weights"] == fingerprint(model, model)
    for x in got["judgments"]:
        p = got["pairs"][x["id"]]
        for score, response in zip(x["scores"], (p["a"], p["b"])):
            ids = tokenizer.apply_chat_template(
                [*p["context"], {"role": "assistant", "content": response}],
                tokenize=True,
                return_dict=False,
            )
            with torch.no_grad():
                assert score == pytest.approx(net(torch.tensor([ids])).logits.item(), abs=1e-4)
        assert x["verdict"] == ("A" if x["scores"][0] > x["scores"][1] else "B")


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_every_benchmark_in_one_command(tmp_path):
    """Real rows of all five, the real tokenizer, a small random Qwen2: one engine, one file, every part
    counted."""
    from transformers import Qwen2Config

    model = tmp_path / "model"
    shutil.copytree(SHARED / "tokenizers/qwen2.5", model)
    (model / "config.json").chmod(0o644)
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=152064,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=151645,
    ).save_pretrained(model)
    out = run(
        "eval.py",
        "--bench",
        "all",
        "--data-dir",
        SHARED / "data",
        "--limit",
        1,
        "--model",
        model / "config.json",
        "--protocol",
        "instruct",
        "--dtype",
        "float32",
        "--max-tokens",
        4,
        "--out",
        tmp_path / "run",
        timeout=600,
    ).stdout
    got = E.read_run(tmp_path / "run")
    measured = E.measure(got)
    assert list(measured) == list(B.BENCHES)
    assert measured["rewardbench"]["judgments"] == 23 and measured["rm-bench"]["judgments"] == 36
    assert measured["judgebench"]["says_a"] is None and measured["judgebench"]["no_verdict"] == 1
    for bench in ("rewardbench", "rm-bench", "rmb"):  # whole, though small: every subset is there
        assert measured[bench]["accuracy"]["greedy"] == 0, bench
    assert measured["rewardbench2"]["accuracy"]["greedy"] is None
    assert measured["rewardbench2"]["missing"] == ["Focus", "Precise IF", "Safety"]
    assert measured["rewardbench2"]["metrics"]["Ties"] < 0.5 and "partial, without" in out
