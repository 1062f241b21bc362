"""
The arithmetic of comparing: which responses to compare, and what the votes say. No model in it.

A **schedule** is a generator. It yields a round [(i, j), ...], in which response i is shown first, and all of
which can be asked at once. It is sent the round's outcomes: 1 where i won, 0 where j won, 0.5 for a tie, None
where nothing could be read. It returns **results**, [(i, j, outcome), ...], and all numbers follow from these:

    results = await run_schedule(schedule(keys, budget=28), ask)        # ask: async, a round -> outcomes
    numbers = rewards(keys, results)

**Keys** are one text for each response, all different; the responses themselves will do. Pseudo-random choices
follow the hashes of the keys, and sums run in the order of these hashes. So permuting the responses permutes
their numbers to the last bit.

Numbers in docstrings are those of the judge simulated in tests/test_ranking.py. It is right in 75 % of its
votes, and half of its noise is a fixed error of each pair, which no number of votes averages out.
"""

import hashlib
import math

import numpy as np


def in_hash_order(keys):
    """Indices of the keys, in the order of the keys' hashes.

    Raises ValueError unless there are two or more keys, all different.
    """
    different = len(set(keys))
    if different < max(2, len(keys)):
        raise ValueError(
            f"{len(keys)} keys, {different} different: give two or more, equal ones once"
        )

    def hash_of_key(index):
        return hashlib.sha256(repr(keys[index]).encode()).digest()

    return sorted(range(len(keys)), key=hash_of_key)


# ---------------------------------------------------------------- rewards from results


def tally(results, n):
    """How often each of n responses beat each other one. -> wins (n, n)

    A tie is half a win for each. A vote that could not be read counts for nobody.
    """
    wins = np.zeros((n, n))  # (n, n)
    for i, j, outcome in results:
        if outcome is not None:
            wins[i, j] += outcome
            wins[j, i] += 1 - outcome
    return wins


def strengths(wins, prior=3):
    """Bradley-Terry strengths, P(i beats j) = sigmoid(s_i - s_j), by Newton's method.

    wins   (n, n), see `tally`
    prior  standard deviation of a Gaussian prior on each strength
    -> s (n,), their covariance (n, n) by Laplace's approximation

    The prior keeps a response that wins everything finite, and one that was never compared at 0. At 3 the
    90 % intervals of `rewards` cover .96, .95, .92 for judges that are right in 65, 75, 85 % (n = 8, 28
    pairs). At 1.5 they cover .83 for the last, whose best responses win more than such a prior believes.
    """
    s = np.zeros(len(wins))  # (n,)
    games = wins + wins.T  # (n, n)
    for _ in range(50):
        p = 1 / (1 + np.exp(s[None] - s[:, None]))  # (n, n)
        information = games * p * (1 - p)  # (n, n)
        hessian = np.diag(information.sum(1) + prior**-2) - information  # (n, n)
        gradient = (wins - games * p).sum(1) - s / prior**2  # (n,)
        step = np.linalg.solve(hessian, gradient)  # (n,)
        s = s + step
        if np.abs(step).max() < 1e-9:
            break
    return s, np.linalg.inv(hessian)


def draw_strengths(wins, count):
    """Draws of strengths from their Laplace posterior, half of them mirror images. -> (count, n)

    The random generator is seeded with the wins, so the same wins give the same draws.
    """
    mean, covariance = strengths(wins)
    seed = np.frombuffer(wins.tobytes(), np.uint32)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count // 2, len(mean)))  # (count / 2, n)
    noise = noise @ np.linalg.cholesky(covariance).T  # (count / 2, n)
    return mean + np.concatenate([noise, -noise])


def win_rates(s):
    """Expected win rate of each response against the others, in each draw of strengths. -> (draws, n)"""
    n = s.shape[1]
    rates = []
    for i in range(n):
        wins = 1 / (1 + np.exp(s - s[:, [i]]))  # (draws, n)
        rates.append(wins.sum(1) - 0.5)  # (draws,), without the half win against itself
    return np.stack(rates, 1) / (n - 1)


def rewards(keys, results, draws=4000):
    """What the results say of each response, over draws of the strengths. -> {name: (n,)}

    reward     expected win rate against the others, 0 to 1
    stderr     its standard error
    low, high  its 90 % interval, about the rate that endless votes on all pairs in both orders would give
    best       probability of being the best in such endless votes

    The fixed errors of a judge do not show in its own votes. At 65 % right the response with the highest
    `best` is truly the best in .39 of cases and the best of endless votes in .51, where `best` says .53.
    """
    order = in_hash_order(keys)
    n = len(keys)
    wins = tally(results, n)[np.ix_(order, order)]  # (n, n)
    s = draw_strengths(wins, draws)  # (draws, n)
    rate = win_rates(s)  # (draws, n)

    low, high = np.quantile(rate, (0.05, 0.95), axis=0)  # (n,) each
    best = np.bincount(s.argmax(1), minlength=n) / len(s)  # (n,)
    numbers = {
        "reward": rate.mean(0),  # (n,)
        "stderr": rate.std(0),  # (n,)
        "low": low,
        "high": high,
        "best": best,
    }
    hash_rank = np.argsort(order)  # (n,), the rank of each key in the hash order
    return {name: values[hash_rank] for name, values in numbers.items()}


