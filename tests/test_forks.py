"""Each fork of grpo.py: what it computes, by hand, and a step of it as a user runs it."""

import importlib
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_grpo import KNOWN, SHORTCUT, SOUND, USER, D, group, loss_of

import grpo
from conftest import ROOT, metrics, run
from lib.files import Failure
from lib.pairs import Pair
from rubrics import WRITE_SCORE, PromptStyle, parse

NAMES = sorted(path.stem for path in (ROOT / "forks").glob("[a-z]*.py"))
OF_PAIRS = [name for name in NAMES if name != "score_from_pairs"]
FLAGS = {
    "kl_k1": ("--beta", 0.1),
    "kl_k2": ("--beta", 0.1),
    "overlong": ("--overlong", 20),
    "rloo": ("--reward", "sound"),
}


def fork(name):
    return importlib.import_module(f"forks.{name}")


def test_importing_a_fork_changes_nothing():
    before = dict(vars(grpo))
    for name in NAMES:
        fork(name)
    assert vars(grpo) == before and len(NAMES) >= 10


@pytest.mark.parametrize("name", OF_PAIRS)
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
    assert (
        0 <= row["sound"] <= row["accuracy"]
    )  # the reason of every pair of the toy world is known
    if name == "rloo":
        assert row["reward"] == pytest.approx(2 * row["sound"] - 1)
    if name == NAMES[0]:
        done = run("grpo.py", *[f for f in flags if f not in FLAGS.get(name, ())], ok=False)
        assert done.returncode == 2 and "holds a run with another script" in done.stderr


@pytest.fixture(scope="session")
def fitted(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted")
    run("sft.py", "--model", toy / "model/config.json", "--data", toy / "sft.jsonl", "--dtype", "float32",
        "--no-recompute", "--batch", 16, "--lr", 3e-3, "--max-len", 160, "--save-every", 0, "--out", out)  # fmt: skip
    return out / "model"


def test_a_step_of_scores(toy, scorer, tmp_path):
    """Scores are sampled, paid and logged, of held-out pairs too; the judge keeps the style that it had for pairs."""
    run("forks/score_from_pairs.py", "--model", scorer, "--data", toy / "rl.jsonl", "--val-data", toy / "val.jsonl",
        "--dtype", "float32", "--no-recompute", "--batch", 8, "--mini-batch", 4, "--group-size", 4, "--max-prompt", 200,
        "--max-response", 8, "--steps", 1, "--lr", 1e-4, "--save-every", 0, "--out", tmp_path)  # fmt: skip
    row, last = metrics(tmp_path)
    assert math.isfinite(row["loss"]) and row["mismatch_mean"] < 1e-3
    assert row["no_verdict"] < 0.5 and 0 < row["reward"] < 1 and "sound" not in row
    for name in ("accuracy", "no_verdict"):
        assert (
            0 <= row[name] <= 1 and 0 <= row[f"val_{name}"] <= 1 and 0 <= last[f"val_{name}"] <= 1
        )
    assert -9 <= row["score_gap"] <= 9 and row["zero_variance_groups"] < 1
    samples = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    assert [sample["pair"].split()[1] for sample in samples] == ["chosen", "rejected"] * 2
    assert {sample["verdict"] for sample in samples} <= {None, *range(1, 11)}
    trained, base = (
        json.loads((at / "judge.json").read_text()) for at in (tmp_path / "model", scorer)
    )
    assert trained == base == json.loads((toy / "model/judge.json").read_text())


@pytest.fixture(scope="session")
def scorer(toy, tmp_path_factory):
    """A tiny judge that gives any response any score. Its request and each answer are one token to it."""
    from tokenizers import AddedToken
    from transformers import AutoConfig, AutoTokenizer

    out = tmp_path_factory.mktemp("scorer")
    answers = [f"<answer>[[{score}]]</answer>" for score in range(1, 11)]
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (WRITE_SCORE, *answers)])
    tokenizer.save_pretrained(out / "base")
    config = AutoConfig.from_pretrained(toy / "model")
    config.vocab_size = len(tokenizer)
    config.save_pretrained(out / "base")
    shutil.copy(toy / "model/judge.json", out / "base")
    with open(out / "scores.jsonl", "w") as file:
        for number, line in enumerate(4 * open(toy / "rl.jsonl").readlines()):
            pair = json.loads(line)
            row = {"context": pair["context"], "response": pair["a"], "trace": answers[number % 10]}
            file.write(json.dumps(row) + "\n")
    run("sft.py", "--model", out / "base/config.json", "--data", out / "scores.jsonl", "--dtype", "float32",
        "--no-recompute", "--batch", 8, "--lr", 1e-2, "--max-len", 200, "--save-every", 0, "--out", out)  # fmt: skip
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


