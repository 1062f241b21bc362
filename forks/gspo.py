"""
GSPO: one importance ratio for a whole judgment (arXiv 2507.18071, eq. 7 and 14).

    torchrun --nproc_per_node 8 forks/gspo.py --clip 3e-4 4e-4

Replaces grpo.importance_ratio.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo


def sequence_ratio(logp, old_logp, rows):
    """The geometric mean of a judgment's token ratios; the gradient goes through its tokens. (R,)"""
    log_ratio = (logp - old_logp).detach()  # (R,)
    judgment = rows - rows.min() if len(rows) else rows  # (R,) counted from 0
    zeros = torch.zeros_like(logp)  # (R,), as many places as there can be judgments
    sums = zeros.index_add(0, judgment, log_ratio)
    lengths = zeros.index_add(0, judgment, torch.ones_like(logp)).clamp(min=1)
    mean = (sums / lengths)[judgment]  # (R,)
    return (mean + logp - logp.detach()).exp()  # (R,)


def main():
    grpo.importance_ratio = sequence_ratio
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
