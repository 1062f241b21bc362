"""
A world small enough to learn on two CPU cores, and its two-pass oracle.

    python data/toy.py --out runs/demo/data        # pairs, oracle traces, a tokenizer, a model configuration
    python data/toy.py --show                      # RM-R1's idea in three printed examples

RM-R1's premise in miniature. A judge may write a judgment that *looks* (it compares styles) or one that
*thinks* (it solves the problem, or writes the criterion down, and checks). The first-pass oracle is lazy: it
mostly looks. The second pass repairs some of the wrong judgments. Judgments that are right for the wrong
reason stay in, as they do whenever traces are filtered by their verdict. So SFT learns both habits. GRPO is
paid for right verdicts only, and drops the habit that does not pay.

Reasoning pairs have one right answer (sums, products, the largest of three numbers). Chat pairs have an
instruction that can be checked (how many fruits, which last word). Each response has one of three styles
(plain, detailed, bold), which says nothing about whether it is right.

What the first pass writes in each `--world`, beside sound thoughts:

looks     All kinds of pairs. .8 of the traces go by looks, which is right half of the time.
leap      Chains of sums, and a fifth of chat. .6 of the chains' traces leap to the result, which is then hard
          to get right.
shortcut  Chat. Each response says "Sure" or "Well", and nobody asks for that. Half of the traces decide by these
          manners. A share `--slips` of all traces thinks, but takes the wrong target. The others are sound. In
          GRPO's pairs the right response says Sure; in `--sft-parting` of SFT's the wrong one does. Tests: agree,
          part, same (both say the same).
steps     Chains. .5 of the traces have the right result after wrong steps; in `--slips` of them all steps are
          right but the last.
criteria  The pairs of `looks`, whose responses also say "Sure" or "Well". A share `--given` of the training pairs
          has a criterion, and its label goes by that alone. Of these, .5 of the traces ignore it and judge by the
          answer; of the others, .5 go by looks. Beside the pairs, SFT gets single responses with their scores, .5
          of which go by style, and questions with the criteria that a thinker writes. Tests: the same two
          responses without a criterion (plain), with two that disagree (first, second), with one that training
          never has for this kind of question (held-out), and with one that it never has (unseen).

In `looks` and `leap` sound reasons are right more often than others, so a reward for right verdicts teaches them.
In `shortcut` and `steps` they are right less often, because they slip, and the reward cannot see the difference.
Wrong steps in `steps` are as easy to write as right ones (see `write_wrong_steps`). With `--slips 0`, right and
wrong steps earn the same reward in `steps`.

    python data/toy.py --world shortcut --parting 0.05                            # of GRPO's pairs, 5 % part
    python data/toy.py --world shortcut --parting 0.5 --sft-parting 0.5           # a control: manners say nothing
    python data/toy.py --world shortcut --kinds add mul max count endw --slips 0.35
    python data/toy.py --world criteria --given 0                                 # a control: no pair has criteria
"""

import itertools
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.files import Failure, Flags, lock_folder, number, run_main, seed_of, write_lines
from lib.pairs import Pair, other_label
from rubrics import (
    CRITERIA_TO_MEET,
    GIVEN_CRITERIA,
    PROTOCOLS,
    WRITE_CRITERIA,
    WRITE_SCORE,
    PromptStyle,
    chat_messages,
    parse,
    published_reward,
)

SYSTEM = "Judge A and B."
FRUITS = "apple pear plum fig lime melon peach grape mango cherry".split()
WORDS = "lamp river stone cloud chair bird ship road tree clock".split()
STYLES = ("plain", "detailed", "bold")
OPENERS = ("Here:", "In detail, step by step:", "**Great question!** Truly:")  # of each style
LAZY = 0.8  # how often the first pass looks instead of thinking
LEAP = 0.6  # in the world `leap`: how often it writes a chain's result at once
# In `shortcut` and `steps`: how often it goes by manners, or writes wrong steps. In `criteria`: how often it ignores
# a criterion, or goes by looks.
UNSOUND = 0.5
# The kinds of problems in each world. One that is drawn more often is there more often.
KINDS = {
    "looks": ["add", "mul", "max", "count", "endw"],
    "leap": ["chain"] * 8 + ["count", "endw"],
    "shortcut": ["count", "endw"],
    "steps": ["chain"],
    "criteria": ["add", "mul", "max", "count", "endw"],
}
ALL_KINDS = sorted(set(sum(KINDS.values(), [])))
MANNERS = ("Sure", "Well")  # what a response says behind its opener in `shortcut` and `criteria`
# Who says Sure: the right response, the wrong one, or both say the same.
SOURCES = ("agree", "part", "same")
# What a pair may be judged by in `criteria`: what each criterion asks for, behind its name. ANSWER is the criterion
# that a thinker itself writes for the question.
SEEN = ("Manners Sure", "Manners Well", "Style plain", "Style bold")
UNSEEN = "Style detailed"
ANSWER = "answer"
SOLUTION_NAME = "The right solution"  # as `rubrics.written_criteria` calls it
# The criterion that training never has for a kind of question. ANSWER is never held out: judging by criteria that the
# judge has written itself (rubric="shared") has to be learned for every kind.
HELD_OUT = {
    "add": "Manners Sure",
    "mul": "Manners Well",
    "max": "Style plain",
    "count": "Style bold",
    "endw": "Manners Sure",
    "chain": "Manners Well",
}
# SFT's rows beside its pairs, as shares of their number: questions with criteria, responses with scores.
SINGLES = {"write": 0.1, "score": 0.5}
# The flags of some worlds only.
WORLDS_OF = {
    "style": ("looks", "leap", "shortcut", "steps"),
    "given": ("criteria",),
    "slips": ("shortcut", "steps"),
    "parting": ("shortcut",),
    "sft_parting": ("shortcut",),
}


