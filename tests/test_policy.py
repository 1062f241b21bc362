"""The network under training: packing, loading, sharding, checkpoints."""

import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ROOT, save_qwen2
from conftest import run as run_script
from lib import checkpoint, model_files, packing, run
from lib import dist as R
from lib import policy as P
from lib.files import Failure

# Three prompts with one to four responses, lengths from 1 up: shared prompts, single
# responses and edge lengths.
torch.manual_seed(3)
ids = lambda n: torch.randint(3, 300, (n,)).tolist()
GROUPS = [
    (ids(17), [ids(5), ids(1), ids(30), ids(2)]),
    (ids(1), [ids(8)]),
    (ids(40), [ids(12), ids(12)]),
]


def plain_logprobs(model, groups):
    """The same log-probs by transformers alone, one sequence at a time."""
    return torch.cat(
        [P.own_logprobs(model, p, r, model.device) for p, responses in groups for r in responses]
    )


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path):
    return save_qwen2(tmp_path / "m", request.param), tmp_path / "m"


def grads(policy):
    return {n: p.grad.full_tensor().clone() for n, p in policy.lm.named_parameters()}


def dense(q, k, v, spans, scaling, window):
    """Attention by its definition, in fp32: every query of a span with the keys that it may see."""
    out = torch.zeros(q.shape)
    for start, n, keys in spans:
        for i in range(n):
            at = len(keys) - n + i  # the query's own place among the keys
            seen = keys[max(0, at + 1 - window) if window else 0 : at + 1]
            for h in range(q.shape[1]):
                g = h * k.shape[1] // q.shape[1]
                scores = (k[seen, g].float() @ q[start + i, h].float()) * scaling
                out[start + i, h] = scores.softmax(0) @ v[seen, g].float()
    return out


