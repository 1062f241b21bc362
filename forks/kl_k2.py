"""
The KL penalty by the estimator k2, half the squared log ratio (Schulman, joschu.net/blog/kl-approx.html).

    torchrun --nproc_per_node 8 forks/kl_k2.py --beta 0.1

Replaces grpo.kl_estimate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo


def k2(logp, ref_logp):
    """Biased, never negative, and with the right gradient on policy. (R,)"""
    return (logp - ref_logp).square() / 2  # (R,)


def main():
    grpo.kl_estimate = k2
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
