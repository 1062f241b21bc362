"""The reader of conversations: whatever the form, a conversation comes back the same, or a sentence says why not."""

import json
import shutil
import warnings

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_judge import Model, done

import prepare as R
import rmr1
from conftest import SHARED, call
from judge.backends import Answer
from lib.files import Failure
from lib.pairs import Pair, messages_of, pair_of, read_conversation, read_pairs, row_conversation
from rmr1 import Judge, conversation_of_call
from rubrics import chat_messages
from serve.gateway import read_texts

BUGS = SHARED / "data/bugs"
needs_bugs = pytest.mark.skipif(not BUGS.exists(), reason="../shared is absent")


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def user(text):
    return said("user", text)


def bot(text):
    return said("assistant", text)


# ---------------------------------------------------------------- real rows


def bug(name):
    return json.loads((BUGS / name).read_text())


@needs_bugs
def test_a_prompt_beside_whole_conversations_is_not_said_twice():
    row = bug("prompt-beside-whole-conversation.jsonl")
    pair = pair_of(row, "x")
    assert pair.context == row["chosen"][:3]
    assert {pair.a, pair.b} == {"Pear, it is soft.", "Plum again."}


@needs_bugs
def test_a_system_column_is_the_first_message(capsys):
    (pair,) = read_pairs(BUGS / "system-in-a-column.jsonl")
    assert pair.context == [said("system", "Answer in French only."), user("Say yes.")]
    assert "Answer in French only." in chat_messages(pair)[-1]["content"]
    assert "of its rows 1 with the system column put first" in capsys.readouterr().err


@needs_bugs
@pytest.mark.parametrize(
    "name, why",
    [
        ("response-ends-with-user.jsonl", "chosen does not end with a message of the assistant"),
        ("context-and-prompt.jsonl", "prompt and context, which differ"),
    ],
)
def test_a_row_that_would_be_read_in_part_is_refused(name, why):
    with pytest.raises(Failure, match=why):
        read_pairs(BUGS / name)


@needs_bugs
def test_tools_speak_for_themselves(tmp_path):
    """In prepare.py's rows, and in what the judge is shown of them."""
    source = BUGS / "sharegpt-tool-turns.jsonl"
    call(R, "--source", source, "--out", tmp_path / "out", "--split", 0)
    (pair,) = read_pairs(tmp_path / "out/rl.jsonl")
    assert [m["role"] for m in pair.context] == ["user", "assistant", "tool"]
    assert {pair.a, pair.b} == {"It is 12 degrees.", "It is 30 degrees."}
    assert "\nTool: 12\nChatbot A: It is" in chat_messages(pair)[-1]["content"]


@needs_bugs
def test_parts_of_a_message_are_joined():
    body = bug("compare-content-parts.json")
    notes = set()
    read = read_conversation(body["prompt"], [body["a"], body["b"]], notes=notes)
    assert read == ([user("Name a fruit.")], ["Plum.", "Stone."])
    assert notes == {"text parts joined"}


@needs_bugs
def test_rows_with_dates_are_judged_and_written(tmp_path, monkeypatch):
    """Nothing that was judged may be lost because of a value that JSON does not know."""
    answers = Model()
    answers.answer = lambda *_: Answer("<answer>[[A]]</answer>", "stop", 1, 1)
    monkeypatch.setattr(rmr1, "judge_of", lambda *_: Judge(answers, protocol="instruct"))
    data = shutil.copy(BUGS / "select-with-timestamp.parquet", tmp_path / "pairs.parquet")
    out = call(rmr1, "select", "--model", "m", "--data", data, "--count", 2).stdout
    assert {json.loads(line)["made"][:10] for line in out.splitlines()} == {
        "2026-01-02",
        "2026-01-03",
    }


def test_meta_with_a_date_can_be_written():
    import datetime

    row = {"prompt": "q", "a": "x", "b": "y", "label": "A", "meta": {"at": datetime.date.min}}
    assert json.dumps(pair_of(row, "x").row())


# ---------------------------------------------------------------- every form of one conversation

