"""
The network under training: loading and sharding, families, log-probs, optimizer, the model on disk.

A policy sees packed tokens and gives log-probs; it knows nothing of judgments. The same code runs in one
process on a CPU, under `torchrun --nproc_per_node 2` with gloo, and on many nodes with NCCL: parameters
are always FSDP2 shards, also when there is one rank.

Letters: T packed tokens of a micro-batch, R response tokens among them, V vocabulary.
"""
import copy
import json
import math
import re
import shutil
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ranks
from files import fail
from packing import check_kernel, pack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------- the model

class Policy(nn.Module):
    """A causal language model from `transformers` that maps a packed batch to its response log-probs."""

    def __init__(self, lm):
        super().__init__()
        self.lm, config = lm, lm.config
        # What some families do to their logits: Cohere and Granite scale them, Gemma bends them towards a
        # cap: cap tanh(scale x / cap) is scale times a bend of x towards cap / scale.
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        cap = getattr(config, "final_logit_softcapping", None)
        self.cap = cap and cap / self.scale

    def forward(self, batch, temperature=1.0):
        """Log-prob of every response token, (R,) in fp32, under softmax(logits / temperature). The
        vocabulary projection sees response positions only."""
        # Not by calling the model: where vLLM has no model of its own for a family it runs transformers'
        # class, and puts a __call__ of its own into that, for all who have one in this process.
        hidden = nn.Module.__call__(
            self.lm.model, input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False,
            plan=batch.plan).last_hidden_state[0]                                          # (T, hidden)
        return TokenLogProbs.apply(hidden.index_select(0, batch.src), self.lm.lm_head.weight, batch.targets,
                                   temperature / self.scale, self.cap)

    @torch.no_grad()
    def weights(self, dtype=None):
        """Stream the full tensors in module order under their Hugging Face names. A collective: every rank
        iterates to the end. Casting before gathering halves the traffic. A tied head comes last, by its own
        name: vLLM's CPU build packs a copy of it, which the embedding's name does not reach."""
        tied = self.lm.config.tie_word_embeddings
        for name, p in self.lm.named_parameters():
            full = p.detach().to(dtype or p.dtype).full_tensor()
            if tied and name == "model.embed_tokens.weight":
                head = full
            yield name, full
        if tied:
            yield "lm_head.weight", head


LOGITS = 2**25             # at a time: 128 MB in fp32. Fewer would have a card read the head too often


class TokenLogProbs(torch.autograd.Function):
    """log softmax(logits / temperature) at targets, logits = hidden head^T, or cap tanh(hidden head^T / cap):
    (R, hidden), (V, hidden), (R,) -> (R,) in fp32.

    LOGITS logits exist at a time, and they are computed again in the backward pass. That goes by slices of
    the vocabulary: a slice of the head's gradient is one product over all tokens, summed in fp32 inside it
    and rounded once, where a sum over chunks of tokens would round to bf16 at every chunk.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, cap=None):
        size = max(1, LOGITS // head.shape[0])
        norm, at = (torch.empty(len(targets), device=head.device) for _ in "12")
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            logits = bend(product(hidden[rows], head.T), cap).div_(temperature)         # (rows, V)
            at[rows] = logits.gather(-1, targets[rows, None])[:, 0]
            norm[rows] = logits.logsumexp(-1)
        ctx.save_for_backward(hidden, head, targets, norm)
        ctx.temperature, ctx.cap = temperature, cap
        return at - norm

    @staticmethod
    def backward(ctx, grad):
        """d logp_r / d logit_rv = 1[v = target_r] - softmax_rv, over the temperature, and times the slope of
        the bend, 1 - (logit / cap)^2."""
        hidden, head, targets, norm = ctx.saved_tensors
        cap, grad = ctx.cap, grad[:, None] / ctx.temperature
        to_hidden, to_head = torch.zeros_like(hidden, dtype=torch.float32), torch.empty_like(head)
        size = max(1, LOGITS // len(targets))
        for start in range(0, len(head), size):
            words = slice(start, start + size)
            d = bend(product(hidden, head[words].T), cap)
            slope = cap and 1 - (d / cap).square_()
            d = d.div_(ctx.temperature).sub_(norm[:, None]).exp_().mul_(-grad)
            here = ((targets >= start) & (targets < start + size))[:, None]
            d.scatter_add_(1, (targets[:, None] - start).clamp(0, d.shape[1] - 1), grad * here)
            d = (d.mul_(slope) if cap else d).to(hidden.dtype)                          # (R, words)
            to_hidden += product(d, head[words])
            to_head[words] = d.T @ hidden
        return to_hidden.to(hidden.dtype), to_head, None, None, None


def bend(logits, cap):
    """cap tanh(logits / cap), in place: never beyond the cap. None leaves them as they are."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def product(a, b):
    """Matrix product in fp32, also of bf16 matrices: a CUDA kernel does not round its sums."""
    if ranks.CUDA and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def resolve(model, weights=True):
    """The local folder of a model: a path as it is, a hub id downloaded (safetensors only, never pickles),
    with or without its weights. `folder/config.json` is a folder too: it means random weights. -> Path"""
    path = Path(model)
    if path.is_dir() or path.is_file():
        folder = path if path.is_dir() else path.parent
        if not (folder / "config.json").exists() or (path.is_file() and path.name != "config.json"):
            fail(f"--model {model}: expected a model folder with a config.json, or that config.json itself")
        if weights and path.is_dir() and not any(path.glob("*.safetensors")):
            fail(f"--model {model}: the folder has no *.safetensors weights"
                 f" (for random weights name {path / 'config.json'})")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or str(model).startswith("runs/"):
        fail(f"--model {model}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(model, allow_patterns=[
            "*.json", "*.txt", "*.jinja", "*.model", *(["*.safetensors"] if weights else [])]))
    except Exception as e:                  # the hub raises a dozen types; each means: cannot be had
        fail(f"--model {model}: no such folder, and the hub could not give it ({type(e).__name__})")


