"""tools/gguf_model.py: a language model that comes as a GGUF file."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from conftest import call

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
from tools import gguf_model as G

WORDS = [*map(chr, range(33, 127)), "Ġ", "ab", "<|im_start|>", "<|im_end|>"]


def write_gguf(path, lm, without=()):
    """A tiny Llama as llama.cpp writes it: in fp32, the halves that rotary tables turn interleaved."""
    path.parent.mkdir(exist_ok=True)
    config, out = lm.config, gguf.GGUFWriter(path, "llama")
    for add, value in (
        (out.add_context_length, config.max_position_embeddings),
        (out.add_embedding_length, config.hidden_size),
        (out.add_block_count, config.num_hidden_layers),
        (out.add_feed_forward_length, config.intermediate_size),
        (out.add_head_count, config.num_attention_heads),
        (out.add_head_count_kv, config.num_key_value_heads),
        (out.add_layer_norm_rms_eps, config.rms_norm_eps),
        (out.add_rope_freq_base, 10000.0),
        (out.add_vocab_size, len(WORDS)),
        (out.add_tokenizer_model, "gpt2"),
        (out.add_token_list, WORDS),
        (out.add_token_merges, ["a b"]),
        (out.add_token_types, [1] * (len(WORDS) - 2) + [3, 3]),
        (out.add_bos_token_id, len(WORDS) - 2),
        (out.add_eos_token_id, len(WORDS) - 1),
        (
            out.add_chat_template,
            "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
        ),
    ):
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, p in lm.named_parameters():
        if heads := {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads,
        }.get(name.split(".")[-2]):
            p = p.reshape(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(p.shape)
        if name not in without:
            out.add_tensor(names.get_name(name, (".weight",)), p.detach().contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_a_gguf_file_becomes_the_model_it_was(tmp_path):
    lm = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).eval()
    call(G, write_gguf(tmp_path / "file/tiny.gguf", lm), "--out", tmp_path / "model")
    again, ids = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(),
        torch.tensor([[3, 40, 95, 12]]),
    )
    assert torch.allclose(lm(ids).logits, again(ids).logits, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (
        tokenizer.decode(tokenizer.encode("ab c")) == "ab c" and tokenizer.eos_token == "<|im_end|>"
    )

    (tmp_path / "file/broken.gguf").write_bytes(b"GGUF" + bytes(100))
    lost = write_gguf(
        tmp_path / "file/lost.gguf", lm, without=["model.layers.1.mlp.up_proj.weight"]
    )
    for file, complaint in (
        (tmp_path / "file/broken.gguf", "cannot be read as a GGUF model"),
        (lost, "lacks 1 tensors of a llama model, such as model.layers.1.mlp.up_proj.weight"),
        (tmp_path / "none.gguf", "no such file"),
    ):
        done = call(G, file, "--out", tmp_path / "other", ok=False)
        assert done.returncode == 2 and f"{file}: {complaint}" in done.stderr
        assert not (tmp_path / "other").exists(), "something was half-written"
