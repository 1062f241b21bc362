"""
One advantage over both orders: the judgments of a pair as (A, B) and as (B, A) are one group of 2G.

    torchrun --nproc_per_node 8 forks/pooled_orders.py                       # EIS-GRPO (J4R, arXiv 2505.13346)
    torchrun --nproc_per_node 8 forks/pooled_orders.py --both-orders 0.5     # with a bonus, as PA-GRPO (2603.21016)

A judge that always takes the first response is always right in one order and always wrong in the other. Each order
by itself has equal rewards then, and teaches nothing; both together take the habit from it. A step is that
of forks/both_orders.py, and so are the flags. Replaces grpo.tokenize_prompts, grpo.collect_groups and
grpo.advantages.
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
from forks import both_orders

grpo_advantages = grpo.advantages


def collect_groups(sample, rows, step, args):
    """Both orders of a pair stand side by side; a pair teaches nothing where all 2G rewards are equal."""
    groups, _ = both_orders.collect_groups(sample, rows, step, args)
    pooled = []  # (P / 2, 2G)
    for first, second in zip(groups[::2], groups[1::2]):
        pooled.append(first + second)
    return groups, {"zero_variance_groups": fmean(map(grpo.is_zero_variance, pooled))}


def pooled_advantages(rewards, kind="grpo"):
    """grpo.advantages of every two neighbouring groups together, (P, G) -> (P, G)"""
    pooled = rewards.reshape(len(rewards) // 2, -1)  # (P / 2, 2G)
    return grpo_advantages(pooled, kind).reshape(rewards.shape)  # (P, G)


def main():
    grpo.flags = both_orders.flags
    grpo.arguments = both_orders.arguments
    grpo.tokenize_prompts = both_orders.tokenize_prompts
    grpo.collect_groups = collect_groups
    grpo.advantages = pooled_advantages
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
