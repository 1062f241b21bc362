"""
LoRA: low-rank adaptation of a frozen network (arXiv 2106.09685), by hand.

A linear layer computes h = W x. Its W stays as it is, and what is learned is a matrix of low rank
beside it: h = (W + s B A) x, with s = ALPHA / rank. A begins at random and B at zero, so that
training begins with the network as it was. Every linear layer of every block gets an adapter, and
the network with its adapters switched off is the one that the run started from.

The textbook adds two paths, W x + s B (A x). This file makes the merged matrix first, W' = W + s B A,
rounded to the type of W, and computes h = W' x. The sampler gets merged weights, and in bf16 a small
update is lost when it is rounded onto the grid of W. With two paths the trainer would see the whole
update, and the sampler what the rounding leaves of it. Here both compute with the same matrix.

Letters: T tokens, r the rank; a layer maps `in` channels to `out`.
"""

import zlib
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from lib.dist import full_tensor, local_shard, shard_like
from lib.files import Failure, first_line
from lib.model_files import ADAPTER_CONFIG, ADAPTER_TENSORS, read_adapter_config

# So that the best learning rate hardly depends on the rank: s = 32 / r (what tinker and TRL use).
ALPHA = 32


class LoRALinear(nn.Linear):
    """A linear layer with a frozen weight and an adapter. `add_adapters` makes one of an nn.Linear.

    weight  (out, in), frozen
    bias    (out,) or None, frozen
    lora_A  (r, in), fp32
    lora_B  (out, r), fp32
    """

    adapter_on = True

    def forward(self, x):
        if not self.adapter_on:
            return F.linear(x, self.weight, self.bias)
        return MergedLinear.apply(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale
        )  # (..., out)

    @property
    def scale(self):
        return ALPHA / self.lora_A.shape[0]


class MergedLinear(torch.autograd.Function):
    """x W'^T + bias with W' = W + s B A; gradients for x, A and B.

    W' is computed again in the backward pass: kept for every layer, it would double the memory of the
    weights. Rounding counts as the identity (a straight-through estimator), so the gradients are those
    of two paths.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, merged_weight(weight, a, b, scale), bias)  # (..., out)

    @staticmethod
    def backward(ctx, grad):
        """grad (..., out): dx = grad W', dA = s (grad B)^T x, dB = s grad^T (x A^T)."""
        x, weight, a, b = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:  # not for q, k, v of the first block: nothing below them learns
            grad_x = grad @ merged_weight(weight, a, b, ctx.scale)  # (..., in)
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)  # (T, in), (T, out)
        grad_a = ctx.scale * ((grad @ b).T @ x)  # (r, in)
        grad_b = ctx.scale * (grad.T @ (x @ a.T))  # (out, r)
        return grad_x, None, None, grad_a, grad_b, None


def merged_weight(weight, a, b, scale):
    """W + s B A in the type of W. The product is summed in fp32 and rounded once. (out, in)"""
    return torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=scale)


# ---------------------------------------------------------------- adapters on a network


def add_adapters(lm, rank):
    """Freeze a model, and put an adapter on every linear layer of its blocks.

    Layers are found by their type: a list of names would miss those of the next family. They stay
    where they are and keep their names, so loading, saving and the sync need no mapping.
    """
    lm.requires_grad_(False)
    for layer in lm.model.layers.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = LoRALinear
            for name, shape in (
                ("lora_A", (rank, layer.in_features)),
                ("lora_B", (layer.out_features, rank)),
            ):
                values = torch.empty(shape, dtype=torch.float32, device=layer.weight.device)
                setattr(layer, name, nn.Parameter(values))


