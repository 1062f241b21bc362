"""
Stage 2: GRPO with verifiable rewards (paper section 3.3, eq. 7 to 10). The whole algorithm is on this page.

    torchrun --nproc_per_node 8 grpo.py          # the published 7B run, from the SFT model in runs/sft/model
    python grpo.py --model runs/demo/sft/model --data runs/demo/data/rl.jsonl ...     # see Makefile

Sample G judgments a pair with vLLM, reward right verdicts, take the group's mean and spread away, make a
few clipped updates, give vLLM the new weights. Every rank does its share of the sampling and of the
learning; loss, gradient and samples do not depend on how many ranks there are. Writes OUT/model,
OUT/metrics.jsonl, OUT/samples.jsonl (some judgments of every step), OUT/state.

Letters: P pairs, G judgments a pair, B judgments, R response tokens of a micro-batch, one after the other.
"""
import argparse
import hashlib
import math
import sys
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dryrun
import packing
import policy as P
import ranks as R
from engine import Engine, check_gap, check_tp, seed_of, text_of
from files import Flags, fail, number
from rubrics import Pair, chat_messages, encode, form_of, lm_as_judge, parse, prompt_form, read_pairs, verdict_reward


def arguments():
    ap = Flags(__doc__)
    R.flags(ap, model="runs/sft/model", data="gaotang/RM-R1-after-Distill-RLVR", out="runs/grpo", lr=1e-6,
            save_every=10, seed=1)
    arg, count, limit = ap.add_argument, number(int, 1), number(int, 0)
    weight, cap, share = number(float, 0), number(float, 0, above=True), number(float, 0, 1, above=True)
    arg("--val-data", help="held-out pairs, judged greedily every --val-every steps")
    arg("--val-every", type=count, default=5, help="steps between held-out evaluations")
    arg("--max-prompt", type=count, default=4096, help="longest prompt in tokens; longer ones are left out")
    arg("--max-response", type=count, default=8192, help="longest judgment in tokens")
    arg("--pairs", type=count, default=1024, help="pairs sampled before each round of updates")
    arg("--mini", type=count, default=128, help="pairs in one update")
    arg("--group", type=count, default=7, help="judgments a pair (G)")
    arg("--steps", type=count, help="rounds; default: one pass over the data")
    arg("--schedule", choices=("constant", "linear", "cosine"), default="constant", help="of the rate")
    arg("--clip", type=weight, nargs=2, default=(0.2, 0.2), help="how far a ratio may leave 1, down and up")
    arg("--beta", type=weight, default=1e-3, help="weight of the pull towards the reference; 0 loads none")
    arg("--reward", choices=("verdict", "published", "random"), default="verdict",
        help="right verdict (paper eq. 8) by the parser, or by the released rule; random: a control")
    # Variants of the objective; each has its formula and source where it is computed below.
    arg("--advantage", choices=("grpo", "drgrpo"), default="grpo", help="with its scale, or without")
    arg("--average", choices=("judgment", "token", "constant"), default="judgment", help="of token losses")
    arg("--ratio", choices=("token", "sequence"), default="token", help="sequence: GSPO")
    arg("--surrogate", choices=("clip", "cispo"), default="clip", help="what is done to the ratio")
    arg("--engine-cap", type=cap, help="weigh tokens by trainer / engine probability, at most this, e.g. 2")
    arg("--overlong", type=limit, default=0, help="tokens before the limit over which the reward falls by 1")
    arg("--both-orders", type=number(float, -math.inf), metavar="W",
        help="judge each pair in both orders (--pairs and --mini count both), W more where both are right")
    arg("--refill", type=limit, default=0, help="rounds of sampling again for groups that agree")
    arg("--engine-memory", type=share, default=0.5, help="share of each card for vLLM while it samples")
    arg("--tp", type=count, default=1, help="ranks that sample with one engine together (tensor parallel)")
    arg("--max-gap", type=weight, default=0.1, help="largest mean difference of engine and trainer log-probs")
    arg("--offload", action="store_true", help="reference and optimizer wait in host memory while not used")
    args = ap.parse_args()
    if args.group < 2:
        fail(f"--group {args.group}: a group of one has no spread, so no advantage; take at least 2")
    if args.overlong > args.max_response:
        fail(f"--overlong {args.overlong}: more than --max-response {args.max_response}")
    if args.pairs % args.mini:
        fail(f"--pairs {args.pairs} does not divide into updates of --mini {args.mini}")
    if args.both_orders is not None and args.mini % 2:
        fail(f"--mini {args.mini}: with --both-orders an update has both orders of its pairs: an even number")
    return args


