"""The loss, its gradient and the advantages, against cases worked by hand in float64."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
import sft
from forks import rloo
from grpo import advantages, grpo_loss
from judge import soundness
from lib import chat
from lib.engine import check_mismatch
from lib.files import Failure, seed_of
from lib.pairs import Pair
from rubrics import PromptStyle, parse

D = dict(dtype=torch.float64)


def test_advantages_are_the_published_table():
    """Seven judgments, k right: A(right), A(wrong), as the published code has them."""
    table = {
        1: (2.2678, -0.3780),
        2: (1.4638, -0.5855),
        3: (1.0690, -0.8018),
        4: (0.8018, -1.0690),
        5: (0.5855, -1.4638),
        6: (0.3780, -2.2678),
    }
    for k, (right, wrong) in table.items():
        adv = advantages(torch.tensor([[1.0] * k + [-1.0] * (7 - k)], **D))[0]
        assert abs(adv[0] - right) < 1e-4 and abs(adv[-1] - wrong) < 1e-4
    for r in (1.0, -1.0):
        assert advantages(torch.full((1, 7), r, **D)).tolist() == [[0.0] * 7], (
            "a group that agrees teaches nothing, and is no NaN"
        )


def loss_of(logp, old, ref, adv, weight, **kw):
    logp = torch.tensor(logp, requires_grad=True, **D)
    loss, stats = grpo_loss(logp, *(torch.tensor(x, **D) for x in (old, ref, adv, weight)), **kw)
    loss.backward()
    return loss.item(), logp.grad.tolist(), stats


def test_on_policy_the_gradient_is_minus_advantage_times_weight():
    loss, grad, stats = loss_of([-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], [1.5, -0.5], [0.25, 0.75])
    assert abs(loss - -(1.5 * 0.25 - 0.5 * 0.75)) < 1e-12
    assert grad == pytest.approx([-1.5 * 0.25, 0.5 * 0.75]) and stats == {"kl": 0.0, "clipped": 0.0}


@pytest.mark.parametrize(
    "ratio, adv, value, slope",
    [
        (1.1, 1.0, 1.1, 1.1),  # inside the clip: r A, and d(r)/d(logp) = r
        (1.5, 1.0, 1.2, 0.0),  # up far enough: no more push
        (0.5, 1.0, 0.5, 0.5),  # down by mistake: full push back
        (1.5, -1.0, -1.5, -1.5),
        (0.5, -1.0, -0.8, 0.0),
    ],
)
def test_clipping(ratio, adv, value, slope):
    loss, grad, stats = loss_of(
        [math.log(ratio)], [0.0], [math.log(ratio)], [adv], [1.0], kl_coef=0.0
    )
    assert loss == pytest.approx(-value) and grad == pytest.approx([-slope], abs=1e-12)
    assert stats["clipped"] == float(abs(ratio - 1) > 0.2)


def test_kl_is_k3_clamped_at_ten_without_overflow():
    for d, value, slope in (
        (0.0, 0.0, 0.0),
        (0.5, math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
        (-1.0, math.exp(-1), 1 - math.exp(-1)),
        (3.0, 10.0, 0.0),
        (500.0, 10.0, 0.0),
        (-50.0, 10.0, 0.0),
    ):
        loss, grad, stats = loss_of([0.0], [0.0], [d], [0.0], [1.0], kl_coef=0.5)
        assert loss == pytest.approx(0.5 * value) and stats["kl"] == pytest.approx(value)
        assert grad == pytest.approx([0.5 * slope], abs=1e-12), d


@pytest.mark.parametrize(
    "variant, ratio, adv, value, slope",
    [
        ({"clip": (0.2, 0.28)}, 1.25, 1.0, 1.25, 1.25),  # clip-higher: still pushed at 1.25
        ({"clip": (0.2, 0.28)}, 1.30, 1.0, 1.28, 0.0),
        ({"clip": (0.2, 0.28)}, 0.75, -1.0, -0.8, 0.0),
    ],
)
def test_the_clip_range(variant, ratio, adv, value, slope):
    loss, grad, _ = loss_of(
        [math.log(ratio)], [0.0], [math.log(ratio)], [adv], [1.0], kl_coef=0.0, **variant
    )
    assert loss == pytest.approx(-value) and grad == pytest.approx([-slope], abs=1e-12)


@pytest.mark.parametrize(
    "over, weight", [(math.log(1.5), 1.5), (math.log(3.0), 2.0), (-1.0, math.exp(-1))]
)
def test_truncated_importance_weights(over, weight):
    """The trainer gave the token e^over times the engine's probability; at most 2 counts."""
    loss, grad, _ = loss_of(
        [-1.0],
        [-1.0],
        [-1.0],
        [1.0],
        [1.0],
        kl_coef=0.0,
        engine_cap=2.0,
        sampler_logp=torch.tensor([-1.0 - over], **D),
    )
    assert loss == pytest.approx(-weight) and grad == pytest.approx([-weight])


