"""A model folder is what transformers and vLLM take it for, or a sentence says why it is not."""

import ast
import importlib
import json
import shutil

import pytest
import torch
from families import FAMILIES, config_of, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rmr1
from conftest import ROOT, SHARED, call, run, save_qwen2
from judge.backends import ScalarBackend
from lib import model_files
from lib import policy as P
from lib.chat import load_tokenizer
from lib.files import Failure

SINGLE, INDEX = model_files.SINGLE, model_files.INDEX
ADAPTER_TENSORS = model_files.ADAPTER_TENSORS


def complaint(function, *args, **settings):
    """The sentence with which a call ends."""
    with pytest.raises(Failure) as stop:
        function(*args, **settings)
    sentence = str(stop.value)
    assert sentence.startswith(("--model", "/")) and "\n" not in sentence
    return sentence


def edit(path, **changes):
    """Change a JSON file; None takes a key away."""
    settings = json.loads(path.read_text()) | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    path.write_text(json.dumps(settings))


def change_weights(folder, change):
    """Save a folder's single file again after `change({name: tensor})`."""
    weights = load_file(folder / SINGLE)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def shard(folder):
    """Cut a folder's single file in two, with an index."""
    weights = load_file(folder / SINGLE)
    index = {}
    for place, name in enumerate(sorted(weights)):
        index[name] = f"model-0000{1 + place % 2}-of-00002.safetensors"
    for file in set(index.values()):
        part = {name: weights[name].clone() for name in index if index[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / SINGLE).unlink()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """{tied or not: a folder of a small Qwen2}"""
    folders = {tied: tmp_path_factory.mktemp(f"tied-{tied}") for tied in (False, True)}
    for tied, folder in folders.items():
        save_qwen2(folder, tied)
    return folders


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[False], tmp_path / "m")


@pytest.fixture
def tied(saved, tmp_path):
    return shutil.copytree(saved[True], tmp_path / "m")


def trained_values(folder, device):
    return dict(P.load_policy(folder, device, torch.float32).weights())


# ---------------------------------------------------------------- which files


STRAYS = [
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "model-00001-of-00009.safetensors",
    "checkpoint-7/model.safetensors",
    "original/consolidated.00.pth",
    "optimizer.bin",
]


@pytest.mark.parametrize("in_shards", [False, True])
def test_what_lies_beside_the_weights_is_not_read(in_shards, folder, ranks):
    """Other values by the same names: neither the trainer, nor the fingerprint, nor the check reads them."""
    if in_shards:
        shard(folder)
    before = trained_values(folder, ranks[2])
    mark = model_files.fingerprint(folder, folder)
    for name in STRAYS:
        (folder / name).parent.mkdir(exist_ok=True)
        other = {
            name: torch.zeros(2) if i % 2 else tensor + 1
            for i, (name, tensor) in enumerate(before.items())
        }
        save_file(other, folder / name)
    (folder / "broken.safetensors").write_bytes(b"not one")

    assert model_files.fingerprint(folder, folder) == mark
    after = trained_values(folder, ranks[2])
    assert all(torch.equal(before[name], after[name]) for name in before)
    if in_shards:  # vLLM reads the files of the index
        model_files.check_weights("m", folder)
    else:  # vLLM has no list, and would read them all
        assert "vLLM would read adapter_model.safetensors" in complaint(
            model_files.check_weights, "m", folder
        )


def test_vllm_reads_the_files_of_the_list(folder, monkeypatch):
    """Its own choice of files, with the settings that the engine and the server give it."""
    loader = pytest.importorskip("vllm.model_executor.model_loader.default_loader")
    from vllm.config.load import LoadConfig

    from lib.engine import Engine

    shard(folder)
    for name in STRAYS[:3]:
        save_file({"x": torch.zeros(1)}, folder / name)
    settings = {}

    class Stopped(Exception):
        pass

    def keep(**given):
        settings.update(given)
        raise Stopped

    monkeypatch.setattr("vllm.LLM", keep)
    with pytest.raises(Stopped):
        Engine(folder, 64)
    assert settings["trust_remote_code"] is False and settings["config_format"] == "hf"
    mine = loader.DefaultModelLoader(LoadConfig(load_format=settings["load_format"]))
    files = mine._prepare_weights(str(folder), None, None, True, None)[1]
    assert sorted(files) == [str(path) for path in model_files.weight_files(folder)]


