"""
Rows without padding: prompts and responses packed into micro-batches, and their attention.

A prompt is there once, and all responses to it see its keys: judge prompts are long, and a group
has many responses. A micro-batch computes what transformers would compute on one sequence after the
other.

Attention has two implementations with one interface. A card's is `varlen`, six lines, because torch
has a kernel for it. A CPU's is `bucketed`, some sixty lines with `Plan.buckets`, `Plan.mask` and
`similar_spans`: for SDPA, which knows padded batches only. It also computes fp32 on a card.

Letters: T packed tokens of a micro-batch, R response tokens among them, H heads, D head size;
S spans, Q queries and K keys of one padded call of SDPA.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from lib import dist
from lib.dist import all_max
from lib.files import Failure


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
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    src: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    plan: "Plan"


def pack(groups, budget, device):
    """Cut groups into micro-batches of at most `budget` tokens, in order.

    groups  [(prompt ids, [response ids, ...]), ...]
    budget  tokens. A group that does not fit is split between its responses, and its prompt is then computed
            again. A single sequence longer than the budget gets a micro-batch of its own.
    -> [Batch, ...]. The responses keep their order, so concatenating the outputs restores it.
    """
    bins = []  # [[(prompt, [(row, response), ...]), ...], ...]
    used = 0  # tokens in the last bin
    row = 0
    for prompt, responses in groups:
        opened = False  # is this prompt already in the last bin?
        for response in responses:
            cost = len(response) + (0 if opened else len(prompt))
            if not bins or used + cost > budget:
                bins.append([])
                used = 0
                opened = False
            if not opened:
                bins[-1].append((prompt, []))
                used += len(prompt)
                opened = True
            _, members = bins[-1][-1]
            members.append((row, response))
            used += len(response)
            row += 1
    return [assemble(content, device) for content in bins]


def balance(groups, world, width):
    """Share out groups so that every rank has about as much work.

    groups  [(prompt ids, [response ids, ...]), ...]
    world   number of ranks
    width   hidden size of the model, see `cost_of`
    -> [[places in groups, ascending], ...], one list a rank

    Greedy: the costliest group goes first, and each to the rank that has the least work so far.
    """
    costs = [cost_of(prompt, responses, width) for prompt, responses in groups]
    loads = [0] * world
    places = [[] for _ in range(world)]
    for place in sorted(range(len(groups)), key=lambda place: -costs[place]):
        rank = loads.index(min(loads))
        loads[rank] += costs[place]
        places[rank].append(place)
    return [sorted(mine) for mine in places]


def cost_of(prompt, responses, width):
    """The work that a group makes, in tokens.

    A pair of a query and a key costs 1 / (6 width) of a token: a layer spends 24 width^2 operations
    on a token, and 4 width on a pair.
    """
    prompt_tokens = len(prompt)
    tokens = prompt_tokens
    pairs = prompt_tokens**2 / 2
    for response in responses:
        n = len(response)
        tokens += n
        pairs += n * prompt_tokens + n**2 / 2
    return tokens + pairs / (6 * width)


def equalise(micro_batches, dummy):
    """As many micro-batches on every rank as on the busiest, by adding dummies. A collective.

    Every forward and backward pass of FSDP is a collective, so a rank that left one out would hang
    the others.
    """
    most = int(all_max([len(micro_batches)])[0])
    return micro_batches + [dummy] * (most - len(micro_batches))


def dummy_batch(device):
    """A micro-batch of one prompt token and no response token (R = 0): its loss is an empty sum."""
    return assemble([([0], [(0, [])])], device)


def assemble(groups, device):
    """One micro-batch from [(prompt ids, [(row, response ids), ...]), ...]."""
    tokens, positions, sources, targets, rows, spans = [], [], [], [], [], []
    length = 0  # tokens so far
    for prompt, responses in groups:
        prompt_start, prompt_end = length, length + len(prompt)
        prompt_places = np.arange(prompt_start, prompt_end)
        tokens.append(prompt)
        positions.append(np.arange(len(prompt)))
        length = prompt_end

        for i, (row, response) in enumerate(responses):
            count = len(response)
            places = np.arange(length, length + count)
            keys = np.concatenate([prompt_places, places])
            # The first response is one span with its prompt; the others meet the prompt's keys
            # again.
            if i == 0:
                spans.append(Span(prompt_start, len(keys), keys))
            else:
                spans.append(Span(length, count, keys))

            tokens.append(response)
            positions.append(np.arange(len(prompt), len(prompt) + count))
            # Each response token is predicted at the token before it. For the first that is the
            # prompt's last. The slice drops the response's own last token, which predicts nothing,
            # and leaves nothing of a dummy's empty response.
            sources.append(np.concatenate([[prompt_end - 1], places])[:count])
            targets.append(response)
            rows.append(np.full(count, row))
            length += count
    return Batch(
        tokens=joined(tokens, device),  # (T,)
        positions=joined(positions, device),  # (T,)
        src=joined(sources, device),  # (R,)
        targets=joined(targets, device),  # (R,)
        rows=joined(rows, device),  # (R,)
        plan=Plan(spans, device),
    )


def joined(parts, device):
    """Arrays or lists of integers, one after the other, as one tensor."""
    arrays = [np.asarray(part, np.int64) for part in parts]
    return torch.from_numpy(np.concatenate(arrays)).to(device)


# ---------------------------------------------------------------- attention
# transformers' own SDPA path silently mixes packed rows unless caches are off and masks absent, and
# then builds a T x T mask (transformers #46634). Ours takes a plan.


class Span(NamedTuple):
    """Queries that stand together, and the keys that they see.

    start  the first query's place among the packed tokens
    count  number of queries
    keys   places of the keys, in order. The mask is causal, aligned to the bottom right: the last query
           sees every key, the one before it all but the last, and so on.
    """

    start: int
    count: int
    keys: np.ndarray

    @property
    def is_causal(self):
        """Is the mask the usual square one?"""
        return self.count == len(self.keys)


class Bucket(NamedTuple):
    """Spans that share one padded call of SDPA.

    spans, queries, keys  S, Q and K
    offsets               (S,) number of keys before each span's first query
    """

    spans: int
    queries: int
    keys: int
    offsets: torch.Tensor


class Plan:
    """Who attends to whom in a micro-batch, in the form that a kernel wants.

    Each form is made when a kernel first wants it.

    spans  [Span, ...], whose queries cover the T tokens in order
    """

    def __init__(self, spans, device):
        self.spans = spans
        self.device = device
        self.masks = {}  # {(bucket, window): mask}

    @functools.cached_property
    def lengths(self):
        """For `varlen`: rows, cumulative queries, cumulative keys, most queries, most keys.

        rows say where each span's keys lie among the tokens, one after the other; they are None where
        the keys are the tokens as they stand.
        """
        queries = [span.count for span in self.spans]
        keys = [len(span.keys) for span in self.spans]
        rows = None
        if queries != keys:
            rows = joined([span.keys for span in self.spans], self.device)  # (all keys,)
        return rows, self.cumulative(queries), self.cumulative(keys), max(queries), max(keys)

    def cumulative(self, counts):
        counts = torch.tensor([0, *counts], device=self.device)  # (spans + 1,)
        return counts.cumsum(0, dtype=torch.int32)  # (spans + 1,)

    @functools.cached_property
    def buckets(self):
        """For `bucketed`: spans of similar shape, padded into one call of SDPA.

        A call a span would cost more than its arithmetic at small sizes. Padding lives inside attention
        only: its outputs are never read.

        -> [Bucket, ...]
           query_rows  (sum of S Q,) tokens of all queries, bucket after bucket; padding repeats token 0
           key_rows    (sum of S K,) tokens of all keys
           inverse     (T,) where each token's output is among those of the queries
        """
        buckets, query_parts, key_parts = [], [], []
        for group in similar_spans(self.spans):
            queries = padded([np.arange(s.start, s.start + s.count) for s in group])  # (S, Q)
            keys = padded([s.keys for s in group])  # (S, K)
            offsets = [len(s.keys) - s.count for s in group]
            offsets = torch.tensor(offsets, device=self.device)  # (S,)
            buckets.append(Bucket(*queries.shape, keys.shape[1], offsets))
            query_parts.append(queries.flatten())  # (S Q,)
            key_parts.append(keys.flatten())  # (S K,)
        query_rows = torch.cat(query_parts)  # (sum of S Q,)
        key_rows = torch.cat(key_parts)  # (sum of S K,)

        # PADDING is -1, so it sorts first; behind it stand the tokens in order.
        tokens = sum(span.count for span in self.spans)
        inverse = query_rows.argsort()[-tokens:]  # (T,)
        return (
            buckets,
            query_rows.clamp(min=0).to(self.device),
            key_rows.clamp(min=0).to(self.device),
            inverse.to(self.device),
        )

    def mask(self, number, window):
        """Which keys the queries of a bucket see; None where SDPA's own causal mask does. (S, 1, Q, K)

        number  of the bucket
        window  tokens that a query sees, its own among them; None for all

        Padded keys lie behind a span's own, so the causal rule hides them from every real query.
        """
        if (number, window) not in self.masks:
            buckets, *_ = self.buckets
            _, queries, keys, offsets = buckets[number]
            query_place = torch.arange(queries, device=self.device)[:, None]  # (Q, 1)
            query_place = query_place + offsets[:, None, None]  # (S, Q, 1), among the keys
            key_place = torch.arange(keys, device=self.device)  # (K,)
            distance = query_place - key_place  # (S, Q, K)
            visible = distance >= 0  # (S, Q, K)
            if window is not None:
                visible &= distance < window
            is_causal = not offsets.any() and (window is None or window >= keys)
            self.masks[number, window] = None if is_causal else visible[:, None]
        return self.masks[number, window]


PADDING = -1  # stands for a token of no span


def padded(rows):
    """Arrays of places as one matrix, (S, longest)."""
    rows = [torch.from_numpy(row) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=PADDING)  # (S, longest)


# The cost of a call of SDPA, in scores: products of one query and one key.
# A padded call may compute PADDED_SHARE times the scores that its spans need, and CALL_OVERHEAD more, which take
# as long as one more call.
PADDED_SHARE = 1.05
CALL_OVERHEAD = 4096


def similar_spans(spans):
    """Batch spans of similar length for SDPA, as long as the padding costs less than one more call.

    -> [[Span, ...], ...]. Plainly causal spans come first and stay apart: they need no mask.
    """
    groups = []
    needed = 0  # scores that the spans of the last group need
    longest = 0  # queries of its longest span
    for span in sorted(spans, key=lambda span: (not span.is_causal, len(span.keys))):
        keys = len(span.keys)  # the group's most so far: spans come in that order
        scores = span.count * keys
        fits = False
        if groups and groups[-1][0].is_causal == span.is_causal:
            computed = (len(groups[-1]) + 1) * max(longest, span.count) * keys
            fits = computed <= PADDED_SHARE * (needed + scores) + CALL_OVERHEAD
        if not fits:
            groups.append([])
            needed = longest = 0
        groups[-1].append(span)
        needed += scores
        longest = max(longest, span.count)
    return groups


# What models also hand to their attention and what changes nothing here.
NO_EFFECT = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
}


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    plan=None,
    sliding_window=None,
    **others,
):
    """Attention over packed rows, as transformers calls it: query (1, H, T, D) -> (1, T, H, D).

    Raises Failure for anything else that a model hands to it (a soft cap, sinks, a bias): it would
    change the result.
    """
    for name, setting in others.items():
        if name not in NO_EFFECT and (torch.is_tensor(setting) or setting):
            raise Failure(
                f"{type(module).__name__}: hands {name} to its attention, which packed rows do not know"
            )
    q = query[0].transpose(0, 1)  # (T, H, D)
    k = key[0].transpose(0, 1)  # (T, key heads, D)
    v = value[0].transpose(0, 1)  # (T, key heads, D)
    has_kernel = dist.CUDA and q.dtype != torch.float32  # the kernel of CUDA has no fp32
    attend = varlen if has_kernel else bucketed
    return attend(q, k, v, plan, scaling, sliding_window)[None], None


def varlen(q, k, v, plan, scaling, window):
    """Attention by the kernel of CUDA for rows of different lengths: (T, H, D) -> (T, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    rows, *lengths = plan.lengths
    if rows is not None:
        k, v = k[rows], v[rows]  # (all keys, key heads, D)
    sees = (window - 1 if window else -1, 0)  # so many tokens to the left, none to the right
    return varlen_attn(
        q, k, v, *lengths, scale=scaling, window_size=sees, enable_gqa=True
    )  # (T, H, D)


def bucketed(q, k, v, plan, scaling, window):
    """Attention by SDPA, one padded call a bucket: (T, H, D) -> (T, H, D)."""
    buckets, query_rows, key_rows, inverse = plan.buckets
    query_sizes = [bucket.spans * bucket.queries for bucket in buckets]
    key_sizes = [bucket.spans * bucket.keys for bucket in buckets]
    # One gather for all buckets: its gradient is one scatter, where a gather a bucket would fill a
    # T x H D tensor for each.
    q_parts = q.flatten(1).index_select(0, query_rows).split(query_sizes)  # (S Q, H D) each
    k_parts = k.flatten(1).index_select(0, key_rows).split(key_sizes)  # (S K, key heads D) each
    v_parts = v.flatten(1).index_select(0, key_rows).split(key_sizes)

    def by_head(part, bucket, heads):
        return part.view(bucket.spans, -1, heads, q.shape[2]).transpose(1, 2)

    outputs = []
    for number, bucket in enumerate(buckets):
        mask = plan.mask(number, window)  # (S, 1, Q, K)
        out = F.scaled_dot_product_attention(
            by_head(q_parts[number], bucket, q.shape[1]),  # (S, H, Q, D)
            by_head(k_parts[number], bucket, k.shape[1]),  # (S, key heads, K, D)
            by_head(v_parts[number], bucket, v.shape[1]),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )  # (S, H, Q, D)
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))  # (S Q, H D)
    return torch.cat(outputs).index_select(0, inverse).view_as(q)  # (T, H, D)


