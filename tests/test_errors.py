"""What goes wrong is said once, by whoever met it, and nothing else ends with it."""

import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_serve import Model, events, gateway, post

import rmr1
from conftest import ROOT, call, environment
from lib.files import Failure, exit_code, first_line, json_text, progress_bar, read_lines

PAIR = {"prompt": "q", "a": "is 5", "b": "is 3"}


def test_a_failure_passes_every_except_exception():
    with pytest.raises(Failure):
        try:
            raise Failure("no such file")
        except Exception:
            pytest.fail("it was taken for an error of the code")


LAUNCH = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from lib.files import Failure, run_main, this_rank

def main():
    if this_rank() in RANKS:
        raise Failure("no such file on this node")

run_main(main)
"""


@pytest.mark.parametrize("ranks, launches", [((1,), 1), ((0, 1), 2)])
def test_each_sentence_is_said_once_by_a_rank_that_met_it(ranks, launches, tmp_path):
    """Two ranks under torchrun, of which these fail: also where it is not the first. Another launch says it again."""
    script = tmp_path / "fails.py"
    script.write_text(f"RANKS = {ranks}\n{LAUNCH}")
    for _ in range(launches):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
        )
        met_by = re.findall(r"error in rank (\d): no such file on this node", done.stderr)
        assert len(met_by) == 1 and int(met_by[0]) in ranks and done.returncode, done.stderr


@pytest.mark.parametrize(
    "slip, code, words",
    [
        ("raise Failure('a sentence')", 2, ["error: a sentence"]),
        ("sys.exit('a sentence')", 1, ["error: a sentence"]),
        ("sys.exit(ValueError('a sentence'))", 1, ["error: a sentence"]),
        ("sys.exit(3.5)", 1, ["error: 3.5"]),
        ("sys.exit()", 0, []),
        ("None.missing", 1, ["Traceback", "AttributeError"]),
    ],
)
def test_a_sentence_stays_one_and_a_slip_keeps_its_traceback(slip, code, words, capsys):
    def main():
        exec(slip, {"Failure": Failure, "sys": sys})

    assert exit_code(main) == code
    errors = capsys.readouterr().err
    assert all(word in errors for word in words) and ("Traceback" in errors) == (
        "Traceback" in words
    )


def test_a_slip_in_a_forked_policy_shows_its_own_line(toy, tmp_path):
    """Policy.forward of a copy of the project is edited badly: SFT says what it was doing, and shows the line."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "assets", "docs")
    )
    (path,) = copy.rglob("policy.py")
    text = path.read_text()
    slip = "        slip = self.no_such_attribute\n"
    line = next(x for x in text.splitlines(keepends=True) if "nn.Module.__call__(" in x)
    path.write_text(text.replace(line, slip + line))
    done = subprocess.run(
        [
            sys.executable,
            "sft.py",
            "--model",
            toy / "model/config.json",
            "--data",
            toy / "sft.jsonl",
            "--dtype",
            "float32",
            "--out",
            tmp_path / "out",
            "--batch",
            "16",
            "--max-len",
            "160",
        ],
        cwd=copy,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 2 and slip.strip() in done.stderr and "AttributeError" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("error: --model")


class FullDisk:
    """A file on a disk that has room for nothing more."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_the_journal_leaves_the_server_alive(tmp_path):
    with gateway() as url:
        journal = url.gate.judge.journal
        journal.path, journal.file = tmp_path / "journal.jsonl", FullDisk()
        for _ in range(2):
            r = post(url, "/compare", PAIR)
            assert (
                r.status_code == 500
                and "cannot be written (No space left" in r.json()["error"]["message"]
            )
            url.gate.judge.journal.answers.clear()
        journal.file = None
        assert post(url, "/compare", PAIR).json()["verdict"] == "A"


def test_an_error_of_the_code_tells_a_caller_nothing_of_its_own():
    class Slips(Model):
        def answer(self, *_):
            return None.secret

    with gateway(Slips()) as url:
        r = post(url, "/compare", PAIR)
        assert (
            r.status_code == 500
            and "secret" not in r.text
            and "log" in r.json()["error"]["message"]
        )


def test_a_script_that_fails_in_a_test_ends_as_in_a_shell(tmp_path):
    import eval

    done = call(
        eval,
        "--model",
        tmp_path / "none",
        "--data",
        tmp_path / "none.jsonl",
        "--out",
        tmp_path,
        ok=False,
    )
    assert done.returncode == 2 and done.stderr.startswith(
        f"error: {tmp_path}/none.jsonl: no such file"
    )


def test_a_slip_in_a_streamed_comparison_goes_into_the_log_only(capfd):
    class Slips(Model):
        def answer(self, *_):
            return None.secret

    with gateway(Slips()) as url:
        name, data = [*events(url, PAIR)][-1]
    assert name == "error" and data["error"]["code"] == 500
    assert "secret" not in data["error"]["message"] and "log" in data["error"]["message"]
    assert "'NoneType' object has no attribute 'secret'" in capfd.readouterr().err


# ---------------------------------------------------------------- what is written and printed


@pytest.mark.parametrize(
    "value, text",
    [
        ({"loss": math.nan}, '{"loss": null}'),
        ({"a": [1.5, math.inf, (-math.inf,)]}, '{"a": [1.5, null, [null]]}'),
        ({"x": {"y": [{"z": math.nan, "w": 0}]}}, '{"x": {"y": [{"z": null, "w": 0}]}}'),
        ({"a": np.float32(0.5), "b": [np.int64(3), np.bool_(True)]}, '{"a": 0.5, "b": [3, true]}'),
        ({"a": np.float32("nan"), "b": np.array([1.0, np.inf])}, '{"a": null, "b": [1.0, null]}'),
        ({"a": torch.tensor(2), "b": torch.tensor([0.5]).bfloat16()}, '{"a": 2, "b": [0.5]}'),
        ({math.nan: 1, np.int64(2): 3}, '{"nan": 1, "2": 3}'),
        ({"whole": 1, "yes": True, "none": None, "text": "NaN"}, None),
    ],
    ids=str,
)
def test_numbers_that_json_has_not_are_null_and_others_are_pythons(value, text):
    written = json_text(value)
    assert written == (text or json.dumps(value))
    json.loads(written, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "message, line",
    [
        ("no such file\nat 0x7", "no such file"),
        ("\n\n  it is cut  \nat", "it is cut"),
        ("Class validation error for validator 'layers':\n    ValueError: 3 is not 2", "is not 2"),
        ("1 validation error for Thing\nsize\n  it must be a number", "Thing size"),
        ("", "ValueError('')"),
        ("x" * 999, "x" * 150),
    ],
)
def test_the_first_line_of_a_message_says_why(message, line):
    found = first_line(ValueError(message))
    assert found.endswith(line) and "\n" not in found and len(found) <= 150


def test_a_slip_in_what_is_written_keeps_its_traceback():
    with pytest.raises(TypeError):
        json_text({"a": {1, 2}})


@pytest.mark.parametrize("terminal, lines", [(False, 1), (True, 30)])
def test_a_bar_that_is_no_terminals_prints_a_line_each_ten_seconds(terminal, lines, monkeypatch):
    """A hundred updates in twelve seconds by a clock of its own."""
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    err = io.StringIO()
    err.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", err)
    for _ in progress_bar(range(100), "steps"):
        clock[0] += 0.12
    states = [state for state in re.split(r"[\r\n]+", err.getvalue()) if state.strip()]
    assert len(states) >= lines and (terminal or len(states) <= 2)
    assert "100/100" in states[-1] and ("\r" in err.getvalue()) == terminal


def test_a_short_bar_in_a_file_prints_its_end(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    bar = progress_bar(range(1000), "steps", leave=False)
    for _ in bar:
        bar.set_postfix({"loss": 1.0}, refresh=False)
    assert err.getvalue() == ""
    list(progress_bar(range(1000), "steps"))
    assert len(err.getvalue().splitlines()) == 1 and "1000/1000" in err.getvalue()


def test_other_ranks_draw_no_bar(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert progress_bar(range(2), "steps").disable


def test_every_bar_is_made_in_one_place():
    """rmr1.py's is the one of a judge that nobody watches."""
    folders = ("", "lib/", "judge/", "serve/", "data/", "tools/", "forks/")
    files = [path for folder in folders for path in ROOT.glob(f"{folder}*.py")]
    calls = re.compile(r"\btqdm\((?!disable=True\))")
    assert [path.name for path in files if calls.search(path.read_text())] == ["files.py"]


def test_what_libraries_print_in_python_or_below_goes_to_a_file(tmp_path):
    """Also where the block ends in an error, which is printed where it belongs."""
    log = tmp_path / "log"
    script = f"""
import os, subprocess, sys
from lib.files import output_in_file
print("before")
with output_in_file({str(log)!r}):
    print("from Python")
    print("a warning", file=sys.stderr)
    os.write(2, b"from C++\\n")
    subprocess.run(["echo", "from a child"])
    raise RuntimeError("no weights")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    printed = ["a warning", "from C++", "from Python", "from a child"]
    assert sorted(log.read_text().splitlines()) == printed
    assert done.stdout == "before\n" and done.stderr.endswith("RuntimeError: no weights\n")


def test_a_judge_says_what_it_waits_for_and_where_messages_go(monkeypatch, capfd):
    """A model in this process: its libraries' messages are in the file that the first line names, also where the
    model cannot be loaded; --verbose shows them. A server loads nothing here."""

    def loads(model, *_, **__):
        os.write(2, b"[rank0] Warning: NUMA\n")
        raise Failure(f"{model}: cannot be loaded")

    monkeypatch.setattr(rmr1, "Judge", loads)
    pair = ("--question", "q", "--a", "x", "--b", "y")
    done = call(rmr1, "judge", "--model", "m", *pair, ok=False)
    first, *rest = done.stderr.splitlines()
    log = Path(re.search(r"\S+\.log", first)[0])
    assert "half a minute" in first and rest == ["error: m: cannot be loaded"]
    assert "NUMA" in log.read_text() and "NUMA" not in capfd.readouterr().err
    call(rmr1, "judge", "--model", "m", "--verbose", *pair, ok=False)
    assert "NUMA" in capfd.readouterr().err
    done = call(rmr1, "judge", "--model", "http://127.0.0.1:1/v1", *pair, ok=False)
    assert "half a minute" not in done.stderr


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"id": "p"}', "x.jsonl:2: has no step"),
        ('{"step": "one"}', "x.jsonl:2: step is 'one'"),
        ('{"step": null}', "x.jsonl:2: step is 'None'"),
        ("[1]", "x.jsonl:2: not a JSON object"),
    ],
)
def test_a_line_without_its_fields_is_named(line, complaint, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(Failure, match=re.escape(complaint)):
        read_lines(path, {"step": int})


@pytest.mark.parametrize("command", ["journal", "rejects"])
def test_what_cannot_be_written_is_refused_before_a_model_loads(command, tmp_path, monkeypatch):
    monkeypatch.setattr(rmr1, "make_backend", lambda *_, **__: pytest.fail("it loads"))
    data, path = tmp_path / "d.jsonl", tmp_path / "d.jsonl" / "inside"
    data.write_text('{"prompt": "q", "completion": "x"}\n')
    done = call(rmr1, "reward", "--model", "m", "--data", data, f"--{command}", path, ok=False)
    assert done.returncode == 2 and f"--{command} {path}: cannot be written" in done.stderr
