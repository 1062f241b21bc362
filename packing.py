"""
Rows without padding: prompts and their responses packed into micro-batches, and attention that keeps them
apart.

A prompt is there once, and all of its responses see its keys: judge prompts are long, and a group has many
responses. What a micro-batch computes is what transformers would compute on one sequence after the other.

Letters: T packed tokens of a micro-batch, R response tokens among them, H heads, D head size.
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

import ranks
from files import fail


@dataclass
class Batch:
    """A micro-batch of packed tokens: no padding, every prompt once, its responses behind it.

    tokens     (T,)  [prompt 1 | response 1.1 | response 1.2 | ... | prompt 2 | response 2.1 | ...]
    positions  (T,)  restart at every prompt, and at the prompt's end for every response
    src        (R,)  where the hidden state sits that predicts each response token: for a response's first
                     token that is the prompt's last, shared by all responses to it
    targets    (R,)  the response tokens themselves
    rows       (R,)  which response each of them belongs to, counted in the order given to `pack`
    plan             who attends to whom
    real             1, or 0 for the stand-in that a rank without rows runs (its loss must count nothing)
    """
    tokens: torch.Tensor
    positions: torch.Tensor
    src: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    plan: "Plan"
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
            if not bins or used + need > budget:
                bins, used, opened = bins + [[]], 0, False
            if not opened:
                bins[-1].append((prompt, []))
                used, opened = used + len(prompt), True
            bins[-1][-1][1].append((row, response))
            used, row = used + len(response), row + 1
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
    most, = ranks.all_max([len(micros)])
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
            # The first response is one span with its prompt; the others meet the prompt's keys again.
            keys = [*range(start, start + P), *range(at, at + n)]
            spans.append((start, P + n, keys) if i == 0 else (at, n, keys))
            tokens += response
            positions += range(P, P + n)
            src += [start + P - 1, *range(at, at + n - 1)][:n]
            targets += response
            rows += [row] * n
    t = lambda x: torch.tensor(x, dtype=torch.long, device=device)
    return Batch(t(tokens), t(positions), t(src), t(targets), t(rows), Plan(spans, device))


# ---------------------------------------------------------------- attention
# transformers' own SDPA path silently mixes packed rows unless caches are off and masks absent, and then
# builds a T x T mask (transformers #46634). Ours takes a plan.

class Plan:
    """Who attends to whom in a micro-batch, in the form that a kernel wants, made when it is first asked for.

    spans  [(first query, number of queries n, [key, ...]), ...], covering the tokens in order. Causal from
           the end: the last query sees every key, the one before all but the last, and so on.
    """

    def __init__(self, spans, device):
        self.spans, self.device, self.masks = spans, device, {}

    @functools.cached_property
    def varlen(self):
        """For the kernel of CUDA: (key rows one after the other, or None where they are the tokens as they
        stand, cumulative lengths of queries and of keys, longest of both)."""
        cu = lambda lengths: torch.tensor([0, *lengths], device=self.device).cumsum(0, dtype=torch.int32)
        q, k = [n for _, n, _ in self.spans], [len(keys) for *_, keys in self.spans]
        rows = None if q == k else torch.tensor([i for *_, keys in self.spans for i in keys], device=self.device)
        return rows, cu(q), cu(k), max(q), max(k)

    @functools.cached_property
    def buckets(self):
        """For SDPA: spans of like shape are padded into one batched call (a call a span would cost more than
        its arithmetic at small sizes). Padding lives inside attention only: its outputs are never read.

        -> buckets  [(S spans, Q queries each, K keys each, offsets (S,): keys before a span's first query)]
           q, k     rows of all their queries (sum of S Q,) and keys (sum of S K,), bucket after bucket
           inverse  (T,) where each token's output is among those of the queries
        """
        pad = functools.partial(pad_sequence, batch_first=True, padding_value=-1)
        buckets, q_all, k_all = [], [], []
        for group in alike(self.spans):
            q = pad([torch.arange(start, start + n) for start, n, _ in group])                # (S, Q)
            k = pad([torch.tensor(keys) for *_, keys in group])                                # (S, K)
            offsets = torch.tensor([len(keys) - n for _, n, keys in group], device=self.device)
            buckets.append((*q.shape, k.shape[1], offsets))
            q_all.append(q.flatten())
            k_all.append(k.flatten())
        q, k = torch.cat(q_all), torch.cat(k_all)
        inverse = q.argsort()[-sum(n for _, n, _ in self.spans):]          # behind the padding, in order
        return buckets, *(x.to(self.device) for x in (q.clamp(min=0), k.clamp(min=0), inverse))

    def mask(self, number, window):
        """Which keys a bucket's queries see, (S, 1, Q, K); None where that is plainly causal. Padded keys lie
        behind a span's own, so the causal rule hides them from every real query."""
        if (number, window) not in self.masks:
            _, Q, K, offsets = self.buckets[0][number]
            before = (torch.arange(Q, device=self.device)[:, None] + offsets[:, None, None]
                      - torch.arange(K, device=self.device))                           # (S, Q, K) tokens ago
            seen = before >= 0 if window is None else (before >= 0) & (before < window)
            plain = not offsets.any() and (window is None or window >= K)
            self.masks[number, window] = None if plain else seen[:, None]
        return self.masks[number, window]


def alike(spans, waste=1.05, call=4096):
    """Groups of spans that one padded call may take: the plainly causal ones apart, and as many of like shape
    as cost less padding than a call of their own would."""
    groups, was_plain, area, longest = [], None, 0, 0
    for start, q, keys in sorted(spans, key=lambda s: (len(s[2]) != s[1], len(s[2]))):
        k, plain = len(keys), q == len(keys)                          # k is the group's largest so far
        if plain != was_plain or (
                max(longest, q) * k * (len(groups[-1]) + 1) > waste * (area + q * k) + call):
            groups, area, longest = groups + [[]], 0, 0
        groups[-1].append((start, q, keys))
        area, longest, was_plain = area + q * k, max(longest, q), plain
    return groups


# What models hand to their attention besides, and what of it changes nothing here.
SILENT = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}


def packed_attention(module, query, key, value, attention_mask, scaling=None, plan=None, sliding_window=None,
                     **more):
    """Attention over packed rows, as transformers calls it: query (1, H, T, D) -> (1, T, H, D). What else a
    model hands to it (a soft cap, sinks, a bias) would change the result, so it is refused."""
    if unknown := [k for k, v in more.items() if k not in SILENT and (torch.is_tensor(v) or v)]:
        fail(f"{type(module).__name__}: hands {unknown[0]} to its attention, which packed rows do not know")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))                   # (T, H, D)
    attend = varlen if ranks.CUDA and q.dtype != torch.float32 else bucketed           # its kernel has no fp32
    return attend(q, k, v, plan, scaling, sliding_window)[None], None


