"""
Stage 2: GRPO with verifiable rewards (paper section 3.3, eq. 7 to 10). The whole algorithm is in this file.

    torchrun --nproc_per_node 8 grpo.py          # the published 7B run, from the SFT model in runs/sft/model
    python grpo.py --lora 32 --model runs/sft-lora/model ...     # adapters, on one card: README.md, "On one GPU"
    python grpo.py --model runs/demo/sft/model --data runs/demo/data/rl.jsonl ...     # see Makefile

Each step samples G judgments a pair with vLLM, rewards them, normalises rewards within each group, takes
several clipped policy-gradient updates, and gives vLLM the new weights. Writes OUT/model, OUT/metrics.jsonl,
OUT/samples.jsonl (some judgments of every step) and OUT/state (checkpoints); with --lora also OUT/adapter,
which PEFT opens.

The reward is `reward_of`, the advantage `advantages`, the loss of a token `grpo_loss`; the loop in `main` calls
them in the order sample, score, learn, sync. What a run writes, and when: lib/run.py.

What differs from textbook GRPO:

- Every rank samples and learns its part of a step. The weight of a token is fixed for the whole update, before
  the update is split over ranks and micro-batches, and randomness is a function of (seed, step, index). So
  loss and gradient agree to rounding, however many ranks there are and however a step is cut; on a CPU the
  samples are the same.
- A group of equal rewards has zero advantage, but its KL penalty still acts. With --beta 0 it is left out of
  the forward passes, and still counts in the mean.
- A reward that raises an error, or is no finite number, counts as unknown: advantage 0, and no part in the
  mean of its group.
- Before the first update of every step, the trainer's log-probs are compared with the sampler's. They
  disagree when the weight sync is broken, and then the run ends (--max-mismatch).
- Other objectives (GSPO, CISPO, dynamic sampling, ...) are files in forks/, each of which replaces a function
  of this file. To change the reward, replace `reward_of`, as forks/format_reward.py does.

Shapes: P pairs of a step, G judgments a pair, B judgments of an update, T tokens of one judgment, R response
tokens of a micro-batch, concatenated without padding.
"""

import gc
import hashlib
import math
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
import torch

from judge.soundness import knows_reason, right_and_sound, sound_reward
from lib import packing
from lib.chat import decode_sample, encode_or_leave_out, load_tokenizer
from lib.checkpoint import Checkpoints
from lib.dist import (
    all_gather,
    all_sum,
    explain,
    phase,
    print0,
    shard_size,
    signal_caught,
    start_ranks,
)
from lib.engine import Engine, check_mismatch, check_tp
from lib.files import Failure, Flags, first_line, number, progress_bar, run_main, seed_of
from lib.lora import without_adapters
from lib.model_files import config_of, find_model, window_of
from lib.pairs import Pair, read_pairs
from lib.policy import (
    DTYPES,
    Offload,
    adamw,
    check_family,
    load_policy,
    lr_schedule,
    optimizer_step,
    save_adapter,
    save_model,
)
from lib.run import RunLog, begin_loop, draw_batch, learning_rate, open_run, training_flags
from rubrics import (
    PROTOCOLS,
    chat_messages,
    parse,
    prompt_style,
    published_reward,
    style_to_save,
    verdict_reward,
)

GRPO_RATE = 1e-6  # of the published 7B run


