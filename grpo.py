"""
Stage 2: GRPO with verifiable rewards (paper section 3.3, eq. 7 to 10). The whole algorithm is on this page.

    torchrun --nproc_per_node 8 grpo.py          # the published 7B run, from the SFT model in runs/sft/model
    torchrun --nproc_per_node 8 grpo.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B \\
        --protocol reasoning --data gaotang/RM-R1-Reasoning-RLVR
    python grpo.py --model runs/demo/sft/model --data runs/demo/data/rl.jsonl ...     # see Makefile

Sample G judgments a pair with vLLM, reward right verdicts, take the group's mean and spread away, make a
few clipped updates, give vLLM the new weights. Every rank does all of it on its share of the pairs;
loss, gradient and samples do not depend on how many ranks there are. Writes OUT/model,
OUT/metrics.jsonl, OUT/state.

Letters: B judgments, G judgments a pair, R response tokens of a micro-batch, one after the other.
"""
import argparse
import hashlib
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import policy as P
from rmr1 import Engine, Sample, seed_of, text_of
from rubrics import (PROTOCOLS, Judgment, Pair, chat_messages, encode, fail, form_of, lm_as_judge, parse,
                     prompt_form, read_pairs, verdict_reward)


def arguments():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arg = ap.add_argument
    arg("--model", default="runs/sft/model",
        help="start and frozen reference: folder, hub id, or config.json")
    arg("--data", default="gaotang/RM-R1-after-Distill-RLVR", help="pairs: JSONL file or hub dataset")
    arg("--val-data", help="held-out pairs, judged greedily every --val-every steps")
    arg("--val-every", type=int, default=5, help="steps between held-out evaluations")
    arg("--out", default="runs/grpo", help="folder of this run")
    arg("--protocol", choices=PROTOCOLS,
        help="prompt form, for rows without published prompts; default: the model's (its judge.json), "
             "else instruct")
    arg("--system-prompt",
        help="file with the system prompt, instead of the model's, the published row's or ours")
    arg("--max-prompt", type=int, default=4096, help="longest prompt in tokens; longer ones are left out")
    arg("--max-response", type=int, default=8192, help="longest judgment in tokens")
    arg("--pairs", type=int, default=1024, help="pairs sampled before each round of updates")
    arg("--mini", type=int, default=128, help="pairs in one update")
    arg("--group", type=int, default=7, help="judgments a pair (G)")
    arg("--steps", type=int, help="rounds; default: one pass over the data")
    arg("--lr", type=float, default=1e-6, help="learning rate (paper: 1e-6, 7e-7, 5e-7 for 7B, 14B, 32B)")
    arg("--schedule", choices=("constant", "linear", "cosine"), default="constant",
        help="of the learning rate")
    arg("--clip", type=float, nargs=2, default=(0.2, 0.2),
        help="how far a ratio may fall below 1 and rise above it and still be pushed")
    arg("--beta", type=float, default=1e-3, help="weight of the pull towards the reference; 0 loads none")
    arg("--reward", choices=("verdict", "published", "random"), default="verdict",
        help="right verdict (paper eq. 8) by the parser, or by the released rule; random: a control")
    # Variants of the objective; each has its formula and source where it is computed below.
    arg("--advantage", choices=("grpo", "drgrpo", "rloo"), default="grpo", help="baseline and scale")
    arg("--average", choices=("judgment", "token", "constant"), default="judgment", help="of token losses")
    arg("--ratio", choices=("token", "sequence"), default="token", help="sequence: GSPO")
    arg("--surrogate", choices=("clip", "cispo"), default="clip", help="what is done to the ratio")
    arg("--dual-clip", type=float, help="bound of the loss where the advantage is negative, e.g. 3")
    arg("--kl", choices=("k1", "k2", "k3"), default="k3", help="estimator of the divergence")
    arg("--engine-cap", type=float, help="weigh tokens by trainer / engine probability, at most this, e.g. 2")
    arg("--overlong", type=int, default=0, help="tokens before the limit over which the reward falls by 1")
    arg("--format-reward", type=float, default=0.0, help="added where the parts of a judgment are all there")
    arg("--micro-tokens", type=int, default=16384,
        help="tokens a rank computes at once: lower it when memory runs out")
    arg("--recompute", action=argparse.BooleanOptionalAction, default=True,
        help="recompute activations in the backward pass")
    arg("--engine-memory", type=float, default=0.5, help="share of each card for vLLM while it samples")
    arg("--max-gap", type=float, default=0.1,
        help="stop if engine and trainer log-probs differ by more on average")
    arg("--dtype", choices=P.DTYPES, default="bfloat16", help="of the computation (weights are kept in fp32)")
    arg("--max-bad", type=int, default=5, help="stop after so many updates in a row without finite gradient")
    arg("--save-every", type=int, default=10, help="steps between checkpoints for resuming, 0 for none")
    arg("--seed", type=int, default=1, help="of data order, samples and random weights")
    arg("--skip-bad", action="store_true", help="report and leave out bad lines instead of stopping")
    args = ap.parse_args()
    if args.group < 2:
        fail(f"--group {args.group}: a group of one has no spread, so no advantage; take at least 2")
    if args.mini < 1 or args.pairs % args.mini:
        fail(f"--pairs {args.pairs} does not divide into updates of --mini {args.mini}")
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
        at = rows - rows.min()
        sums = torch.zeros_like(logp).index_add(0, at, log_ratio.detach())
        mean = sums / at.bincount(minlength=len(at)).clamp(min=1)
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

    --overlong N       0 up to N tokens before the limit, then falling evenly to -1 at the limit (DAPO, eq. 13)
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
    """One sampled judgment: of which pair (its place in the step's batch), the prompt's ids, what the engine
    gave, how the parser reads it, what it earned."""
    place: int
    pair: Pair
    prompt: list
    sample: Sample
    judgment: Judgment
    reward: float