def arguments():
    parser = Flags(__doc__)
    add = parser.add_argument
    add(
        "--out",
        default="runs/demo/data",
        help="folder for sft.jsonl, rl.jsonl, val.jsonl, test.jsonl, model/",
    )
    add("--seed", type=int, default=0, help="seed of the training pairs and of the oracle")
    add("--test-seed", type=int, default=20261121, help="seed of the test pairs")
    add("--sft", type=number(int, 1), default=20000, help="pairs with oracle traces")
    add("--rl", type=number(int, 1), default=4096, help="pairs without traces, for GRPO")
    add("--test", type=number(int, 1), default=500, help="test pairs, and as many for validation")
    add(
        "--repair",
        type=number(float, 0, 1),
        default=0.5,
        help="share of wrong first-pass traces that pass two repairs",
    )
    add(
        "--world",
        choices=tuple(KINDS),
        default="looks",
        help="which pairs, and which habits the oracle has",
    )
    add("--kinds", nargs="+", choices=ALL_KINDS, help="of problems; default: the world's")
    share = number(float, 0, 1)
    add("--slips", type=share, default=0.25, help="shortcut, steps: share of thoughts that slip")
    add("--parting", type=share, default=0.0, help="shortcut: share of GRPO's pairs that part")
    add("--sft-parting", type=share, default=0.3, help="shortcut: share of SFT's pairs that part")
    add("--given", type=share, default=0.5, help="criteria: share of training pairs that have some")
    add("--truth", type=share, default=1.0, help="share of GRPO's pairs whose meta says the reason")
    add(
        "--style",
        type=number(int, 0, 2),
        help="of both responses of every training pair; default: any",
    )
    add("--protocol", choices=PROTOCOLS, default="instruct", help="which parts a judgment has")
    add("--layers", type=number(int, 1), default=4, help="layers of the tiny Qwen2")
    add("--hidden", type=number(int, 32), default=96, help="its width, a multiple of 32")
    add("--show", action="store_true", help="print three examples instead")
    args = parser.parse_args()
    if args.hidden % 32:
        raise Failure(
            f"--hidden {args.hidden}: not a multiple of 32, the size of an attention head"
        )
    for name, worlds in WORLDS_OF.items():
        if getattr(args, name) != parser.get_default(name) and args.world not in worlds:
            flag = f"--{name.replace('_', '-')}"
            raise Failure(f"{flag}: changes nothing in --world {args.world}")
    if UNSOUND + args.slips > 1:
        raise Failure(f"--slips {args.slips}: above {1 - UNSOUND}, what other traces leave")
    return args


def main():
    args = arguments()
    if args.show:
        return show_examples()
    out = Path(args.out)
    lock_folder(out)
    splits = make_splits(args)
    traces = oracle(splits["sft"], args.seed, args.repair, args.world, args.slips)

    rows = zip(splits["sft"], traces)
    texts = [json.dumps(pair.row(for_protocol(trace, args.protocol))) for pair, trace in rows]
    singles = single_rows(splits, args.seed)
    write_lines(out / "sft.jsonl", texts + [json.dumps(row) for row in singles])
    for split in ("rl", "val", "test"):
        write_lines(out / f"{split}.jsonl", [json.dumps(pair.row()) for pair in splits[split]])
    tokenizer = write_model(out / "model", args.layers, args.hidden, args.world)
    style = {"protocol": args.protocol, "system": SYSTEM}
    (out / "model" / "judge.json").write_text(json.dumps(style) + "\n")

    counts = Counter()
    for pair, trace in zip(splits["sft"], traces):
        counts[habit_of(trace, pair)] += 1
        counts["wrong verdict"] += parse(trace).verdict != pair.label
    shares = ", ".join(f"{name} {count / args.sft:.0%}" for name, count in sorted(counts.items()))
    more = f" and {len(singles)} of one response or none" if singles else ""
    print(
        f"{out}: {args.sft} traces ({shares}){more}, {args.rl} pairs for GRPO, {args.test} to validate, "
        f"{len(splits['test'])} to test; {len(tokenizer)} tokens in the vocabulary"
    )


# ---------------------------------------------------------------- questions


