"""
Is a judgment right for a sound reason? What can be checked of its reasons without another model. Text only.

A verdict is right or wrong by its label. A **reason** can be checked where more is known of the pair: all of it
in the synthetic worlds, whose pairs carry their truth in `meta` (data/toy.py), and parts of it elsewhere. The
report and the reward for reasons use this one definition.

Truth of a synthetic pair, in its order, all of it texts:
`solution`   of a reasoning pair: every step; or `criterion` of a chat pair: the one that decides
`target`     the value that decides
`quote_a`    the words of A that decide; `value_a`: the number or word they give; the same of B

Of a judgment of such a pair everything is read: a text with anything beside the parts of its FORM is a fault.
What those parts still leave free decides nothing: the names of the other criteria, the second word behind a
criterion, the words of a justification before its last, and what a quote holds beside the words that decide.
What a judge computes without writing it down is not read either.
"""

import functools
import re
from decimal import Decimal

from lib.chat import FOREIGN_END
from rubrics import parse, verbatim, verdict_reward

# What is known of a pair beside its label, as fields of its meta; "answer" is the reference answer of a real one.
DECIDING_FIELDS = {"target", "quote_a", "quote_b", "value_a", "value_b"}
TRUTH = DECIDING_FIELDS | {"solution", "criterion", "answer"}

# What a synthetic judgment says behind each quote and at its end: "<quote_A> 7</quote_A> 7 is A", "so 7 is A".
VALUE_OF = {
    "A": re.compile(r"<quote_A>[^<]*</quote_A>\s*(\S+) is A\b"),
    "B": re.compile(r"<quote_B>[^<]*</quote_B>\s*(\S+) is B\b"),
}
CONCLUSION = re.compile(r"\bso (\S+) is ([AB])\s*$")

# The form of a whole synthetic judgment: each part once, in this order, and no free text between them. What
# repeats never has the characters that may follow it, so the time of a match is linear in the length of a text.
WORD = r"[^\s<>%]+"
CRITERION = rf"[A-Za-z]+ \d\d?\d?%: {WORD}(?: {WORD})?"
JUSTIFY = r"<justify>(?P<justify>[^<>]*)</justify>"
RUBRIC = rf"<rubric>\s*(?P<criteria>{CRITERION}(?:\n{CRITERION})*)\s*(?:{JUSTIFY}\s*)?</rubric>"
SOLUTION = r"<solution>[^<>]+</solution>"
READ_A = rf"<quote_A>[^<>]+</quote_A> {WORD} is A"
READ_B = rf"<quote_B>[^<>]+</quote_B> {WORD} is B"
EVAL = rf"<eval>\s*{READ_A} and {READ_B} so {WORD} is [AB]\s*</eval>"
FORM = re.compile(
    rf"\s*<type>\s*\w+\s*</type>\s*(?:{SOLUTION}|{RUBRIC})\s*{EVAL}\s*<answer>\s*\[\[[AB]\]\]\s*</answer>"
)

# A word of an answer: 1,234.5, or another number with its sign and fraction, or letters.
ANSWER_WORD = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\w)|\w+(?:[./]\w+)*)")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
QUOTE_WORDS = 3  # of a real pair: a shorter quote stands in almost any response
COVERED = 0.5  # of the weight of an oracle's rubric
EMPTY_WORDS = {"with", "from", "that", "this", "their", "than", "when", "which", "into"}


def knows_reason(pair):
    """True if everything that makes a reason sound is known of this pair: a synthetic one with its truth.

    A field of the same name that is no text, in somebody's own rows, is none of ours. Of a pair with criteria of its own,
    the reason is another one.
    """
    if pair.criteria:
        return False
    known = {name for name in TRUTH if isinstance(pair.meta.get(name), str)}
    return known >= DECIDING_FIELDS and bool(known & {"solution", "criterion"})


