"""Each fork of grpo.py: what it computes, by hand, and a step of it as a user runs it."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_grpo import USER, D, group, loss_of

import grpo
from conftest import ROOT, metrics, run
from lib.files import Failure
from lib.pairs import Pair
from rubrics import parse

NAMES = sorted(path.stem for path in (ROOT / "forks").glob("[a-z]*.py"))
FLAGS = {"kl_k1": ("--beta", 0.1), "kl_k2": ("--beta", 0.1), "overlong": ("--overlong", 20)}


def fork(name):
    return importlib.import_module(f"forks.{name}")


def test_importing_a_fork_changes_nothing():
    before = dict(vars(grpo))
    for name in NAMES:
        fork(name)
    assert vars(grpo) == before and len(NAMES) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_each_fork(name, toy, fitted, tmp_path):
    """With all of grpo.py's flags, and its own; the run's folder is refused to grpo.py itself."""
    flags = (
        "--model", fitted, "--data", toy / "rl.jsonl", "--dtype", "float32", "--no-recompute", "--batch", 4,
        "--mini-batch", 2, "--group-size", 2, "--max-prompt", 80, "--max-response", 40, "--steps", 1,
        "--lr", 1e-4, "--save-every", 1, *FLAGS.get(name, ()), "--out", tmp_path,
    )  # fmt: skip
    run(f"forks/{name}.py", *flags)
    (row,) = metrics(tmp_path)
    assert math.isfinite(row["loss"]) and row["mismatch_mean"] < 1e-3
    if name == NAMES[0]:
        done = run("grpo.py", *[f for f in flags if f not in FLAGS.get(name, ())], ok=False)
        assert done.returncode == 2 and "holds a run with another script" in done.stderr


@pytest.fixture(scope="session")
def fitted(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted")
    run("sft.py", "--model", toy / "model/config.json", "--data", toy / "sft.jsonl", "--dtype", "float32",
        "--no-recompute", "--batch", 16, "--lr", 3e-3, "--max-len", 160, "--save-every", 0, "--out", out)  # fmt: skip
    return out / "model"


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.5, 1.0, 1.2 * math.log(1.5), 1.2),  # clipped, and yet it has a gradient
        (0.5, -1.0, -0.8 * math.log(0.5), -0.8),
        (1.1, 2.0, 2.2 * math.log(1.1), 2.2),
    ],
)
def test_cispo(ratio, advantage, value, slope, monkeypatch):
    monkeypatch.setattr(grpo, "policy_gain", fork("cispo").cispo_gain)
    logp = math.log(ratio)
    loss, grad, _ = loss_of([logp], [0.0], [logp], [advantage], [1.0], kl_coef=0.0)
    assert loss == pytest.approx(-value) and grad == pytest.approx([-slope], abs=1e-12)


@pytest.mark.parametrize(
    "ratios, value, slope",
    [
        ((1.1, 1.3), math.sqrt(1.43), math.sqrt(1.43)),  # below 1.2: pushed, also the token at 1.3
        ((1.4, 1.1), 1.2, 0.0),  # sqrt(1.54) is above: no more push
    ],
)
def test_gspo_is_the_geometric_mean(ratios, value, slope, monkeypatch):
    """Two tokens of one judgment (row 4) after one token of another (row 3) at ratio 1."""
    monkeypatch.setattr(grpo, "importance_ratio", fork("gspo").sequence_ratio)
    logp = [0.0, *map(math.log, ratios)]
    rows = torch.tensor([3, 4, 4])
    loss, grad, _ = loss_of(
        logp, [0.0] * 3, logp, [1.0] * 3, [0.5, 0.25, 0.25], kl_coef=0.0, rows=rows
    )
    assert loss == pytest.approx(-(0.5 + 0.5 * value))
    assert grad == pytest.approx([-0.5, -0.25 * slope, -0.25 * slope], abs=1e-12)
    empty = torch.zeros(0, requires_grad=True)
    assert fork("gspo").sequence_ratio(empty, empty, torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [(5.0, -1.0, -3.0, 0.0), (2.0, -1.0, -2.0, -2.0), (5.0, 1.0, 1.2, 0.0), (0.5, -1.0, -0.8, 0.0)],
)
def test_dual_clip(ratio, advantage, value, slope, monkeypatch):
    gain = fork("dual_clip").dual_clip_gain
    monkeypatch.setattr(grpo, "policy_gain", lambda *args: gain(*args, largest=3.0))
    logp = math.log(ratio)
    loss, grad, _ = loss_of([logp], [0.0], [logp], [advantage], [1.0], kl_coef=0.0)
    assert loss == pytest.approx(-value) and grad == pytest.approx([-slope], abs=1e-12)


def test_other_estimators_of_the_kl_divergence():
    logp, ref_logp = torch.tensor([-1.0, -2.0], **D), torch.tensor([-1.5, -1.0], **D)
    assert fork("kl_k1").k1(logp, ref_logp).tolist() == pytest.approx([0.5, -1.0])
    assert fork("kl_k2").k2(logp, ref_logp).tolist() == pytest.approx([0.125, 0.5])


def test_rloo_takes_the_mean_of_the_others():
    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.0, 0.5], [1.0, nan, -1.0], [nan, nan, 1.0], [1.0] * 3], **D)
    found = fork("rloo").leave_one_out(rewards).tolist()
    assert found[0] == pytest.approx([0.75, -0.75, 0.0]) and found[1] == pytest.approx([2, 0, -2])
    assert found[2:] == [[0.0] * 3] * 2


GOOD = "<type>Chat</type><rubric>Help 100%</rubric><eval>x</eval><answer>[[A]]</answer>"


@pytest.mark.parametrize(
    "text, reward",
    [(GOOD, 2), (GOOD.replace("[[A]]", "[[B]]"), 0), ("<answer>[[A]]</answer>", 1), ("", -1)],
)
def test_the_format_reward(text, reward):
    args = SimpleNamespace(reward="verdict")
    pair = Pair("1", USER, "a", "b", "A")
    assert fork("format_reward").reward_of(text, parse(text), pair, 9, None, args) == reward


@pytest.mark.parametrize("length, reward", [(10, 1), (80, 1), (85, 0.75), (90, 0.5), (100, 0)])
def test_overlong(length, reward):
    args = SimpleNamespace(reward="verdict", overlong=20, max_response=100)
    pair = Pair("1", USER, "a", "b", "A")
    found = fork("overlong").reward_of(GOOD, parse(GOOD), pair, length, None, args)
    assert found == pytest.approx(reward)


def test_both_orders_right_earn_the_bonus():
    """Judgment n of one order goes with judgment n of the other; labels turn with the order."""
    one = group(1.0, 1.0, -1.0, label="A", verdicts="AAB")
    two = group(1.0, -1.0, 1.0, label="B", verdicts="BAB")
    fork("both_orders").reward_consistency(one, two, 0.5)
    assert [r.reward for r in one] == [1.5, 1.0, -1.0]
    assert [r.reward for r in two] == [1.5, -1.0, 1.0]


def test_held_out_pairs_of_both_orders_are_other_ones(monkeypatch):
    both = fork("both_orders")
    monkeypatch.setattr(grpo, "flags", both.flags)
    with pytest.raises(Failure, match="--val-data x.jsonl: is what --data learns from"):
        both.arguments(["--data", "x.jsonl", "--val-data", "x.jsonl"])


def test_an_update_of_both_orders_needs_an_even_number(monkeypatch):
    both = fork("both_orders")
    monkeypatch.setattr(grpo, "flags", both.flags)
    with pytest.raises(Failure, match="--mini-batch 9: an update has both orders"):
        both.arguments(["--batch", "9", "--mini-batch", "9"])


@pytest.mark.parametrize("attempts, rounds", [(1, 2), (3, 2)])
def test_dynamic_sampling_takes_the_first_groups_whose_rewards_differ(attempts, rounds):
    """Every other group has zero variance: two rounds of four fill up a step of four."""

    def sample(rows, step, group_size, temperature, first_index):
        places = range(first_index, first_index + len(rows))
        return [group(1.0, -1.0 if place % 2 else 1.0, label=place) for place in places]

    args = SimpleNamespace(dynamic_sampling=attempts, batch=4, group_size=2, seed=0)
    groups, statistics = fork("dynamic_sampling").collect_groups(sample, list(range(20)), 0, args)
    assert [g[0].row.pair.label for g in groups] == [1, 3, 5, 7]
    assert statistics == {"zero_variance_groups": 0.5, "rounds": rounds}


def test_dynamic_sampling_falls_back_on_zero_variance_groups():
    def sample(rows, step, group_size, temperature, first_index):
        places = range(first_index, first_index + len(rows))
        return [group(1.0, -1.0 if place == 6 else 1.0, label=place) for place in places]

    args = SimpleNamespace(dynamic_sampling=2, batch=4, group_size=2, seed=0)
    groups, statistics = fork("dynamic_sampling").collect_groups(sample, list(range(20)), 0, args)
    assert [g[0].row.pair.label for g in groups] == [6, 0, 1, 2]
    assert statistics == {"zero_variance_groups": pytest.approx(11 / 12), "rounds": 3}
    assert np.isfinite(statistics["zero_variance_groups"])