def tokenize(source, pairs, tokenizer, form, args):
    """[(pair, prompt ids), ...] without the prompts that are longer than --max-prompt, which are counted."""
    rows = [(p, encode(tokenizer, chat_messages(p, *form)))
            for p in tqdm(pairs, desc="tokenize", disable=P.quiet(), leave=False)]
    kept = [r for r in rows if len(r[1]) <= args.max_prompt]
    P.print0(f"{source}: {len(kept)} pairs, {len(rows) - len(kept)} left out as longer than "
             f"--max-prompt {args.max_prompt}")
    return kept


def sample(engine, batch, step, tokenizer, stop, args, rank, world):
    """This rank's rollouts of a step, grouped by pair: G judgments each of every world-th pair of the batch,
    so that every update has a share of every rank. A text is a function of (seed, step, pair, number): a
    resumed run, or one on another number of ranks, meets the same texts."""
    asked = [(place, g) for place in range(rank, len(batch), world) for g in range(args.group)]
    samples = engine.generate([batch[place][1] for place, _ in asked],
                              [seed_of(args.seed, step, place, g) for place, g in asked],
                              args.max_response, 1.0, stop)
    rollouts = []
    for (place, g), s in zip(asked, samples):
        pair, prompt = batch[place]
        text = text_of(tokenizer, prompt, s)
        judgment = parse(text, s.finished)
        try:
            reward = reward_of(text, judgment, pair, len(s.tokens), (args.seed, step, place, g), args)
        except (ValueError, KeyError, TypeError, ArithmeticError) as e:
            # One judgment must not cost the run, nor leave the other ranks waiting: it is counted and
            # ignored.
            print(f"reward of {pair.id}, judgment {g}: {type(e).__name__}: {e}", file=sys.stderr)
            reward = math.nan
        rollouts.append(Rollout(place, pair, prompt, s, judgment, reward))
    return rollouts