# ---------------------------------------------------------------- the algorithm, without a model

def advantages(rewards, kind="grpo"):
    """(r - mean) / (std + 1e-6) within each group (paper eq. 10; sample std and 1e-6 as published).

    rewards  (P, G) -> (P, G). A group that agrees gets zeros: it teaches nothing, but its KL term still acts.
    NaN, a judgment whose reward could not be computed: advantage 0, and no part in its group's mean.
    drgrpo   r - mean, without the scale (Dr. GRPO, arXiv 2503.20783)
    """
    known = ~rewards.isnan()
    n = known.sum(1, keepdim=True).clamp(min=2)
    centred = (rewards - rewards.nanmean(1, keepdim=True)).where(known, 0)
    if kind == "drgrpo":
        return centred
    return centred / ((centred.square().sum(1, keepdim=True) / (n - 1)).sqrt() + 1e-6)


def grpo_loss(logp, old, ref, adv, weight, rows=None, engine=None, clip=(0.2, 0.2), beta=1e-3, ratio="token",
              surrogate="clip", engine_cap=None):
    """Clipped policy gradient plus a pull towards the reference (paper eq. 9), on response tokens only.

    logp, old, ref  (R,)  log-prob of each sampled token under the model we train, the model that sampled it,
                          the frozen reference (the last two without gradient)
    adv             (R,)  its judgment's advantage
    weight          (R,)  its share of the mean, see `shares`. It counts the whole update, over every rank and
                          micro-batch, so that cutting it up differently changes nothing.
    rows            (R,)  which judgment it belongs to; engine (R,) its log-prob where it was sampled
    -> loss, {"kl", "clipped"}: this micro-batch's share of the update's means
    """
    low, high = clip
    log_ratio = logp - old
    if ratio == "sequence":
        # GSPO (arXiv 2507.18071, eq. 7 and 14): a judgment's geometric mean, gradient through its tokens.
        at, none = rows - rows.min(), torch.zeros_like(logp)
        mean = none.index_add(0, at, log_ratio.detach()) / none.index_add(0, at, none + 1).clamp(min=1)
        log_ratio = mean[at] + logp - logp.detach()
    r = log_ratio.exp()                              # 1 everywhere in the first update
    if surrogate == "clip":
        gain = torch.min(r * adv, r.clamp(1 - low, 1 + high) * adv)
    else:                                            # CISPO (arXiv 2506.13585, eq. 4): no token is lost
        gain = r.clamp(1 - low, 1 + high).detach() * adv * logp
    if engine_cap:                                   # truncated importance: tokens come from the engine
        gain = gain * (old - engine).exp().clamp(max=engine_cap)
    d = (ref - logp).clamp(max=20)                   # e^20 is finite; where it bites, the next line does too
    kl = (d.exp() - d - 1).clamp(max=10)             # the estimator k3, clamped as published
    loss = ((beta * kl - gain) * weight).sum()
    clipped = ((r < 1 - low) | (r > 1 + high)).float()
    return loss, {"kl": (kl * weight).sum().item(), "clipped": (clipped * weight).sum().item()}


