"""What goes wrong is said once, by whoever met it, and nothing else ends with it."""

import errno
import re
import shutil
import subprocess
import sys

import pytest
from test_serve import Model, events, gateway, post

from conftest import ROOT, call, environment
from lib.files import Failure, exit_code

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
