"""What the model sees is what we wrote: chat templates, thoughts, control tokens, fingerprints (lib/chat.py)."""

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest

import distill as D
import eval as evaluation
import sft
from conftest import SHARED
from judge.backends import LocalBackend, ids_or_refusal
from judge.report import JUDGMENT_FIELDS
from lib import chat
from lib.files import Failure
from lib.pairs import Pair, read_pairs
from lib.policy import write_settings
from lib.run import open_run
from rubrics import PromptStyle, chat_messages, parse, published_reward, verdict_reward

BUGS = SHARED / "data/bugs"
JUDGMENT = "<type>Chat</type>\n<eval>fine</eval>\n<answer>[[A]]</answer>"
USER = [{"role": "user", "content": "Name a fruit."}]
PAIR = Pair("p", USER, "Plum.", "Stone.", "A", trace=JUDGMENT)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def says(role, content):
    return {"role": role, "content": content}


SYSTEM, TURNS = says("system", "Judge."), [says("user", "One?"), says("assistant", "Two."), *USER]


@pytest.fixture
def folder(toy, tmp_path):
    """A model folder of one's own."""
    return shutil.copytree(toy / "model", tmp_path / "model")


@pytest.fixture
def load(folder):
    """Load the toy tokenizer with another chat template."""

    def load(template):
        (folder / "chat_template.jinja").write_text(template)
        return chat.load_tokenizer(folder)[0]

    return load


def bug(name):
    if not BUGS.exists():
        pytest.skip("../shared is absent")
    return (BUGS / name).read_text()


# ---------------------------------------------------------------- every message arrives


def without_system():
    return bug("template-without-system.jinja")


LAST_ONLY = "{% set m = messages[-1] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"


@pytest.mark.parametrize(
    "template, messages, lost",
    [
        (without_system, [SYSTEM, *USER], "system"),
        (without_system, [*TURNS, SYSTEM, *USER], "system"),  # in the middle of a conversation
        (LAST_ONLY, TURNS, "user"),
        (CHATML.replace("m.content", "m.content[:100]"), [says("user", "long " * 30)], "user"),
        (CHATML.replace("m.content", "m.content|replace('/think', '')"), [says("user", "cd /think")], "user"),
        (CHATML.replace("m.content", "m.content|lower"), [SYSTEM, *USER], "system"),
        (CHATML.replace("m.content", "m.content|tojson"), [says("user", "a\nb")], "user"),
        (CHATML.replace("in messages", "in messages|reverse"), TURNS, "assistant"),
    ],
)  # fmt: skip
def test_a_prompt_that_lost_a_message_is_refused(template, messages, lost, load):
    """Whatever the template does to it, and only if it does so to this prompt."""
    tokenizer = load(template if isinstance(template, str) else template())
    assert len(chat.encode(tokenizer, [says("user", "short")]))
    with pytest.raises(Failure) as stop:
        chat.encode(tokenizer, messages)
    assert f"a message of the {lost}" in str(stop.value)
    assert ("--protocol reasoning" in str(stop.value)) == (messages[0] == SYSTEM)


def test_a_prompt_that_is_refused_for_its_words_is_one_lost_judgment(load):
    """And a template that takes no system message ends the run: nothing could be judged."""
    tokenizer = load(CHATML.replace("m.content", "m.content|replace('/think', '')"))
    ids, refusal = ids_or_refusal(tokenizer, [says("user", "cd /think")], window=100)
    assert ids is None and not refusal.failed and "a message of the user" in refusal.finish
    assert len(ids_or_refusal(tokenizer, USER, window=100)[0])

    tokenizer = load(without_system())
    with pytest.raises(Failure) as stop:
        ids_or_refusal(tokenizer, [SYSTEM, *USER], window=100)
    assert not isinstance(stop.value, chat.PromptRefused)


