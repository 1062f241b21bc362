"""Right for a sound reason: what is a fault, what is none, and what the report makes of it."""

import json
import random
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as E
import prepare
import toy
from conftest import call
from judge import benchmarks
from judge import report as R
from judge.soundness import check_reasons, first_fault, is_sound, knows_reason
from lib.pairs import Pair, pair_of
from rubrics import parse

ASK = [{"role": "user", "content": "What is 3 + 4 ?"}]
SEVEN = {"target": "7", "quote_a": "7", "value_a": "7", "quote_b": "8", "value_b": "8"}
SUM = Pair(
    "s", ASK, "Here: 7", "Truly: 8", "A", type="reasoning", meta={"solution": "3 + 4 = 7", **SEVEN}
)
FRUIT = {"target": "2", "quote_a": "fig pear", "value_a": "2", "quote_b": "plum", "value_b": "1"}
COUNT = Pair(
    "c", ASK, "Here: fig pear", "Sure plum", "A", type="chat", meta={"criterion": "Count", **FRUIT}
)

SOUND = {
    "s": "<type>Reasoning</type>\n<solution> 3 + 4 = 7</solution>\n<eval><quote_A> 7</quote_A> 7 is A and "
    "<quote_B> 8</quote_B> 8 is B so 7 is A</eval>\n<answer>[[A]]</answer>",
    "c": "<type>Chat</type>\n<rubric>Count 90%: 2 fruits\nTone 10%: kind\n<justify>The client asks for 2</justify>"
    "</rubric>\n<eval><quote_A> fig pear</quote_A> 2 is A and <quote_B> plum</quote_B> 1 is B so 2 is A</eval>\n"
    "<answer>[[A]]</answer>",
}


def swapped_text(text):
    """A judgment of the other order, A's quote first again. Its letters A and B must be labels only."""
    exchanged = text.translate(str.maketrans("AB", "BA"))
    read_a, read_b = (rf"<quote_{side}>[^<>]*</quote_{side}> \S+ is {side}" for side in "AB")
    return re.sub(f"({read_b}) and ({read_a})", r"\2 and \1", exchanged)


def faults_of(text, pair):
    """(names of the checks that fail, the short name of the first)"""
    judgment = parse(text)
    checks = check_reasons(judgment, pair)
    failing = [name for name, holds in checks.items() if not holds]
    assert is_sound(checks) == (failing == [])
    return failing, first_fault(judgment, pair, checks)


# ---------------------------------------------------------------- synthetic pairs


@pytest.mark.parametrize("world", toy.KINDS)
@pytest.mark.parametrize("all_kinds", [False, True])
def test_what_thinks_is_sound(world, all_kinds):
    """In both orders, with and without the token that ends a turn."""
    kinds = toy.ALL_KINDS if all_kinds else toy.KINDS[world]
    seen = set()
    for index in range(300):
        pair = toy.make_pair(1, "any", index, world=world, kinds=kinds)
        seen.add(pair.meta["kind"])
        for displayed in (pair, pair.swapped()):
            assert knows_reason(displayed)
            text = toy.think(displayed)
            assert faults_of(text, displayed) == ([], "")
            assert faults_of(text + "<|im_end|>", displayed) == ([], "")
    assert seen == set(kinds)


def test_what_looks_or_leaps_is_not():
    leaps = 0
    for index in range(300):
        pair = toy.make_pair(1, "any", index)
        assert faults_of(toy.look(pair, "A"), pair)[1] == "criterion Style"
        chain = toy.make_pair(1, "any", index, world="leap")
        trace = toy.draft(chain, random.Random(index), "leap", slips=0)
        assert faults_of(trace, chain)[1] == ("" if trace == toy.think(chain) else "solution")
        leaps += trace != toy.think(chain)
    assert leaps > 50