TEXTS = st.one_of(
    st.sampled_from(
        [
            "[Client Question]",
            "[The End of Chatbot A's Response]",
            "User: no\nAssistant: yes",
            "\n\nHuman: hi\n\nAssistant: ho",
            '{"role": "user"}',
            '[{"role": "narrator", "content": "x"}]',
            '{"role": "assistant", "content": "x"}',
            "<|im_start|>user\nhi<|im_end|>",
            "<think>hm</think>so",
            "été 中文 \U0001f642",
        ]
    ),
    st.text(min_size=1, max_size=20),
).filter(str.strip)


@st.composite
def conversations(draw):
    """(system or None, turns that end with the user's or a tool's, one response, another)"""
    system = draw(st.none() | TEXTS)
    turns = []
    for _ in range(draw(st.integers(0, 2))):
        turns += [user(draw(TEXTS)), bot(draw(TEXTS))]
    turns.append(user(draw(TEXTS)))
    if draw(st.booleans()):
        turns += [bot(draw(TEXTS)), said("tool", draw(TEXTS))]
    good, bad = draw(TEXTS), draw(TEXTS)
    assume(good != bad)
    return system, turns, good, bad


SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def in_parts(messages):
    """Each content in two text parts."""
    cut = []
    for message in messages:
        text = message["content"]
        parts = [{"type": "text", "text": half} for half in (text[:1], text[1:])]
        cut.append({**message, "content": parts})
    return cut


def as_sharegpt(messages):
    return [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in messages]


def forms(context, good, bad):
    """Rows that say the same conversation."""
    chosen, rejected = [*context, bot(good)], [*context, bot(bad)]
    sides = {"a": [bot(good)], "b": [bot(bad)], "label": "A"}
    yield {"context": context, **sides}
    yield {"context": in_parts(context), "a": [bot(good)], "b": in_parts([bot(bad)]), "label": "A"}
    yield {"prompt": json.dumps(context), "chosen": [bot(good)], "rejected": [bot(bad)]}
    yield {"chosen": chosen, "rejected": rejected, "messages": chosen}
    yield {"chosen": json.dumps(chosen), "rejected": json.dumps(rejected, ensure_ascii=False)}
    yield {"prompt": context, "chosen": as_sharegpt(chosen), "rejected": rejected, "history": []}
    yield {
        "conversations": as_sharegpt(context),
        "chosen": as_sharegpt([bot(good)])[0],
        "rejected": as_sharegpt([bot(bad)])[0],
    }
    yield {"input": context, "accepted": bot(good), "rejected": bot(bad)}
    score = {"overall_preference": -2}
    yield {"context": context, "response1": [bot(good)], "response2": [bot(bad)], **score}
    if context[0]["role"] == "system":
        system, turns = context[0]["content"], context[1:]
        yield {"system": system, "prompt": turns, **sides}
        yield {"system_prompt": system, "chosen": chosen, "rejected": [*turns, bot(bad)]}


def text_forms(question, good, bad):
    """Rows that say a question and its answers as texts."""
    yield {"prompt": question, "a": good, "b": bad, "label": "A"}
    yield {"question": question, "chosen": good, "rejected": bad, "input": ""}
    yield {"prompt": question, "chosen": [user(question), bot(good)], "rejected": bad}
    math = {"initial_reason_steps": good[:1], "full_chosen": good[1:]}
    if bad[:1] == good[:1]:
        yield {"prompt": question, **math, "full_rejected": bad[1:], "chosen": good[1:]}


def transcript(messages):
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)


def can_be_a_transcript(messages):
    return all(
        m["role"] in ("user", "assistant")
        and m["content"] == m["content"].strip()
        and "\n\nHuman:" not in "\n\n" + m["content"]
        and "\n\nAssistant:" not in "\n\n" + m["content"]
        for m in messages
    )