@pytest.mark.parametrize(
    "template, messages",
    [
        (CHATML.replace("m.content", "m.content|trim"), [says("user", " a\n"), *TURNS]),
        (  # Qwen 3, DeepSeek: thoughts of earlier turns are not shown
            CHATML.replace("m.content", "m.content.split('</think>')[-1].lstrip()"),
            [*USER, says("assistant", "<think>hm</think>\nPlum."), *USER],
        ),
        (  # Gemma 3: the system message is the beginning of the user's turn
            "{{ messages[0].content }}\n\n{% for m in messages[1:] %}<|im_start|>{{ m.content }}{% endfor %}",
            [SYSTEM, *TURNS],
        ),
        (  # Mistral: before the last user's turn
            "{% for m in messages[1:] %}{% if loop.last %}{{ messages[0].content }}\n{% endif %}"
            "[INST]{{ m.content }}[/INST]{% endfor %}",
            [SYSTEM, *TURNS],
        ),
        ("You are Qwen.\n" + CHATML, USER),
        (CHATML, [says("user", "")]),
    ],
)  # fmt: skip
def test_a_familys_own_ways_are_no_loss(template, messages, load):
    tokenizer = load(CHATML)
    tokenizer.chat_template = template
    assert len(chat.encode(tokenizer, messages))


@pytest.mark.parametrize(
    "template, complaint",
    [
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}x", "refuses|leaves out"),
        ("{% for m in messages %}{% for p in m.content if p.type %}{{ p }}{% endfor %}{% endfor %}x", "leaves out"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }} Again: {{ m.content }}"), "a message twice"),
        ("{{ range(99999)|random }}" + CHATML, "another text each time"),
        *[
            (CHATML.replace("assistant\n", f"assistant\n{tag}{behind}"), f"{tag}, which the parser")
            for tag in ("<ponder_thoughts>", "<cot>", "<details type='reasoning'>", "<deepthink>", "<Think>", "<answer>")
            for behind in ("\n", "Okay, ")
        ],
    ],
)  # fmt: skip
def test_a_template_that_no_prompt_can_use_is_refused_when_it_is_loaded(template, complaint, load):
    with pytest.raises(Failure, match=complaint):
        load(template)


def test_a_prompt_does_not_depend_on_the_day(load, monkeypatch):
    tokenizer = load("{{ strftime_now('%d %B %Y') }}\n" + CHATML)
    assert tokenizer.decode(chat.encode(tokenizer, USER)).startswith("26 July 2024\n")


def test_named_templates_are_read_by_their_default(load):
    tokenizer = load(CHATML)
    alone = chat.encode(tokenizer, USER)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "x"}
    assert list(chat.encode(tokenizer, USER)) == list(alone)


# ---------------------------------------------------------------- where thoughts end


def opens(tag, behind="\n"):
    return CHATML.replace("assistant\n", f"assistant\n{tag}{behind}")


def learned(tokenizer, trace):
    """What a model that has learned a trace by heart is read as. -> text, Judgment, the trace's ids"""
    pair = Pair("p", USER, "Plum.", "Stone.", "A", trace=trace)
    args = SimpleNamespace(max_len=4000, batch=1, data="x")
    style = PromptStyle("instruct", "Judge.")
    (row,) = sft.tokenize([pair], tokenizer, style, args)
    text = chat.decode_sample(tokenizer, row.prompt, row.trace)
    return text, parse(text), list(row.trace)


@pytest.mark.parametrize("opening", chat.THOUGHTS)
@pytest.mark.parametrize("behind", ["\n", "", "\nOkay, "])
def test_a_learned_trace_is_read_where_the_prompt_opens_a_thought(opening, behind, load):
    """With thoughts or without, the student's tags or the teacher's, whole or without the opening tag."""
    tokenizer = load(opens(opening, behind))
    closing = chat.THOUGHTS[opening]
    doubts = "B? <answer>[[B]]</answer>"
    for trace, thinks in (
        (JUDGMENT, False),
        (f"{opening}\n{doubts}\n{closing}\n\n{JUDGMENT}", True),
        (f"{doubts}\n{closing}{JUDGMENT}", True),
        (f"<think>{doubts}</think>\n{JUDGMENT}", True),
        (f"<think>\n\n</think>\n\n{JUDGMENT}", False),
    ):
        text, judgment, ids = learned(tokenizer, trace)
        assert judgment.verdict == "A" and judgment.type == "Chat", text
        assert verdict_reward(judgment, "A") == published_reward(text, "A") == 1
        assert text.startswith(opening + behind) and (doubts in text) == thinks
        assert text.count(opening) == 1 and ids.count(tokenizer.eos_token_id) == 1