def first_line(error):
    return (str(error) or repr(error)).splitlines()[0][:150]


def load_tokenizer(folder):
    """The tokenizer of a model folder, and the ids that end its turn. -> tokenizer, [ids]"""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        path, text = Path(folder) / "generation_config.json", "Judge A and B."
        more = json.loads(path.read_text()).get("eos_token_id") or [] if path.exists() else []
        whole = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)).strip() == text
    except Exception as e:                  # a folder's files can be broken in as many ways as they have parsers
        fail(f"--model {folder}: no usable tokenizer in it ({first_line(e)})")
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        fail(f"--model {folder}: its tokenizer lacks a chat template or an end-of-turn token")
    if not whole:                           # without its tokenizer.json it has no vocabulary, and says nothing
        fail(f"--model {folder}: its tokenizer does not give a text back; is its tokenizer.json missing?")
    stop = [tokenizer.eos_token_id]
    return tokenizer, stop + [i for i in (more if isinstance(more, list) else [more]) if i not in stop]


def config_of(folder):
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as e:                  # as above
        fail(f"--model {folder}: its config.json cannot be read ({first_line(e)})")


def window_of(config):
    """The most tokens of a sequence. Rotary tables that depend on the longest sequence around (dynamic,
    longrope) differ between packed rows and the engine: they end where that begins."""
    rope = getattr(config, "rope_parameters", None) or {}
    short = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return short if rope.get("rope_type") in ("dynamic", "longrope") else config.max_position_embeddings


def on_meta():
    """Modules made within have their parameters on the meta device; their buffers (rotary tables, scales) are
    real, because no file brings them. One that is there already is being tied: it stays the same object."""
    return register_module_parameter_registration_hook(
        lambda module, name, p: p if p.is_meta else nn.Parameter(p.to("meta"), p.requires_grad))