def index(*names, **more):
    return lambda m: (m / INDEX).write_text(
        json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}} | more)
    )


def only_pickles(m):
    (m / SINGLE).rename(m / "pytorch_model.bin")


def lose_a_shard(m):
    shard(m)
    (m / "model-00002-of-00002.safetensors").unlink()


def dangle(m):
    (m / SINGLE).unlink()
    (m / SINGLE).symlink_to(m / "gone")


def shards_alone(m):
    shard(m)
    (m / INDEX).unlink()


@pytest.mark.parametrize(
    "spoil, said",
    [
        (only_pickles, "no *.safetensors weights"),
        (lose_a_shard, "lacks 1 of the 2 files of its model.safetensors.index.json"),
        (shards_alone, "no *.safetensors weights that count"),
        (dangle, "no *.safetensors weights that count"),
        (index("../other.safetensors"), "names ../other.safetensors, which is not"),
        (index("/etc/passwd"), "names /etc/passwd, which is not"),
        (index("sub/model.safetensors"), "names sub/model.safetensors, which is not"),
        (index("pytorch_model.bin"), "names pytorch_model.bin, which is not"),
        (index(7), "names 7, which is not"),
        (
            index("model-00001-of-00001.safetensors"),
            "transformers reads the first and vLLM the second",
        ),
        (index(weight_map={}), "names no files"),
        (index(weight_map=[]), "is not an index of weights"),
        (lambda m: (m / INDEX).write_text("[]"), "is not an index of weights"),
        (lambda m: (m / INDEX).write_text('{"weight'), "is not an index of weights"),
        (lambda m: (m / "adapter_config.json").write_text("{}"), "this is an adapter"),
        (
            lambda m: (m / "config.json").rename(m / "adapter_config.json"),
            "this is an adapter",
        ),
    ],
)
def test_a_folder_whose_weights_are_not_there_is_refused(spoil, said, folder):
    spoil(folder)
    assert said in complaint(model_files.find_model, folder)


def test_an_index_of_the_single_file_is_no_contradiction(folder):
    index(SINGLE)(folder)
    assert model_files.weight_files(folder) == [folder / SINGLE]


@pytest.mark.parametrize("name", ["a folder", "モデル", "-m", "a.b%20c"])
def test_names_and_links_of_folders(name, folder, tmp_path, ranks):
    """As in the hub's cache, where every file is a link."""
    cache = tmp_path / name
    cache.mkdir()
    for file in folder.iterdir():
        (cache / file.name).symlink_to(file)
    link = tmp_path / "link"
    link.symlink_to(cache)
    assert model_files.find_model(str(link)) == link
    model_files.check_weights("m", cache)
    assert model_files.fingerprint(link, link) == model_files.fingerprint(folder, folder)


@pytest.mark.parametrize("model", ["runs/gone", "m" * 300, "config.json/x", "no folder", "a/b/c"])
def test_what_is_no_model(model):
    complaint(model_files.find_model, model)


def test_a_file_of_a_folder_is_no_model(folder):
    assert "expected a model folder" in complaint(model_files.find_model, folder / SINGLE)
    assert model_files.find_model(folder / "config.json") == folder


def test_a_folder_without_permission(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_files.Path, "iterdir", refuse)
    assert "Permission denied" in complaint(model_files.find_model, folder)


def test_from_the_hub_come_the_files_of_the_list(folder, monkeypatch):
    """Two downloads: settings, then what the index names. Nothing of other folders, no pickles, no code."""
    shard(folder)
    wanted = []

    def snapshot(model, allow_patterns, ignore_patterns):
        assert ignore_patterns == ["*/*"]
        wanted.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert model_files.find_model("owner/name") == folder
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert wanted == ["*.json", "*.txt", "*.jinja", "*.model", SINGLE, ADAPTER_TENSORS, *shards]


def test_without_the_hub_the_sentence_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in complaint(model_files.find_model, "owner/not-in-the-cache")


