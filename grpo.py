"""
Stage 2: GRPO with verifiable rewards (paper section 3.3, eq. 7 to 10). The whole algorithm is on this page.

    torchrun --nproc_per_node 8 grpo.py                      # the published 7B run, from the SFT model in runs/sft/model
    torchrun --nproc_per_node 8 grpo.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --protocol reasoning \\
        --data gaotang/RM-R1-Reasoning-RLVR
    python grpo.py --model runs/demo/sft/model --data runs/demo/data/rl.jsonl ...     # see Makefile

Sample G judgments a pair with vLLM, reward right verdicts, take the group's mean and spread away, make a few clipped
updates, give vLLM the new weights. Every rank does all of it on its share of the pairs; loss, gradient and samples do
not depend on how many ranks there are. Writes OUT/model, OUT/metrics.jsonl, OUT/state.

Letters: B judgments, G judgments a pair, R response tokens of a micro-batch, one after the other.
"""
import argparse
import hashlib

import torch
from tqdm import tqdm

import policy as P
from rmr1 import Engine, load_tokenizer, seed_of, text_of
from rubrics import PROTOCOLS, chat_messages, encode, fail, lm_as_judge, parse, read_pairs, read_system


def arguments():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    ap.add_argument("--model", default="runs/sft/model", help="start and frozen reference: folder, hub id, or config.json")
    ap.add_argument("--data", default="gaotang/RM-R1-after-Distill-RLVR", help="pairs: JSONL file or hub dataset")
    ap.add_argument("--val-data", help="held-out pairs, judged greedily every --val-every steps")
    ap.add_argument("--val-every", type=int, default=5, help="steps between held-out evaluations")
    ap.add_argument("--out", default="runs/grpo", help="folder of this run")
    ap.add_argument("--protocol", choices=PROTOCOLS, default="instruct", help="prompt form, for rows without published prompts")
    ap.add_argument("--system-prompt", help="file with the system prompt, instead of ours or the published row's")
    ap.add_argument("--max-prompt", type=int, default=4096, help="longest prompt in tokens; longer ones are left out")
    ap.add_argument("--max-response", type=int, default=8192, help="longest judgment in tokens")
    ap.add_argument("--pairs", type=int, default=1024, help="pairs sampled before each round of updates")
    ap.add_argument("--mini", type=int, default=128, help="pairs in one update")
    ap.add_argument("--group", type=int, default=7, help="judgments a pair (G)")
    ap.add_argument("--steps", type=int, help="rounds; default: one pass over the data")
    ap.add_argument("--lr", type=float, default=1e-6, help="learning rate (paper: 1e-6, 7e-7, 5e-7 for 7B, 14B, 32B)")
    ap.add_argument("--schedule", choices=("constant", "linear", "cosine"), default="constant", help="of the learning rate")
    ap.add_argument("--clip", type=float, default=0.2, help="how far a ratio may leave 1 and still be pushed")
    ap.add_argument("--beta", type=float, default=1e-3, help="weight of the pull towards the reference")
    ap.add_argument("--reward", choices=("published", "random"), default="published", help="random: a control that must not learn")
    ap.add_argument("--micro-tokens", type=int, default=16384, help="tokens a rank computes at once: lower it when memory runs out")
    ap.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True, help="recompute activations in the backward pass")
    ap.add_argument("--engine-memory", type=float, default=0.5, help="share of each card for vLLM while it samples")
    ap.add_argument("--max-gap", type=float, default=0.1, help="stop if engine and trainer log-probs differ by more on average")
    ap.add_argument("--dtype", choices=P.DTYPES, default="bfloat16", help="of the computation (weights are kept in fp32)")
    ap.add_argument("--save-every", type=int, default=10, help="steps between checkpoints for resuming, 0 for none")
    ap.add_argument("--seed", type=int, default=1, help="of data order, samples and random weights")
    ap.add_argument("--skip-bad", action="store_true", help="report and leave out bad lines instead of stopping")
    args = ap.parse_args()
    if args.group < 2:
        fail(f"--group {args.group}: a group of one has no spread, so no advantage; take at least 2")
    if args.mini < 1 or args.pairs % args.mini:
        fail(f"--pairs {args.pairs} does not divide into updates of --mini {args.mini}")
    return args