@settings(derandomize=True, database=None, deadline=None, max_examples=25)
@given(conversations())
def test_a_conversation_comes_back_the_same_from_every_form(conversation):
    system, turns, good, bad = conversation
    context = turns if system is None else [said("system", system), *turns]
    rows = list(forms(context, good, bad))
    whole = [*context, bot(good)], [*context, bot(bad)]
    if can_be_a_transcript(whole[0] + whole[1]):
        rows.append(dict(zip(("chosen", "rejected"), map(transcript, whole))))
    # A text alone may be a transcript or JSON of messages, which the same text in a message is not.
    odd = ("\n\n", '{"role": "assistant"')
    is_plain = not any(text.startswith(odd) for text in (turns[0]["content"], good, bad))
    if len(context) == 1 and is_plain:
        rows += text_forms(context[0]["content"], good, bad)

    for row in rows:
        pair = pair_of(json.loads(json.dumps(row)), "x")
        pair = pair if pair.label == "A" else pair.swapped()
        assert (pair.context, pair.a, pair.b) == (context, good, bad), row
        assert R.candidate(row, "x", False, set())[1].context == context
    same = Pair("x", context, good, bad, "A", meta=pair.meta)
    assert pair_of(pair.row(), "x") == same  # written and read again

    # Calls in Python, and bodies over HTTP, where texts are what a policy wrote.
    for responses in ([[bot(good)], [bot(bad)]], whole):
        assert read_conversation(context, responses) == (context, [good, bad])
        assert conversation_of_call(context, responses) == (context, [good, bad])
        assert read_texts(context, responses, ["a", "b"])[:2] == (context, [good, bad])
    assert read_texts(context, [good, bad], ["a", "b"])[:2] == (context, [good, bad])
    assert read_texts(None, whole, ["a", "b"])[:2] == (context, [good, bad])


WORDS = st.sampled_from("one two three four five six seven eight".split())
VALUES = st.one_of(
    WORDS,
    WORDS.map(lambda word: [user(word), bot(word + " it is")]),
    WORDS.map(lambda word: [user(word)]),
    WORDS.map(lambda word: [said("system", word), user(word + "?"), bot("so " + word)]),
    st.sampled_from(["", [], None, "[]"]),
)
COLUMNS = "prompt context system question input history instruction messages images tools".split()


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(
    st.dictionaries(st.sampled_from(COLUMNS), VALUES, min_size=1, max_size=3),
    WORDS.map(lambda word: f"{word} good"),
    st.one_of(WORDS.map(lambda word: f"{word} bad"), VALUES),
)
def test_no_column_that_holds_talk_is_left_out(columns, good, bad):
    row = {**columns, "chosen": good, "rejected": bad}
    try:
        pair = pair_of(row, "x")
    except ValueError as refused:
        assert "\n" not in str(refused)
        return
    shown = json.dumps([pair.context, pair.a, pair.b])
    for value in row.values():
        for message in value if isinstance(value, list) else [{"content": value or ""}]:
            assert message["content"] in (*shown.split('"'), "[]"), (row, shown)


# ---------------------------------------------------------------- what is refused, and how it is said

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "u"}}


