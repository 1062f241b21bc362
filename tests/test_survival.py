"""Same step however it is cut; killed, stopped, out of disk or out of numbers, and still the same run."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, SOAK, WARM, environment, metrics, run
from lib import checkpoint, packing
from lib import policy as P

SFT = (
    "sft.py",
    "--dtype",
    "float32",
    "--no-recompute",
    "--batch",
    16,
    "--lr",
    3e-3,
    "--max-len",
    160,
)
GRPO = (
    "grpo.py",
    "--dtype",
    "float32",
    "--no-recompute",
    "--batch",
    8,
    "--mini-batch",
    4,
    "--group-size",
    3,
    "--max-prompt",
    80,
    "--max-response",
    24,
    "--lr",
    1e-3,
    "--max-mismatch",
    0.001,
    "--reward",
    "random",
)
KILLS = 20 if SOAK else 4
TIMING = ("seconds", "peak_gib", "tokens_per_second")


def plain(folder):
    return [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in metrics(folder)]


def weights(folder):
    return {
        k: v
        for f in sorted((folder / "model").glob("*.safetensors"))
        for k, v in load_file(f).items()
    }


def close(a, b):
    """All weights together agree to 1e-5 of their size, each to 1e-4, the bias of the keys to 1e-3: it shifts
    all scores of a query nearly alike, so it has next to no gradient, and Adam makes steps of full size from
    what rounding leaves of it."""
    assert a.keys() == b.keys()
    flat = lambda w: torch.cat([w[k].flatten() for k in sorted(a)])
    assert (flat(a) - flat(b)).norm() <= 1e-5 * flat(a).norm()
    for k in a:
        assert (a[k] - b[k]).norm() <= (1e-3 if k.endswith("k_proj.bias") else 1e-4) * a[
            k
        ].norm(), k


def live(command, out, kill=None, delay=None):
    """One life of a script. It ends by itself, at the place `kill` of warm.py, or by SIGKILL `delay` seconds after a
    checkpoint got its name. -> exit status"""
    newest = lambda: ([None] + [s.name for s in checkpoint.finished_checkpoints(out / "state")])[-1]
    before, deadline = newest(), time.time() + 60
    (pid,) = WARM.begin((*command, "--out", out), kill=kill)
    if delay is not None:
        while newest() == before and time.time() < deadline and Path(f"/proc/{pid}/stat").exists():
            time.sleep(0.002)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    done = WARM.end()
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


# ---------------------------------------------------------------- the same step


@pytest.mark.parametrize(
    "script, more",
    [
        (SFT, ("--epochs", 0.0625)),
        (GRPO, ("--steps", 1)),
        (
            GRPO,
            (
                "--steps",
                1,
                "--loss-mean",
                "token",
                "--offload",
            ),
        ),
    ],
    ids=["sft", "grpo", "grpo-variants"],
)
def test_a_step_does_not_depend_on_how_it_is_cut(script, more, toy, tmp_path):
    """One row at a time, all packed in one, on two ranks, and on four that hold two copies of the weights:
    loss, gradient norm and new weights agree."""
    data = toy / ("sft.jsonl" if script is SFT else "rl.jsonl")
    command = (
        *script,
        *more,
        "--model",
        toy / "model/config.json",
        "--data",
        data,
        "--save-every",
        0,
    )
    live((*command, "--micro-tokens", 16384), tmp_path / "one")
    live((*command, "--micro-tokens", 1), tmp_path / "cut")
    run(*command, "--micro-tokens", 150, "--out", tmp_path / "two", ranks=2)
    names = ["cut", "two"]
    if script is SFT:
        names.append("copies")
        run(*command, "--micro-tokens", 150, "--shard", 2, "--out", tmp_path / "copies", ranks=4)
    one = metrics(tmp_path / "one")[0]
    for name in names:
        other = metrics(tmp_path / name)[0]
        # The loss of GRPO is a sum of terms around 1 that nearly cancel: its rounding is theirs.
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-6), name
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5), name
        close(weights(tmp_path / "one"), weights(tmp_path / name))


# ---------------------------------------------------------------- killed


def start(*command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def killed(command, tmp_path, places, seed):
    """A run that nobody killed, and the same run killed at KILLS seeded moments: at `places` (see warm.py), and up
    to a fifth of a second after a checkpoint. Metrics and weights are equal, bit for bit."""
    live(command, tmp_path / "whole")
    rng, out, torn = random.Random(seed), tmp_path / "cut", 0
    moments = [
        *({"kill": place(rng)} for place in places),
        *({"delay": rng.random() * 0.2} for _ in range(KILLS - len(places))),
    ]
    rng.shuffle(moments)
    for number, moment in enumerate(moments):
        assert live(command, out, **moment) == -signal.SIGKILL, (
            f"the run was over before kill {number}"
        )
        torn += len(list((out / "state").glob("*.tmp")))
    assert live(command, out) == 0
    assert plain(out) == plain(tmp_path / "whole") and torn, (
        "no kill fell into the writing of a checkpoint"
    )
    ours, theirs = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    return tmp_path / "whole"


@pytest.mark.check("a killed run goes on")
def test_a_killed_run_goes_on_where_it_was(toy, tmp_path, record_property):
    """SIGKILL after a checkpoint got its name, in a process that nobody prepared: the same steps follow. Bit
    for bit on a CPU; a card's sums depend on the batch."""
    command = (
        *GRPO,
        "--steps",
        4,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "rl.jsonl",
        "--save-every",
        1,
    )
    run(*command, "--out", tmp_path / "whole")
    process, deadline = start(*command, "--out", tmp_path / "cut"), time.time() + 200
    while time.time() < deadline and not checkpoint.finished_checkpoints(tmp_path / "cut/state"):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "resumed at step" in run(*command, "--out", tmp_path / "cut").stdout
    ours, theirs = plain(tmp_path / "cut"), plain(tmp_path / "whole")
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))
    record_property("largest difference of losses", gap)
    assert gap < 0.05 if torch.cuda.is_available() else ours == theirs


