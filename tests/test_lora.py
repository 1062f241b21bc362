"""LoRA: the paper's product, against PEFT; what learns is what samples; files, runs that go on, refusals."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_policy import GROUPS, plain_logprobs
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from conftest import ROOT, call, metrics, run, save_qwen2
from lib import lora, model_files, packing
from lib import policy as P
from lib.files import Failure

CPU = torch.device("cpu")
RUN = {"judge": {"protocol": "instruct"}}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path):
    """A small Qwen2, and its folder."""
    return save_qwen2(tmp_path / "m", request.param), tmp_path / "m"


def pack_all(budget=10**9):
    return packing.pack(GROUPS, budget, CPU)


@torch.no_grad()
def set_adapters(policy, std=0.05, seed=7):
    """Random B, so that the adapters change something."""
    noise = torch.Generator().manual_seed(seed)
    for layer in lora.adapted_layers(policy).values():
        values = std * torch.randn(layer.lora_B.shape, generator=noise)
        layer.lora_B.copy_(P.shard_like(values, layer.lora_B))
    return policy


def load(folder, dtype=torch.float32, rank=5, **settings):
    return P.load_policy(folder, CPU, dtype, lora=rank, **settings)


def save_adapter(policy, base, out):
    weights = model_files.fingerprint(base, model_files.find_model(base, adapter=True))
    P.save_adapter(policy, base, RUN | {"weights": weights}, out)
    return out


def adapter_grads(policy):
    return {n: p.grad.full_tensor() for n, p in policy.lm.named_parameters() if p.requires_grad}


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- the product


def test_log_probs_and_gradients_are_pefts(model, ranks, tmp_path):
    """The same rows, adapter and base, fp32; PEFT adds two paths, and opens the adapter that we write."""
    peft = pytest.importorskip("peft")
    plain, folder = model
    policy = set_adapters(load(folder))
    out = save_adapter(policy, folder, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(plain, out, is_trainable=True)
    expected = plain_logprobs(theirs, GROUPS)
    (batch,) = pack_all()
    logp = policy(batch)
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), theirs.disable_adapter():
        base = plain_logprobs(theirs, GROUPS)
    assert (expected - base).abs().max() > 0.1, "the adapter was meant to change something"

    weight = torch.randn(len(expected))
    (expected * weight).sum().backward()
    (logp * weight).sum().backward()
    named = dict(theirs.named_parameters())
    for name, grad in adapter_grads(policy).items():
        layer, letter = name.rsplit(".", 1)
        other = named[f"base_model.model.{layer}.{letter}.default.weight"].grad
        assert distance(grad, other) < 1e-5, name


@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_are_those_of_two_paths(has_bias):
    noise = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=noise)
    weight, bias = draw(48, 32), draw(48) if has_bias else None
    ours = [t.requires_grad_() for t in (draw(1, 17, 32), draw(4, 32), draw(48, 4))]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    x, a, b = theirs
    expected = F.linear(x, weight, bias) + 8 * (x @ a.T) @ b.T
    out = lora.MergedLinear.apply(ours[0], weight, bias, ours[1], ours[2], 8.0)
    grad = draw(1, 17, 48)
    expected.backward(grad)
    out.backward(grad)
    assert distance(out, expected) < 6e-6
    for mine, other in zip(ours, theirs):
        assert distance(mine.grad, other.grad) < 6e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_begins_with_the_network_as_it_was(dtype, model, ranks):
    """To the last bit; A is within 1 / sqrt(in), is not the same everywhere, and depends on the seed only."""
    policy = load(model[1], dtype)
    frozen = P.load_policy(model[1], CPU, dtype, trainable=False)
    (batch,) = pack_all()
    assert torch.equal(policy(batch), frozen(batch))
    layers = lora.adapted_layers(policy.lm)
    assert len(layers) == 21
    drawn = {name: layer.lora_A.full_tensor() for name, layer in layers.items()}
    for name, layer in layers.items():
        bound = layer.in_features**-0.5
        assert layer.lora_A.dtype == torch.float32
        assert 0.8 * bound < drawn[name].abs().max() <= bound
        assert not layer.lora_B.full_tensor().any()
    assert len({values[0, 0].item() for values in drawn.values()}) == 21
    for seed, same in ((0, True), (1, False)):
        again = lora.adapted_layers(load(model[1], dtype, seed=seed).lm)
        assert all(torch.equal(again[n].lora_A.full_tensor(), a) == same for n, a in drawn.items())


def test_adapters_off_is_the_network_that_the_run_started_from(model, ranks):
    """The reference: the same network, and no second one. Afterwards the adapters are on again."""
    policy = set_adapters(load(model[1], torch.bfloat16))
    frozen = P.load_policy(model[1], CPU, torch.bfloat16, trainable=False)
    (batch,) = pack_all()
    on = policy(batch)
    assert torch.equal(lora.without_adapters(policy, batch), frozen(batch))
    assert torch.equal(policy(batch), on) and not torch.equal(on, frozen(batch))
    with pytest.raises(ZeroDivisionError), lora.adapters_off(policy):
        1 / 0
    assert torch.equal(policy(batch), on)


def test_what_learns_is_what_samples(model, ranks, tmp_path):
    """In bf16 the policy computes with the very weights that the engine gets, also where an update is smaller
    than the grid of its weights can hold. Two paths see the whole update, and part from the sampler."""
    policy = set_adapters(load(model[1], torch.bfloat16), std=1e-4)
    P.save_model(policy, model[1], tmp_path / "out", torch.bfloat16)
    sampler = P.load_policy(tmp_path / "out", CPU, torch.bfloat16, trainable=False)
    (batch,) = pack_all()
    assert torch.equal(policy(batch), sampler(batch))

    layer = lora.adapted_layers(policy.lm)["model.layers.0.mlp.up_proj"]
    update = layer.scale * layer.lora_B.full_tensor() @ layer.lora_A.full_tensor()
    merged = dict(policy.weights())["model.layers.0.mlp.up_proj.weight"]
    arrived = merged.float() - layer.weight.float()
    assert update.abs().min() > 0 and (arrived == 0).float().mean() > 0.3


def test_the_log_says_how_much_of_an_update_arrives(model, ranks):
    """The share of the entries that merging changes: 0 at the start, and small where rounding takes most away.
    In fp32 nearly all change."""
    shares = {}
    for dtype, std in [(torch.bfloat16, s) for s in (0, 1e-4, 0.05)] + [(torch.float32, 1e-4)]:
        policy = set_adapters(load(model[1], dtype), std)
        merged = dict(policy.weights())
        layers = lora.adapted_layers(policy.lm)
        differ = [merged[f"{name}.weight"] != layer.weight for name, layer in layers.items()]
        (share,) = policy.lora_changed().values()
        assert share == torch.cat([d.flatten() for d in differ]).double().mean()
        shares[dtype, std] = share
    assert shares[torch.bfloat16, 0] == 0 < shares[torch.bfloat16, 1e-4] < 0.7
    assert min(shares[torch.bfloat16, 0.05], shares[torch.float32, 1e-4]) > 0.9
    full = P.load_policy(model[1], CPU, torch.float32)
    list(full.weights())
    assert full.lora_changed() == {}


def test_the_frozen_head_has_no_gradient(ranks):
    """It would cost a third of the pass and a copy of the head."""
    hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8)
    targets = torch.arange(5)
    P.TokenLogProbs.apply(hidden, head, targets, 1.0).sum().backward()
    grad = hidden.grad.clone()
    hidden.grad = None
    head.requires_grad_()
    P.TokenLogProbs.apply(hidden, head, targets, 1.0).sum().backward()
    assert torch.equal(hidden.grad, grad) and head.grad is not None


# ---------------------------------------------------------------- steps


def test_adapters_alone_are_trained_and_kept_in_fp32(model, ranks):
    """A step smaller than bf16 can hold is not lost, and the base stays as it is to the last bit."""
    policy = load(model[1], torch.bfloat16)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optim = P.adamw(policy, 1e-5, (0.9, 0.95), 0.0)
    assert len(trained) == 42 == sum(len(group["params"]) for group in optim.param_groups)
    before = {n: p.detach().clone() for n, p in policy.lm.named_parameters()}
    policy(pack_all()[0]).sum().backward()
    assert P.optimizer_step(policy, optim, 1e-5, 1.0) > 0
    for name, parameter in policy.lm.named_parameters():
        if name.endswith("lora_B"):  # A has no gradient while B is zero
            moved = P.full_of(P.local_shard(parameter), parameter)
            assert moved.dtype == torch.float32 and 0 < moved.abs().max() < 1.1e-5
        elif not name.endswith("lora_A"):
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_does_not_depend_on_micro_batches(recompute, model, ranks):
    results = []
    for budget in (1, 64, 10**9):
        policy = set_adapters(load(model[1], recompute=recompute))
        for batch in [*pack_all(budget), packing.dummy_batch(CPU)]:
            policy(batch).sum().backward()
        results.append(adapter_grads(policy))
    for other in results[1:]:
        for name, grad in other.items():
            assert distance(grad, results[0][name]) < 1e-5, name


STEPS = f"""
import hashlib, json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from test_lora import GROUPS, load, set_adapters
from lib import dist, packing
from lib import policy as P
from lib.checkpoint import Checkpoints

