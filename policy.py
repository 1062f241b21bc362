"""
The network under training: packing, attention, loading and sharding, log-probs, the model on disk.

A policy sees packed tokens and gives log-probs; it knows nothing of judgments. The same code runs in one
process on a CPU, under `torchrun --nproc_per_node 2` with gloo, and on many nodes with NCCL: parameters
are always FSDP2 shards, also when there is one rank.

Letters: T packed tokens of a micro-batch, R response tokens among them, H heads, D head size, V vocabulary.
"""
import json
import math
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ranks import all_max, print0
from rubrics import fail

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------- packing

@dataclass
class Batch:
    """A micro-batch of packed tokens: no padding, every prompt once, its responses behind it.

    tokens     (T,)  [prompt 1 | response 1.1 | response 1.2 | ... | prompt 2 | response 2.1 | ...]
    positions  (T,)  restart at every prompt, and at the prompt's end for every response
    src        (R,)  where the hidden state sits that predicts each response token: for a response's first
                     token that is the prompt's last, shared by all responses to it
    targets    (R,)  the response tokens themselves
    rows       (R,)  which response each of them belongs to, counted in the order given to `pack`
    plan             who attends to whom, see `varlen_plan` and `bucket_plan`
    real             1, or 0 for the stand-in that a rank without rows runs (its loss must count nothing)
    """
    tokens: torch.Tensor
    positions: torch.Tensor
    src: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    plan: dict
    real: int = 1


def pack(groups, budget, device):
    """Cut groups into micro-batches of at most `budget` tokens, in order.

    groups  [(prompt ids, [response ids, ...]), ...]
    budget  tokens. A group that does not fit is split between its responses (its prompt is then computed
            again); a single sequence longer than the budget gets a micro-batch of its own.
    -> [Batch, ...]. The responses keep their order, so concatenating the outputs restores it.
    """
    bins, used, row = [], 0, 0
    for prompt, responses in groups:
        opened = False                       # is this prompt already in the current micro-batch?
        for response in responses:
            need = len(response) + (0 if opened else len(prompt))
            if not bins or (used + need > budget and used > 0):
                bins, used, opened = bins + [[]], 0, False
                need = len(response) + len(prompt)
            if not opened:
                bins[-1].append((prompt, []))
                opened = True
            bins[-1][-1][1].append((row, response))
            used += need
            row += 1
    return [assemble(b, device) for b in bins]


def deal(groups, world, width):
    """Share out groups ([(prompt ids, [response ids, ...]), ...]) so that every rank has about as much to do:
    the costliest first, each to the rank that has least so far. A token costs one, a pair of a query and a
    key 1 / (6 width) of that: 24 width^2 against 4 width operations a layer.
    -> [[places in groups], ...] by rank"""
    def cost(prompt, responses):
        p, r = len(prompt), [len(x) for x in responses]
        return p + sum(r) + (p * p / 2 + sum(n * p + n * n / 2 for n in r)) / (6 * width)

    costs, load, hands = [cost(*g) for g in groups], [0] * world, [[] for _ in range(world)]
    for i in sorted(range(len(groups)), key=lambda i: -costs[i]):
        to = load.index(min(load))
        load[to] += costs[i]
        hands[to].append(i)
    return [sorted(hand) for hand in hands]


def level(micros, device):
    """As many micro-batches on every rank as on the busiest: every forward and backward pass is a collective,
    and a rank that sat one out would hang the others. The stand-ins are two tokens with `real` = 0."""
    most, = all_max([len(micros)])
    spare = assemble([([0], [(0, [0])])], device)
    spare.real = 0
    return micros + [spare] * (int(most) - len(micros))


