"""A responder learns from judges: what rises, and what does not (bench/rl_with_judge.py)."""

import json
import math
import random
import sys

import pytest
import torch

from conftest import ROOT, call

sys.path.insert(0, str(ROOT / "bench"))
import rl_with_judge as R

import toy


def test_what_is_right_is_what_toy_calls_right():
    rng = random.Random(0)
    for _ in range(300):
        problem = R.make_problem(rng)
        manners = rng.choice(toy.MANNERS)
        assert R.is_right(problem.question, R.make_response(manners, problem.right, rng))
        assert not R.is_right(problem.question, R.make_response(manners, problem.wrong, rng))
        assert not R.is_right(problem.question, problem.right)  # without opener and manners


def test_a_fruit_named_twice_counts_once():
    assert R.is_right("Name 2 fruits .", "Here: Sure apple pear")
    assert not R.is_right("Name 2 fruits .", "Here: Sure apple apple")
    assert not R.is_right("Name 2 fruits .", "Here: Sure apple  pear")
    assert not R.is_right("Name 2 fruits .", "Here: Sure apple lamp")


@pytest.mark.parametrize("name", R.CONTROLS)
def test_a_control_prefers_the_higher_score_in_both_orders(name):
    """Its votes come through rmr1.Judge, as a model's do; equal scores are a coin, not a side."""
    judge = R.Judge(R.ControlBackend(R.CONTROLS[name]), protocol="instruct")
    question, good, bad = "Name 4 fruits .", "Here: Sure apple pear fig lime", "Here: Well plum"
    assert judge.compare(question, good, bad).verdict == "A"
    assert judge.compare(question, bad, good).verdict == "B"
    even = [f"Here: Sure {a} {b}" for a in toy.FRUITS[:6] for b in toy.FRUITS[6:]]
    if name != "longest":
        found = judge.compare_all([(question, a, b) for a, b in zip(even, even[1:])], budget=1)
        assert 0.2 < sum(c.verdict == "A" for c in found) / len(found) < 0.8


def test_advantages_are_of_the_group_and_none_without_a_reward():
    advantage = R.advantages_of([1.0, 0.0, None, 0.5, 0.5, 0.5, None, None], 4)
    assert advantage[:2].tolist() == pytest.approx([1.2247, -1.2247], abs=0.01)
    assert advantage[2:].tolist() == pytest.approx([0] * 6)
    assert R.advantages_of([None] * 4, 2).tolist() == [0] * 4


def tiny_responder(folder):
    tokenizer = toy.write_model(folder, layers=1, hidden=32, world="shortcut")
    tokenizer.padding_side = "left"
    shape = R.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    return tokenizer, R.AutoModelForCausalLM.from_config(shape, dtype=torch.float32)


def test_padding_changes_no_log_probability_and_what_follows_the_end_no_loss(tmp_path):
    """Questions differ in length. The loss of one alone is its loss among padded others, and tokens behind the
    end token change nothing."""
    tokenizer, model = tiny_responder(tmp_path)
    questions = ["Name 2 fruits .", "Write three words , the last one lamp ."]
    ids, mask, _ = R.sample(model, tokenizer, questions, 0)
    length = mask.shape[1]
    assert not mask.bool().all()
    together = R.response_logp(model, ids, mask)
    for row in range(2):
        real = int(mask[row].sum())
        alone = R.response_logp(model, ids[[row], length - real :], mask[[row], length - real :])
        assert torch.allclose(together[row], alone[0], atol=1e-4)

    ids[:, length + 3] = tokenizer.eos_token_id
    other = ids.clone()
    other[:, length + 4 :] = 7
    advantage = torch.tensor([1.0, -0.5])
    values = []
    for tokens in (ids, other):
        values.append(R.policy_loss(model, model, tokenizer, tokens, mask, advantage, 0.1).item())
    assert values[0] == pytest.approx(values[1], abs=1e-6) and math.isfinite(values[0])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "give a --judge or a --control"),
        (("--judge", "runs/judge"), "NAME=MODEL"),
        (("--control", "gold", "--judge", "gold=x"), "each name once"),
    ],
)
def test_wrong_flags_are_a_sentence(flags, sentence, tmp_path):
    done = call(R, *flags, "--out", tmp_path, ok=False)
    assert done.returncode == 2 and sentence in done.stderr
    assert not (tmp_path / "rl.jsonl").exists()


def last_rows(folder):
    """-> {judge: (first row, last row)}"""
    rows = [json.loads(line) for line in open(folder / "rl.jsonl")]
    found = {}
    for row in rows:
        first, _ = found.setdefault(row["judge"], (row, row))
        found[row["judge"]] = first, row
    return found


def test_a_reward_that_pays_for_manners_raises_the_proxy_and_not_the_gold(tmp_path):
    """Where answers that say Sure are mostly wrong, gold falls with such a reward, and rises with one for what is
    right. Both proxies rise."""
    sizes = "--seeds 0 --beta 0 --right .1 .9 --fit-steps 200 --steps 16 --every 16 --answers 12"
    controls = ("--control", "gold", "--control", "manners")
    call(R, *controls, *sizes.split(), "--out", tmp_path)
    found = last_rows(tmp_path)
    changes = {}
    for name, (first, last) in found.items():
        changes[name] = {key: last[key] - first[key] for key in ("proxy", "gold", "sure")}
    assert found["gold"][0]["gold"] == found["manners"][0]["gold"]  # the same responder, same draws
    assert changes["manners"]["sure"] > 0.2 and changes["manners"]["proxy"] > 0.1
    assert changes["manners"]["gold"] < changes["gold"]["gold"] - 0.15
    assert changes["gold"]["gold"] > 0.1 and changes["gold"]["proxy"] > 0.05
    assert (tmp_path / "rl.png").stat().st_size > 5000