folder, shard, rank_of_lora, state, steps, dtype = sys.argv[1:]
rank, world, device = dist.start_ranks()
policy = load(folder, P.DTYPES[dtype], int(rank_of_lora), shard=int(shard) or None)
set_adapters(policy)
streamed = hashlib.sha256()
for name, tensor in policy.weights(torch.bfloat16):
    streamed.update(name.encode() + tensor.clone().view(torch.int16).numpy().tobytes())
optim = P.adamw(policy, 1e-2, (0.9, 0.95), 0.1)
checkpoints = Checkpoints(policy, optim, state)
begun, losses, norms = checkpoints.load(), [], []
for step in range(begun, int(steps)):
    batches = packing.pack([GROUPS[i] for i in range(rank, len(GROUPS), world)], 64, device)
    total = 0.0
    policy.free_frozen()
    policy.restore_frozen()
    for batch in packing.equalise(batches, packing.dummy_batch(device)):
        loss = -policy(batch).sum() / 100
        (loss * world).backward()
        total += loss.item()
    norms.append(P.optimizer_step(policy, optim, 1e-2, 1.0))
    losses += dist.all_sum([total])
policy.free_frozen()
checkpoints.save(int(steps))
checkpoints.settle()
trained = [p.detach().full_tensor() for p in policy.parameters() if p.requires_grad]
whole = not hasattr(policy.lm.model.norm.weight, "placements")
if rank == 0:
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in trained)).hexdigest()
    moved = sum(t.double().abs().sum().item() for t in trained)
    print(json.dumps(dict(loss=losses, norm=norms, moved=moved, streamed=streamed.hexdigest(),
        digest=digest, whole=whole, begun=begun)))