def shares(tokens, total, judgments, kind, limit):
    """The share of one token of each judgment in an update's mean.

    tokens     (B,) tokens of each judgment; total, judgments: how many of both in the whole update, all ranks
    judgment   1 / (its tokens x judgments): the mean over judgments of the mean over tokens (paper eq. 9)
    token      1 / total: the mean over tokens, long judgments count more (DAPO, arXiv 2503.14476, eq. 8)
    constant   1 / (limit x judgments): a length does not change a token's weight (Dr. GRPO)
    """
    one = torch.ones_like(tokens, dtype=torch.float32)
    return one / {"judgment": tokens * judgments, "token": total, "constant": limit * judgments}[kind]


def reward_of(text, judgment, pair, length, key, args):
    """1 for the right verdict and -1 for any other, or for the control a coin that `key` throws; --overlong N
    adds 0 up to N tokens before the limit, falling evenly to -1 at the limit (DAPO, eq. 13)."""
    if args.reward == "random":
        return 1.0 if hashlib.sha256(repr(key).encode()).digest()[0] % 2 else -1.0
    reward = (lm_as_judge(text, pair.label) if args.reward == "published" else
              verdict_reward(judgment, pair.label))
    if args.overlong:
        reward += min(0.0, (args.max_response - args.overlong - length) / args.overlong)
    return reward


# ---------------------------------------------------------------- the parts of a step

@dataclass
class Rollout:
    """One sampled judgment: the pair and the prompt's ids, its own token ids and their log-probs under the
    engine, (R,) each, whether it ended by itself, the verdict that the parser reads in it, what it earned."""
    pair: Pair
    prompt: list
    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool
    verdict: str | None
    reward: float


@dataclass
class Micro:
    """A micro-batch of an update, and of each of its tokens (R,): its judgment's advantage, its share of the
    update's mean, its log-prob under the engine, under the reference (None where there is none), and under
    the policy that sampled it."""
    batch: packing.Batch
    adv: torch.Tensor
    weight: torch.Tensor
    engine: torch.Tensor
    ref: torch.Tensor | None = None
    old: torch.Tensor | None = None


def rows_of(source, tokenizer, form, args, both=False):
    """A source's pairs, and [[(pair, prompt ids), and with `both` the same in the other order], ...] without
    those that are longer than --max-prompt, which are counted."""
    pairs = read_pairs(source, args.skip_bad, both)
    rows = [[(p, encode(tokenizer, chat_messages(p, *form))) for p in ([p, p.swapped()] if both else [p])]
            for p in tqdm(pairs, desc="tokenize", disable=R.quiet(), leave=False)]
    kept = [row for row in rows if all(len(ids) <= args.max_prompt for _, ids in row)]
    R.print0(f"{source}: {len(kept)} pairs, {len(rows) - len(kept)} left out as longer than "
             f"--max-prompt {args.max_prompt}")
    return pairs, kept


def sample(engine, tokenizer, stop, args, rank, world, batch, step, first=0, group=1, temperature=0.0):
    """A group of [Rollout, ...] for each (pair, prompt ids) of a batch that every rank knows: each samples
    and reads those of every world-th pair, then all tell each other. A text is a function of (seed, step,
    place, number), places counted from `first`: a resumed run, or one on more ranks, meets the same texts."""
    asked = [(*batch[place], (args.seed, step, first + place, g))
             for place in range(rank, len(batch), world) for g in range(group)]
    samples = engine.generate([prompt for _, prompt, _ in asked], [seed_of(*key) for *_, key in asked],
                              args.max_response, temperature, stop)
    mine = []
    for (pair, prompt, key), s in zip(asked, samples):
        text = text_of(tokenizer, prompt, s)
        judgment = parse(text, s.finished)
        try:
            reward = reward_of(text, judgment, pair, len(s.tokens), key, args)
        except Exception as e:           # one judgment must not cost the run: it is counted and ignored
            print(f"reward of {pair.id}, judgment {key[-1]}: {type(e).__name__}: {e}", file=sys.stderr)
            reward = math.nan
        mine.append(Rollout(pair, prompt, np.array(s.tokens, np.int32), np.array(s.logprobs, np.float32),
                            s.finished, judgment.verdict, reward))
    everyone = [iter(theirs) for theirs in R.all_gather(mine)]
    return [list(islice(everyone[place % world], group)) for place in range(len(batch))]


