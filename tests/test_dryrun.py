"""A dry run counts what the real step makes, refuses what cannot fit, and does nothing else."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import dryrun
from conftest import ROOT, environment, run, save_qwen2

GB = 2**30

# One update of grpo.py on the same rows, on real tensors and on fake ones, in a group of one; then on fake
# ones in a group of eight. The counter is the same; so is the code, but for the kernels.
BOTH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import dryrun, grpo, packing, policy as P, ranks as R
folder, world, real = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "real"
sys.argv = ["grpo.py", "--micro-tokens", sys.argv[5], "--dtype", "float32", "--max-response", "60",
            *sys.argv[6:]]
args = grpo.arguments()
R.start_ranks(dry_run=None if real else [world])
config = P.config_of(folder)
shown = dryrun.made_up([[0] * 40], 3, 60, args.micro_tokens, world)
if real:
    class Nothing:
        def __init__(self, **kw): pass
        __enter__ = __exit__ = lambda *a: None
    dryrun.FakeTensorMode = Nothing
    P.sharded = (lambda f: lambda *a, **kw: filled(f(*a, **kw)))(P.sharded)
    def filled(policy):
        with torch.no_grad():
            for p in policy.parameters():
                p.fill_(0.01)
        return policy
packing.varlen = packing.bucketed              # the kernel of CUDA has no fp32, and none on a CPU
lives, peaks = dryrun.trace(args, config, None, world, shown, grpo.rehearse)
n = sum(p.numel() for p in P.build(config, torch.float32, torch.device("cpu"))[0].parameters())
print(json.dumps({"lives": lives, "peaks": peaks, "n": n}))
"""


def counted(folder, world, real, *more, tokens=400):
    done = subprocess.run([sys.executable, "-c", BOTH, str(ROOT), str(folder), str(world), "real" if real else "fake",
                           str(tokens), *map(str, more)], capture_output=True, text=True, env=environment())
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
    assert eight["peaks"]["learning"] < learning("--no-recompute") < learning("--no-recompute", tokens=800)


def test_scripts_say_what_they_would_do_and_do_nothing(toy, tmp_path):
    """Shapes with their kernels in bf16, every variant of the objective; nothing is written."""
    out = tmp_path / "out"
    common = ("--model", toy / "model/config.json", "--out", out, "--dry-run", 8)
    said = run("sft.py", "--data", toy / "sft.jsonl", "--max-len", 160, "--batch", 16, *common).stdout
    assert "steps: 16 of 16 traces" in said and "rank 0 of 8, shards of 8" in said and "it fits" in said
    said = run("grpo.py", "--data", toy / "rl.jsonl", "--pairs", 8, "--mini", 4, "--max-prompt", 80,
               "--max-response", 24, "--shard", 4, "--ratio", "sequence", "--engine-cap", 2,
               "--offload", *common, 40).stdout
    assert "steps: 8 of 8 pairs x 7 judgments, 2 updates each" in said and "shards of 4" in said
    assert "of the card's 37" in said and "sampling" in said and "it fits" in said
    assert not out.exists()


def test_the_launch_script_dry_runs_without_a_launcher():
    said = subprocess.run(["launch/rm-r1.sh", "32b", "grpo", "--beta", "0", "--dry-run"], cwd=ROOT, text=True,
                          capture_output=True, env=environment() | {"PYTHON": "echo"}).stdout.split()
    assert said[0] == "grpo.py" and said[-3:] == ["0", "--dry-run", "32"]


def judged(capsys, learning=20, weights=15, segments="", **more):
    """What dryrun.judge says of a card of 80 GB that would hold so many GB."""
    args = SimpleNamespace(**{"dry_run": [8], "dtype": "bfloat16", "engine_memory": 0.5, "offload": False, "tp": 1,
                              "micro_tokens": 16384, "recompute": True} | more)
    config = SimpleNamespace(num_key_value_heads=4, num_attention_heads=28, hidden_size=3584,
                             num_hidden_layers=28)
    lives = {"weights": 3.5 * GB, "reference": 1.8 * GB, "Adam": 7 * GB}
    try:
        dryrun.judge(args, lives, {"learning": learning * GB, "syncing": 15 * GB},
                     (weights * GB // 2, GB), config, 12288, 8)
    except SystemExit as stop:
        assert stop.code == 2
    return capsys.readouterr()


@pytest.mark.parametrize("case, complaint", [
    (dict(learning=60), "learning would take more than the card's 75 GB: lower --micro-tokens 16384, set "
                        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, give --offload, or use more than 8 "
                        "ranks"),
    (dict(learning=60, recompute=False, offload=True), "leave out --no-recompute, set PYTORCH"),
    (dict(engine_memory=0.9), "sampling would take more than the card's 75 GB: lower --engine-memory 0.9, give"),
    (dict(weights=62), "vLLM needs about 65 GB, more than --engine-memory 0.5 of the card: raise it, or spread "
                       "an engine over more ranks than --tp 1"),
    (dict(weights=62, tp=4), None), (dict(), None), (dict(learning=60, dry_run=[8, 94]), None)])
def test_what_cannot_fit_is_refused_by_the_flag_to_change(case, complaint, capsys, monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    out, err = judged(capsys, **case)
    assert complaint in err if complaint else "it fits" in out and not err
    if case.get("learning") == 60 and "dry_run" not in case:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        assert "it fits" in judged(capsys, **case | {"learning": 58, "recompute": True}).out