dist.barrier()
"""


def steps_on(ranks, folder, state, shard=0, rank=5, steps=2, dtype="float32"):
    """What the script STEPS prints: some steps on so many ranks, frozen weights away between them."""
    script = Path(state).parent / "steps.py"
    script.write_text(STEPS)
    done = run(script, folder, shard, rank, state, steps, dtype, ranks=ranks)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_does_not_depend_on_ranks(tmp_path):
    """Nor on where the base lies: spread over two ranks, or whole on each. Merged weights are the same to the
    bit, losses and updates up to the order of sums. Of rank 1 the second of two ranks has no row of A."""
    save_qwen2(tmp_path / "m", True)
    one = steps_on(1, tmp_path / "m", tmp_path / "one", rank=1)
    spread = steps_on(2, tmp_path / "m", tmp_path / "spread", rank=1)
    copies = steps_on(2, tmp_path / "m", tmp_path / "copies", shard=1, rank=1)
    assert one["whole"] and copies["whole"] and not spread["whole"]
    for two in (spread, copies):
        assert two["streamed"] == one["streamed"]
        for key in ("loss", "norm", "moved"):
            assert two[key] == pytest.approx(one[key], rel=2e-5), key


def test_a_run_goes_on_bit_for_bit_and_on_other_ranks(tmp_path):
    """Its checkpoint has adapters and optimizer only, also of a tied model."""
    save_qwen2(tmp_path / "m", True)
    whole = steps_on(1, tmp_path / "m", tmp_path / "whole", steps=3)
    first = steps_on(1, tmp_path / "m", tmp_path / "cut", steps=2)
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    rest = steps_on(1, tmp_path / "m", tmp_path / "cut", steps=3)
    other = steps_on(2, tmp_path / "m", tmp_path / "other", steps=3)
    assert first["begun"] == 0 and rest["begun"] == other["begun"] == 2
    assert rest["digest"] == whole["digest"] and rest["loss"] == whole["loss"][2:]
    assert other["loss"] == pytest.approx(whole["loss"][2:], rel=2e-5)
    assert other["streamed"] == whole["streamed"], "five rows of A on two ranks"

    stored = FileSystemReader(tmp_path / "whole/step_000003").read_metadata().state_dict_metadata
    weights = {name for name in stored if name.startswith("model.")}
    assert len(weights) == 42 and all("lora_" in name for name in weights)
    assert all("lora_" in name for name in stored if "exp_avg" in name)


def test_frozen_weights_wait_in_host_memory(model, ranks):
    """They leave their memory, are streamed from the copy, and come back to the last bit; copied once."""
    policy = set_adapters(load(model[1], torch.bfloat16))
    (batch,) = pack_all()
    logp = policy(batch)
    before = [(name, tensor.clone()) for name, tensor in policy.weights()]
    offload = P.Offload(True, CPU)
    copies = None
    for _ in range(2):
        offload.park(policy, None, lora.without_adapters)
        held = sum(P.local_shard(p).untyped_storage().nbytes() for p in policy.frozen())
        assert held == 0 and policy.frozen()
        for (name, tensor), (other, again) in zip(before, policy.weights(), strict=True):
            assert name == other and torch.equal(tensor, again)
        made = {id(copy) for copy, _ in policy.host_copies.values()}
        assert copies in (None, made)
        copies = made
        offload.fetch(policy)
        assert torch.equal(policy(batch), logp)
    P.Offload(False, CPU).park(policy)
    assert torch.equal(policy(batch), logp), "without --offload nothing moves"


def test_the_host_copy_is_as_large_as_what_it_copies(monkeypatch):
    """Pinned in one piece: torch's own pinned memory would round each tensor up to a power of two."""
    pinned = []

    def register(address, size, flags):
        pinned.append((address, size))
        return "success"

    cudart = SimpleNamespace(cudaHostRegister=register)
    kept = []
    monkeypatch.setattr(P, "PINNED", kept)
    monkeypatch.setattr(P.dist, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda error: None)
    shapes = [(0, 7), (1,), (96, 288), (3, 5, 7), (2**9 + 1, 2**9 + 1), (288,)]
    types = [torch.bfloat16, torch.float32]
    tensors = [torch.randn(shape).to(types[n % 2]) for n, shape in enumerate(shapes)]
    copies = P.copy_to_host(tensors)
    ((address, size),) = pinned
    wanted = sum(tensor.nbytes for tensor in tensors)
    assert wanted <= size < wanted + 512 * len(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy) and tensor.dtype == copy.dtype
        if copy.nbytes:
            assert address <= copy.data_ptr() <= address + size - copy.nbytes
    assert P.copy_to_host([]) == [] and len(pinned) == 1, "a full run has nothing to copy"
    del copies, copy
    assert [memory.data_ptr() for memory in kept] == [address], "it is never unregistered"


