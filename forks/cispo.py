"""
CISPO: the ratio is clipped, and no token loses its gradient (arXiv 2506.13585, eq. 4).

    torchrun --nproc_per_node 8 forks/cispo.py

Replaces grpo.policy_gain.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo


def cispo_gain(ratio, logp, advantage, low, high):
    """The clipped ratio is a constant weight of the log-probability's gradient. (R,)"""
    return ratio.clamp(low, high).detach() * advantage * logp  # (R,)


def main():
    grpo.policy_gain = cispo_gain
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