# ---------------------------------------------------------------- schedules for several responses


async def run_schedule(schedule, ask):
    """Run a schedule to its end. -> its results, [(i, j, outcome), ...]

    ask  async, takes a round [(i, j), ...] and returns its outcomes
    """
    try:
        pairs = next(schedule)
        while True:
            outcomes = await ask(pairs)
            pairs = schedule.send(outcomes)
    except StopIteration as end:
        return end.value


def one_round(pairs):
    """One round of a schedule. -> its results. No round is made of no pairs."""
    outcomes = []
    if pairs:
        outcomes = yield pairs
    return [(i, j, outcome) for (i, j), outcome in zip(pairs, outcomes, strict=True)]


def schedule(keys, budget=None, goal="all"):
    """The schedule for a goal and a budget.

    budget  votes at most; four for each response unless given
    goal    "all": a reward for every response. "best": only the best one is wanted

    For the best one a knockout is used where the budget is in its range, 2 (n - 1) to 3 n. Its gain, (quality
    of the pick - mean) / (best - mean), is .77 with 16 votes at n = 8, where the ring needs 24 for as much,
    and .81 with 35 at n = 16, where the ring has .77 with 64. Outside of that range the ring serves both goals.
    """
    order = in_hash_order(keys)
    n = len(keys)
    if budget is None:
        budget = 4 * n
    if budget < 1 or goal not in ("all", "best"):
        raise ValueError(
            f"a budget of {budget} for {goal!r}: give 1 or more, and the goal all or best"
        )
    if goal == "best" and 2 * (n - 1) <= budget < 3 * n:
        return knockout(order, budget)
    return ring(order, budget)