def build(config, dtype, device):
    """A `Policy` without values in its parameters, on meta, and its buffers by name, to put back with `fill`
    once it has been sharded. Refused is what has no decoder blocks, or stores its weights otherwise."""
    if getattr(config, "quantization_config", None):
        fail("--model: its weights are quantized; training needs them in full")
    config._attn_implementation = "packed"
    for k in [k for k in vars(config) if "drop" in k]:      # two passes over the same tokens have to agree
        setattr(config, k, 0.0)
    try:
        with on_meta():
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as e:                  # an unknown architecture, or a config.json that lacks a part of it
        fail(f"--model: {config.model_type} is no language model that can be trained here ({str(e)[:150]})")
    head, blocks = getattr(lm, "lm_head", None), getattr(getattr(lm, "model", None), "layers", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or blocks is None:
        fail(f"--model: {config.model_type} models are not made of decoder blocks (model.layers) and a head "
             "without a bias (lm_head); see the table of families in docs/training.md")
    if any("expert" in name for name, _ in lm.named_parameters()):
        fail(f"--model: {config.model_type} is a mixture of experts; its weights are stored expert by expert, "
             "which neither loading nor the sync to the engine knows")
    return Policy(lm), {name: b.to(device) for name, b in lm.named_buffers()}


def fill(policy, buffers, device):
    policy.to_empty(device=device)
    for name, b in policy.lm.named_buffers():
        b.copy_(buffers[name])


@torch.no_grad()
def check_family(config, device):
    """Does packed training compute what `transformers` does? Log-probs of a few packed rows through `Policy`
    and, one by one, through the model's own forward pass, in fp32: random weights, a block of each kind and
    the model's width, but few words, a narrow MLP, and a window shorter than the rows. Every run begins with
    it: a family that does something of its own (a window, a cap, a bias in a place of its choice) would else
    be trained on wrong numbers without a word. -> largest difference"""
    small, layers = copy.deepcopy(config), config.num_hidden_layers
    by_layer = {k: v for k, v in vars(small).items() if isinstance(v, list) and len(v) == layers}
    kinds = list(zip(*by_layer.values())) or [()] * layers
    first = sorted(kinds.index(kind) for kind in set(kinds))               # one layer of every kind
    for k, v in by_layer.items():
        setattr(small, k, [v[i] for i in first])
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = len(first), 256, None
    for k, size in (("sliding_window", 4), ("attention_chunk_size", 4), ("intermediate_size", 64)):
        if isinstance(getattr(small, k, None), int):
            setattr(small, k, size)
    policy, buffers = build(small, torch.float32, device)
    fill(policy, buffers, device)
    noise = torch.Generator().manual_seed(0)
    for name, p in policy.lm.named_parameters():
        width = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1
        p.copy_(torch.randn(p.shape, generator=noise) * width + (p.dim() == 1 and "norm" in name))
    policy.lm.tie_weights()
    ids = lambda n: torch.randint(256, (n,), generator=noise).tolist()
    groups = [(ids(7), [ids(5), ids(9)]), (ids(3), [ids(6)])]
    try:
        batch, = pack(groups, 1000, device)
        ours = policy(batch)
        small._attn_implementation = "eager"
        own = torch.cat([own_logprobs(policy.lm, p, r, device) for p, responses in groups for r in responses])
        gap = (ours - own).abs().max().item()
    except Exception as e:
        fail(f"--model: a forward pass of {config.model_type} over packed rows ends in {type(e).__name__} "
             f"({str(e)[:100]}); see the table of families in docs/training.md")
    if not gap < 1e-3:
        fail(f"--model: {config.model_type} computes something that packed training does not know: log-probs "
             f"differ by {gap:.2g} from transformers' own; see the table of families in docs/training.md")
    if device.type == "cuda":                # not in a dry run, which has no device even where there are cards
        check_kernel(config.num_attention_heads, config.num_key_value_heads, head_width(config), device)
    return gap


def head_width(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def own_logprobs(lm, prompt, response, device):
    """Log-probs of a response (R,) by the model's own forward pass over one sequence."""
    row = torch.tensor([prompt + response], device=device)
    logits = lm(input_ids=row, use_cache=False).logits[0, len(prompt) - 1:-1].float()
    return logits.log_softmax(-1).gather(-1, row[0, len(prompt):, None])[:, 0]


def load(model, device, dtype, seed=0, trainable=True, recompute=True, shard=None):
    """A sharded policy from a folder, a hub id, or a config.json (random weights drawn from `seed`); the rest
    as for `sharded`. Weights are read by DCP, each rank its own slices: nobody holds a full copy."""
    folder = resolve(model)
    policy = sharded(config_of(folder), mesh_of(device, shard), device, dtype, trainable, recompute)
    if str(model).endswith("config.json"):
        init_random(policy.lm, policy.lm.config.initializer_range, seed)
    else:
        check_weights(model, folder, names(policy.lm))
        dcp.load(names(policy.lm), storage_reader=HuggingFaceStorageReader(str(folder)))
    policy.lm.tie_weights()
    return policy


def mesh_of(device, shard=None):
    """The ranks as FSDP wants them. shard: how many hold one copy of the weights together, default all; with
    those of a node weights travel inside nodes, and only gradients between them (HSDP)."""
    world = dist.get_world_size()
    if shard in (None, world):
        return dist.init_device_mesh(device.type, (world,))
    return dist.init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=("copies", "shards"))


def sharded(config, mesh, device, dtype, trainable=True, recompute=True):
    """A policy whose weights have their places on all ranks, and no values yet.

    dtype      of the computation. Trained weights are kept in fp32 and cast for the computation;
               a frozen policy (trainable=False) is kept in `dtype`.
    recompute  activations of every block in the backward pass rather than keeping them
    """
    master = torch.float32 if trainable else dtype
    policy, buffers = build(config, master, device)
    policy.train(trainable).requires_grad_(trainable)
    if recompute and trainable:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    how = dict(mesh=mesh, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(
        param_dtype=None if dtype == master else dtype, reduce_dtype=torch.float32))
    for block in policy.lm.model.layers:
        fully_shard(block, **how)
    fully_shard(policy, **how)                          # what is left: embedding, last norm, head
    fill(policy, buffers, device)
    return policy


def names(lm):
    """{name: tensor} of what a model's files have: of a tied pair only the embedding."""
    return {k: v for k, v in lm.state_dict().items() if not (
        k == "lm_head.weight" and lm.config.tie_word_embeddings)}


def check_weights(model, folder, wanted=None):
    """Are all tensors of a model in its files, in the model's shapes? wanted: {name: tensor}; without it,
    those of the folder's configuration, for an engine that would run with what is in memory where a part of a
    matrix is missing. Files that name their tensors otherwise are then left to the engine."""
    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as e:                              # safetensors, or an index, that is cut short
        fail(f"--model {model}: its weights cannot be read ({first_line(e)})")
    if wanted is None:
        try:
            with on_meta():
                wanted = names(AutoModelForCausalLM.from_config(config_of(folder)))
        except Exception:                               # a family that only the engine knows
            return
        if not set(stored) <= set(wanted):
            return
    if missing := sorted(set(wanted) - set(stored)):
        fail(f"--model {model}: the weights lack {len(missing)} tensors, the first is {missing[0]}")
    for name, tensor in wanted.items():
        if (has := tuple(stored[name].size)) != tuple(tensor.shape):
            fail(f"--model {model}: {name} has the shape {has}, its config.json says {tuple(tensor.shape)}")


@torch.no_grad()
def init_random(lm, std, seed):
    """transformers' usual start: normal weights, unit norms, zero biases. Every tensor has a generator of its
    own, made of (seed, name), so that the draw does not depend on the number of ranks."""
    for name, p in lm.named_parameters():
        full = torch.zeros(p.shape)
        if "norm" in name:
            full.fill_(1)
        elif name.endswith("weight"):
            full.normal_(0, std, generator=torch.Generator().manual_seed(
                zlib.crc32(f"{seed}/{name}".encode())))
        full = full.to(p.device, p.dtype)
        p.copy_(distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None))


