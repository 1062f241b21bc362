"""
Dynamic sampling: more prompts are sampled in place of zero-variance groups (DAPO, arXiv 2503.14476, eq. 11).

    torchrun --nproc_per_node 8 forks/dynamic_sampling.py --dynamic-sampling 2

Replaces grpo.collect_groups, and adds a flag.
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo

grpo_flags = grpo.flags


def flags():
    parser = grpo_flags()
    parser.add_argument(
        "--dynamic-sampling",
        type=grpo.number(int, 1),
        default=2,
        help="how often another batch is sampled, at most",
    )
    return parser


def collect_groups(sample, rows, step, args):
    """The first --batch groups whose rewards differ; where they run out, some whose rewards do not."""
    useful, useless, shares = [], [], []
    for attempt in range(1 + args.dynamic_sampling):
        # Another shuffle of the data for every attempt, so that the first one remains a pass over it.
        seed = grpo.seed_of(args.seed, attempt) if attempt else args.seed
        drawn = grpo.draw_batch(len(rows), args.batch, step, seed)
        groups = sample(
            [rows[i] for i in drawn],
            step,
            args.group_size,
            temperature=1.0,
            first_index=attempt * args.batch,
        )
        useful += [group for group in groups if not grpo.is_zero_variance(group)]
        useless += [group for group in groups if grpo.is_zero_variance(group)]
        shares.append(fmean(grpo.is_zero_variance(group) for group in groups))
        if len(useful) >= args.batch:
            break
    statistics = {"zero_variance_groups": fmean(shares), "rounds": len(shares)}
    return (useful + useless)[: args.batch], statistics


def main():
    grpo.flags, grpo.collect_groups = flags, collect_groups
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
