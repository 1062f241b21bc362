"""The sampling engine: the real vLLM, on one and on two ranks."""

import json
import mmap
import os
import shutil
from pathlib import Path

import pytest
from transformers import Qwen2Config

from conftest import metrics, run, save_qwen2
from lib.engine import check_tp, check_version, unlink_shared_memory
from lib.files import Failure


@pytest.mark.check("weights reach the engine, after sleep and wake")
@pytest.mark.parametrize(
    "tied, ranks, tp", [(False, 1, 1), (True, 1, 1), (True, 2, 1), (False, 2, 2), (True, 2, 2)]
)
def test_engine_and_trainer_agree_after_every_sync(tied, ranks, tp, tmp_path, record_property):
    """fp32: largest difference under 1e-4, for prompts longer than a cache block, sampled before and after
    updates, with an engine a rank or one over both. A sync that leaves out the head of a tied model, or keeps
    cached prompts, is off by far more than the bound of any run."""
    save_qwen2(tmp_path / "m", tied)
    out = json.loads(
        run("tests/sync_check.py", tmp_path / "m", "float32", tp, ranks=ranks).stdout.splitlines()[
            -1
        ]
    )
    synced = [k for k in out if k.startswith(("first", "after", "repaired"))]
    assert len(synced) == 5
    record_property("largest difference of log-probs", max(out[k][1] for k in synced))
    for name in synced:
        assert out[name][1] < 1e-4, (name, out)
    assert out["distinct over ranks"] == 1 and out["same in one engine"]
    assert out["without lm_head"][0] > 0.1, "the head left out must not go unnoticed"
    assert out["without cache reset"][0] > 0.1, "stale prompts must not go unnoticed"
    assert out["distinct"] == 8 and out["same alone"]
    assert out["too long"].startswith("1 prompts leave no room in a window of 400")
    assert "kept its prefix cache" in out["stuck cache"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_break_off_end_the_run_before_anything_is_sampled(ranks, tmp_path):
    """A layer would have its queries and not its keys. The rank that breaks off says why; the others, which
    may be in a collective of that sync, end with it."""
    save_qwen2(tmp_path / "m", True)
    done = run(
        "tests/sync_check.py",
        tmp_path / "m",
        "float32",
        1,
        "break",
        ranks=ranks,
        ok=False,
        timeout=120,
    )
    assert done.returncode and "OSError: the weights were cut off" in done.stderr, done.stderr
    assert "sampled" not in done.stdout


def test_versions_that_would_fail_later_are_refused(capsys):
    for version in ("0.32.0", "0.33.1rc1", "0.33rc1", "0.32.0+cpu"):
        check_version(version)
    for version in ("0.23.0", "0.31.0", "0.34.0", "0.34rc1", "0.3", "1.0", "dev"):
        with pytest.raises(Failure) as stop:
            check_version(version)
        assert f"vllm {version}: 0.32 and 0.33 are known to work" in str(stop.value)


def test_tp_must_divide_ranks_and_heads(capsys):
    """vLLM would refuse heads that do not divide with a page of validation, after the weights are loaded."""
    check_tp(2, 4, Qwen2Config(num_attention_heads=2))
    for tp, world, said in (2, 3, "the 3 ranks"), (4, 4, "the model's 2 attention heads"):
        with pytest.raises(Failure) as stop:
            check_tp(tp, world, Qwen2Config(num_attention_heads=2))
        assert f"--tp {tp} does not divide {said}" in str(stop.value)


@pytest.mark.check("bf16: engine and trainer agree within rounding")
def test_in_bf16_they_agree_within_rounding(tmp_path, record_property):
    """Rounding grows with the logits, so the model starts from weights half as wide: its log-probs then
    spread like a real one's."""
    save_qwen2(tmp_path / "m", True, std=0.05)
    out = json.loads(
        run("tests/sync_check.py", tmp_path / "m", "bfloat16", 1).stdout.splitlines()[-1]
    )
    synced = ("first", "after update 0", "after update 1", "after update 2", "repaired")
    assert out["head"] == "torch.float32", "logits rounded to bf16 would be most of a gap on a card"
    record_property("mean difference of log-probs", max(out[k][0] for k in synced))
    for name in synced:
        assert out[name][0] < 0.02, (name, out)


def test_only_shared_memory_of_this_process_is_unlinked():
    """vLLM's CPU ranks name theirs alike in every run: what another run is just about to open stays, also under
    the name of one that this process had, and has unlinked."""

    def shared(name):
        path = Path(f"/dev/shm/rmr1-test-{os.getpid()}-cpushm_{name}")
        path.write_bytes(bytes(4096))
        return path

    mine, others, again = shared(0), shared(1), shared(2)
    with open(mine, "r+b") as f, open(again, "r+b") as g:
        mapped = [mmap.mmap(f.fileno(), 4096), mmap.mmap(g.fileno(), 4096)]
    again.unlink()
    shared(2)  # of another run
    try:
        unlink_shared_memory()
        assert not mine.exists() and others.exists() and again.exists()
    finally:
        for path in (mine, others, again):
            path.unlink(missing_ok=True)
        for memory in mapped:
            memory.close()


GRPO = (
    "grpo.py",
    "--dtype",
    "float32",
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
    "--steps",
    2,
    "--lr",
    1e-3,
    "--micro-tokens",
    200,
    "--save-every",
    1,
    "--max-mismatch",
    0.001,
)


@pytest.mark.check("one rank and two take the same step")
def test_one_process_and_two_take_the_same_step(toy, tmp_path):
    """Same seed, fp32: same sampled tokens, loss and gradient norm to 1e-4, with rows that share unevenly."""
    common = (
        *GRPO,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "rl.jsonl",
        "--val-data",
        toy / "val.jsonl",
        "--val-every",
        1,
        "--reward",
        "random",
    )
    run(*common, "--out", tmp_path / "one")
    run(*common, "--out", tmp_path / "two", ranks=2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one[:2], two[:2]):
        assert a["samples_digest"] == b["samples_digest"] and a["length_mean"] == b["length_mean"]
        for key in ("loss", "grad_norm", "kl", "reward"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-9), key
        assert a["grad_norm"] > 0 and a["zero_variance_groups"] < 1
    assert one[-1]["val_accuracy"] == two[-1]["val_accuracy"]

    # Resumed from the checkpoint after step 1, as if killed during step 2: the same step, not the next data.
    shutil.rmtree(tmp_path / "one/state/step_000002")
    again = run(*common, "--out", tmp_path / "one")
    assert "resumed at step 1" in again.stdout
    timing = ("seconds_", "peak_gib", "tokens_per_second")
    plain = lambda row: {k: v for k, v in row.items() if not k.startswith(timing)}
    assert [plain(r) for r in metrics(tmp_path / "one")] == [plain(r) for r in one]


def test_a_run_whose_engine_disagrees_stops_and_says_so(toy, tmp_path):
    done = run(
        *GRPO,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "rl.jsonl",
        "--out",
        tmp_path / "out",
        "--max-mismatch",
        1e-12,
        ok=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "The engine is not sampling from the weights in training" in done.stderr
    assert not (tmp_path / "out/model").exists() and metrics(tmp_path / "out") == []
