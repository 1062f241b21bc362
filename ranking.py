"""
The arithmetic of comparing: which responses to compare, and what the results say. No judge in it.

A **schedule** is a generator. It yields a round, [(i, j), ...] with response i shown first, all of which can
be asked at once, and is sent the results: 1 where i won, 0 where j did, .5 for a tie, None where nothing
could be read. It returns what was **played**, [(i, j, result), ...], and that is all that the numbers need:

    played = await play(schedule(keys, budget=28), ask)         # ask: async, a round -> its results
    numbers = rewards(keys, played)

**Keys** are a text for each response, all different; the responses will do. Lots are drawn by the keys'
hashes, and sums run in their order: permuting responses permutes their numbers to the last bit.
Numbers in docstrings are of the judge simulated in tests/test_ranking.py, right in 75 % of its calls, with
half of its noise fixed errors of a pair, which no vote cures.
"""
import hashlib
import math

import numpy as np


def by_lot(keys):
    """-> places in the list, in the order of the keys' hashes"""
    if len(set(keys)) < max(2, len(keys)):
        raise ValueError(f"{len(keys)} keys, {len(set(keys))} different: give two or more, equal ones once")
    return sorted(range(len(keys)), key=lambda i: hashlib.sha256(repr(keys[i]).encode()).digest())


# ---------------------------------------------------------------- what the results say

def tally(played, n):
    """-> wins (n, n): how often i beat j, a tie half a win each. What could not be read counts for nobody."""
    wins = np.zeros((n, n))
    for i, j, won in played:
        if won is not None:
            wins[i, j] += won
            wins[j, i] += 1 - won
    return wins


def strengths(wins, prior=3):
    """Bradley-Terry, P(i beats j) = sigmoid(s_i - s_j), by Newton steps. -> s (n,), covariance (n, n)

    A Gaussian prior of that width keeps a response that wins everything finite and one that met nobody at 0.
    At 3 the 90 % bars of `rewards` cover .96, .95, .92 for judges right in 65, 75, 85 % (n = 8, 28 pairs);
    at 1.5 .83 for the last, whose best responses win more than such a prior believes."""
    s, games = np.zeros(len(wins)), wins + wins.T
    for _ in range(50):
        p = 1 / (1 + np.exp(s[None] - s[:, None]))
        info = games * p * (1 - p)
        hess = np.diag(info.sum(1) + prior**-2) - info
        step = np.linalg.solve(hess, (wins - games * p).sum(1) - s / prior**2)
        s = s + step
        if np.abs(step).max() < 1e-9:
            break
    return s, np.linalg.inv(hess)