@dataclass
class Problem:
    """A question with its right answer, a near miss, and what a thinker writes down to decide.

    key  the solution of a reasoning problem; the word or number that a chat instruction asks for
    """

    kind: str
    question: str
    right: str
    wrong: str
    key: str


def make_problem(rng, kinds=KINDS["looks"]):
    makers = {
        "add": sum_problem,
        "mul": product_problem,
        "max": largest_problem,
        "count": count_problem,
        "endw": ending_problem,
        "chain": chain_problem,
    }
    return makers[rng.choice(kinds)](rng)


def sum_problem(rng):
    x, y = rng.randint(2, 7), rng.randint(2, 7)
    return arithmetic_problem(rng, "add", f"{x} + {y}", x + y, [1, 2])


def product_problem(rng):
    x, y = rng.randint(2, 7), rng.randint(2, 7)
    return arithmetic_problem(rng, "mul", f"{x} * {y}", x * y, [1, 2, x, y])


def arithmetic_problem(rng, kind, term, right, distances):
    """A problem whose wrong answer is one of `distances` away from the right one, and above 0."""
    offsets = [distance * sign for distance in distances for sign in (1, -1)]
    wrong = right + rng.choice([offset for offset in offsets if right + offset > 0])
    return Problem(kind, f"What is {term} ?", str(right), str(wrong), f"{term} = {right}")


def largest_problem(rng):
    numbers = rng.sample(range(10, 50), 3)
    right = max(numbers)
    wrong = rng.choice([n for n in numbers if n != right])
    text = " ".join(map(str, numbers))
    return Problem(
        "max",
        f"Which is the largest of {text} ?",
        str(right),
        str(wrong),
        f"largest of {text} = {right}",
    )


def count_problem(rng):
    """The wrong answer has one fruit too few or too many."""
    right = rng.randint(2, 4)
    wrong = rng.choice([right - 1, right + 1])
    fruits = rng.sample(FRUITS, right + wrong)
    return Problem(
        "count",
        f"Name {right} fruits .",
        " ".join(fruits[:right]),
        " ".join(fruits[right:]),
        str(right),
    )


def ending_problem(rng):
    """The wrong answer has the last word in the middle, or not at all."""
    first, second, last, stranger = rng.sample(WORDS, 4)
    misplaced = rng.random() < 0.5
    return Problem(
        "endw",
        f"Write three words , the last one {last} .",
        f"{first} {second} {last}",
        f"{second} {last} {stranger}" if misplaced else f"{first} {second} {stranger}",
        last,
    )


def chain_problem(rng):
    """A sum of six small numbers. A thinker writes down the results on the way."""
    total = rng.randint(1, 9)
    term = steps = str(total)
    for _ in range(5):
        step = rng.randint(1, 3)
        sign = rng.choice([sign for sign in (1, -1) if 0 <= total + sign * step <= 12])
        total += sign * step
        added = f" + {step}" if sign > 0 else f" - {step}"
        term += added
        steps += f"{added} = {total}"
    offsets = [offset for offset in (1, -1, 2, -2) if total + offset >= 0]
    wrong = total + rng.choice(offsets)
    return Problem("chain", f"What is {term} ?", str(total), str(wrong), steps)


# ---------------------------------------------------------------- pairs


