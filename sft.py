"""
Stage 1: distil oracle judgments (paper section 3.2, eq. 6).

    torchrun --nproc_per_node 8 sft.py                       # the published 7B run
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen2.5-14B-Instruct --lr 3e-6
    python sft.py --lora 32 --out runs/sft-lora              # adapters, on one card of 48 GB
    python sft.py --model runs/demo/data/model/config.json --data runs/demo/data/sft.jsonl ...  # see Makefile

Reads pairs with a trace, an oracle's judgment, and fits it token by token. Writes OUT/model (Hugging Face
safetensors), OUT/metrics.jsonl and OUT/state (checkpoints); with --lora also OUT/adapter, which PEFT opens.
Killed and started again with the same command, it continues from its last checkpoint.

Shapes: R trace tokens of a micro-batch, concatenated without padding.
"""

import gc
import math
from dataclasses import dataclass, replace

import numpy as np

from lib import packing
from lib.chat import encode_or_leave_out, encode_reply, load_tokenizer
from lib.checkpoint import Checkpoints
from lib.dist import all_sum, explain, phase, print0, shard_size, signal_caught, start_ranks
from lib.files import Failure, Flags, number, progress_bar, run_main
from lib.model_files import config_of, find_model, window_of
from lib.pairs import is_single, read_pairs
from lib.policy import (
    DTYPES,
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
    style_to_save,
    written_criteria,
)

SFT_RATE = 5e-6  # of the published 7B run


def flags():
    parser = Flags(__doc__)
    training_flags(
        parser,
        PROTOCOLS,
        model="Qwen/Qwen2.5-7B-Instruct",
        data="gaotang/RM-R1-Distill-SFT",
        out="runs/sft",
        lr=SFT_RATE,
        save_every=50,
        seed=42,
    )
    arg = parser.add_argument
    arg(
        "--max-len",
        type=number(int, 1),
        default=12288,
        help="longest prompt + trace in tokens; longer rows are left out",
    )
    arg(
        "--batch",
        type=number(int, 1),
        default=128,
        help="rows in an optimizer step, over all ranks",
    )
    arg("--epochs", type=number(float, 0, above=True), default=1, help="passes over the data")
    arg(
        "--warmup",
        type=number(float, 0, 1),
        default=0.03,
        help="share of the steps with a rising rate",
    )
    arg("--betas", type=number(float, 0, 0.99999), nargs=2, default=(0.9, 0.95), help="AdamW betas")
    arg("--weight-decay", type=number(float, 0), default=0.0, help="AdamW weight decay")
    arg("--grad-clip", type=number(float, 0, above=True), default=1.0, help="largest gradient norm")
    return parser


def arguments(argv=None):
    args = flags().parse_args(argv)
    args.lr = args.lr or learning_rate(SFT_RATE, args.lora)
    return args


def main():
    args = arguments()
    folder = find_model(args.model, adapter=True)
    tokenizer, ends = load_tokenizer(folder)
    rank, world, device = start_ranks(args.timeout)
    config = config_of(folder)
    style = prompt_style(folder, args.model, args.protocol, args.system_prompt, default="instruct")
    data = read_data(args, tokenizer, style, config, world)
    check_family(config, device)
    shard = shard_size(args.shard)
    judge_json = style_to_save(data.pairs, style, print0)
    run_config = open_run(args, folder, data.pairs, judge_json)

    phase("load the weights")
    dtype = DTYPES[args.dtype]
    policy = load_policy(
        args.model,
        device,
        dtype,
        args.seed,
        recompute=args.recompute,
        shard=shard,
        lora=args.lora,
    )
    optim = adamw(policy, args.lr, args.betas, args.weight_decay)
    checkpoints = Checkpoints(policy, optim, f"{args.out}/state")
    first_step = checkpoints.load(data.steps)

    # Less a thousandth, for what rounding adds to a whole number.
    warmup_steps = math.ceil(args.warmup * data.steps - 1e-3)
    log = RunLog(args.out, first_step, run_config)
    print0(f"{world} ranks on {device.type}, {data.steps} steps of {args.batch} rows")
    begin_loop()
    bar = progress_bar(range(first_step, data.steps), "steps", initial=first_step, total=data.steps)
    for step in bar:
        log.phase("step")
        drawn = draw_batch(len(data.rows), args.batch, step, args.seed)
        rows = [data.rows[i] for i in drawn]
        batches = split_into_batches(rows, args, device, rank, world, config.hidden_size)
        trace_tokens = sum(len(row.trace) for row in rows)  # of all ranks
        lr = args.lr * lr_schedule(step, data.steps, "cosine", warmup_steps)
        my_loss = accumulate_gradients(policy, batches, trace_tokens, world)
        norm = optimizer_step(policy, optim, lr, args.grad_clip)
        (loss,) = all_sum([my_loss])

        log.write(
            {
                "step": step,
                "loss": loss,
                "grad_norm": norm,
                "lr": lr,
                "trace_tokens": trace_tokens,
                "tokens": trace_tokens + sum(len(row.prompt) for row in rows),
                "skipped_rows": [] if math.isfinite(norm) else drawn,
            },
            [norm],
        )
        bar.set_postfix(log.headline("loss"), refresh=False)
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
    log.close()
    save_adapter(policy, args.model, run_config, f"{args.out}/adapter")
    save_model(policy, folder, f"{args.out}/model", dtype, judge_json, ends)


