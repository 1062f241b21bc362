"""The network under training: packing, loading, sharding, checkpoints."""
import json
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import policy as P
import ranks as R
from conftest import save_qwen2

# Three prompts with one to four responses, lengths from 1 up: shared prompts, single
# responses and edge lengths.
torch.manual_seed(3)
ids = lambda n: torch.randint(3, 300, (n,)).tolist()
GROUPS = [(ids(17), [ids(5), ids(1), ids(30), ids(2)]), (ids(1), [ids(8)]), (ids(40), [ids(12), ids(12)])]


def plain_logprobs(model, groups):
    """The same log-probs by transformers alone, one sequence at a time."""
    out = []
    for prompt, responses in groups:
        for r in responses:
            logits = model(torch.tensor([prompt + r]), use_cache=False).logits[0, len(prompt) - 1:-1].float()
            out.append(logits.log_softmax(-1).gather(-1, torch.tensor(r)[:, None])[:, 0])
    return torch.cat(out)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path):
    return save_qwen2(tmp_path / "m", request.param), tmp_path / "m"


def grads(policy):
    return {n: p.grad.full_tensor().clone() for n, p in policy.lm.named_parameters()}


@pytest.mark.parametrize("budget", [1, 40, 64, 10**9])
def test_packed_rows_equal_separate_sequences(model, ranks, budget):
    """Any budget, any lengths: log-probs and gradients are those of transformers on one sequence at
    a time, with weights that went through the sharded loader (so its rotary tables and tied head
    are right as well)."""
    plain, folder = model
    policy = P.load(folder, ranks[2], torch.float32)
    weight = torch.rand(sum(len(r) for _, rs in GROUPS for r in rs))
    expected = plain_logprobs(plain, GROUPS)
    (expected * weight).sum().backward()
    micros, got, at = P.pack(GROUPS, budget, ranks[2]), [], 0
    for m in micros:
        logp = policy(m)
        (logp * weight[at:at + len(logp)]).sum().backward()
        got.append(logp.detach())
        at += len(logp)
    assert (torch.cat(got) - expected).abs().max() < 1e-5
    mine, theirs = grads(policy), dict(plain.named_parameters())
    for name, g in mine.items():
        assert (g - theirs[name].grad).norm() <= 1e-5 * theirs[name].grad.norm() + 1e-7, name


def test_packing_keeps_the_budget_and_the_order(ranks):
    for budget in (30, 50, 64, 200):
        micros = P.pack(GROUPS, budget, ranks[2])
        longest = max(len(p) + len(r) for p, rs in GROUPS for r in rs)
        assert all(len(m.tokens) <= max(budget, longest) for m in micros)
        assert (torch.cat([m.targets for m in micros]).tolist()
                == [t for _, rs in GROUPS for r in rs for t in r])
        rows = torch.cat([m.rows for m in micros])
        assert rows.bincount().tolist() == [len(r) for _, rs in GROUPS for r in rs]
    assert len(P.pack(GROUPS, 10**9, ranks[2])[0].tokens) == sum(
        len(p) + sum(map(len, rs)) for p, rs in GROUPS), "a prompt is there once"


def test_temperature_divides_the_logits(model, ranks):
    policy = P.load(model[1], ranks[2], torch.float32)
    batch, = P.pack([([5], [[7]])], 100, ranks[2])
    logits = model[0](torch.tensor([[5]])).logits[0, 0]
    for t in (0.5, 1.0, 2.0):
        assert abs(policy(batch, t).item() - (logits / t).log_softmax(-1)[7].item()) < 1e-5


def test_saved_models_open_in_transformers(model, ranks, tmp_path):
    plain, folder = model
    policy = P.load(folder, ranks[2], torch.float32)
    P.save_model(policy, folder, tmp_path / "out", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in index) == (not plain.config.tie_word_embeddings), (
        "a stray head would make vLLM untie the model")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_bf16_policy_keeps_fp32_weights(model, ranks):
    """A step smaller than bf16 can hold must not be lost."""
    policy = P.load(model[1], ranks[2], torch.bfloat16)
    before = policy.lm.model.norm.weight.full_tensor().clone()
    optim = P.adamw(policy, 1e-5, (0.9, 0.95), 0)
    batch, = P.pack(GROUPS, 10**9, ranks[2])
    policy(batch).sum().backward()
    P.optimizer_step(policy, optim, 1e-5, 1.0)
    after = policy.lm.model.norm.weight.full_tensor()
    assert after.dtype == torch.float32 and 0 < (after - before).abs().max() < 1e-4
    assert torch.equal(after.bfloat16(), before.bfloat16()), "the step was meant to be invisible in bf16"


