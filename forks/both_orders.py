"""
Both orders: each pair is judged as (A, B) and as (B, A), and two right verdicts earn a bonus.

    torchrun --nproc_per_node 8 forks/both_orders.py --both-orders 0.5

The position-consistency reward of J1 (arXiv 2505.10320). --batch and --mini-batch count both orders. Replaces
grpo.tokenize_prompts and grpo.collect_groups, and adds a flag.
"""

import math
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
from lib.pairs import check_swappable

grpo_flags = grpo.flags
grpo_arguments = grpo.arguments
one_order = grpo.tokenize_prompts


def flags():
    parser = grpo_flags()
    parser.add_argument(
        "--both-orders",
        type=grpo.number(float, -math.inf),
        default=0.0,
        help="reward for two verdicts, one in each order, that are both right",
    )
    return parser


def arguments(argv=None):
    args = grpo_arguments(argv)
    if args.mini_batch % 2:
        raise grpo.Failure(
            f"--mini-batch {args.mini_batch}: an update has both orders of its pairs, so an even number"
        )
    if args.val_data == args.data:
        raise grpo.Failure(
            f"--val-data {args.val_data}: is what --data learns from; these are judged in both orders"
        )
    return args


def tokenize_prompts(source, tokenizer, style, args):
    """[row, row in the other order, ...] of the training data; held-out pairs are judged in one order."""
    pairs, rows = one_order(source, tokenizer, style, args)
    if source == args.val_data:
        return pairs, rows
    check_swappable(pairs, source)
    both = []
    for row in rows:
        swapped = row.pair.swapped()
        messages = grpo.chat_messages(swapped, style)
        prompt = grpo.encode_or_leave_out(tokenizer, messages, f"{source}: {swapped.id}")
        if prompt is not None and len(prompt) <= args.max_prompt:
            both += [row, grpo.Row(swapped, prompt)]
    return pairs, both


def collect_groups(sample, rows, step, args):
    """Both orders of a pair stand side by side, and in one update."""
    groups = sample_neighbours(sample, rows, step, args)
    for first, second in zip(groups[::2], groups[1::2]):
        reward_consistency(first, second, args.both_orders)
    return groups, {"zero_variance_groups": fmean(map(grpo.is_zero_variance, groups))}


def sample_neighbours(sample, rows, step, args):
    """The groups of a step. Rows 2i and 2i + 1 belong together: both are drawn, or neither."""
    drawn = grpo.draw_batch(len(rows) // 2, args.batch // 2, step, args.seed)
    batch = []
    for i in drawn:
        batch += rows[2 * i : 2 * i + 2]
    return sample(batch, step, args.group_size, temperature=1.0)


def reward_consistency(first, second, bonus):
    """Judgment n of one order and judgment n of the other earn the bonus where both verdicts are right."""
    for one, other in zip(first, second):
        if one.verdict == one.row.pair.label and other.verdict == other.row.pair.label:
            one.reward += bonus
            other.reward += bonus


def main():
    grpo.flags, grpo.arguments = flags, arguments
    grpo.tokenize_prompts, grpo.collect_groups = tokenize_prompts, collect_groups
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
