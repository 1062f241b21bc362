"""Model families: packed training computes what transformers computes, or the run ends before it begins."""

import importlib
import json
import shutil

import pytest
import torch
from families import FAMILIES, REFUSED, config_of, save
from safetensors.torch import load_file
from test_lora import set_adapters
from test_policy import GROUPS, plain_logprobs
from transformers import AutoModelForCausalLM

from conftest import call
from lib import model_files, packing
from lib import policy as P
from lib.files import Failure
from lib.lora import adapted_layers, without_adapters

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_as_transformers_computes_it(name, ranks, tmp_path):
    """The check that every run begins with agrees; and so do log-probs and gradients of a saved model, on
    rows longer than its window, cut into micro-batches."""
    assert P.check_family(config_of(*FAMILIES[name]), CPU) < 1e-4
    plain = save(tmp_path, *FAMILIES[name])
    expected = plain_logprobs(plain, GROUPS)
    weight = torch.randn(len(expected))
    (expected * weight).sum().backward()
    policy = P.load_policy(tmp_path, CPU, torch.float32)
    at = 0
    for batch in packing.pack(GROUPS, 64, CPU):
        logp = policy(batch)
        assert (logp - expected[at : at + len(logp)]).abs().max() < 2e-5
        (logp * weight[at : at + len(logp)]).sum().backward()
        at += len(logp)
    theirs = dict(plain.named_parameters())
    for key, p in policy.lm.named_parameters():
        assert (p.grad.full_tensor() - theirs[key].grad).norm() <= 1e-4 * theirs[
            key
        ].grad.norm() + 1e-6, key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_with_adapters(name, ranks, tmp_path):
    """Every matrix of its blocks gets one. The merged folder has the names of a full run, and transformers
    computes the policy's log-probs from it; without adapters they are those of the model itself."""
    plain = save(tmp_path / "base", *FAMILIES[name])
    policy = set_adapters(P.load_policy(tmp_path / "base", CPU, torch.float32, lora=4))
    matrices = {n for n, p in plain.model.layers.named_parameters() if p.dim() == 2}
    adapted = adapted_layers(policy.lm.model.layers)
    assert {f"{layer}.weight" for layer in adapted} == matrices

    P.save_model(policy, tmp_path / "base", tmp_path / "out", torch.float32)
    folders = [tmp_path / "base", tmp_path / "out"]
    names = [set().union(*map(load_file, folder.glob("*.safetensors"))) for folder in folders]
    assert names[0] == names[1]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    (batch,) = packing.pack(GROUPS, 10**9, CPU)
    with torch.no_grad():
        logp, base = policy(batch), without_adapters(policy, batch)
        assert (logp - plain_logprobs(merged, GROUPS)).abs().max() < 2e-5
        assert (base - plain_logprobs(plain, GROUPS)).abs().max() < 2e-5
    assert (logp - base).abs().max() > 1e-2, "the adapters were meant to change something"
    policy(batch).sum().backward()
    for layer in adapted.values():
        assert layer.lora_A.grad.full_tensor().any() and layer.lora_B.grad.full_tensor().any()


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_computes_something_else_is_refused(name, capsys):
    *made, said = REFUSED[name]
    with pytest.raises(Failure) as stop:
        P.check_family(config_of(*made), CPU)
    err = str(stop.value)
    assert said in err


def test_a_dry_run_checks_the_family_on_a_machine_with_cards(ranks, monkeypatch):
    """It has no device of its own, so the kernel of CUDA is not asked for what it cannot do."""
    monkeypatch.setattr("lib.dist.CUDA", True)
    assert P.check_family(config_of(*FAMILIES["Qwen3"]), CPU) < 1e-4


def forgets_the_window(monkeypatch):
    bucketed = packing.bucketed
    monkeypatch.setattr(
        packing,
        "bucketed",
        lambda q, k, v, plan, scaling, window: bucketed(q, k, v, plan, scaling, None),
    )


def forgets_the_scale(monkeypatch):
    monkeypatch.setattr(
        P.Policy, "forward", lambda self, batch: setattr(self, "scale", 1.0) or forward(self, batch)
    )


forward = P.Policy.forward


@pytest.mark.parametrize(
    "name, slip",
    [
        ("Mistral with a window", forgets_the_window),
        ("Gemma 3 (text)", forgets_the_window),
        ("Granite", forgets_the_scale),
        ("Cohere (Command R)", forgets_the_scale),
    ],
)
def test_the_check_notices_what_is_forgotten(name, slip, monkeypatch, capsys):
    slip(monkeypatch)
    with pytest.raises(Failure) as stop:
        P.check_family(config_of(*FAMILIES[name]), CPU)
    assert "computes something that packed training does not know" in str(stop.value)


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_run_begins_with_the_check(script, toy, tmp_path):
    """Its sentence comes before anything is written."""
    model = tmp_path / "model"
    shutil.copytree(toy / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(
            config
            | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 32}
        )
    )
    done = call(
        importlib.import_module(script),
        "--model",
        model / "config.json",
        "--data",
        toy / "sft.jsonl",
        *(
            ("--batch", 16, "--max-len", 160)
            if script == "sft"
            else ("--batch", 8, "--mini-batch", 8, "--max-prompt", 80, "--max-response", 24)
        ),
        "--out",
        tmp_path / "out",
        ok=False,
    )
    assert done.returncode == 2 and "hands softcap to its attention" in done.stderr
    assert not (tmp_path / "out").exists()


def test_longest_sequences_where_the_rotary_table_depends_on_them():
    config = config_of(
        "llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))
    )
    assert model_files.window_of(config) == 512
    short = config_of(
        "phi3",
        dict(
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=1e4,
                short_factor=[1.0] * 16,
                long_factor=[2.0] * 16,
            ),
            original_max_position_embeddings=128,
        ),
    )
    assert model_files.window_of(short) == 128
    assert model_files.window_of(config_of("qwen2", {})) == 512