def documented(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch says that varlen_attn does, by the definition; it has no kernel for a CPU."""
    left, right = window_size
    assert enable_gqa and right == 0 and max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    spans = [
        (a, b - a, list(range(c, d)))
        for a, b, c, d in zip(
            *(x[y].tolist() for x in (cu_q, cu_k) for y in (slice(None, -1), slice(1, None)))
        )
    ]
    return dense(q, k, v, spans, scale, left + 1 if left >= 0 else None)


@pytest.mark.check("attention kernels against a dense mask")
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize(
    "groups",
    [GROUPS, [(p, rs[:1]) for p, rs in GROUPS], [([3], [[4]])]],
    ids=["shared prompts", "one answer each", "two tokens"],
)
@pytest.mark.parametrize(
    "kernel, dtype, bound", [("bucketed", torch.float32, 1e-5), ("varlen", torch.bfloat16, 2e-2)]
)
def test_attention_kernels(
    kernel, dtype, bound, groups, window, ranks, monkeypatch, record_property
):
    """Both forms of a plan, with windows smaller and larger than the rows, two query heads a key head."""
    device = ranks[2]
    if not R.CUDA:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    (batch,) = packing.pack(groups, 10**9, device)
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(batch.tokens), heads, 32, generator=g).to(dtype) for heads in (4, 2, 2)
    )
    out = getattr(packing, kernel)(*(x.to(device) for x in (q, k, v)), batch.plan, 0.2, window)
    gap = (out.cpu().float() - dense(q, k, v, batch.plan.spans, 0.2, window)).abs().max().item()
    record_property("largest difference", gap)
    assert gap < bound and out.shape == q.shape
    assert (batch.plan.lengths[0] is None) == all(len(rs) == 1 for _, rs in groups), (
        "keys copied for nothing"
    )


@pytest.mark.check("attention kernels against a dense mask")
def test_a_kernel_that_aligns_otherwise_is_noticed_at_the_start(
    ranks, monkeypatch, record_property, capsys
):
    """As documented it passes; with its mask aligned to the first key, or without its window, it does not."""
    if not R.CUDA:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    record_property("kernel against SDPA, bf16", packing.check_kernel(8, 2, 64, ranks[2]))
    right = torch.nn.attention.varlen.varlen_attn

    def top_left(q, k, v, cu_q, cu_k, *lengths, window_size, **kw):
        starts = [range(a, a + n) for a, n in zip(cu_k[:-1].tolist(), cu_q.diff().tolist())]
        rows = torch.tensor([i for r in starts for i in r], device=k.device)
        return right(
            q, k[rows], v[rows], cu_q, cu_q, lengths[0], lengths[0], window_size=window_size, **kw
        )

    for wrong in (top_left, lambda *a, window_size, **kw: right(*a, window_size=(-1, 0), **kw)):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong)
        with pytest.raises(Failure) as stop:
            packing.check_kernel(8, 2, 64, ranks[2])
        assert "its attention kernel for CUDA differs" in str(stop.value)


@pytest.mark.check("log-probs and gradients against transformers")
@pytest.mark.parametrize("budget", [1, 40, 64, 10**9])
def test_packed_rows_equal_separate_sequences(model, ranks, budget, record_property):
    """Any budget, any lengths: log-probs and gradients are those of transformers on one sequence at
    a time, with weights that went through the sharded loader (so its rotary tables and tied head
    are right as well)."""
    plain, folder = model[0].to(ranks[2]), model[1]
    policy = P.load_policy(folder, ranks[2], torch.float32)
    weight = torch.rand(sum(len(r) for _, rs in GROUPS for r in rs), device=ranks[2])
    expected = plain_logprobs(plain, GROUPS)
    (expected * weight).sum().backward()
    batches, got, at = packing.pack(GROUPS, budget, ranks[2]), [], 0
    for m in batches:
        logp = policy(m)
        (logp * weight[at : at + len(logp)]).sum().backward()
        got.append(logp.detach())
        at += len(logp)
    gap = (torch.cat(got) - expected).abs().max().item()
    record_property("largest difference", gap)
    assert gap < 1e-5
    mine, theirs = grads(policy), dict(plain.named_parameters())
    for name, g in mine.items():
        assert (g - theirs[name].grad).norm() <= 1e-5 * theirs[name].grad.norm() + 1e-7, name


def test_packing_keeps_the_budget_and_the_order(ranks):
    for budget in (30, 50, 64, 200):
        batches = packing.pack(GROUPS, budget, ranks[2])
        longest = max(len(p) + len(r) for p, rs in GROUPS for r in rs)
        assert all(len(m.tokens) <= max(budget, longest) for m in batches)
        assert torch.cat([m.targets for m in batches]).tolist() == [
            t for _, rs in GROUPS for r in rs for t in r
        ]
        rows = torch.cat([m.rows for m in batches])
        assert rows.bincount().tolist() == [len(r) for _, rs in GROUPS for r in rs]
    assert len(packing.pack(GROUPS, 10**9, ranks[2])[0].tokens) == sum(
        len(p) + sum(map(len, rs)) for p, rs in GROUPS
    ), "a prompt is there once"


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dummy_has_an_empty_loss_and_zero_gradients(dtype, cap, model, ranks):
    """Every parameter has a gradient, as in FSDP's collectives it must, and each is zero."""
    policy = P.load_policy(model[1], ranks[2], dtype)
    policy.cap = cap
    dummy = packing.dummy_batch(ranks[2])
    logp = policy(dummy)
    assert logp.shape == dummy.targets.shape == (0,) and len(dummy.tokens) == 1
    assert logp.sum().item() == 0
    logp.sum().backward()
    assert all((p.grad.full_tensor() == 0).all() for p in policy.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_does_not_depend_on_dummies(dtype, model, ranks):
    """Bit for bit, wherever among the micro-batches they come; also where there are only dummies."""

    def step(batches):
        policy = P.load_policy(model[1], ranks[2], dtype)
        optim = P.adamw(policy, 1e-2, (0.9, 0.95), 0.1)
        for batch in batches:
            policy(batch).sum().backward()
        norm = P.optimizer_step(policy, optim, 1e-2, 1.0)
        return norm, [w for _, w in policy.weights()]

    batches, dummy = packing.pack(GROUPS, 64, ranks[2]), packing.dummy_batch(ranks[2])
    norm, weights = step(batches)
    for others in (
        batches + [dummy, dummy],
        [dummy] + batches,
        batches[:1] + [dummy] + batches[1:],
    ):
        other_norm, other_weights = step(others)
        assert other_norm == norm > 0
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    assert step([dummy])[0] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummies_fill_up_a_rank_of_two(dtype, tmp_path):
    """One of two ranks has dummies only, beside another that has all the work: the same losses, gradient norm
    and weights as on one rank."""
    save_qwen2(tmp_path / "m", True)
    one, two = (dummies_on(ranks, tmp_path / "m", dtype) for ranks in (1, 2))
    assert one["micro-batches"] == [2] and two["micro-batches"] == [2, 2]
    bound = 1e-5 if dtype == "float32" else 2e-2
    for key in ("loss", "norm", "moved"):
        assert two[key] == pytest.approx(one[key], rel=bound), key


def dummies_on(ranks, model, dtype):
    """What the script DUMMIES prints on so many ranks."""
    script = model.parent / "dummies.py"
    script.write_text(DUMMIES)
    return json.loads(run_script(script, model, dtype, ranks=ranks).stdout.splitlines()[-1])


DUMMIES = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_policy import GROUPS
from lib import dist, packing
from lib import policy as P

rank, world, device = dist.start_ranks()
policy = P.load_policy(sys.argv[1], device, P.DTYPES[sys.argv[2]])
optim = P.adamw(policy, 1e-2, (0.9, 0.95), 0.1)
before = [w.clone() for _, w in policy.weights()]
batches = packing.pack(GROUPS, 64, device) if rank == 0 else []
batches = packing.equalise(batches, packing.dummy_batch(device))
total = 0.0
for batch in batches:
    loss = -policy(batch).sum() / 100
    (loss * world).backward()
    total += loss.item()
norm = P.optimizer_step(policy, optim, 1e-2, 1.0)
moved = sum((a - b).abs().sum().item() for a, (_, b) in zip(before, policy.weights()))
counts = dist.all_gather(len(batches))
loss = dist.all_sum([total])[0]
if rank == 0:
    print(json.dumps({{"loss": loss, "norm": norm, "moved": moved, "micro-batches": counts}}))
dist.barrier()
"""


def test_temperature_divides_the_logits(model, ranks):
    policy = P.load_policy(model[1], ranks[2], torch.float32)
    (batch,) = packing.pack([([5], [[7]])], 100, ranks[2])
    logits = model[0](torch.tensor([[5]])).logits[0, 0]
    for t in (0.5, 1.0, 2.0):
        assert abs(policy(batch, t).item() - (logits / t).log_softmax(-1)[7].item()) < 1e-5


def test_saved_models_open_in_transformers(model, ranks, tmp_path):
    plain, folder = model
    policy = P.load_policy(folder, ranks[2], torch.float32)
    P.save_model(policy, folder, tmp_path / "out", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in index) == (not plain.config.tie_word_embeddings), (
        "a stray head would make vLLM untie the model"
    )
    assert not list(tmp_path.glob("*.tmp"))
    assert all(
        f.stat().st_mode & 0o044 == 0o044 for f in (tmp_path / "out").glob("*.safetensors")
    ), "others serve it"


def test_a_model_is_on_the_disk_before_it_has_its_name(model, ranks, tmp_path, monkeypatch):
    """Every file, and the folder's names; afterwards the name itself."""
    out, synced = tmp_path / "out", []
    monkeypatch.setattr(
        P, "force_to_disk", lambda path: synced.append((path.relative_to(tmp_path), out.exists()))
    )
    policy = P.load_policy(model[1], ranks[2], torch.float32)
    P.save_model(policy, model[1], out, torch.float32, {"protocol": "instruct"})
    tmp = Path("out.tmp")
    files = {tmp / path.name for path in out.iterdir()}
    assert {path for path, named in synced if not named} == files | {tmp}
    assert synced[-1] == (Path("."), True)
    assert {"config.json", "judge.json"} <= {path.name for path in files}


def test_fp32_goes_through_sdpa_on_a_card_too(ranks, monkeypatch):
    """Its kernel has half precision only: the type of the queries decides, so that one batch serves both."""
    monkeypatch.setattr(R, "CUDA", True)
    (batch,) = packing.pack(GROUPS, 10**9, torch.device("cpu"))
    seen = []
    for name in ("varlen", "bucketed"):
        monkeypatch.setattr(
            packing, name, lambda q, *_, name=name: seen.append((name, q.dtype)) or q
        )
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 2, len(batch.tokens), 8, dtype=dtype)
        packing.packed_attention(None, x, x, x, None, plan=batch.plan)
    assert seen == [("bucketed", torch.float32), ("varlen", torch.bfloat16)]


def test_an_optimizer_moves_without_its_counters():
    """Elsewhere AdamW would ask the device for every one of them at every step."""
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}
    P.move_state(type("Optimizer", (), {"state": state})(), torch.device("meta"))
    assert state[0]["exp_avg"].is_meta and not state[0]["step"].is_meta