@pytest.mark.parametrize(
    "row, why",
    [
        ({"prompt": [said("narrator", "Once.")]}, "message 1 has the unknown role 'narrator'"),
        ({"prompt": [user([{"type": "text", "text": "q"}, IMAGE])]}, "of type 'image_url'"),
        ({"prompt": [user("q")], "images": ["cat.png"]}, "its column images is not read"),
        ({"prompt": [user("q") | {"images": ["cat.png"]}]}, "message 1 has images"),
        ({"prompt": "q", "instruction": "Be short."}, "prompt and instruction, which differ"),
        ({"prompt": "q", "history": [["before", "that"]]}, "its column history"),
        ({"prompt": "q", "tools": '[{"name": "weather"}]'}, "its column tools"),
        ({"prompt": "q", "a": "another", "b": "one"}, "differ|its column"),
        ({"prompt": "other", "chosen": [user("q"), bot("x")]}, "does not begin with the prompt"),
        ({"chosen": [user("q"), bot("x")], "rejected": [user("p"), bot("y")]}, "begin alike"),
        ({"prompt": [user("q"), bot("x")]}, "does not end with a user message"),
        ({"prompt": [said("system", "s")]}, "does not end with a user message"),
        ({"prompt": [said("system", "s"), user("q")], "system": "t"}, "another one"),
        ({"prompt": [user("q") | {"value": "p"}]}, "content and value, which differ"),
        ({"prompt": [user(None)]}, "message 1 has no content"),
        ({"prompt": [user({"text": "q"})]}, "not a text, but an object"),
        ({"prompt": "[{'role': 'user', 'content': 'q'}]"}, "write them as JSON"),
        (
            {"prompt": "array([{'content': 'q', 'role': 'user'}], dtype=object)"},
            "write them as JSON",
        ),
        ({"prompt": '[{"role": "user", "content": "q"},]'}, "write them as JSON"),
        ({"chosen": '\ufeff[{"from": "gpt", "value": "x"}]'}, "chosen looks like messages"),
        ({"prompt": "[OrderedDict([('role', 'user'), ('content', 'q')])]"}, "write them as JSON"),
        ({"prompt": [user([{"type": "text", "text": "q", "image_url": "u"}])]}, "image_url beside"),
        ({"prompt": [user([{"text": "hm", "thought": True}, "q"])]}, "a part with thought"),
        ({"prompt": [user("q") | {"documents": ["It is so."]}]}, "message 1 has documents"),
        ({"prompt": "q", "article": "Once upon a time."}, "its column article"),
        ({"prompt": "q", "choices": ["red", "blue"]}, "its column choices"),
        ({"prompt": "q", "image_path": "cat.png"}, "its column image_path"),
        (
            {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"},
            "by a chat template",
        ),
        ({"prompt": "q", "chosen": "<s>[INST] q [/INST] x</s>"}, "chosen is rendered"),
        ({"prompt": float("nan")}, "the context is missing"),
        ({"prompt": "q", "chosen": float("nan")}, "chosen is not a text"),
        ({"chosen": [user("q"), bot("x")], "response": "z"}, "its column response"),
        ({"prompt": "q", "chosen": [bot("x"), said("tool", "y")]}, "end with a message of the"),
        ({"prompt": "q", "chosen": [[bot("x")], [bot("z")]]}, "message 1 is not {role"),
        ({"prompt": "q", "chosen": {"text": "x"}}, "chosen has no role"),
    ],
)
def test_what_is_not_understood_is_named(row, why):
    with pytest.raises(ValueError, match=why):
        pair_of({"chosen": "x", "rejected": "y", **row}, "1")


@pytest.mark.parametrize("score", [float("nan"), True, "1", None])
def test_a_preference_that_is_no_number_is_no_label(score):
    row = {"context": "q", "response1": "x", "response2": "y", "overall_preference": score}
    with pytest.raises(ValueError, match="which is no preference"):
        pair_of(row, "1")


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": "q"},] why is this no JSON?',
        "What does {'role': 'user', 'content': 'q'} mean",
        '{"name": "x", "price": 3,}',
        "[x for x in y]",
        "<s>struck</s> or <|im_start|>assistant?",
    ],
)
def test_a_text_about_messages_is_a_text(text):
    assert pair_of({"prompt": text, "chosen": "x", "rejected": "y"}, "1").context == [user(text)]


def test_json_in_json_is_read_and_an_analysis_is_a_thought():
    twice = json.dumps(json.dumps([user("q")]))
    answer = [bot("hm") | {"channel": "analysis"}, bot("x") | {"channel": "final"}]
    notes = set()
    assert read_conversation(twice, [answer, "y"], notes=notes) == ([user("q")], ["x", "y"])
    assert notes == {"messages read from JSON in a text", "thoughts left out"}


def test_a_text_that_is_not_read_is_noted():
    """Nobody knows all names of columns; those without prose need no word."""
    more = {"lore": ["It was a dark and stormy night."], "model": "a/b", "score": {"a": 1.5}}
    notes = set()
    pair_of({"prompt": "q", "chosen": "x", "rejected": "y", "copy": "q", **more}, "1", notes)
    assert notes == {"a column lore that is not read"}