def updates_of(rollouts, adv, args, device):
    """Cut a step's rollouts into its updates, and each of those into micro-batches:
    [[(Batch, adv (R,), weight (R,), engine's log-prob (R,)), ...]]. Update u has the pairs with places u *
    mini to (u + 1) * mini; every rank has the same number of micro-batches in it."""
    updates = []
    for u in range(args.pairs // args.mini):
        here = [i for i, r in enumerate(rollouts) if r.place // args.mini == u]
        groups = [(rollouts[i].prompt, [rollouts[j].sample.tokens for j in here[k:k + args.group]])
                  for k, i in list(enumerate(here))[::args.group]]
        # A rank without rows here runs stand-ins, which need an advantage and a length to look
        # up, and weigh nothing.
        adv_u = torch.tensor([adv[i] for i in here] or [0.0], device=device)
        tokens = torch.tensor([len(rollouts[i].sample.tokens) for i in here] or [1], device=device)
        total, = P.all_sum([tokens.sum() if here else 0])
        share = shares(tokens, total, args.mini * args.group, args.average, args.max_response)
        engine = torch.tensor([x for i in here for x in rollouts[i].sample.logprobs], device=device)
        micros = P.level(P.pack(groups, args.micro_tokens, device), device)
        ends = np.cumsum([len(b.rows) * b.real for b in micros]).tolist()
        updates.append([(b, adv_u[b.rows], b.real * share[b.rows],
                         engine[end - len(b.rows):end] if b.real else torch.zeros(len(b.rows), device=device))
                        for b, end in zip(micros, ends)])
    return updates


def check_gap(rollouts, old, updates, args):
    """Mean and largest |engine - trainer| log-prob over all ranks. They are two programs with the same
    weights: where they disagree, samples came from other weights than those that learn from them."""
    ours = [logp.cpu() for logps, micros in zip(old, updates) for logp, (b, *_) in zip(logps, micros)
            if b.real]
    theirs = [torch.tensor(r.sample.logprobs) for r in rollouts]
    gap = (torch.cat(theirs) - torch.cat(ours)).abs() if ours else torch.zeros(0)
    total, count = P.all_sum([gap.sum(), len(gap)])
    worst, = P.all_max([gap.max() if len(gap) else 0])
    mean = total / count
    if not mean <= args.max_gap:
        fail(f"engine and trainer disagree on the sampled tokens: mean log-prob gap {mean:.3g}, "
             f"bound {args.max_gap:g} (--max-gap). The engine is not sampling from the weights in training: "
             "the weight sync is broken, its cache is stale, or the two compute differently (dtype, "
             "temperature, template)")
    return {"gap_mean": mean, "gap_max": worst}


def held_out(engine, rows, tokenizer, stop, args, rank, world):
    """Greedy accuracy and unread share on held-out pairs, every rank taking a slice."""
    mine = rows[rank::world]
    samples = engine.generate([ids for _, ids in mine], [0] * len(mine), args.max_response, 0.0, stop)
    verdicts = [parse(text_of(tokenizer, ids, s), s.finished).verdict for (_, ids), s in zip(mine, samples)]
    right, unread, n = P.all_sum([sum(v == p.label for v, (p, _) in zip(verdicts, mine)),
                                  sum(v is None for v in verdicts), len(mine)])
    return {"val_accuracy": right / n, "val_unread": unread / n}


def summary(rollouts, adv, args):
    """What a step's rollouts look like over all ranks; the README explains each number."""
    lengths = [len(r.sample.tokens) for r in rollouts]
    agreeing = sum(not any(adv[i:i + args.group]) for i in range(0, len(adv), args.group))
    scored = [r.reward for r in rollouts if not math.isnan(r.reward)]
    reward, known, right, unread, cut, agree, tokens, prompt_tokens, n, sampled = P.all_sum([
        sum(scored), len(scored), sum(r.judgment.verdict == r.pair.label for r in rollouts),
        sum(r.judgment.verdict is None for r in rollouts), sum(not r.sample.finished for r in rollouts),
        agreeing * args.group, sum(lengths), sum(len(r.prompt) for r in rollouts), len(rollouts),
        sum(seed_of(r.sample.tokens) % 2**32 for r in rollouts)])
    longest, = P.all_max([max(lengths, default=0)])
    return {"reward": reward / max(1, known), "unscored": n - known, "accuracy": right / n,
            "unread": unread / n, "cut_off": cut / n, "agreeing_groups": agree / n,
            "length_mean": tokens / n, "length_max": longest,
            "tokens": tokens + prompt_tokens, "sampled": f"{int(sampled):x}"}


def main():
    args = arguments()
    pairs = read_pairs(args.data, args.skip_bad)
    val_pairs = read_pairs(args.val_data, args.skip_bad) if args.val_data else []
    folder = P.resolve(args.model)
    tokenizer, stop = P.load_tokenizer(folder)
    rank, world, device = P.start_ranks()
    form = prompt_form(folder, args.model, args.protocol, args.system_prompt, default="instruct")
    rows = tokenize(args.data, pairs, tokenizer, form, args)
    val_rows = tokenize(args.val_data, val_pairs, tokenizer, form, args) if val_pairs else []
    if len(rows) < args.pairs:
        fail(f"--pairs {args.pairs}: more than the {len(rows)} usable pairs in {args.data}")
    steps, dtype = args.steps or len(rows) // args.pairs, P.DTYPES[args.dtype]
    window = args.max_prompt + args.max_response
    if window > P.window_of(folder):
        fail(f"--max-prompt {args.max_prompt} and --max-response {args.max_response} exceed the model's "
             f"window of {P.window_of(folder)} tokens")

    policy = P.load(args.model, device, dtype, args.seed, recompute=args.recompute)
    reference = P.load(args.model, device, dtype, args.seed, trainable=False) if args.beta else None
    optim = P.adamw(policy, args.lr, (0.9, 0.999), 0.01)
    first = P.load_state(policy, optim, f"{args.out}/state")
    engine = Engine(folder, window, args.dtype, weights="dummy", memory=args.engine_memory)
    engine.sync(policy, dtype)
    diary, bad = P.Diary(args.out, first, vars(args)), 0
    P.catch_signals()
    P.print0(f"{P.describe(policy, world, device)}; {steps} steps of {args.pairs} pairs x {args.group} "
             f"judgments in {args.pairs // args.mini} updates"
             + (f", resumed at step {first}" if first else ""))

    variant = {k: getattr(args, k) for k in (
        "clip", "beta", "ratio", "surrogate", "dual_clip", "kl", "engine_cap")}
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc="grpo",
                             disable=P.quiet())):
        log = {"step": step}
        if val_rows and step % args.val_every == 0:
            log |= held_out(engine, val_rows, tokenizer, stop, args, rank, world)
        diary.lap()

        # --- sample, and read what was written
        batch = [rows[i] for i in P.draw(len(rows), args.pairs, step, args.seed)]
        rollouts = sample(engine, batch, step, tokenizer, stop, args, rank, world)
        engine.sleep()
        log["seconds_sample"] = diary.lap()

        # --- score: advantages, and two passes without gradient. They stay what they are through all
        # updates of the step.
        rewards = torch.tensor([r.reward for r in rollouts]).view(-1, args.group)
        adv = advantages(rewards, args.advantage).flatten().tolist()
        updates = updates_of(rollouts, adv, args, device)
        with torch.no_grad():
            old = [[policy(b) for b, *_ in micros] for micros in updates]
            ref = [[reference(b) for b, *_ in micros] for micros in updates] if reference else old
        log |= check_gap(rollouts, old, updates, args)
        log["seconds_score"] = diary.lap()

        # --- learn: one clipped step an update
        lr, sums, norms, spoilt = args.lr * P.schedule(step, steps, args.schedule), [0.0] * 3, [], []
        for micros, old_u, ref_u in zip(updates, old, ref):
            for (b, adv_b, weight, engine_b), old_b, ref_b in zip(micros, old_u, ref_u):
                loss, stats = grpo_loss(policy(b), old_b, ref_b, adv_b, weight, b.rows, engine_b, **variant)
                (loss * world).backward()          # FSDP averages over ranks; the weights are already global
                sums = [a + b for a, b in zip(sums, (loss.item(), stats["kl"], stats["clipped"]))]
            norms.append(P.optimizer_step(policy, optim, lr, clip=1.0))
            bad = 0 if math.isfinite(norms[-1]) else bad + 1
            if bad:                                # the norm is global, so every rank comes here
                spoilt += [pair.id for pair, _ in batch[(len(norms) - 1) * args.mini:len(norms) * args.mini]]
            if bad == args.max_bad:
                P.save_state(policy, optim, f"{args.out}/state", step)
                fail(f"{bad} updates in a row had no finite gradient (--max-bad), the last in step {step}; "
                     "they were skipped, and a checkpoint was written")
        log["seconds_learn"] = diary.lap()

        # --- sync: the engine gets the new weights before anyone samples again
        engine.sync(policy, dtype)
        log["seconds_sync"] = diary.lap()

        loss, kl, clipped = (x / len(updates) for x in P.all_sum(sums))
        log |= summary(rollouts, adv, args) | {
            "loss": loss, "kl": kl, "clipped": clipped, "grad_norm": sum(norms) / len(norms), "lr": lr,
            "skipped_rows": spoilt,
            "peak_gb": P.peak_memory_gb(device)}
        log["tokens_per_second"] = log["tokens"] / sum(v for k, v in log.items() if k.startswith("seconds_"))
        diary.write(**log)
        bar.set_postfix(accuracy=f"{log['accuracy']:.3f}", unread=f"{log['unread']:.3f}", kl=f"{kl:.3f}")
        if P.asked_to_stop():
            return P.leave(policy, optim, args.out, step + 1)
        if args.save_every and (step + 1) % args.save_every == 0:
            P.save_state(policy, optim, f"{args.out}/state", step + 1)

    if val_rows:
        diary.write(step=steps, **held_out(engine, val_rows, tokenizer, stop, args, rank, world))
    P.save_model(policy, folder, f"{args.out}/model", dtype, form_of(chat_messages(pairs[0], *form)))
    P.print0(f"wrote {args.out}/model")
    P.barrier()


if __name__ == "__main__":
    main()