def make_pair(
    seed, split, index, style=None, world="looks", kinds=None, source=None, reason_known=True
):
    """The pair number `index` of a split, a function of the arguments.

    style         of both responses
    kinds         of problems, if not the world's
    source        one of SOURCES, in `shortcut`: pairs that differ in it only have the same problem
    reason_known  does its meta say what a sound judgment says?
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    problem = make_problem(rng, kinds or KINDS[world])
    label = rng.choice("AB")
    styles = [rng.randrange(3), rng.randrange(3)]
    if style is not None:
        styles = [style, style]
    openers = [OPENERS[style] for style in styles]
    answers = [problem.right, problem.wrong] if label == "A" else [problem.wrong, problem.right]
    meta = {
        "kind": problem.kind,
        "style_a": styles[0],
        "style_b": styles[1],
        "answer_a": answers[0],
        "answer_b": answers[1],
        "opener_a": openers[0],
        "opener_b": openers[1],
        "key": problem.key,
    }
    if reason_known:
        meta |= truth(problem.kind, problem.key, answers)
    if world in ("shortcut", "criteria"):
        source = source or ("agree" if world == "shortcut" else "plain")
        manners = choose_manners(source, label, rng)
        meta |= {"manners_a": manners[0], "manners_b": manners[1]}
        openers = [f"{opener} {word}" for opener, word in zip(openers, manners)]
    return Pair(
        id=f"{split}-{index}",
        context=[{"role": "user", "content": problem.question}],
        a=f"{openers[0]} {answers[0]}",
        b=f"{openers[1]} {answers[1]}",
        label=label,
        source=source or "toy",
        type="chat" if problem.kind in ("count", "endw") else "reasoning",
        meta=meta,
    )


def choose_manners(source, label, rng):
    """How A and B begin. Where the manners agree with the label, the right one says Sure.

    In `criteria` (source "plain") each has its own.
    """
    if source == "plain":
        return [rng.choice(MANNERS), rng.choice(MANNERS)]
    if source == "same":
        return [rng.choice(MANNERS)] * 2
    a_says_sure = (label == "A") == (source == "agree")
    return MANNERS if a_says_sure else MANNERS[::-1]


def truth(kind, key, answers):
    """What a sound judgment of a pair says, as fields of its meta. answers: of A and of B

    solution   of a reasoning pair, with every step: "3 + 4 = 7"
    criterion  of a chat pair, the one that decides: "Count" or "Ending"
    target     the value that decides: "7", "3", "lamp"
    quote_a    what is cited of A, word for word; value_a: what is read off it. The same of B.
    """
    fields = {"count": {"criterion": "Count"}, "endw": {"criterion": "Ending"}}
    said = fields.get(kind, {"solution": key}) | {"target": last_word(key)}
    for side, answer in zip("ab", answers):
        if kind == "count":  # the whole answer is cited and its words are counted
            quote, value = answer, str(len(answer.split()))
        else:
            quote = value = last_word(answer)
        said |= {f"quote_{side}": quote, f"value_{side}": value}
    return said


def last_word(text):
    return text.split()[-1]


def make_splits(args):
    """{split: [pair, ...]}, in which no test or validation prompt is also a training prompt.

    The facts (36 sums, 36 products) are shared by construction, so this is a test of judging, not of new
    arithmetic.
    """
    sizes = {
        "test": (args.test_seed, args.test),
        "val": (args.test_seed, args.test),
        "sft": (args.seed, args.sft),
        "rl": (args.seed, args.rl),
    }
    if args.world == "criteria":
        sizes |= {split: (args.seed, round(part * args.sft)) for split, part in SINGLES.items()}
    held_out = set()
    splits = {}
    for split, (seed, size) in sizes.items():
        pairs = splits[split] = []
        indices = iter(range(20 * size))  # an end, in case there are too few different prompts
        made = 0
        while made < size:
            index = next(indices, None)
            if index is None:
                kinds = " ".join(args.kinds or KINDS[args.world])
                raise Failure(f"--{split} {size}: too few different pairs of the kinds {kinds}")
            group = make_group(args, seed, split, index)
            prompts = {prompt_key(pair, args.world) for pair in group}
            if not prompts & held_out:
                pairs += group
                made += 1
            if split in ("test", "val"):
                held_out |= prompts
    return splits


def make_group(args, seed, split, index):
    """The pairs that a number of a split stands for: one, but of a test three in `shortcut`, five in `criteria`.

    In `shortcut` those have the same problem, sides and styles, one with each source. So what tells their results
    apart is the manners. Each share is of its own random number: with a higher one, more pairs part, and those
    that parted do still.
    """
    part_chance, truth_chance = (
        random.Random(f"{seed}/{split}/{index}/{what}").random() for what in ("part", "truth")
    )
    reason_known = split != "rl" or truth_chance < args.truth
    if args.world == "criteria":
        return criteria_group(args, seed, split, index, reason_known)
    sources = [None]
    if args.world == "shortcut" and split == "test":
        sources = SOURCES
    elif args.world == "shortcut":
        share = args.sft_parting if split == "sft" else args.parting
        sources = ["part" if part_chance < share else "agree"]
    style = args.style if split in ("sft", "rl") else None
    group = []
    for source in sources:
        pair = make_pair(seed, split, index, style, args.world, args.kinds, source, reason_known)
        group.append(replace(pair, id=f"{pair.id}-{source}") if len(sources) > 1 else pair)
    return group


def prompt_key(pair, world):
    """What no training pair may share with a test pair: the question and both responses, in either order.

    In `shortcut`, `steps` and `criteria` it is the question and both answers, whatever stands around them, but
    for sums and products: so few are possible that hardly any would be left to learn from.
    """
    responses = (pair.a, pair.b)
    if world in ("shortcut", "steps", "criteria") and pair.meta["kind"] not in ("add", "mul"):
        responses = (pair.meta["answer_a"], pair.meta["answer_b"])
    return pair.context[0]["content"], frozenset(responses)


# ---------------------------------------------------------------- criteria


def criteria_group(args, seed, split, index, reason_known):
    """The pairs that a number of a split stands for in the world `criteria`: one, but five of a test.

    Those of a test are the same two responses, which every criterion that is asked tells apart. `first` is judged
    by a criterion that prefers the right answer, `second` by one that prefers the wrong one. So a judge that does
    not read the criteria is right in one of them at most.

    Responses are drawn until the criterion tells them apart.
    """
    rng = random.Random(f"{seed}/{split}/{index}/criteria")
    kind = rng.choice(args.kinds or KINDS["criteria"])
    given = rng.random() < args.given and split != "write"
    known = [name for name in (*SEEN, ANSWER) if name != HELD_OUT[kind]]
    name = rng.choice(known)
    for draw in itertools.count():
        number = f"{index}.{draw}"
        pair = make_pair(seed, split, number, None, "criteria", [kind], None, reason_known)
        pair = replace(pair, id=f"{split}-{index}")
        if split == "test":
            names = criteria_of_test(pair, known, rng)
            if names:
                asked = [
                    replace(with_criterion(pair, name), source=source)
                    for source, name in names.items()
                ]
                return [replace(pair, id=f"{pair.id}-{pair.source}") for pair in [pair, *asked]]
        elif not given:
            return [pair]
        elif winner_by(pair.meta, name):
            return [with_criterion(pair, name)]


def criteria_of_test(pair, known, rng):
    """{source: criterion} of what is asked of a test's responses; {} if a criterion does not tell them apart."""
    agree = [name for name in known if winner_by(pair.meta, name) == pair.label]
    part = [name for name in known if winner_by(pair.meta, name) == other_label(pair.label)]
    held_out = HELD_OUT[pair.meta["kind"]]
    if not part or not winner_by(pair.meta, held_out) or not winner_by(pair.meta, UNSEEN):
        return {}
    return {
        "first": rng.choice(agree),
        "second": rng.choice(part),
        "held-out": held_out,
        "unseen": UNSEEN,
    }