def test_tool_calls_are_a_text_and_thoughts_are_counted():
    notes = set()
    turns = [user("q"), said("assistant", None, tool_calls=[CALL]), said("tool", "12")]
    answer = said("assistant", "It is 12.", reasoning_content="hm")
    context, texts = read_conversation(turns, [[answer], "30"], notes=notes)
    assert context[1]["content"] == json.dumps(CALL["function"])
    assert texts == ["It is 12.", "30"]
    assert notes == {"tool calls written as text", "thoughts left out"}


def test_conversations_that_part_early_become_responses_with_their_speakers():
    start = [user("1"), bot("a")]
    good = [*start[:1], bot("b"), said("tool", "t"), bot("c")]
    context, texts = read_conversation(None, [good, [*start[:1], bot("d")]])
    assert (context, texts) == (start[:1], ["Assistant: b\nTool: t\nAssistant: c", "d"])
    # Of three responses, what all of them share is the context.
    more = [*start, user("2")]
    context, texts = read_conversation("1", [[*more, bot(text)] for text in "xyz"])
    assert (context, texts) == (more, ["x", "y", "z"])


def test_a_transcript_that_ends_for_the_assistant_is_a_prompt():
    context, texts = read_conversation("\n\nHuman: q\n\nAssistant:", [" x", "y"])
    assert (context, texts) == ([user("q")], [" x", "y"])
    assert messages_of("Why does '\n\nHuman: q' end so?")[0]["content"].startswith("Why")


def test_what_was_joined_is_counted_and_said_once(tmp_path, capsys):
    rows = [{"prompt": in_parts([user(f"q{n}")]), "chosen": "x", "rejected": "y"} for n in range(3)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_pairs(data)) == 3
    assert capsys.readouterr().err == f"{data}: of its rows 3 with text parts joined\n"
    out = call(R, "--source", data, "--out", tmp_path / "out").stdout
    assert "rows: text parts joined" in out


# ---------------------------------------------------------------- calls


def judge():
    model = Model()
    return Judge(model, protocol="instruct"), model


def test_calls_refuse_what_they_would_read_in_part():
    one, model = judge()
    pair = Pair("", [user("q")], "is 1", "is 2", None)
    for ask, why in (
        (lambda: one.rank("q", "abc"), "responses is not a list"),
        (lambda: one.compare(pair, "is 3", "is 4"), "a Pair has its own responses"),
        (lambda: one.compare("q"), "a prompt and two responses"),
        (lambda: one.reward(["q"], ["is 1", "is 2"]), "1 prompts and 2 completions"),
        (lambda: one.reward("q", ["is 1"]), "prompts is not a list"),
        (lambda: one.compare("q", [bot("is 1"), user("thanks")], "is 2"), "a does not end"),
        (lambda: one.rank("q", ["is 1", 5]), "response 2 is not a text"),
        (lambda: one.compare_all([{"prompt": "q", "a": "is 1", "b": "is 2"}]), "pair 1 is neither"),
        (lambda: one.compare_all(["abc"]), "pair 1 is neither"),
        (lambda: one.compare("q", "is 1", "is 2", budget=2.5), "a budget of 2.5"),
        (lambda: one.rank("q", ["is 1", "is 2"], budget="4"), "a budget of '4'"),
        (lambda: one.compare(Pair("", [user("q")], "x", "y", "tie")), "unknown label 'tie'"),
    ):
        with pytest.raises(ValueError, match=why):
            ask()
    assert not model.asked


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": -1},
        {"max_tokens": None},
        {"protocol": "xx"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"dtype": "float3"},
        {"max_len": 0},
    ],
)
def test_a_setting_that_cannot_be_is_named(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"^{name.replace('_', '.')}: "):
        Judge(Model(), **settings)