def test_a_state_restores_weights_and_optimizer(model, ranks, tmp_path):
    def step(policy, optim):
        policy(P.pack(GROUPS, 10**9, ranks[2])[0]).mean().neg().backward()
        return P.optimizer_step(policy, optim, 1e-2, 1.0)

    one = P.load(model[1], ranks[2], torch.float32)
    optim = P.adamw(one, 1e-2, (0.9, 0.95), 0.1)
    state = R.Checkpoints(one, optim, tmp_path / "state", keep=2)
    for n in range(3):
        step(one, optim)
        state.save(n + 1)
    assert state.settle()
    assert [p.name for p in R.whole_states(tmp_path / "state")] == ["step_000002", "step_000003"]
    (tmp_path / "state/step_000009.tmp").mkdir()                   # a write that was cut short
    two = P.load(model[1], ranks[2], torch.float32)
    optim2 = P.adamw(two, 1e-2, (0.9, 0.95), 0.1)
    assert R.Checkpoints(two, optim2, tmp_path / "state").load() == 3
    assert [step(one, optim) for _ in range(2)] == [step(two, optim2) for _ in range(2)]
    for (name, a), b in zip(one.weights(), (w for _, w in two.weights())):
        assert torch.equal(a[1], b) if isinstance(a, tuple) else torch.equal(a, b), name


def test_a_state_is_written_in_the_background_as_it_was(model, ranks, tmp_path, monkeypatch):
    """The writer is held up until training has gone on: no name yet, and the weights of the moment of
    saving."""
    policy, moved, write = P.load(model[1], ranks[2], torch.float32), threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *a, **kw: (moved.wait(20), write(*a, **kw)))
    state = R.Checkpoints(policy, P.adamw(policy, 1e-2, (0.9, 0.95), 0.1), tmp_path / "state")
    before = [w.clone() for _, w in policy.weights()]
    state.save(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1)
    state.after(2, every=0)
    assert not R.whole_states(tmp_path / "state")
    moved.set()
    assert state.settle() and state.load() == 1
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, policy.weights()))