def test_the_template_that_opens_a_thought(load):
    tokenizer = load(bug("template-opens-think.jinja"))
    text, judgment, _ = learned(tokenizer, JUDGMENT)
    assert text == f"<think>\n\n</think>\n\n{JUDGMENT}<|im_end|>" and judgment.verdict == "A"
    unfinished = tokenizer.encode("A? <answer>[[A]]</answer>")
    prompt = chat.encode(tokenizer, USER)
    read = parse(chat.decode_sample(tokenizer, prompt, unfinished))
    assert read.verdict is None and read.reason == "thinking never ended"


@pytest.mark.parametrize("end", ["", "<think>\n\n</think>\n\n", "<|START_RESPONSE|>", "</think>"])
def test_a_prompt_that_opens_no_thought_puts_nothing_in_front(end, load):
    tokenizer = load(opens(end, ""))
    prompt = chat.encode(tokenizer, [says("user", "What does this tag mean?\n<think>\n")])
    assert chat.opened_thought(tokenizer, prompt) == ""
    assert learned(tokenizer, JUDGMENT)[0] == JUDGMENT + "<|im_end|>"


def test_a_prompt_that_switches_thinking_off_opens_no_thought(load):
    """The template decides it for each prompt (Nemotron, SmolLM3)."""
    asked = "{{ '<think></think>' if 'off' in messages[0].content else '<think>\n' }}"
    tokenizer = load(CHATML.replace("assistant\n", "assistant\n" + asked))
    open_prompt, closed = (chat.encode(tokenizer, [says("user", t)]) for t in ("on", "off"))
    assert chat.opened_thought(tokenizer, open_prompt) == "<think>\n"
    assert chat.opened_thought(tokenizer, closed) == ""


@pytest.mark.parametrize("header", ["<|im_start|>assistant\n", "ASSISTANT: ", "[/INST]"])
def test_a_prompt_that_switches_thinking_on_opens_one(header, load):
    """No made-up conversation shows it: some templates look for a word in the messages (/think)."""
    asked = "{{ '<think>\n' if '/think' in messages[-1].content }}"
    tokenizer = load("{% for m in messages %}USER: {{ m.content }} {% endfor %}" + header + asked)
    for text, opening in (("a /think", "<think>\n"), ("a <think>\n", ""), ("a", "")):
        assert (
            chat.opened_thought(tokenizer, chat.encode(tokenizer, [says("user", text)])) == opening
        )


@pytest.mark.parametrize("opening, closing", chat.THOUGHTS.items())
def test_the_parser_reads_behind_every_familys_thoughts(opening, closing):
    doubts = "First I thought <answer>[[A]]</answer>."
    for text in (
        f"{opening}{doubts}{closing}",
        f"\n{opening}\n{doubts}\n{closing}\n",
        doubts + closing,
    ):
        assert parse(f"{text}<eval>x</eval><answer>[[B]]</answer>").verdict == "B"
    assert parse(f"{opening}{doubts}").reason == "thinking never ended"  # fmt: skip


def test_thoughts_of_seed_oss():
    assert parse(bug("judgment-seed-think.txt")).verdict == "B"


@pytest.mark.parametrize(
    "text",
    [
        "<eval>x</eval><answer>[[A]]</answer>\nB leaks </think>.",
        "<think>hm</think><answer>[[A]]</answer>\nB leaks </think>.",
        "<think>B says </think><answer>[[B]]</answer> hm</think><answer>[[A]]</answer>",
        "<eval><quote_B></think><answer>[[B]]</answer></quote_B></eval><answer>[[A]]</answer>",
        "<THINK><answer>[[B]]</answer></Think><answer>[[A]]</answer>",
        "<think>hm</think>\n<answer>\n<eval>x</eval><answer>[[A]]</answer>\n</answer>",
    ],
)
def test_the_closing_tag_that_ends_the_thoughts(text):
    assert parse(text).verdict == "A"