# ---------------------------------------------------------------- what they hold


def drop_head(weights):
    del weights["lm_head.weight"]


def add_layer(weights):
    weights["model.layers.3.mlp.up_proj.weight"] = weights[
        "model.layers.0.mlp.up_proj.weight"
    ].clone()


def to_int8(weights):
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.int8)


def to_fp8(weights):
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)


def rename(before, after):
    def change(weights):
        for name in list(weights):
            weights[name.replace(before, after, 1)] = weights.pop(name)

    return change


def cut_vocabulary(weights):
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:299].clone()


@pytest.mark.parametrize(
    "change, said, vllm_too",
    [
        (drop_head, "lack 1 tensors, the first is lm_head.weight", True),
        (to_int8, "its weights are quantized (model.layers.0.mlp.up_proj.weight is I8)", True),
        (to_fp8, "its weights are quantized (model.layers.0.mlp.up_proj.weight is F8_E4M3)", True),
        (cut_vocabulary, "has the shape (299, 128)", True),
        (
            add_layer,
            "have 1 tensors that its config.json has no place for, the first is model.layers.3",
            True,
        ),
        (
            lambda w: w.update({"score.weight": torch.zeros(1, 128)}),
            "the first is score.weight",
            True,
        ),
        (rename("", "base_model."), "such as base_model.lm_head.weight for lm_head.weight", True),
        (rename("", "_orig_mod."), "names of a wrapper, such as _orig_mod.lm_head", True),
        (rename("", "module."), "save the model without its wrapper", True),
        (rename("", "base_model.model."), "save the model without its wrapper", True),
        (rename("", "actor.policy."), "save the model without its wrapper", True),
        (rename(".layers.1.", ".layers.1._orig_mod."), "1._orig_mod.input_layernorm", True),
        (rename("q_proj.", "q_proj.base_layer."), "q_proj.base_layer.bias for model.", True),
        (rename(".mlp.", ".ffn."), "others are there, such as model.layers.0.ffn.", False),
    ],
)
def test_files_that_do_not_hold_the_model_are_refused(change, said, vllm_too, folder, ranks):
    change_weights(folder, change)
    assert said in complaint(P.load_policy, folder, ranks[2], torch.float32)
    if vllm_too:  # else it has names for them that transformers has not
        assert said in complaint(model_files.check_weights, "m", folder)


def test_constants_of_old_files_are_passed_over(folder, ranks):
    """And hide nothing: with them, a missing tensor is still named before vLLM reads the folder."""
    before = trained_values(folder, ranks[2])
    change_weights(
        folder,
        lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}),
    )
    after = trained_values(folder, ranks[2])
    assert all(torch.equal(before[name], after[name]) for name in before)
    model_files.check_weights("m", folder)
    change_weights(folder, drop_head)
    assert "lack 1 tensors" in complaint(model_files.check_weights, "m", folder)


def test_biases_that_a_family_lacks_are_not_dropped(tmp_path, ranks):
    """A Qwen2 whose config.json says Llama: its biases would be lost without a word."""
    save_qwen2(tmp_path, False)
    edit(tmp_path / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    said = "self_attn.k_proj.bias"  # vLLM too would pass over it
    assert said in complaint(P.load_policy, tmp_path, ranks[2], torch.float32)
    assert said in complaint(model_files.check_weights, "m", tmp_path)


def test_a_head_beside_the_embedding_that_it_is_tied_to(tied, ranks):
    """The same values are read alike; others are refused, as transformers would untie them and vLLM not."""
    before = trained_values(tied, ranks[2])
    name = "model.embed_tokens.weight"
    change_weights(tied, lambda w: w.update({"lm_head.weight": w[name].clone()}))
    after = trained_values(tied, ranks[2])
    assert before.keys() == after.keys() and torch.equal(before[name], after[name])
    model_files.check_weights("m", tied)

    change_weights(tied, lambda w: w["lm_head.weight"][-1, -1].add_(1))
    said = "ties lm_head.weight to model.embed_tokens.weight"
    assert said in complaint(P.load_policy, tied, ranks[2], torch.float32)
    assert said in complaint(model_files.check_weights, "m", tied)
    change_weights(tied, lambda w: w.pop(name))
    assert f"the first is {name}" in complaint(P.load_policy, tied, ranks[2], torch.float32)


def twice(m):
    shard(m)
    files = sorted(m.glob("model-*.safetensors"))
    both = load_file(files[1]) | dict([next(iter(load_file(files[0]).items()))])
    save_file(both, files[1], metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil, said",
    [
        (twice, "is in two of its files"),
        (
            lambda m: (m / SINGLE).write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
            ),
            "is a Git LFS pointer",
        ),
        (lambda m: (m / SINGLE).write_bytes(b""), "its weights cannot be read (model.safetensors:"),
        (
            lambda m: (m / SINGLE).write_text("<html>"),
            "its weights cannot be read (model.safetensors:",
        ),
    ],
)
def test_files_that_cannot_be_read(spoil, said, folder, ranks):
    spoil(folder)
    assert said in complaint(model_files.check_weights, "m", folder)
    assert said in complaint(P.load_policy, folder, ranks[2], torch.float32)