@pytest.mark.parametrize("reward", [1.3, 1.2, 0.3, -0.9, 0.1, 1e6, 0.0, 1e30, -1e-40])
@pytest.mark.parametrize("kind", ["grpo", "drgrpo"])
def test_equal_rewards_have_no_advantage_to_the_last_bit(reward, kind):
    """The mean of seven can differ from each of them, whatever the reward is and in whatever precision it came."""
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((3, 7), reward, dtype=dtype)
        rewards[1, 3] = math.nan
        rewards[2, 2:4] = math.inf
        assert advantages(rewards, kind).tolist() == [[0.0] * 7] * 3
    assert rloo.leave_one_out(rewards).tolist() == [[0.0] * 7] * 3
    assert grpo.is_zero_variance(group(*rewards[1].tolist()))


def test_zeros_of_two_signs_are_equal():
    rewards = torch.tensor([[-0.0, 0.0, 0.0]])
    assert advantages(rewards).tolist() == [[0.0] * 3]
    assert grpo.is_zero_variance(group(*rewards[0].tolist()))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e15, 1e30, 1e200])
def test_advantages_do_not_depend_on_the_scale_of_the_rewards(scale):
    """In float32 the square of 1e30 is infinite, and every advantage would be 0."""
    found = advantages(torch.tensor([[scale, -scale, 0.0, 0.0]], **D))[0]
    assert found.tolist() == pytest.approx([1.2247, -1.2247, 0, 0], rel=2e-3)


def test_rewards_that_differ_in_the_last_bit_hardly_teach():
    """0.1 + 0.2 is not 0.3: what is no zero-variance group has an advantage, as small as the difference."""
    rewards = [0.1 + 0.2, 0.3, 0.3]
    found = advantages(torch.tensor([rewards], **D))[0]
    assert not grpo.is_zero_variance(group(*rewards))
    assert 0 < found[0] < 1e-9 and found.sum().abs() < 1e-15


@pytest.mark.parametrize("kind", ["grpo", "drgrpo", "rloo"])
@pytest.mark.parametrize("large", [1e38, 1e39, 1e308, 1.79e308])
def test_advantages_of_finite_rewards_are_finite(kind, large):
    rewards = torch.tensor([[large, -large, -large, math.nan], [1.0, 0.0, 0.0, 0.0]], **D)
    found = rloo.leave_one_out(rewards) if kind == "rloo" else advantages(rewards, kind)
    assert found.isfinite().all() and found[0, 0] > 0 > found[0, 1] == found[0, 2]
    if kind == "grpo":
        assert found[0].tolist() == pytest.approx([1.1547, -0.5774, -0.5774, 0], abs=1e-3)
    assert grpo.mean_reward([large] * 3) == pytest.approx(large)


def test_infinite_rewards_are_not_known():
    found = advantages(torch.tensor([[math.inf, 1.0, 0.0], [-math.inf, 1.0, 1.0]]))
    assert found[0].tolist() == pytest.approx([0.0, 0.7071, -0.7071], abs=1e-4)
    assert found[1].tolist() == [0.0] * 3