def move(device, *things):
    """Policies and optimizers to host memory or back. None is nothing to move."""
    for thing in things:
        if isinstance(thing, nn.Module):
            thing.to(device)
        elif thing is not None:
            for state in thing.state.values():
                # Step counters stay where the optimizer made them: on a host it reads them at every step.
                state.update({k: v.to(device) for k, v in state.items() if torch.is_tensor(v) and v.dim()})


# ---------------------------------------------------------------- optimisation

def adamw(policy, lr, betas, weight_decay):
    """AdamW; on CUDA the fused kernel, which needs no copy of the second moments and no word with the host."""
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=betas, weight_decay=weight_decay,
                             foreach=not ranks.CUDA, fused=ranks.CUDA)


def schedule(step, steps, kind, warmup=0):
    """Share of the peak learning rate at a step (0-based): linear warm-up, then constant, or linear to 0,
    or cosine to a tenth (what the published SFT uses)."""
    if step < warmup:
        return (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - t, "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2}[kind]


def optimizer_step(policy, optim, lr, clip):
    """Clip the global gradient norm, step, clear. A norm that is not finite skips the step.
    -> the norm before clipping"""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), clip, foreach=True).full_tensor().item()
    if math.isfinite(norm):                                # the norm is global, so all ranks skip together
        for group in optim.param_groups:
            group["lr"] = lr
        optim.step()
    optim.zero_grad()
    return norm


# ---------------------------------------------------------------- the model on disk

def save_model(policy, source, out, dtype, form=None):
    """Write Hugging Face safetensors that `transformers` and `vllm serve` open as they are: tensors stream to
    rank 0, which writes a file every 4 GB; config and tokenizer files come from the `source` folder. `form`,
    how the judge wants to be asked, goes into judge.json (`rubrics.prompt_form` reads it).
    Written beside and renamed, so that `out` is whole or absent."""
    out, tmp = Path(out), Path(f"{out}.tmp")
    rank, part, index = dist.get_rank(), {}, {}            # part: the tensors of the next file

    def write():
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(part, tmp / file, metadata={"format": "pt"})
        (tmp / file).chmod(0o644)                          # it is made for its owner alone
        index.update(dict.fromkeys(part, file))
        part.clear()

    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    wanted = names(policy.lm)                              # a stray head would make vLLM untie the model
    for name, tensor in policy.weights(dtype):
        if rank == 0 and name in wanted:
            part[name] = tensor.cpu().contiguous()
            if sum(x.nbytes for x in part.values()) > 4 * 2**30:
                write()
    if rank == 0:
        write()
        (tmp / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for file in Path(source).iterdir():
            if file.suffix in (".json", ".txt", ".jinja", ".model") and file.name not in (
                    "config.json", "model.safetensors.index.json"):
                shutil.copy(file, tmp)
        config = json.loads((Path(source) / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (tmp / "config.json").write_text(json.dumps(config, indent=2))
        if form:
            (tmp / "judge.json").write_text(json.dumps(form, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        tmp.rename(out)
    dist.barrier()
