"""
The KL penalty by the estimator k1, the log ratio itself (Schulman, joschu.net/blog/kl-approx.html).

    torchrun --nproc_per_node 8 forks/kl_k1.py --beta 0.1

Replaces grpo.kl_estimate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo


def k1(logp, ref_logp):
    """Unbiased, and negative for half of the tokens. As a loss its gradient is zero on average. (R,)"""
    return logp - ref_logp  # (R,)


def main():
    grpo.kl_estimate = k1
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
