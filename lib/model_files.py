"""
Which files are a model: find them, list them, check them, tell one model from another.

Nothing here runs code from a model's folder. torch and transformers are imported inside the functions that
need them: `eval.py report` and a judge behind a URL import this module and work without both.
"""

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from lib.files import Failure, first_line, read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What torch.compile, data parallelism, checkpointing, PEFT and TRL write into the names of tensors.
WRAPPER = re.compile(
    r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|base_model|"
    r"pretrained_model|base_layer)\."
)


# ---------------------------------------------------------------- the folder


def find_model(model, weights=True, adapter=False):
    """The local folder of a model. -> Path

    model    a folder; FOLDER/config.json, which means random weights; or a hub id, which is downloaded
    weights  False if the weights are not needed
    adapter  True: the folder of an adapter stands for its base, see `find_adapter`

    From the hub come the settings, the tokenizer and `weight_files`, never pickles or code. Raises Failure
    where there is no model.
    """
    try:
        path = local_path(model, weights)
        if not is_adapter(path):
            return local_model(model, path, weights)
    except OSError as error:
        raise Failure(f"--model {model}: {error.strerror}") from error
    if not adapter:
        raise Failure(
            f"--model {model}: this is an adapter, which only sft.py and grpo.py start from; give a model "
            "with the adapter merged (a run writes it as OUT/model, beside OUT/adapter)"
        )
    return base_of_adapter(path, weights)


def local_path(model, weights):
    """The path that `model` names, or the folder that it is downloaded to."""
    path = Path(model)
    if path.exists():
        return path
    # Our own scripts write to runs/, so runs/NAME is a folder that is not there, and no hub id.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)) is not None
    if not is_hub_id or str(model).startswith("runs/"):
        raise Failure(f"--model {model}: no such folder, and not a hub id of the form owner/name")
    return download(model, weights)


def local_model(model, path, weights):
    """As `find_model`, for a path."""
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    names_a_config = is_folder or path.name == "config.json"
    if not names_a_config or "config.json" not in {file.name for file in folder.iterdir()}:
        raise Failure(
            f"--model {model}: expected a model folder with a config.json, or that config.json itself"
        )
    if weights and is_folder:
        weight_files(folder, model)
    return folder


@functools.cache
def download(model, weights):
    """Get a model from the hub, or from its cache here. -> its folder"""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    def get(*names):
        # Folders in a repository hold other things: checkpoints, the same model in other formats.
        return Path(snapshot_download(model, allow_patterns=list(names), ignore_patterns=["*/*"]))

    try:
        folder = get("*.json", "*.txt", "*.jinja", "*.model")
        if weights:
            get(SINGLE, ADAPTER_TENSORS, *indexed_files(folder, model))
        return folder
    except Exception as error:  # the hub raises a dozen types; each means: cannot be had
        why = "the hub could not give it"
        if HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, so that only models in the cache can be had, which it is not"
        raise Failure(
            f"--model {model}: no such folder, and {why} ({type(error).__name__})"
        ) from error


# ---------------------------------------------------------------- its weight files