IN_A_SAVE = lambda rng: ["save", rng.randint(1, 60), 0]
IN_A_SYNC = lambda rng: ["sync", rng.randint(1, 3), rng.randint(0, 25)]


@pytest.mark.soak
def test_sft_killed_again_and_again_is_the_same_run(toy, tmp_path):
    command = (
        *SFT,
        "--epochs",
        14 if SOAK else 4,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "sft.jsonl",
        "--save-every",
        1,
    )
    killed(command, tmp_path, [IN_A_SAVE] * (6 if SOAK else 2), seed=0)


@pytest.mark.soak
def test_grpo_killed_again_and_again_is_the_same_run(toy, tmp_path):
    """Among them in the middle of a sync. Then on another number of ranks: a run begun on one rank goes on on
    two, and one begun on two goes on on one, with the same samples and numbers to 1e-4."""
    steps = 16 if SOAK else 8
    command = (
        *GRPO,
        "--steps",
        steps,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "rl.jsonl",
        "--save-every",
        1,
    )
    whole = killed(
        command,
        tmp_path,
        [IN_A_SAVE] * 5 + [IN_A_SYNC] * 7 if SOAK else [IN_A_SAVE, IN_A_SYNC, IN_A_SYNC],
        seed=1,
    )
    assert live(command, tmp_path / "1to2", delay=0) and live(command, tmp_path / "1to2", delay=0)
    run(*command, "--out", tmp_path / "1to2", ranks=2)
    run(*command[:-1], 5, "--steps", 5, "--out", tmp_path / "2to1", ranks=2)
    live(command, tmp_path / "2to1")
    for name in ("1to2", "2to1"):
        ours, theirs = plain(tmp_path / name), plain(whole)
        assert [r["samples_digest"] for r in ours] == [r["samples_digest"] for r in theirs]
        for a, b in zip(ours, theirs):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("number, ranks", [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_a_signal_saves_and_stops_at_the_next_step(number, ranks, toy, tmp_path):
    """The signal reaches one rank; all save together, leave OUT/stopped and exit cleanly. The same command
    goes on."""
    command = (
        *SFT,
        "--epochs",
        3,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "sft.jsonl",
        "--save-every",
        0,
    )
    run(*command, "--out", tmp_path / "whole", ranks=ranks)
    out = tmp_path / "cut"
    pids = WARM.begin((*command, "--out", out), ranks)
    deadline = time.time() + 120
    log = out / "metrics.jsonl"
    while time.time() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    os.kill(pids[-1], number)
    assert WARM.end(120).returncode == 0
    said = (out / "stopped").read_text()
    step = int(said.split(":")[0].split()[1])
    assert 0 < step < 48 and len(checkpoint.finished_checkpoints(out / "state")) == 1
    run(*command, "--out", out, ranks=ranks)
    assert plain(out) == plain(tmp_path / "whole") and not (out / "stopped").exists()


# ---------------------------------------------------------------- full disks, bad numbers


def test_a_full_disk_leaves_the_last_checkpoint(toy, ranks, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        net = P.load_policy(toy / "model/config.json", torch.device("cpu"), torch.float32)
        optim = P.adamw(net, 1e-3, (0.9, 0.95), 0.0)
        state = checkpoint.Checkpoints(net, optim, disk / "state")
        state.save(1)
        assert state.settle()
        kept = {k: v.full_tensor().clone() for k, v in net.named_parameters()}
        free = os.statvfs(disk)
        (disk / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 20000)))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1)
        state.save(2)
        assert not state.settle()
        assert "no checkpoint after step 2" in capsys.readouterr().err
        assert [s.name for s in (disk / "state").iterdir()] == ["step_000001"]
        assert state.load() == 1
        assert all(torch.equal(v.full_tensor(), kept[k]) for k, v in net.named_parameters())
    finally:
        subprocess.run(["umount", disk])