def flags():
    parser = Flags(__doc__)
    training_flags(
        parser,
        PROTOCOLS,
        model="runs/sft/model",
        data="gaotang/RM-R1-after-Distill-RLVR",
        out="runs/grpo",
        lr=GRPO_RATE,
        save_every=10,
        seed=1,
    )
    arg = parser.add_argument
    count, weight = number(int, 1), number(float, 0)
    positive, share = number(float, 0, above=True), number(float, 0, 1, above=True)
    arg("--val-data", help="held-out pairs, judged greedily every --val-every steps")
    arg("--val-every", type=count, default=5, help="steps between held-out evaluations")
    arg(
        "--max-prompt",
        type=count,
        default=4096,
        help="longest prompt in tokens; longer ones are left out",
    )
    arg("--max-response", type=count, default=8192, help="longest judgment in tokens")
    arg("--batch", type=count, default=1024, help="pairs sampled before each round of updates")
    arg("--mini-batch", type=count, default=128, help="pairs in one update")
    arg("--group-size", type=count, default=7, help="judgments a pair (G)")
    arg("--steps", type=count, help="rounds of sampling; default: one pass over the data")
    arg(
        "--schedule",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="learning-rate schedule",
    )
    arg(
        "--clip",
        type=weight,
        nargs=2,
        default=(0.2, 0.2),
        help="clip range of the ratio: 1 - LOW, 1 + HIGH",
    )
    arg("--beta", type=weight, default=1e-3, help="KL coefficient; 0 loads no reference")
    arg(
        "--reward",
        choices=("verdict", "sound", "published", "random"),
        default="verdict",
        help="right verdict (paper eq. 8) by the parser; sound: for a sound reason too; published: "
        "by the released rule; random: a control",
    )
    arg(
        "--advantage",
        choices=("grpo", "drgrpo"),
        default="grpo",
        help="divide by the group's standard deviation (grpo) or not (drgrpo)",
    )
    arg(
        "--loss-mean",
        choices=("sequence", "token", "constant"),
        default="sequence",
        help="how token losses are averaged, see token_weights",
    )
    arg(
        "--engine-cap",
        type=positive,
        help="multiply a token's gain by trainer / sampler probability, at most this (truncated importance sampling)",
    )
    arg(
        "--engine-memory",
        type=share,
        default=0.5,
        help="share of each card for vLLM while it samples",
    )
    arg(
        "--tp",
        type=count,
        default=1,
        help="ranks that sample with one engine together (tensor parallel)",
    )
    arg(
        "--max-mismatch",
        type=weight,
        default=0.1,
        help="largest mean difference of the trainer's and the sampler's log-probs",
    )
    arg(
        "--offload",
        action="store_true",
        help="keep reference, optimizer, and the frozen weights of --lora in host memory while they are not used",
    )
    return parser


def arguments(argv=None):
    args = flags().parse_args(argv)
    args.lr = args.lr or learning_rate(GRPO_RATE, args.lora)
    if args.group_size < 2:
        raise Failure(
            f"--group-size {args.group_size}: one judgment has nothing to be compared with; take 2 or more"
        )
    if args.batch % args.mini_batch:
        raise Failure(
            f"--batch {args.batch} does not divide into updates of --mini-batch {args.mini_batch}"
        )
    return args