def test_thoughts_without_their_opening_tag_bring_no_verdict():
    assert parse("hm <answer>[[A]]</answer></think> B is better.").reason == "no answer"


def test_thoughts_that_a_trace_never_closes_stay_open(load):
    text, judgment, _ = learned(load(opens("<think>")), "<think>\nhm <answer>[[A]]</answer>")
    assert text == "<think>\nhm <answer>[[A]]</answer><|im_end|>" and judgment.verdict is None
    harmony = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"
    text, judgment, _ = learned(load(opens("<think>")), harmony + JUDGMENT)
    assert text == f"<think>\nhm</think>{JUDGMENT}<|im_end|>"
    quotes = f"<eval>x </think></eval>{JUDGMENT}"
    text, judgment, _ = learned(load(opens("<think>")), quotes)
    assert text == f"<think>\n\n</think>\n\n{quotes}<|im_end|>" and judgment.verdict == "A"


def test_a_judge_that_quotes_an_opening_tag_is_not_thinking():
    for tag in ("<think>", "<reasoning>", "[THINK]"):
        text = f"<eval><quote_A>{tag} 4</quote_A> right</eval><answer>[[A]]</answer>"
        assert parse(text).verdict == "A"


# ---------------------------------------------------------------- control tokens


ENDS = (
    "<|im_end|>", "</s>", "<end_of_turn>", "<eos>", "<｜end▁of▁sentence｜>", "<|eot_id|>", "<turn|>", "<|return|>",
    "<seed:eos>", "<end_of_utterance>", "<|END_OF_TURN_TOKEN|>", "</s>\n<|im_end|>\n", "<end_of_turn><eos>",
    "<eos><pad><pad>", "<|eot_id|>assistant", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "[e~[",
    "<EOT>", "<|role_end|>", "<|endofprompt|>", "[EOS]", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
)  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_a_trace_has_no_end_of_turn_in_its_text(end, load):
    """Neither the teacher's nor the student's own."""
    assert D.trace_of(f"<think>\nhm</think>\n{JUDGMENT}{end}") == JUDGMENT
    tokenizer = load(CHATML)
    assert learned(tokenizer, JUDGMENT + end)[2] == learned(tokenizer, JUDGMENT)[2]


def test_one_end_of_turn_is_learned(load):
    tokenizer = load(CHATML)
    end, start = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|im_start|>"))
    trace = json.loads(bug("trace-with-end-token.jsonl"))["trace"]
    middle = JUDGMENT.replace("fine", "fine<|im_end|><|im_start|>user\n")
    for text in (trace, middle, "<|im_end|>" + middle):
        ids = learned(tokenizer, text)[2]
        assert ids.count(end) == 1 and ids[-1] == end and start not in ids
    assert parse(tokenizer.decode(ids)).verdict == "A"
    assert learned(tokenizer, JUDGMENT + "\n")[2][-2] != end, "other texts are learned as they are"


@pytest.mark.parametrize(
    "end", ["<|b|>", "[IMG]", "arr[INST]", "<end>er</end>", "<|friend|>", "</answer>"]
)
def test_a_text_keeps_what_ends_no_turn(end, load):
    ids = learned(load(CHATML), JUDGMENT + end)[2]
    assert load(CHATML).decode(ids) == f"{JUDGMENT}{end}<|im_end|>"
    assert D.trace_of(JUDGMENT + end) == JUDGMENT + end


