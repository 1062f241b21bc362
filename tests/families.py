"""Small models of every family that trains here, and what running this file prints: the table of
docs/families.md.

    python tests/families.py [FAMILY ...]

trains: the largest difference of log-probs between packed training and transformers' own forward pass, fp32.
syncs: the same between training and the real vLLM after the first sync and after two updates (sync_check.py).
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import run

SIZES = dict(
    vocab_size=300,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.1,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
WINDOW = dict(sliding_window=16)
# family: (model_type, settings beside SIZES)
FAMILIES = {
    "Qwen2, 2.5": ("qwen2", {}),
    "Qwen2 with a window": ("qwen2", WINDOW | dict(use_sliding_window=True, max_window_layers=1)),
    "Qwen3": ("qwen3", {}),
    "Llama": ("llama", {}),
    "Llama 3.1 (rope llama3)": ("llama", dict(rope_parameters=LLAMA3)),
    "Llama with yarn": ("llama", dict(rope_parameters=YARN)),
    "Mistral": ("mistral", dict(sliding_window=None)),
    "Mistral with a window": ("mistral", WINDOW),
    "Gemma": ("gemma", {}),
    "Gemma 3 (text)": (
        "gemma3_text",
        WINDOW
        | dict(
            num_hidden_layers=4,
            query_pre_attn_scalar=32,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
        ),
    ),
    "Phi-3": ("phi3", dict(sliding_window=None)),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW),
    "Granite": (
        "granite",
        dict(
            logits_scaling=8.0,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.03,
        ),
    ),
    "Cohere (Command R)": ("cohere", {}),
    "Cohere 2 (Command R7B)": ("cohere2", WINDOW),
    "SmolLM3": ("smollm3", dict(no_rope_layers=[1, 1, 0])),
    "GLM-4": ("glm4", dict(attention_bias=True)),
    "Starcoder 2": ("starcoder2", WINDOW),
    "EXAONE 4": ("exaone4", WINDOW),
    "Seed-OSS": ("seed_oss", {}),
}
REFUSED = {
    "Gemma 2": ("gemma2", {}, "hands softcap to its attention"),
    "GPT-OSS": ("gpt_oss", {}, "is a mixture of experts"),
    "Qwen3-MoE": ("qwen3_moe", {}, "is a mixture of experts"),
    "Mixtral": ("mixtral", {}, "is a mixture of experts"),
    "Granite with sinks": ("granite_swa", {}, "hands s_aux to its attention"),
    "GPT-2": ("gpt2", {}, "are not made of decoder blocks"),
    "Phi-2": ("phi", {}, "are not made of decoder blocks"),
    "BERT": ("bert", {}, "are not made of decoder blocks"),
    "T5": ("t5", {}, "is no language model"),
    "Mamba": ("mamba", {}, "are not made of decoder blocks"),
    "DeepSeek-V3": ("deepseek_v3", {}, "a forward pass of deepseek_v3 over packed rows ends in"),
    "Qwen3.5": ("qwen3_5_text", {}, "computes something that packed training does not know"),
}


def config_of(model_type, more):
    return AutoConfig.for_model(model_type, **SIZES | more)


def save(folder, model_type, more):
    """A random model of a family on disk, by transformers itself. -> it"""
    import torch

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(model_type, more)).eval()
    for p in model.parameters():  # biases begin at 0 and norms at 1, which would hide a lost one
        p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def main():
    import torch

    from lib import policy as P
    from lib.files import Failure

    wanted = sys.argv[1:] or list(FAMILIES)
    if unknown := set(wanted) - set(FAMILIES):
        raise Failure(f"{unknown.pop()}: not among {', '.join(FAMILIES)}")
    print("| family | trains | syncs |\n|---|---|---|")
    for name in wanted:
        gap = P.check_family(config_of(*FAMILIES[name]), torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            save(folder, *FAMILIES[name])
            done = run("tests/sync_check.py", folder, "float32", 1, ok=False)
        line = done.stdout.splitlines()[-1] if done.stdout else ""
        try:
            out = json.loads(line)
            synced = f"{max(out[k][1] for k in ('first', 'after update 0', 'after update 1')):.1e}"
        except ValueError:
            said = [x for x in done.stderr.splitlines() if "Error" in x]
            synced = f"not: {(said or ['no answer'])[-1][:90]}"
        print(f"| {name} | {gap:.1e} | {synced} |", flush=True)


if __name__ == "__main__":
    main()