ANSWERED = (
    "<type>Reasoning</type><solution>3 + 4 = 7</solution><eval><quote_A>it is seven</quote_A></eval>"
    "<answer>[[A]]</answer>"
)


@pytest.mark.parametrize(
    "text, reward",
    [(GOOD, 2), (GOOD.replace("[[A]]", "[[B]]"), 0), ("<answer>[[A]]</answer>", 1), ("", -1)],
)
def test_the_format_reward(text, reward):
    args = SimpleNamespace(reward="verdict")
    pair = Pair("1", USER, "a", "b", "A")
    assert fork("format_reward").reward_of(text, parse(text), pair, 9, None, args) == reward


@pytest.mark.parametrize(
    "text, reward",
    [
        (SOUND, 2),
        (SHORTCUT, 1 + 5 / 6),  # the criterion, of six checks
        (
            SOUND.replace("[[A]]", "[[B]]"),
            -1 + 5 / 6,
        ),  # the conclusion is about another side than the verdict
        (SOUND.replace("kiwi fig", "kiwi"), 1 + 5 / 6),  # the words that decide are not cited
        ("<answer>[[A]]</answer>", 1),
    ],
)
def test_checked_reasons_of_a_known_reason(text, reward):
    args = SimpleNamespace(reward="verdict")
    found = fork("checked_reasons").reward_of(text, parse(text), KNOWN, 9, None, args)
    assert found == pytest.approx(reward)


@pytest.mark.parametrize(
    "text, reward",
    [
        (ANSWERED, 2),
        (ANSWERED.replace("= 7<", "= 8<"), 1.5),
        (ANSWERED.replace("seven<", "nine<"), 1.5),
        (ANSWERED.replace("[[A]]", "[[B]]"), 0),
        (ANSWERED.replace("it is seven", "seven"), 2),  # no quote that counts: one check
        (ANSWERED.replace("it is seven", ""), 1.5),
        ("<answer>[[A]]</answer>", 1),
    ],
)
def test_checked_reasons_of_other_pairs(text, reward):
    """What the quotes and a reference answer tell; without either check a verdict earns its reward alone."""
    args = SimpleNamespace(reward="verdict")
    reward_of = fork("checked_reasons").reward_of
    pair = Pair("1", USER, "it is seven", "it is 9", "A", meta={"answer": "7"})
    assert reward_of(text, parse(text), pair, 9, None, args) == pytest.approx(reward)
    nothing = Pair("1", USER, "", "", "A")
    verdict = 1 if "[[A]]" in text else -1
    assert reward_of(text, parse(text), nothing, 9, None, args) == verdict


@pytest.mark.parametrize("length, reward", [(10, 1), (80, 1), (85, 0.75), (90, 0.5), (100, 0)])
def test_overlong(length, reward):
    args = SimpleNamespace(reward="verdict", overlong=20, max_response=100)
    pair = Pair("1", USER, "a", "b", "A")
    found = fork("overlong").reward_of(GOOD, parse(GOOD), pair, length, None, args)
    assert found == pytest.approx(reward)


@pytest.mark.parametrize(
    "meta, reward",
    [({"strength": 1}, 1 / 3), ({"strength": 2}, 2 / 3), ({"strength": 9}, 1), ({}, 1)],
)
def test_a_slight_preference_is_paid_less(meta, reward):
    args = SimpleNamespace(reward="verdict", full_strength=3.0)
    pair = Pair("1", USER, "a", "b", "A", meta=meta)
    for text, sign in ((GOOD, 1), ("", -1)):
        found = fork("strength_reward").reward_of(text, parse(text), pair, 9, None, args)
        assert found == pytest.approx(sign * reward)


def test_strength_stays_in_the_advantage():
    """Divided by the standard deviation of its group it would be lost, so that advantage is refused."""
    rewards = torch.tensor([[1.0, -1.0], [1 / 3, -1 / 3]])
    full, slight = grpo.advantages(rewards, "drgrpo")
    assert torch.allclose(full, 3 * slight)
    full, slight = grpo.advantages(rewards, "grpo")
    assert torch.allclose(full, slight, atol=1e-4)