def weight_files(folder, model=None):
    """The files that hold a model's weights: those of the index, or model.safetensors. -> [Path, ...], sorted

    model  its name, for messages; default: the folder

    These are the files that transformers reads, and vLLM (`check_weights` sees to it). Whatever else lies in
    the folder is no part of the model: the same weights in other formats, adapters, optimizers. Raises
    Failure where files are missing, or where transformers and vLLM would read different ones.
    """
    model = model or folder
    indexed = indexed_files(folder, model)
    has_single = (folder / SINGLE).is_file()
    if has_single and indexed and indexed != [SINGLE]:
        raise Failure(
            f"--model {model}: it has {SINGLE} and an index of other files ({INDEX}), of which transformers "
            "reads the first and vLLM the second; remove the one that is not the model"
        )
    if not indexed and not has_single:
        raise Failure(
            f"--model {model}: the folder has no *.safetensors weights that count, neither {SINGLE} nor "
            f"{INDEX}; other formats are not read (for random weights name {folder / 'config.json'})"
        )
    paths = [folder / name for name in indexed or [SINGLE]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise Failure(
            f"--model {model}: the folder lacks {len(missing)} of the {len(paths)} files of its {INDEX}, "
            f"the first is {missing[0]}"
        )
    return paths


def indexed_files(folder, model):
    """The names of the files in a folder's index, sorted; none where it has no index."""
    path = folder / INDEX
    if not path.exists():
        return []
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Failure(
            f"--model {model}: its {INDEX} is not an index of weights ({first_line(error)})"
        ) from error
    for name in names:
        # In the folder itself: elsewhere vLLM does not look, and a stranger's index may not point there.
        in_folder = isinstance(name, str) and name == Path(name).name
        if not in_folder or not name.endswith(".safetensors"):
            raise Failure(
                f"--model {model}: its {INDEX} names {name}, which is not a *.safetensors file in the folder"
            )
    if not names:
        raise Failure(f"--model {model}: its {INDEX} names no files")
    return names


@dataclass
class StoredTensor:
    """Where a file keeps a tensor. dtype: as safetensors spells it, such as BF16"""

    path: Path
    shape: tuple
    dtype: str


def tensors_in_files(folder, model):
    """{name: StoredTensor} of a model's weight files. Raises Failure for a file that is broken."""
    from safetensors import safe_open

    stored = {}
    for path in weight_files(folder, model):
        with open(path, "rb") as file:
            if file.read(20) == b"version https://git-":
                raise Failure(
                    f"--model {model}: {path.name} is a Git LFS pointer; run git lfs pull"
                )
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_slice(name) for name in file.keys()}
                found = {
                    name: StoredTensor(path, tuple(tensor.get_shape()), tensor.get_dtype())
                    for name, tensor in tensors.items()
                }
        except Exception as error:  # a file that is cut short, or no safetensors file
            raise Failure(
                f"--model {model}: its weights cannot be read ({path.name}: {first_line(error)})"
            ) from error
        twice = sorted(set(stored) & set(found))
        if twice:
            raise Failure(
                f"--model {model}: {twice[0]} is in two of its files, {stored[twice[0]].path.name} and "
                f"{path.name}"
            )
        stored |= found
    return stored


# ---------------------------------------------------------------- adapters
# A folder in PEFT's format: low-rank matrices beside the linear layers of a base. `lib/lora.py` has the rest.

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_BASE = "base.json"  # {"fingerprint"} of the base; PEFT has no such file


def is_adapter(path):
    """Is a path the folder of an adapter? transformers takes one for its base, whatever else lies in it."""
    return (path / ADAPTER_CONFIG).is_file()


def find_adapter(model):
    """The local folder of an adapter, None for any other model. `find_model` has seen the name before."""
    path = local_path(model, weights=True)
    return path if is_adapter(path) else None


def base_of_adapter(folder, weights=True):
    """The folder of the model that an adapter belongs to.

    Raises Failure for an adapter that more than plain LoRA makes, and for another base: the fingerprint
    tells, where a run of this project has written one beside the adapter.
    """
    base = read_adapter_config(folder)["base_model_name_or_path"]
    try:
        base_folder = find_model(base, weights)
    except Failure as failure:
        raise Failure(f"{folder / ADAPTER_CONFIG}: its base cannot be had: {failure}") from None
    path = folder / ADAPTER_BASE
    if weights and path.is_file():
        expected, found = read_object(path).get("fingerprint"), fingerprint(base, base_folder)
        if expected != found:
            raise Failure(
                f"--model {folder}: this adapter was trained on other weights than those in {base} now "
                f"(their fingerprint is {found}, {path.name} says {expected})"
            )
    return base_folder


# Settings of PEFT that change nothing here: how training went, or which layers have an adapter, which the
# tensors' names say as well. Any other one that is set would make the adapter more than W + s B A.
PLAIN_SETTINGS = set(
    "task_type auto_mapping peft_version base_model_name_or_path inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout layers_to_transform layers_pattern megatron_core "
    "qalora_group_size runtime_config ensure_weight_tying".split()
)
# Starts that leave the base as it is.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_adapter_config(folder):
    """What adapter_config.json says. Raises Failure for anything but plain LoRA."""
    path = folder / ADAPTER_CONFIG
    config = read_object(path)
    settings = dict(config)
    kind = settings.pop("peft_type", None)
    if kind != "LORA":
        raise Failure(f"{path}: its peft_type is {kind}; only LORA can be merged here")
    if settings.get("bias") == "none":
        del settings["bias"]
    if settings.get("init_lora_weights") in PLAIN_STARTS:
        settings.pop("init_lora_weights", None)
    for name, value in settings.items():
        if value and name not in PLAIN_SETTINGS:
            raise Failure(
                f"{path}: it sets {name} ({str(value)[:60]}); only plain LoRA can be merged here"
            )
    for name, kinds in (("r", int), ("lora_alpha", int | float), ("base_model_name_or_path", str)):
        if not isinstance(config.get(name), kinds) or not config[name]:
            raise Failure(f"{path}: {name} is {config.get(name)}, which no adapter can have")
    if not (folder / ADAPTER_TENSORS).is_file():
        raise Failure(f"{path}: there is no {ADAPTER_TENSORS} beside it")
    return config