def draw(wins, n):
    """n draws of strengths from their Laplace posterior, half of them mirror images. -> (n, len(wins))"""
    s, cov = strengths(wins)
    rng = np.random.default_rng(np.frombuffer(wins.tobytes(), np.uint32))      # same wins, same draws
    z = rng.standard_normal((n // 2, len(s))) @ np.linalg.cholesky(cov).T
    return s + np.concatenate([z, -z])


def rewards(keys, played, draws=4000):
    """What was played says of each response, over draws of the strengths. -> {name: (n,)}

    reward     expected win rate against the others, 0 to 1
    stderr     its standard error
    low, high  its 90 % interval, about the rate that endless votes on all pairs in both orders would give
    best       chance to be the best in such votes. Its fixed errors do not show in a judge's votes: at 65 %
               the pick is the true best in .39, the best in such votes in .51, and `best` says .53"""
    order, n = by_lot(keys), len(keys)
    s = draw(tally(played, n)[np.ix_(order, order)], draws)
    rate = np.stack([(1 / (1 + np.exp(s - s[:, [i]]))).sum(1) - .5 for i in range(n)], 1) / (n - 1)
    low, high = np.quantile(rate, (.05, .95), axis=0)
    best = np.bincount(s.argmax(1), minlength=n) / len(s)
    numbers = {"reward": rate.mean(0), "stderr": rate.std(0), "low": low, "high": high, "best": best}
    return {name: x[np.argsort(order)] for name, x in numbers.items()}


# ---------------------------------------------------------------- which to compare

async def play(game, ask):
    """Plays a schedule. ask: async, takes a round and gives its results. -> what was played"""
    try:
        pairs = next(game)
        while True:
            pairs = game.send(await ask(pairs))
    except StopIteration as end:
        return end.value


def asked(pairs):
    """One round of a schedule. -> what was played in it"""
    results = (yield pairs) if pairs else []
    return [(i, j, won) for (i, j), won in zip(pairs, results, strict=True)]


def schedule(keys, budget=None, goal="all"):
    """The schedule for a goal and a budget in comparisons (4 for each response unless given).

    all: a reward for every response. best: only the best is wanted. Around two comparisons a response nothing
    beats a knockout (gain .77 of 1 at n = 8); elsewhere active pairs do better (.82 at three)."""
    order, n, budget = by_lot(keys), len(keys), 4 * len(keys) if budget is None else budget
    if budget < 1 or goal not in ("all", "best"):
        raise ValueError(f"a budget of {budget} for {goal!r}: give 1 or more, and the goal all or best")
    if goal == "all":
        return ring(order, budget)
    return knockout(order, budget) if 2 * (n - 1) <= budget < 3 * n else active(order, budget)


def ring(order, budget):
    """One round: each meets the next on a ring, then the one after it, until all pairs have met; then the
    other orders. At any budget each is first as often as second, or once more or less.
    Correlation of reward and quality at n = 8: 16 pairs .71, 8 in both orders .66, all .81, in both .87."""
    n, half = len(order), len(order) // 2
    pairs = [(order[i], order[(i + d) % n]) for d in range(1, half + 1) for i in range(n if 2 * d < n else d)]
    return (yield from asked((pairs + [(j, i) for i, j in pairs[::-1]])[:budget]))


def knockout(order, budget):
    """Winners of a match go on. A match is both orders, and a third vote where these leave no winner and the
    budget has one to spare: 2 (n - 1) to 3 (n - 1) in all. What is level even then is settled by lot."""
    n, field, played = len(order), order, []
    while len(field) > 1:
        bye, field = field[:len(field) % 2], field[len(field) % 2:]     # goes to the end: spared once
        matches = list(zip(field[::2], field[1::2]))
        played += yield from asked([pair for i, j in matches for pair in ((i, j), (j, i))])
        wins, spare = tally(played, n), max(0, budget - len(played) - 2 * (len(bye) + len(matches) - 1))
        played += yield from asked([(i, j) for i, j in matches if wins[i, j] == wins[j, i]][:spare])
        wins = tally(played, n)
        field = [i if wins[i, j] >= wins[j, i] else j for i, j in matches] + bye
    return played


def active(order, budget):
    """Rounds of n / 2 pairs whose results say most about who is best: largest posterior variance of the
    difference x p (1 - p) x chance that one of the two is the best (64 draws). No pair comes twice in one
    order, which would confirm its fixed error. n = 16: gain .86 at 64 comparisons, .87 at all 120."""
    n, played, had = len(order), [], np.zeros((len(order), len(order)))     # had[i, j]: asked with i first
    while len(played) < min(budget, n * (n - 1)):
        wins = tally(played, n)[np.ix_(order, order)]
        s, cov = strengths(wins)
        p, var = 1 / (1 + np.exp(s[None] - s[:, None])), np.diag(cov)
        best = np.bincount(draw(wins, 64).argmax(1), minlength=n) / 64
        worth = (var[None] + var[:, None] - 2 * cov) * p * (1 - p) * (best[None] + best[:, None])
        pairs, free = [], (had * had.T == 0) & ~np.tri(n, dtype=bool)
        most = min(n // 2, free.sum(), budget - len(played))
        for k in np.argsort(-np.where(free, worth, -1), axis=None, kind="stable")[:most].tolist():
            both = (k // n, k % n), (k % n, k // n)         # first is who has not been, or was less often
            i, j = min(both, key=lambda p: (had[p], had[p[0]].sum() - had[:, p[0]].sum()))
            had[i, j] = 1
            pairs.append((order[i], order[j]))
        played += yield from asked(pairs)
    return played


# ---------------------------------------------------------------- one pair (0 is A, 1 is B), and labels

def votes(budget=8, lead=2):
    """A schedule: one vote in each order, again while neither is `lead` ahead and the budget lasts. A pair
    that comes back wants another seed. 2.98 votes are right in .797 of pairs, 8 in .801."""
    played, ahead = [], 0
    while len(played) < budget and abs(ahead) < lead:
        played += yield from asked([(0, 1), (1, 0)][:budget - len(played)])
        ahead = np.diff(tally(played, 2).sum(1)).item()
    return played


def verdict(played):
    """What the votes on a pair say. -> dict

    verdict     A, B, tie, or None where nothing could be read
    win         share of A in votes to come, (w + 1) / (n + 2) after w of n: the mean under a flat prior
    low, high   its 90 % interval, widened to whole votes where there were ties
    share       of votes that are for the verdict. 8 of 8 are right in .94 of pairs, in .87 if most noise is
                fixed errors: agreement is not accuracy, see `guarantee`
    consistent  do the two orders say the same? None where one could not be read"""
    (_, a), (b, _) = tally(played, 2).tolist()
    n = round(a + b)
    orders = [tally([x for x in played if x[0] == first], 2) for first in (0, 1)]
    says = [np.sign(w[0, 1] - w[1, 0]) for w in orders]
    return {"verdict": "A" if a > b else "B" if b > a else "tie" if n else None, "votes": n,
            "win": (a + 1) / (n + 2), "low": beta(.05, math.floor(a) + 1, math.ceil(b) + 1),
            "high": beta(.95, math.ceil(a) + 1, math.floor(b) + 1), "share": max(a, b) / n if n else None,
            "consistent": bool(says[0] == says[1]) if all(w.any() for w in orders) else None}


def tail(k, n, p):
    """-> P(k or more of n), each with chance p. By logs: comb(1030, 515) is no float any more."""
    if k <= 0 or p in (0, 1):
        return float(k <= 0 or p == 1)
    return math.fsum(math.exp(math.log(math.comb(n, i)) + i * math.log(p) + (n - i) * math.log1p(-p))
                     for i in range(k, n + 1))


def beta(q, a, b):
    """Quantile of Beta(a, b), a and b whole, by bisection: P(Beta <= x) = P(a or more of a + b - 1). k of n
    have the Clopper-Pearson bounds beta(delta, k, n - k + 1) and beta(1 - delta, k + 1, n - k)."""
    low, high = float(b == 0), float(a != 0)
    while low < (x := (low + high) / 2) < high:
        low, high = (low, x) if tail(a, a + b - 1, x) >= q else (x, high)
    return high


def guarantee(labelled, target, delta=.1):
    """-> the lowest share of votes from which on people agree with `target` of the judge's verdicts, with
    confidence 1 - delta, or None. labelled: [(share, do people agree?)] of some 400 pairs drawn at random.
    Each share, from unanimous downwards, is tested on all pairs at or above it until a Clopper-Pearson bound
    fails (Trust or Escalate, arXiv 2407.18370). Many tests in a fixed sequence need no correction, if shares
    are few and known before, as those of `votes`. A tie is no verdict."""
    lowest, n, agree = None, 0, 0
    for share in sorted({s for s, _ in labelled if s > .5}, reverse=True):
        step = [ok for s, ok in labelled if s == share]
        n, agree = n + len(step), agree + sum(step)
        if tail(agree, n, target) > delta:              # that is, beta(delta, agree, n - agree + 1) < target
            break
        lowest = share
    return lowest


def select(keys, wins, count):
    """Which pairs people should label. wins: each pair's `win`. -> drawn, disputed: places, `count` in all
    The disputed are worth most: 20 % labelled make .876 right, at random .828. A tenth is drawn by lot, since
    only a random sample says how often the judge is right."""
    order, tenth = by_lot(keys), -(-count // 10)
    return order[:tenth], sorted(order[tenth:], key=lambda i: abs(wins[i] - .5))[:count - tenth]
