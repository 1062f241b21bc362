"""
The network under training: loading and sharding, families, log-probs, optimizer, the model on disk.

A policy sees packed tokens and gives log-probs; it knows nothing of judgments. The same code runs
in one process on a CPU, under `torchrun --nproc_per_node 2` with gloo, and on many nodes with NCCL:
parameters are always FSDP2 shards, also when there is one rank.

Letters: T packed tokens of a micro-batch, R response tokens among them, V vocabulary, W words of a
slice of it.
"""

import copy
import json
import math
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed import barrier, get_rank, get_world_size, init_device_mesh
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM

from lib import dist
from lib.checkpoint import force_to_disk
from lib.files import Failure
from lib.model_files import (
    check_weights,
    config_of,
    find_model,
    head_width,
    on_meta,
    stored_tensors,
)
from lib.packing import check_kernel, pack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------- the model


class Policy(nn.Module):
    """A causal language model that maps a packed batch to its response log-probs."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.scale, self.cap = logit_transform(lm.config)

    def forward(self, batch, temperature=1.0):
        """Log-prob of every response token, (R,) in fp32, under softmax(logits / temperature).

        The vocabulary projection sees response positions only.
        """
        # Not by calling the model: where vLLM has no model of its own for a family it runs
        # transformers' class, and puts a __call__ of its own into that, for all who have one in
        # this process.
        output = nn.Module.__call__(
            self.lm.model,
            input_ids=batch.tokens[None],  # (1, T)
            position_ids=batch.positions[None],  # (1, T)
            use_cache=False,
            plan=batch.plan,
        )
        hidden = output.last_hidden_state[0].index_select(0, batch.src)  # (R, hidden)
        head = self.lm.lm_head.weight  # (V, hidden)
        return TokenLogProbs.apply(
            hidden, head, batch.targets, temperature / self.scale, self.cap
        )  # (R,)

    @torch.no_grad()
    def weights(self, dtype=None):
        """Stream (name, full tensor) in module order, by Hugging Face names.

        A collective: every rank iterates to the end.

        Casting before gathering halves the traffic. A tied head comes last, by its own name: vLLM's
        CPU build packs a copy of it, which the embedding's name does not reach.
        """
        tied = self.lm.config.tie_word_embeddings
        for name, parameter in self.lm.named_parameters():
            full = parameter.detach().to(dtype or parameter.dtype).full_tensor()
            if tied and name == "model.embed_tokens.weight":
                head = full  # (V, hidden)
            yield name, full
        if tied:
            yield "lm_head.weight", head


def logit_transform(config):
    """What a family does to its logits before the softmax. -> scale, cap

    The logits are scale * softcap(hidden head^T, cap); without a cap it is None. Cohere
    (logit_scale) multiplies them and Granite (logits_scaling) divides them. Gemma bends them
    towards a cap after the scale. `TokenLogProbs` bends before it: cap tanh(scale x / cap) is the
    scale times the softcap of x with cap / scale.
    """
    scale = getattr(config, "logit_scale", None)
    if not scale:
        scale = 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return scale, cap / scale if cap else None


LOGITS = 2**25  # at a time: 128 MB in fp32. Fewer would have a card read the head too often


class TokenLogProbs(torch.autograd.Function):
    """log softmax(logits / temperature) at the targets, without T x V logits in memory.

    hidden       (R, hidden)
    head         (V, hidden)
    targets      (R,)
    temperature  a number
    cap          None: logits = hidden head^T; a number: logits = cap tanh(hidden head^T / cap)
    -> (R,) in fp32

    LOGITS logits exist at a time, and they are computed again in the backward pass. That goes by
    slices of the vocabulary: a slice of the head's gradient is one product over all tokens, summed
    in fp32 inside it and rounded once, where a sum over chunks of tokens would round to bf16 at
    every chunk.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, cap=None):
        target_logit = torch.empty(len(targets), device=head.device)  # (R,)
        logsumexp = torch.empty(len(targets), device=head.device)  # (R,)
        chunk = max(1, LOGITS // len(head))
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = softcap(matmul_fp32(hidden[rows], head.T), cap)  # (rows, V)
            logits.div_(temperature)  # in place: a copy would be LOGITS numbers more
            target_logit[rows] = logits.gather(-1, targets[rows, None])[:, 0]
            logsumexp[rows] = logits.logsumexp(-1)
        ctx.save_for_backward(hidden, head, targets, logsumexp)
        ctx.temperature = temperature
        ctx.cap = cap
        return target_logit - logsumexp

    @staticmethod
    def backward(ctx, grad):
        """d logp / d logits = (onehot(target) - softmax) / temperature, by slices of the vocabulary.

        grad  (R,)
        With a cap, times the slope of the softcap, 1 - (logits / cap)^2.
        """
        hidden, head, targets, logsumexp = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)  # (R, hidden)
        grad_head = torch.empty_like(head)  # (V, hidden)
        grad = (grad / ctx.temperature)[:, None]  # (R, 1)
        chunk = max(1, LOGITS // max(1, len(targets)))  # a dummy micro-batch has no targets
        for start in range(0, len(head), chunk):
            words = slice(start, start + chunk)
            logits = softcap(matmul_fp32(hidden, head[words].T), ctx.cap)  # (R, W)
            slope = 1 - (logits / ctx.cap).square_() if ctx.cap else None  # (R, W)

            # In place from here on: each copy would be LOGITS numbers more.
            softmax = logits.div_(ctx.temperature).sub_(logsumexp[:, None]).exp_()  # (R, W)
            d_logits = softmax.mul_(-grad)  # (R, W)
            inside = (targets >= start) & (targets < start + chunk)  # (R,)
            column = (targets - start).clamp(0, d_logits.shape[1] - 1)  # (R,)
            d_logits.scatter_add_(1, column[:, None], grad * inside[:, None])  # onehot - softmax
            if slope is not None:
                d_logits.mul_(slope)

            d_logits = d_logits.to(hidden.dtype)  # (R, W)
            grad_hidden += matmul_fp32(d_logits, head[words])
            grad_head[words] = d_logits.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_head, None, None, None


def softcap(logits, cap):
    """cap tanh(logits / cap), in place: never beyond the cap. None leaves them as they are."""
    if cap is None:
        return logits
    return logits.div_(cap).tanh_().mul_(cap)


def matmul_fp32(a, b):
    """Matrix product in fp32, also of bf16 matrices: a CUDA kernel does not round its sums."""
    if dist.CUDA and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def build_policy(config, dtype, device):
    """A `Policy` on meta, without values, and its buffers by name, for `materialize`.

    Raises Failure for a model without decoder blocks, or one that stores its weights otherwise.
    """
    if getattr(config, "quantization_config", None):
        raise Failure("--model: its weights are quantized; training needs them in full")
    config._attn_implementation = "packed"
    for name in list(vars(config)):
        if "drop" in name:  # two passes over the same tokens have to agree
            setattr(config, name, 0.0)
    try:
        with on_meta():
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as e:  # an unknown architecture, or a config.json that lacks a part of it
        raise Failure(
            f"--model: {config.model_type} is no language model that can be trained here ({str(e)[:150]})"
        ) from e
    check_architecture(lm)
    buffers = {name: buffer.to(device) for name, buffer in lm.named_buffers()}
    return Policy(lm), buffers


def check_architecture(lm):
    """Raise Failure where loading, sharding or the sync would not understand a model's parts."""
    family = lm.config.model_type
    head = getattr(lm, "lm_head", None)
    blocks = getattr(getattr(lm, "model", None), "layers", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or blocks is None:
        raise Failure(
            f"--model: {family} models are not made of decoder blocks (model.layers) and a head without a "
            "bias (lm_head); see the table of families in docs/families.md"
        )
    if any("expert" in name for name, _ in lm.named_parameters()):
        raise Failure(
            f"--model: {family} is a mixture of experts; its weights are stored expert by expert, which "
            "neither loading nor the sync to the engine knows"
        )


def materialize(policy, buffers, device):
    """Give a policy on meta its memory, without values, and its buffers."""
    policy.to_empty(device=device)
    for name, buffer in policy.lm.named_buffers():
        buffer.copy_(buffers[name])


# ---------------------------------------------------------------- families


@torch.no_grad()
def check_family(config, device):
    """Does packed training compute what `transformers` does? -> largest difference of log-probs

    Every run begins with it. A family that does something of its own (a window, a cap, a bias in a
    place of its choice) would otherwise be trained on wrong numbers without a word. Raises Failure
    for such a family.
    """
    small = shrink(config)
    policy, buffers = build_policy(small, torch.float32, device)
    materialize(policy, buffers, device)
    noise = torch.Generator().manual_seed(0)
    randomize(policy.lm, noise)
    try:
        difference = compare_with_transformers(policy, noise, device)
    except Exception as e:
        raise Failure(
            f"--model: a forward pass of {config.model_type} over packed rows ends in {type(e).__name__} "
            f"({str(e)[:100]}); see the table of families in docs/families.md"
        ) from e
    if not difference < 1e-3:
        raise Failure(
            f"--model: {config.model_type} computes something that packed training does not know: log-probs "
            f"differ by {difference:.2g} from transformers' own; see the table of families in docs/families.md"
        )
    if device.type == "cuda":  # not in a dry run, which has no device even where there are cards
        check_kernel(
            config.num_attention_heads, config.num_key_value_heads, head_width(config), device
        )
    return difference


def shrink(config):
    """A copy of a configuration that is quick to compute and leaves nothing out.

    It has one block of every kind and the model's width, but few words, a narrow MLP, and a window
    shorter than the rows of `compare_with_transformers`.
    """
    small = copy.deepcopy(config)
    layers = config.num_hidden_layers
    # Settings that are lists of one value a layer (layer_types, no_rope_layers) tell the kinds
    # apart.
    by_layer = {
        name: values
        for name, values in vars(config).items()
        if isinstance(values, list) and len(values) == layers
    }
    first_of_kind = {}  # {values of a layer: the first layer with them}
    for layer in range(layers):
        kind = tuple(values[layer] for values in by_layer.values())
        first_of_kind.setdefault(kind, layer)
    for name, values in by_layer.items():
        setattr(small, name, [values[layer] for layer in first_of_kind.values()])

    small.num_hidden_layers = len(first_of_kind)
    small.vocab_size = SMALL_VOCABULARY
    small.pad_token_id = None
    sizes = {"sliding_window": 4, "attention_chunk_size": 4, "intermediate_size": 64}
    for name, size in sizes.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, size)
    return small


SMALL_VOCABULARY = 256  # of a shrunk model


def randomize(lm, noise):
    """Random values for all parameters, so that none can be left out unnoticed.

    noise  a generator
    """
    for name, parameter in lm.named_parameters():
        is_matrix = parameter.dim() > 1
        std = parameter.shape[-1] ** -0.5 if is_matrix else 0.1
        mean = 1.0 if "norm" in name and not is_matrix else 0.0
        parameter.copy_(torch.randn(parameter.shape, generator=noise) * std + mean)
    lm.tie_weights()


def compare_with_transformers(policy, noise, device):
    """Largest difference of log-probs between packed rows and the model's own forward pass.

    The model sees the same rows one by one. noise: a generator, for their tokens
    """

    def draw(count):
        return torch.randint(SMALL_VOCABULARY, (count,), generator=noise).tolist()

    groups = [(draw(7), [draw(5), draw(9)]), (draw(3), [draw(6)])]
    (batch,) = pack(groups, 1000, device)
    packed = policy(batch)  # (R,)
    policy.lm.config._attn_implementation = "eager"
    own = [
        own_logprobs(policy.lm, prompt, response, device)
        for prompt, responses in groups
        for response in responses
    ]
    return (packed - torch.cat(own)).abs().max().item()


def own_logprobs(lm, prompt, response, device):
    """Log-probs of a response (R,) by the model's own forward pass over one sequence."""
    row = torch.tensor([[*prompt, *response]], device=device)  # (1, T)
    logits = lm(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]  # (R, V)
    targets = row[0, len(prompt) :, None]  # (R, 1)
    return logits.float().log_softmax(-1).gather(-1, targets)[:, 0]  # (R,)


# ---------------------------------------------------------------- loading and sharding


def load_policy(model, device, dtype, seed=0, trainable=True, recompute=True, shard=None):
    """A sharded policy with its weights. A collective.

    model  a folder, a hub id, or a config.json (random weights drawn from `seed`)
    shard  see `mesh_of`; the rest as for `build_sharded`

    Weights are read by DCP, each rank its own slices: nobody holds a full copy.
    """
    folder = find_model(model)
    mesh = mesh_of(device, shard)
    policy = build_sharded(config_of(folder), mesh, device, dtype, trainable, recompute)
    if str(model).endswith("config.json"):
        init_random(policy.lm, policy.lm.config.initializer_range, seed)
    else:
        check_weights(model, folder, stored_tensors(policy.lm))
        dcp.load(stored_tensors(policy.lm), storage_reader=HuggingFaceStorageReader(str(folder)))
    policy.lm.tie_weights()
    return policy


def mesh_of(device, shard=None):
    """The device mesh: one-dimensional for FSDP, or copies x shards for HSDP.

    shard  how many ranks hold one copy of the weights together, default all. With one copy a node, weights
           travel inside the node, and only gradients between nodes.
    """
    world = get_world_size()
    if shard in (None, world):
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(
        device.type, (world // shard, shard), mesh_dim_names=("copies", "shards")
    )


def build_sharded(config, mesh, device, dtype, trainable=True, recompute=True):
    """A policy whose weights have their places on all ranks, and no values yet.

    mesh       see `mesh_of`
    dtype      of the computation. Trained weights are kept in fp32 and cast for the computation;
               a frozen policy (trainable=False) is kept in `dtype`.
    recompute  activations of every block in the backward pass rather than keeping them

    Gradients are reduce-scattered at every micro-batch (with copies, also all-reduced between
    them). Summing them locally until the last one (set_requires_gradient_sync) would save traffic,
    but every rank would hold the gradients of the whole model in fp32 meanwhile: 28 GB for 7B.
    """
    master = torch.float32 if trainable else dtype
    policy, buffers = build_policy(config, master, device)
    policy.train(trainable).requires_grad_(trainable)
    if recompute and trainable:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == master else dtype, reduce_dtype=torch.float32
    )
    settings = dict(mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    for block in policy.lm.model.layers:
        fully_shard(block, **settings)
    fully_shard(policy, **settings)  # what is left: embedding, last norm, head
    materialize(policy, buffers, device)
    return policy


@torch.no_grad()
def init_random(lm, std, seed):
    """transformers' usual start: normal weights, unit norms, zero biases.

    Every tensor has a generator of its own, made of (seed, name), so that the draw does not depend
    on the number of ranks.
    """
    for name, parameter in lm.named_parameters():
        full = torch.zeros(parameter.shape)
        if name.endswith("bias"):
            pass
        elif "norm" in name:
            full.fill_(1)
        elif name.endswith("weight"):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            full.normal_(0, std, generator=generator)
        parameter.copy_(shard_like(full, parameter))


def shard_like(full, parameter):
    """A full tensor, the same on every rank, in the shards of a parameter. Nothing is sent."""
    full = full.to(parameter.device, parameter.dtype)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


@contextmanager
def on_device(device, waiting, *things):
    """Networks and optimizers on `device` within, on the device `waiting` after.

    None among them is nothing to move.
    """
    for thing in things:
        move_to(device, thing)
    try:
        yield
    finally:
        for thing in things:
            move_to(waiting, thing)


def move_to(device, thing):
    """Move a network, or the state of an optimizer."""
    if thing is None:
        return
    if isinstance(thing, nn.Module):
        thing.to(device)
        return
    for state in thing.state.values():
        for name, tensor in state.items():
            # Step counters stay where the optimizer made them: on a host it reads them at every
            # step.
            if torch.is_tensor(tensor) and tensor.dim():
                state[name] = tensor.to(device)


# ---------------------------------------------------------------- optimisation


def adamw(policy, lr, betas, weight_decay):
    """The optimizer.

    On CUDA its fused kernel needs no copy of the second moments, and does not wait for the host.
    """
    return torch.optim.AdamW(
        policy.parameters(),
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        foreach=not dist.CUDA,
        fused=dist.CUDA,
    )


def lr_schedule(step, steps, kind, warmup=0):
    """Share of the peak learning rate at a step (0-based).

    Linear over `warmup` steps, then constant, or linear to 0, or cosine to a tenth (what the
    published SFT uses).
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return 1 - progress
    if kind == "cosine":
        return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
    return 1.0


def optimizer_step(policy, optim, lr, clip):
    """Clip the gradient, step, clear. A collective. -> the global norm before clipping

    A norm that is not finite skips the step. It is global, so all ranks skip together.
    """
    norm = nn.utils.clip_grad_norm_(policy.parameters(), clip, foreach=True).full_tensor().item()
    if math.isfinite(norm):
        for group in optim.param_groups:
            group["lr"] = lr
        optim.step()
    optim.zero_grad()
    return norm


# ---------------------------------------------------------------- the model on disk


def save_model(policy, source, out, dtype, judge_json=None):
    """Write a model that `transformers` and `vllm serve` open as it is. A collective.

    source      folder whose config and tokenizer files it takes over
    out         the folder that it becomes; one that is there is replaced
    judge_json  how the trained judge wants to be asked, for judge.json (`rubrics.prompt_style` reads it)

    The folder is written under another name, forced to the disk and renamed last, so that `out` is
    whole or absent, also after a loss of power. Tensors stream to rank 0, which writes a file every
    4 GB.
    """
    out, tmp = Path(out), Path(f"{out}.tmp")
    if get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    write_tensors(policy, tmp, dtype)
    if get_rank() == 0:
        write_settings(source, tmp, dtype, judge_json)
        for file in tmp.iterdir():
            force_to_disk(file)
        force_to_disk(tmp)
        shutil.rmtree(out, ignore_errors=True)
        tmp.rename(out)
        force_to_disk(out.parent)
    barrier()


def write_tensors(policy, folder, dtype):
    """The weights of a policy as safetensors files and their index, by rank 0. A collective."""
    wanted = stored_tensors(policy.lm)  # a stray head would make vLLM untie the model
    part = {}  # the tensors of the next file
    index = {}  # {tensor name: file name}

    def write_part():
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # it is made for its owner alone
        index.update(dict.fromkeys(part, file))
        part.clear()

    for name, tensor in policy.weights(dtype):
        if get_rank() == 0 and name in wanted:
            part[name] = tensor.cpu().contiguous()
            if sum(held.nbytes for held in part.values()) > 4 * 2**30:
                write_part()
    if get_rank() == 0:
        if part:
            write_part()
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


INDEX = "model.safetensors.index.json"


def write_settings(source, folder, dtype, judge_json):
    """A model's config and tokenizer files, copied from its source, and judge.json."""
    for file in Path(source).iterdir():
        is_text = file.suffix in (".json", ".txt", ".jinja", ".model")
        if is_text and file.name not in ("config.json", INDEX):
            shutil.copy(file, folder)
    config = json.loads((Path(source) / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if judge_json:
        (folder / "judge.json").write_text(json.dumps(judge_json, indent=2) + "\n")