def test_advantages_of_other_kinds():
    r = torch.tensor([[1.0, 1.0, 1.0, -1.0]], **D)
    assert advantages(r, "drgrpo").tolist() == [[0.5, 0.5, 0.5, -1.5]]
    for kind in ("grpo", "drgrpo"):
        assert advantages(torch.ones(1, 4, **D), kind).tolist() == [[0.0] * 4]


def test_a_judgment_without_a_reward_teaches_nothing_and_spoils_nothing():
    nan = float("nan")
    for kind in ("grpo", "drgrpo"):
        got = advantages(
            torch.tensor([[1.0, nan, -1.0, -1.0], [nan] * 4, [nan, nan, nan, 1.0]], **D), kind
        )
        alone = advantages(torch.tensor([[1.0, -1.0, -1.0]], **D), kind)[0].tolist()
        assert got[0].tolist() == pytest.approx([alone[0], 0.0, *alone[1:]])
        assert got[1:].tolist() == [[0.0] * 4] * 2


USER = [{"role": "user", "content": "q"}]


def test_a_reward_that_fails_is_counted_and_costs_nothing_else(monkeypatch, capsys):
    """Whatever it raises: a slip in somebody's own reward must not end a run of days. Its traceback is shown once,
    a step has one line, and a step in which every reward failed ends the run."""
    rows = [grpo.Row(Pair(str(i), USER, "a", "b", "A"), np.array([1, 2])) for i in range(3)]
    sample = SimpleNamespace(tokens=np.array([3]), logprobs=np.array([-1.0]), finished=True)
    engine = SimpleNamespace(generate=lambda prompts, *_: [sample for _ in prompts])
    monkeypatch.setattr(grpo, "decode_sample", lambda *_: "<answer>[[A]]</answer>")
    slips = {"0": IndexError("list index"), "1": AttributeError("no such part")}

    def reward_of(text, judgment, pair, *_):
        if pair.id in slips:
            raise slips[pair.id]
        return 1.0

    monkeypatch.setattr(grpo, "reward_of", reward_of)
    monkeypatch.setattr(grpo, "SHOWN_TRACEBACKS", [])
    monkeypatch.setattr(grpo, "all_gather", lambda mine: [mine])
    args = SimpleNamespace(seed=0, max_response=8)
    groups = grpo.sample_groups(engine, None, [], args, 0, 1, rows, 0, group_size=2)
    assert [[str(r.reward) for r in group] for group in groups] == [["nan"] * 2] * 2 + [["1.0"] * 2]
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1
    assert (
        "step 0: 4 of 6 rewards raised an error, the first IndexError: list index (pair 0)" in err
    )
    assert err.count("step 0") == 1
    slips["2"] = ZeroDivisionError()
    with pytest.raises(Failure, match="step 1: every reward raised an error"):
        grpo.sample_groups(engine, None, [], args, 0, 1, rows, 1, group_size=2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "reward",
    [None, "0.5", math.nan, -math.inf, [1.0], 1j, 10**400, torch.tensor([1.0, 2.0])],
    ids=str,
)
def test_what_is_no_finite_number_is_no_reward(reward, monkeypatch, capsys):
    found = rewards_of([1, reward], monkeypatch)
    assert found[0] == 1.0 and math.isnan(found[1])
    assert "step 0: 1 of 2 rewards raised an error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "reward", [True, 1, np.float32(1), torch.tensor(1.0), Fraction(1)], ids=str
)
def test_every_kind_of_number_is_a_reward(reward, monkeypatch):
    """Kept as a float: tensors of equal value are not equal as members of a set."""
    found = rewards_of([1, reward], monkeypatch)
    assert found == [1.0, 1.0] and type(found[1]) is float