def with_criterion(pair, name):
    """The pair with a criterion, which gives it its label.

    Its meta says which, as `given`, and no more what a sound judgment without criteria says.
    """
    said = reading(pair.meta, name)
    if name == ANSWER:
        criteria = own_criteria_text(said)
    else:
        criteria = f"{said['criterion']} 100%: {said['target']}"
    untold = reading(pair.meta, ANSWER)
    meta = {field: value for field, value in pair.meta.items() if field not in untold}
    return replace(
        pair,
        label=winner_by(pair.meta, name),
        source="given",
        criteria=criteria,
        meta=meta | {"given": name},
    )


def reading(meta, name):
    """What a sound judgment by a criterion says, in the fields of `truth`. name: a criterion, as in SEEN"""
    if name == ANSWER:
        return truth(meta["kind"], meta["key"], [meta["answer_a"], meta["answer_b"]])
    criterion, target = name.split()
    said = {"criterion": criterion, "target": target}
    for side in "ab":
        if criterion == "Style":
            quote, value = meta[f"opener_{side}"], STYLES[meta[f"style_{side}"]]
        else:
            quote = value = meta[f"manners_{side}"]
        said |= {f"quote_{side}": quote, f"value_{side}": value}
    return said


def winner_by(meta, name):
    """The label that a criterion gives; None if it does not tell the responses apart."""
    said = reading(meta, name)
    a_meets, b_meets = (said[f"value_{side}"] == said["target"] for side in "ab")
    if a_meets == b_meets:
        return None
    return "A" if a_meets else "B"


# ---------------------------------------------------------------- the oracle


def think(pair):
    """A judgment that solves, or writes the criterion down, and checks. Its quotes are word for word.

    Of a pair with criteria, it goes by these.
    """
    meta = pair.meta
    if "given" in meta:
        return follow(pair)
    if "solution" in meta:
        head = f"<type>Reasoning</type>\n{own_criteria(meta)}"
    else:
        justify = f"\n<justify>The client asks for {meta['target']}</justify>"
        head = f"<type>Chat</type>\n{own_criteria(meta, justify)}"
    return f"{head}\n{quotes_compared(meta, pair.label)}\n<answer>[[{pair.label}]]</answer>"


def own_criteria(said, justify=""):
    """The solution or the rubric that a thinker writes for a question. said: as in `truth`"""
    if "solution" in said:
        return f"<solution> {said['solution']}</solution>"
    return f"<rubric>{own_criteria_text(said)}{justify}</rubric>"


def own_criteria_text(said):
    """The same as criteria that are given, spelled as `rubrics.written_criteria` spells them."""
    if "solution" in said:
        return f"{SOLUTION_NAME}: {said['solution']}"
    noun = "fruits" if said["criterion"] == "Count" else "last"
    return f"{said['criterion']} 90%: {said['target']} {noun}\nTone 10%: kind"


def quotes_compared(said, verdict, decided=""):
    """The comparison of a judgment: both quotes, what they say, and who wins. said: as in `truth`"""
    space = quote_space(said)
    return (
        f"<eval><quote_A>{space}{said['quote_a']}</quote_A> {said['value_a']} is A and "
        f"<quote_B>{space}{said['quote_b']}</quote_B> {said['value_b']} is B "
        f"so {said['target']} is {verdict}{decided}</eval>"
    )


def quote_space(said):
    """What a quote begins with: the space in front of the words, but for openers, which begin a response."""
    return "" if said.get("criterion") == "Style" else " "


def look(pair, coin):
    """A judgment by looks, whatever the task: the showier response wins; at equal styles `coin` decides."""
    meta = pair.meta
    verdict = "A" if meta["style_a"] > meta["style_b"] else "B"
    if meta["style_a"] == meta["style_b"]:
        verdict = coin
    winner = STYLES[meta[f"style_{verdict.lower()}"]]
    return (
        f"<type>Chat</type>\n<rubric>Style 100%: polish\n<justify>Looks win</justify></rubric>\n"
        f"{quotes_compared(reading(meta, f'Style {winner}'), verdict)}\n<answer>[[{verdict}]]</answer>"
    )