@pytest.mark.parametrize("name", ["Qwen3", "Phi-3", "Gemma", "Cohere (Command R)", "Starcoder 2"])
def test_families_before_vllm(name, tmp_path):
    """What transformers saves is whole; one tensor less is noticed."""
    save(tmp_path, *FAMILIES[name])
    model_files.check_weights("m", tmp_path)
    change_weights(tmp_path, lambda w: w.pop("model.norm.weight"))
    assert "the first is model.norm.weight" in complaint(model_files.check_weights, "m", tmp_path)


def test_a_reward_model_is_asked_for_numbers_alone(folder):
    edit(folder / "config.json", architectures=["Qwen2ForSequenceClassification"])
    assert "eval.py --scalar" in complaint(model_files.check_weights, "m", folder)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "family, said",
    [
        ("gemma3", "several networks (text_config, vision_config)"),
        ("qwen2_5_vl", "several networks"),
        ("mistral3", "several networks"),
        ("llama4", "several networks"),
        ("llava", "several networks"),
        ("qwen3_5", "several networks"),
        ("gemma3n", "several networks"),
        ("phi4_multimodal", "several networks"),
        ("qwen2_audio", "several networks"),
        ("whisper", "an encoder and a decoder"),
        ("t5", "an encoder and a decoder"),
        ("bart", "an encoder and a decoder"),
        ("mamba", "no number max_position_embeddings"),
        ("bloom", "no number max_position_embeddings"),
    ],
)
def test_models_of_more_than_text(family, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert said in complaint(model_files.config_of, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[]", "7", "{", "", "\ufeff{}", "{}", '{"model_type": "nobody_knows"}', '{"model_type": 7}'],
)
def test_a_configuration_that_is_none(text, folder):
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in complaint(model_files.config_of, folder)


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_position_embeddings", None),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", True),
        ("num_attention_heads", "4"),
        ("hidden_size", [128]),
        ("vocab_size", -1),
        ("transformers_weights", "other.safetensors"),
    ],
)
def test_a_configuration_without_its_numbers(name, value, folder):
    settings = json.loads((folder / "config.json").read_text()) | {name: value}
    (folder / "config.json").write_text(json.dumps(settings))
    complaint(model_files.config_of, folder)


def test_a_rotary_table_for_each_kind_of_layer():
    """The window ends where the first of them begins to depend on the batch."""
    tables = dict(
        full_attention=dict(
            rope_type="dynamic", rope_theta=1e4, factor=2.0, original_max_position_embeddings=64
        ),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    )
    config = config_of("gemma3_text", {})
    config.rope_parameters = tables
    assert model_files.window_of(config) == 64


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read(name, tmp_path):
    config_of(*FAMILIES[name]).save_pretrained(tmp_path)
    assert model_files.window_of(model_files.config_of(tmp_path)) == 512


