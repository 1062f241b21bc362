"""
A reward for the format: 1 more where a judgment has every part (RM-R1, eq. 11).

    torchrun --nproc_per_node 8 forks/format_reward.py

It pays for any rubric, any solution and any comparison, whatever they say. So it is the control of rewards that
read the reasons, --reward sound and forks/checked_reasons.py: what it brings about is not due to reading them.

Replaces grpo.reward_of.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo

grpo_reward_of = grpo.reward_of


def reward_of(text, judgment, pair, length, key, args):
    """The verdict's reward, and 1 for a type, a rubric or a solution, and a comparison."""
    has_reasons = bool(judgment.rubric or judgment.solution)
    well_formed = bool(judgment.type and has_reasons and judgment.eval)
    return grpo_reward_of(text, judgment, pair, length, key, args) + well_formed


def main():
    grpo.reward_of = reward_of
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