# ---------------------------------------------------------------- its configuration


def config_of(folder):
    """The transformers configuration of a model folder.

    Raises Failure where it cannot be read, or is not that of a language model of text alone.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration can be broken in as many ways as families read it
        if "custom code" in str(error):
            raise Failure(
                f"--model {folder}: its family is Python code that comes with it (auto_map in config.json); "
                "such code is never run, and transformers has no such family"
            ) from error
        raise Failure(
            f"--model {folder}: its config.json cannot be read ({first_line(error)})"
        ) from error
    check_is_text_model(folder, config)
    return config


def check_is_text_model(folder, config):
    """Raise Failure for a configuration without what everything here reads from one."""
    family = config.model_type
    # dbrx and mpt keep settings of their attention in such parts; elsewhere they are networks.
    parts = [name for name in config.sub_configs if name not in ("attn_config", "ffn_config")]
    if parts or config.is_encoder_decoder:
        what = ", ".join(parts) or "an encoder and a decoder"
        raise Failure(
            f"--model {folder}: {family} models have several networks ({what}); only models of text alone, "
            "which are one decoder, are read here"
        )
    numbers = "max_position_embeddings hidden_size num_hidden_layers num_attention_heads vocab_size"
    for name in numbers.split():
        value = getattr(config, name, None)
        if type(value) is not int or value < 1:
            raise Failure(
                f"--model {folder}: the configuration of {family} models has no number {name} "
                f"(it is {value!r}); such models are not read here"
            )
    if getattr(config, "transformers_weights", None):
        raise Failure(
            f"--model {folder}: its config.json names files of weights (transformers_weights), which vLLM "
            "would not read"
        )


def window_of(config):
    """The most tokens of a sequence.

    Rotary tables of the types dynamic and longrope depend on the longest sequence in the batch, so they
    differ between packed rows and the engine. The window of such a model ends where that dependence begins.
    """
    longest = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope] if "rope_type" in rope else rope.values()  # one, or one for each kind of layer
    windows = [
        table.get("original_max_position_embeddings") or longest
        for table in tables
        if isinstance(table, dict) and table.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(windows, default=longest)


def head_width(config):
    """The width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def on_meta():
    """A context in which new modules have their parameters on the meta device.

    Their buffers (rotary tables, scales) are real, because no file brings them. A parameter that is on the
    meta device already is being tied: it stays the same object.
    """
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(module, name, parameter):
        if parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    return register_module_parameter_registration_hook(to_meta)


def stored_tensors(lm):
    """{name: tensor} of what a model's files hold: of a tied pair only the embedding, and no adapters."""
    tensors = {name: t for name, t in lm.state_dict().items() if not is_adapter_tensor(name)}
    if lm.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def is_adapter_tensor(name):
    """Is this the name of an adapter's matrix, beside the weight of its layer?"""
    return name.endswith((".lora_A", ".lora_B"))


# ---------------------------------------------------------------- what it holds against what is wanted


def check_weights(model, folder, lm=None):
    """Raises Failure unless a model's files hold all of its tensors, in its shapes, and no others.

    model   its name, for messages
    lm      the network that they are for; None: vLLM is to read the folder

    vLLM does not notice that a part of a fused matrix is missing, and would run with what happens to be in
    memory. So the check runs before vLLM loads. Left to vLLM are quantized tensors, and names that transformers
    does not use, as the experts of some families have them; but not names that a wrapper gave.
    """
    stored = tensors_in_files(folder, model)
    for_vllm = lm is None
    if for_vllm:
        check_what_vllm_reads(model, folder)
        lm = network_of_config(model, folder)
        if lm is None or getattr(lm.config, "quantization_config", None):
            return

    wanted = stored_tensors(lm)
    others = [name for name in stored if name not in wanted and not is_harmless(lm, name)]
    if lm.config.tie_word_embeddings and "lm_head.weight" in others:
        check_tie(model, lm, stored)
        others.remove("lm_head.weight")
    missing = sorted(set(wanted) - set(stored))
    check_unwrapped(model, others, set(missing))
    has_other_names = missing and others
    if for_vllm and has_other_names:
        return
    if missing:
        advice = f"; others are there, such as {min(others)}" if others else ""
        raise Failure(
            f"--model {model}: the weights lack {len(missing)} tensors, the first is {missing[0]}{advice}"
        )
    if others:
        raise Failure(
            f"--model {model}: the weights have {len(others)} tensors that its config.json has no place for, "
            f"the first is {min(others)}"
        )
    for name, tensor in wanted.items():
        shape = tuple(tensor.shape)
        if stored[name].shape != shape:
            raise Failure(
                f"--model {model}: {name} has the shape {stored[name].shape}, "
                f"its config.json says {shape}"
            )
    check_are_floats(model, {name: stored[name] for name in wanted})


