"""
Checked reasons: beside the verdict, the share of the checks of its reasons that hold is paid.

    torchrun --nproc_per_node 8 forks/checked_reasons.py

Paying for reasons beside the verdict is RationaleRM's idea (arXiv 2602.04649), and that of RM-NLHF (2601.07349);
both have a larger model compare the reasons with a person's. Here programs check what needs no model
(judge/soundness.py): each quote is in the response that it names, the solution ends in the pair's reference
answer, the rubric covers the oracle's criteria. So the fork sees a text that nobody wrote and a result that
is not the reference, and it does not see which reason decides: a true quote of something that does not matter
passes, and so does a solution that ends in the words of the answer and says that they are wrong.

A check counts only where it applies, and a judgment to which none applies gets its verdict's reward. So whoever
quotes nothing, or two words at most, avoids one check; where quotes are the only check, that also gives up the
1. Of pairs with a known reason (data/toy.py) the checks are the exact ones, and most of them pay without the
others; `data/toy.py --truth 0` leaves the proxies.

Replaces grpo.reward_of.
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
from judge.soundness import check_reasons

grpo_reward_of = grpo.reward_of


def reward_of(text, judgment, pair, length, key, args):
    """The verdict's reward, and the share of the checks that hold, of those that apply to this judgment."""
    checks = check_reasons(judgment, pair)
    share = fmean(checks.values()) if checks else 0.0
    return grpo_reward_of(text, judgment, pair, length, key, args) + share


def main():
    grpo.reward_of = reward_of
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