# ---------------------------------------------------------------- files


def test_the_merged_model_and_the_adapter_give_the_policys_log_probs(model, ranks, tmp_path):
    """OUT/model in transformers, with the names of a full run; OUT/adapter merged here again, to the bit."""
    plain, folder = model
    policy = set_adapters(load(folder))
    P.save_model(policy, folder, tmp_path / "out", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    (batch,) = pack_all()
    logp = policy(batch)
    assert (plain_logprobs(again, GROUPS) - logp).abs().max() < 1e-5
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    stored = set(plain.state_dict())
    if plain.config.tie_word_embeddings:
        stored.remove("lm_head.weight")
    assert set(index) == stored

    adapter = save_adapter(policy, folder, tmp_path / "adapter")
    assert model_files.find_model(adapter, adapter=True) == folder
    assert json.loads((adapter / "judge.json").read_text()) == RUN["judge"]
    assert not list(tmp_path.glob("*.tmp"))
    for dtype in (torch.float32, torch.bfloat16):
        trained = set_adapters(load(folder, dtype))
        P.save_model(trained, folder, tmp_path / "merged", dtype)
        one, two = (load(start, dtype) for start in (adapter, tmp_path / "merged"))
        assert torch.equal(one(batch), trained(batch)) and torch.equal(two(batch), one(batch))
        # A full run, whose weights are kept in fp32, starts from the weights that were sampled, too.
        for trainable in (True, False):
            full = P.load_policy(adapter, CPU, dtype, trainable=trainable)
            assert torch.equal(full(batch), trained(batch))


def test_no_adapter_where_its_base_is_in_no_folder(model, ranks, tmp_path, capsys):
    """Random weights, and those of another adapter merged."""
    adapter = save_adapter(set_adapters(load(model[1])), model[1], tmp_path / "adapter")
    for start in (model[1] / "config.json", adapter):
        save_adapter(load(start), start, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert f"no {tmp_path / 'out'}: its base, {start}" in capsys.readouterr().out
    P.save_adapter(P.load_policy(model[1], CPU, torch.float32), model[1], RUN, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "a full run has none"


def changed(adapter, **settings):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(use_dora=True), "it sets use_dora (True); only plain LoRA"),
        (dict(use_rslora=True), "it sets use_rslora"),
        (dict(bias="lora_only"), "it sets bias (lora_only)"),
        (dict(lora_bias=True), "it sets lora_bias"),
        (dict(modules_to_save=["lm_head"]), "it sets modules_to_save (['lm_head'])"),
        (dict(init_lora_weights="pissa"), "it sets init_lora_weights (pissa)"),
        (dict(rank_pattern={"q_proj": 4}), "it sets rank_pattern"),
        (dict(alpha_pattern={"q_proj": 4}), "it sets alpha_pattern"),
        (dict(fan_in_fan_out=True), "it sets fan_in_fan_out"),
        (dict(layer_replication=[[0, 2]]), "it sets layer_replication"),
        (dict(trainable_token_indices=[3]), "it sets trainable_token_indices"),
        (dict(use_something_new={"a": 1}), "it sets use_something_new"),
        (dict(peft_type="IA3"), "its peft_type is IA3"),
        (dict(r=0), "r is 0, which no adapter can have"),
        (dict(r="8"), "r is 8, which no adapter can have"),
        (dict(lora_alpha=None), "lora_alpha is None"),
        (dict(base_model_name_or_path=None), "base_model_name_or_path is None"),
        (dict(base_model_name_or_path="runs/gone"), "its base cannot be had: --model runs/gone"),
        (dict(r=4), "is not of the rank 4"),
    ],
)
def test_more_than_plain_lora_is_refused(settings, said, ranks, tmp_path):
    save_qwen2(tmp_path / "m", False)
    adapter = save_adapter(load(tmp_path / "m"), tmp_path / "m", tmp_path / "adapter")
    changed(adapter, **settings)
    with pytest.raises(Failure) as stop:
        load(adapter)
    assert said in str(stop.value) and str(adapter) in str(stop.value)