def ring(order, budget):
    """One round on a ring: each response meets the next, then the next but one, until all pairs have met; then
    the same pairs in the other order, as far as the budget goes.

    At any budget the numbers of times that a response is first and second differ by one at most. Correlation
    of reward and quality at n = 8: 16 pairs .71, 8 pairs in both orders .66, all pairs .81, all in both .87.
    """
    n = len(order)
    pairs = []
    for distance in range(1, n // 2 + 1):
        # Opposite responses of an even ring meet once, not from either side.
        starts = distance if 2 * distance == n else n
        for i in range(starts):
            pairs.append((order[i], order[(i + distance) % n]))
    swapped = [(j, i) for i, j in reversed(pairs)]
    return (yield from one_round((pairs + swapped)[:budget]))


def knockout(order, budget):
    """A knockout: the winner of a match goes on to the next round. 2 (n - 1) to 3 (n - 1) votes in all.

    A match is one vote in each order, and a third where these leave no winner and the budget has one to
    spare. A match that is level even then goes to the first in hash order.
    """
    n = len(order)
    field = order
    results = []
    while len(field) > 1:
        odd = len(field) % 2
        bye = field[:odd]  # sits this round out, and goes to the end so that nobody does so twice
        field = field[odd:]
        matches = list(zip(field[::2], field[1::2]))

        both_orders = [pair for i, j in matches for pair in ((i, j), (j, i))]
        results += yield from one_round(both_orders)

        matches_to_come = len(bye) + len(matches) - 1
        spare = max(0, budget - len(results) - 2 * matches_to_come)
        wins = tally(results, n)  # (n, n)
        level = [(i, j) for i, j in matches if wins[i, j] == wins[j, i]]
        results += yield from one_round(level[:spare])

        wins = tally(results, n)  # (n, n)
        winners = [i if wins[i, j] >= wins[j, i] else j for i, j in matches]
        field = winners + bye
    return results


# ---------------------------------------------------------------- one pair (0 is A, 1 is B)


def pair_schedule(budget=8, lead=2):
    """The schedule of one pair: a vote in each order, again while neither side is `lead` votes ahead and the
    budget lasts.

    A pair that comes again needs another seed. 2.98 votes, on average, are right in .797 of pairs; always 8
    in .801.
    """
    results = []
    difference = 0
    while len(results) < budget and abs(difference) < lead:
        pairs = [(0, 1), (1, 0)]
        results += yield from one_round(pairs[: budget - len(results)])
        wins_of_a, wins_of_b = tally(results, 2).sum(1).tolist()
        difference = wins_of_a - wins_of_b
    return results


def verdict(results):
    """What the votes on a pair say. -> dict

    verdict     "A", "B", "tie", or None where nothing could be read
    votes       how many could be read
    win         expected share of future votes for A: (w + 1) / (n + 2) after w of n, the mean under a flat
                prior
    low, high   its 90 % interval, widened to whole votes where there were ties
    share       fraction of the votes that support the verdict. 8 of 8 are right in .94 of pairs, and in .87
                if most of the noise is fixed errors: agreement is not accuracy, see `guarantee`
    consistent  do both orders say the same? None where one could not be read
    """
    wins = tally(results, 2)  # (2, 2)
    for_a, for_b = wins[0, 1].item(), wins[1, 0].item()
    votes = round(for_a + for_b)

    winner = None
    if for_a > for_b:
        winner = "A"
    elif for_b > for_a:
        winner = "B"
    elif votes:
        winner = "tie"

    return {
        "verdict": winner,
        "votes": votes,
        "win": (for_a + 1) / (votes + 2),
        "low": beta_quantile(0.05, math.floor(for_a) + 1, math.ceil(for_b) + 1),
        "high": beta_quantile(0.95, math.ceil(for_a) + 1, math.floor(for_b) + 1),
        "share": max(for_a, for_b) / votes if votes else None,
        "consistent": orders_agree(results),
    }


def orders_agree(results):
    """Do the votes of both orders have the same winner? None where an order has no vote that could be read."""
    winners = []
    for first in (0, 1):
        wins = tally([result for result in results if result[0] == first], 2)  # (2, 2)
        if not wins.any():
            return None
        winners.append(np.sign(wins[0, 1] - wins[1, 0]))
    return bool(winners[0] == winners[1])


# ---------------------------------------------------------------- exact binomial bounds


def binomial_tail(k, n, p):
    """P(k or more of n), each with probability p.

    It is summed over logarithms, because comb(1030, 515) is too large for a float.
    """
    if k <= 0 or p in (0, 1):
        return float(k <= 0 or p == 1)
    terms = []
    for i in range(k, n + 1):
        log_ways = math.log(math.comb(n, i))
        log_term = log_ways + i * math.log(p) + (n - i) * math.log1p(-p)
        terms.append(math.exp(log_term))
    return math.fsum(terms)


def beta_quantile(q, a, b):
    """Quantile of Beta(a, b) for whole a and b, by bisection: P(Beta <= x) = P(a or more of a + b - 1).

    Clopper-Pearson bounds of k of n are beta_quantile(delta, k, n - k + 1) and
    beta_quantile(1 - delta, k + 1, n - k).
    """
    low, high = float(b == 0), float(a != 0)
    while True:
        middle = (low + high) / 2
        if not low < middle < high:  # neighbouring floats
            return high
        if binomial_tail(a, a + b - 1, middle) >= q:
            high = middle
        else:
            low = middle


# ---------------------------------------------------------------- people's labels


def guarantee(labelled, target, delta=0.1):
    """The lowest share of votes at which people agree with `target` of the judge's verdicts.

    This holds with confidence 1 - delta. None if there is no such share.

    labelled  [(share, do people agree?), ...] of some 400 pairs drawn at random

    Each share, from unanimous downwards, is tested on all pairs at or above it, until a Clopper-Pearson bound
    fails (Trust or Escalate, arXiv 2407.18370). Many tests in a fixed sequence need no correction, if the
    shares are few and known before, as those of `pair_schedule` are. A tie is no verdict.
    """
    lowest = None
    count = agreeing = 0
    shares = {share for share, _ in labelled if share > 0.5}
    for threshold in sorted(shares, reverse=True):
        at_threshold = [agree for share, agree in labelled if share == threshold]
        count += len(at_threshold)
        agreeing += sum(at_threshold)
        # The same as beta_quantile(delta, agreeing, count - agreeing + 1) < target.
        if binomial_tail(agreeing, count, target) > delta:
            break
        lowest = threshold
    return lowest


def select_pairs(keys, wins, count):
    """Which pairs people should label. -> indices of the drawn and of the disputed, `count` in all

    keys  one text for each pair
    wins  the `win` of each pair's verdict

    Disputed pairs are worth most: with 20 % labelled, .876 are right, and .828 if the same number is drawn
    at random. A tenth is drawn in hash order all the same, since only a random sample says how often the
    judge is right.
    """
    order = in_hash_order(keys)
    tenth = math.ceil(count / 10)
    drawn, others = order[:tenth], order[tenth:]

    def distance_from_even(index):
        return abs(wins[index] - 0.5)

    disputed = sorted(others, key=distance_from_even)
    return drawn, disputed[: count - tenth]