def test_both_orders_right_earn_the_bonus():
    """Judgment n of one order goes with judgment n of the other; labels turn with the order."""
    one = group(1.0, 1.0, -1.0, label="A", verdicts="AAB")
    two = group(1.0, -1.0, 1.0, label="B", verdicts="BAB")
    fork("both_orders").reward_consistency(one, two, 0.5)
    assert [r.reward for r in one] == [1.5, 1.0, -1.0]
    assert [r.reward for r in two] == [1.5, -1.0, 1.0]


def test_the_majority_of_a_group_is_its_label():
    """Judgments without a verdict have no vote; at a tie all earn 0. The label changes the log only."""
    groups = [
        group(*[-1.0] * 4, label="B", verdicts="AAAB"),  # a majority for the wrong response
        group(*[-1.0] * 4, label="A", verdicts=["A", None, None, None]),
        group(*[-1.0] * 4, label="A", verdicts=["A", "B", None, None]),
        group(*[-1.0] * 4, label="B", verdicts="BBBB"),
    ]
    args = SimpleNamespace(batch=4, group_size=4, seed=0)
    majority_label = fork("majority_label")
    groups, statistics = majority_label.collect_groups(lambda *_, **__: groups, [0] * 4, 0, args)
    assert [[r.reward for r in group] for group in groups] == [
        [1, 1, 1, -1], [1, -1, -1, -1], [0] * 4, [1] * 4
    ]  # fmt: skip
    assert statistics == pytest.approx(
        {"zero_variance_groups": 2 / 4, "majority_right": 2 / 3, "ties": 1 / 4}
    )
    assert grpo.accuracy(groups)["accuracy"] == 7 / 16

    ties = [group(-1.0, 1.0, verdicts="AB"), group(-1.0, 1.0)]
    _, statistics = majority_label.collect_groups(lambda *_, **__: ties, [0] * 4, 0, args)
    assert statistics["ties"] == statistics["zero_variance_groups"] == 1
    assert math.isnan(statistics["majority_right"])


def test_the_majority_is_the_only_reward():
    with pytest.raises(Failure, match="--reward random: here the majority of a group decides"):
        fork("majority_label").arguments(["--reward", "random"])


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


@pytest.mark.parametrize(
    "first, second",
    [
        ([1.0, 1.0], [-1.0, -1.0]),  # always the first response: each order alone teaches nothing
        ([1.0, -1.0], [1.0, 1.5]),
        ([1.0, math.nan], [0.5, -1.0]),
        ([0.1, 0.1], [0.1, 0.1]),
    ],
)
@pytest.mark.parametrize("kind", ["grpo", "drgrpo"])
def test_pooled_orders_have_the_advantage_of_one_group(first, second, kind):
    """Two neighbours are a group of 2G, whatever the next two are."""
    rewards = torch.tensor([first, second, [1.0, -1.0], [-1.0, -1.0]], **D)
    found = fork("pooled_orders").pooled_advantages(rewards, kind)
    for at in (0, 2):
        expected = grpo.advantages(torch.cat([rewards[at], rewards[at + 1]])[None], kind)
        assert torch.equal(found[at : at + 2].flatten(), expected[0])
    # 1, -1, -1, -1 have the mean -.5 and the standard deviation 1.
    assert found[2].tolist() == pytest.approx([1.5, -0.5], rel=1e-5)


def test_a_pair_without_variance_is_one_in_both_orders():
    """A fixed habit of order is zero variance in each order, and not in the pair."""
    rewards = {"A": 1.0, "B": -1.0}

    def sample(rows, step, group_size, temperature):
        return [group(*[rewards[row]] * group_size, label=row) for row in rows]

    args = SimpleNamespace(batch=4, group_size=2, seed=0, both_orders=0.0)
    for rows, share in ((["A", "B"] * 2, 0), (["A", "A"] * 2, 1)):
        groups, statistics = fork("pooled_orders").collect_groups(sample, rows, 0, args)
        assert len(groups) == 4 and statistics == {"zero_variance_groups": share}


SCORED = [  # scores of the chosen response, of the rejected one, rewards of both
    ([9, 7], [3, 7], [1, 0.75], [1, 0.75]),
    ([2, 4], [6, 6], [0, 0], [0, 0]),
    ([5, 5], [5, 5], [0.5, 0.5], [0.5, 0.5]),
    ([5, None], [3, 8], [0.5, 0], [0.5, 0]),
    ([2, 3], [None, None], [1, 1], [0, 0]),
    ([None, None], [4, 5], [0, 0], [0, 0]),
    ([10, 1], [None, 5], [1, 0.5], [0, 0.5]),
]