# ---------------------------------------------------------------- the algorithm, without a model

def advantages(rewards):
    """(r - mean) / (std + 1e-6) within each group (paper eq. 10; sample std and 1e-6 as in the published code).

    rewards  (P, G) -> (P, G). A group that agrees gets zeros: it teaches nothing, but its KL term still acts.
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def grpo_loss(logp, old, ref, adv, weight, clip=0.2, beta=1e-3):
    """Clipped policy gradient plus a pull towards the reference (paper eq. 9), on response tokens only.

    logp, old, ref  (R,)  log-prob of each sampled token under the model we train, the model that sampled it, the
                          frozen reference (the last two without gradient)
    adv             (R,)  its judgment's advantage
    weight          (R,)  its share of the mean: 1 / (tokens of its judgment x judgments of the whole update). All
                          weights of an update, over every rank and micro-batch, sum to 1, so that cutting it up
                          differently changes nothing.
    -> loss, {"kl", "clipped"}: this micro-batch's share of the update's means
    """
    ratio = (logp - old).exp()                                     # 1 everywhere in the first update
    gain = torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
    d = (ref - logp).clamp(max=20)                                 # e^20 is finite; where it bites, the next line does too
    kl = (d.exp() - d - 1).clamp(max=10)                           # k3 estimate, clamped as published
    loss = ((beta * kl - gain) * weight).sum()
    clipped = ((ratio - 1).abs() > clip).float()
    return loss, {"kl": (kl * weight).sum().item(), "clipped": (clipped * weight).sum().item()}


def score(text, label, kind, key):
    """The reward of a judgment, and its verdict as our parser reads it. `key` seeds the random control."""
    if kind == "random":
        return 1.0 if hashlib.sha256(repr(key).encode()).digest()[0] % 2 else -1.0
    return lm_as_judge(text, label)


# ---------------------------------------------------------------- helpers

def tokenize(pairs, tokenizer, args, what):
    """[(pair, prompt ids), ...] without the prompts that are longer than --max-prompt, which are counted."""
    system = read_system(args.system_prompt)
    rows = [(p, encode(tokenizer, chat_messages(p, args.protocol, system)))
            for p in tqdm(pairs, desc="tokenize", disable=P.quiet(), leave=False)]
    kept = [r for r in rows if len(r[1]) <= args.max_prompt]
    P.print0(f"{what}: {len(kept)} pairs, {len(rows) - len(kept)} left out as longer than --max-prompt {args.max_prompt}")
    return kept


def held_out(engine, rows, tokenizer, stop, args, rank, world):
    """Greedy accuracy and unread share on held-out pairs, every rank taking a slice."""
    mine = rows[rank::world]
    samples = engine.generate([ids for _, ids in mine], [0] * len(mine), args.max_response, 0.0, stop)
    verdicts = [parse(text_of(tokenizer, ids, s), s.finished).verdict for (_, ids), s in zip(mine, samples)]
    right, unread, n = P.all_sum([sum(v == p.label for v, (p, _) in zip(verdicts, mine)),
                                  sum(v is None for v in verdicts), len(mine)])
    return {"val_accuracy": right / n, "val_unread": unread / n}


def check_gap(engine_logp, trainer_logp, args):
    """Mean and largest |engine - trainer| log-prob over all ranks. They are two programs with the same weights: where
    they disagree, samples came from other weights than those that learn from them."""
    gap = (engine_logp - trainer_logp).abs()
    total, count = P.all_sum([gap.sum(), len(gap)])
    worst, = P.all_max([gap.max() if len(gap) else 0])
    mean = total / count
    if not mean <= args.max_gap:
        fail(f"engine and trainer disagree on the sampled tokens: mean log-prob gap {mean:.3g}, bound {args.max_gap:g} "
             "(--max-gap). The engine is not sampling from the weights in training: the weight sync is broken, its cache "
             "is stale, or the two compute differently (dtype, temperature, template)")
    return mean, worst


def main():
    args = arguments()
    pairs = read_pairs(args.data, args.skip_bad)
    val_pairs = read_pairs(args.val_data, args.skip_bad) if args.val_data else []
    folder = P.resolve(args.model)
    tokenizer, stop = load_tokenizer(folder)
    rank, world, device = P.start_ranks()
    dtype = P.DTYPES[args.dtype]
    rows = tokenize(pairs, tokenizer, args, args.data)
    val_rows = tokenize(val_pairs, tokenizer, args, args.val_data) if val_pairs else []
    if len(rows) < args.pairs:
        fail(f"--pairs {args.pairs}: more than the {len(rows)} usable pairs in {args.data}")
    steps = args.steps or len(rows) // args.pairs

    policy = P.load(args.model, device, dtype, args.seed, recompute=args.recompute)
    window = args.max_prompt + args.max_response
    if window > policy.lm.config.max_position_embeddings:
        fail(f"--max-prompt {args.max_prompt} and --max-response {args.max_response} exceed the model's window of "
             f"{policy.lm.config.max_position_embeddings} tokens")
    reference = P.load(args.model, device, dtype, args.seed, trainable=False) if args.beta else None
    optim = P.adamw(policy, args.lr, (0.9, 0.999), 0.01)
    first = P.load_state(policy, optim, f"{args.out}/state")
    engine = Engine(folder, window, args.dtype, weights="dummy", memory=args.engine_memory)
    engine.sync(policy, dtype)
    diary = P.Diary(args.out, first, vars(args))
    P.print0(f"{sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters, {world} ranks on {device.type}, {steps} "
             f"steps of {args.pairs} pairs x {args.group} judgments in {args.pairs // args.mini} updates"
             + (f", resumed at step {first}" if first else ""))

    bar = tqdm(range(first, steps), initial=first, total=steps, desc="grpo", disable=P.quiet())
    for step in bar:
        log = {"step": step}
        if val_rows and step % args.val_every == 0:
            log |= held_out(engine, val_rows, tokenizer, stop, args, rank, world)
        diary.lap()

        # --- sample: G judgments of each pair. A text is a function of (seed, step, pair, sample): a resumed run, or one
        # on other ranks, meets the same texts. Pairs are dealt one by one, so that every update has a share of every rank.
        batch = [rows[i] for i in P.draw(len(rows), args.pairs, step, args.seed)]
        mine = [(n, *batch[n]) for n in range(rank, len(batch), world)]
        asked = [(n, pair, ids, g) for n, pair, ids in mine for g in range(args.group)]
        samples = engine.generate([ids for *_, ids, _ in asked],
                                  [seed_of(args.seed, step, n, g) for n, *_, g in asked], args.max_response, 1.0, stop)
        engine.sleep()
        log["seconds_sample"] = diary.lap()

        # --- score: the verdict's reward, then the two passes without gradient
        texts = [text_of(tokenizer, ids, s) for (_, _, ids, _), s in zip(asked, samples)]
        judgments = [parse(t, s.finished) for t, s in zip(texts, samples)]
        rewards = torch.tensor([score(t, pair.label, args.reward, (args.seed, step, n, g))
                                for (n, pair, _, g), t in zip(asked, texts)]).view(-1, args.group)
        adv = advantages(rewards).flatten()                                         # (B,)
        minis = []                                   # each update's rows and micro-batches: [(rows, [Batch, ...]), ...]
        for u in range(args.pairs // args.mini):
            here = [i for i, (n, *_) in enumerate(mine) if n // args.mini == u]
            groups = [(mine[i][2], [s.tokens for s in samples[i * args.group:(i + 1) * args.group]]) for i in here]
            of_rows = [i * args.group + g for i in here for g in range(args.group)]
            minis.append((of_rows, P.level(P.pack(groups, args.micro_tokens, device), device)))
        with torch.no_grad():
            old = [[policy(m) for m in micros] for _, micros in minis]
            ref = [[reference(m) for m in micros] for _, micros in minis] if reference else old
        engine_logp = torch.tensor([x for rows_u, _ in minis for i in rows_u for x in samples[i].logprobs])
        trainer_logp = torch.cat([x for (_, micros), xs in zip(minis, old) for m, x in zip(micros, xs) if m.real] or [engine_logp])
        log["gap_mean"], log["gap_max"] = check_gap(engine_logp, trainer_logp.cpu(), args)
        log["seconds_score"] = diary.lap()

        # --- learn: one clipped update for every slice of the round; old and ref stay what they were before the first
        lr, sums, norms = args.lr * P.schedule(step, steps, args.schedule), [0.0] * 3, []
        for (of_rows, micros), olds, refs in zip(minis, old, ref):
            lengths = torch.tensor([len(samples[i].tokens) for i in of_rows] or [1], device=device)
            adv_u = adv[of_rows].to(device) if of_rows else torch.zeros(1, device=device)
            for m, o, f in zip(micros, olds, refs):
                weight = m.real / (lengths[m.rows] * args.mini * args.group)        # (R,)
                loss, stats = grpo_loss(policy(m), o, f, adv_u[m.rows], weight, args.clip, args.beta)
                (loss * world).backward()          # FSDP averages over ranks; the weights are already global
                sums = [a + b for a, b in zip(sums, (loss.item(), stats["kl"], stats["clipped"]))]
            norms.append(P.optimizer_step(policy, optim, lr, clip=1.0))
        log["seconds_learn"] = diary.lap()

        # --- sync: the engine gets the new weights before anyone samples again
        engine.sync(policy, dtype)
        log["seconds_sync"] = diary.lap()

        lengths = [len(s.tokens) for s in samples]
        flat = [sum(rewards.flatten().tolist()), sum(j.verdict == pair.label for j, (_, pair, _, _) in zip(judgments, asked)),
                sum(j.verdict is None for j in judgments), sum(not s.finished for s in samples),
                (adv.view(-1, args.group).abs().amax(1) == 0).sum() * args.group, sum(lengths), len(asked),
                sum(len(ids) for _, _, ids in mine), sum(seed_of(s.tokens) % 2**32 for s in samples)]
        (reward, right, unread, cut, agree, tokens, n, prompt_tokens, sampled), sums = P.all_sum(flat), P.all_sum(sums)
        longest, = P.all_max([max(lengths, default=0)])
        seconds = sum(v for k, v in log.items() if k.startswith("seconds_"))
        updates = len(minis)
        log |= {"reward": reward / n, "accuracy": right / n, "unread": unread / n, "cut_off": cut / n,
                "agreeing_groups": agree / n, "sampled": f"{int(sampled):x}", "length_mean": tokens / n, "length_max": longest,
                "loss": sums[0] / updates, "kl": sums[1] / updates, "clipped": sums[2] / updates,
                "grad_norm": sum(norms) / updates, "lr": lr, "tokens_per_second": (tokens + prompt_tokens) / seconds,
                "peak_gb": P.peak_memory_gb(device)}
        diary.write(**log)
        bar.set_postfix(accuracy=f"{log['accuracy']:.3f}", unread=f"{log['unread']:.3f}", kl=f"{log['kl']:.3f}")
        if args.save_every and (step + 1) % args.save_every == 0:
            P.save_state(policy, optim, f"{args.out}/state", step + 1)
    if val_rows:
        diary.write(step=steps, **held_out(engine, val_rows, tokenizer, stop, args, rank, world))
    P.save_model(policy, folder, f"{args.out}/model", dtype)
    P.print0(f"wrote {args.out}/model")
    P.stop_ranks()


if __name__ == "__main__":
    main()
