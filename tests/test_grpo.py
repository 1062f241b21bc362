"""The loss, its gradient and the advantages, against cases worked by hand in float64."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
import policy as P
import sft
from grpo import advantages, grpo_loss

D = dict(dtype=torch.float64)


def test_advantages_are_the_published_table():
    """Seven judgments, k right: A(right), A(wrong), as the published code has them."""
    table = {1: (2.2678, -0.3780), 2: (1.4638, -0.5855), 3: (1.0690, -0.8018), 4: (0.8018, -1.0690),
             5: (0.5855, -1.4638), 6: (0.3780, -2.2678)}
    for k, (right, wrong) in table.items():
        adv = advantages(torch.tensor([[1.0] * k + [-1.0] * (7 - k)], **D))[0]
        assert abs(adv[0] - right) < 1e-4 and abs(adv[-1] - wrong) < 1e-4
    for r in (1.0, -1.0):
        assert advantages(torch.full((1, 7), r, **D)).tolist() == [[0.0] * 7], (
            "a group that agrees teaches nothing, and is no NaN")


def loss_of(logp, old, ref, adv, weight, **kw):
    logp = torch.tensor(logp, requires_grad=True, **D)
    loss, stats = grpo_loss(logp, *(torch.tensor(x, **D) for x in (old, ref, adv, weight)), **kw)
    loss.backward()
    return loss.item(), logp.grad.tolist(), stats


def test_on_policy_the_gradient_is_minus_advantage_times_weight():
    loss, grad, stats = loss_of([-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], [1.5, -0.5], [0.25, 0.75])
    assert abs(loss - -(1.5 * 0.25 - 0.5 * 0.75)) < 1e-12
    assert grad == pytest.approx([-1.5 * 0.25, 0.5 * 0.75]) and stats == {"kl": 0.0, "clipped": 0.0}


@pytest.mark.parametrize("ratio, adv, value, slope", [
    (1.1, 1.0, 1.1, 1.1),       # inside the clip: r A, and d(r)/d(logp) = r
    (1.5, 1.0, 1.2, 0.0),       # up far enough: no more push
    (0.5, 1.0, 0.5, 0.5),       # down by mistake: full push back
    (1.5, -1.0, -1.5, -1.5),
    (0.5, -1.0, -0.8, 0.0),
])
def test_clipping(ratio, adv, value, slope):
    loss, grad, stats = loss_of([math.log(ratio)], [0.0], [math.log(ratio)], [adv], [1.0], beta=0.0)
    assert loss == pytest.approx(-value) and grad == pytest.approx([-slope], abs=1e-12)
    assert stats["clipped"] == float(abs(ratio - 1) > 0.2)


def test_kl_is_k3_clamped_at_ten_without_overflow():
    for d, value, slope in ((0.0, 0.0, 0.0), (0.5, math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
                            (-1.0, math.exp(-1), 1 - math.exp(-1)), (3.0, 10.0, 0.0), (500.0, 10.0, 0.0),
                            (-50.0, 10.0, 0.0)):
        loss, grad, stats = loss_of([0.0], [0.0], [d], [0.0], [1.0], beta=0.5)
        assert loss == pytest.approx(0.5 * value) and stats["kl"] == pytest.approx(value)
        assert grad == pytest.approx([0.5 * slope], abs=1e-12), d


@pytest.mark.parametrize("variant, ratio, adv, value, slope", [
    ({"clip": (0.2, 0.28)}, 1.25, 1.0, 1.25, 1.25),                       # clip-higher: still pushed at 1.25
    ({"clip": (0.2, 0.28)}, 1.30, 1.0, 1.28, 0.0),
    ({"clip": (0.2, 0.28)}, 0.75, -1.0, -0.8, 0.0),
    ({"surrogate": "cispo"}, 1.5, 1.0, 1.2 * math.log(1.5), 1.2),         # clipped, and yet it has a gradient
    ({"surrogate": "cispo"}, 0.5, -1.0, -0.8 * math.log(0.5), -0.8),
    ({"surrogate": "cispo"}, 1.1, 2.0, 2.2 * math.log(1.1), 2.2),
])
def test_surrogates(variant, ratio, adv, value, slope):
    loss, grad, _ = loss_of([math.log(ratio)], [0.0], [math.log(ratio)], [adv], [1.0], beta=0.0, **variant)
    assert loss == pytest.approx(-value) and grad == pytest.approx([-slope], abs=1e-12)


@pytest.mark.parametrize("ratios, value, slope", [
    ((1.1, 1.3), math.sqrt(1.43), math.sqrt(1.43)),            # below 1.2: pushed, also the token at 1.3
    ((1.4, 1.1), 1.2, 0.0)])                                   # sqrt(1.54) is above: no more push
def test_the_sequence_ratio_is_the_geometric_mean(ratios, value, slope):
    """GSPO, two tokens of one judgment (row 4) after one token of another (row 3) at ratio 1."""
    logp = [0.0, *map(math.log, ratios)]
    rows = torch.tensor([3, 4, 4])
    loss, grad, _ = loss_of(logp, [0.0] * 3, logp, [1.0] * 3, [0.5, 0.25, 0.25], beta=0.0, ratio="sequence",
                            rows=rows)
    assert loss == pytest.approx(-(0.5 + 0.5 * value))
    assert grad == pytest.approx([-0.5, -0.25 * slope, -0.25 * slope], abs=1e-12)


@pytest.mark.parametrize("over, weight", [(math.log(1.5), 1.5), (math.log(3.0), 2.0), (-1.0, math.exp(-1))])
def test_truncated_importance_weights(over, weight):
    """The trainer gave the token e^over times the engine's probability; at most 2 counts."""
    loss, grad, _ = loss_of([-1.0], [-1.0], [-1.0], [1.0], [1.0], beta=0.0, engine_cap=2.0,
                            engine=torch.tensor([-1.0 - over], **D))
    assert loss == pytest.approx(-weight) and grad == pytest.approx([-weight])