@dataclass
class Row:
    """Token ids of a prompt, and of the trace to learn after it; int32."""

    prompt: np.ndarray
    trace: np.ndarray


@dataclass
class Data:
    """What a run learns from: pairs as they were read, rows to draw from, number of steps."""

    pairs: list
    rows: list
    steps: int


def read_data(args, tokenizer, style, config, world):
    """Read the data, and refuse flags that do not fit it or the model. -> `Data`"""
    if args.max_len > window_of(config):
        raise Failure(
            f"--max-len {args.max_len}: more than the model's window of {window_of(config)} tokens"
        )
    pairs = read_pairs(args.data, args.skip_bad, singles=True)
    rows = tokenize(pairs, tokenizer, style, args)
    steps = int(args.epochs * len(rows)) // args.batch
    if not steps:
        raise Failure(f"--epochs {args.epochs:g}: less than one step of --batch {args.batch}")
    return Data(pairs, rows, steps)


def tokenize(pairs, tokenizer, style, args):
    """Rows of at most --max-len tokens; longer ones are left out and counted. -> [Row, ...]

    The prompt includes the assistant's header, and the trace is encoded on its own, as in generation. Where the
    header opens a thought, the trace closes it. Long rows are left out, not cut: a cut trace with an end of turn
    would teach the model to stop in mid-sentence. With the protocol "verdict" the trace is the label, whatever the
    oracle wrote. Traces with a wrong verdict are learned, as the demo's lazy oracle wants it, and counted.
    """
    if style.protocol == "verdict":
        pairs = [pair if is_single(pair) else verdict_alone(pair) for pair in pairs]
    without = [pair.id for pair in pairs if not (pair.trace or "").strip()]
    if without:
        raise Failure(
            f"{args.data}: {len(without)} pairs have no trace to learn from, the first is {without[0]}"
        )
    check_singles(pairs, args.data)
    rows, too_long = [], 0
    for pair in progress_bar(pairs, "tokenize", leave=False):
        prompt = encode_or_leave_out(
            tokenizer, chat_messages(pair, style), f"{args.data}: {pair.id}"
        )
        if prompt is None:
            continue
        trace = encode_reply(tokenizer, prompt, pair.trace)
        if len(prompt) + len(trace) <= args.max_len:
            rows.append(Row(prompt, trace))
        else:
            too_long += 1
    print0(f"{len(rows)} traces, {too_long} left out as longer than --max-len {args.max_len}")
    wrong = sum(parse(pair.trace).verdict != pair.label for pair in pairs if not is_single(pair))
    if wrong:
        print0(f"{wrong} traces of {len(pairs)} do not end in the verdict of their label")
    if len(rows) < args.batch:
        raise Failure(f"--batch {args.batch}: more than the {len(rows)} rows in {args.data}")
    return rows


def check_singles(pairs, source):
    """Raises Failure for a row of one response without a score, or of a question without criteria or with an answer.

    Such a row is perhaps meant as a pair, whose responses stand in columns of other names.
    """
    for pair in filter(is_single, pairs):
        judgment = parse(pair.trace, single=True)
        if pair.a is not None and judgment.score is None:
            raise Failure(
                f"{source}: {pair.id} has one response, but its trace no score: {judgment.reason}"
            )
        has_answer = judgment.reason != "no answer"
        if pair.a is None and (has_answer or not written_criteria(judgment)):
            raise Failure(
                f"{source}: {pair.id} has no response, so its trace should be criteria or a solution, and no answer"
            )


def verdict_alone(pair):
    """The pair with its label for a trace."""
    return replace(pair, trace=f"<answer>[[{pair.label}]]</answer>")


def split_into_batches(rows, args, device, rank, world, width):
    """This rank's micro-batches of a step, as many as on every other rank. A collective.

    width  hidden size of the model, from which the cost of attention follows
    -> [packing.Batch, ...]
    """
    to_pack = [(row.prompt, [row.trace]) for row in rows]
    mine = packing.balance(to_pack, world, width)[rank]
    batches = packing.pack([to_pack[i] for i in mine], args.micro_tokens, device)
    return packing.equalise(batches, packing.dummy_batch(device))


def accumulate_gradients(policy, batches, trace_tokens, world):
    """Forward and backward passes of one step (eq. 6). -> this rank's part of the loss"""
    total = 0.0
    for batch in batches:
        loss = sft_loss(policy(batch), trace_tokens)
        # FSDP takes the mean over ranks; the denominator is global already.
        (loss * world).backward()
        total += loss.item()
    return total


def sft_loss(logp, trace_tokens):
    """Mean negative log-likelihood of trace tokens (eq. 6), (R,) -> scalar.

    trace_tokens counts those of the whole step, every rank and micro-batch. So the loss does not depend on
    how the step was cut.
    """
    return -logp.sum() / trace_tokens


if __name__ == "__main__":
    run_main(main, explain)
