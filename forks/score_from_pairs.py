"""
Scores from pairs: the judge sees one response at a time, and learns to score the chosen one of a pair higher.

    torchrun --nproc_per_node 8 forks/score_from_pairs.py

After the pointwise judge of J1 (arXiv 2505.10320) and CE-RM (2601.20327). Each pair becomes two rows, its chosen and
its rejected response alone, side by side and in one update; --batch and --mini-batch count responses.

Every score of one response meets all G scores of the other one. A score of the chosen response earns the share that
it beats. A score of the rejected one earns the share of the chosen one's scores that beat it. A tie counts half. A
text without a score loses to any score, and earns 0.

The 2G texts have one advantage, as in forks/pooled_orders.py. Where all of them have a score, the mean reward of both
sides is the same number: the share of the meetings that the chosen response wins. Their rewards are the policy
gradient of this one number, so they have one scale too. Divided by a standard deviation of its own, a side whose
rewards hardly differ would count as much as the side that decides. And a response that no text gives a score would
teach nothing by itself; beside the other side it teaches to give one.

In the log, `reward` is that share, less what texts without a score cost. `accuracy`: share of the pairs whose chosen
response has the higher mean score, a tie half; a pair of which one side has no score is wrong. `score_gap`: how much
higher, where both sides have one. `no_verdict`: texts without a score. The same of --val-data, from one greedy score a
response. In samples.jsonl, `verdict` is the score.

Replaces grpo.parse, grpo.arguments, grpo.tokenize_prompts, grpo.collect_groups, grpo.advantages and grpo.accuracy.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
from forks import both_orders, pooled_orders

grpo_arguments = grpo.arguments
grpo_parse = grpo.parse


def arguments(argv=None):
    args = grpo_arguments(argv)
    if args.reward != "verdict":
        raise grpo.Failure(
            f"--reward {args.reward}: here a score is paid by the scores of the other response; leave the flag out"
        )
    if args.mini_batch % 2:
        raise grpo.Failure(
            f"--mini-batch {args.mini_batch}: an update has both responses of its pairs, so an even number"
        )
    return args


def score_as_verdict(text, finished=True):
    """The judgment of one response, with its score where grpo.py looks for a verdict."""
    judgment = grpo_parse(text, finished, single=True)
    return replace(judgment, verdict=judgment.score)


# ---------------------------------------------------------------- data


def tokenize_prompts(source, tokenizer, style, args):
    """[row of the chosen response, row of the rejected one, ...]; a pair keeps both rows, or has none."""
    pairs = grpo.read_pairs(source, args.skip_bad)
    rows = []
    for pair in grpo.progress_bar(pairs, "tokenize", leave=False):
        both = []
        for single in responses_alone(pair):
            messages = grpo.chat_messages(single, style)
            prompt = grpo.encode_or_leave_out(tokenizer, messages, f"{source}: {single.id}")
            if prompt is not None and len(prompt) <= args.max_prompt:
                both.append(grpo.Row(single, prompt))
        if len(both) == 2:
            rows += both
    kept = len(rows) // 2
    grpo.print0(
        f"{source}: {kept} pairs, two responses each; {len(pairs) - kept} left out: a prompt is refused, or longer "
        f"than --max-prompt {args.max_prompt}, or a published one whose responses cannot be extracted"
    )
    return pairs, rows


def responses_alone(pair):
    """[the chosen response, the rejected one], each a `Pair` by itself; [] where they cannot be extracted."""
    if not pair.a:
        return []
    sides = {"chosen": pair.a, "rejected": pair.b}
    if pair.label == "B":
        sides = {"chosen": pair.b, "rejected": pair.a}
    # What else a pair has (messages, trace, label, meta) is about both responses. Its criteria stay.
    of_both = {"b": None, "label": None, "trace": None, "messages": None, "meta": {}}
    return [
        replace(pair, id=f"{pair.id} {name}", a=text, **of_both) for name, text in sides.items()
    ]


# ---------------------------------------------------------------- rewards


def collect_groups(sample, rows, step, args):
    """Both responses of a pair stand side by side; a pair teaches nothing where all 2G rewards are equal."""
    groups = both_orders.sample_neighbours(sample, rows, step, args)
    pooled = []  # (P / 2, 2G)
    for chosen, rejected in zip(groups[::2], groups[1::2]):
        reward_scores(chosen, rejected)
        pooled.append(chosen + rejected)
    return groups, {"zero_variance_groups": fmean(map(grpo.is_zero_variance, pooled))}


def reward_scores(chosen, rejected):
    """The share of its meetings that are as they should be, for every text of both groups."""
    for one in chosen:
        one.reward = fmean(beats(one.verdict, other.verdict) for other in rejected)
    for one in rejected:
        one.reward = 0.0
        if one.verdict is not None:
            one.reward = fmean(beats(other.verdict, one.verdict) for other in chosen)


def beats(score, other):
    """1 if a score is above another one, .5 if they are equal, else 0; no score (None) loses."""
    if score is None or other is None:
        return float(score is not None)
    return (1 + (score > other) - (score < other)) / 2


# ---------------------------------------------------------------- the log


def accuracy(groups, prefix=""):
    """Of neighbouring groups, the chosen response's first: which mean score is higher, and by how much."""
    right, gaps = [], []
    for chosen, rejected in zip(groups[::2], groups[1::2]):
        gap = mean_score(chosen) - mean_score(rejected)
        right.append(0.0 if math.isnan(gap) else beats(gap, 0))
        gaps.append(gap)
    known = [gap for gap in gaps if not math.isnan(gap)]
    texts = [r for group in groups for r in group]
    return {
        f"{prefix}accuracy": fmean(right),
        f"{prefix}no_verdict": fmean(r.verdict is None for r in texts),
        f"{prefix}score_gap": fmean(known) if known else math.nan,
    }


def mean_score(group):
    """Of the texts with a score; NaN without any."""
    scores = [r.verdict for r in group if r.verdict is not None]
    return fmean(scores) if scores else math.nan


def main():
    grpo.arguments, grpo.parse = arguments, score_as_verdict
    grpo.tokenize_prompts, grpo.collect_groups = tokenize_prompts, collect_groups
    grpo.advantages = pooled_orders.pooled_advantages
    grpo.accuracy = accuracy
    grpo.main()


if __name__ == "__main__":
    grpo.run_main(main, grpo.explain)