def test_completions_of_a_trainer_with_tools():
    """Shared turns are shown once, and one rollout that a tool ended costs its own reward only."""
    one, model = judge()
    start = [bot("call"), said("tool", "12")]
    completions = [[*start, bot("is 5")], [*start, bot("is 7")], start]
    with pytest.warns(UserWarning, match="does not end with a message of the assistant"):
        low, high, none = one.reward([[user("q")]] * 3, completions)
    assert low < high and none is None


def test_a_policys_text_is_judged_word_for_word():
    """It may write JSON or a transcript, which is no reason to end a training run."""
    one, model = judge()
    model.answer = lambda *_: Answer("<answer>[[A]]</answer>", "stop", 1, 1)
    shown = []
    model.submit = lambda requests: [
        done(lambda *r: shown.append(r[0]) or model.answer(), *r) for r in requests
    ]
    odd = ["\n\nHuman: more?", json.dumps([bot("x"), user("y")])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert None not in one.reward(["q"] * 2, odd)
    assert all(text in shown[0][-1]["content"] for text in odd)


def test_a_pair_without_an_answer_has_its_line_and_ends_nothing(tmp_path, monkeypatch):
    """The others are judged and paid. Only what may be asked again makes the command fail."""
    model = Model()

    def answer(messages, *_):
        if "no way" in messages[-1]["content"]:
            return Answer("", "refused by the model", failed=fails)
        return Answer("<answer>[[A]]</answer>", "stop", 1, 1)

    model.answer = answer
    monkeypatch.setattr(rmr1, "judge_of", lambda *_: Judge(model, protocol="instruct"))
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": q, "a": "x", "b": "y", "label": "A"} for q in ("no way", "q")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for fails in (False, True):
        ended = call(rmr1, "judge", "--model", "m", "--data", data, "--json", ok=not fails)
        first, second = map(json.loads, ended.stdout.splitlines())
        assert first["verdict"] is None and first["reason"] and second["votes"]
    assert "1 of 2 pairs have no answer, first pairs-1: " in ended.stderr


@pytest.mark.parametrize(
    "command, rows, why",
    [
        (
            "select",
            [{"prompt": "q", "a": "x", "b": "y", "label": "both"}],
            ":1: unknown label 'both'",
        ),
        ("select", [{"prompt": "q", "a": "x", "b": "y"}] * 2, "1 different pairs in it"),
        ("rank", [{"prompt": "q", "completions": ["x", "y"]}], ":1: no responses among its fields"),
        ("reward", [{"prompt": "q", "response": "x"}], ":1: no completion among its fields"),
        ("reward", [], "no lines in it"),
        ("judge --question q", [], "--question: not read beside --data"),
    ],
)
def test_lines_that_cannot_be_judged_are_named(command, rows, why, tmp_path, monkeypatch):
    monkeypatch.setattr(rmr1, "judge_of", lambda *_: judge()[0])
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = call(rmr1, *command.split(), "--model", "m", "--data", data, ok=False)
    assert why in ended.stderr and "Traceback" not in ended.stderr


def test_a_published_prompt_that_says_more_is_kept_word_for_word():
    plain = chat_messages(Pair("1", [user("q")], "good", "bad", "A"))
    last = plain[-1]["content"]
    for more in (
        [user("before"), bot("that"), *plain],
        [said("system", "French only. <answer>[[A]]</answer>"), plain[-1]],
        [plain[0], user(f"{last}\nAnswer in JSON.")],
    ):
        row = {"context_messages": more, "winner": "model_a"}
        assert R.candidate(row, "x", False, set())[1].messages == more
    row = {"context_messages": plain, "winner": "model_a"}
    assert R.candidate(row, "x", False, set())[1].messages is None


def test_lines_of_commands_are_read_alike():
    row = {"system": "s", "prompt": "q", "responses": ["x", [bot("y")]]}
    context = [said("system", "s"), user("q")]
    assert row_conversation(row, ("responses",)) == (context, ["x", "y"])
    with pytest.raises(ValueError, match="its column history"):
        row_conversation({**row, "history": [["a", "b"]]}, ("responses",))
