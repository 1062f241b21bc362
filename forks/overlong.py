"""
Overlong punishment: near the length limit the reward falls evenly by up to 1 (DAPO, arXiv 2503.14476, eq. 13).

    torchrun --nproc_per_node 8 forks/overlong.py --overlong 1024

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
        "--overlong",
        type=grpo.number(int, 1),
        default=1024,
        help="tokens before --max-response over which the reward falls",
    )
    return parser


def arguments(argv=None):
    args = grpo_arguments(argv)
    if args.overlong > args.max_response:
        raise grpo.Failure(
            f"--overlong {args.overlong}: more than --max-response {args.max_response}"
        )
    return args


def reward_of(text, judgment, pair, length, key, args):
    """The verdict's reward, and 0 up to --overlong tokens before the limit, -1 at the limit."""
    room = args.max_response - args.overlong - length
    return grpo_reward_of(text, judgment, pair, length, key, args) + min(0.0, room / args.overlong)


def main():
    grpo.flags, grpo.arguments, grpo.reward_of = flags, arguments, reward_of
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
