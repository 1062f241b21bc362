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
from transformers import AutoModelForCausalLM

from lib import dist
from lib.chat import more_ends
from lib.checkpoint import force_to_disk
from lib.dist import full_of, local_shard, print0, shard_like
from lib.files import Failure, read_object
from lib.lora import (
    LoRALinear,
    adapted_layers,
    adapter_tensors,
    add_adapters,
    init_adapters,
    merge_adapter,
    merged_shard,
    peft_config,
)
from lib.model_files import (
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    INDEX,
    check_weights,
    config_of,
    find_adapter,
    find_model,
    head_width,
    is_adapter_tensor,
    on_meta,
    stored_tensors,
    weight_files,
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
        self.host_copies = {}  # {frozen parameter: its shard in host memory, bytes on the device}
        self.frozen_is_free = False
        self.changed_entries = {}  # {adapted layer: how many entries its adapter changes}, see `weights`

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
        """Stream (name, full tensor) in module order, by Hugging Face names, with adapters merged.

        A collective: every rank iterates to the end.

        Casting before gathering halves the traffic. A tied head comes last, by its own name: vLLM's
        CPU build packs a copy of it, which the embedding's name does not reach.

        Counts meanwhile what `lora_changed` needs: a comparison, and a byte an entry, for one merged
        matrix at a time.
        """
        tied = self.lm.config.tie_word_embeddings
        for name, parameter in self.lm.named_parameters():
            if is_adapter_tensor(name):  # it comes merged
                continue
            shard = local_shard(parameter)  # this rank's rows
            if self.frozen_is_free and parameter in self.host_copies:
                copy, _ = self.host_copies[parameter]
                shard = copy.to(shard.device, non_blocking=True)
            shard = shard.to(dtype or parameter.dtype)
            layer = self.lm.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, LoRALinear) and parameter is layer.weight:
                merged = merged_shard(layer, shard)
                self.changed_entries[layer] = (merged != shard).sum()
                shard = merged
            full = full_of(shard, parameter)
            if tied and name == "model.embed_tokens.weight":
                head = full  # (V, hidden)
            yield name, full
        if tied:
            yield "lm_head.weight", head

    def lora_changed(self):
        """{"lora_changed": share of the adapted weights' entries that differ from those of the base}.

        As `weights` gave them the last time; {} without adapters. Near 0 rounding takes the updates
        away: what samples, and learns, is still the base. A collective.
        """
        layers = self.changed_entries
        if not layers:
            return {}
        changed = sum(count.item() for count in layers.values())
        entries = sum(local_shard(layer.weight).numel() for layer in layers)
        changed, entries = dist.all_sum([changed, entries])
        return {"lora_changed": changed / entries}

    # Frozen weights never change. So one copy in host memory, made once, is enough for them to leave
    # the card at no cost while they are not used.

    @torch.no_grad()
    def free_frozen(self):
        """Give back the memory of all frozen weights, of which a copy stays in host memory.

        Until `restore_frozen` the network cannot compute, but `weights` reads the copy.
        """
        frozen = self.frozen()
        shards = [local_shard(parameter) for parameter in frozen]
        memories = [shard.untyped_storage() for shard in shards]  # FSDP may have padded a shard
        if not self.host_copies:
            sizes = [memory.nbytes() for memory in memories]
            self.host_copies = dict(zip(frozen, zip(copy_to_host(shards), sizes)))
        for memory in memories:
            memory.resize_(0)  # as FSDP frees what it has gathered
        self.frozen_is_free = True

    @torch.no_grad()
    def restore_frozen(self):
        """Bring the frozen weights back to the memory that `free_frozen` gave back."""
        if not self.frozen_is_free:
            return
        for parameter in self.frozen():
            shard = local_shard(parameter)
            copy, size = self.host_copies[parameter]
            shard.untyped_storage().resize_(size)
            shard.copy_(copy, non_blocking=True)
        self.frozen_is_free = False

    def frozen(self):
        return [p for p in self.parameters() if not p.requires_grad]


# What `copy_to_host` has pinned. It is kept: memory that is freed while it is pinned comes to its next
# owner as pinned, and cannot be pinned again.
PINNED = []