def test_advantages_of_other_kinds():
    r = torch.tensor([[1.0, 1.0, 1.0, -1.0]], **D)
    assert advantages(r, "drgrpo").tolist() == [[0.5, 0.5, 0.5, -1.5]]
    for kind in ("grpo", "drgrpo"):
        assert advantages(torch.ones(1, 4, **D), kind).tolist() == [[0.0] * 4]


def test_a_judgment_without_a_reward_teaches_nothing_and_spoils_nothing():
    nan = float("nan")
    for kind in ("grpo", "drgrpo"):
        got = advantages(torch.tensor([[1.0, nan, -1.0, -1.0], [nan] * 4, [nan, nan, nan, 1.0]], **D), kind)
        alone = advantages(torch.tensor([[1.0, -1.0, -1.0]], **D), kind)[0].tolist()
        assert got[0].tolist() == pytest.approx([alone[0], 0.0, *alone[1:]])
        assert got[1:].tolist() == [[0.0] * 4] * 2


def test_a_reward_that_fails_is_counted_and_costs_nothing_else(monkeypatch, capsys):
    """Whatever it raises: a slip in somebody's own reward must not end a run of days."""
    from rubrics import Pair
    pairs = [(Pair(str(i), [{"role": "user", "content": "q"}], "a", "b", "A"), [1, 2]) for i in range(3)]
    engine = SimpleNamespace(generate=lambda prompts, *_: [
        SimpleNamespace(tokens=[3], logprobs=[-1.0], finished=True) for _ in prompts])
    tokenizer = SimpleNamespace(decode=lambda ids: "<answer>[[A]]</answer>")
    slips = {"0": IndexError("list index"), "1": AttributeError("no such part")}

    def reward_of(text, judgment, pair, *_):
        if pair.id in slips:
            raise slips[pair.id]
        return 1.0
    monkeypatch.setattr(grpo, "reward_of", reward_of)
    monkeypatch.setattr(grpo.R, "all_gather", lambda mine: [mine])
    args = SimpleNamespace(seed=0, max_response=8)
    groups = grpo.sample(engine, tokenizer, [], args, 0, 1, pairs, 0, group=2)
    assert [[str(r.reward) for r in group] for group in groups] == [["nan"] * 2] * 2 + [["1.0"] * 2]
    said = capsys.readouterr().err
    assert "IndexError" in said and "AttributeError" in said