def renamed(adapter, **names):
    """Rename tensors of an adapter: {part of a name: another}."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "names, said",
    [
        (dict(up_proj="sideways_proj"), "it adapts model.layers.0.mlp.sideways_proj by a matrix"),
        (dict(lora_A="lora_embedding_A"), "is not one of the two matrices of a linear layer"),
        (dict(base_model="other_model"), "is not one of the two matrices of a linear layer"),
        ({"model.layers.0.mlp.up_proj": "lm_head"}, "it adapts lm_head by a matrix of 96 x 128"),
        ({"model.layers.0.mlp.up_proj": "model.embed_tokens"}, "it adapts model.embed_tokens"),
    ],
)
def test_tensors_without_a_place_are_refused(names, said, ranks, tmp_path):
    save_qwen2(tmp_path / "m", True)
    adapter = save_adapter(load(tmp_path / "m"), tmp_path / "m", tmp_path / "adapter")
    renamed(adapter, **names)
    with pytest.raises(Failure) as stop:
        load(adapter)
    assert said in str(stop.value)


def test_an_adapter_on_another_base_is_refused(ranks, tmp_path):
    """Where a run of ours wrote it: base.json has the fingerprint. A cut file is refused as well."""
    save_qwen2(tmp_path / "m", True)
    adapter = save_adapter(load(tmp_path / "m"), tmp_path / "m", tmp_path / "adapter")
    before = model_files.fingerprint(adapter, tmp_path / "m")
    save_qwen2(tmp_path / "m", True, std=0.11)
    assert model_files.fingerprint(adapter, tmp_path / "m") != before
    with pytest.raises(Failure) as stop:
        load(adapter)
    assert "was trained on other weights than those in" in str(stop.value)

    (adapter / "base.json").unlink()
    load(adapter)  # PEFT's own adapters have none
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Failure) as stop:
        load(adapter)
    assert "adapter_model.safetensors: cannot be read" in str(stop.value)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(Failure) as stop:
        load(adapter)
    assert "there is no adapter_model.safetensors beside it" in str(stop.value)


def test_an_adapter_of_peft_itself_starts_a_run(model, ranks, tmp_path):
    """Attention only, another alpha, a dropout: plain LoRA all the same."""
    peft = pytest.importorskip("peft")
    plain, folder = model
    settings = peft.LoraConfig(
        r=3, lora_alpha=24, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
    )
    theirs = peft.get_peft_model(plain, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
        expected = plain_logprobs(theirs, GROUPS)
    theirs.peft_config["default"].base_model_name_or_path = str(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    (batch,) = pack_all()
    assert (load(tmp_path / "theirs")(batch) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("script", ["eval", "rmr1"])
def test_scripts_that_do_not_train_want_the_merged_model(script, ranks, toy, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    command = () if script == "eval" else ("judge",)
    out = ("--out", tmp_path / "out") if script == "eval" else ()
    done = call(
        importlib.import_module(script),
        *command,
        *("--model", adapter, "--data", toy / "test.jsonl", *out),
        ok=False,
    )
    assert done.returncode == 2 and "give a model with the adapter merged" in done.stderr


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("script, full", [("sft", 5e-6), ("grpo", 1e-6)])
def test_the_default_rate_is_ten_times_the_full_one(script, full):
    arguments = importlib.import_module(script).arguments
    assert arguments([]).lr == full and arguments([]).lora == 0
    assert arguments(["--lora", "8"]).lr == pytest.approx(10 * full, rel=1e-12)
    assert arguments(["--lora", "8", "--lr", "3e-6"]).lr == 3e-6


SMALL = ("--dtype", "float32", "--lora", 4)


@pytest.fixture(scope="module")
def judged(toy, tmp_path_factory):
    """A model that was fitted in full, and one fitted from it with adapters."""
    out = tmp_path_factory.mktemp("lora")
    common = ("--data", toy / "sft.jsonl", "--batch", 16, "--lr", 3e-3, "--max-len", 160)
    fp32 = ("--dtype", "float32")
    run("sft.py", *common, *fp32, "--model", toy / "model/config.json", "--out", out / "full")
    run("sft.py", *common, *SMALL, "--model", out / "full/model", "--out", out / "sft")
    return out


def test_sft_with_adapters(judged, toy):
    """It learns; its folder has the merged model, the adapter, and checkpoints without the base."""
    out = judged / "sft"
    losses = [row["loss"] for row in metrics(out)]
    assert losses[-1] < losses[0]
    assert json.loads((out / "config.json").read_text())["lora"] == 4
    assert {file.name for file in (out / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "judge.json",
    }
    full, merged = (
        load_file(judged / run / "model/model-00001.safetensors") for run in ("full", "sft")
    )
    assert full.keys() == merged.keys()
    changed = {name for name in full if not torch.equal(full[name], merged[name])}
    assert changed == {name for name in full if "proj.weight" in name}


def grpo_run(judged, toy, out, *more, ranks=1, script="grpo.py", ok=True):
    """-> lines of the log without times"""
    done = run(
        script,
        *SMALL,
        *("--model", judged / "sft/model", "--data", toy / "rl.jsonl", "--batch", 8),
        *("--mini-batch", 4, "--group-size", 3, "--max-prompt", 80, "--max-response", 24),
        *("--lr", 1e-2, "--max-mismatch", 1e-3, "--reward", "random", "--out", out, *more),
        ranks=ranks,
        ok=ok,
    )
    if not ok:
        return done.stderr
    untimed = ("seconds", "peak_gib", "tokens_per")
    return [{k: v for k, v in row.items() if not k.startswith(untimed)} for row in metrics(out)]


def test_grpo_with_adapters(judged, toy, tmp_path):
    """Trainer and engine agree in every step, the reference is where the run began, and --offload, which
    empties the base while vLLM samples, and a second life change nothing."""
    rows = grpo_run(judged, toy, tmp_path / "one", "--steps", 3)
    assert all(row["mismatch_mean"] < 1e-5 and 0 < row["lora_changed"] <= 1 for row in rows)
    assert 0 < rows[0]["kl"] < rows[2]["kl"]
    assert len({row["samples_digest"] for row in rows}) == 3

    grpo_run(judged, toy, tmp_path / "two", "--steps", 2, "--offload", "--save-every", 1)
    again = grpo_run(judged, toy, tmp_path / "two", "--steps", 3, "--offload", "--save-every", 1)
    assert again == rows
    said = grpo_run(judged, toy, tmp_path / "two", "--steps", 4, "--lora", 8, ok=False)
    assert "holds a run with another lora (4, now 8)" in said


def test_grpo_with_adapters_on_two_ranks(judged, toy, tmp_path):
    """The base whole on each; one of the forks; the same samples and numbers as on one rank."""
    one = grpo_run(judged, toy, tmp_path / "one", "--steps", 2, script="forks/gspo.py")
    two = grpo_run(
        *(judged, toy, tmp_path / "two", "--steps", 2, "--shard", 1, "--offload"),
        ranks=2,
        script="forks/gspo.py",
    )
    for a, b in zip(one, two, strict=True):
        assert a["samples_digest"] == b["samples_digest"] and b["mismatch_mean"] < 1e-5
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_a_run_starts_from_an_adapter(judged, toy, tmp_path):
    """From OUT/adapter as from OUT/model: the same samples. Its judge's style comes with it."""
    one = grpo_run(judged, toy, tmp_path / "one", "--steps", 1)
    two = grpo_run(judged, toy, tmp_path / "two", "--steps", 1, "--model", judged / "sft/adapter")
    assert one == two
    judge = [(tmp_path / name / "model/judge.json").read_text() for name in ("one", "two")]
    assert judge[0] == judge[1] and not (tmp_path / "two/adapter").exists()
    said = grpo_run(judged, toy, judged / "sft", "--model", judged / "sft/adapter", ok=False)
    assert "its model is the one that this run starts from" in said