def open_model(script, model, data, out):
    """What a script says to a model."""
    rows = data / {"sft": "sft.jsonl", "grpo": "rl.jsonl", "dryrun": "sft.jsonl"}.get(
        script, "test.jsonl"
    )
    if script == "dryrun":
        return run(
            "tools/dryrun.py", "sft.py", "--model", model, "--data", rows, "--out", out, ok=False
        )
    if script == "serve":
        return call(importlib.import_module("serve.__main__"), "--model", model, ok=False)
    if script == "rmr1":
        return call(rmr1, "judge", "--model", model, "--data", rows, ok=False)
    return call(
        importlib.import_module(script), "--model", model, "--data", rows, "--out", out, ok=False
    )


@pytest.mark.parametrize("script", ["sft", "grpo", "eval", "rmr1", "dryrun", "serve"])
def test_every_script_refuses_a_model_of_text_and_images(script, toy, tmp_path, capsys):
    model = shutil.copytree(toy / "model", tmp_path / "m")
    shutil.copy(SHARED / "data/bugs/config-text-and-vision.json", model / "config.json")
    done = open_model(script, model / "config.json", toy, tmp_path / "out")
    assert done.returncode == 2 and "gemma3 models have several networks" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- code in a folder

MARK = "the code of the folder was run"


def with_code(model, native):
    """Put Python code into a model folder, that leaves a file where it runs."""
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (model / f"{name}.py").write_text(
            f"open({str(model / MARK)!r}, 'w')\n"
            "from transformers import PreTrainedConfig\n"
            "class X(PreTrainedConfig):\n    model_type = 'xjudge'\n"
        )
    auto_map = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoModel": "someone/else--modeling_x.X",
    }
    edit(model / "config.json", auto_map=auto_map)
    tokenizer = {"AutoTokenizer": ["tokenization_x.X", None]}
    edit(model / "tokenizer_config.json", auto_map=tokenizer)
    if not native:
        edit(model / "config.json", model_type="xjudge", architectures=["XForCausalLM"])