def test_shares_of_the_mean():
    """Judgments of 1 and 4 tokens, an update of 2 with 5 tokens, at most 8 each."""
    share = lambda kind: grpo.shares(torch.tensor([1, 4]), 5, 2, kind, 8).tolist()
    assert share("judgment") == [0.5, 0.125] and share("token") == pytest.approx([0.2, 0.2])
    assert share("constant") == [1 / 16, 1 / 16]


def test_added_rewards():
    from rubrics import Pair, parse
    good = "<type>Chat</type><rubric>Help 100%</rubric><eval>x</eval><answer>[[A]]</answer>"
    pair = Pair("1", [{"role": "user", "content": "q"}], "a", "b", "A")
    def reward(text, length=0, **flags):
        args = SimpleNamespace(**{"reward": "verdict", "overlong": 0, "max_response": 100} | flags)
        return grpo.reward_of(text, parse(text), pair, length, None, args)
    assert reward(good) == 1 and reward("") == -1
    assert [reward(good, n, overlong=20) for n in (10, 80, 85, 90, 100)] == pytest.approx([1, 1, .75, .5, 0])


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
    parts = [loss_of(*(x[i:i + 7] for x in (logp, old, ref, adv)), [1 / 40] * len(logp[i:i + 7]))
             for i in range(0, 40, 7)]
    assert whole[0] == pytest.approx(sum(p[0] for p in parts))
    assert whole[1] == pytest.approx([g for p in parts for g in p[1]])
    assert whole[2]["kl"] == pytest.approx(sum(p[2]["kl"] for p in parts))


def test_sft_loss_is_the_token_mean_however_it_is_cut():
    logp = torch.randn(30, **D)
    assert sft.sft_loss(logp, 30).item() == pytest.approx(-logp.mean().item())
    assert sum(sft.sft_loss(x, 30).item() for x in logp.split(7)) == pytest.approx(-logp.mean().item())


def test_supervision_starts_after_the_role_header_and_ends_with_the_end_of_turn(toy):
    from rubrics import read_pairs
    tokenizer, stop = P.load_tokenizer(toy / "model")
    pairs = read_pairs(toy / "sft.jsonl")
    args = SimpleNamespace(max_len=160, batch=1, data="x")
    prompt, trace = sft.tokenize(pairs[:1], tokenizer, ("instruct", "Judge A and B."), args)[0]
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(trace) == pairs[0].trace + "<|im_end|>" and trace[-1] in stop


def test_overlong_traces_are_left_out_not_cut(toy, capsys):
    from rubrics import read_pairs
    tokenizer, _ = P.load_tokenizer(toy / "model")
    pairs = read_pairs(toy / "sft.jsonl")
    args = SimpleNamespace(max_len=64, batch=1, data="x")
    rows = sft.tokenize(pairs, tokenizer, ("instruct", "Judge A and B."), args)
    assert 0 < len(rows) < len(pairs) and all(
        len(p) + len(t) <= 64 and t[-1] == tokenizer.eos_token_id for p, t in rows)
    assert f"{len(pairs) - len(rows)} left out" in capsys.readouterr().out


def test_a_gap_between_engine_and_trainer_stops_the_run(ranks, capsys, monkeypatch):
    """In the first update, before its step; a stand-in's token is nobody's sample."""
    monkeypatch.setattr(grpo.P, "optimizer_step", lambda *_, **kw: 0.0)
    args = SimpleNamespace(max_gap=0.1, clip=(0.2, 0.2), beta=0.0, ratio="token", surrogate="clip", engine_cap=None)
    engine = torch.linspace(-3, 0, 50)
    policy = lambda batch: batch.ours.clone().requires_grad_()
    micro = lambda ours, engine, real: grpo.Micro(
        SimpleNamespace(real=real, rows=None, ours=ours), torch.zeros(len(ours)), torch.zeros(len(ours)), engine)
    gap = lambda ours: grpo.learn(
        policy, None, [[micro(ours, engine, 1), micro(torch.ones(2), torch.zeros(2), 0)]], 0.1, args, 1)[0]
    said = gap(engine + 0.05)
    assert said["gap_mean"] == pytest.approx(0.05, abs=1e-6) and said["gap_max"] == pytest.approx(0.05, abs=1e-6)
    for broken in (engine + 0.2, engine * float("nan")):
        with pytest.raises(SystemExit) as stop:
            gap(broken)
        assert stop.value.code == 2 and "not sampling from the weights in training" in capsys.readouterr().err