def agree(group):
    """Do all rewards say the same? Then there is nothing to learn from comparing them."""
    return len({r.reward for r in group if not math.isnan(r.reward)}) < 2


def consistency(groups, bonus):
    """--both-orders W: judgments g of a pair in one order and in the other, side by side in `groups`, earn W
    more each where both verdicts are right (the position-consistency reward of J1, arXiv 2505.10320)."""
    for one, two in zip(groups[::2], groups[1::2]):
        for x, y in zip(one, two):
            if x.verdict == x.pair.label and y.verdict == y.pair.label:
                x.reward, y.reward = x.reward + bonus, y.reward + bonus


def collect(ask, rows, step, args):
    """The groups that a step learns from. --refill N (dynamic sampling, DAPO, eq. 11): while groups agree, up
    to N times another batch is drawn and sampled; the first --pairs groups that do not agree are taken, and
    where they run out some that do. ask: `sample`, given what runs it. -> groups, [agreeing ones by round]"""
    groups, agreeing = [], []
    for again in range(1 + args.refill):
        # Another shuffle of the data for every round, so that the first one remains a pass over it.
        seed = seed_of(args.seed, again) if again else args.seed
        batch = [x for i in R.draw(len(rows), args.pairs // len(rows[0]), step, seed) for x in rows[i]]
        sampled = ask(batch, step, again * args.pairs, args.group, 1.0)
        if args.both_orders:
            consistency(sampled, args.both_orders)
        groups += sampled
        agreeing.append(sum(map(agree, sampled)))
        if len(groups) - sum(agreeing) >= args.pairs:
            break
    return (sorted(groups, key=agree)[:args.pairs] if args.refill else groups), agreeing


def updates_of(groups, adv, args, device, rank, world, width):
    """Cut a step into its updates of --mini groups, and this rank's share of each into micro-batches, as many
    on every rank: [[Micro, ...], ...]. adv (P, G); width: the model's hidden size, for attention's cost"""
    updates = []
    for start in range(0, args.pairs, args.mini):
        places = range(start, start + args.mini)
        total = sum(len(r.tokens) for i in places for r in groups[i])
        # Without a reference a group that agrees pulls at nothing: it need not be computed.
        at = [i for i in places if args.beta or adv[i].any()] or [start]
        here = [(groups[i][0].prompt, [r.tokens.tolist() for r in groups[i]]) for i in at]
        mine = packing.deal(here, world, width)[rank]
        micros = packing.level(packing.pack([here[i] for i in mine], args.micro_tokens, device), device)
        rollouts = [r for i in mine for r in groups[at[i]]]
        spare = sum(not b.real for b in micros)              # stand-ins: one token each, which weighs nothing
        adv_of = F.pad(adv[[at[i] for i in mine]].flatten(), (0, spare)).to(device)
        tokens = torch.tensor([len(r.tokens) for r in rollouts] + [1] * spare, device=device)
        share = shares(tokens, total, args.mini * args.group, args.average, args.max_response)
        engine = torch.cat([torch.from_numpy(r.logprobs) for r in rollouts] + [torch.zeros(spare)]).to(device)
        updates.append([Micro(b, adv_of[b.rows], b.real * share[b.rows], logprobs)
                        for b, logprobs in zip(micros, engine.split([len(b.rows) for b in micros]))])
    return updates


@torch.no_grad()
def score(policy, reference, updates):
    """Log-probs under the reference, and under the policy that sampled. The first update learns with that
    very policy, whose own pass gives them."""
    for m in chain(*updates) if reference else ():
        m.ref = reference(m.batch)
    for m in chain(*updates[1:]):
        m.old = policy(m.batch)


def learn(policy, optim, updates, lr, args, world):
    """One clipped step an update (paper eq. 9); engine and trainer are compared before the first one.
    -> what the diary says about it, [gradient norms]"""
    variant = {k: getattr(args, k) for k in ("clip", "beta", "ratio", "surrogate", "engine_cap")}
    sums, norms = np.zeros(3), []
    for micros in updates:
        for m in micros:
            logp = policy(m.batch)
            m.old = logp.detach() if m.old is None else m.old
            ref = m.old if m.ref is None else m.ref
            loss, stats = grpo_loss(logp, m.old, ref, m.adv, m.weight, m.batch.rows, m.engine, **variant)
            (loss * world).backward()              # FSDP averages over ranks; the weights are already global
            sums += loss.item(), stats["kl"], stats["clipped"]
        if not norms:
            gap = check_gap([(m.old, m.engine) for m in chain(*updates) if m.batch.real], args.max_gap)
        norms.append(P.optimizer_step(policy, optim, lr, clip=1.0))
    loss, kl, clipped = (x / len(updates) for x in R.all_sum(sums))
    return gap | {"loss": loss, "kl": kl, "clipped": clipped, "grad_norm": sum(norms) / len(norms)}, norms


def verdicts(groups, name=""):
    """Shares of judgments that are right, and that have no verdict one could read."""
    rollouts = [*chain(*groups)]
    return {f"{name}accuracy": fmean(r.verdict == r.pair.label for r in rollouts),
            f"{name}unread": fmean(r.verdict is None for r in rollouts)}


def summary(groups, agreeing, norms, args):
    """What a step's rollouts and updates look like; docs/training.md explains each number."""
    rollouts = [*chain(*groups)]
    scored = [r.reward for r in rollouts if not math.isnan(r.reward)]
    lengths = [len(r.tokens) for r in rollouts]
    sampled = hashlib.sha256(b"".join(r.tokens.tobytes() for r in rollouts)).hexdigest()
    return {"reward": fmean(scored or [0]), "unscored": len(rollouts) - len(scored), **verdicts(groups),
            "cut_off": fmean(not r.finished for r in rollouts),
            "agreeing_groups": sum(agreeing) / len(agreeing) / args.pairs, "rounds": len(agreeing),
            "length_mean": fmean(lengths), "length_max": max(lengths),
            "tokens": sum(lengths) + sum(len(r.prompt) for r in rollouts), "sampled": sampled[:12],
            "skipped_rows": [group[0].pair.id for i, group in enumerate(groups)
                             if not math.isfinite(norms[i // args.mini])]}


def rehearse(policy, reference, optim, shown, args, world):
    """One update on made-up judgments, for dryrun.py. shown: [(prompt ids, [response ids, ...]), ...]"""
    args = argparse.Namespace(**vars(args) | {"pairs": len(shown), "mini": len(shown), "max_gap": math.inf})
    groups = [[Rollout(None, prompt, np.array(r), np.zeros(len(r), np.float32), True, None, 0.0)
               for r in responses] for prompt, responses in shown]
    updates = updates_of(groups, torch.ones(len(shown), len(groups[0])), args, torch.device("cpu"), 0, world,
                         policy.lm.config.hidden_size)
    dryrun.phase("scoring")
    score(policy, reference, updates)
    dryrun.phase("learning")
    learn(policy, optim, updates, args.lr, args, world)


# ---------------------------------------------------------------- the run

def read(args, tokenizer, form, config, world):
    """What the run learns from, and flags that do not fit it, the model or the ranks.
    -> pairs, their rows as `rows_of` has them, [(held-out pair, prompt ids), ...], steps"""
    pairs, rows = rows_of(args.data, tokenizer, form, args, both=args.both_orders is not None)
    val_rows = [*chain(*rows_of(args.val_data, tokenizer, form, args)[1])] if args.val_data else []
    prompts = sum(map(len, rows))
    if prompts < args.pairs:
        fail(f"--pairs {args.pairs}: more than the {len(rows)} usable pairs in {args.data}")
    if args.max_prompt + args.max_response > P.window_of(config):
        fail(f"--max-prompt {args.max_prompt} and --max-response {args.max_response} exceed the model's "
             f"window of {P.window_of(config)} tokens")
    check_tp(args.tp, world, config)
    return pairs, rows, val_rows, args.steps or prompts // args.pairs


def main():
    args = arguments()
    folder = P.resolve(args.model, weights=args.dry_run is None)
    tokenizer, stop = P.load_tokenizer(folder)
    rank, world, device = R.start_ranks(args.timeout, args.dry_run)
    form = prompt_form(folder, args.model, args.protocol, args.system_prompt, default="instruct")
    config, dtype, shard = P.config_of(folder), P.DTYPES[args.dtype], R.shards(args.shard)
    pairs, rows, val_rows, steps = read(args, tokenizer, form, config, world)
    P.check_family(config, device)
    if args.dry_run is not None:
        prompts = [ids for row in rows for _, ids in row]
        return dryrun.show(args, config, shard, steps, prompts, args.group, args.max_response, rehearse)
    about = R.open_run(args, folder, pairs, form)
    R.phase("load the weights")
    load = partial(P.load, args.model, device, dtype, args.seed, shard=shard)
    policy, reference = load(recompute=args.recompute), load(trainable=False) if args.beta else None
    optim = P.adamw(policy, args.lr, (0.9, 0.999), 0.01)
    state = R.Checkpoints(policy, optim, f"{args.out}/state")
    first = state.load(steps)
    home = torch.device("cpu") if args.offload else device     # of what waits for its turn
    P.move(home, reference, optim)
    R.phase("start the engine")
    window = args.max_prompt + args.max_response
    engine = Engine(folder, window, args.dtype, weights="dummy", memory=args.engine_memory, tp=args.tp)
    engine.sync(policy, dtype)
    ask = partial(sample, engine, tokenizer, stop, args, rank, world)
    diary = R.Diary(args.out, first, about)
    R.print0(f"{world} ranks on {device.type}, {steps} steps of {args.pairs} pairs x {args.group} judgments, "
             f"{args.pairs // args.mini} updates each")

    for step in R.steps_of(diary, state, first, steps, args):
        val = verdicts(ask(val_rows, step), "val_") if val_rows and step % args.val_every == 0 else {}
        diary.phase("sample")
        groups, agreeing = collect(ask, rows, step, args)
        engine.sleep()

        diary.phase("score")
        rewards = torch.tensor([[r.reward for r in group] for group in groups])            # (P, G)
        adv = advantages(rewards, args.advantage)
        updates = updates_of(groups, adv, args, device, rank, world, config.hidden_size)
        P.move(device, reference)
        score(policy, reference, updates)
        P.move(home, reference)

        diary.phase("learn")
        lr = args.lr * P.schedule(step, steps, args.schedule)
        P.move(device, optim)
        learned, norms = learn(policy, optim, updates, lr, args, world)
        P.move(home, optim)

        diary.phase("sync")                                    # before anyone samples again
        engine.sync(policy, dtype)
        diary.phase("")
        diary.show(step, groups, tokenizer)
        diary.write(norms, step=step, lr=lr, **val, **summary(groups, agreeing, norms, args), **learned)

    if val_rows:
        diary.write(step=steps, **verdicts(ask(val_rows, steps), "val_"))
    P.save_model(policy, folder, f"{args.out}/model", dtype, form_of(pairs[0], *form))
    R.print0(f"wrote {args.out}/model")


if __name__ == "__main__":
    R.run(main)