def adapted_layers(network):
    """{name: layer} of the layers with an adapter."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LoRALinear)}


@torch.no_grad()
def init_adapters(lm, seed):
    """A uniform within 1 / sqrt(in), as PEFT has it, and B zero.

    Each A has a generator of its own, made of (seed, name), so that the draw does not depend on the
    number of ranks.
    """
    for name, layer in adapted_layers(lm).items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}.lora_A".encode()))
        bound = layer.in_features**-0.5
        values = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        layer.lora_A.copy_(shard_like(values, layer.lora_A))
        layer.lora_B.zero_()


@contextmanager
def adapters_off(network):
    """Within, a network computes what it computed before it had adapters."""
    layers = adapted_layers(network).values()
    for layer in layers:
        layer.adapter_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_on = True


@torch.no_grad()  # a backward pass, which recomputes, would find the adapters on again
def without_adapters(policy, batch):
    """Log-probs of a packed batch (R,) under the model that a run with adapters started from.

    It is the reference of the KL penalty, and costs no memory.
    """
    with adapters_off(policy):
        return policy(batch)


def merged_shard(layer, shard):
    """The merged matrix of a layer, this rank's rows of it. A collective.

    shard  this rank's rows of its weight, in the type of the result. Those of B are split in the same way.
    """
    return merged_weight(
        shard, full_tensor(layer.lora_A.detach()), local_shard(layer.lora_B), layer.scale
    )


# ---------------------------------------------------------------- PEFT's files
# OUT/adapter is what `peft` and `vllm serve --lora-modules` open.

PEFT_PREFIX = "base_model.model."


def peft_name(layer, letter):
    """PEFT's name of the matrix A or B of a layer."""
    return f"{PEFT_PREFIX}{layer}.lora_{letter}.weight"


def adapter_tensors(lm):
    """{PEFT's name: full tensor} of all adapters, fp32. A collective."""
    tensors = {}
    for name, layer in adapted_layers(lm).items():
        tensors[peft_name(name, "A")] = full_tensor(layer.lora_A.detach())  # (r, in)
        tensors[peft_name(name, "B")] = full_tensor(layer.lora_B.detach())  # (out, r)
    return tensors


def peft_config(lm, base):
    """The content of adapter_config.json. base: the model that the adapters belong to, as PEFT finds it"""
    layers = adapted_layers(lm)
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.lora_A.shape[0],
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "inference_mode": True,
    }


@torch.no_grad()
def merge_adapter(lm, folder, dtype):
    """Add an adapter on disk to the weights of a model, each rank its own rows.

    folder  in PEFT's format, of this project or another
    dtype   in which the sum is rounded. Weights that are kept in fp32 then hold what the run that
            trained the adapter has sampled with and saved, if it had the same --dtype
    """
    config = read_adapter_config(folder)
    scale = config["lora_alpha"] / config["r"]
    for name, (a, b) in read_adapter(folder, config["r"]).items():
        weight = matrix_of(lm, name, a, b, folder)
        rows = local_shard(weight)
        own_b = local_shard(shard_like(b, weight))
        rows.copy_(merged_weight(rows.to(dtype), a.to(rows.device), own_b, scale))


def read_adapter(folder, rank):
    """{layer: (A (r, in), B (out, r))} of an adapter's file, fp32."""
    path = folder / ADAPTER_TENSORS
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise Failure(f"{path}: cannot be read ({first_line(error)})") from error
    pairs = {}
    for name in sorted(tensors):
        layer = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
        names = [peft_name(layer, letter) for letter in "AB"]
        if name not in names or not set(names) <= set(tensors):
            raise Failure(f"{path}: {name} is not one of the two matrices of a linear layer")
        a, b = pairs[layer] = [tensors[name] for name in names]
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
            raise Failure(f"{path}: {name} is not of the rank {rank} that its {ADAPTER_CONFIG} has")
    return pairs


def matrix_of(lm, layer, a, b, folder):
    """The weight that an adapter's two matrices are for. Raises Failure where there is none."""
    tied = ("lm_head", "model.embed_tokens") if lm.config.tie_word_embeddings else ()
    weight = dict(lm.named_parameters()).get(f"{layer}.weight")
    if weight is None or layer in tied or weight.shape != (len(b), a.shape[1]):
        raise Failure(
            f"{folder}: it adapts {layer} by a matrix of {len(b)} x {a.shape[1]}, which its base does not have"
            + (" by itself: it is tied" if layer in tied else "")
        )
    return weight
