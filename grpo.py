"""
Stage 2: GRPO with verifiable rewards (paper section 3.3, eq. 7 to 10). The whole algorithm is on this page.

    torchrun --nproc_per_node 8 grpo.py          # the published 7B run, from the SFT model in runs/sft/model
    torchrun --nproc_per_node 8 grpo.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B \\
        --protocol reasoning --data gaotang/RM-R1-Reasoning-RLVR
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

import numpy as np
import torch
from tqdm import tqdm

import dryrun
import packing
import policy as P
import ranks as R
from engine import Engine, check_tp, seed_of, text_of
from files import Flags, fail, number
from rubrics import (Pair, chat_messages, encode, form_of, lm_as_judge, parse, prompt_form, read_pairs,
                     verdict_reward)


def arguments():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--model", default="runs/sft/model",
        help="start and frozen reference: folder, hub id, or config.json")
    arg("--data", default="gaotang/RM-R1-after-Distill-RLVR", help="pairs: JSONL file or hub dataset")
    arg("--val-data", help="held-out pairs, judged greedily every --val-every steps")
    arg("--val-every", type=number(int, 1), default=5, help="steps between held-out evaluations")
    arg("--out", default="runs/grpo", help="folder of this run")
    arg("--max-prompt", type=number(int, 1), default=4096,
        help="longest prompt in tokens; longer ones are left out")
    arg("--max-response", type=number(int, 1), default=8192, help="longest judgment in tokens")
    arg("--pairs", type=number(int, 1), default=1024, help="pairs sampled before each round of updates")
    arg("--mini", type=number(int, 1), default=128, help="pairs in one update")
    arg("--group", type=number(int, 1), default=7, help="judgments a pair (G)")
    arg("--steps", type=number(int, 1), help="rounds; default: one pass over the data")
    arg("--lr", type=number(float, 0, above=True), default=1e-6,
        help="learning rate (paper: 1e-6, 7e-7, 5e-7 for 7B, 14B, 32B)")
    arg("--schedule", choices=("constant", "linear", "cosine"), default="constant",
        help="of the learning rate")
    arg("--clip", type=number(float, 0), nargs=2, default=(0.2, 0.2),
        help="how far a ratio may fall below 1 and rise above it and still be pushed")
    arg("--beta", type=number(float, 0), default=1e-3,
        help="weight of the pull towards the reference; 0 loads none")
    arg("--reward", choices=("verdict", "published", "random"), default="verdict",
        help="right verdict (paper eq. 8) by the parser, or by the released rule; random: a control")
    # Variants of the objective; each has its formula and source where it is computed below.
    arg("--advantage", choices=("grpo", "drgrpo", "rloo"), default="grpo", help="baseline and scale")
    arg("--average", choices=("judgment", "token", "constant"), default="judgment", help="of token losses")
    arg("--ratio", choices=("token", "sequence"), default="token", help="sequence: GSPO")
    arg("--surrogate", choices=("clip", "cispo"), default="clip", help="what is done to the ratio")
    arg("--dual-clip", type=number(float, 1),
        help="bound of the loss where the advantage is negative, e.g. 3")
    arg("--kl", choices=("k1", "k2", "k3"), default="k3", help="estimator of the divergence")
    arg("--engine-cap", type=number(float, 0, above=True),
        help="weigh tokens by trainer / engine probability, at most this, e.g. 2")
    arg("--overlong", type=number(int, 0), default=0,
        help="tokens before the limit over which the reward falls by 1")
    arg("--format-reward", type=number(float, -math.inf), default=0.0,
        help="added where the parts of a judgment are all there")
    arg("--both-orders", type=number(float, -math.inf), metavar="W",
        help="judge each pair in both orders (--pairs and --mini count both), W more where both are right")
    arg("--refill", type=number(int, 0), default=0, help="rounds of sampling again for groups that agree")
    arg("--engine-memory", type=number(float, 0, 1, above=True), default=0.5,
        help="share of each card for vLLM while it samples")
    arg("--tp", type=number(int, 1), default=1,
        help="ranks that sample with one engine together (tensor parallel)")
    arg("--max-gap", type=number(float, 0), default=0.1,
        help="stop if engine and trainer log-probs differ by more on average")
    arg("--offload", action="store_true",
        help="reference and optimizer wait in host memory while they are not used")
    R.flags(ap, save_every=10, seed=1)
    arg("--dry-run", **dryrun.FLAG)
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
    """(r - mean) / (std + 1e-6) within each group (paper eq. 10; sample std and 1e-6 as in the published
    code).

    rewards  (P, G) -> (P, G). A group that agrees gets zeros: it teaches nothing, but its KL term still acts.
    NaN, a judgment whose reward could not be computed: advantage 0, and no part in its group's mean.
    drgrpo   r - mean, without the scale (Dr. GRPO, arXiv 2503.20783)
    rloo     r - mean of the others = G / (G - 1) (r - mean) (RLOO, arXiv 2402.14740)
    """
    known = ~rewards.isnan()
    n = known.sum(1, keepdim=True).clamp(min=2)
    r = rewards.where(known, 0)
    centred = (r - r.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)).where(known, 0)
    if kind == "grpo":
        return centred / ((centred.square().sum(1, keepdim=True) / (n - 1)).sqrt() + 1e-6)
    return centred * n / (n - 1) if kind == "rloo" else centred


def grpo_loss(logp, old, ref, adv, weight, rows=None, engine=None, clip=(0.2, 0.2), beta=1e-3, ratio="token",
              surrogate="clip", dual_clip=None, kl="k3", engine_cap=None):
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
        # GSPO (arXiv 2507.18071, eq. 7 and 14): the geometric mean over a judgment, gradient through its
        # tokens.
        at, none = rows - rows.min(), torch.zeros_like(logp)
        mean = none.index_add(0, at, log_ratio.detach()) / none.index_add(0, at, none + 1).clamp(min=1)
        log_ratio = mean[at] + logp - logp.detach()
    r = log_ratio.exp()                              # 1 everywhere in the first update
    if surrogate == "clip":
        gain = torch.min(r * adv, r.clamp(1 - low, 1 + high) * adv)
        if dual_clip:                                # arXiv 1912.09729, eq. 5: no ratio rules the step
            gain = torch.where(adv < 0, torch.max(gain, dual_clip * adv), gain)
    else:                                            # CISPO (arXiv 2506.13585, eq. 4): no token is lost
        gain = r.clamp(1 - low, 1 + high).detach() * adv * logp
    if engine_cap:                                   # truncated importance: tokens come from the engine
        gain = gain * (old - engine).exp().clamp(max=engine_cap)
    d = (ref - logp).clamp(max=20)                   # e^20 is finite; where it bites, the next line does too
    kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[kl].clamp(max=10)        # clamped as published
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
    if kind == "judgment":
        return 1 / (tokens * judgments)
    one = 1 / total if kind == "token" else 1 / (limit * judgments)
    return torch.full_like(tokens, one, dtype=torch.float32)


def reward_of(text, judgment, pair, length, key, args):
    """1 for the right verdict and -1 for any other, or for the control a coin that `key` throws, and what the
    flags add.

    --overlong N       0 up to N tokens before the limit, falling evenly to -1 at the limit (DAPO, eq. 13)
    --format-reward W  W where a judgment has type, rubric or solution, and comparison (paper eq. 11: W = 1)
    """
    if args.reward == "random":
        return 1.0 if hashlib.sha256(repr(key).encode()).digest()[0] % 2 else -1.0
    reward = (lm_as_judge(text, pair.label) if args.reward == "published" else
              verdict_reward(judgment, pair.label))
    if args.overlong:
        reward += min(0.0, (args.max_response - args.overlong - length) / args.overlong)
    if args.format_reward and judgment.type and (judgment.rubric or judgment.solution) and judgment.eval:
        reward += args.format_reward
    return reward


# ---------------------------------------------------------------- the parts of a step

@dataclass
class Rollout:
    """One sampled judgment: its token ids and their log-probs under the engine, (R,) each, whether it ended
    by itself, the verdict that the parser reads in it, what it earned."""
    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool
    verdict: str | None
    reward: float


@dataclass
class Group:
    """The G judgments of one prompt."""
    pair: Pair
    prompt: list
    rollouts: list

    def agrees(self):
        """Do all rewards say the same? Then there is nothing to learn from comparing them."""
        return len({r.reward for r in self.rollouts if not math.isnan(r.reward)}) < 2

    def tokens(self):
        """As `policy.deal` wants them: prompt ids, [response ids, ...]"""
        return self.prompt, [r.tokens for r in self.rollouts]


def tokenize(source, pairs, tokenizer, form, args, both=False):
    """[[(pair, prompt ids), and with `both` the same in the other order], ...], without those that are longer
    than --max-prompt, which are counted."""
    if both and (stuck := [p.id for p in pairs if p.messages and not p.a]):
        fail(f"--both-orders: {source} has finished prompts whose responses cannot be told apart, the first "
             f"is {stuck[0]}")
    rows = [[(p, encode(tokenizer, chat_messages(p, *form))) for p in ([p, p.swapped()] if both else [p])]
            for p in tqdm(pairs, desc="tokenize", disable=R.quiet(), leave=False)]
    kept = [row for row in rows if all(len(ids) <= args.max_prompt for _, ids in row)]
    R.print0(f"{source}: {len(kept)} pairs, {len(rows) - len(kept)} left out as longer than "
             f"--max-prompt {args.max_prompt}")
    return kept


def sample(engine, batch, first, step, tokenizer, stop, args, rank, world):
    """The groups of a batch of (pair, prompt), known to every rank: each samples and reads those of every
    world-th pair, then all tell each other. A text is a function of (seed, step, place, number), the places
    counted from `first`: a resumed run, or one on another number of ranks, meets the same texts."""
    asked = [(place, g) for place in range(rank, len(batch), world) for g in range(args.group)]
    samples = engine.generate([batch[place][1] for place, _ in asked],
                              [seed_of(args.seed, step, first + place, g) for place, g in asked],
                              args.max_response, 1.0, stop)
    mine = []
    for (place, g), s in zip(asked, samples):
        pair, prompt = batch[place]
        text = text_of(tokenizer, prompt, s)
        judgment = parse(text, s.finished)
        try:
            reward = reward_of(text, judgment, pair, len(s.tokens), (args.seed, step, first + place, g), args)
        except Exception as e:           # one judgment must not cost the run: it is counted and ignored
            print(f"reward of {pair.id}, judgment {g}: {type(e).__name__}: {e}", file=sys.stderr)
            reward = math.nan
        mine.append(Rollout(np.array(s.tokens, np.int32), np.array(s.logprobs, np.float32), s.finished,
                            judgment.verdict, reward))
    everyone, G = R.all_gather(mine), args.group
    return [Group(*batch[i], everyone[i % world][i // world * G:(i // world + 1) * G])
            for i in range(len(batch))]


def consistency(groups, bonus):
    """--both-orders W: judgments g of a pair in one order and in the other earn W more each where both
    verdicts are right (the position-consistency reward of J1, arXiv 2505.10320). groups: both orders, side by
    side."""
    for one, two in zip(groups[::2], groups[1::2]):
        for x, y in zip(one.rollouts, two.rollouts):
            if x.verdict == one.pair.label and y.verdict == two.pair.label:
                x.reward, y.reward = x.reward + bonus, y.reward + bonus


def collect(engine, rows, step, tokenizer, stop, args, rank, world):
    """The groups that a step learns from. --refill N (dynamic sampling, DAPO, eq. 11): while groups agree, up
    to N times another batch is drawn and sampled; the first --pairs groups that do not agree are taken, and
    only where they run out some that do. -> groups, [how many groups each round had that agree]"""
    groups, agreeing = [], []
    for again in range(1 + args.refill):
        # Another shuffle of the data for every round, so that the first one remains a pass over it.
        seed = seed_of(args.seed, again) if again else args.seed
        batch = [x for i in R.draw(len(rows), args.pairs // len(rows[0]), step, seed) for x in rows[i]]
        sampled = sample(engine, batch, again * args.pairs, step, tokenizer, stop, args, rank, world)
        if args.both_orders:
            consistency(sampled, args.both_orders)
        groups += sampled
        agreeing.append(sum(g.agrees() for g in sampled))
        if len(groups) - sum(agreeing) >= args.pairs:
            break
    return (sorted(groups, key=Group.agrees)[:args.pairs] if args.refill else groups), agreeing


def updates_of(groups, adv, args, device, rank, world, width):
    """Cut a step into its updates of --mini groups, and this rank's share of each into micro-batches, as many
    on every rank: [[(Batch, adv (R,), weight (R,), engine's log-prob (R,)), ...], ...]
    adv  (P, G) advantages; width  the model's hidden size, for the cost of attention"""
    updates = []
    for start in range(0, args.pairs, args.mini):
        here = [g.tokens() for g in groups[start:start + args.mini]]
        total = sum(len(r) for _, responses in here for r in responses)
        mine = packing.deal(here, world, width)[rank]
        rollouts = [r for i in mine for r in groups[start + i].rollouts]
        # A rank without rows here runs stand-ins, which need an advantage and a length to look
        # up, and weigh nothing.
        adv_u = adv[start:start + args.mini][mine].flatten().tolist() or [0.0]
        adv_u = torch.tensor(adv_u, device=device)
        tokens = torch.tensor([len(r.tokens) for r in rollouts] or [1], device=device)
        share = shares(tokens, total, args.mini * args.group, args.average, args.max_response)
        engine = torch.tensor(np.concatenate([r.logprobs for r in rollouts] or [[]]), device=device).float()
        packed = [(here[i][0], [r.tolist() for r in here[i][1]]) for i in mine]
        micros = packing.level(packing.pack(packed, args.micro_tokens, device), device)
        ends = np.cumsum([len(b.rows) * b.real for b in micros]).tolist()
        updates.append([(b, adv_u[b.rows], b.real * share[b.rows],
                         engine[end - len(b.rows):end] if b.real else torch.zeros(len(b.rows), device=device))
                        for b, end in zip(micros, ends)])
    return updates


def check_gap(old, updates, args):
    """Mean and largest |engine - trainer| log-prob over all ranks. They are two programs with the same
    weights: where they disagree, samples came from other weights than those that learn from them."""
    gaps = [(logp - engine).abs() for logps, micros in zip(old, updates)
            for logp, (b, _, _, engine) in zip(logps, micros) if b.real]
    gap = torch.cat(gaps) if gaps else torch.zeros(0)
    total, count = R.all_sum([gap.sum(), len(gap)])
    worst, = R.all_max([gap.max() if len(gap) else 0])
    mean = total / count
    if not mean <= args.max_gap:
        fail(f"engine and trainer disagree on the sampled tokens: mean log-prob gap {mean:.3g}, "
             f"bound {args.max_gap:g} (--max-gap). The engine is not sampling from the weights in training: "
             "the weight sync is broken, its cache is stale, or the two compute differently (dtype, "
             "temperature, template)")
    return {"gap_mean": mean, "gap_max": worst}


def learn(policy, optim, updates, old, ref, lr, args, world):
    """One clipped step an update (paper eq. 9). old, ref: [[log-probs (R,) of a micro-batch, ...], ...] by
    update; old[0] is filled here, and engine and trainer are compared before the first step.
    -> what the diary says about it, [gradient norms]"""
    variant = {k: getattr(args, k) for k in (
        "clip", "beta", "ratio", "surrogate", "dual_clip", "kl", "engine_cap")}
    sums, norms = [0.0] * 3, []
    for u, micros in enumerate(updates):
        for m, (b, adv, weight, engine) in enumerate(micros):
            logp = policy(b)
            if u == 0:
                old[0].append(logp.detach())
            loss, stats = grpo_loss(logp, old[u][m], ref[u][m] if ref else old[u][m], adv, weight, b.rows,
                                    engine, **variant)
            (loss * world).backward()              # FSDP averages over ranks; the weights are already global
            sums = [a + b for a, b in zip(sums, (loss.item(), stats["kl"], stats["clipped"]))]
        if u == 0:
            gap = check_gap(old, updates, args)
        norms.append(P.optimizer_step(policy, optim, lr, clip=1.0))
    loss, kl, clipped = (x / len(updates) for x in R.all_sum(sums))
    return gap | {"loss": loss, "kl": kl, "clipped": clipped, "grad_norm": sum(norms) / len(norms)}, norms


def held_out(engine, rows, tokenizer, stop, args, rank, world):
    """Greedy accuracy and unread share on held-out pairs, every rank taking a slice."""
    mine = [pair for row in rows[rank::world] for pair in row]
    samples = engine.generate([ids for _, ids in mine], [0] * len(mine), args.max_response, 0.0, stop)
    verdicts = [parse(text_of(tokenizer, ids, s), s.finished).verdict for (_, ids), s in zip(mine, samples)]
    right, unread, n = R.all_sum([sum(v == p.label for v, (p, _) in zip(verdicts, mine)),
                                  sum(v is None for v in verdicts), len(mine)])
    return {"val_accuracy": right / n, "val_unread": unread / n}


def summary(groups, agreeing, args):
    """What a step's rollouts look like; the README explains each number."""
    rollouts = [(g.pair, r) for g in groups for r in g.rollouts]
    mean = lambda values: float(np.mean(list(values)))
    scored = [r.reward for _, r in rollouts if not math.isnan(r.reward)]
    lengths = [len(r.tokens) for _, r in rollouts]
    sampled = hashlib.sha256(b"".join(r.tokens.tobytes() for _, r in rollouts)).hexdigest()
    return {"reward": mean(scored or [0]), "unscored": len(rollouts) - len(scored),
            "accuracy": mean(r.verdict == pair.label for pair, r in rollouts),
            "unread": mean(r.verdict is None for _, r in rollouts),
            "cut_off": mean(not r.finished for _, r in rollouts),
            "agreeing_groups": sum(agreeing) / len(agreeing) / args.pairs, "rounds": len(agreeing),
            "length_mean": mean(lengths), "length_max": max(lengths),
            "tokens": sum(lengths) + args.group * sum(len(g.prompt) for g in groups), "sampled": sampled[:12]}


def examples(groups, step, tokenizer, count=4):
    """Some of a step's judgments for a person to read, one a pair: what samples.jsonl has."""
    for g in groups[:count]:
        r = g.rollouts[step % len(g.rollouts)]
        yield {"step": step, "pair": g.pair.id, "label": g.pair.label, "verdict": r.verdict,
               "reward": r.reward if math.isfinite(r.reward) else None, "finished": r.finished,
               "text": tokenizer.decode(r.tokens)}


def refuse(args, rows, config, world):
    """Flags that do not fit the data, the model or the ranks."""
    if len(rows) * len(rows[0] if rows else ()) < args.pairs:
        fail(f"--pairs {args.pairs}: more than the {len(rows)} usable pairs in {args.data}")
    if args.max_prompt + args.max_response > P.window_of(config):
        fail(f"--max-prompt {args.max_prompt} and --max-response {args.max_response} exceed the model's "
             f"window of {P.window_of(config)} tokens")
    check_tp(args.tp, world, config)


def rehearse(policy, reference, optim, shown, args, world):
    """One update on made-up judgments, for dryrun.py. shown: [(prompt ids, [response ids, ...]), ...]"""
    args = argparse.Namespace(**vars(args) | {"pairs": len(shown), "mini": len(shown), "max_gap": math.inf})
    groups = [Group(None, p, [Rollout(np.array(r), np.zeros(len(r)), True, None, float(i % 2))
                              for i, r in enumerate(responses)]) for p, responses in shown]
    adv = advantages(torch.tensor([[r.reward for r in g.rollouts] for g in groups]), args.advantage)
    updates = updates_of(groups, adv, args, torch.device("cpu"), 0, world, policy.lm.config.hidden_size)
    dryrun.phase("scoring")
    with torch.no_grad():
        ref = [[(reference or policy)(b) for b, *_ in micros] for micros in updates]
    dryrun.phase("learning")
    learn(policy, optim, updates, [[]], ref, args.lr, args, world)


def main():
    args = arguments()
    pairs = read_pairs(args.data, args.skip_bad)
    val_pairs = read_pairs(args.val_data, args.skip_bad) if args.val_data else []
    folder = P.resolve(args.model, weights=args.dry_run is None)
    tokenizer, stop = P.load_tokenizer(folder)
    rank, world, device = R.start_ranks(args.timeout, dryrun.ranks(args))
    form = prompt_form(folder, args.model, args.protocol, args.system_prompt, default="instruct")
    rows = tokenize(args.data, pairs, tokenizer, form, args, both=args.both_orders is not None)
    val_rows = tokenize(args.val_data, val_pairs, tokenizer, form, args) if val_pairs else []
    config, dtype, window = P.config_of(folder), P.DTYPES[args.dtype], args.max_prompt + args.max_response
    refuse(args, rows, config, world)
    steps, shard = args.steps or len(rows) * len(rows[0]) // args.pairs, R.shards(args.shard)
    P.check_family(config, device)
    if args.dry_run is not None:
        prompts = [ids for row in rows for _, ids in row]
        return dryrun.show(args, config, shard, steps, prompts, args.group, args.max_response, rehearse)
    about = R.open_run(args, folder, pairs, form)

    R.phase("load the weights")
    policy = P.load(args.model, device, dtype, args.seed, recompute=args.recompute, shard=shard)
    reference = None if not args.beta else P.load(
        args.model, device, dtype, args.seed, trainable=False, shard=shard)
    optim = P.adamw(policy, args.lr, (0.9, 0.999), 0.01)
    state = R.Checkpoints(policy, optim, f"{args.out}/state")
    first = state.load(steps)
    home = torch.device("cpu") if args.offload else device     # of what waits for its turn
    P.move(home, reference, optim)
    R.phase("start the engine")
    engine = Engine(folder, window, args.dtype, weights="dummy", memory=args.engine_memory, tp=args.tp)
    engine.sync(policy, dtype)
    diary, bad = R.Diary(args.out, first, about), 0
    R.catch_signals()
    R.print0(f"{world} ranks on {device.type}, {steps} steps of {args.pairs} pairs x {args.group} judgments, "
             f"{args.pairs // args.mini} updates each"
             + (f", resumed at step {first}" if first else ""))

    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc="grpo",
                             disable=R.quiet())):
        log = {"step": step}
        if val_rows and step % args.val_every == 0:
            log |= held_out(engine, val_rows, tokenizer, stop, args, rank, world)

        # --- sample, read what was written, reward it
        diary.phase("sample")
        groups, agreeing = collect(engine, rows, step, tokenizer, stop, args, rank, world)
        engine.sleep()

        # --- score: advantages, and passes without gradient under the model that sampled and the reference.
        # The first update learns with that very model, so that its own pass gives `old`.
        diary.phase("score")
        adv = advantages(torch.tensor([[r.reward for r in g.rollouts] for g in groups]), args.advantage)
        updates = updates_of(groups, adv, args, device, rank, world, policy.lm.config.hidden_size)
        with torch.no_grad():
            P.move(device, reference)
            ref = [[reference(b) for b, *_ in micros] for micros in updates] if reference else None
            P.move(home, reference)
            old = [[], *([policy(b) for b, *_ in micros] for micros in updates[1:])]

        # --- learn: one clipped step an update
        diary.phase("learn")
        log["lr"] = args.lr * P.schedule(step, steps, args.schedule)
        P.move(device, optim)
        learned, norms = learn(policy, optim, updates, old, ref, log["lr"], args, world)
        P.move(home, optim)

        # --- sync: the engine gets the new weights before anyone samples again
        diary.phase("sync")
        engine.sync(policy, dtype)
        diary.phase("")

        spoilt = [u for u, norm in enumerate(norms) if not math.isfinite(norm)]    # the same on all ranks
        log |= summary(groups, agreeing, args) | learned | {
            "skipped_rows": [g.pair.id for u in spoilt for g in groups[u * args.mini:(u + 1) * args.mini]]}
        diary.append("samples.jsonl", examples(groups, step, tokenizer))
        diary.write(**log)
        bar.set_postfix({k: f"{log[k]:.3f}" for k in ("accuracy", "unread", "kl")})
        for norm in norms:
            bad = 0 if math.isfinite(norm) else bad + 1
        if not R.goes_on(state, step + 1, steps, bad, args):
            return

    if val_rows:
        diary.write(step=steps, **held_out(engine, val_rows, tokenizer, stop, args, rank, world))
    state.settle()
    P.save_model(policy, folder, f"{args.out}/model", dtype, form_of(chat_messages(pairs[0], *form)))
    R.print0(f"wrote {args.out}/model")
    R.barrier()


if __name__ == "__main__":
    R.run(main)