def check_reasons(judgment, pair):
    """{check: does it hold?} of the checks that apply to this pair, in the order of a judgment.

    judgment  a `rubrics.Judgment`
    pair      in the order in which the judge saw it

    A synthetic pair with its truth has all of:
    type                   "Reasoning" or "Chat", as the pair is
    solution or criterion  the solution word for word, every step; or the first criterion is the one that decides
    target                 the first criterion (or the solution's end) and the conclusion name the value that
                           decides, and the conclusion gives it to the side of the verdict, whose value it is
    quotes                 word for word, and the words that decide are among them
    values                 each side's value is the true one
    form                   the whole text has the form of such a judgment and nothing beside it, see `has_form`

    Any other pair has those of which something is known. They are proxies: a judgment may pass them all and
    still reason badly.
    quotes    where the judgment quotes: word for word, see `quotes_hold`
    answer    where meta["answer"] is the reference answer: the solution ends in it
    criteria  where an oracle's trace has a weighted rubric: the judge's covers it, see `covers`
    """
    if knows_reason(pair):
        return {
            "type": judgment.type.lower() == pair.type.lower(),
            **check_method(judgment, pair.meta),
            "quotes": quotes_decide(judgment, pair),
            "values": reads_values(judgment, pair.meta),
            "form": has_form(judgment, pair.meta["target"]),
        }
    checks = {}
    quotes = quotes_hold(judgment, pair)
    if quotes:
        checks["quotes"] = all(quotes)
    if (
        pair.criteria
    ):  # then the judge was told to write neither a rubric nor, if it needs none, a solution
        return checks
    answer = pair.meta.get("answer")
    if isinstance(answer, str) and ANSWER_WORD.search(answer):
        checks["answer"] = ends_in(judgment.solution, answer)
    weights = oracle_weights(pair.trace)
    if weights:
        checks["criteria"] = covers(judgment.rubric, weights)
    return checks


def is_sound(checks):
    """True if every check holds."""
    return all(checks.values())


def first_fault(judgment, pair, checks):
    """A short name of the first check that fails, e.g. "criterion Style"; "" where all hold.

    A rubric that should not be there, or should be another, has the name of its first criterion: what the judge
    goes by says more than the task type that it wrote in front.
    """
    fault = next((name for name, holds in checks.items() if not holds), "")
    wrong_rubric = judgment.rubric and not checks.get("criterion")
    if fault in ("type", "criterion") and wrong_rubric:
        return f"criterion {judgment.rubric[0][0][:30]}"
    if fault == "type":
        return f"type {judgment.type[:30]}" if judgment.type else "no type"
    return "no criterion" if fault == "criterion" else fault


# ---------------------------------------------------------------- the reward

REASONS_WEIGHT = 1.0  # 1: only a right verdict with sound reasons earns +1


def sound_reward(judgment, pair):
    """The reward for reasons, --reward sound of grpo.py: -1 to 1. Without a known reason, that of the verdict.

    (1 - w) x verdict + w x reasons, with w = REASONS_WEIGHT. `verdict` is +1 if the verdict is right, else -1;
    `reasons` is +1 if the verdict is right and the reasons are sound, else -1. Sound reasons
    for a wrong verdict earn no more than others.
    """
    verdict = verdict_reward(judgment, pair.label)
    sound = right_and_sound(judgment, pair)
    if sound is None:
        return verdict
    return (1 - REASONS_WEIGHT) * verdict + REASONS_WEIGHT * (1.0 if sound else -1.0)


def right_and_sound(judgment, pair):
    """True if the verdict is right and the reasons are sound; None where the pair's reason is not known."""
    if not knows_reason(pair):
        return None
    return verdict_reward(judgment, pair.label) > 0 and is_sound(check_reasons(judgment, pair))


# ---------------------------------------------------------------- synthetic pairs


def check_method(judgment, truth):
    """The checks of how a judgment decides: its solution or criterion, and the value that it looks for."""
    if isinstance(truth.get("solution"), str):
        name = "solution"
        steps = judgment.solution.split()
        holds = steps == truth["solution"].split()
        wanted = steps[-1:]
    else:
        name = "criterion"
        criterion, _, text = judgment.rubric[0] if judgment.rubric else ("", None, "")
        holds = criterion == truth["criterion"]
        wanted = text.split()[:1]
    conclusion = CONCLUSION.search(judgment.eval)
    value, side = conclusion.groups() if conclusion else (None, None)
    target = truth["target"]
    reached = wanted == [target] and value == target and side == judgment.verdict
    if reached:  # and the side is one of A and B
        reached = truth[f"value_{side.lower()}"] == target
    return {name: holds, "target": reached}


def quotes_decide(judgment, pair):
    """True if all quotes are word for word, and of each response one holds the words that decide."""
    if not all(verbatim(judgment, pair)):
        return False
    cited_a = map(spaced, judgment.quotes["A"])
    cited_b = map(spaced, judgment.quotes["B"])
    words_a = spaced(pair.meta["quote_a"])
    words_b = spaced(pair.meta["quote_b"])
    return any(words_a in quote for quote in cited_a) and any(words_b in quote for quote in cited_b)