def test_a_tied_pair_is_one_parameter(model, ranks):
    """Also for FSDP, which would else give the head a gradient and shards of its own."""
    policy = P.load_policy(model[1], ranks[2], torch.float32)
    tied = model[0].config.tie_word_embeddings
    assert (policy.lm.lm_head.weight is policy.lm.model.embed_tokens.weight) == tied
    assert len(list(policy.parameters())) == len(list(model[0].parameters()))


def test_a_bf16_policy_keeps_fp32_weights(model, ranks):
    """A step smaller than bf16 can hold must not be lost."""
    policy = P.load_policy(model[1], ranks[2], torch.bfloat16)
    before = policy.lm.model.norm.weight.full_tensor().clone()
    optim = P.adamw(policy, 1e-5, (0.9, 0.95), 0)
    (batch,) = packing.pack(GROUPS, 10**9, ranks[2])
    policy(batch).sum().backward()
    P.optimizer_step(policy, optim, 1e-5, 1.0)
    after = policy.lm.model.norm.weight.full_tensor()
    assert after.dtype == torch.float32 and 0 < (after - before).abs().max() < 1e-4
    assert torch.equal(after.bfloat16(), before.bfloat16()), (
        "the step was meant to be invisible in bf16"
    )


def test_a_state_restores_weights_and_optimizer(model, ranks, tmp_path):
    def step(policy, optim):
        policy(packing.pack(GROUPS, 10**9, ranks[2])[0]).mean().neg().backward()
        return P.optimizer_step(policy, optim, 1e-2, 1.0)

    one = P.load_policy(model[1], ranks[2], torch.float32)
    optim = P.adamw(one, 1e-2, (0.9, 0.95), 0.1)
    state = checkpoint.Checkpoints(one, optim, tmp_path / "state", keep=2)
    for n in range(3):
        step(one, optim)
        state.save(n + 1)
    assert state.settle()
    assert [p.name for p in checkpoint.finished_checkpoints(tmp_path / "state")] == [
        "step_000002",
        "step_000003",
    ]
    (tmp_path / "state/step_000009.tmp").mkdir()  # a write that was cut short
    two = P.load_policy(model[1], ranks[2], torch.float32)
    optim2 = P.adamw(two, 1e-2, (0.9, 0.95), 0.1)
    assert checkpoint.Checkpoints(two, optim2, tmp_path / "state").load() == 3
    assert [step(one, optim) for _ in range(2)] == [step(two, optim2) for _ in range(2)]
    for (name, a), b in zip(one.weights(), (w for _, w in two.weights())):
        assert torch.equal(a[1], b) if isinstance(a, tuple) else torch.equal(a, b), name