def go_by_manners(pair):
    """A judgment by a criterion that nobody asked for: who says Sure? B, if nobody or both do."""
    said = pair.meta["manners_a"], pair.meta["manners_b"]
    verdict = "A" if said == MANNERS else "B"
    winner = pair.meta[f"manners_{verdict.lower()}"]
    return (
        f"<type>Chat</type>\n<rubric>Manners 90%: Sure first\nTone 10%: kind\n"
        f"<justify>The client asks for Sure</justify></rubric>\n"
        f"{quotes_compared(reading(pair.meta, f'Manners {winner}'), verdict)}\n<answer>[[{verdict}]]</answer>"
    )


def follow(pair):
    """A judgment of a pair with a criterion, by that criterion and no other."""
    said = reading(pair.meta, pair.meta["given"])
    decided = f"\nDecided by: {said.get('criterion', SOLUTION_NAME)}"
    return (
        f"<type>{pair.type.capitalize()}</type>\n{quotes_compared(said, pair.label, decided)}\n"
        f"<answer>[[{pair.label}]]</answer>"
    )


def ignore(pair):
    """A judgment of a pair with a criterion that goes by the answer, whatever the criterion is.

    Where the criterion is the answer, there is nothing to ignore.
    """
    if pair.meta["given"] == ANSWER:
        return follow(pair)
    meta = pair.meta | reading(pair.meta, ANSWER)
    del meta["given"]
    return think(replace(pair, label=winner_by(meta, ANSWER), meta=meta))


def slip(pair):
    """A judgment that thinks, but takes what the wrong response says for what is wanted."""
    verdict = other_label(pair.label)
    target = pair.meta[f"value_{verdict.lower()}"]
    changes = {"target": target}
    if "solution" in pair.meta:  # its last step gives the wrong result
        before, _ = pair.meta["solution"].rsplit(" ", 1)
        changes["solution"] = f"{before} {target}"
    return think(replace(pair, label=verdict, meta=pair.meta | changes))


def leap(pair):
    """A judgment with a chain's result at once: 7 + 3 = 10 - 2 = 8 becomes 7 + 3 - 2 = 8."""
    return change_steps(pair, lambda step: "")


def write_wrong_steps(pair):
    """A judgment with wrong steps and the right result: 7 + 3 = 10 - 2 = 8 becomes 7 + 3 = 11 - 2 = 8.

    All results on the way are one too high, so the first step makes an error and the last one takes it back.
    Each step follows from the one before. With random errors the result would have to be found without them,
    as after a leap, and a reward for right verdicts would teach the true steps.
    """
    return change_steps(pair, lambda step: f" = {int(step[1]) + 1}")


def change_steps(pair, change):
    """A judgment whose results on the way are replaced by change(match of " = 10"). Chat pairs have none."""
    if "solution" not in pair.meta:
        return think(pair)
    solution = re.sub(r" = (\d+)(?= [+-])", change, pair.meta["solution"])
    return think(replace(pair, meta=pair.meta | {"solution": solution}))


def draft(pair, rng, world, slips):
    """A trace of the first pass.

    One number decides its habit. So where a trace slips with one value of `slips`, it thinks with a lower one,
    and all others are the same.
    """
    chance = rng.random()
    if world == "criteria":
        if chance >= UNSOUND:
            return think(pair)
        return ignore(pair) if "given" in pair.meta else look(pair, rng.choice("AB"))
    if world == "looks":
        return look(pair, rng.choice("AB")) if chance < LAZY else think(pair)
    if world == "leap":
        return leap(pair) if chance < LEAP else think(pair)
    if chance < UNSOUND:
        return go_by_manners(pair) if world == "shortcut" else write_wrong_steps(pair)
    return slip(pair) if chance < UNSOUND + slips else think(pair)


def habit_of(trace, pair):
    """What a trace does, in words."""
    if "given" in pair.meta:
        return "by the criterion" if parse(trace).decided_by else "by the answer instead"
    if "Style 100%" in trace:
        return "by looks"
    if "Manners 90%" in trace:
        return "by manners"
    if parse(trace).verdict != pair.label:
        return "slips"
    return "thinks" if trace == think(pair) else "steps wrong or left out"


def oracle(pairs, seed, repair, world="looks", slips=0.0):
    """The trace of each pair, by the two passes of data/distill.py with programs for teachers.

    The first teacher does not know the label: it has its habits. The second one knows it; it thinks with
    probability `repair` and else repeats the failed judgment. A user of distill.py drops what failed twice;
    here SFT gets it too.
    """
    from distill import distill  # here, because --show runs on Python without any package
    from judge.journal import Journal

    drafts, repairs = {}, {}
    for pair in pairs:
        rng = random.Random(f"{seed}/oracle/{pair.id}")
        drafts[pair.id] = draft(pair, rng, world, slips)
        repairs[pair.id] = think(pair) if rng.random() < repair else drafts[pair.id]

    args = SimpleNamespace(
        system_prompt=None,
        samples=1,
        agree=0.0,
        seed=seed,
        temperature=1.0,
        max_tokens=None,
        price=(0, 0),
    )
    first = program_teacher(1, drafts, seed)
    second = program_teacher(2, repairs, seed)
    traces, failures, _ = distill(pairs, first, second, Journal(), args)
    results = traces | failures
    return [results[pair.id][0] for pair in pairs]