def test_what_goes_by_manners_writes_wrong_steps_or_slips_is_not():
    """By manners and after wrong steps a verdict may be right; the steps end in the right result."""
    right = 0
    for index in range(200):
        for source in toy.SOURCES:
            pair = toy.make_pair(1, "any", index, world="shortcut", source=source)
            for displayed in (pair, pair.swapped()):
                by_manners = toy.go_by_manners(displayed)
                right += parse(by_manners).verdict == displayed.label
                assert faults_of(by_manners, displayed)[1] == "criterion Manners"
                assert faults_of(toy.slip(displayed), displayed) == (["target", "form"], "target")

        pair = toy.make_pair(1, "any", index, world="steps")
        for displayed in (pair, pair.swapped()):
            wrong_steps, slip = toy.write_wrong_steps(displayed), toy.slip(displayed)
            assert parse(wrong_steps).verdict == displayed.label
            assert faults_of(wrong_steps, displayed) == (["solution"], "solution")
            assert faults_of(slip, displayed) == (["solution", "target"], "solution")
    assert 500 < right < 700  # of 1200: where they agree, and half of those where both say the same


@pytest.mark.parametrize(
    "pair, old, new, failing, fault",
    [
        (SUM, "Reasoning", "Chat", ["type"], "type Chat"),
        (SUM, "<type>Reasoning</type>", "", ["type", "form"], "no type"),
        (COUNT, "Chat", "Reasoning", ["type"], "type Reasoning"),
        (SUM, "3 + 4 = 7", "3 + 5 = 7", ["solution"], "solution"),  # a wrong step, the right end
        (SUM, "3 + 4 = 7", "7", ["solution"], "solution"),  # no steps
        (SUM, "3 + 4 = 7", "3 + 4 = 8", ["solution", "target"], "solution"),
        (COUNT, "Count", "Manners", ["criterion"], "criterion Manners"),
        (COUNT, "Count 90%: 2 fruits\nTone", "Tone", ["criterion", "target"], "criterion Tone"),
        (
            COUNT,
            "Count 90%: 2 fruits\nTone 10%: kind\n",
            "",
            ["criterion", "target", "form"],
            "no criterion",
        ),
        (COUNT, "90%: 2", "90%: 1", ["target"], "target"),
        (COUNT, "so 2 is A", "so 1 is A", ["target"], "target"),
        (
            COUNT,
            "so 2 is A",
            "so 2 is B",
            ["target"],
            "target",
        ),  # the conclusion is not the verdict
        (COUNT, " so 2 is A", "", ["target", "form"], "target"),
        (COUNT, "> fig pear<", "> fig lime<", ["quotes"], "quotes"),  # not word for word
        (COUNT, "> fig pear<", "> fig<", ["quotes"], "quotes"),  # not what decides
        (
            COUNT,
            "<quote_B> plum</quote_B>",
            "Plum",
            ["quotes", "values", "form"],
            "quotes",
        ),  # no quote
        (COUNT, "2 is A and", "3 is A and", ["values"], "values"),
        (COUNT, "1 is B so", "2 is B so", ["values"], "values"),
        (
            COUNT,
            "and <quote_B>",
            "and <quote_A> fig</quote_A> 1 is A and <quote_B>",
            ["values", "form"],
            "values",
        ),
    ],
)
def test_each_fault_by_hand(pair, old, new, failing, fault):
    """In both orders: the responses exchanged, and the letters of the judgment."""
    text = SOUND[pair.id]
    assert faults_of(text, pair) == ([], "") and old in text
    text = text.replace(old, new, 1)
    assert faults_of(text, pair) == (failing, fault)
    assert faults_of(swapped_text(text), pair.swapped()) == (failing, fault)


MANNERS = "<rubric>Manners 90%: Sure first</rubric>"
SUMMARY = "<summary_A><quote_A>Here:</quote_A> 2 is A</summary_A>"
ANSWER = "\n<answer>[[A]]</answer>"
RUBRIC, COMPARISON = (
    re.search(f"<{tag}>.*</{tag}>", SOUND["c"], re.DOTALL)[0] for tag in ("rubric", "eval")
)