@pytest.mark.parametrize(
    "before, token",
    [
        ("Answer in <answer> </answer>, <type> </type>, [[A]] or [[B]].\n", None),  # R1-Zero
        ("", "[[A]]"),
        ("", "<answer>"),
        ("", "<answer>[[A]]</answer>"),
        ("", "[["),
        ("", "A"),
    ],
)
def test_the_words_of_a_judgment_are_text(before, token, folder):
    """Whether the template spells them or somebody has made tokens of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = before + CHATML
    if token:
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    text, judgment, _ = learned(tokenizer, JUDGMENT)
    assert text == JUDGMENT + "<|im_end|>" and judgment.verdict == "A"
    assert JUDGMENT in tokenizer.decode(chat.encode(tokenizer, [says("user", JUDGMENT)]))


@pytest.mark.parametrize(
    "behind, eos, learns",
    [
        ("<|im_end|>\n", "<|im_start|>", "<|im_end|>"),  # base models: <|endoftext|> beside ChatML
        ("<|end|>\n<|im_end|>", "<|im_end|>", "<|end|>"),  # Phi-3
        ("<|end|><|im_end|>", "<|im_end|>", "<|im_end|>"),  # Command A
        ("", "<|im_end|>", "<|im_end|>"),  # GLM-4
        ("{% if loop.last %}<|start|>{% endif %}", "<|im_end|>", "<|im_end|>"),
        (" plain\n", "<|im_end|>", "<|im_end|>"),
    ],
)
def test_the_end_that_the_template_writes_is_learned_and_stops(
    behind, eos, learns, folder, tmp_path
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|start|>"]})
    tokenizer.eos_token = eos
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}" + behind + "{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").unlink()
    tokenizer, ends = chat.load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens(ends) == list(dict.fromkeys([learns, eos]))
    assert learned(tokenizer, JUDGMENT)[2][-1] == ends[0]

    # A server that opens the trained model stops there too.
    shutil.copytree(folder, tmp_path / "trained")
    (folder / "config.json").write_text("{}")
    write_settings(folder, tmp_path / "trained", "torch.float32", None, ends)
    assert len(ends) == 1 or set(chat.more_ends(tmp_path / "trained")) == set(ends)


def test_tags_that_are_tokens_stay_in_traces_and_prompts(folder):
    """<think> is an added token of Qwen 3; others make the tags of a judgment special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = ["<think>", "</think>", "<verdict>", "</verdict>", "<s>", "</s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": "<s>"})
    trace = f"<think>hm</think>{JUDGMENT}<verdict>A</verdict>"
    text, judgment, ids = learned(tokenizer, trace)
    assert text == trace + "<|im_end|>" and judgment.verdict == "A"
    assert tokenizer.convert_tokens_to_ids("</think>") in ids
    prompt = tokenizer.decode(
        chat.encode(tokenizer, [says("user", "<verdict>x</verdict> <s></s>")])
    )
    assert "<verdict>x</verdict>" in prompt and "<s>" not in prompt


@pytest.mark.parametrize(
    "template, spelt",
    [
        ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}<|assistant|>\n", "<|assistant|>"),
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "[/INST]"),
        ("[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}", "[gMASK]"),
        ("{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>\n{% endfor %}", "<end_of_turn>"),
        ("{% for m in messages %}<|turn>{{ m.content }}<turn|>\n{% endfor %}", "<turn|>"),
    ],
)  # fmt: skip
def test_a_response_cannot_spell_what_the_template_writes_around_messages(template, spelt, load):
    """Token or not: Zephyr's <|assistant|> and Llama 2's [INST] are plain text to their tokenizers."""
    tokenizer = load(template)
    count = lambda text: tokenizer.decode(chat.encode(tokenizer, [says("user", text)])).count(spelt)
    assert count("a") == count(f"a{spelt}b") == count(spelt * 3) > 0


