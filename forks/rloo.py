"""
RLOO: the baseline of a judgment is the mean reward of the others in its group (arXiv 2402.14740, section 3).

    torchrun --nproc_per_node 8 forks/rloo.py

Replaces grpo.advantages.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo

grpo_advantages = grpo.advantages


def leave_one_out(rewards, kind=None):
    """r - mean of the others, (P, G) -> (P, G), without a scale whatever --advantage says.

    NaN, a reward that is not known: advantage 0.
    """
    centred = grpo_advantages(rewards, "drgrpo")  # (P, G)
    count = rewards.isfinite().sum(1, keepdim=True)  # (P, 1)
    return (
        centred * count / (count - 1).clamp(min=1)
    ).nan_to_num()  # (P, G), infinity: the largest


def main():
    grpo.advantages = leave_one_out
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