def assemble(groups, device):
    """One micro-batch from [(prompt, [(row, response), ...]), ...]."""
    tokens, positions, src, targets, rows, spans = [], [], [], [], [], []
    for prompt, responses in groups:
        start, P = len(tokens), len(prompt)
        tokens += prompt
        positions += range(P)
        for i, (row, response) in enumerate(responses):
            at, n = len(tokens), len(response)
            # The first response follows its prompt as in any sequence; the others meet the
            # prompt's keys again.
            spans.append((start, P + n, range(start, P + start + n)) if i == 0 else
                         (at, n, [*range(start, start + P), *range(at, at + n)]))
            tokens += response
            positions += range(P, P + n)
            src += [start + P - 1, *range(at, at + n - 1)][:n]
            targets += response
            rows += [row] * n
    t = lambda x: torch.tensor(x, dtype=torch.long, device=device)
    plan = varlen_plan(spans, device) if device.type == "cuda" else bucket_plan(spans)
    return Batch(t(tokens), t(positions), t(src), t(targets), t(rows), plan)


# ---------------------------------------------------------------- attention
# transformers' own SDPA path silently mixes packed rows unless caches are off and masks absent, and then
# builds a T x T mask (transformers #46634). Ours takes a plan: query spans, each with the keys it may see,
# causal from the end (the last query sees every key). Spans cover the tokens in order.

def varlen_plan(spans, device):
    """For the CUDA kernel: cumulative lengths, and one long list of key rows."""
    cu = lambda lengths: torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    q, k = [n for _, n, _ in spans], [len(keys) for _, _, keys in spans]
    return {"keys": torch.tensor([i for *_, keys in spans for i in keys], device=device), "cu_q": cu(q),
            "cu_k": cu(k), "max_q": max(q), "max_k": max(k)}


def bucket_plan(spans, waste=1.05, call=4096):
    """For a CPU: spans of like shape are padded into one batched SDPA call (a call a span would cost more
    than its arithmetic at small sizes). Padding lives inside attention only: its outputs are never read.

    -> buckets  [(S spans, Q queries each, K keys each, mask (S, 1, Q, K) or None if plainly causal), ...]
       q, k     rows of all their queries (sum of S Q,) and keys (sum of S K,), bucket after bucket
       inverse  (T,) where each token's output is among those of the queries
    """
    order = sorted(range(len(spans)), key=lambda i: (len(spans[i][2]) != spans[i][1], len(spans[i][2])))
    groups, area, cap, was_plain = [], 0, (0, 0), None
    for i in order:
        _, q, keys = spans[i]
        plain = q == len(keys)
        q_max, k_max = max(cap[0], q), max(cap[1], len(keys))
        count = len(groups[-1]) + 1 if groups else 0
        if not groups or plain != was_plain or q_max * k_max * count > waste * (area + q * len(keys)) + call:
            groups, area, q_max, k_max = groups + [[]], 0, q, len(keys)
        groups[-1].append(i)
        area, cap, was_plain = area + q * len(keys), (q_max, k_max), plain

    buckets, q_all, k_all, inverse, base = [], [], [], [0] * sum(n for _, n, _ in spans), 0
    for group in groups:
        Q = max(spans[i][1] for i in group)
        K = max(len(spans[i][2]) for i in group)
        q_rows = torch.zeros(len(group), Q, dtype=torch.long)
        k_rows = torch.zeros(len(group), K, dtype=torch.long)
        offsets = torch.zeros(len(group), 1, 1, dtype=torch.long)
        for s, i in enumerate(group):
            start, n, keys = spans[i]
            q_rows[s, :n] = torch.arange(start, start + n)
            k_rows[s, :len(keys)] = torch.tensor(keys)
            offsets[s] = len(keys) - n
            inverse[start:start + n] = range(base + s * Q, base + s * Q + n)
        # Padded keys lie behind a span's own, so the causal rule hides them from every real query.
        mask = (torch.arange(K) <= torch.arange(Q)[:, None] + offsets)[:, None]      # (S, 1, Q, K)
        buckets.append((len(group), Q, K, mask if offsets.any() else None))
        q_all, k_all, base = q_all + [q_rows.flatten()], k_all + [k_rows.flatten()], base + len(group) * Q
    return {"buckets": buckets, "q": torch.cat(q_all), "k": torch.cat(k_all),
            "inverse": torch.tensor(inverse)}


