"""What tests share: a tiny world on disk, ways to run scripts, and the real data where it is present."""

import atexit
import contextlib
import fcntl
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SOAK = "SOAK" in os.environ  # make soak runs the long forms of some tests
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch's import: each of two workers has one core


# ---------------------------------------------------------------- how pytest runs


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: has a long form")
    config.addinivalue_line(
        "markers", "check(part): what `make check` runs, on a card where there is one"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """How many processes share the tests under `-n auto`: two, or this one where they would share a card.

    More were not tried: each takes 2 GB and more, and some tests have four ranks.
    """
    import torch

    return 2 if len(os.sched_getaffinity(0)) > 1 and not torch.cuda.is_available() else 0


def pytest_make_parametrize_id(val):
    """A name for bytes that is the same in both workers: gzip writes the time into its output."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


# ---------------------------------------------------------------- scripts


def environment():
    """Environment variables for another process, without the process group that this one may be."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    others = {name: value for name, value in os.environ.items() if name not in group}
    return others | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Warm:
    """warm.py, started at its first use: it runs scripts without the start of Python, torch and vLLM."""

    process = None

    def begin(self, command, ranks=1, kill=None):
        """-> process ids"""
        if self.process is None:
            # Unbuffered: a line that waited in a buffer here would not show in `select`.
            self.process = subprocess.Popen(
                [sys.executable, "tests/warm.py"],
                cwd=ROOT,
                env=environment(),
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self.folder = tempfile.TemporaryDirectory()
            atexit.register(self.close)
        self.files = [Path(self.folder.name) / name for name in ("out", "err")]
        for path in self.files:
            path.write_text("")
        out, err = map(str, self.files)
        life = {
            "argv": [str(c) for c in command],
            "ranks": ranks,
            "env": environment(),
            "out": out,
            "err": err,
            "kill": kill,
        }
        self.process.stdin.write(json.dumps(life).encode() + b"\n")
        self.pids = [int(pid) for pid in self.process.stdout.readline().split()]
        return self.pids

    def end(self, timeout=300):
        """-> CompletedProcess of the script that was begun. Raises TimeoutExpired if it does not end."""
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.stdout.readline()
            raise subprocess.TimeoutExpired(self.pids, timeout)
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(
            self.pids, status, *(p.read_text(errors="replace") for p in self.files)
        )

    def close(self):
        self.process.kill()  # a regular end would take libraries seconds, and has nothing to save
        self.process.wait()


WARM = Warm()


@contextlib.contextmanager
def turn(ranks):
    """A lock for runs of several ranks: all tests on this machine start one of them at a time.

    Two cores have no more to give, and the memory that vLLM's ranks share has the same name in every run.
    """
    with open(Path(tempfile.gettempdir()) / f"rmr1-tests-{os.getuid()}.lock", "w") as file:
        if ranks > 1:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(*command, ranks=1, ok=True, timeout=300, fresh=False):
    """Run a script of the project as a person would. -> CompletedProcess, output as text

    ranks  processes that run it together
    ok     an exit code other than 0 fails the test
    fresh  start Python anew, by torchrun for several ranks, rather than fork a process that has the imports
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(
            f"{ranks} ranks want {ranks} cards; this machine has {torch.cuda.device_count()}"
        )
    with turn(ranks):
        if fresh or torch.cuda.is_available():
            torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
            launch = [sys.executable, *(torchrun if ranks > 1 else [])]
            done = subprocess.run(
                [*launch, *map(str, command)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=timeout,
                env=environment(),
            )
        else:
            WARM.begin(command, ranks)
            done = WARM.end(timeout)
    if ok and done.returncode:
        pytest.fail(
            f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-4000:]}"
        )
    return done


def call(script, *args, ok=True):
    """Run a script's main() in this process: starting another costs more than most tests that use this.

    ok  an exit code other than 0 fails the test
    -> CompletedProcess, output as text
    """
    from lib.files import exit_code

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script.__file__, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = exit_code(script.main)
    finally:
        sys.argv = argv
    if ok and code:
        pytest.fail(f"{script.__name__} {args} ended with {code}:\n{err.getvalue()[-4000:]}")
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


class Replies(BaseHTTPRequestHandler):
    """Base of the tests' small OpenAI-compatible servers: answers in JSON, with no pause before a retry."""

    def reply(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, v in (
            ("Content-Type", "application/json"),
            ("Retry-After", "0"),
            ("Content-Length", str(len(data))),
        ):
            self.send_header(name, v)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def metrics(folder):
    return [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A tiny world: sft.jsonl, rl.jsonl, val.jsonl, test.jsonl and model/."""
    out = tmp_path_factory.mktemp("toy")
    run(
        "data/toy.py",
        "--out",
        out,
        "--sft",
        256,
        "--rl",
        64,
        "--test",
        16,
        "--layers",
        2,
        "--hidden",
        32,
    )
    return out


@pytest.fixture(scope="session")
def ranks():
    """This process as a process group of one."""
    from lib.dist import start_ranks

    return start_ranks()


def save_qwen2(folder, tied, std=0.1):
    """A small random Qwen2 with grouped keys and biases, saved by transformers itself.

    Its heads have 32 channels, the least that vLLM takes on a CPU.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=448,  # more than the tokens of the toy tokenizer, which tests put beside it
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            initializer_range=std,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    for p in model.parameters():  # transformers starts biases at 0, which would hide a lost one
        p.data += std / 2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model.eval()