def main():
    args = arguments()
    folder = find_model(args.model, adapter=True)
    tokenizer, stop = load_tokenizer(folder)
    rank, world, device = start_ranks(args.timeout)
    config = config_of(folder)
    style = prompt_style(folder, args.model, args.protocol, args.system_prompt, default="instruct")
    data = read_data(args, tokenizer, style, config, world)
    check_family(config, device)
    shard = shard_size(args.shard)
    judge_json = style_to_save([row.pair for row in data.rows], style, print0)
    run_config = open_run(args, folder, data.pairs, judge_json)

    phase("load the weights")
    dtype = DTYPES[args.dtype]
    load = partial(load_policy, args.model, device, dtype, args.seed, shard=shard)
    policy = load(recompute=args.recompute, lora=args.lora)
    reference = load_reference(policy, load, args)
    optim = adamw(policy, args.lr, betas=(0.9, 0.999), weight_decay=0.01)
    checkpoints = Checkpoints(policy, optim, f"{args.out}/state")
    first_step = checkpoints.load(data.steps)

    phase("start the engine")
    offload = Offload(args.offload, device)
    offload.park(policy, reference, optim)  # vLLM wants its share of the card when it starts
    window = args.max_prompt + args.max_response
    engine = Engine(folder, window, args.dtype, "dummy", args.engine_memory, args.tp)
    engine.sync(policy, dtype)
    sample = partial(sample_groups, engine, tokenizer, stop, args, rank, world)

    log = RunLog(args.out, first_step, run_config)
    print0(
        f"{world} ranks on {device.type}, {data.steps} steps of {args.batch} pairs x {args.group_size} "
        f"judgments, {args.batch // args.mini_batch} updates each"
    )
    begin_loop()
    bar = progress_bar(range(first_step, data.steps), "steps", initial=first_step, total=data.steps)
    for step in bar:
        validation = {}  # of the weights before this step's updates
        if data.val_rows and step % args.val_every == 0:
            validation = accuracy(sample(data.val_rows, step), "val_")

        log.phase("sample")
        groups, statistics = collect_groups(sample, data.rows, step, args)
        engine.sleep()

        log.phase("score")
        offload.fetch(policy)
        rewards = np.array([[r.reward for r in group] for group in groups])  # (P, G), float64
        advantage = advantages(torch.from_numpy(rewards), args.advantage)  # (P, G)
        updates = split_into_updates(
            groups, advantage, args, device, rank, world, config.hidden_size
        )
        with offload.use(reference):
            ref_logp = [token_logprobs(reference, update) for update in updates]
        # The first update learns with the policy that sampled, so its own forward pass gives old_logp.
        old_logp = [None, *(token_logprobs(policy, update) for update in updates[1:])]

        log.phase("learn")
        lr = args.lr * lr_schedule(step, data.steps, args.schedule)
        losses, norms = [], []
        with offload.use(optim):
            for n, update in enumerate(updates):
                logp, loss = accumulate_gradients(
                    policy, update, old_logp[n], ref_logp[n], args, world
                )
                if n == 0:  # now all old log-probs are known, and no step has been taken
                    mismatch = check_mismatch([logp, *old_logp[1:]], updates, args.max_mismatch)
                losses.append(loss)
                norms.append(optimizer_step(policy, optim, lr, clip=1.0))

        log.phase("sync")  # before anyone samples again
        offload.park(policy)
        engine.sync(policy, dtype)

        log.phase("")
        log.append("samples.jsonl", examples(groups, tokenizer, step))
        row = {"step": step, "lr": lr, **validation, **statistics, **summary(groups), **mismatch}
        row |= mean_losses(losses) | policy.lora_changed()
        row |= {"grad_norm": fmean(norms), "skipped_pairs": skipped_pairs(groups, norms, args)}
        log.write(row, norms)
        bar.set_postfix(log.headline("loss", "accuracy", "no_verdict", "kl"), refresh=False)
        gc.collect()  # between steps, on all ranks at once

        done = step + 1
        signal = signal_caught()  # on any rank
        diverged = log.diverged(args.max_bad, last=done == data.steps)
        if signal or diverged or (args.save_every and done % args.save_every == 0):
            # Written in the background. Updates without a finite gradient were skipped, so it is sound.
            checkpoints.save(done)
        saved = checkpoints.settle(wait=bool(signal or diverged))
        if diverged:
            raise Failure(log.divergence(step, saved))
        if signal:
            return log.stopped(done, saved)

    checkpoints.settle()
    if data.val_rows:
        log.write({"step": data.steps, **accuracy(sample(data.val_rows, data.steps), "val_")})
    log.close()
    save_adapter(policy, args.model, run_config, f"{args.out}/adapter")
    save_model(policy, folder, f"{args.out}/model", dtype, judge_json, stop)


def load_reference(policy, load, args):
    """What the KL penalty compares with: the model that the run starts from. None without a penalty."""
    if not args.beta:
        return None
    if args.lora:
        return partial(without_adapters, policy)  # no second network
    return load(trainable=False)


# ---------------------------------------------------------------- data


@dataclass
class Row:
    """A pair in one A/B order, and the token ids of its prompt."""

    pair: Pair
    prompt: np.ndarray


@dataclass
class Data:
    """What a run learns from: pairs as they were read, rows to draw from, held-out rows, number of steps."""

    pairs: list
    rows: list
    val_rows: list
    steps: int


