"""
Stage 1: fit oracle judgments (paper section 3.2, eq. 6).

    torchrun --nproc_per_node 8 sft.py                       # the published 7B run
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen2.5-14B-Instruct --lr 3e-6
    python sft.py --model runs/demo/data/model/config.json --data runs/demo/data/sft.jsonl ...  # see Makefile

Reads pairs with a trace, writes OUT/model (Hugging Face safetensors), OUT/metrics.jsonl and, for resuming,
OUT/state. Killed and started again with the same command, it continues from its last checkpoint.
"""
import math
from dataclasses import replace

import torch
from tqdm import tqdm

import dryrun
import packing
import policy as P
import ranks as R
from files import Flags, fail, number
from rubrics import chat_messages, encode, form_of, prompt_form, read_pairs


def arguments():
    ap = Flags(__doc__)
    R.flags(ap, model="Qwen/Qwen2.5-7B-Instruct", data="gaotang/RM-R1-Distill-SFT", out="runs/sft", lr=5e-6,
            save_every=50, seed=42)
    arg = ap.add_argument
    arg("--max-len", type=number(int, 1), default=12288,
        help="longest prompt + trace in tokens; longer rows are left out")
    arg("--batch", type=number(int, 1), default=128, help="rows in an optimizer step, over all ranks")
    arg("--epochs", type=number(float, 0, above=True), default=1, help="passes over the data")
    arg("--warmup", type=number(float, 0, 1), default=0.03,
        help="share of the steps with rising learning rate")
    arg("--betas", type=number(float, 0, 0.99999), nargs=2, default=(0.9, 0.95), help="AdamW betas")
    arg("--weight-decay", type=number(float, 0), default=0.0, help="AdamW weight decay")
    arg("--grad-clip", type=number(float, 0, above=True), default=1.0, help="largest gradient norm")
    return ap.parse_args()


def tokenize(pairs, tokenizer, form, args):
    """[(prompt ids, trace ids + end of turn), ...]. The trace is encoded on its own and the role header
    belongs to the prompt, exactly as the model will meet them when it writes. Rows longer than
    --max-len are left out and counted: cutting them and closing with an end of turn would teach it to
    stop in mid-sentence. --protocol verdict: the trace is the label, whatever an oracle wrote."""
    if form[0] == "verdict":
        pairs = [replace(p, trace=f"<answer>[[{p.label}]]</answer>") for p in pairs]
    if without := [p.id for p in pairs if p.trace is None]:
        fail(f"{args.data}: {len(without)} pairs have no trace to learn from, the first is {without[0]}")
    whole = [(encode(tokenizer, chat_messages(pair, *form)),
              tokenizer.encode(pair.trace, add_special_tokens=False) + [tokenizer.eos_token_id])
             for pair in tqdm(pairs, desc="tokenize", disable=R.quiet(), leave=False)]
    rows = [(prompt, trace) for prompt, trace in whole if len(prompt) + len(trace) <= args.max_len]
    R.print0(f"{len(rows)} traces, {len(whole) - len(rows)} left out as longer than --max-len {args.max_len}")
    if len(rows) < args.batch:
        fail(f"--batch {args.batch}: more than the {len(rows)} rows in {args.data}")
    return rows


def sft_loss(logp, denom):
    """Negative log-likelihood of trace tokens, (R,) -> scalar. denom counts the trace tokens of the whole
    step, every rank and micro-batch, so that the loss does not depend on how the step was cut."""
    return -logp.sum() / denom


def learn(policy, optim, micros, tokens, lr, args, world):
    """One step on this rank's micro-batches, of a step with so many trace tokens on all ranks (eq. 6).
    -> this rank's share of the loss, the gradient's norm before clipping"""
    total = 0.0
    for micro in micros:
        loss = sft_loss(policy(micro), tokens) * micro.real
        (loss * world).backward()              # FSDP averages over ranks; the denominator is already global
        total += loss.item()
    return total, P.optimizer_step(policy, optim, lr, args.grad_clip)


def rehearse(policy, _, optim, shown, args, world):
    """One step on made-up traces, for dryrun.py. shown: [(prompt ids, [trace ids]), ...]"""
    dryrun.phase("learning")
    micros = packing.pack(shown[:len(shown) // world], args.micro_tokens, torch.device("cpu"))
    learn(policy, optim, micros, 1, args.lr, args, world)


def main():
    args = arguments()
    folder = P.resolve(args.model, weights=args.dry_run is None)
    tokenizer, _ = P.load_tokenizer(folder)
    rank, world, device = R.start_ranks(args.timeout, args.dry_run)
    form = prompt_form(folder, args.model, args.protocol, args.system_prompt, default="instruct")
    config, dtype, shard = P.config_of(folder), P.DTYPES[args.dtype], R.shards(args.shard)
    if args.max_len > P.window_of(config):
        fail(f"--max-len {args.max_len}: more than the model's window of {P.window_of(config)} tokens")
    pairs = read_pairs(args.data, args.skip_bad)
    rows = tokenize(pairs, tokenizer, form, args)
    steps = int(args.epochs * len(rows)) // args.batch
    if not steps:
        fail(f"--epochs {args.epochs:g}: less than one step of --batch {args.batch}")
    P.check_family(config, device)
    if args.dry_run is not None:
        longest = max(len(trace) for _, trace in rows)
        return dryrun.show(args, config, shard, steps, [p for p, _ in rows], 1, longest, rehearse)
    about = R.open_run(args, folder, pairs, form)

    policy = P.load(args.model, device, dtype, args.seed, recompute=args.recompute, shard=shard)
    optim = P.adamw(policy, args.lr, args.betas, args.weight_decay)
    state = R.Checkpoints(policy, optim, f"{args.out}/state")
    first = state.load(steps)
    diary = R.Diary(args.out, first, about)
    R.print0(f"{world} ranks on {device.type}, {steps} steps of {args.batch} rows")

    for step in R.steps_of(diary, state, first, steps, args):
        # Every rank takes its share of the step's rows, and as many micro-batches as the busiest one.
        diary.phase("step")
        drawn = R.draw(len(rows), args.batch, step, args.seed)
        batch = [(prompt, [trace]) for prompt, trace in (rows[i] for i in drawn)]
        mine = packing.deal(batch, world, policy.lm.config.hidden_size)[rank]
        micros = packing.level(packing.pack([batch[i] for i in mine], args.micro_tokens, device), device)
        tokens = sum(len(trace) for _, (trace,) in batch)
        lr = args.lr * P.schedule(step, steps, "cosine", int(args.warmup * steps + 0.999))
        total, norm = learn(policy, optim, micros, tokens, lr, args, world)
        loss, = R.all_sum([total])
        diary.write([norm], step=step, loss=loss, grad_norm=norm, lr=lr, trace_tokens=tokens,
                    tokens=tokens + sum(len(prompt) for prompt, _ in batch),
                    skipped_rows=[] if math.isfinite(norm) else drawn)

    P.save_model(policy, folder, f"{args.out}/model", dtype, form_of(pairs[0], *form))
    R.print0(f"wrote {args.out}/model")


if __name__ == "__main__":
    R.run(main)