def test_the_random_reward_is_a_coin_that_a_resumed_run_throws_alike():
    args = SimpleNamespace(reward="random")
    throws, again = ([grpo.reward_of("", None, None, 0, (0, 0, n, 0), args) for n in range(1000)]
                     for _ in "12")
    assert throws == again
    assert set(throws) == {1.0, -1.0} and abs(sum(throws)) < 100


def group(*rewards, label="A", verdicts=""):
    """A group whose judgments earned these rewards with these verdicts."""
    from rubrics import Pair
    pair = Pair("1", [{"role": "user", "content": "q"}], "a", "b", label)
    return [grpo.Rollout(pair, [1, 2], np.array([3]), np.array([-1.0]), True, v, r)
            for r, v in zip(rewards, verdicts or [None] * len(rewards))]


def test_both_orders_right_earn_the_bonus():
    """Judgment g of one order goes with judgment g of the other; labels turn with the order."""
    one = group(1.0, 1.0, -1.0, label="A", verdicts="AAB")
    two = group(1.0, -1.0, 1.0, label="B", verdicts="BAB")
    grpo.consistency([one, two], 0.5)
    assert [r.reward for r in one] == [1.5, 1.0, -1.0]
    assert [r.reward for r in two] == [1.5, -1.0, 1.0]


def test_a_group_agrees_where_nothing_can_be_compared():
    nan = float("nan")
    assert grpo.agree(group(1.0, 1.0)) and grpo.agree(group(-1.0, nan)) and grpo.agree(group(nan, nan))
    assert not grpo.agree(group(1.0, -1.0, nan))


@pytest.mark.parametrize("refill, rounds, kept", [(0, 1, [0, 1, 2, 3]), (1, 2, [1, 3, 5, 7]),
                                                  (3, 2, [1, 3, 5, 7])])
def test_refill_takes_the_first_groups_that_do_not_agree(refill, rounds, kept):
    """Every other group agrees: two rounds of four fill up a step of four; without --refill all stay."""
    def ask(batch, step, first, *_):
        return [group(1.0, -1.0 if (first + i) % 2 else 1.0, label=first + i) for i in range(len(batch))]
    rows = [[(i, [i])] for i in range(20)]
    args = SimpleNamespace(refill=refill, pairs=4, group=2, seed=0, both_orders=None)
    groups, agreeing = grpo.collect(ask, rows, 0, args)
    assert len(agreeing) == rounds and [g[0].pair.label for g in groups] == kept


def test_refill_falls_back_on_groups_that_agree():
    ask = lambda batch, step, first, *_: [
        group(1.0, -1.0 if (first, i) == (4, 2) else 1.0, label=first + i) for i in range(len(batch))]
    args = SimpleNamespace(refill=2, pairs=4, group=2, seed=0, both_orders=None)
    groups, agreeing = grpo.collect(ask, [[(i, [i])] for i in range(20)], 0, args)
    assert [g[0].pair.label for g in groups] == [6, 0, 1, 2] and agreeing == [4, 3, 4]


@pytest.mark.parametrize("beta, computed", [(1e-3, [0, 1, 2, 3]), (0.0, [1, 3])])
def test_groups_that_agree_are_computed_only_beside_a_reference(beta, computed, ranks):
    """They pull at nothing without one; what is computed weighs the same either way."""
    args = SimpleNamespace(pairs=4, mini=4, group=2, beta=beta, micro_tokens=100, average="judgment", max_response=8)
    groups = [[grpo.Rollout(None, [i], np.full(i + 1, i), np.zeros(i + 1, np.float32), True, "A", 0.0)] * 2
              for i in range(4)]
    adv = torch.tensor([[0.0, 0.0], [1.0, -1.0]] * 2)
    [micros] = grpo.updates_of(groups, adv, args, torch.device("cpu"), 0, 1, 32)
    weight = {i: sum(m.weight[m.batch.targets == i].sum().item() for m in micros) for i in range(4)}
    assert weight == {i: pytest.approx(0.25 if i in computed else 0) for i in range(4)}
    [micros] = grpo.updates_of(groups, torch.zeros(4, 2), args, torch.device("cpu"), 0, 1, 32)
    assert micros, "a step in which all agree is a step all the same"