@pytest.mark.parametrize("chosen, rejected, of_chosen, of_rejected", SCORED)
def test_a_score_earns_its_share_of_right_meetings(chosen, rejected, of_chosen, of_rejected):
    first, second = (
        group(*[math.nan] * 2, label=None, verdicts=scores) for scores in (chosen, rejected)
    )
    fork("score_from_pairs").reward_scores(first, second)
    assert [r.reward for r in first] == of_chosen and [r.reward for r in second] == of_rejected
    if None not in chosen + rejected:
        assert sum(of_chosen) == sum(of_rejected), "one baseline serves both sides"


def test_a_pair_of_scores_has_one_advantage():
    """By itself neither side of a response without any score would teach to give one."""

    def sample(rows, step, group_size, temperature):
        return [group(*[math.nan] * 2, label=None, verdicts=row) for row in rows]

    args = SimpleNamespace(batch=4, group_size=2, seed=0)
    score_from_pairs = fork("score_from_pairs")
    for rows, share in (([[2, 3], [None, None]] * 2, 0), ([[5, 5], [5, 5]] * 2, 1)):
        groups, statistics = score_from_pairs.collect_groups(sample, rows, 0, args)
        assert [[r.verdict for r in group] for group in groups] == rows
        assert statistics == {"zero_variance_groups": share}


def test_the_accuracy_of_scores_is_of_means():
    groups = []
    for chosen, rejected, _, _ in SCORED:
        for scores in (chosen, rejected):
            groups.append(group(*[0.0] * len(scores), label=None, verdicts=scores))
    found = fork("score_from_pairs").accuracy(groups, "val_")
    # Right: 8 to 5. Wrong: 3 to 6, 5 to 5.5, two without any score on a side. Ties: 5 to 5; 5.5 to 5 is right.
    assert found["val_accuracy"] == pytest.approx((1 + 0.5 + 1) / 7)
    assert found["val_no_verdict"] == pytest.approx(6 / 28)
    assert found["val_score_gap"] == pytest.approx((3 - 3 + 0 - 0.5 + 0.5) / 5)
    nothing = [group(0.0, label=None, verdicts=[None])] * 2
    assert math.isnan(fork("score_from_pairs").accuracy(nothing)["score_gap"])


def test_scores_are_asked_of_each_response_alone(monkeypatch, tmp_path):
    """Both of a pair or none, the chosen one first, by the pair's criteria and without its other fields."""
    rows = [
        {"id": "1", "prompt": "q", "a": "good", "b": "bad", "label": "A", "criteria": "kind"},
        {"id": "2", "prompt": "q", "a": "bad", "b": "good", "label": "B", "meta": KNOWN.meta},
        {"id": "3", "prompt": "q", "a": "good", "b": "long " * 99, "label": "A"},
        {"id": "4", "context_messages": USER, "winner": "model_a"},
        {"id": "5", "prompt": "q", "a": "good", "b": "bad", "label": "tie"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []
    monkeypatch.setattr(
        grpo, "encode_or_leave_out", lambda _, chat, name: asked.append(chat) or chat[1]["content"]
    )
    args = SimpleNamespace(skip_bad=False, max_prompt=500)
    pairs, found = fork("score_from_pairs").tokenize_prompts(path, None, PromptStyle(), args)
    assert [pair.id for pair in pairs] == ["1", "2", "3", "4"]
    assert [row.pair.id for row in found] == [
        f"{n} {side}" for n in "12" for side in ("chosen", "rejected")
    ]
    assert [row.pair.a for row in found] == ["good", "bad"] * 2
    assert {(row.pair.b, row.pair.label, row.pair.messages) for row in found} == {
        (None, None, None)
    }
    assert [row.pair.criteria for row in found] == ["kind", "kind", None, None]
    assert not any(row.pair.meta for row in found)
    assert all(chat[0]["content"] == WRITE_SCORE for chat in asked)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--reward", "random"], "--reward random: here a score is paid by the scores"),
        (["--batch", "9", "--mini-batch", "9"], "--mini-batch 9: an update has both responses"),
    ],
)
def test_flags_that_scores_refuse(flags, message):
    with pytest.raises(Failure, match=message):
        fork("score_from_pairs").arguments(flags)


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
