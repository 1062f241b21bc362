"""A dry run counts what the real step makes, refuses what cannot fit, and does nothing else."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT, environment, run, save_qwen2
from lib.files import Failure
from tools import cost, dryrun
from tools.trace import Traced

GIB = 2**30

# One update of grpo.py on the same rows, on real tensors and on fake ones, in a group of one; then on fake
# ones in a group of eight. The counter is the same; so is the code, but for the kernels.
BOTH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
import grpo
from torch.testing._internal.distributed.fake_pg import FakeStore
from tools import trace
from lib import packing, policy
from lib.dist import start_ranks
from lib.model_files import config_of
folder, world, real = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "real"
args = grpo.arguments(["--micro-tokens", sys.argv[5], "--dtype", "float32", "--max-response", "60", *sys.argv[6:]])
if real:
    start_ranks()
else:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
config = config_of(folder)
groups = trace.made_up_groups(40, 60, 3, args.micro_tokens, world)
if real:
    class Nothing:
        def __init__(self, **kw): pass
        __enter__ = __exit__ = lambda *a: None
    trace.FakeTensorMode = Nothing
    build = policy.build_sharded
    def build_filled(*a, **kw):
        network = build(*a, **kw)
        with torch.no_grad():
            for p in network.parameters():
                p.fill_(0.01)
        return network
    policy.build_sharded = build_filled
packing.varlen = packing.bucketed              # the kernel of CUDA has no fp32, and none on a CPU
traced = trace.trace(args, config, None, world, groups, trace.grpo_update)
n = sum(p.numel() for p in policy.build_policy(config, torch.float32, torch.device("cpu"))[0].parameters())
print(json.dumps(vars(traced) | {"n": n}))
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
    assert "of the card's 37.3" in said and "sampling" in said and "it fits" in said
    assert "in host memory (--offload) takes up to " in said and " GB" not in said
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


def launched(*words):
    """The words of the command that launch/rm-r1.sh would start."""
    return subprocess.run(
        ["launch/rm-r1.sh", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment() | {"PYTHON": "echo"},
        check=True,
    ).stdout.split()


def test_the_launch_script_dry_runs_without_a_launcher():
    said = launched("32b", "grpo", "--beta", "0", "--dry-run")
    assert said[:2] == ["tools/dryrun.py", "grpo.py"] and "--dry-run" not in said
    assert said[said.index("--ranks") + 1] == "32" and said[said.index("--beta") + 1] == "0"


@pytest.mark.parametrize(
    "words, rate",
    [
        (("7b", "sft"), 5e-6),
        (("7b", "sft", "--lora", "32"), 5e-5),
        (("14b", "grpo", "--lora=8"), 7e-6),
        (("32b", "reasoning", "--beta", "0", "--lora", "16", "--dry-run"), 8e-6),
        (("32b", "grpo", "--lora", "0"), 5e-7),
        (("7b", "grpo", "--lora", "32", "--lr", "4e-5"), 4e-5),
    ],
)
def test_the_launch_script_has_the_rates_of_the_paper_and_ten_times_them_for_adapters(words, rate):
    said = launched(*words)
    last = len(said) - 1 - said[::-1].index("--lr")  # the last one counts
    assert float(said[last + 1]) == pytest.approx(rate)


def judged(capsys, learning=20, weights=15, gb=None, frozen=0, **more):
    """What dryrun.check_fit says of a card of 80 GB, or so many, that would hold these."""
    settings = {
        "dtype": "bfloat16",
        "engine_memory": 0.5,
        "offload": False,
        "tp": 1,
        "lora": 0,
        "max_prompt": 4096,
        "max_response": 8192,
        "micro_tokens": 16384,
        "recompute": True,
    }
    config = SimpleNamespace(
        num_key_value_heads=4, num_attention_heads=28, hidden_size=3584, num_hidden_layers=28
    )
    traced = Traced(
        lives={"weights": 3.5 * GIB, "reference": 1.8 * GIB, "Adam": 7 * GIB},
        frozen=frozen * GIB,
        peaks={"learning": learning * GIB, "syncing": 15 * GIB},
    )
    parameters = dryrun.Parameters(weights * GIB // 2, GIB)
    try:
        dryrun.check_fit(
            SimpleNamespace(**settings | more), traced, parameters, config, 12288, 8, gb
        )
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
    return capsys.readouterr()


EXPAND = "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


@pytest.mark.parametrize(
    "case, complaint",
    [
        (
            dict(learning=60),
            f"learning would take more than the card's 74.5 GiB: lower --micro-tokens 16384, {EXPAND}, give "
            "--offload, train adapters (--lora 32), or use more than 8 ranks",
        ),
        (dict(learning=60, recompute=False, offload=True), f"leave out --no-recompute, {EXPAND}"),
        # A sequence is never cut, so lowering --micro-tokens would change nothing.
        (
            dict(learning=73, lora=32, micro_tokens=8192),
            "lower --max-prompt 4096 and --max-response 8192 (a sequence of 12,288 tokens is computed at "
            f"once), {EXPAND}, or use more than 8 ranks",
        ),
        (
            dict(engine_memory=0.9),
            "sampling would take more than the card's 74.5 GiB: lower --engine-memory 0.9 (the trainer leaves "
            "0.79), give --offload, or use",
        ),
        (
            dict(engine_memory=0.95, offload=True),
            "lower --engine-memory 0.95 (the trainer leaves 0.91)",
        ),
        (dict(engine_memory=0.95, offload=True, lora=32, frozen=3), None),
        (
            dict(weights=62),
            "vLLM needs about 65 GiB, more than --engine-memory 0.5 of the card: raise it (the trainer leaves "
            "0.79), give --offload, or spread an engine over more ranks than --tp 1",
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


def test_expandable_segments_leave_more(capsys, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "it fits" in judged(capsys, learning=58).out


def test_adapters_let_a_base_wait_in_host_memory(capsys):
    """With --offload a frozen base leaves the card to vLLM, and without it stays."""
    case = dict(lora=32, weights=15, frozen=3, learning=10)
    stays, waits = (judged(capsys, offload=offload, **case).out for offload in (False, True))
    share = lambda out: float(out.rsplit("up to ", 1)[1])
    assert share(waits) > share(stays) + 3 * GIB / 80e9


# ---------------------------------------------------------------- operations, time, price


def test_operations_are_those_of_the_textbook(tmp_path):
    """Two a weight and token in a forward pass, four more in a backward pass; and attention, by hand."""
    save_qwen2(tmp_path, False)
    # Four groups of 220 tokens fill two micro-batches, so that no prompt is computed twice.
    found = counted(tmp_path, 1, False, "--no-recompute", tokens=440)
    operations, n = found["operations"], found["n"]
    config = json.loads((tmp_path / "config.json").read_text())
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head_size = hidden // heads
    groups = 4
    tokens, responses = groups * (40 + 3 * 60), groups * 3 * 60

    # Norms and biases multiply no matrices; the head sees response tokens only.
    head = hidden * vocabulary
    in_blocks = 2 * (n - 2 * head) * tokens
    in_head = 2 * head * responses
    pairs = groups * (100 * 101 / 2 + 2 * (60 * 40 + 60 * 61 / 2))
    attention = 4 * layers * heads * head_size * pairs
    forward = in_blocks + in_head + attention
    for phase in ("reference", "scoring"):
        assert operations[phase] == pytest.approx(forward, rel=0.01), phase
    # The head's backward pass computes its logits again; attention's has five products for two.
    backward = 2 * in_blocks + 3 * in_head + 2.5 * attention
    assert operations["learning"] == pytest.approx(forward + backward, rel=0.01)

    recomputed = counted(tmp_path, 1, False, tokens=440)["operations"]
    more = recomputed["learning"] - operations["learning"]
    # Blocks are computed again, but for the last product of each, whose result no gradient needs.
    last = 2 * layers * hidden * config["intermediate_size"] * tokens
    assert more == pytest.approx(in_blocks - last + attention, rel=0.01)


def work_of(**more):
    """A step of an engine and a trainer whose parts take round numbers of seconds."""
    sampling = dict(
        prompts=10,
        samples=100,
        prompt=0,
        answer=1000,
        longest=1000,
        parameters=0,
        weights=1e9,
        token=0,
        at_once=100,
    )
    work = dict(score=1e15, learn=4e15, updated=0, sync=1e9, moved=0)
    return cost.Work(
        **{k: more.get(k, v) for k, v in work.items()},
        sampling=cost.Sampling(**{k: more.get(k, v) for k, v in sampling.items()}),
    )


CARD = cost.Card(1e15, 1e12, 80, 1e11, 1e10, computed=0.5, read=0.5, engine_step=0.0)


@pytest.mark.parametrize(
    "more, phase, seconds",
    [
        (dict(), "score", 2),
        (dict(), "learn", 8),
        (dict(moved=1e10), "learn", 9),
        (dict(), "sync", 0.01),
        # 1,000 steps that each read 1 GB at 500 GB/s.
        (dict(), "sample", 2),
        # Half of the samples at once: twice the steps.
        (dict(at_once=50), "sample", 4),
        # One answer goes on alone for 1,000 more.
        (dict(longest=2000), "sample", 4),
        # 2 x 1e10 operations a token for 100 samples: longer than reading.
        (dict(parameters=1e10), "sample", 4),
        # A prompt is computed once for its group: 10 x 1,000 x 2e10 operations, 0.4 s.
        (dict(parameters=1e10, prompt=1000), "sample", 4.4),
        # 100,000 tokens that each read 500 others of 1 MB.
        (dict(token=1e6), "sample", 2 + 100),
    ],
)
def test_seconds_follow_from_the_work(more, phase, seconds):
    assert cost.step_seconds(work_of(**more), CARD, 8)[phase] == pytest.approx(seconds)


def test_the_table_of_cards_is_ordered_as_the_cards_are():
    cards = cost.CARDS
    assert cards["RTX3090"].math < cards["RTX4090"].math < cards["A100"].math < cards["H100"].math
    assert cards["L40S"].reads < cards["A100"].reads < cards["H100"].reads < cards["H200"].reads
    with pytest.raises(Failure, match="--card H1000: known are H200, .* and this"):
        cost.card_named("H1000", None)


def test_a_dry_run_estimates_time_and_price(toy, tmp_path):
    """On a named card, whose memory it takes; marked as an estimate, with what it assumes."""
    said = run("tools/dryrun.py", "grpo.py", "--ranks", 2, "--card", "A100", "--dollars-an-hour", 1.5,
               "--response", 20, "--model", toy / "model/config.json", "--data", toy / "rl.jsonl", "--out",
               tmp_path / "out", "--batch", 8, "--mini-batch", 4, "--max-prompt", 80, "--max-response", 24,
               "--lora", 4).stdout  # fmt: skip
    assert "of the card's 74.5" in said and "1,120 tokens are sampled" in said
    times = float(re.search(r"([\d.]+) times as many with a prompt for every judgment", said)[1])
    assert 1 < times < 7
    (line,) = [line for line in said.splitlines() if line.startswith("estimate on 2 x A100: ")]
    assert "$" in line and "35% of 312 TFLOP/s" in line and "judgments of 20 tokens" in line