def test_a_state_is_written_in_the_background_as_it_was(model, ranks, tmp_path, monkeypatch):
    """The writer is held up until training has gone on: no name yet, and the weights of the moment of
    saving."""
    policy, moved, write = (
        P.load_policy(model[1], ranks[2], torch.float32),
        threading.Event(),
        torch.save,
    )
    monkeypatch.setattr(torch, "save", lambda *a, **kw: (moved.wait(20), write(*a, **kw)))
    state = checkpoint.Checkpoints(
        policy, P.adamw(policy, 1e-2, (0.9, 0.95), 0.1), tmp_path / "state"
    )
    before = [w.clone() for _, w in policy.weights()]
    state.save(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1)
    assert state.settle(wait=False)
    assert not checkpoint.finished_checkpoints(tmp_path / "state")
    moved.set()
    assert state.settle() and state.load() == 1
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, policy.weights()))


def test_a_checkpoint_that_would_run_something_is_refused(model, ranks, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "written"),)

    policy = P.load_policy(model[1], ranks[2], torch.float32)
    state = checkpoint.Checkpoints(
        policy, P.adamw(policy, 1e-2, (0.9, 0.95), 0.1), tmp_path / "state"
    )
    state.save(1)
    assert state.settle() and state.load() == 1
    (tmp_path / "state/step_000001/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Failure) as stop:
        state.load()
    assert "mkdir" in str(stop.value) and not (tmp_path / "written").exists()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_groups_are_dealt_evenly_by_cost(world):
    """All is dealt once, and no rank has more than the costliest group above the one that has least."""
    random = np.random.default_rng(0)
    groups = [
        ([0] * int(random.integers(1, 900)), [[0] * int(n) for n in random.integers(1, 500, 7)])
        for _ in range(40)
    ]
    hands = packing.balance(groups, world, 64)
    assert sorted(i for hand in hands for i in hand) == list(range(40)) and len(hands) == world

    def cost(i):  # tokens, and pairs of query and key by the definition
        prompt, responses = groups[i]
        pairs = sum(range(len(prompt))) + sum(
            len(prompt) + n for r in responses for n in range(len(r))
        )
        return len(prompt) + sum(map(len, responses)) + pairs / (6 * 64)

    loads = [sum(cost(i) for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= 1.01 * max(cost(i) for i in range(40))
    assert packing.balance([], 3, 64) == [[], [], []]


def test_a_gradient_that_is_not_finite_changes_nothing(model, ranks):
    policy = P.load_policy(model[1], ranks[2], torch.float32)
    optim = P.adamw(policy, 1e-2, (0.9, 0.95), 0.1)
    before = [w.clone() for _, w in policy.weights()]
    (policy(packing.pack(GROUPS, 10**9, ranks[2])[0]).sum() * float("nan")).backward()
    assert P.optimizer_step(policy, optim, 1e-2, 1.0) != 0
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, policy.weights()))


def test_random_weights_depend_on_the_seed_and_on_nothing_else(model, ranks):
    weights = lambda seed: [
        w
        for _, w in P.load_policy(model[1] / "config.json", ranks[2], torch.float32, seed).weights()
    ]
    one, two, three = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and not torch.equal(one[0], three[0])
    assert abs(one[0].std() - 0.1) < 0.01


def test_schedules():
    s = lambda kind, step, warmup=0: P.lr_schedule(step, 100, kind, warmup)
    assert [s("constant", i) for i in (0, 50, 99)] == [1, 1, 1]
    assert s("linear", 0) == 1 and s("linear", 50) == 0.5
    assert (
        s("cosine", 0) == 1 and abs(s("cosine", 50) - 0.55) < 1e-9 and 0.1 <= s("cosine", 99) < 0.11
    )
    assert [s("cosine", i, 4) for i in range(4)] == [0.25, 0.5, 0.75, 1]


def test_every_epoch_draws_every_row_once_and_any_step_can_be_asked_for():
    steps = [run.draw_batch(10, 3, step, 7) for step in range(6)]
    assert (
        sorted(i for s in steps[:3] for i in s) != sorted(i for s in steps[3:] for i in s)
        or steps[:3] != steps[3:]
    )
    for epoch in (steps[:3], steps[3:]):
        drawn = [i for s in epoch for i in s]
        assert len(set(drawn)) == 9 and set(drawn) < set(range(10))
    assert run.draw_batch(10, 3, 4, 7) == steps[4] and run.draw_batch(10, 3, 4, 8) != steps[4]


@pytest.mark.parametrize(
    "break_it, complaint",
    [
        (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors weights"),
        (lambda f: (f / "config.json").unlink(), "expected a model folder with a config.json"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(model, break_it, complaint, capsys):
    break_it(model[1])
    with pytest.raises(Failure) as stop:
        model_files.find_model(model[1])
    assert complaint in str(stop.value)


def test_a_tensor_that_is_missing_is_named(ranks, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    save_qwen2(tmp_path / "m", False)
    weights = load_file(tmp_path / "m/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failure) as stop:
        P.load_policy(tmp_path / "m", ranks[2], torch.float32)
    assert "lack 1 tensors, the first is model.layers.1.mlp.up_proj.weight" in str(stop.value)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("size", [1, 7, 2**26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_in_slices(size, dtype, cap, ranks, monkeypatch):
    """Values and gradients are those of one log_softmax in float64, up to the rounding of the inputs' type,
    for any size of a slice, with a soft cap and without."""
    monkeypatch.setattr(P, "LOGITS", size * 300)
    g = torch.Generator().manual_seed(0)
    hidden, head, grad = (
        torch.randn(*shape, generator=g).to(ranks[2]) for shape in ((41, 64), (300, 64), (41,))
    )
    targets = torch.randint(300, (41,), generator=g).to(ranks[2])
    ours = [x.to(dtype).requires_grad_() for x in (hidden, head)]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    logp = P.TokenLogProbs.apply(*ours, targets, 0.7, cap)
    logp.backward(grad)
    logits = theirs[0] @ theirs[1].T
    if cap:
        logits = cap * torch.tanh(logits / cap)
    expected = (logits / 0.7).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    expected.backward(grad.double())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert logp.dtype == torch.float32
    for a, b in ((logp, expected), *((x.grad, y.grad) for x, y in zip(ours, theirs))):
        assert (a.double() - b).norm() <= bound * b.norm()