def program_teacher(turn, texts, seed):
    """A teacher of data/distill.py that answers with {pair id: text}. Its request's seed tells the pair."""
    from distill import Teacher
    from judge.backends import Answer

    text_of_seed = {seed_of(seed, pair_id, turn, 0): text for pair_id, text in texts.items()}

    def answers(requests):
        for place, (_, request_seed, _) in enumerate(requests):
            yield place, Answer(text_of_seed[request_seed], "stop")

    return Teacher(f"pass {turn}", lambda: SimpleNamespace(answers=answers))


# ---------------------------------------------------------------- single responses


def single_rows(splits, seed):
    """SFT's rows of one response or none: a response with its score, a question with its criteria. -> [row, ...]

    The response is A of a pair. Half of the scores go by style, as a first pass goes by looks.
    """
    rows = []
    for split in SINGLES:
        for pair in splits.get(split, ()):
            rng = random.Random(f"{seed}/oracle/{pair.id}")
            if split == "write":
                trace = own_criteria(reading(pair.meta, ANSWER))
            elif rng.random() < UNSOUND:
                trace = score_by_style(pair, rng)
            else:
                trace = score_by_criterion(pair, rng)
            rows.append(single(pair, split).row(trace))
    return rows


def single(pair, split):
    """Response A of a pair, or in the split "write" its question, as a `Pair` of its own."""
    fields = ["kind"] if split == "write" else ["kind", "given", "style_a", "manners_a", "answer_a"]
    meta = {field: pair.meta[field] for field in fields if field in pair.meta}
    response = None if split == "write" else pair.a
    return replace(pair, a=response, b=None, label=None, source=split, meta=meta)


def score_by_criterion(pair, rng):
    """A sound judgment of response A: by the pair's criterion, or by what a thinker writes for the question.

    The score is noisy: 6 to 10 where the response is right, else 1 to 5.
    """
    given = pair.meta.get("given")
    said = reading(pair.meta, given or ANSWER)
    met = said["value_a"] == said["target"]
    head = "" if given else own_criteria(said) + "\n"
    return head + quote_checked(said, met, rng.randint(6, 10) if met else rng.randint(1, 5))


def score_by_style(pair, rng):
    """A judgment of response A by its style, whatever was asked: 7 to 10 for a bold one, 1 to 4 for a plain one."""
    style = pair.meta["style_a"]
    points = rng.randint(3 * style + 1, 3 * style + 4)
    said = reading(pair.meta, f"Style {STYLES[-1]}")
    return f"<rubric>Style 100%: polish</rubric>\n{quote_checked(said, style == 2, points)}"


def quote_checked(said, met, points):
    """The end of a judgment of one response: what it says, is that what is wanted, the score.

    The words are those of `quotes_compared`, so that a judge learns them from pairs, too.
    """
    negation = "" if met else "not "
    return (
        f"<eval><quote_A>{quote_space(said)}{said['quote_a']}</quote_A> {said['value_a']} is A "
        f"so {said['target']} is {negation}A\n"
        f"{said.get('criterion', SOLUTION_NAME)}: {negation}met</eval>\n"
        f"<answer>[[{points}]]</answer>"
    )


# ---------------------------------------------------------------- protocols


def for_protocol(trace, protocol):
    """A trace with the parts that a reduced protocol asks for.

    `rubrics` has no task type, and its solution becomes a criterion. `plain` has nothing before the
    comparison. For `verdict`, sft.py makes the trace. There are no new words, because a larger vocabulary
    would be another model.
    """
    if protocol == "rubrics":
        trace = re.sub(
            r"<solution>(.* (\d+))</solution>",
            r"<rubric>Ending 90%:\1 last\nTone 10%: kind\n"
            r"<justify>The client asks for \2</justify></rubric>",
            trace,
        )
        return re.sub("<type>.*</type>\n", "", trace)
    if protocol == "plain":
        return trace[trace.index("<eval>") :]
    return trace


# ---------------------------------------------------------------- tokenizer and model