def copy_to_host(tensors):
    """Copies of tensors in one piece of host memory, which is pinned where there is a card.

    Its size is the sum of theirs. torch's own pinned memory (`pin_memory=True`) rounds every block up
    to a power of two, and would take up to twice as much. Pinned memory stays until the process
    ends, also where the copies are dropped.
    """
    sizes = [-(-tensor.nbytes // 512) * 512 for tensor in tensors]  # each begins where any type may
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    if dist.CUDA and sizes:  # cards copy from pinned memory at full speed, and without waiting
        register = torch.cuda.cudart().cudaHostRegister
        torch.cuda.check_error(register(memory.data_ptr(), memory.nbytes, 0))
        PINNED.append(memory)
    return [
        piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        for tensor, piece in zip(tensors, memory.split(sizes))
    ]


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
        # Not under adapters, where the head is frozen: a third of this pass, and a copy of the head.
        grad_head = torch.empty_like(head) if ctx.needs_input_grad[1] else None  # (V, hidden)
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
            if grad_head is not None:
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
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
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


def materialize_whole(policy, device):
    """The same for parameters that stay whole on every rank, before anything is sharded.

    A tied pair stays one parameter; `to_empty` would make two of it.
    """
    made = {}  # {parameter on meta: the same with memory}
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                memory = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(memory, parameter.requires_grad)
            module._parameters[name] = made[parameter]


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


def load_policy(model, device, dtype, seed=0, trainable=True, recompute=True, shard=None, lora=0):
    """A sharded policy with its weights. A collective.

    model  a folder, a hub id, or a config.json (random weights drawn from `seed`). An adapter's is its
           base with the adapter merged
    shard  see `mesh_of`; the rest as for `build_sharded`

    Weights are read by DCP, each rank its own slices: nobody holds a full copy.
    """
    folder = find_model(model, adapter=True)
    mesh = mesh_of(device, shard)
    policy = build_sharded(config_of(folder), mesh, device, dtype, trainable, recompute, lora)
    if str(model).endswith("config.json"):
        init_random(policy.lm, policy.lm.config.initializer_range, seed)
    else:
        check_weights(model, folder, policy.lm)
        dcp.load(stored_tensors(policy.lm), storage_reader=weights_reader(folder))
    policy.lm.tie_weights()
    if adapter := find_adapter(model):
        merge_adapter(policy.lm, adapter, dtype)
    init_adapters(policy.lm, seed)
    return policy


def weights_reader(folder):
    """DCP's reader of a model folder, for the files alone that are the model's weights.

    By itself it reads every *.safetensors file in a folder.
    """
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs.ls = lambda _: [str(path) for path in weight_files(folder)]
    return reader


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


def build_sharded(config, mesh, device, dtype, trainable=True, recompute=True, lora=0):
    """A policy whose weights have their places on all ranks, and no values yet.

    mesh       see `mesh_of`
    dtype      of the computation. Trained weights are kept in fp32 and cast for the computation;
               frozen ones are kept in `dtype`.
    trainable  False: all weights are frozen
    recompute  activations of every block in the backward pass rather than keeping them
    lora       rank of the adapters that are trained on frozen weights; 0: all weights are trained

    Where a rank holds a whole copy of the weights, FSDP has the adapters alone: around frozen
    weights it would keep a second copy of the largest block, and copy all weights in every pass.

    Gradients are reduce-scattered at every micro-batch (with copies, also all-reduced between
    them). Summing them locally until the last one (set_requires_gradient_sync) would save traffic,
    but every rank would hold the gradients of the whole model in fp32 meanwhile: 28 GiB for 7B.
    """
    master = torch.float32 if trainable and not lora else dtype
    policy, buffers = build_policy(config, master, device)
    policy.train(trainable).requires_grad_(trainable)
    if lora:
        add_adapters(policy.lm, lora)
    if recompute and trainable:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    is_cast = trainable and dtype != torch.float32  # what is trained is kept in fp32
    precision = MixedPrecisionPolicy(
        param_dtype=dtype if is_cast else None, reduce_dtype=torch.float32
    )
    settings = dict(mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    whole = lora and mesh.shape[-1] == 1
    if whole:
        materialize_whole(policy, device)
        settings["ignored_params"] = set(policy.frozen())
    for block in policy.lm.model.layers:
        fully_shard(block, **settings)
    fully_shard(policy, **settings)  # what is left: embedding, last norm, head
    if not whole:
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


class Offload:
    """Keeps what is not in use in host memory: frozen weights of networks, states of optimizers.

    active  False: everything stays where it is
    device  where things are used
    """

    def __init__(self, active, device):
        self.active = active
        self.device = device

    def park(self, *things):
        """To host memory. None among them, or a function, has nothing to move."""
        if not self.active:
            return
        for thing in things:
            if isinstance(thing, Policy):
                thing.free_frozen()
            elif isinstance(thing, torch.optim.Optimizer):
                move_state(thing, torch.device("cpu"))

    def fetch(self, *things):
        """Back to the device."""
        if not self.active:
            return
        for thing in things:
            if isinstance(thing, Policy):
                thing.restore_frozen()
            elif isinstance(thing, torch.optim.Optimizer):
                move_state(thing, self.device)

    @contextmanager
    def use(self, thing):
        """On the device within, in host memory after."""
        self.fetch(thing)
        try:
            yield
        finally:
            self.park(thing)


def move_state(optim, device):
    """Move the state of an optimizer.

    Step counters stay where the optimizer made them: on a host it reads them at every step.
    """
    for state in optim.state.values():
        for name, tensor in state.items():
            if torch.is_tensor(tensor) and tensor.dim():
                state[name] = tensor.to(device)


# ---------------------------------------------------------------- optimisation


def adamw(policy, lr, betas, weight_decay):
    """The optimizer of the weights that are trained.

    On CUDA its fused kernel needs no copy of the second moments, and does not wait for the host.
    """
    return torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
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


def save_model(policy, source, out, dtype, judge_json=None, ends=()):
    """Write a model that `transformers` and `vllm serve` open as it is. A collective.

    source      folder whose config and tokenizer files it takes over
    out         the folder that it becomes; one that is there is replaced
    judge_json  how the trained judge wants to be asked, for judge.json (`rubrics.prompt_style` reads it)
    ends        ids that end a turn (`load_tokenizer`), for generation_config.json where vLLM would not know them

    The folder is written under another name, forced to the disk and renamed last, so that `out` is
    whole or absent, also after a loss of power. Tensors stream to rank 0, which writes a file every
    4 GiB.
    """
    with whole_or_absent(out) as tmp:
        write_tensors(policy, tmp, dtype)
        if get_rank() == 0:
            write_settings(source, tmp, dtype, judge_json, ends)
    changed = policy.lora_changed()
    if changed:
        print0(
            f"{changed['lora_changed']:.1%} of the adapted weights' entries differ from the base's"
        )
    print0(f"wrote {out}")


@contextmanager
def whole_or_absent(out):
    """A folder that rank 0 fills within, and that has the name `out` after. A collective."""
    out, tmp = Path(out), Path(f"{out}.tmp")
    if get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    yield tmp
    if get_rank() == 0:
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


def write_settings(source, folder, dtype, judge_json, ends=()):
    """A model's config and tokenizer files, copied from its source, and judge.json; arguments as of `save_model`."""
    for file in Path(source).iterdir():
        is_text = file.suffix in (".json", ".txt", ".jinja", ".model")
        # With an adapter's settings beside it, transformers would take the model for an adapter.
        if is_text and file.name not in ("config.json", INDEX, ADAPTER_CONFIG):
            shutil.copy(file, folder)
    config = json.loads((Path(source) / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = folder / "generation_config.json"
    if len(ends) > 1 and not set(ends) <= set(more_ends(folder)):
        settings = read_object(generation) if generation.exists() else {}
        generation.write_text(json.dumps(settings | {"eos_token_id": list(ends)}, indent=2) + "\n")
    write_judge_json(folder, judge_json)


def write_judge_json(folder, judge_json):
    if judge_json:
        (folder / "judge.json").write_text(json.dumps(judge_json, indent=2) + "\n")


def save_adapter(policy, model, run_config, out):
    """Write the adapters of a policy, if it has any, in PEFT's format. A collective.

    model       what the run started from, the base
    run_config  with its fingerprint, which base.json keeps beside the adapter, and the judge's style
    out         the folder that it becomes, whole or absent

    Random weights, and those of another adapter merged, are in no folder that PEFT could open: then
    there is no adapter, and the merged model has it all.
    """
    if not adapted_layers(policy):
        return
    if str(model).endswith("config.json") or find_adapter(model):
        print0(f"no {out}: its base, {model} as this run started from it, is in no model's folder")
        return
    with whole_or_absent(out) as tmp:
        tensors = adapter_tensors(policy.lm)
        if get_rank() == 0:
            held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, tmp / ADAPTER_TENSORS, metadata={"format": "pt"})
            (tmp / ADAPTER_TENSORS).chmod(0o644)  # it is made for its owner alone
            is_local = Path(model).exists()  # then from anywhere, not only from this folder
            config = peft_config(policy.lm, str(Path(model).resolve() if is_local else model))
            (tmp / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))
            (tmp / ADAPTER_BASE).write_text(json.dumps({"fingerprint": run_config["weights"]}))
            write_judge_json(tmp, run_config["judge"])
    print0(f"wrote {out}")