def test_a_checkpoint_that_would_run_something_is_refused(model, ranks, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "written"),)
    policy = P.load(model[1], ranks[2], torch.float32)
    state = R.Checkpoints(policy, P.adamw(policy, 1e-2, (0.9, 0.95), 0.1), tmp_path / "state")
    state.save(1)
    assert state.settle() and state.load() == 1
    (tmp_path / "state/step_000001/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SystemExit):
        state.load()
    assert "mkdir" in capsys.readouterr().err and not (tmp_path / "written").exists()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_groups_are_dealt_evenly_by_cost(world):
    """All is dealt once, and no rank has more than the costliest group above the one that has least."""
    random = np.random.default_rng(0)
    groups = [([0] * int(random.integers(1, 900)), [[0] * int(n) for n in random.integers(1, 500, 7)])
              for _ in range(40)]
    hands = P.deal(groups, world, 64)
    assert sorted(i for hand in hands for i in hand) == list(range(40)) and len(hands) == world
    def cost(i):                                       # tokens, and pairs of query and key by the definition
        prompt, responses = groups[i]
        pairs = sum(range(len(prompt))) + sum(len(prompt) + n for r in responses for n in range(len(r)))
        return len(prompt) + sum(map(len, responses)) + pairs / (6 * 64)
    loads = [sum(cost(i) for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= 1.01 * max(cost(i) for i in range(40))
    assert P.deal([], 3, 64) == [[], [], []]


def test_a_gradient_that_is_not_finite_changes_nothing(model, ranks):
    policy = P.load(model[1], ranks[2], torch.float32)
    optim = P.adamw(policy, 1e-2, (0.9, 0.95), 0.1)
    before = [w.clone() for _, w in policy.weights()]
    (policy(P.pack(GROUPS, 10**9, ranks[2])[0]).sum() * float("nan")).backward()
    assert P.optimizer_step(policy, optim, 1e-2, 1.0) != 0
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, policy.weights()))


def test_random_weights_depend_on_the_seed_and_on_nothing_else(model, ranks):
    weights = lambda seed: [
        w for _, w in P.load(model[1] / "config.json", ranks[2], torch.float32, seed).weights()]
    one, two, three = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and not torch.equal(one[0], three[0])
    assert abs(one[0].std() - 0.1) < 0.01


def test_schedules():
    s = lambda kind, step, warmup=0: P.schedule(step, 100, kind, warmup)
    assert [s("constant", i) for i in (0, 50, 99)] == [1, 1, 1]
    assert s("linear", 0) == 1 and s("linear", 50) == 0.5
    assert s("cosine", 0) == 1 and abs(s("cosine", 50) - 0.55) < 1e-9 and 0.1 <= s("cosine", 99) < 0.11
    assert [s("cosine", i, 4) for i in range(4)] == [0.25, 0.5, 0.75, 1]


def test_every_epoch_draws_every_row_once_and_any_step_can_be_asked_for():
    steps = [R.draw(10, 3, step, 7) for step in range(6)]
    assert (sorted(i for s in steps[:3] for i in s) != sorted(i for s in steps[3:] for i in s)
            or steps[:3] != steps[3:])
    for epoch in (steps[:3], steps[3:]):
        drawn = [i for s in epoch for i in s]
        assert len(set(drawn)) == 9 and set(drawn) < set(range(10))
    assert R.draw(10, 3, 4, 7) == steps[4] and R.draw(10, 3, 4, 8) != steps[4]


@pytest.mark.parametrize("break_it, complaint", [
    (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors weights"),
    (lambda f: (f / "config.json").unlink(), "expected a model folder with a config.json"),
])
def test_a_folder_that_is_no_model_is_refused(model, break_it, complaint, capsys):
    break_it(model[1])
    with pytest.raises(SystemExit) as stop:
        P.resolve(model[1])
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_a_tensor_that_is_missing_is_named(ranks, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    save_qwen2(tmp_path / "m", False)
    weights = load_file(tmp_path / "m/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        P.load(tmp_path / "m", ranks[2], torch.float32)
    assert "lack 1 tensors, the first is model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def qwen(hidden, layers, heads, keys, inner):
    return Qwen2Config(vocab_size=152064, hidden_size=hidden, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=keys, intermediate_size=inner,
                       tie_word_embeddings=False)


SEVEN, THIRTY_TWO = qwen(3584, 28, 28, 4, 18944), qwen(5120, 64, 40, 8, 27648)
CARD = 80 * 10**9


def test_memory_is_estimated_from_the_config(capsys):
    """7.62 billion parameters: 16 bytes of each over 8 ranks are 14.2 GB, a reference in bf16 1.8; 4 + 8
    bytes beside vLLM's half of the card while it samples."""
    P.memory(SEVEN, torch.bfloat16, 16384, True, 8, CARD, True, False, 0.5, window=12288)
    learn, sample = capsys.readouterr().out.splitlines()
    assert "weights, gradients and Adam 14" in learn and "reference 1.8" in learn
    assert "vLLM 37" in sample and "weights and Adam 11" in sample
    half, = P.memory(SEVEN, torch.bfloat16, 8192, True, 8)
    whole, = P.memory(SEVEN, torch.bfloat16, 16384, True, 8)
    kept, = P.memory(SEVEN, torch.bfloat16, 8192, False, 8)
    assert half < whole < kept


@pytest.mark.parametrize("config, shard, tp, share, complaint", [
    (THIRTY_TWO, 8, 4, 0.5, "learning would take more than the card's 74.5 GB: lower --micro-tokens 16384, "
                            "give --offload, or use more than 8 ranks"),
    (SEVEN, 8, 1, 0.9, "sampling would take more than the card's 74.5 GB: lower --engine-memory 0.9"),
    (THIRTY_TWO, 32, 1, 0.5, "vLLM needs about 66 GB, more than --engine-memory 0.5 of the card: raise it, "
                             "or spread an engine over more ranks than --tp 1"),
    (THIRTY_TWO, 32, 4, 0.5, None), (SEVEN, 8, 1, 0.5, None)])
def test_what_cannot_fit_is_refused_by_the_flag_to_change(config, shard, tp, share, complaint, capsys):
    """The published runs fit: 7B on 8 cards, 32B on 32 with four ranks an engine."""
    ask = lambda: P.memory(config, torch.bfloat16, 16384, True, shard, CARD, True, False, share, tp, 12288)
    if complaint is None:
        assert ask()
        return
    with pytest.raises(SystemExit):
        ask()
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 7, 2**26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_in_slices(size, dtype, monkeypatch):
    """Values and gradients are those of one log_softmax in float64, up to the rounding of the inputs' type,
    for any size of a slice."""
    monkeypatch.setattr(P, "LOGITS", size * 300)
    g = torch.Generator().manual_seed(0)
    hidden, head, grad = (torch.randn(*shape, generator=g) for shape in ((41, 64), (300, 64), (41,)))
    targets = torch.randint(300, (41,), generator=g)
    ours = [x.to(dtype).requires_grad_() for x in (hidden, head)]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    logp = P.TokenLogProbs.apply(*ours, targets, 0.7)
    logp.backward(grad)
    expected = (theirs[0] @ theirs[1].T / 0.7).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    expected.backward(grad.double())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert logp.dtype == torch.float32
    for a, b in ((logp, expected), *((x.grad, y.grad) for x, y in zip(ours, theirs))):
        assert (a.double() - b).norm() <= bound * b.norm()
