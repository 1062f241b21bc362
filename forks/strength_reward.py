"""
A reward that pays less for slight preferences: it is multiplied by the pair's strength, up to 1.

    torchrun --nproc_per_node 8 forks/strength_reward.py --data helpsteer3.jsonl --full-strength 3

Rows say their strength (`lib.pairs.strength_of`); a pair that does not is paid in full. All judgments of a group
have the same strength, and --advantage grpo divides by their standard deviation, which would cancel it. So this
fork trains with --advantage drgrpo.

Replaces grpo.reward_of, and adds a flag.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo

grpo_reward_of = grpo.reward_of
grpo_flags = grpo.flags
grpo_arguments = grpo.arguments


def flags():
    parser = grpo_flags()
    parser.add_argument(
        "--full-strength",
        type=grpo.number(float, 0, above=True),
        default=3.0,
        help="strength of preference from which a verdict is paid in full (3 is HelpSteer3's highest)",
    )
    parser.set_defaults(advantage="drgrpo")
    return parser


def arguments(argv=None):
    args = grpo_arguments(argv)
    if args.advantage == "grpo":
        raise grpo.Failure(
            "--advantage grpo: divides by the standard deviation of a group, and so takes the strength out again; "
            "leave it out"
        )
    return args


def reward_of(text, judgment, pair, length, key, args):
    """The verdict's reward, times strength / --full-strength, at most 1."""
    strength = pair.meta.get("strength", args.full_strength)
    share = min(1.0, strength / args.full_strength)
    return share * grpo_reward_of(text, judgment, pair, length, key, args)


def main():
    grpo.flags, grpo.arguments, grpo.reward_of = flags, arguments, reward_of
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