def read_data(args, tokenizer, style, config, world):
    """Read the data, and refuse flags that do not fit it, the model or the ranks. -> `Data`"""
    if args.max_prompt + args.max_response > window_of(config):
        raise Failure(
            f"--max-prompt {args.max_prompt} and --max-response {args.max_response} exceed the model's "
            f"window of {window_of(config)} tokens"
        )
    check_tp(args.tp, world, config)
    pairs, rows = tokenize_prompts(args.data, tokenizer, style, args)
    if len(rows) < args.batch:
        raise Failure(
            f"--batch {args.batch}: more than the {len(rows)} usable pairs in {args.data}"
        )
    known = [knows_reason(row.pair) for row in rows]
    if args.reward == "sound" and not any(known):
        raise Failure(
            f"--reward sound: no pair of {args.data} says what its true reason is, as those of data/toy.py do"
        )
    val_rows = tokenize_prompts(args.val_data, tokenizer, style, args)[1] if args.val_data else []
    return Data(pairs, rows, val_rows, args.steps or len(rows) // args.batch)


def tokenize_prompts(source, tokenizer, style, args):
    """-> the pairs of a source, and [Row, ...] without those longer than --max-prompt, which are counted"""
    pairs = read_pairs(source, args.skip_bad)
    rows, too_long = [], 0
    for pair in progress_bar(pairs, "tokenize", leave=False):
        prompt = encode_or_leave_out(tokenizer, chat_messages(pair, style), f"{source}: {pair.id}")
        if prompt is None:
            continue
        if len(prompt) <= args.max_prompt:
            rows.append(Row(pair, prompt))
        else:
            too_long += 1
    print0(
        f"{source}: {len(rows)} pairs, {too_long} left out as longer than "
        f"--max-prompt {args.max_prompt}"
    )
    return pairs, rows


# ---------------------------------------------------------------- sampling and rewards


@dataclass
class Rollout:
    """One sampled judgment.

    tokens        (T,)  token ids, int32; the prompt is row.prompt
    sampler_logp  (T,)  log-prob of each token under the engine, float32
    finished            ended by itself, rather than at --max-response
    verdict             what the parser reads in it: "A", "B" or None
    reward              NaN where it could not be computed
    sound               its verdict is right and so are its reasons; None where the true reason is not known
    """

    row: Row
    tokens: np.ndarray
    sampler_logp: np.ndarray
    finished: bool
    verdict: str | None
    reward: float
    sound: bool | None = None


def collect_groups(sample, rows, step, args):
    """The groups that a step learns from. -> [[Rollout, ...], ...] (P, G), and numbers for the log"""
    drawn = draw_batch(len(rows), args.batch, step, args.seed)
    groups = sample([rows[i] for i in drawn], step, args.group_size, temperature=1.0)
    return groups, {"zero_variance_groups": fmean(is_zero_variance(group) for group in groups)}


def is_zero_variance(group):
    """True if all known rewards of a group are equal, so that comparing them teaches nothing."""
    return len({r.reward for r in group if math.isfinite(r.reward)}) < 2


def sample_groups(
    engine,
    tokenizer,
    stop,
    args,
    rank,
    world,
    rows,
    step,
    group_size=1,
    temperature=0.0,
    first_index=0,
):
    """A group of `group_size` rollouts for each row of a batch that every rank knows. A collective.

    Each rank samples and rewards every world-th row, then all gather the results. The random seed of a text is
    a function of (seed, step, index, number), so a resumed run, or one on more ranks, samples the same texts.

    first_index  index of the first row; forks/dynamic_sampling.py samples a second batch in the same step,
                 which needs other seeds
    """
    requests = []  # (row, key of the sample)
    for index in range(rank, len(rows), world):
        for n in range(group_size):
            requests.append((rows[index], (args.seed, step, first_index + index, n)))
    prompts = [row.prompt for row, _ in requests]
    seeds = [seed_of(*key) for _, key in requests]
    samples = engine.generate(prompts, seeds, args.max_response, temperature, stop)

    results, errors = [], []  # of this rank
    for (row, key), s in zip(requests, samples):
        text = decode_sample(tokenizer, row.prompt, s.tokens)
        judgment = parse(text, s.finished)
        try:
            reward = reward_of(text, judgment, row.pair, len(s.tokens), key, args)
            reward = finite_number(reward)
        except Exception as e:  # one judgment must not cost the run: it is counted and ignored
            sentence = f"{type(e).__name__}: {first_line(e)} (pair {row.pair.id})"
            errors.append((sentence, "" if errors else traceback.format_exc()))
            reward = math.nan
        sound = right_and_sound(judgment, row.pair)
        # The fields of Rollout after `row`.
        results.append((s.tokens, s.logprobs, s.finished, judgment.verdict, reward, sound))

    # Pairs and prompts are on every rank already.
    gathered = all_gather((results, errors))
    all_errors = [error for _, theirs in gathered for error in theirs]
    report_errors(step, all_errors, len(rows) * group_size)
    groups = []
    for index, row in enumerate(rows):
        results, _ = gathered[index % world]
        start = index // world * group_size
        groups.append([Rollout(row, *result) for result in results[start : start + group_size]])
    return groups


def reward_of(text, judgment, pair, length, key, args):
    """The reward of a judgment, by --reward.

    verdict    +1 if the parsed verdict is right, else -1 (paper eq. 8)
    sound      +1 only if the reasons are sound, too, where the true ones are known (judge/soundness.py)
    published  as verdict by the released rule, which looks for a string at the end of the text
    random     a coin that `key` throws: a control

    text      what the judge wrote, special tokens included
    judgment  the same, parsed
    length    its tokens; used by forks/overlong.py
    key       (seed, step, index, number), which names the sample
    """
    if args.reward == "random":
        return 1.0 if hashlib.sha256(repr(key).encode()).digest()[0] % 2 else -1.0
    if args.reward == "published":
        return published_reward(text, pair.label)
    if args.reward == "sound":
        return sound_reward(judgment, pair)
    return verdict_reward(judgment, pair.label)


def finite_number(reward):
    """A reward as a float, also from a tensor of one number.

    Raises ValueError for NaN and infinities, TypeError for what is no number.
    """
    if not math.isfinite(reward):
        raise ValueError(f"the reward is {reward}")
    return float(reward)


SHOWN_TRACEBACKS = []  # the first of a reward in this run: it is shown once


def report_errors(step, errors, count):
    """Report in one line the rewards that raised an error in this step; the run ends if all did.

    errors  [(sentence, traceback), ...] of all ranks; the first of each rank has its traceback
    """
    if not errors:
        return
    sentence, first_traceback = errors[0]
    if not SHOWN_TRACEBACKS:
        SHOWN_TRACEBACKS.append(first_traceback)
        print0(first_traceback, end="", file=sys.stderr)
    if len(errors) == count:
        raise Failure(
            f"step {step}: every reward raised an error, the first {sentence}; its traceback stands above"
        )
    print0(
        f"step {step}: {len(errors)} of {count} rewards raised an error, the first {sentence}",
        file=sys.stderr,
    )


# ---------------------------------------------------------------- advantages and loss


def advantages(rewards, kind="grpo"):
    """(r - mean) / (std + 1e-6) within each group (paper eq. 10; sample std and 1e-6 as published).

    rewards  (P, G) -> (P, G), float32. NaN, a reward that is not known: advantage 0, and no part in its group's
             mean
    drgrpo   r - mean, without the scale (Dr. GRPO, arXiv 2503.20783)
    """
    r, known, unit = in_units_of_range(rewards)  # (P, G), (P, G), (P, 1)
    mean = r.where(known, math.nan).nanmean(1, keepdim=True)  # (P, 1)
    deviation = (r - mean).where(known, 0)  # (P, G)
    if kind == "drgrpo":
        return (deviation * unit).float().nan_to_num()  # infinity: float32's largest
    deviation = deviation.float()  # (P, G)
    epsilon = (1e-6 / unit).float()  # (P, 1)
    count = known.sum(1, keepdim=True).clamp(min=2)  # (P, 1)
    std = (deviation.square().sum(1, keepdim=True) / (count - 1)).sqrt()  # (P, 1)
    return deviation / (std + epsilon)


def in_units_of_range(rewards):
    """Rewards as shares of their group's range, from 0 to 1, so that no square is beyond a float's range.

    Equal rewards have the advantage 0 to the last bit. In float32 the mean of seven rewards of 1.3 differs from
    1.3 by 1e-7; divided by 1e-6, that would be an advantage of 0.1.
    -> (P, G) the shares, (P, G) True where a reward is known and not all of its group are equal, (P, 1) the range
    """
    rewards = rewards.double()  # 0.3 and 0.1 + 0.2 are not equal
    known = rewards.isfinite()  # (P, G)
    highest = rewards.where(known, -math.inf).amax(1, keepdim=True)  # (P, 1)
    lowest = rewards.where(known, math.inf).amin(1, keepdim=True)  # (P, 1)
    differ = highest > lowest  # (P, 1)
    # Where the range itself is beyond a float's, a quarter of every reward has the same shares.
    quarter = torch.where((highest - lowest).isfinite(), 1.0, 0.25).double()  # (P, 1)
    lowest = lowest * quarter  # (P, 1)
    width = (highest * quarter - lowest).where(differ, 1)  # (P, 1)
    shares = (rewards * quarter - lowest) / width  # (P, G)
    return shares, known & differ, width / quarter


def grpo_loss(
    logp,
    old_logp,
    ref_logp,
    advantage,
    token_weight,
    rows=None,
    sampler_logp=None,
    clip=(0.2, 0.2),
    kl_coef=1e-3,
    engine_cap=None,
):
    """Clipped policy gradient with a KL penalty (paper eq. 9), over response tokens.

    logp          (R,)  log-probability of each sampled token under the policy
    old_logp      (R,)  the same under the policy that sampled it, no gradient
    ref_logp      (R,)  the same under the frozen reference, no gradient; None without a KL penalty
    advantage     (R,)  the advantage of the token's judgment
    token_weight  (R,)  its weight in the mean over the whole update, see `token_weights`
    rows          (R,)  index of the judgment that the token belongs to; used by forks/gspo.py
    sampler_logp  (R,)  the log-probability that the engine gave it

    The weights are global, so cutting an update into other micro-batches does not change the loss.
    -> loss, {"kl", "clipped"}: this micro-batch's part of the update's weighted means
    """
    low, high = 1 - clip[0], 1 + clip[1]
    ratio = importance_ratio(logp, old_logp, rows)  # (R,), 1 everywhere in the first update
    gain = policy_gain(ratio, logp, advantage, low, high)  # (R,)
    if engine_cap:
        # The tokens come from the engine, whose probabilities differ from the trainer's a little.
        gain = gain * (old_logp - sampler_logp).exp().clamp(max=engine_cap)  # (R,)
    # Without a reference kl_coef is 0. Then kl is the divergence from the policy that sampled, for the log.
    kl = kl_estimate(logp, old_logp if ref_logp is None else ref_logp)  # (R,)

    loss = ((kl_coef * kl - gain) * token_weight).sum()
    clipped = ((ratio < low) | (ratio > high)).float()  # (R,)
    return loss, {
        "kl": (kl * token_weight).sum().item(),
        "clipped": (clipped * token_weight).sum().item(),
    }


def importance_ratio(logp, old_logp, rows):
    """Probability of each token under the policy over that under the policy that sampled it. (R,)

    rows is for forks/gspo.py, whose ratio is one for a whole judgment.
    """
    return (logp - old_logp).exp()  # (R,)


def policy_gain(ratio, logp, advantage, low, high):
    """The clipped surrogate of PPO (arXiv 1707.06347, eq. 7): the smaller of two estimates. (R,)

    logp is for forks/cispo.py, whose gradient goes through it.
    """
    return torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)  # (R,)