@pytest.mark.parametrize(
    "pair, old, new",
    [
        # Another criterion has the weight.
        (
            COUNT,
            "Count 90%: 2 fruits\nTone 10%: kind",
            "Count 1%: 2 fruits\nManners 99%: Sure first",
        ),
        (
            COUNT,
            "Count 90%: 2 fruits\nTone 10%: kind",
            "Count 50%: 2 fruits\nManners 50%: Sure first",
        ),
        (COUNT, "Count 90%: 2 fruits", f"Count 90%: 2 fruits\n{'M' * 300} 99%: Sure first"),
        (COUNT, "Count 90%: 2 fruits", "Count 90%: 2 fruits\nManners 99999%: Sure first"),
        (COUNT, "2 fruits", "2 fruits, but Sure first"),
        (COUNT, "The client asks for 2", "The client asks for Sure"),
        (COUNT, "The client asks for 2", ""),
        # The order of the parts.
        (COUNT, SOUND["c"], ANSWER + SOUND["c"].removesuffix(ANSWER)),
        (COUNT, f"{RUBRIC}\n{COMPARISON}", f"{COMPARISON}\n{RUBRIC}"),
        # A second part, or one of the other type.
        (COUNT, "</rubric>", f"</rubric>{MANNERS}"),
        (COUNT, "</rubric>", "</rubric><solution>Sure</solution>"),
        (SUM, "</solution>", "</solution><solution>Here: wins</solution>"),
        (SUM, "</solution>", f"</solution>{MANNERS}"),
        (SUM, "<solution>", f"{MANNERS}<solution>"),
        (COUNT, "</eval>", "</eval><eval>Sure wins</eval>"),
        (COUNT, "</type>", "</type><type>Reasoning</type>"),
        (COUNT, "</answer>", f"</answer>{ANSWER}"),
        (COUNT, "</rubric>", "</rubric><summary_B>says Sure</summary_B>"),
        # What the comparison says beside.
        (COUNT, "<eval>", "<eval><quote_A>Here:</quote_A> wins by manners "),
        (COUNT, " so 2 is A", " so Here: wins, and it is not so 2 is A"),
        (COUNT, "pear</quote_A> 2", "pear</quote_A> <quote_A>Here:</quote_A> 2"),
        (COUNT, "pear</quote_A> 2 is A", f"pear</quote_A> {SUMMARY}"),
        (COUNT, "<eval>", "<eval><justify>by manners</justify>"),
        # What stands around the parts.
        (COUNT, "<type>", "By manners. <type>"),
        (COUNT, "<type>", "<think>By manners.</think><type>"),
        (COUNT, "</rubric>", "</rubric> By manners."),
        (COUNT, "</answer>", "</answer> By manners."),
        (COUNT, "</answer>", "</answer><|im_end|> By manners."),
    ],
)
def test_what_says_more_than_the_checks_read_has_not_the_form(pair, old, new):
    """The other checks hold, in both orders."""
    text = SOUND[pair.id]
    assert old in text
    text = text.replace(old, new, 1)
    assert faults_of(text, pair) == (["form"], "form")
    assert faults_of(swapped_text(text), pair.swapped()) == (["form"], "form")


@pytest.mark.parametrize("pair", [SUM, COUNT])
def test_white_space_and_no_justification_are_no_faults(pair):
    text = re.sub("<justify>.*</justify>", "", SOUND[pair.id])
    assert faults_of(text, pair) == ([], "")
    assert faults_of(f"\n {text.replace('> <', '><')} \n", pair) == ([], "")


def test_a_judgment_that_was_cut_off_has_not_the_form():
    judgment = parse(SOUND["s"], finished=False)
    checks = check_reasons(judgment, SUM)
    assert [name for name, holds in checks.items() if not holds] == ["target", "form"]
    for text in (SOUND["s"].removesuffix("</answer>"), SOUND["s"].removesuffix(ANSWER)):
        assert faults_of(text, SUM) == (["target", "form"], "target")


def test_a_conclusion_may_not_contradict_the_values():
    """The text that is sound for A says of B what holds of A."""
    pair = replace(SUM, label="B")
    text = SOUND["s"].replace("so 7 is A", "so 7 is B").replace("[[A]]", "[[B]]")
    assert faults_of(text, pair) == (["target"], "target")
    assert faults_of(swapped_text(text), pair.swapped()) == (["target"], "target")


@pytest.mark.parametrize("pair", [SUM, COUNT])
def test_the_checks_stand_in_the_order_of_a_judgment(pair):
    method = "solution" if pair is SUM else "criterion"
    names = list(check_reasons(parse(""), pair))
    assert names == ["type", method, "target", "quotes", "values", "form"]


def test_a_wider_quote_that_holds_what_decides_is_sound():
    text = SOUND["c"].replace("> fig pear<", ">Here: fig pear<").replace("> plum<", ">Sure plum<")
    assert faults_of(text, COUNT) == ([], "")


