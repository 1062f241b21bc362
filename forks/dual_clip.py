"""
Dual clip: at negative advantages no ratio above C counts (arXiv 1912.09729, eq. 5).

    torchrun --nproc_per_node 8 forks/dual_clip.py --dual-clip 3

Replaces grpo.policy_gain, and adds a flag.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo

clipped_gain = grpo.policy_gain
grpo_flags = grpo.flags
grpo_arguments = grpo.arguments


def flags():
    parser = grpo_flags()
    parser.add_argument(
        "--dual-clip", type=grpo.number(float, 1, above=True), default=3.0, help="largest ratio"
    )
    return parser


def dual_clip_gain(ratio, logp, advantage, low, high, largest):
    """PPO's gain, bounded from below where the advantage is negative. (R,)"""
    gain = clipped_gain(ratio, logp, advantage, low, high)  # (R,)
    return gain.where(advantage >= 0, gain.maximum(largest * advantage))  # (R,)


def arguments(argv=None):
    args = grpo_arguments(argv)
    grpo.policy_gain = partial(dual_clip_gain, largest=args.dual_clip)
    return args


def main():
    grpo.flags, grpo.arguments = flags, arguments
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