def rewards_of(rewards, monkeypatch):
    """What becomes of what a reward function returns, for a group."""
    rows = [grpo.Row(Pair("0", USER, "a", "b", "A"), np.array([1, 2]))]
    sample = SimpleNamespace(tokens=np.array([3]), logprobs=np.array([-1.0]), finished=True)
    engine = SimpleNamespace(generate=lambda prompts, *_: [sample for _ in prompts])
    monkeypatch.setattr(grpo, "decode_sample", lambda *_: "<answer>[[A]]</answer>")
    values = iter(rewards)
    monkeypatch.setattr(grpo, "reward_of", lambda *_: next(values))
    monkeypatch.setattr(grpo, "all_gather", lambda mine: [mine])
    args = SimpleNamespace(seed=0, max_response=8)
    (found,) = grpo.sample_groups(engine, None, [], args, 0, 1, rows, 0, group_size=len(rewards))
    return [rollout.reward for rollout in found]


def test_of_several_ranks_one_prints_the_first_traceback(monkeypatch, capsys):
    monkeypatch.setattr(grpo, "SHOWN_TRACEBACKS", [])
    monkeypatch.setenv("RANK", "1")
    grpo.report_errors(0, [("KeyError: 'x'", "Traceback\n")] * 3, 8)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(grpo, "SHOWN_TRACEBACKS", [])
    monkeypatch.setenv("RANK", "0")
    for step in range(3):
        grpo.report_errors(step, [("KeyError: 'x'", "Traceback\n")] * 3, 8)
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_text_does_not_depend_on_the_ranks(world, monkeypatch):
    """Each rank samples its part; together they have every group once, in order, with the same keys."""
    rows = [grpo.Row(Pair(str(i), USER, "a", "b", "A"), np.array([i])) for i in range(5)]

    def generate(prompts, seeds, *_):
        return [
            SimpleNamespace(
                tokens=np.array([prompt[0], seed % 1000], np.int32),
                logprobs=np.zeros(2, np.float32),
                finished=True,
            )
            for prompt, seed in zip(prompts, seeds)
        ]

    engine = SimpleNamespace(generate=generate)
    monkeypatch.setattr(grpo, "decode_sample", lambda *_: "<answer>[[A]]</answer>")
    args = SimpleNamespace(seed=3, max_response=8, reward="verdict")
    sent = {}

    def sample(rank, gather):
        monkeypatch.setattr(grpo, "all_gather", gather)
        return grpo.sample_groups(
            engine, None, [], args, rank, world, rows, 7, group_size=2, temperature=1.0
        )

    def record(rank, mine):
        sent[rank] = mine
        return [mine] * world

    for rank in range(world):
        sample(rank, lambda mine, rank=rank: record(rank, mine))
    groups = sample(0, lambda mine: [sent[rank] for rank in range(world)])
    found = [[(r.row.pair.id, r.tokens.tolist(), r.reward) for r in group] for group in groups]
    seeds = [[seed_of(3, 7, place, n) % 1000 for n in range(2)] for place in range(5)]
    assert found == [[(str(i), [i, seed], 1.0) for seed in seeds[i]] for i in range(5)]


@pytest.mark.parametrize(
    "mean, weights", [("sequence", [0.5, 0.125]), ("token", [0.2, 0.2]), ("constant", [1 / 16] * 2)]
)
def test_token_weights(mean, weights):
    """Judgments of 1 and 4 tokens, an update of 2 with 5 tokens, at most 8 each."""
    args = SimpleNamespace(mini_batch=1, group_size=2, loss_mean=mean, max_response=8)
    assert grpo.token_weights(torch.tensor([1, 4]), 5, args).tolist() == pytest.approx(weights)


def test_the_mean_is_over_tokens_then_over_judgments():
    """Eq. 9: judgments of 1 and 4 tokens weigh the same. Both on policy, so each contributes -A / 2."""
    lengths = torch.tensor([1, 4, 4, 4, 4])
    weight = (1 / (lengths * 2.0)).tolist()
    loss, _, _ = loss_of([-1.0] * 5, [-1.0] * 5, [-1.0] * 5, [2.0, 1.0, 1.0, 1.0, 1.0], weight)
    assert loss == pytest.approx(-(2.0 + 1.0) / 2)