def kl_estimate(logp, ref_logp):
    """The estimator k3 of the KL divergence from the reference (Schulman, joschu.net/blog/kl-approx.html). (R,)

    The inner clamp prevents an overflow of exp. The outer clamp at 10 is the published one.
    """
    log_ratio = (ref_logp - logp).clamp(max=20)  # (R,)
    return (log_ratio.exp() - log_ratio - 1).clamp(max=10)  # (R,)


# ---------------------------------------------------------------- updates


@dataclass(frozen=True)
class MicroBatch:
    """A packed batch, with a value for each of its R response tokens.

    advantage     (R,)  of its judgment
    token_weight  (R,)  its weight in the mean of the update
    sampler_logp  (R,)  its log-prob under the engine
    """

    batch: packing.Batch
    advantage: torch.Tensor
    token_weight: torch.Tensor
    sampler_logp: torch.Tensor


def split_into_updates(groups, advantage, args, device, rank, world, width):
    """This rank's micro-batches of every update, as many as on every other rank. A collective.

    groups     [[Rollout, ...], ...] of the whole step (P, G)
    advantage  (P, G)
    width      hidden size of the model, from which the cost of attention follows
    -> [[MicroBatch, ...], ...], one list an update of --mini-batch groups
    """
    empty = torch.zeros(0, device=device)  # (0,)
    dummy = MicroBatch(packing.dummy_batch(device), empty, empty, empty)
    updates = []
    for start in range(0, len(groups), args.mini_batch):
        indices = range(start, start + args.mini_batch)
        total = sum(len(r.tokens) for i in indices for r in groups[i])  # of all ranks
        # Without a KL penalty, zero advantage means zero gradient: such groups are left out.
        # One is kept where all are such, since an update needs a forward pass.
        useful = [i for i in indices if args.beta or advantage[i].any()] or [start]
        to_pack = [(groups[i][0].row.prompt, [r.tokens for r in groups[i]]) for i in useful]
        mine = packing.balance(to_pack, world, width)[rank]
        batches = packing.pack([to_pack[k] for k in mine], args.micro_tokens, device)

        mine = [useful[k] for k in mine]  # indices of this rank's groups in the step
        rollouts = [r for i in mine for r in groups[i]]  # B of them
        lengths = torch.tensor([len(r.tokens) for r in rollouts], device=device)  # (B,)
        weights = token_weights(lengths, total, args)  # (B,)
        values = advantage[mine].flatten().to(device)  # (B,)
        sampler_logp = torch.cat(
            [torch.zeros(0), *(torch.from_numpy(r.sampler_logp) for r in rollouts)]
        ).to(device)  # of all tokens of this rank, in the order of the batches
        pieces = sampler_logp.split([len(batch.targets) for batch in batches])  # (R,) each

        # batch.rows (R,) says whose token each is.
        micro_batches = [
            MicroBatch(batch, values[batch.rows], weights[batch.rows], piece)
            for batch, piece in zip(batches, pieces)
        ]
        updates.append(packing.equalise(micro_batches, dummy))
    return updates


