"""
Majority label: the verdict of most judgments of a group stands for the label, which no reward reads.

    torchrun --nproc_per_node 8 forks/majority_label.py

Test-time reinforcement learning (TTRL, arXiv 2504.16084) for a judge. ConsistRM (2604.07484) begins with the same
pseudo-label and adds the labels of earlier epochs and the likeness of the critiques, which are left out here.

A majority that is wrong teaches its error: `majority_right` in the log is the share of the majorities that are the
label. The log's accuracy, and held-out accuracy, are against the true labels.

Replaces grpo.collect_groups and grpo.arguments.
"""

import math
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo

grpo_arguments = grpo.arguments
grpo_collect_groups = grpo.collect_groups


def arguments(argv=None):
    args = grpo_arguments(argv)
    if args.reward != "verdict":
        raise grpo.Failure(
            f"--reward {args.reward}: here the majority of a group decides what its judgments earn; leave the flag out"
        )
    return args


def collect_groups(sample, rows, step, args):
    groups, _ = grpo_collect_groups(sample, rows, step, args)
    agreements = []  # of each majority with the label
    for group in groups:
        label = majority(group)
        reward_majority(group, label)
        if label is not None:
            agreements.append(label == group[0].row.pair.label)
    return groups, {
        "zero_variance_groups": fmean(map(grpo.is_zero_variance, groups)),
        "majority_right": fmean(agreements) if agreements else math.nan,
        "ties": 1 - len(agreements) / len(groups),
    }


def majority(group):
    """The verdict of more judgments than the other one; None at a tie. A judgment without a verdict has no vote."""
    verdicts = [r.verdict for r in group]
    lead = verdicts.count("A") - verdicts.count("B")
    if lead == 0:
        return None
    return "A" if lead > 0 else "B"


def reward_majority(group, label):
    """+1 for the verdict of the majority, else -1; 0 for all at a tie, so that such a group teaches nothing."""
    for r in group:
        r.reward = 0.0 if label is None else grpo.verdict_reward(r, label)


def main():
    grpo.arguments, grpo.collect_groups = arguments, collect_groups
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