@pytest.mark.parametrize("script", ["sft", "grpo", "eval", "rmr1", "dryrun", "serve"])
def test_code_in_a_folder_is_not_run_and_nobody_is_asked(script, toy, tmp_path, monkeypatch):
    model = shutil.copytree(toy / "model", tmp_path / "m")
    with_code(model, native=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    done = open_model(script, model / "config.json", toy, tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "such code is never run" in done.stderr
    assert not (model / MARK).exists()


def test_code_beside_a_family_that_transformers_has_is_passed_over(folder, toy, ranks, monkeypatch):
    """As in many folders of Qwen and Phi: the native class reads them."""
    for file in {*(toy / "model").iterdir()} - {toy / "model/config.json"}:
        shutil.copy(file, folder)
    before = trained_values(folder, ranks[2])
    with_code(folder, native=True)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    after = trained_values(folder, ranks[2])
    assert all(torch.equal(before[name], after[name]) for name in before)
    model_files.check_weights("m", folder)
    load_tokenizer(folder)
    assert not (folder / MARK).exists()


def test_nothing_loads_a_model_without_saying_that_its_code_stays_unrun():
    """Without the setting, transformers asks on standard input whether to run it."""
    paths = {*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")} - {*ROOT.glob("tests/*")}
    calls = [
        (path, node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
    ]
    assert len(calls) >= 5
    for path, node in calls:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"


# ---------------------------------------------------------------- a reward model that gives a number


def save_classifier(folder, toy, family="Qwen2", **settings):
    """A random classifier with the toy's tokenizer. -> it"""
    import transformers

    shutil.copytree(toy / "model", folder, dirs_exist_ok=True)
    config = getattr(transformers, f"{family}Config").from_pretrained(toy / "model")
    config = type(config)(**config.to_dict() | dict(num_labels=1) | settings)
    torch.manual_seed(0)
    network = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    return network


def conversations():
    texts = ["Name a fruit.", "Plum.", "A", "Compare the two answers and say which one is better."]
    return [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        for one in texts
        for other in texts
    ]


PADS = {
    "the end of turn": lambda tokenizer: tokenizer.eos_token_id,
    "the first id": lambda tokenizer: 0,
    "none": lambda tokenizer: None,
    "one of its own": lambda tokenizer: tokenizer.pad_token_id,
}


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("ends_turn", [True, False])
@pytest.mark.parametrize("family", ["Qwen2", "Llama", "Gemma2"])
def test_a_score_is_of_the_last_token_whatever_pads(family, ends_turn, pad, toy, tmp_path):
    """A batch gives each conversation what one unpadded sequence gives it."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    more = dict(head_dim=16, sliding_window=8) if family == "Gemma2" else {}
    save_classifier(
        tmp_path,
        toy,
        family,
        pad_token_id=PADS[pad](tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )
    edit(tmp_path / "tokenizer_config.json", padding_side="left")
    if not ends_turn:
        body = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] }}{% endfor %}"
        tokenizer.chat_template = body
        (tmp_path / "chat_template.jinja").write_text(body)
    backend = ScalarBackend(str(tmp_path), "float32")
    asked = conversations()
    scores = dict(backend.scores(asked))
    assert len(scores) == len(asked)

    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for place, messages in enumerate(asked):
        row = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=False)])  # (1, T)
        hidden = alone.model(row).last_hidden_state[0, -1]  # (hidden,)
        assert scores[place] == pytest.approx(alone.score(hidden).item(), abs=1e-5)


def rename_head(weights):
    weights["v_head.summary.weight"] = weights.pop("score.weight")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (
            lambda m: change_weights(m, rename_head),
            "lack 1 tensors, the first is score.weight; others are there, such as v_head.summary.weight",
        ),
        (lambda m: change_weights(m, lambda w: w.pop("model.norm.weight")), "lack 1 tensors"),
        (
            lambda m: change_weights(m, lambda w: w.update({"score.bias": torch.ones(1)})),
            "no place for, the first is score.bias",
        ),
        (
            lambda m: change_weights(m, lambda w: w.update({"score.weight": torch.ones(2, 32)})),
            "cannot be loaded as a classifier",
        ),
        (
            lambda m: change_weights(
                m, lambda w: w.update({"score.weight": torch.ones(1, 32).to(torch.int8)})
            ),
            "its weights are quantized (score.weight is I8)",
        ),
        (only_pickles, "no *.safetensors weights"),
        (
            lambda m: edit(m / "config.json", id2label={"0": "a", "1": "b"}),
            "a classifier with 2 outputs",
        ),
        (
            lambda m: edit(
                m / "config.json", auto_map={"AutoModelForSequenceClassification": "modeling_x.X"}
            ),
            "its score is computed by Python code",
        ),
        (lambda m: (m / "chat_template.jinja").unlink(), "no chat template"),
        (lambda m: (m / "tokenizer.json").write_text("{"), "no usable tokenizer"),
        (
            lambda m: (m / "chat_template.jinja").write_text("{{ raise_exception('no roles') }}"),
            "its chat template refuses the prompt (no roles)",
        ),
        (lambda m: (m / "chat_template.jinja").write_text("{{ '' }}"), "writes nothing"),
        (
            lambda m: change_weights(
                m, lambda w: w.update({"score.weight": torch.full((1, 32), torch.nan)})
            ),
            "a score is not a number",
        ),
    ],
)
def test_a_reward_model_that_is_not_whole_is_refused(spoil, said, toy, tmp_path):
    save_classifier(tmp_path, toy)
    spoil(tmp_path)

    def score():
        list(ScalarBackend(str(tmp_path), "float32").scores(conversations()))

    assert said in complaint(score)


def test_a_judge_that_writes_is_no_reward_model(folder):
    assert "a classifier with 2 outputs" in complaint(ScalarBackend, str(folder))


def test_more_tokens_than_rows_of_the_embedding(toy, tmp_path):
    save_classifier(tmp_path, toy, vocab_size=40, pad_token_id=0, eos_token_id=1)

    def score():
        list(ScalarBackend(str(tmp_path), "float32").scores(conversations()))

    assert "its embedding only 40 rows" in complaint(score)


def test_a_fingerprint_is_of_the_configuration_too(folder):
    """Rotary tables, activations and windows change what a model says, with the same weights."""
    before = model_files.fingerprint(folder, folder)
    edit(folder / "config.json", rms_norm_eps=1e-3)
    assert model_files.fingerprint(folder, folder) != before