def token_weights(lengths, total, args):
    """The weight of one token of each judgment in the mean of an update. (B,)

    lengths    (B,) tokens of each judgment
    total      tokens in the whole update, of all ranks
    sequence   1 / (length x judgments): the mean over judgments of the mean over tokens (paper eq. 9)
    token      1 / total: the mean over tokens; long judgments count more (DAPO, arXiv 2503.14476, eq. 8)
    constant   1 / (--max-response x judgments): a token's weight does not depend on the length (Dr. GRPO)
    """
    judgments = args.mini_batch * args.group_size
    denominator = {
        "sequence": lengths * judgments,  # (B,)
        "token": torch.full_like(lengths, total),  # (B,)
        "constant": torch.full_like(lengths, args.max_response * judgments),  # (B,)
    }[args.loss_mean]
    return 1 / denominator.float()  # (B,)


@torch.no_grad()
def token_logprobs(network, micro_batches):
    """Log-probs of the micro-batches' tokens under a network, [(R,), ...]; None each without a network."""
    return [network(m.batch) if network else None for m in micro_batches]


def accumulate_gradients(policy, micro_batches, old_logp, ref_logp, args, world):
    """Forward and backward passes of one update (paper eq. 9); optimizer_step takes the step.

    old_logp  [(R,), ...] of each micro-batch, or None: the policy that sampled is the one that learns
    ref_logp  [(R,) or None, ...]
    -> [(R,), ...] log-probs of the policy before the update, this rank's part of {"loss", "kl", "clipped"}
    """
    before, totals = [], {"loss": 0.0, "kl": 0.0, "clipped": 0.0}
    for n, m in enumerate(micro_batches):
        logp = policy(m.batch)  # (R,)
        before.append(logp.detach())
        loss, statistics = grpo_loss(
            logp,
            before[n] if old_logp is None else old_logp[n],
            ref_logp[n],
            m.advantage,
            m.token_weight,
            m.batch.rows,
            m.sampler_logp,
            clip=args.clip,
            kl_coef=args.beta,
            engine_cap=args.engine_cap,
        )
        # FSDP takes the mean over ranks; the weights are global already.
        (loss * world).backward()
        for name, value in {"loss": loss.item(), **statistics}.items():
            totals[name] += value
    return before, totals