def packed_attention(module, query, key, value, attention_mask, scaling=None, plan=None, **_):
    """Attention over packed rows, as transformers calls it: query (1, H, T, D) -> (1, T, H, D)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))                   # (T, H, D)
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn
        out = varlen_attn(q, k[plan["keys"]], v[plan["keys"]], plan["cu_q"], plan["cu_k"], plan["max_q"],
                          plan["max_k"], scale=scaling, window_size=(-1, 0), enable_gqa=True)
        return out[None], None
    # One gather for all buckets: its gradient is one scatter, where a gather a bucket would fill a T x H D
    # tensor for each.
    rows = lambda x, which, at: x.flatten(1).index_select(0, plan[which]).split(
        [bucket[0] * bucket[at] for bucket in plan["buckets"]])
    heads = lambda x, S, like: x.view(S, -1, *like.shape[1:]).transpose(1, 2)       # (S, H, Q or K, D)
    outs = []
    for (S, *_, mask), a, b, c in zip(plan["buckets"], rows(q, "q", 1), rows(k, "k", 2), rows(v, "k", 2)):
        o = F.scaled_dot_product_attention(heads(a, S, q), heads(b, S, k), heads(c, S, v), attn_mask=mask,
                                           is_causal=mask is None, scale=scaling, enable_gqa=True)
        outs.append(o.transpose(1, 2).flatten(0, 1).flatten(1))                     # (S Q, H D)
    out = torch.cat(outs).index_select(0, plan["inverse"])
    return out.view(1, *q.shape), None


AttentionInterface.register("packed", packed_attention)


# ---------------------------------------------------------------- the model

class Policy(nn.Module):
    """A causal language model from `transformers` that maps a packed batch to its response log-probs."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, batch, temperature=1.0):
        """Log-prob of every response token, (R,) in fp32, under softmax(logits / temperature). The
        vocabulary projection sees response positions only."""
        hidden = self.lm.model(input_ids=batch.tokens[None], position_ids=batch.positions[None],
                               use_cache=False, plan=batch.plan).last_hidden_state[0]      # (T, hidden)
        return TokenLogProbs.apply(hidden.index_select(0, batch.src), self.lm.lm_head.weight, batch.targets,
                                   temperature)

    @torch.no_grad()
    def weights(self, dtype=None):
        """Stream the full tensors in module order under their Hugging Face names. A collective: every
        rank iterates to the end. Casting before gathering halves the traffic. For a tied model
        `lm_head.weight` comes last, as its own name: vLLM's CPU build packs a copy of it, which the
        embedding's name does not reach."""
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
    """log softmax(hidden head^T / temperature) at targets: (R, hidden), (V, hidden), (R,) -> (R,) in fp32.

    LOGITS logits exist at a time, and they are computed again in the backward pass. That goes by slices of
    the vocabulary: a slice of the head's gradient is one product over all tokens, summed in fp32 inside it
    and rounded once, where a sum over chunks of tokens would round to bf16 at every chunk.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature):
        size = max(1, LOGITS // head.shape[0])
        norm, at = (torch.empty(len(targets), device=head.device) for _ in "12")
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            logits = product(hidden[rows], head.T).div_(temperature)                    # (rows, V)
            at[rows] = logits.gather(-1, targets[rows, None])[:, 0]
            norm[rows] = logits.logsumexp(-1)
        ctx.save_for_backward(hidden, head, targets, norm)
        ctx.temperature = temperature
        return at - norm

    @staticmethod
    def backward(ctx, grad):
        """d logp_r / d logit_rv = 1[v = target_r] - softmax_rv, over the temperature."""
        hidden, head, targets, norm = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        to_hidden, to_head = torch.zeros_like(hidden, dtype=torch.float32), torch.empty_like(head)
        size = max(1, LOGITS // len(targets))
        for start in range(0, len(head), size):
            words = slice(start, start + size)
            d = product(hidden, head[words].T).div_(ctx.temperature).sub_(norm[:, None]).exp_().mul_(-grad)
            here = ((targets >= start) & (targets < start + size))[:, None]
            d.scatter_add_(1, (targets[:, None] - start).clamp(0, d.shape[1] - 1), grad * here)
            d = d.to(hidden.dtype)                                                      # (R, words)
            to_hidden += product(d, head[words])
            to_head[words] = d.T @ hidden
        return to_hidden.to(hidden.dtype), to_head, None, None


def product(a, b):
    """Matrix product in fp32, also of bf16 matrices: a CUDA kernel does not round its sums."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def resolve(model):
    """The local folder of a model: a path as it is, a hub id downloaded (safetensors only, never pickles).
    `folder/config.json` is a folder too: it means random weights. -> Path"""
    path = Path(model)
    if path.is_dir() or path.is_file():
        folder = path if path.is_dir() else path.parent
        if not (folder / "config.json").exists() or (path.is_file() and path.name != "config.json"):
            fail(f"--model {model}: expected a model folder with a config.json, or that config.json itself")
        if path.is_dir() and not any(path.glob("*.safetensors")):
            fail(f"--model {model}: the folder has no *.safetensors weights"
                 f" (for random weights name {path / 'config.json'})")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or str(model).startswith("runs/"):
        fail(f"--model {model}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(
            model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except Exception as e:                  # the hub raises a dozen types; each means: cannot be had
        fail(f"--model {model}: no such folder, and the hub could not give it ({type(e).__name__})")


def load_tokenizer(folder):
    """The tokenizer of a model folder, and the ids that end its turn. -> tokenizer, [ids]"""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as e:
        fail(f"--model {folder}: no usable tokenizer in it ({str(e).splitlines()[0][:150]})")
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        fail(f"--model {folder}: its tokenizer lacks a chat template or an end-of-turn token")
    stop, path = [tokenizer.eos_token_id], Path(folder) / "generation_config.json"
    if path.exists():
        more = json.loads(path.read_text()).get("eos_token_id") or []
        stop += [i for i in (more if isinstance(more, list) else [more]) if i not in stop]
    return tokenizer, stop


def config_of(folder):
    return AutoConfig.from_pretrained(folder)


def load(model, device, dtype, seed=0, trainable=True, recompute=True, shard=None):
    """A sharded policy from a folder, a hub id, or a config.json (random weights drawn from `seed`).

    dtype      of the computation. Trained weights are kept in fp32 and cast for the computation;
               a frozen policy (trainable=False) is kept in `dtype`.
    recompute  activations of every block in the backward pass rather than keeping them
    shard      ranks that hold one copy of the weights together, all unless said otherwise: the ranks of a
               node, say, so that weights travel inside nodes and only gradients between them (HSDP)
    Weights are read by DCP, each rank its own slices: nobody holds a full copy.
    """
    folder, random = resolve(model), str(model).endswith("config.json")
    config = config_of(folder)
    config._attn_implementation = "packed"
    master = torch.float32 if trainable else dtype
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=master)
    if recompute and trainable:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm).train(trainable).requires_grad_(trainable)

    world = dist.get_world_size()
    mesh = dist.init_device_mesh(device.type, (world,)) if shard in (None, world) else \
        dist.init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=("copies", "shards"))
    how = dict(mesh=mesh, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(
        param_dtype=None if dtype == master else dtype, reduce_dtype=torch.float32))
    for block in lm.model.layers:
        fully_shard(block, **how)
    fully_shard(policy, **how)                          # what is left: embedding, last norm, head
    policy.to_empty(device=device)
    for module in lm.modules():                         # rotary tables are no parameters: to_empty lost them
        if hasattr(module, "inv_freq"):
            with torch.device(device):
                fresh = type(module)(config=config)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    if random:
        init_random(lm, config.initializer_range, seed)
    else:
        wanted = {k: v for k, v in lm.state_dict().items() if not (
            k == "lm_head.weight" and config.tie_word_embeddings)}
        reader = HuggingFaceStorageReader(str(folder))
        missing = sorted(set(wanted) - set(reader.read_metadata().state_dict_metadata))
        if missing:
            fail(f"--model {model}: the weights lack {len(missing)} tensors, the first is {missing[0]}")
        dcp.load(wanted, storage_reader=reader)
    lm.tie_weights()
    return policy


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
                state.update({k: v.to(device) for k, v in state.items() if torch.is_tensor(v)})