# ---------------------------------------------------------------- more tokens than rows, code in the folder


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|one_more|>"]})
    tokenizer.save_pretrained(folder)
    rows = len(tokenizer) - 1
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config["vocab_size"] == rows
    with pytest.raises(Failure) as stop:
        chat.load_tokenizer(folder)
    assert f"{rows + 1} tokens" in str(stop.value) and f"for {rows} " in str(stop.value)

    config["vocab_size"] = rows + 64  # padded, as many models are
    path.write_text(json.dumps(config))
    chat.load_tokenizer(folder)
    path.unlink()
    chat.load_tokenizer(folder)


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("generation_config.json", "", "generation_config.json: not a JSON object"),
        ("generation_config.json", "version https://git-lfs", "generation_config.json: not a JSON"),
        ("generation_config.json", '{"eos_token_id": "256"}', "a token id or a list"),
        ("generation_config.json", '{"eos_token_id": [[256]]}', "a token id or a list"),
        ("generation_config.json", '{"eos_token_id": [256, null]}', "a token id or a list"),
        ("generation_config.json", '{"eos_token_id": 99999}', "eos_token_id 99999"),
        ("config.json", "", "config.json: not a JSON object"),
    ],
)
def test_a_damaged_file_is_named(name, text, complaint, folder):
    (folder / name).write_text(text)
    with pytest.raises(Failure) as stop:
        chat.load_tokenizer(folder)
    assert complaint in str(stop.value) and "no usable" not in str(stop.value)


def test_a_tokenizers_code_is_not_run(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "code.Mine"]}, "tokenizer_class": "Mine"}
    path.write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Mine: pass\n")
    try:
        chat.load_tokenizer(folder)
    except Failure as stop:
        assert "no usable tokenizer" in str(stop)
    assert not (folder / "ran").exists()


# ---------------------------------------------------------------- another template is another judge


def change_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "judge"))


def change_vocabulary(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("polish", "varnish"))


def change_ends(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 1]}')


def change_tokenizer_settings(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|im_start|>"}))


CHANGES = [change_template, change_vocabulary, change_ends, change_tokenizer_settings]


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_tells_prompts_apart(change, folder, tmp_path):
    before = chat.prompt_fingerprint(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert chat.prompt_fingerprint(copy) == before
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')  # not ours to use
    (folder / "README.md").write_text("x")
    assert chat.prompt_fingerprint(folder) == before
    change(folder)
    assert chat.prompt_fingerprint(folder) != before


def test_another_template_is_another_journal_evaluation_and_run(folder, tmp_path):
    model, out, run = str(folder / "config.json"), tmp_path / "evaluation", tmp_path / "run"
    flags = ["--model", model, "--data", "x", "--out", "x", "--protocol", "instruct"]

    def journal():
        return LocalBackend.about(SimpleNamespace(model=model, folder=folder))

    def settings():
        return evaluation.settings(evaluation.arguments(flags), 1)

    def run_config():
        return open_run(argparse.Namespace(model=model, out=str(run)), folder, [PAIR], {})

    before = journal()
    out.mkdir()
    (out / "config.json").write_text(json.dumps(settings()))
    types = {
        name: kind if isinstance(kind, type) else kind[0] for name, kind in JUDGMENT_FIELDS.items()
    }
    line = {name: kind() for name, kind in types.items()}
    (out / "judgments.jsonl").write_text(json.dumps(line) + "\n")
    config = run_config()
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    evaluation.open_folder(out, settings())
    assert journal() == before and run_config() == config

    change_template(folder)
    assert journal() != before
    with pytest.raises(Failure, match="judgments with another tokenizer"):
        evaluation.open_folder(out, settings())
    with pytest.raises(Failure, match="a run with another tokenizer"):
        run_config()


# ---------------------------------------------------------------- tokenizers of real families


def test_tokenizers_of_real_families():
    from transformers import AutoTokenizer

    if not SHARED.exists():
        pytest.skip("../shared is absent")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2.5")
    row = read_pairs(SHARED / "data/rmr1_format.sample.jsonl")[0]
    deepseek = SHARED / "tokenizers/deepseek_r1_distill_qwen/chat_template.jinja"
    for template, opening in ((tokenizer.chat_template, ""), (deepseek.read_text(), "<think>\n")):
        tokenizer.chat_template = template
        tokenizer.bos_token = "<|endoftext|>"
        for messages in (chat_messages(PAIR), chat_messages(row)):
            assert chat.opened_thought(tokenizer, chat.encode(tokenizer, messages)) == opening
        assert learned(tokenizer, JUDGMENT)[1].verdict == "A"