# ---------------------------------------------------------------- the log; docs/log.md explains each number


def mean_losses(losses):
    """Means over the updates of a step and sums over ranks. losses: [{"loss", "kl", "clipped"}, ...]"""
    names = list(losses[0])
    sums = all_sum([sum(loss[name] for loss in losses) for name in names])
    return {name: total / len(losses) for name, total in zip(names, sums)}


def accuracy(groups, prefix=""):
    """Shares of judgments whose verdict is right, that have no verdict, and that are right for a sound reason.

    The last is of the judgments of pairs whose true reason is known; it is left out where there are none.
    """
    rollouts = [r for group in groups for r in group]
    shares = {
        f"{prefix}accuracy": fmean(r.verdict == r.row.pair.label for r in rollouts),
        f"{prefix}no_verdict": fmean(r.verdict is None for r in rollouts),
    }
    sound = [r.sound for r in rollouts if r.sound is not None]
    if sound:
        shares[f"{prefix}sound"] = fmean(sound)
    return shares


def mean_reward(rewards):
    """The mean of finite rewards, 0 without any. Their sum may be beyond a float's range; a power of two is exact."""
    return fmean([reward / 2**40 for reward in rewards] or [0]) * 2**40


def summary(groups):
    """What the rollouts of a step look like."""
    rollouts = [r for group in groups for r in group]
    known = [r.reward for r in rollouts if math.isfinite(r.reward)]
    lengths = [len(r.tokens) for r in rollouts]
    content = b"".join(r.tokens.tobytes() for r in rollouts)
    return {
        "reward": mean_reward(known),
        "reward_errors": len(rollouts) - len(known),
        **accuracy(groups),
        "truncated": fmean(not r.finished for r in rollouts),
        "length_mean": fmean(lengths),
        "length_max": max(lengths),
        "tokens": sum(lengths) + sum(len(r.row.prompt) for r in rollouts),
        "samples_digest": hashlib.sha256(content).hexdigest()[:12],
    }


def skipped_pairs(groups, norms, args):
    """Ids of the pairs whose update had no finite gradient, and was skipped."""
    bad = [i for i in range(len(groups)) if not math.isfinite(norms[i // args.mini_batch])]
    return [groups[i][0].row.pair.id for i in bad]


def examples(groups, tokenizer, step, count=4):
    """Some of what a step sampled, for a person to read: a judgment of each of the first groups."""
    for group in groups[:count]:
        r = group[step % len(group)]
        yield {
            "step": step,
            "pair": r.row.pair.id,
            "label": r.row.pair.label,
            "verdict": r.verdict,
            "reward": r.reward if math.isfinite(r.reward) else None,
            "finished": r.finished,
            "text": tokenizer.decode(r.tokens),
        }


if __name__ == "__main__":
    run_main(main, explain)