def memory(config, dtype, tokens, recompute, shard, card=None, reference=False, offload=False, share=None,
           tp=1, window=0):
    """Estimate what a rank's card will hold, say so, and refuse what cannot fit, before anything is loaded.

    tokens   of a micro-batch; shard: ranks that hold one copy of the weights; card: its bytes, None for a CPU
    share    of the card that vLLM takes while it samples, None without one; window: its longest sequence
    -> GB while learning, GB while sampling
    """
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    n, one = sum(p.numel() for p in lm.parameters()), torch.empty(0, dtype=dtype).element_size()
    h, layers, block = config.hidden_size, len(lm.model.layers), sum(
        p.numel() for p in lm.model.layers[0].parameters())
    rest = n - block * layers                              # embedding, head, last norm: gathered together
    inside = one * (8 * h + 4 * config.intermediate_size)  # what a token leaves inside a block, roughly
    kv = 2 * one * config.num_key_value_heads * h // config.num_attention_heads * layers
    frozen = {"reference": one * n / shard} if reference and not offload else {}
    learn = frozen | {
        "weights, gradients and Adam": 16 * n / shard,
        "gathered layers": one * 2 * (rest + 2 * block) + 4 * max(rest, block),
        "activations": tokens * (layers * h * one + inside if recompute else layers * inside),
        "log-probs": 12 * LOGITS + 4 * tokens * h}
    sample = frozen | {"vLLM": (share or 0) * (card or 0), "a gathered layer": 2 * one * rest,
                       "weights and Adam": (4 if offload else 12) * n / shard}
    needs = {"weights": one * n / tp, "a sequence": window * kv / tp, "other": 2**31}
    total = {}
    for phase, parts in (("learning", learn), ("sampling", sample)) if share else (("learning", learn),):
        total[phase] = sum(parts.values())
        print0(f"{phase}: about {total[phase] / 2**30:.3g} GB a rank (" + ", ".join(
            f"{k} {v / 2**30:.2g}" for k, v in parts.items()) + ")")
    has = f"more than the card's {(card or 0) / 2**30:.3g} GB"
    more = ("" if offload or not share else ", give --offload") + f", or use more than {shard} ranks"
    if card and total["learning"] > 0.95 * card:
        fail(f"learning would take {has}: lower --micro-tokens {tokens}"
             + ("" if recompute else ", leave out --no-recompute") + more)
    if card and share and total["sampling"] > 0.98 * card:
        fail(f"sampling would take {has}: lower --engine-memory {share:g}" + more)
    if card and share and sum(needs.values()) > share * card:
        fail(f"vLLM needs about {sum(needs.values()) / 2**30:.3g} GB, more than --engine-memory {share:g} of "
             f"the card: raise it, or spread an engine over more ranks than --tp {tp}")
    return [t / 2**30 for t in total.values()]


# ---------------------------------------------------------------- optimisation

def adamw(policy, lr, betas, weight_decay):
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, foreach=True)


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
    norm = nn.utils.clip_grad_norm_(policy.parameters(), clip, foreach=True)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):                            # the norm is global, so all ranks skip together
        optim.zero_grad()
        return norm
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
    rank, shards, pending, size, index = dist.get_rank(), 0, {}, 0, {}

    def flush():
        nonlocal shards, pending, size
        shards += 1
        file = f"model-{shards:05d}.safetensors"
        save_file(pending, tmp / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(pending, file))
        pending, size = {}, 0

    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    tied = policy.lm.config.tie_word_embeddings
    for name, tensor in policy.weights(dtype):
        # A stray head would make vLLM untie the model.
        if rank == 0 and not (tied and name == "lm_head.weight"):
            pending[name] = tensor.cpu().contiguous()
            size += tensor.nbytes
            if size > 4 * 2**30:
                flush()
    if rank == 0:
        flush()
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