def check_unwrapped(model, names, missing):
    """Raise Failure where a stored name is that of a missing tensor, with a wrapper's before it or in it."""
    for name in names:
        parts = WRAPPER.sub("", name).split(".")
        for first in range(len(parts)):
            wanted = ".".join(parts[first:])
            if wanted in missing:
                raise Failure(
                    f"--model {model}: its tensors have the names of a wrapper, such as {name} for "
                    f"{wanted}; save the model without its wrapper (unwrapped, adapters merged)"
                )


def check_what_vllm_reads(model, folder):
    """Raise Failure where vLLM would read other files than `weight_files`, or not sample from the model."""
    strays = set(folder.glob("*.safetensors")) - set(weight_files(folder, model))
    if strays and not (folder / INDEX).exists():
        raise Failure(
            f"--model {model}: vLLM would read {min(strays).name} as well as {SINGLE}; move it out of the "
            "folder"
        )
    for name in config_of(folder).architectures or []:
        if re.search("For(SequenceClassification|TokenClassification|MaskedLM|RewardModel)$", name):
            raise Failure(
                f"--model {model}: a {name} writes no text (eval.py --scalar takes a reward model that gives "
                "a number)"
            )


def check_are_floats(model, stored):
    """Raise Failure for tensors in 8 bits and less: without their scales they mean nothing."""
    for name, tensor in stored.items():
        if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            raise Failure(
                f"--model {model}: its weights are quantized ({name} is {tensor.dtype}), and its "
                "config.json does not say how"
            )


def check_tie(model, lm, stored):
    """Raise Failure where a head is stored beside the embedding that it is tied to, with other values.

    transformers would then untie them, while vLLM and training take the embedding for both.
    """
    import torch
    from safetensors import safe_open

    embedding = lm.get_input_embeddings().weight
    name = next(name for name, parameter in lm.named_parameters() if parameter is embedding)
    one, other = stored.get(name), stored["lm_head.weight"]
    if one is None:  # the caller says that it is missing
        return
    alike = one.shape == other.shape
    if alike:
        with safe_open(one.path, "pt") as left, safe_open(other.path, "pt") as right:
            left, right = left.get_slice(name), right.get_slice("lm_head.weight")
            for row in range(0, one.shape[0], 4096):
                rows = slice(row, row + 4096)
                alike = alike and torch.equal(left[rows], right[rows])
    if not alike:
        raise Failure(
            f"--model {model}: its config.json ties lm_head.weight to {name}, but the files hold other values "
            "for it; set tie_word_embeddings to false if they are the model's"
        )


def is_harmless(lm, name):
    """Is a stored tensor of no use to a network? Old files have its constants, and layers for speculation."""
    constants = [r"\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$"]
    patterns = constants + list(lm._keys_to_ignore_on_load_unexpected or ())
    return any(re.search(pattern, name) for pattern in patterns)


def network_of_config(model, folder):
    """The network of a folder's configuration, on the meta device; None if only the engine knows it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = config_of(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    try:
        with on_meta():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ImportError:  # some families want a package of their own
        return None
    except Exception as error:  # a family's code, given settings that do not fit together
        raise Failure(
            f"--model {model}: transformers makes no {config.model_type} model of its config.json "
            f"({first_line(error)})"
        ) from error


def fingerprint(model, folder):
    """A short digest of a model: of its config.json, and of samples from all over its weight files.

    With random weights (`model` names a config.json) it is a digest of that file. That of an adapter counts
    its base as well. None without a folder.
    """
    if folder is None:
        return None
    paths = [folder / "config.json"]
    if not str(model).endswith("config.json"):
        paths += weight_files(folder, model)
        if adapter := find_adapter(model):
            paths += [adapter / ADAPTER_CONFIG, adapter / ADAPTER_TENSORS]
    mark = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        mark.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(1, size // 64)):
                file.seek(start)
                mark.update(file.read(4096))
    return mark.hexdigest()[:16]
