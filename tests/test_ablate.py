"""Variants, seeds and their table; and what the paper's ablations ask for instead of the whole prompt."""
from types import SimpleNamespace

import pytest
from conftest import run

import rubrics
import toy as T
from rubrics import Pair, chat_messages, form_of, parse, prompt_form

PAIR = Pair("p", [{"role": "user", "content": "What?"}], "This.", "That.", "A")


# ---------------------------------------------------------------- what is asked for

def test_each_prompt_of_the_ablations_asks_for_its_parts_only():
    tags = {"instruct": "type rubric justify solution eval quote_A answer", "rubrics":
            "rubric justify eval quote_A answer", "plain": "eval answer", "verdict": "answer"}
    for protocol, parts in tags.items():
        system, user = chat_messages(PAIR, protocol)
        assert user == chat_messages(PAIR)[1]
        asked = {t for t in tags["instruct"].split() if f"<{t}>" in system["content"]}
        assert asked == set(parts.split())
        assert system["content"].startswith(rubrics.BEGIN) and system["content"].endswith(rubrics.END)


@pytest.mark.parametrize("protocol", ["instruct", "rubrics", "plain", "verdict", "reasoning"])
def test_the_prompt_travels_in_judge_json(tmp_path, protocol):
    import json
    form = form_of(PAIR, protocol, None)
    (tmp_path / "judge.json").write_text(json.dumps(form))
    assert prompt_form(tmp_path, "m") == (protocol, form["system"])
    assert chat_messages(PAIR, *prompt_form(tmp_path, "m")) == chat_messages(PAIR, protocol)


def test_a_published_row_is_asked_for_less_only_where_that_is_wanted():
    published = Pair("p", PAIR.context, "This.", "That.", "A", messages=[
        {"role": "system", "content": "Published."}, chat_messages(PAIR)[1]])
    assert chat_messages(published) == published.messages
    assert chat_messages(published, "plain")[0]["content"] == rubrics.SYSTEMS["plain"]
    assert form_of(published, "instruct", None) == {"protocol": "instruct", "system": "Published."}
    assert form_of(published, "rubrics", None)["protocol"] == "rubrics"


def test_sft_on_verdicts_learns_the_label_whatever_the_oracle_wrote(toy):
    import policy
    import sft
    pairs = rubrics.read_pairs(toy / "sft.jsonl")
    tokenizer, _ = policy.load_tokenizer(toy / "model")
    args = SimpleNamespace(max_len=160, batch=1, data="x")
    rows = sft.tokenize(pairs, tokenizer, ("verdict", "Judge A and B."), args)
    said = [tokenizer.decode(trace) for _, trace in rows]
    assert said == [f"<answer>[[{p.label}]]</answer><|im_end|>" for p in pairs]
    assert any(parse(p.trace).verdict != p.label for p in pairs)


def test_a_toy_trace_that_is_asked_for_less_has_its_verdict_still():
    for i in range(50):
        pair = T.make_pair(0, "sft", i)
        for trace in (T.think(pair), T.look(pair, "A")):
            whole = parse(trace)
            some, less = parse(T.asked(trace, "rubrics")), parse(T.asked(trace, "plain"))
            assert some.rubric and not some.type and not some.solution
            assert not less.rubric and not less.solution and not less.type
            assert some.verdict == less.verdict == whole.verdict and some.eval == less.eval == whole.eval


def test_one_style_is_of_the_training_pairs_only(tmp_path):
    run("data/toy.py", "--out", tmp_path, "--sft", 64, "--rl", 64, "--test", 16, "--hidden", 32, "--style", 1)
    styles = {split: {(p.meta["style_a"], p.meta["style_b"])
                      for p in rubrics.read_pairs(tmp_path / f"{split}.jsonl")} for split in ("sft", "rl", "test")}
    assert styles["sft"] == styles["rl"] == {(1, 1)} and len(styles["test"]) > 3