def test_cutting_a_batch_up_changes_nothing():
    g = torch.Generator().manual_seed(0)
    logp, old, ref, adv = (torch.randn(40, generator=g, **D).tolist() for _ in range(4))
    whole = loss_of(logp, old, ref, adv, [1 / 40] * 40)
    parts = [
        loss_of(*(x[i : i + 7] for x in (logp, old, ref, adv)), [1 / 40] * len(logp[i : i + 7]))
        for i in range(0, 40, 7)
    ]
    assert whole[0] == pytest.approx(sum(p[0] for p in parts))
    assert whole[1] == pytest.approx([g for p in parts for g in p[1]])
    assert whole[2]["kl"] == pytest.approx(sum(p[2]["kl"] for p in parts))


def test_sft_loss_is_the_token_mean_however_it_is_cut():
    logp = torch.randn(30, **D)
    assert sft.sft_loss(logp, 30).item() == pytest.approx(-logp.mean().item())
    assert sum(sft.sft_loss(x, 30).item() for x in logp.split(7)) == pytest.approx(
        -logp.mean().item()
    )


def test_supervision_starts_after_the_role_header_and_ends_with_the_end_of_turn(toy):
    from lib.pairs import read_pairs

    tokenizer, stop = chat.load_tokenizer(toy / "model")
    pairs = read_pairs(toy / "sft.jsonl")
    args = SimpleNamespace(max_len=160, batch=1, data="x")
    (row,) = sft.tokenize(pairs[:1], tokenizer, PromptStyle("instruct", "Judge A and B."), args)
    trace = row.trace
    assert tokenizer.decode(row.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(trace) == pairs[0].trace + "<|im_end|>" and trace[-1] in stop


def test_overlong_traces_are_left_out_not_cut(toy, capsys):
    from lib.pairs import read_pairs

    tokenizer, _ = chat.load_tokenizer(toy / "model")
    pairs = read_pairs(toy / "sft.jsonl")
    args = SimpleNamespace(max_len=64, batch=1, data="x")
    rows = sft.tokenize(pairs, tokenizer, PromptStyle("instruct", "Judge A and B."), args)
    assert 0 < len(rows) < len(pairs) and all(
        len(row.prompt) + len(row.trace) <= 64 and row.trace[-1] == tokenizer.eos_token_id
        for row in rows
    )
    assert f"{len(pairs) - len(rows)} left out" in capsys.readouterr().out


def test_a_mismatch_of_trainer_and_sampler_stops_the_run(ranks):
    """A dummy micro-batch has no token that anybody sampled."""
    sampler = torch.linspace(-3, 0, 50)
    update = [SimpleNamespace(sampler_logp=sampler), SimpleNamespace(sampler_logp=torch.zeros(0))]
    check = lambda trainer: check_mismatch([[trainer, torch.zeros(0)]], [update], 0.1)
    found = check(sampler + 0.05)
    assert found["mismatch_mean"] == pytest.approx(0.05, abs=1e-6)
    assert found["mismatch_max"] == pytest.approx(0.05, abs=1e-6)
    for broken in (sampler + 0.2, sampler * float("nan")):
        with pytest.raises(Failure, match="not sampling from the weights in training"):
            check(broken)


def test_the_random_reward_is_a_coin_that_a_resumed_run_throws_alike():
    args = SimpleNamespace(reward="random")
    throws, again = (
        [grpo.reward_of("", None, None, 0, (0, 0, n, 0), args) for n in range(1000)]
        for _ in range(2)
    )
    assert throws == again
    assert set(throws) == {1.0, -1.0} and abs(sum(throws)) < 100


def group(*rewards, label="A", verdicts=""):
    """A group whose judgments earned these rewards with these verdicts."""
    row = grpo.Row(Pair("1", USER, "a", "b", label), np.array([1, 2]))
    return [
        grpo.Rollout(row, np.array([3]), np.array([-1.0]), True, verdict, reward)
        for reward, verdict in zip(rewards, verdicts or [None] * len(rewards))
    ]


TRUTH = {
    "criterion": "Count", "target": "2", "quote_a": "kiwi fig", "value_a": "2", "quote_b": "plum", "value_b": "1",
}  # fmt: skip
KNOWN = Pair("1", USER, "Sure kiwi fig", "Sure plum", "A", type="chat", meta=TRUTH)
UNKNOWN = Pair("2", USER, "Sure kiwi fig", "Sure plum", "A", type="chat", meta={"target": "2"})
SOUND = (
    "<type>Chat</type><rubric>Count 90%: 2 fruits</rubric><eval><quote_A>kiwi fig</quote_A> 2 is A and "
    "<quote_B>plum</quote_B> 1 is B so 2 is A</eval><answer>[[A]]</answer>"
)
SHORTCUT = SOUND.replace("Count", "Manners")
TURNED = SOUND.replace("[[A]]", "[[B]]")


@pytest.mark.parametrize(
    "pair, text, whole, half, sound",
    [
        (KNOWN, SOUND, 1, 1, True),
        (KNOWN, SHORTCUT, -1, 0, False),  # right for another reason
        (KNOWN, TURNED, -1, -1, False),
        (KNOWN.swapped(), SOUND, -1, -1, False),  # copied from the other order
        (KNOWN, "", -1, -1, False),
        (UNKNOWN, SHORTCUT, 1, 1, None),  # paid for its verdict
        (UNKNOWN, TURNED, -1, -1, None),
    ],
)
def test_the_reward_for_reasons(pair, text, whole, half, sound, monkeypatch):
    """By hand, with reasons that are all of the reward and half of it."""
    args = SimpleNamespace(reward="sound")
    judgment = parse(text)
    assert soundness.right_and_sound(judgment, pair) is sound
    assert grpo.reward_of(text, judgment, pair, 9, None, args) == whole
    monkeypatch.setattr(soundness, "REASONS_WEIGHT", 0.5)
    assert grpo.reward_of(text, judgment, pair, 9, None, args) == half


@pytest.mark.parametrize("reward", ["verdict", "sound", "random"])
def test_the_log_says_how_many_are_right_for_a_sound_reason(reward, monkeypatch):
    """Under every reward, of the pairs whose reason is known; without one there is no such column."""
    texts = [SOUND, SHORTCUT, TURNED, SOUND, SHORTCUT, SHORTCUT]
    rows = [grpo.Row(pair, np.array([1])) for pair in (KNOWN, KNOWN, UNKNOWN)]
    sample = SimpleNamespace(tokens=np.array([3]), logprobs=np.array([-1.0]), finished=True)
    engine = SimpleNamespace(generate=lambda prompts, *_: [sample for _ in prompts])
    left = iter(texts)
    monkeypatch.setattr(grpo, "decode_sample", lambda *_: next(left))
    monkeypatch.setattr(grpo, "all_gather", lambda mine: [mine])
    args = SimpleNamespace(seed=0, max_response=8, reward=reward)
    groups = grpo.sample_groups(engine, None, [], args, 0, 1, rows, 0, group_size=2)
    assert grpo.accuracy(groups) == pytest.approx(
        {"accuracy": 5 / 6, "no_verdict": 0, "sound": 2 / 4}
    )
    assert grpo.accuracy(groups[:1], "val_") == pytest.approx(
        {"val_accuracy": 1, "val_no_verdict": 0, "val_sound": 1 / 2}
    )
    assert set(grpo.accuracy(groups[2:])) == {"accuracy", "no_verdict"}
    if reward == "sound":
        assert [[r.reward for r in group] for group in groups] == [[1, -1], [-1, 1], [1, 1]]


@pytest.mark.parametrize("pairs", [[UNKNOWN], [UNKNOWN, KNOWN]])
def test_the_reward_for_reasons_needs_a_pair_whose_reason_is_known(pairs, monkeypatch):
    rows = [grpo.Row(pair, np.array([1])) for pair in pairs]
    monkeypatch.setattr(grpo, "tokenize_prompts", lambda *_: (pairs, rows))
    monkeypatch.setattr(grpo, "window_of", lambda config: 8192)
    args = grpo.arguments(["--reward", "sound", "--data", "mine.jsonl", "--batch", "1",
                           "--mini-batch", "1", "--max-response", "512"])  # fmt: skip
    read = lambda: grpo.read_data(args, None, None, None, 1)
    if KNOWN in pairs:
        assert read().rows == rows
        return
    with pytest.raises(Failure, match="--reward sound: no pair of mine.jsonl says what its true"):
        read()
    args.reward = "verdict"
    assert read().rows == rows


def test_a_group_has_zero_variance_where_nothing_can_be_compared():
    nan = float("nan")
    for rewards in ((1.0, 1.0), (-1.0, nan), (nan, nan)):
        assert grpo.is_zero_variance(group(*rewards))
    assert not grpo.is_zero_variance(group(1.0, -1.0, nan))


@pytest.mark.parametrize("beta, computed", [(1e-3, [0, 1, 2, 3]), (0.0, [1, 3])])
def test_zero_variance_groups_are_computed_for_the_kl_penalty_only(beta, computed, ranks):
    """Without a KL penalty their gradient is zero; what is computed weighs the same either way."""
    args = SimpleNamespace(
        mini_batch=4,
        group_size=2,
        beta=beta,
        micro_tokens=100,
        loss_mean="sequence",
        max_response=8,
    )
    groups = []
    for i in range(4):
        tokens, logp = np.full(i + 1, i), np.zeros(i + 1, np.float32)
        groups.append([grpo.Rollout(grpo.Row(None, [i]), tokens, logp, True, "A", 0.0)] * 2)
    split = lambda advantage: grpo.split_into_updates(
        groups, advantage, args, torch.device("cpu"), 0, 1, 32
    )
    (update,) = split(torch.tensor([[0.0, 0.0], [1.0, -1.0]] * 2))
    weight = [
        sum(m.token_weight[m.batch.targets == i].sum().item() for m in update) for i in range(4)
    ]
    assert weight == [pytest.approx(0.25 if i in computed else 0) for i in range(4)]
    (update,) = split(torch.zeros(4, 2))
    assert update, "a step of zero-variance groups is a step all the same"


@pytest.mark.parametrize("micro_tokens", [10, 23, 1000])
@pytest.mark.parametrize("beta", [0.0, 1e-3])
def test_each_token_carries_the_values_of_its_own_judgment(micro_tokens, beta, ranks):
    """However an update is cut into micro-batches, and whichever groups are left out."""
    args = SimpleNamespace(
        mini_batch=2,
        group_size=2,
        beta=beta,
        micro_tokens=micro_tokens,
        loss_mean="sequence",
        max_response=9,
    )
    groups, advantage = [], torch.tensor([[1.0, -1.0], [0.0, 0.0], [2.0, -2.0], [3.0, -3.0]])
    for i in range(4):
        tokens = [np.full(2 + i, 10 * i + n) for n in range(2)]  # the token says whose it is
        logp = [np.full(2 + i, -(10 * i + n), np.float32) for n in range(2)]
        row = grpo.Row(None, [99] * 5)
        groups.append([grpo.Rollout(row, t, x, True, "A", 0.0) for t, x in zip(tokens, logp)])
    updates = grpo.split_into_updates(groups, advantage, args, torch.device("cpu"), 0, 1, 32)
    seen = set()
    for number, update in enumerate(updates):
        for m in update:
            for n, token in enumerate(m.batch.targets.tolist()):
                i, g = divmod(token, 10)
                seen.add((i, g))
                assert i // 2 == number and m.advantage[n] == advantage[i, g]
                assert m.sampler_logp[n] == -token
                assert m.token_weight[n].item() == pytest.approx(1 / ((2 + i) * 4))
    assert seen == {(i, g) for i in ((0, 1, 2, 3) if beta else (0, 2, 3)) for g in range(2)}
