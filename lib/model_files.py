"""
Which files are a model: find them, list them, check them, tell one model from another.

Nothing here runs code from a model's folder. torch and transformers are imported inside the functions that
need them: `eval.py report` and a judge behind a URL import this module and work without both.
"""

import hashlib
import re
from pathlib import Path

from lib.files import Failure, first_line


def find_model(model, weights=True):
    """The local folder of a model. -> Path

    model    a folder; FOLDER/config.json, which means random weights; or a hub id, which is downloaded
    weights  False if the weights are not needed

    From the hub only safetensors are taken, never pickles. Raises Failure where there is no model.
    """
    path = Path(model)
    if path.exists():
        return local_model(model, path, weights)
    # Our own scripts write to runs/, so runs/NAME is a folder that is not there, and no hub id.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)) is not None
    if not is_hub_id or str(model).startswith("runs/"):
        raise Failure(f"--model {model}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", "*.model"]
    if weights:
        patterns.append("*.safetensors")
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub raises a dozen types; each means: cannot be had
        raise Failure(
            f"--model {model}: no such folder, and the hub could not give it "
            f"({type(error).__name__})"
        ) from error


def local_model(model, path, weights):
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    names_a_config = path.is_dir() or path.name == "config.json"
    if not config.exists() or not names_a_config:
        raise Failure(
            f"--model {model}: expected a model folder with a config.json, or that config.json itself"
        )
    if weights and path.is_dir() and not any(path.glob("*.safetensors")):
        raise Failure(
            f"--model {model}: the folder has no *.safetensors weights"
            f" (for random weights name {config})"
        )
    return folder


def config_of(folder):
    """The transformers configuration of a model folder. Raises Failure where it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # a configuration can be broken in as many ways as families read it
        raise Failure(
            f"--model {folder}: its config.json cannot be read ({first_line(error)})"
        ) from error


def window_of(config):
    """The most tokens of a sequence.

    Rotary tables of the types dynamic and longrope depend on the longest sequence in the batch, so they
    differ between packed rows and the engine. The window of such a model ends where that dependence begins.
    """
    longest = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return rope.get("original_max_position_embeddings") or longest
    return longest


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
    """{name: tensor} of what a model's files hold: of a tied pair only the embedding."""
    tensors = dict(lm.state_dict())
    if lm.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def check_weights(model, folder, wanted=None):
    """Raises Failure unless a model's files hold all of its tensors, in its shapes.

    model   its name, for the message
    wanted  {name: tensor}; None for the tensors of the folder's configuration

    vLLM does not notice that a part of a fused matrix is missing, and would run with what happens to be in
    memory. So the check runs before vLLM loads. Files with other tensor names are left to vLLM.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # a safetensors file, or its index, that is cut short
        raise Failure(
            f"--model {model}: its weights cannot be read ({first_line(error)})"
        ) from error
    if wanted is None:
        wanted = tensors_of_config(folder)
        if wanted is None or not set(stored) <= set(wanted):
            return

    missing = sorted(set(wanted) - set(stored))
    if missing:
        raise Failure(
            f"--model {model}: the weights lack {len(missing)} tensors, the first is {missing[0]}"
        )
    for name, tensor in wanted.items():
        stored_shape = tuple(stored[name].size)
        shape = tuple(tensor.shape)
        if stored_shape != shape:
            raise Failure(
                f"--model {model}: {name} has the shape {stored_shape}, "
                f"its config.json says {shape}"
            )


def tensors_of_config(folder):
    """{name: tensor on the meta device} of a folder's configuration; None if only the engine knows it."""
    from transformers import AutoModelForCausalLM

    try:
        with on_meta():
            return stored_tensors(AutoModelForCausalLM.from_config(config_of(folder)))
    except Exception:  # a family that transformers does not have
        return None


def fingerprint(model, folder):
    """A short digest of a model's weights, from samples all over its files.

    With random weights (`model` names a config.json) it is a digest of that file. None without a folder.
    """
    if folder is None:
        return None
    if str(model).endswith("config.json"):
        paths = [folder / "config.json"]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    mark = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        mark.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(1, size // 64)):
                file.seek(start)
                mark.update(file.read(4096))
    return mark.hexdigest()[:16]
