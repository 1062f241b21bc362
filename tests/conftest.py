"""What tests share: a tiny world on disk, a way to run scripts, and the real data where it is present."""
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
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SOAK = "SOAK" in os.environ                 # make soak: the long forms of what `make test` has in short
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch's import: two workers have a core each


# ---------------------------------------------------------------- how pytest runs, and what it says

def pytest_configure(config):
    config.addinivalue_line("markers", "soak: has a long form")
    config.addinivalue_line("markers", "check(part): what `make check` runs, on a card where there is one")
    if config.option.verbose < 0 and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """How many processes share the tests under `-n auto`: two, or this one where they would share a card.
    More were not tried: each takes 2 GB and more, and some tests have four ranks."""
    import torch
    return 2 if len(os.sched_getaffinity(0)) > 1 and not torch.cuda.is_available() else 0


def pytest_make_parametrize_id(val):
    """Two workers must give a test the same name, and gzip writes the time into its bytes."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


class Progress:
    """With -q, a line for each file when its last test has ended; two workers would mix the dots of several:
    time since the start, file, outcomes, seconds of its tests and fixtures, names of what failed."""

    def __init__(self, config):
        self.config, self.began = config, time.monotonic()
        self.left, self.seconds, self.outcomes = Counter(), Counter(), defaultdict(Counter)
        self.failed = defaultdict(list)

    def pytest_collection_finish(self, session):
        self.expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self.expect(ids)

    def expect(self, ids):
        self.left = self.left or Counter(i.split("::")[0] for i in ids)     # every worker collects them all

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self):
        category, _, word = yield
        return category, "", word

    def pytest_runtest_logreport(self, report):
        file, _, name = report.nodeid.partition("::")
        self.seconds[file] += report.duration
        if report.when == "call" or not report.passed:
            self.outcomes[file][report.outcome] += 1
        if report.failed:
            self.failed[file].append(name)
        if report.when in ("setup", "call"):                # last comes "teardown", or "???" of a dead worker
            return
        self.left[file] -= 1
        if not self.left[file]:
            said = ", ".join(f"{n} {what}" for what, n in self.outcomes[file].items())
            minutes, seconds = divmod(round(time.monotonic() - self.began), 60)
            line = f"{minutes:2}:{seconds:02}  {file:30} {said:24} {self.seconds[file]:4.0f} s"
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line("  ".join([line, *self.failed[file]]), red=bool(self.failed[file]))
            terminal.flush()                                # through a pipe it would wait for more


# ---------------------------------------------------------------- scripts

def environment():
    """For a process of its own: without the process group that this one may be."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Warm:
    """warm.py, started at its first use: lives of scripts without the start of Python, torch and vLLM."""
    process = None

    def begin(self, command, ranks=1, kill=None):
        """-> process ids"""
        if self.process is None:
            # Unbuffered: a line that waited in a buffer here would not show in `select`.
            self.process = subprocess.Popen([sys.executable, "tests/warm.py"], cwd=ROOT, env=environment(), bufsize=0,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.folder = tempfile.TemporaryDirectory()
            atexit.register(self.close)
        self.files = [Path(self.folder.name) / name for name in ("out", "err")]
        for path in self.files:
            path.write_text("")
        out, err = map(str, self.files)
        life = {"argv": [str(c) for c in command], "ranks": ranks, "env": environment(), "out": out, "err": err,
                "kill": kill}
        self.process.stdin.write(json.dumps(life).encode() + b"\n")
        self.pids = [int(pid) for pid in self.process.stdout.readline().split()]
        return self.pids

    def end(self, timeout=300):
        """-> CompletedProcess of the life that has begun; TimeoutExpired if it does not end"""
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.stdout.readline()
            raise subprocess.TimeoutExpired(self.pids, timeout)
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(self.pids, status, *(p.read_text(errors="replace") for p in self.files))

    def close(self):
        self.process.kill()                 # it has nothing to end but libraries, for seconds
        self.process.wait()


WARM = Warm()


@contextlib.contextmanager
def turn(ranks):
    """One run of several ranks at a time among all tests on this machine: two cores have no more to give, and
    the memory that vLLM's ranks share has the same name in every run."""
    with open(Path(tempfile.gettempdir()) / f"rmr1-tests-{os.getuid()}.lock", "w") as file:
        if ranks > 1:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(*command, ranks=1, ok=True, timeout=300, fresh=False):
    """Run a script of the project as a person would, on one or several ranks: in a fresh process, by torchrun where
    there are several, or forked from one that has its imports. -> CompletedProcess, output as text"""
    import torch
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks want {ranks} cards; this machine has {torch.cuda.device_count()}")
    with turn(ranks):
        if fresh or torch.cuda.is_available():
            launch = [sys.executable] if ranks == 1 else [
                sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
            done = subprocess.run([*launch, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                                  timeout=timeout, env=environment())
        else:
            WARM.begin(command, ranks)
            done = WARM.end(timeout)
    if ok and done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done


def call(script, *args, ok=True):
    """A script's main() in this process, for what needs no fresh one: starting Python, torch and vLLM costs
    more than most such tests. -> CompletedProcess, output as text"""
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [script.__file__, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            script.main()
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = argv
    if ok and code:
        pytest.fail(f"{script.__name__} {args} ended with {code}:\n{err.getvalue()[-4000:]}")
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


class Replies(BaseHTTPRequestHandler):
    """The part of a small OpenAI-compatible server that every test's server has: it answers in JSON, asks for
    no pause before the next try, and keeps quiet."""

    def reply(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, v in (("Content-Type", "application/json"), ("Retry-After", "0"),
                        ("Content-Length", str(len(data)))):
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
    run("data/toy.py", "--out", out, "--sft", 256, "--rl", 64, "--test", 16, "--layers", 2, "--hidden", 32)
    return out


@pytest.fixture(scope="session")
def ranks():
    """This process as a process group of one."""
    from ranks import start_ranks
    return start_ranks()


def save_qwen2(folder, tied, std=0.1):
    """A small random Qwen2 with grouped keys and biases, saved by transformers itself. Heads of 32: vLLM
    takes no smaller ones on a CPU."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=300, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=std,
        bos_token_id=None, eos_token_id=2, pad_token_id=0))
    for p in model.parameters():              # transformers starts biases at 0, which would hide a lost one
        p.data += std / 2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model.eval()