def varlen(q, k, v, plan, scaling, window):
    from torch.nn.attention.varlen import varlen_attn
    rows, *lengths = plan.varlen
    if rows is not None:
        k, v = k[rows], v[rows]
    return varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(window - 1 if window else -1, 0),
                       enable_gqa=True)


def bucketed(q, k, v, plan, scaling, window):
    buckets, q_rows, k_rows, inverse = plan.buckets
    # One gather for all buckets: its gradient is one scatter, where a gather a bucket would fill a T x H D
    # tensor for each.
    rows = lambda x, which, at: x.flatten(1).index_select(0, which).split([b[0] * b[at] for b in buckets])
    heads = lambda x, S, like: x.view(S, -1, *like.shape[1:]).transpose(1, 2)       # (S, H, Q or K, D)
    outs = []
    parts = zip(buckets, rows(q, q_rows, 1), rows(k, k_rows, 2), rows(v, k_rows, 2))
    for number, ((S, *_), a, b, c) in enumerate(parts):
        mask = plan.mask(number, window)
        o = F.scaled_dot_product_attention(heads(a, S, q), heads(b, S, k), heads(c, S, v), attn_mask=mask,
                                           is_causal=mask is None, scale=scaling, enable_gqa=True)
        outs.append(o.transpose(1, 2).flatten(0, 1).flatten(1))                     # (S Q, H D)
    return torch.cat(outs).index_select(0, inverse).view_as(q)


@torch.no_grad()
def check_kernel(heads, keys, width, device):
    """Does the kernel of CUDA do what SDPA does, at a model's heads, key heads and head width? A few rows with a
    shared prompt and without, with a window and without, in bf16: milliseconds, and a guard against a kernel that
    aligns its mask otherwise, or has no such width. -> largest difference"""
    draw, gap = torch.Generator().manual_seed(0), 0.0
    for groups in ([([0] * 7, [[0] * 5, [0] * 9]), ([0] * 3, [[0] * 6])], [([0] * 5, [[0] * 4])]):
        batch, = pack(groups, 1000, device)
        q, k, v = (torch.randn(len(batch.tokens), n, width, generator=draw).to(device, torch.bfloat16)
                   for n in (heads, keys, keys))
        for window in (None, 4):
            two = (kernel(q, k, v, batch.plan, width ** -0.5, window).float() for kernel in (varlen, bucketed))
            gap = max(gap, (next(two) - next(two)).abs().max().item())
    if not gap < 2e-2:
        fail(f"torch {torch.__version__}: its attention kernel for CUDA differs by {gap:.2g} from SDPA on rows with "
             "a shared prompt; training here would be wrong")
    return gap


AttentionInterface.register("packed", packed_attention)