def spaced(text):
    """The words of a text with one space around each, so that one such text holds another by whole words."""
    return f" {' '.join(text.split())} "


def reads_values(judgment, truth):
    """True if the judgment gives each response one value behind its quote, the true one."""
    value_a = VALUE_OF["A"].findall(judgment.eval)
    value_b = VALUE_OF["B"].findall(judgment.eval)
    return value_a == [truth["value_a"]] and value_b == [truth["value_b"]]


def has_form(judgment, target):
    """True if the whole text is one judgment of FORM, which decides by its first criterion, if it has any.

    That one has more than half of the weight, and a justification ends in the target. Behind the verdict there
    is white space, or the token that ends a turn. A text that was cut off has no verdict, so it has no form.

    What data/toy.py makes of a trace for a reduced protocol lacks a part of FORM, so it never is sound.
    """
    match = FORM.match(judgment.text)
    if not match or judgment.verdict is None:
        return False
    rest = judgment.text[match.end() :].strip()
    if rest and not FOREIGN_END.fullmatch(rest):
        return False
    weights = re.findall(r"(\d\d?\d?)%", match["criteria"] or "")
    if weights and 2 * int(weights[0]) <= sum(map(int, weights)):
        return False
    justify = match["justify"]
    return justify is None or justify.split()[-1:] == [target]


# ---------------------------------------------------------------- other pairs


def quotes_hold(judgment, pair):
    """Does each quote stand word for word in the response that it names? -> [bool, ...]

    An empty one does not. One of fewer than QUOTE_WORDS words, which are what white space parts, does not count.
    [] where none counts, or the responses are not known.
    """
    results = []
    quotes = [*judgment.quotes["A"], *judgment.quotes["B"]]
    for quote, holds in zip(quotes, verbatim(judgment, pair)):  # [] if the responses are not known
        words = quote.split()
        if not words or len(words) >= QUOTE_WORDS:
            results.append(holds and bool(words))
    return results


def ends_in(solution, answer):
    """True if the last words of a solution are the answer.

    Punctuation and capitals do not count, and two numbers are compared as numbers: 7.0 is 7, and 1,234 is 1234.
    0.5 and 1/2 are different answers here. What the words mean is not seen: "The answer is not 7" ends in 7.
    A minus is a sign wherever it stands before a number: "between 3-7" ends in -7.
    """
    written = answer_words(solution)
    reference = answer_words(answer)
    return written[-len(reference) :] == reference


def answer_words(text):
    """The words of an answer in lower case, and its numbers as numbers. -> [str or Decimal, ...]"""
    words = []
    for word in ANSWER_WORD.findall(text.casefold()):
        digits = word.replace(",", "")
        words.append(Decimal(digits) if NUMBER.fullmatch(digits) else word)
    return words


@functools.lru_cache(4096)  # a pair is judged in both orders and several times
def oracle_weights(trace):
    """{criterion: weight} of the rubric in an oracle's trace. Lines without a weight are no criteria."""
    rubric = parse(trace).rubric if trace else []
    return {name: weight for name, weight, _ in rubric if weight}


def covers(rubric, weights):
    """Does a rubric cover an oracle's? True if half of the oracle's weight, or more, is on criteria whose name
    is that of one of the judge's, or shares a content word with it.

    Words are compared, not meanings: "clear" does not cover "clarity", and a rubric of very many criteria
    covers any. A name without a content word, such as "SQL", counts only where the judge has it too.

    rubric   as `rubrics.Judgment.rubric`
    weights  {criterion of the oracle: its weight}, not empty
    """
    names, words = set(), set()  # of the judge's criteria
    for name, *_ in rubric:
        names.add(name.casefold())
        words |= content_words(name)
    covered = total = 0
    for name, weight in weights.items():
        own_words = content_words(name)
        if name.casefold() in names or own_words & words:
            covered += weight
            total += weight
        elif own_words:
            total += weight
    return covered > 0 and covered >= COVERED * total


def content_words(name):
    """The words of a criterion's name, in lower case, without the short and empty ones."""
    words = set()
    for word in re.findall(r"\w+", name.lower()):
        if len(word) > 3 or not word.isascii():
            words.add(word)
    return words - EMPTY_WORDS