@pytest.mark.parametrize("change", [{"target": 7}, {"quote_b": None}, {"solution": ["3"]}])
def test_fields_of_the_same_name_that_are_no_texts_are_none_of_ours(change):
    pair = replace(SUM, meta=SUM.meta | change)
    assert not knows_reason(pair)
    text = "<eval><quote_A> Here: 7</quote_A> and <quote_B>it is 8</quote_B></eval>"
    assert check_reasons(parse(text), pair) == {"quotes": False}  # the proxy of any pair


# ---------------------------------------------------------------- other pairs

REAL = Pair("r", ASK, "It is 7.", "It is 8.", "A")
TRACE = (
    "<type>Chat</type><rubric>Factual accuracy 60%: right\nClear structure 40%: ordered</rubric>"
    "<eval>...</eval><answer>[[A]]</answer>"
)


@pytest.mark.parametrize(
    "text, checks",
    [
        ("<eval><quote_A>It is 7</quote_A><quote_B> It is 8.\n</quote_B></eval>", {"quotes": True}),
        ("<eval><quote_A>It is 7</quote_A><quote_B>It is 7</quote_B></eval>", {"quotes": False}),
        ("<eval><quote_A>It is 7</quote_A><quote_B>no</quote_B></eval>", {"quotes": True}),
        ("<eval><quote_A>It is</quote_A><quote_B>It is 9</quote_B></eval>", {"quotes": False}),
        ("<eval><quote_A>is 7</quote_A><quote_B>is 9</quote_B></eval>", {}),  # too short
        ("<eval><quote_A>It is 7</quote_A><quote_B> </quote_B></eval>", {"quotes": False}),  # empty
        ("<eval><quote_A></quote_A></eval>", {"quotes": False}),
        ("<eval>A is right</eval>", {}),
    ],
)
def test_quotes_of_any_pair(text, checks):
    assert check_reasons(parse(text), REAL) == checks
    assert (
        check_reasons(parse(text), replace(REAL, a="", b="")) == {}
    )  # the responses are not known


@pytest.mark.parametrize(
    "solution, answer, holds",
    [
        ("3 + 4 = 7", "7", True),
        ("So the sum is \\boxed{7}.", " 7", True),
        ("It is **Paris**.", "paris", True),
        ("x = -3", "-3", True),
        ("the share is 1/2", "1/2", True),
        ("The answer: New York!", "new york", True),
        ("3 + 4 = 17", "7", False),
        ("x = -3", "3", False),
        ("7 is a first guess, then 8", "7", False),
        ("7.5", "5", False),
        ("", "7", False),
        ("7", "4 7", False),
        ("7.0", "7", True),
        ("x = +7", "7.00", True),
        ("1,234", "1234", True),
        ("$1,234.50.", "1234.5", True),
        ("-1,234", "1234", False),
        ("1,2345", "12345", False),  # no thousands
        ("1,234th", "1234", False),
        ("12345678901234567891", "12345678901234567890", False),
        ("0.5", "1/2", False),
        # What words cannot tell.
        ("The answer is not 7", "7", True),
        ("between 3-7", "7", False),
        ("between 3-7", "-7", True),
    ],
)
def test_the_solution_ends_in_the_reference_answer(solution, answer, holds):
    pair = replace(REAL, meta={"answer": answer})
    judgment = parse(f"<solution>{solution}</solution>")
    assert check_reasons(judgment, pair) == {"answer": holds}
    assert first_fault(judgment, pair, {"answer": holds}) == ("" if holds else "answer")


@pytest.mark.parametrize(
    "rubric, holds",
    [
        ("Accuracy 100%: no errors", True),  # 60 of 100
        ("ACCURACY OF FACTS\nTone", True),
        ("Structure 50%: clear\nTone 50%: kind", False),  # 40 of 100
        ("Structure 50%: clear\nAccuracy 50%: right", True),
        ("Correct content 100%: right", False),  # words are compared, not meanings
        ("", False),
    ],
)
def test_the_rubric_covers_the_oracles(rubric, holds):
    pair = replace(REAL, trace=TRACE)
    judgment = parse(f"<rubric>{rubric}</rubric>")
    assert check_reasons(judgment, pair) == {"criteria": holds}


