"""A dry run counts what the real step makes, refuses what cannot fit, and does nothing else."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT, environment, run, save_qwen2
from lib.files import Failure
from tools import dryrun

GB = 2**30

# One update of grpo.py on the same rows, on real tensors and on fake ones, in a group of one; then on fake
# ones in a group of eight. The counter is the same; so is the code, but for the kernels.
BOTH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
import grpo
from tools import dryrun
from lib import packing, policy
from lib.dist import start_ranks
from lib.model_files import config_of
folder, world, real = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "real"
args = grpo.arguments(["--micro-tokens", sys.argv[5], "--dtype", "float32", "--max-response", "60", *sys.argv[6:]])
if real:
    start_ranks()
else:
    dist.init_process_group("fake", store=dryrun.FakeStore(), rank=0, world_size=world)
config = config_of(folder)
plan = dryrun.StepPlan(prompts=[40], group=3, answer=60, steps=1, rows=1, what="", does="", longest=100)
groups = dryrun.made_up_groups(plan, args.micro_tokens, world)
if real:
    class Nothing:
        def __init__(self, **kw): pass
        __enter__ = __exit__ = lambda *a: None
    dryrun.FakeTensorMode = Nothing
    build = policy.build_sharded
    def build_filled(*a, **kw):
        network = build(*a, **kw)
        with torch.no_grad():
            for p in network.parameters():
                p.fill_(0.01)
        return network
    policy.build_sharded = build_filled
packing.varlen = packing.bucketed              # the kernel of CUDA has no fp32, and none on a CPU
lives, peaks = dryrun.trace(args, config, None, world, groups, dryrun.grpo_update)
n = sum(p.numel() for p in policy.build_policy(config, torch.float32, torch.device("cpu"))[0].parameters())
print(json.dumps({"lives": lives, "peaks": peaks, "n": n}))
"""


def counted(folder, world, real, *more, tokens=400):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            BOTH,
            str(ROOT),
            str(folder),
            str(world),
            "real" if real else "fake",
            str(tokens),
            *map(str, more),
        ],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_fake_tensors_are_counted_as_real_ones_live(tmp_path):
    """Live peaks of loading, scoring, learning and syncing are those of the same step on real tensors."""
    save_qwen2(tmp_path, False)
    real, fake = counted(tmp_path, 1, True), counted(tmp_path, 1, False)
    assert fake["lives"] == real["lives"]
    for phase in ("scoring", "learning", "syncing"):
        assert fake["peaks"][phase] == pytest.approx(real["peaks"][phase], rel=0.02), phase
    n = fake["n"]
    assert fake["lives"]["weights"] == pytest.approx(4 * n, rel=0.02)
    assert fake["peaks"]["learning"] > sum(fake["lives"].values()) + 4 * n, "there are gradients"


def test_what_a_rank_holds_shrinks_with_the_ranks_and_grows_with_the_tokens(tmp_path):
    save_qwen2(tmp_path, False)
    eight = counted(tmp_path, 8, False)
    n = eight["n"]
    for name, bytes_each in (("weights", 4), ("reference", 4), ("Adam", 8)):
        assert eight["lives"][name] == pytest.approx(bytes_each * n / 8, rel=0.15), name
    learning = lambda *more, **kw: counted(tmp_path, 8, False, *more, **kw)["peaks"]["learning"]
    assert (
        eight["peaks"]["learning"]
        < learning("--no-recompute")
        < learning("--no-recompute", tokens=800)
    )


@pytest.mark.parametrize("script", ["grpo.py", "forks/gspo.py"])
def test_a_dry_run_of_grpo_says_what_it_would_do_and_does_nothing(script, toy, tmp_path):
    """Shapes with their kernels in bf16; nothing is written."""
    out = tmp_path / "out"
    said = run("tools/dryrun.py", script, "--ranks", 8, "--gb", 40, "--model", toy / "model/config.json",
               "--data", toy / "rl.jsonl", "--out", out, "--batch", 8, "--mini-batch", 4, "--max-prompt", 80,
               "--max-response", 24, "--shard", 4, "--engine-cap", 2, "--offload").stdout  # fmt: skip
    assert "steps: 8 of 8 pairs x 7 judgments, 2 updates each" in said and "shards of 4" in said
    assert "of the card's 37" in said and "sampling" in said and "it fits" in said
    assert not out.exists()


def test_a_dry_run_of_sft(toy, tmp_path):
    said = run("tools/dryrun.py", "sft.py", "--model", toy / "model/config.json", "--data", toy / "sft.jsonl",
               "--out", tmp_path / "out", "--max-len", 160, "--batch", 16, "--ranks", 8).stdout  # fmt: skip
    assert (
        "steps: 16 of 16 traces" in said
        and "rank 0 of 8, shards of 8" in said
        and "it fits" in said
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script, complaint", [("nowhere.py", "no such script"), ("eval.py", "a fork that imports")]
)
def test_a_dry_run_of_something_else_is_refused(script, complaint):
    done = run("tools/dryrun.py", script, ok=False)
    assert done.returncode == 2 and f"error: {script}: " in done.stderr and complaint in done.stderr


def test_the_launch_script_dry_runs_without_a_launcher():
    said = subprocess.run(
        ["launch/rm-r1.sh", "32b", "grpo", "--beta", "0", "--dry-run"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment() | {"PYTHON": "echo"},
    ).stdout.split()
    assert said[:2] == ["tools/dryrun.py", "grpo.py"] and "--dry-run" not in said
    assert said[said.index("--ranks") + 1] == "32" and said[said.index("--beta") + 1] == "0"


def judged(capsys, learning=20, weights=15, gb=None, **more):
    """What dryrun.check_fit says of a card of 80 GB, or so many, that would hold these."""
    settings = {
        "dtype": "bfloat16",
        "engine_memory": 0.5,
        "offload": False,
        "tp": 1,
        "micro_tokens": 16384,
        "recompute": True,
    }
    config = SimpleNamespace(
        num_key_value_heads=4, num_attention_heads=28, hidden_size=3584, num_hidden_layers=28
    )
    lives = {"weights": 3.5 * GB, "reference": 1.8 * GB, "Adam": 7 * GB}
    peaks = {"learning": learning * GB, "syncing": 15 * GB}
    parameters = dryrun.Parameters(weights * GB // 2, GB)
    try:
        dryrun.check_fit(
            SimpleNamespace(**settings | more), lives, peaks, parameters, config, 12288, 8, gb
        )
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
    return capsys.readouterr()


@pytest.mark.parametrize(
    "case, complaint",
    [
        (
            dict(learning=60),
            "learning would take more than the card's 75 GB: lower --micro-tokens 16384, set "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, give --offload, or use more than 8 "
            "ranks",
        ),
        (dict(learning=60, recompute=False, offload=True), "leave out --no-recompute, set PYTORCH"),
        (
            dict(engine_memory=0.9),
            "sampling would take more than the card's 75 GB: lower --engine-memory 0.9, give",
        ),
        (
            dict(weights=62),
            "vLLM needs about 65 GB, more than --engine-memory 0.5 of the card: raise it, or spread "
            "an engine over more ranks than --tp 1",
        ),
        (dict(weights=62, tp=4), None),
        (dict(), None),
        (dict(learning=60, gb=94), None),
    ],
)
def test_what_cannot_fit_is_refused_by_the_flag_to_change(case, complaint, capsys, monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    out, err = judged(capsys, **case)
    assert complaint in err if complaint else "it fits" in out and not err
    if case.get("learning") == 60 and "gb" not in case:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        assert "it fits" in judged(capsys, **case | {"learning": 58, "recompute": True}).out