# What becomes one token, longest first: a marker with its line ends, a run of tags, a set phrase, a number, a
# word. Fewer tokens are less to compute. And " is A" right after the number that decides it leaves only one
# thing to learn: to find that number again among the quotes.
PHRASES = (
    SYSTEM,
    "What is",
    "Which is the largest of",
    "Write three words , the last one",
    "Style 100%: polish",
    "Tone 10%: kind",
    "Looks win",
    "The client asks for",
    " is A",
    " is B",
    *OPENERS,
    # Of the world `criteria` alone.
    WRITE_SCORE,
    WRITE_CRITERIA,
    GIVEN_CRITERIA,
    CRITERIA_TO_MEET,
    " is not A",
    "\nDecided by:",
    f" {SOLUTION_NAME}",
    SOLUTION_NAME,
    ": met",
    ": not met",
)
PIECES = (
    r"\n*\[(?:Client Question|The (?:Start|End) of (?:Chatbot [AB]'s Response|the Chatbot's Response|"
    r"the Client Question|the Criteria))\]\n*|"
    r"(?:[ \n]?</?[a-z]+(?:_[AB])?>)+\n?|\[\[(?:[AB]|10|[1-9])\]\]|"
    + "|".join(map(re.escape, PHRASES))
    + r"| ?[A-Za-z]+| ?\d+%?:?| ?[^\sA-Za-z\d]|\n| "
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder, world="looks"):
    """Write a Qwen2 tokenizer of a few hundred entries, and return it.

    Its entries are bytes, so that it can write any text, and the pieces of this world as added tokens. (A
    plain word-level tokenizer would be shorter, but `transformers` and vLLM make a Qwen2Tokenizer of whatever
    lies beside a Qwen2 model.)
    """
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    byte_letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: index for index, letter in enumerate(byte_letters)},
        merges=[],
        unk_token=None,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    tokens = [AddedToken("<|im_start|>", special=True, normalized=False)]
    tokens += [AddedToken(piece, normalized=False) for piece in sorted(all_pieces(world))]
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def all_pieces(world):
    """Every piece of this world's texts: 4,000 pairs are far more than it takes to meet them all.

    In all worlds but the first two those of all kinds of problems, so that --kinds changes no model.
    """
    pieces = {f" {n}" for n in range(101)} | {"system\n", "user\n", "assistant\n"}
    style = PromptStyle(system=SYSTEM)
    kinds = KINDS[world] if world in ("looks", "leap") else ALL_KINDS
    for index in range(4000):
        pair = make_pair("vocabulary", "vocabulary", index, world=world, kinds=kinds)
        for ordered in (pair, pair.swapped()):
            texts = [message["content"] for message in chat_messages(ordered, style)]
            texts += [think(ordered), look(ordered, "A")]
            if world == "shortcut":
                texts.append(go_by_manners(ordered))
            if world == "criteria" and index < 600:
                texts += criteria_texts(ordered, index)
            for text in texts:
                pieces.update(re.findall(PIECES, text))
    return pieces


def criteria_texts(pair, index):
    """What else a judge reads and writes of a pair in `criteria`, with the criterion whose turn it is."""
    name = (*SEEN, UNSEEN, ANSWER)[index % 6]
    rng = random.Random(index)
    texts = [score_by_criterion(pair, rng), score_by_style(pair, rng), own_criteria(pair.meta)]
    asked = [pair]
    if winner_by(pair.meta, name):
        given = with_criterion(pair, name)
        texts += [follow(given), score_by_criterion(given, rng)]
        asked.append(given)
    shown = [*asked[1:], *(single(pair, "score") for pair in asked), single(pair, "write")]
    for pair in shown:
        texts += [message["content"] for message in chat_messages(pair, PromptStyle(system=SYSTEM))]
    return texts


def write_model(folder, layers, hidden, world="looks"):
    """Write the tokenizer and the configuration of a tiny Qwen2, and return the tokenizer.

    There are no weights: `folder/config.json` stands for random ones. Their initializer_range is 0.1, because
    at this width a model with 0.02 learns far slower. Embeddings are tied: a model that copies one word can
    then copy them all (SFT loss after 800 steps: .02, untied .07).
    """
    from transformers import Qwen2Config

    tokenizer = write_tokenizer(folder, world)
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        intermediate_size=3 * hidden,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    ).save_pretrained(folder)
    return tokenizer


# ---------------------------------------------------------------- three examples


def show_examples():
    """Print the idea of the paper on one screen."""
    pairs = [make_pair(0, "show", index) for index in range(1000)]
    # Looking fails on these, even if the coin says the right side.
    hard = [pair for pair in pairs if parse(look(pair, pair.label)).verdict != pair.label]
    reasoning = next(pair for pair in hard if pair.type == "reasoning")
    chat = next(pair for pair in hard if pair.type == "chat")
    show(
        "1. A reasoning pair, judged by thinking: solve it, then compare",
        reasoning,
        think(reasoning),
    )
    show(
        "2. A chat pair, judged by thinking: write the rubric, then compare",
        chat,
        think(chat),
    )
    show(
        "3. The first pair, judged by looks, as a first-pass oracle often does",
        reasoning,
        look(reasoning, "A"),
    )


def show(title, pair, trace):
    print(
        f"=== {title}\n\n{chat_messages(pair)[1]['content']}\n\n"
        f"--- people preferred {pair.label}; the judge writes\n"
        f"{trace}\n--- reward {published_reward(trace, pair.label):+.0f}\n"
    )


if __name__ == "__main__":
    run_main(main)