@pytest.mark.parametrize(
    "rubric, checks",
    [
        ("Accuracy 90%: right\nTone 10%: kind", {"criteria": True}),
        ("Of it 100%: x", {"criteria": True}),  # no content word, but the same name
        ("SQL 60%: valid\nUX 40%: kind", {"criteria": True}),
        ("Accuracy 0%: right", {}),  # no weight
        ("What matters here", {}),
        ("", {}),
    ],
)
def test_an_oracle_against_itself(rubric, checks):
    text = f"<rubric>{rubric}</rubric>"
    assert check_reasons(parse(text), replace(REAL, trace=text)) == checks


@pytest.mark.parametrize(
    "rubric, holds",
    [
        ("sql 100%: valid", True),  # 60 of 100
        ("UX 100%: kind", True),  # 30 of 40: SQL is left out
        ("Speed 100%: fast", True),  # 10 of 10: both are
        ("Tone 100%: kind", False),
        ("", False),
    ],
)
def test_a_name_without_a_content_word_counts_where_both_have_it(rubric, holds):
    trace = "<rubric>SQL 60%: valid\nUX 30%: kind\nSpeed of it 10%: fast</rubric>"
    pair = replace(REAL, trace=trace)
    assert check_reasons(parse(f"<rubric>{rubric}</rubric>"), pair) == {"criteria": holds}


def test_the_reference_answer_of_a_published_row_is_kept():
    row = {
        "dataset": "MATH",
        "prompt": "What is 3 + 4 ?",
        "initial_reason_steps": "Step 1: ",
        "full_chosen": "it is 7",
        "full_rejected": "it is 8",
        "answer": "7",
    }
    assert pair_of(row, "1").meta == {"answer": "7"}
    _, pair = prepare.candidate(row, "math", True, set())
    assert pair.meta == {"answer": "7"} and pair_of(pair.row(), "1").meta == {"answer": "7"}
    ours = pair.row() | {"meta": {"answer": "7", "style_a": 1}}
    assert prepare.candidate(ours, "math", True, set())[1].meta == {"answer": "7"}


# ---------------------------------------------------------------- any text

PIECES = [
    *(
        f"<{slash}{tag}>"
        for slash in ("", "/")
        for tag in "type rubric solution eval quote_A quote_B answer".split()
    ),
    *"7 8 2 1 fig pear plum Count Tone 90%: 10%: + = so is and % : - . , [[A]] [[B]]".split(),
    *(" is A", " is B", "\n", " ", "<", "Reasoning", "Chat", "so 7 is A", "so 2 is A"),
]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
PAIRS = [SUM, COUNT, REAL, replace(REAL, meta={"answer": "7"}), replace(REAL, trace=TRACE)]


@given(TEXTS, st.sampled_from(PAIRS))
def test_no_text_raises_and_only_a_fault_has_a_name(text, pair):
    failing, fault = faults_of(text, pair)
    assert bool(failing) == bool(fault) and len(fault) < 50