def test_a_step_without_a_finite_gradient_changes_nothing(toy, ranks):
    net = P.load_policy(toy / "model/config.json", torch.device("cpu"), torch.float32)
    optim = P.adamw(net, 1e-3, (0.9, 0.95), 0.0)
    before = {k: v.full_tensor().clone() for k, v in net.named_parameters()}
    (batch,) = packing.pack([([1, 2, 3], [[4, 5]])], 100, torch.device("cpu"))
    (net(batch).sum() * float("inf")).backward()
    norm = P.optimizer_step(net, optim, 1e-3, 1.0)
    assert not norm < float("inf") and not optim.state
    assert all(torch.equal(v.full_tensor(), before[k]) for k, v in net.named_parameters())


def test_bad_steps_in_a_row_stop_the_run_with_a_checkpoint(toy, tmp_path):
    """SFT of a model with a NaN in it; GRPO whose first update throws the weights out of all range, so that
    the other three of its step have no gradient: what is bad is skipped and named, and the end comes with a
    checkpoint and without a model. So it does where the bad updates are the last ones and fewer than that."""
    from safetensors.torch import save_file

    first = tmp_path / "first"
    run(
        *SFT,
        "--epochs",
        0.0625,
        "--save-every",
        0,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "sft.jsonl",
        "--out",
        first,
    )
    good = tmp_path / "good"
    shutil.copytree(first / "model", good)
    (path,) = (first / "model").glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    sft = (*SFT, "--model", first / "model", "--data", toy / "sft.jsonl")
    for name, bad, command in (
        ("sft", 3, (*sft, "--epochs", 1)),
        ("short", 1, (*sft, "--epochs", 0.0625)),
        (
            "grpo",
            3,
            (
                *GRPO,
                "--steps",
                5,
                "--lr",
                1e30,
                "--mini-batch",
                2,
                "--model",
                good,
                "--data",
                toy / "rl.jsonl",
            ),
        ),
    ):
        done = run(*command, "--max-bad", 3, "--save-every", 0, "--out", tmp_path / name, ok=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert f"error: {bad} updates in a row had no finite gradient" in done.stderr
        assert (
            checkpoint.finished_checkpoints(tmp_path / name / "state")
            and not (tmp_path / name / "model").exists()
        )
        rows = metrics(tmp_path / name)
        assert rows and all(r.get("skipped_rows") or r.get("skipped_pairs") for r in rows)


# ---------------------------------------------------------------- hung, and alone


@pytest.mark.parametrize(
    "how, first",
    [
        ("hang", "has been in the phase 'sample' for more than 0.4 minutes (--timeout), at "),
        ("raise", "error in rank 1: in the phase 'sample':\nTraceback (most recent call last):"),
    ],
    ids=["hang", "raise"],
)
def test_a_run_ends_when_a_rank_hangs_or_dies(how, first, toy, tmp_path):
    """One of two ranks stops answering, or fails, in its third step: within a minute the whole run has ended,
    and what comes first says what it was. A rank that lost another says so in one line. What fails is
    torchrun's; what hangs is forked, for imports in a phase could take as long as --timeout."""
    (tmp_path / "sick.py").write_text(SICK)
    done = run(
        tmp_path / "sick.py",
        how,
        *GRPO[1:],
        "--steps",
        50,
        "--timeout",
        0.4 if how == "hang" else 5,
        "--save-every",
        1,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "rl.jsonl",
        "--out",
        tmp_path / "out",
        ranks=2,
        ok=False,
        fresh=how == "raise",
    )
    assert time.time() - (tmp_path / "sick.at").stat().st_mtime < 60
    said = done.stderr[done.stderr.index("SICK") + 4 :]
    said = said.split('Traceback (most recent call last):\n  File "<frozen runpy>"')[
        0
    ]  # torchrun's own
    assert done.returncode and first in said and said.count("Traceback") == (how == "raise"), said
    if how == "raise":
        assert said.index(first) < said.index("in rank 0: lost another rank in the phase 'sample'")
    assert checkpoint.finished_checkpoints(tmp_path / "out/state")


OOM = "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')"
SAID = {
    "raise Failure('no such file')": "no such file",
    "1 / 0": "ZeroDivisionError",
    "raise KeyboardInterrupt": "interrupted; the same command goes on from what is on disk",
    "raise OSError(28, 'No space left')": "the disk is full",
    OOM: "CUDA out of memory. Tried to allocate 2 GiB. Lower --micro-tokens",
}


@pytest.mark.parametrize(
    "end, code",
    [
        ("pass", 0),
        ("raise Failure('no such file')", 2),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", 130),
        (OOM, 1),
        ("raise OSError(28, 'No space left')", 1),
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_ends_with_its_main(end, code, world, tmp_path):
    """One of several, whatever its libraries have going: nothing waits for their threads or runs the
    interpreter's teardown beside them, and nothing that was said is lost. One alone is taken down as usual,
    unless it failed."""
    (tmp_path / "life.py").write_text(
        f"WORLD = {world}\n{LIFE}    {end}\nrun_main(main, dist.explain)\n"
    )
    done = run(tmp_path / "life.py", ok=False, timeout=60)
    orderly = world == 1 and code in (0, 2)
    assert (
        done.returncode == code and done.stdout == "said without a flush" + "teardown\n" * orderly
    )
    for said, line in SAID.items():
        assert (line in done.stderr) == (said == end), done.stderr
    assert ("Traceback" in done.stderr) == (end == "1 / 0")


LIFE = f"""
import atexit, os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from lib import dist
from lib.files import Failure, run_main
os.environ["WORLD_SIZE"] = str(WORLD)

def main():
    threading.Thread(target=time.sleep, args=(1000 if WORLD > 1 else 0.1,)).start()
    atexit.register(print, "teardown")
    print("said without a flush", end="")
"""


SICK = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
how = sys.argv.pop(1)
import grpo
sample_groups = grpo.sample_groups

def sick(engine, tokenizer, stop, args, rank, world, rows, step, *more, **settings):
    if os.environ["RANK"] == "1" and step == 2:
        print("SICK", file=sys.stderr, flush=True)
        open(__file__.replace(".py", ".at"), "w").close()
        if how == "hang":
            time.sleep(1000)
        raise AttributeError("a slip in the sampling")
    return sample_groups(engine, tokenizer, stop, args, rank, world, rows, step, *more, **settings)

grpo.sample_groups = sick
grpo.run_main(grpo.main, grpo.explain)
"""