@torch.no_grad()
def check_kernel(heads, key_heads, head_size, device):
    """Does the kernel of CUDA do what SDPA does, at a model's sizes? -> largest difference

    It compares a few rows with a shared prompt and without, with a window and without, in bf16.
    That takes milliseconds, and is a guard against a kernel that aligns its mask otherwise or has
    no such head size. Raises Failure where the two differ.
    """
    noise = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=noise).to(device, torch.bfloat16)

    shared = [([0] * 7, [[0] * 5, [0] * 9]), ([0] * 3, [[0] * 6])]
    single = [([0] * 5, [[0] * 4])]
    largest = 0.0
    for groups in (shared, single):
        (batch,) = pack(groups, 1000, device)
        tokens = len(batch.tokens)
        q = draw(tokens, heads, head_size)  # (T, H, D)
        k = draw(tokens, key_heads, head_size)  # (T, key heads, D)
        v = draw(tokens, key_heads, head_size)  # (T, key heads, D)
        for window in (None, 4):
            ours = varlen(q, k, v, batch.plan, head_size**-0.5, window).float()  # (T, H, D)
            sdpa = bucketed(q, k, v, batch.plan, head_size**-0.5, window).float()  # (T, H, D)
            largest = max(largest, (ours - sdpa).abs().max().item())
    if not largest < 2e-2:
        raise Failure(
            f"torch {torch.__version__}: its attention kernel for CUDA differs by {largest:.2g} from SDPA on "
            "rows with a shared prompt; training here would be wrong"
        )
    return largest


# A model finds its attention by name: policy.build_policy sets config._attn_implementation to
# "packed".
AttentionInterface.register("packed", packed_attention)