@pytest.mark.parametrize(
    "piece",
    [
        *PIECES,
        "1,234",
        "-1",
        "Tone 10%: kind\n",
        "Tone 10%: kind ",
        "a ",
        "<justify>",
        "<quote_A> 7</quote_A> 7 is A",
    ],
)
def test_long_texts_take_no_longer_than_their_length(piece):
    """A text of 10,000 letters, in each part of a sound one."""
    start = time.perf_counter()
    for place in ("", "<solution>", "<rubric>", "kind", "<eval>", "</quote_A>", "</answer>"):
        for pair in (SUM, COUNT, PAIRS[3]):
            text = SOUND[pair.id if pair.meta.get("target") else "s"]
            faults_of(text.replace(place, place + piece * (10_000 // len(piece)), 1), pair)
    assert time.perf_counter() - start < 5


@given(st.text(max_size=30), TEXTS)
def test_no_answer_and_no_trace_raises(answer, trace):
    for judgment in (parse(trace), parse(SOUND["s"])):
        check_reasons(judgment, replace(REAL, meta={"answer": answer}, trace=trace))


@given(
    st.sampled_from([SUM, COUNT]),
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from(PIECES)), max_size=3),
)
def test_the_order_of_the_responses_changes_no_check(pair, insertions):
    """Somewhere in a sound judgment a piece is written over what stood there."""
    text = SOUND[pair.id]
    for place, piece in insertions:
        text = text[:place] + piece + text[place + len(piece) :]
    failing, _ = faults_of(text, pair)
    assert failing == faults_of(swapped_text(text), pair.swapped())[0]


# ---------------------------------------------------------------- the report


def file_row(pair, **more):
    """A row of pairs.jsonl."""
    place = {
        "bench": "f",
        "item": pair.id,
        "subset": "",
        "compare": [0, 1],
        "swap": pair.label == "B",
    }
    texts = {"context": pair.context, "a": pair.a, "b": pair.b, "label": pair.label}
    return {
        "id": pair.id,
        **place,
        "type": pair.type,
        "source": pair.source,
        **texts,
        **pair.meta,
        **more,
    }


def file_line(pair, text, order=0, temperature=0.0):
    label = pair.swapped().label if order else pair.label
    judgment = parse(text)
    return {
        "id": pair.id,
        "order": order,
        "swap": label == "B",
        "temperature": temperature,
        "vote": 0,
        "label": label,
        "verdict": judgment.verdict,
        "reason": judgment.reason,
        "official": judgment.verdict or "error",
        "finish": "stop",
        "tokens": 10,
        "prompt_tokens": 10,
        "rubric": [[name, weight] for name, weight, _ in judgment.rubric],
        "quotes": [0, 0],
        "text": text,
    }


LOOKS = (
    "<type>Chat</type><rubric>Style 100%: polish</rubric><eval><quote_A>Here:</quote_A> bold is A and "
    "<quote_B>Sure</quote_B> plain is B so bold is A</eval><answer>[[A]]</answer>"
)


def test_the_reports_numbers_by_hand():
    """Five judgments: two right and sound, one right by looks, one wrong by looks, one without a verdict."""
    one, two = replace(SUM, source="agree"), replace(COUNT, source="part")
    lines = [
        file_line(one, SOUND["s"]),
        file_line(one, swapped_text(SOUND["s"]), order=1),
        file_line(two, LOOKS),
        file_line(two, LOOKS, order=1),
        file_line(two, "", temperature=1.0),
    ]
    pairs = {pair.id: file_row(pair) for pair in (one, two)}
    sound = R.measure_one("f", pairs, lines, [])["sound"]
    assert list(sound) == ["greedy", "T=1"]
    greedy = sound["greedy"]
    names = ["judgments", "right", "right_and_sound", "unsound_of_right", "faults"]
    assert [greedy[name] for name in names] == [
        4,
        0.75,
        0.5,
        pytest.approx(1 / 3),
        {"criterion Style": 1 / 3},
    ]
    assert greedy["checks"] == [
        "type",
        "solution",
        "target",
        "quotes",
        "values",
        "form",
        "criterion",
    ]
    assert {s: [part[n] for n in names] for s, part in greedy["by_source"].items()} == {
        "agree": [2, 1, 1, 0, {}],
        "part": [2, 0.5, 0, 1, {"criterion Style": 1}],
    }
    assert (sound["T=1"]["right"], sound["T=1"]["unsound_of_right"]) == (0, None)
    assert sound["T=1"]["by_source"] == {}  # judgments of one source only

    metrics = R.sound_metrics(pairs, lines[:4])
    right, unsound = "right for a sound reason", R.UNSOUND_NAME
    values = {name: benchmarks.value(metric) for name, metric in metrics.items()}
    of_all = {right: 0.5, unsound: pytest.approx(1 / 3)}
    of_parts = {
        f"{right}/agree": 1,
        f"{unsound}/agree": 0,
        f"{right}/part": 0,
        f"{unsound}/part": 1,
    }
    assert values == of_all | of_parts
    _, items = metrics[unsound][""]
    assert sorted(items.values()) == [(0, 2), (1, 1)], "a pair is an item, over both orders"
    assert benchmarks.value(R.sound_metrics(pairs, lines[4:])[unsound]) is None, "none is right"


def test_where_nothing_can_be_checked_the_report_says_nothing():
    """An older folder has no truth in its pairs.jsonl; a scalar judge gives no reasons."""
    older = {REAL.id: file_row(REAL)}
    line = file_line(REAL, "<answer>[[A]]</answer>")
    numbers = R.measure_one("f", older, [line], [])
    assert numbers["sound"] == {} and "reasons" not in R.table_text([("run", {"f": numbers})])
    scalar = file_line(SUM, "") | {"verdict": "A", "scores": [2.0, 1.0]}
    rows = {SUM.id: file_row(SUM)}
    assert R.measure_one("f", rows, [scalar], [])["sound"] == {}
    (example,) = R.page_examples([{"pairs": rows, "judgments": [scalar]}], 1)
    assert example["judgments"][0]["checks"] == {} and example["judgments"][0]["fault"] == ""


def test_pairs_whose_truth_is_known_are_not_mixed_with_others():
    real = replace(REAL, meta={"answer": "7"})
    lines = [file_line(SUM, SOUND["s"]), file_line(real, SOUND["s"])]
    sound = R.measure_one("f", {p.id: file_row(p) for p in (SUM, real)}, lines, [])["sound"][
        "greedy"
    ]
    assert sound["judgments"] == 1 and sound["right_and_sound"] == 1


def test_the_table_says_what_was_checked():
    """A proxy has its name in the heading; what fails stands below its share, the same in both orders."""
    real = replace(REAL, meta={"answer": "8"}, trace=TRACE)
    row = file_row(real, trace=TRACE)
    quoting = SOUND["s"].replace("> 7<", ">It is 7<").replace("> 8<", ">It is 8<")
    for order, text in ((0, quoting), (1, swapped_text(quoting))):
        numbers = R.measure_one("f", {real.id: row}, [file_line(real, text, order)], [])
        assert numbers["sound"]["greedy"]["checks"] == ["quotes", "answer", "criteria"]
        table = R.table_text([("run", {"f": numbers})]).splitlines()
        start = table.index("reasons, by quotes, answer, criteria")
        rows = [" ".join(line.split()) for line in table[start + 1 :]]
        assert rows[:5] == [
            "judgments, greedy 1",
            "right, greedy 1.000",
            "right, and no fault found, greedy 0.000",
            "unsound share of the right, greedy 1.000",
            "answer, greedy 1.000",
        ]


def test_an_evaluations_folder_keeps_what_the_checks_need(tmp_path):
    """Report and compare read the checks again from the texts: nothing of them is stored with a judgment."""
    traced = replace(REAL, trace=TRACE, meta={"answer": "7", "note": "not kept"})
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(p.row(p.trace)) + "\n" for p in (SUM, COUNT, traced)))
    args = E.flags().parse_args(
        ["--model", "m", "--data", str(path), "--out", str(tmp_path / "one")]
    )
    pairs, _, _ = E.collect_pairs(args)
    assert "note" not in pairs["f/r"].meta

    for name, texts in (("one", SOUND), ("two", {"s": SOUND["s"], "c": LOOKS})):
        out = tmp_path / name
        out.mkdir()
        E.update_folder(
            E.flags().parse_args(["--model", "m", "--data", str(path), "--out", str(out)]),
            {"format": R.EVALUATION_FORMAT, "model": "m"},
            pairs,
            [],
            None,
        )
        lines = [file_line(pairs[f"f/{key}"], text) for key, text in texts.items()]
        lines.append(file_line(pairs["f/r"], SOUND["s"]))
        (out / "judgments.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = R.read_run(tmp_path / "one")["pairs"]
    assert rows["f/s"]["solution"] == "3 + 4 = 7" and rows["f/r"]["trace"] == TRACE
    assert all(R.reasons_of(rows[line["id"]], line).fault == "" for line in lines[:1])

    report = call(E, "report", tmp_path / "one", tmp_path / "two", "--out", tmp_path).stdout
    assert "right for a sound reason, greedy" in report and "criterion Style, greedy" in report
    compared = call(E, "compare", tmp_path / "one", tmp_path / "two").stdout
    (line,) = [line for line in compared.splitlines() if "sound reason" in line]
    assert line.split()[6:9] == ["1.000", "0.500", "-0.500"]
    (line,) = [line for line in compared.splitlines() if R.UNSOUND_NAME in line]
    assert line.split()[6:9] == ["0.000", "0.500", "+0.500"]
    data = (tmp_path / "report.html").read_text()
    assert '"fault": "criterion Style"' in data or '"fault":"criterion Style"' in data
