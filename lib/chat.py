"""
Tokenizer and chat template: from messages to token ids, and from sampled ids back to text.

A chat template is the model's own program. It may leave out a message, open the thoughts of the model, or print
today's date. So we render made-up messages once (`habits_of`), and look for every message in every prompt.

transformers and numpy are imported inside the functions that need them: rubrics.py imports this module too, and
runs on bare Python.
"""

import functools
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lib.files import Failure, first_line, read_object, this_rank

# How families mark their thoughts: {what opens them: what closes them}. All of the project reads this table.
THOUGHTS = {
    "<think>": "</think>",  # DeepSeek, Qwen, GLM, Nemotron, OLMo, SmolLM and most others
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "[THINK]": "[/THINK]",  # Magistral
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",  # gpt-oss
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
    "<|begin_of_thought|>": "<|end_of_thought|>",  # Sky-T1, OpenThinker
    "<unused94>thought": "<unused95>",  # MedGemma
    "<longcat_think>": "</longcat_think>",  # LongCat
    "◁think▷": "◁/think▷",  # Kimi
    "<thought>": "</thought>",  # EXAONE Deep
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "<reflection>": "</reflection>",
}
THOUGHT_TAGS = {*THOUGHTS, *THOUGHTS.values()}
BEGINS_A_THOUGHT = re.compile(rf"(?i)\s*({'|'.join(map(re.escape, THOUGHTS))})")
ENDS_A_THOUGHT = re.compile(rf"(?i){'|'.join(map(re.escape, THOUGHTS.values()))}")

# The words of a judgment, which rubrics.py reads. They are text, even where somebody has made tokens of them.
JUDGMENT_TAGS = (
    "type",
    "rubric",
    "justify",
    "solution",
    "eval",
    "quote_A",
    "quote_B",
    "summary_A",
    "summary_B",
    "answer",
)
JUDGMENT_WORDS = (
    "[[A]]",
    "[[B]]",
    *(f"<{slash}{name}>" for name in JUDGMENT_TAGS for slash in ("", "/")),
)
BEGINS_A_JUDGMENT = re.compile(rf"\s*<(?:{'|'.join(JUDGMENT_TAGS)})>")

# An opening tag, with attributes or without.
OPENING_TAG = re.compile(r"[<\[◁](?!/)[^<>\[\]◁▷\n]{1,80}[>\]▷]")
MEANS_THINKING = re.compile(r"(?i)think|thought|reason|reflect|analys|ponder|scratch")
# What looks like a control token: <|user|>, <｜User｜>, Gemma 4's <|turn> and <turn|>.
LIKE_CONTROL = re.compile(r"<[|｜][^<>]+>|<[^<>]+[|｜]>")
# What a template may write around messages, as tokens or as plain text (Zephyr's <|user|>, Llama 2's [INST]).
TEMPLATE_MARK = re.compile(r"<[^\s<>]+>|\[/?\w+\]")
# How a text of any family ends, by the names that end a turn: its tokenizer may not be at hand. Behind them may
# stand padding, and the header of a turn that the writer did not go on with.
END_NAME = (
    r"(?:\w{1,20}[_:])?(?:eo[stdm]|end)(?:[_▁]?(?:id|token|turn|response|of[_▁]?[\w▁]{1,20}))?"
    r"|(?:end_)?turn|return|pad(?:_token|ding)?"
)
FOREIGN_END = re.compile(
    rf"(?i)(?:<[|｜]?(?:{END_NAME})[|｜]?>|</s>|</longcat_s>|\[(?:EOS|EOT|PAD)\]|\[e~\[)"
    r"(?:(?:<\|start\|>|<\|im_start\|>|<\|start_header_id\|>)?assistant(?:<\|end_header_id\|>)?)?$"
)

# The day on which all prompts are written. Some templates print today's date (SmolLM3, Llama 3.2, Mistral), and
# then a resumed run would not learn from the prompts that it began with. Llama's own templates fall back on this
# day where they are told none.
DAY = datetime(2024, 7, 26)

# What makes the ids of a prompt, by the names that transformers and vLLM look for.
PROMPT_FILES = (
    "tokenizer*",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)


# ---------------------------------------------------------------- load and check


def load_tokenizer(folder):
    """The tokenizer of a model folder, and the ids that end its turn. -> tokenizer, [id, ...]

    The first is the one with which its chat template ends a turn, and which SFT learns.

    Raises Failure for a tokenizer that is broken, that lacks a chat template or an end of turn, or that has ids
    without a row in the model's embedding; and for a template that misreads a simple conversation. Code in the
    folder is never run.
    """
    more = more_ends(folder)
    if (Path(folder) / "config.json").exists():
        # AutoTokenizer reads it too, and reports a broken one as an error of the tokenizer.
        read_object(Path(folder) / "config.json")
    sample = "Judge A and B."
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = tokenizer.encode(sample, add_special_tokens=False)
        gives_text_back = tokenizer.decode(ids).strip() == sample
    except (
        Exception
    ) as error:  # a folder's files can be broken in as many ways as they have parsers
        raise Failure(
            f"--model {folder}: no usable tokenizer in it ({first_line(error)})"
        ) from error

    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise Failure(
            f"--model {folder}: its tokenizer lacks a chat template or an end-of-turn token"
        )
    if not gives_text_back:  # without its tokenizer.json it loads, but has no vocabulary
        raise Failure(
            f"--model {folder}: its tokenizer does not give a text back; "
            "is its tokenizer.json missing?"
        )
    check_rows(folder, tokenizer, more)
    check_template(folder, tokenizer)
    ends = [habits_of(tokenizer).end, tokenizer.eos_token_id, *more]
    return tokenizer, list(dict.fromkeys(ends))


def more_ends(folder):
    """The ids that end a turn by a folder's generation_config.json. -> [id, ...]

    Raises Failure for a file that is damaged, and for what is no id.
    """
    path = Path(folder) / "generation_config.json"
    ends = read_object(path).get("eos_token_id") if path.exists() else None
    if ends is None:
        return []
    ends = ends if isinstance(ends, list) else [ends]
    if any(type(end) is not int or end < 0 for end in ends):
        raise Failure(f"{path}: eos_token_id should be a token id or a list of them, not {ends}")
    return ends


def check_rows(folder, tokenizer, ends):
    """Raises Failure if the tokenizer can give an id for which the model beside it has no embedding.

    ends  the ids of generation_config.json, which have to be in the model's vocabulary too

    More rows than tokens are normal: many models pad them.
    """
    tokens = max(tokenizer.get_vocab().values()) + 1
    rows = tokens
    if (Path(folder) / "config.json").is_file():
        from lib.model_files import config_of

        rows = config_of(folder).vocab_size or tokens
    if tokens > rows:
        raise Failure(
            f"--model {folder}: its tokenizer has {tokens} tokens, but the model has embeddings for {rows} "
            "(vocab_size in config.json)"
        )
    if max(ends, default=0) >= rows:
        raise Failure(
            f"--model {folder}: eos_token_id {max(ends)} in its generation_config.json is beyond the "
            f"{rows} tokens of the model"
        )


def check_template(folder, tokenizer):
    """Raises Failure for a template that misreads the simplest conversations, whatever the prompt style."""
    fault = habits_of(tokenizer).fault
    if fault:
        raise Failure(f"--model {folder}: its chat template {fault}")


def prompt_fingerprint(folder):
    """A short digest of what makes a prompt's ids: tokenizer, chat template, ends of turn. None without a folder.

    Where the folder lies does not matter.
    """
    if folder is None:
        return None
    folder = Path(folder)
    paths = {path for pattern in PROMPT_FILES for path in folder.glob(pattern) if path.is_file()}
    mark = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        mark.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        mark.update(content)
    mark.update(f"ends {more_ends(folder)}".encode())
    return mark.hexdigest()[:16]


# ---------------------------------------------------------------- what a template does


@dataclass(frozen=True)
class Habits:
    """What a tokenizer and its chat template do with any conversation.

    fault    why the template cannot be used, else ""
    endings  what it writes behind the last message where it opens no thought, such as "ASSISTANT:"
    control  pattern of the control tokens as a text spells them
    end      id of the token that ends the assistant's turn
    """

    fault: str
    endings: tuple = ()
    control: re.Pattern = re.compile("(?!)")  # matches nothing
    end: int | None = None


def habits_of(tokenizer):
    """The `Habits` of a tokenizer with its chat template."""
    return find_habits(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=8)
def find_habits(tokenizer, template):
    """The `Habits` of a tokenizer. template: its text, since somebody may give the tokenizer another one"""
    faults = []
    texts = {}  # {roles: the rendered text}
    for roles in (
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user"),
    ):
        messages = [{"role": role, "content": f"zorvex{place}"} for place, role in enumerate(roles)]
        words = [message["content"] for message in messages]
        try:
            text = render(tokenizer, messages)
            again = render(tokenizer, messages)
        except Exception as error:  # a template may refuse a role, in a way of its own
            faults.append(f"refuses a conversation ({first_line(error)})")
            continue
        if text != again:
            return Habits("writes another text each time")
        if any(text.count(word) > 1 for word in words):
            return Habits("writes a message twice")
        lost = lost_message(text, messages)
        if lost:
            faults.append(lost)
            continue
        texts[roles] = text

    fault = "" if texts else faults[0]
    endings = {re.split(r"zorvex\d", text)[-1].strip() for text in texts.values()}
    unknown = [unknown_thought(tokenizer, ending, texts.values()) for ending in endings]
    if any(unknown):
        fault = (
            f"begins the reply with {max(unknown)}, which the parser does not know; if it opens a thought, add the "
            "tag to THOUGHTS in lib/chat.py"
        )
    no_thought = tuple(ending for ending in endings if ending and not open_thought(ending))
    control = control_tokens(tokenizer, texts)
    return Habits(fault, no_thought, control, end_of_turn(tokenizer, control))


def open_thought(text):
    """What stands at the end of a text from the tag of a thought that it leaves open; "" if it leaves none."""
    for tag, closing in THOUGHTS.items():
        start = text.rfind(tag)
        if start >= 0 and closing not in text[start:]:
            return text[start:]
    return ""


def unknown_thought(tokenizer, ending, texts):
    """A tag that the generation prompt leaves open and that may open a thought of an unknown family; else "".

    ending  what a template writes behind the last message
    texts   whole conversations as it writes them
    """
    tags = OPENING_TAG.findall(ending)
    if not tags or tags[-1] in THOUGHT_TAGS or open_thought(ending):
        return ""
    tag = tags[-1]
    name = re.match(r"[|｜]?[\w:]*", tag[1:])[0]
    if f"/{name}" in ending.rpartition(tag)[2]:  # it closes it again
        return ""
    if MEANS_THINKING.search(tag):
        return tag
    # The marker of a role is a token, looks like one, or stands around other messages too.
    around = any(tag in text[: text.rfind("zorvex")] for text in texts)
    is_token = tag in tokenizer.all_special_tokens or LIKE_CONTROL.fullmatch(tag)
    return "" if around or is_token else tag


def end_of_turn(tokenizer, control):
    """The id of the token with which the template ends the assistant's last turn.

    control  pattern of the control tokens

    It is not always the tokenizer's end token: base models with a ChatML template name <|endoftext|>, Gemma names
    <eos>. The tokenizer's end token is used where the template writes no token, or writes it directly after others
    (Command A).
    """
    messages = [
        {"role": "user", "content": "zorvex0"},
        {"role": "assistant", "content": "zorvex1"},
    ]
    try:
        text = render(tokenizer, messages, generation_prompt=False)
    except Exception:  # as in `find_habits`, which reports it
        return tokenizer.eos_token_id
    before, _, behind = text.rpartition("zorvex1")
    tokens = []  # that stand side by side behind the reply
    for token in tokenizer.tokenize(behind.lstrip()):
        if not control.fullmatch(token):
            break
        tokens.append(token)
    # Some templates end no turn: then the opening of the next one stands there.
    opens_a_turn = tokens and (
        tokens[0] in before.partition("zorvex0")[0] or before.rstrip().endswith(tokens[0])
    )
    if not tokens or opens_a_turn or tokenizer.eos_token in tokens:
        return tokenizer.eos_token_id
    return tokenizer.convert_tokens_to_ids(tokens[0])


def control_tokens(tokenizer, texts):
    """A pattern for the control tokens of a tokenizer, as a text spells them.

    texts  {roles: a conversation as the template writes it}

    They are the special tokens, the added ones that look like them (DeepSeek's <｜User｜> is not special by its
    tokenizer file), and the markers that the template writes around messages. Tags of which the tokenizer has
    both ends, such as <tool> and </tool>, are words of a text, even if somebody has made them special. So are the
    words of a judgment, whoever spells them.
    """
    # A default system message is no marker. So we read conversations that bring their own, if any do.
    own_system = [text for roles, text in texts.items() if roles[0] == "system"]
    written = set()
    for text in own_system or texts.values():
        written.update(TEMPLATE_MARK.findall(re.sub(r"zorvex\d", " ", text)))
    written -= THOUGHT_TAGS

    named = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    spellings = written | named
    for token, special in added.items():
        if special or LIKE_CONTROL.fullmatch(token):
            spellings.add(token)
    for token in added:
        closing = f"</{token[1:]}"
        is_pair = re.fullmatch(r"<\w+>", token) and closing in added
        if is_pair and not {token, closing} & (named | written | THOUGHT_TAGS):
            spellings -= {token, closing}
    # A token that is part of such a word ("[[", "A"), or holds one, would break it.
    spellings = {
        token
        for token in spellings
        if not any(token in word or word in token for word in JUDGMENT_WORDS)
        and re.search(r"[^\w\s]", token)  # no mere word or space
    }
    longest_first = sorted(spellings, key=lambda token: (-len(token), token))
    matches_nothing = "(?!)"
    return re.compile("|".join(map(re.escape, longest_first)) or matches_nothing)


# ---------------------------------------------------------------- from messages to ids


class PromptRefused(Failure):
    """A template refuses a prompt for its words: others, said by the same speakers, it would take."""


def encode(tokenizer, messages, generation_prompt=True):
    """The token ids of a prompt, up to where the judge begins to write. -> int32 (tokens,)

    The template brings its own BOS. From here on only ids travel, so a prompt cannot get a second one.
    Raises Failure where the template refuses the messages, or leaves out a part of them, and PromptRefused
    where it does so to this prompt alone.
    """
    import numpy as np

    messages = without_control_tokens(tokenizer, messages)
    ids, reason, cause = try_to_encode(tokenizer, messages, generation_prompt)
    if not reason:
        return np.array(ids, np.int32)  # (tokens,)

    harmless = [{**message, "content": f"Word{place}"} for place, message in enumerate(messages)]
    refused_alone = not try_to_encode(tokenizer, harmless, generation_prompt)[1]
    advice = ""
    if messages[0]["role"] == "system" and not refused_alone:
        advice = "; if it knows no system message, try --protocol reasoning"
    raise (PromptRefused if refused_alone else Failure)(
        f"{tokenizer.name_or_path}: its chat template refuses the prompt ({reason}){advice}"
    ) from cause


def encode_or_leave_out(tokenizer, messages, name):
    """`encode` for training: None for a prompt that is refused for its words, with a line that names it."""
    try:
        return encode(tokenizer, messages)
    except PromptRefused as refusal:
        if this_rank() == 0:
            print(f"{name} is left out: {refusal}", flush=True)
        return None


def try_to_encode(tokenizer, messages, generation_prompt):
    """-> token ids of messages; the reason why there are none, "" if there are; and its exception or None"""
    try:
        text = render(tokenizer, messages, generation_prompt)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # a template is the model's own program, and fails in its own ways
        return [], " ".join(str(error).split())[:200] or type(error).__name__, error
    return ids, lost_message(text, messages) if ids else "writes nothing", None


def render(tokenizer, messages, generation_prompt=True):
    """The messages as the chat template writes them. -> text"""
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=generation_prompt,
        tokenize=False,
        strftime_now=DAY.strftime,
    )


def lost_message(text, messages):
    """Which message does not stand in a rendered text, as a reason; "" if all do, in their order.

    A template may take the space around a message away, the thoughts out of an assistant's turn, and put the
    system message where it likes.
    """
    place = 0
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            content = without_thoughts(content) or content
        content = content.strip()
        found = text.find(content, 0 if role == "system" else place)
        if found < 0:
            return f"leaves out or changes a message of the {role}"
        if role != "system":
            place = found + len(content)
    return ""


def without_control_tokens(tokenizer, messages):
    """The messages without control tokens, ready for a chat template.

    A response with `<|im_end|>` in it would end the user's turn and go on as the judge. This is so in published
    messages too; other texts keep their ids.
    """
    return [
        {**message, "content": spell_out(tokenizer, message["content"])} for message in messages
    ]


def spell_out(tokenizer, text, keep=()):
    """A text whose control tokens have become plain text.

    keep  control tokens that stay

    The tokenizer reads a control token wherever a text spells one. A space behind its first character makes plain
    text of it. Half a surrogate pair, which JSON can bring and a tokenizer refuses, becomes a question mark.
    """

    def space_inside(found):
        return found[0] if found[0] in keep else f"{found[0][0]} {found[0][1:]}"

    control = habits_of(tokenizer).control
    if keep:  # first, because a tag may consist of control tokens, as gpt-oss's do
        control = re.compile("|".join([*map(re.escape, sorted(keep)), control.pattern]))
    text = control.sub(space_inside, text)
    return text.encode(errors="replace").decode()


def encode_reply(tokenizer, prompt, text):
    """The token ids of a text that a model learns to write, with one end of turn. -> int32 (tokens,)

    prompt  the ids before it
    text    a reply of this family or of another one; its end of turn, spelt out, is not learned as a text

    Where the prompt has opened a thought, the reply closes it: the parser reads nothing before that.
    """
    import numpy as np

    end = habits_of(tokenizer).end
    text = without_end_of_turn(text, [tokenizer.eos_token, tokenizer.convert_ids_to_tokens(end)])
    opening = opened_thought(tokenizer, prompt)
    if opening:
        text = go_on_thinking(text, opening)
    text = spell_out(tokenizer, text, keep=THOUGHT_TAGS)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.array([*ids, end], np.int32)  # (tokens,)


def without_end_of_turn(text, own=()):
    """A text without the ends of turn at its end: those of any family by their names, and a model's `own`."""
    while True:
        shorter = text.rstrip()
        found = FOREIGN_END.search(shorter[-200:])
        ends = [found[0]] if found else [end for end in own if shorter.endswith(end)]
        if not ends or ends[0] in THOUGHT_TAGS:
            return text
        text = shorter.removesuffix(ends[0]).rstrip()


def go_on_thinking(text, opening):
    """A reply as it continues a prompt that ends in `opening`: its thoughts, the closing tag, its answer.

    Thoughts that the reply never closes stay open.
    """
    own_tag = next(tag for tag in THOUGHTS if opening.startswith(tag))
    thoughts, answer = split_thoughts(text)
    if not thoughts:
        return f"\n{THOUGHTS[own_tag]}\n\n{answer}"
    tag = BEGINS_A_THOUGHT.match(thoughts)
    thoughts = thoughts[tag.end() :] if tag else thoughts.lstrip()
    if opening.endswith("\n"):
        thoughts = thoughts.removeprefix("\n")
    if answer is None:
        return thoughts
    return without_end_of_turn(thoughts) + THOUGHTS[own_tag] + answer


# ---------------------------------------------------------------- from ids to text


def decode_sample(tokenizer, prompt, tokens):
    """The text of a judgment, special tokens included, because the published reward reads them too.

    prompt  the ids of its prompt
    tokens  the sampled ids

    Where the prompt has opened a thought (DeepSeek's ends in `<think>`), the tag is put back in front, so that the
    parser sees where the thinking ends.
    """
    return opened_thought(tokenizer, prompt) + tokenizer.decode(tokens)


def opened_thought(tokenizer, prompt):
    """The text that opens a thought at the end of a prompt's ids, such as "<think>\\n"; "" where none is open.

    It is read off each prompt, because a template may decide by what the messages say (/no_think).
    """
    opening = open_thought(tokenizer.decode(prompt[-100:]))
    tag = next((tag for tag in THOUGHTS if opening.startswith(tag)), "")
    behind = opening.removeprefix(tag)
    # If a control token follows the tag, the tag was quoted in a message and opens nothing.
    habits = habits_of(tokenizer)
    if habits.control.search(behind) or behind.rstrip().endswith(habits.endings):
        return ""
    return opening


def without_thoughts(text):
    """What a text says behind its thoughts; None where it begins to think and never ends."""
    return split_thoughts(text)[1]


def split_thoughts(text):
    """(thoughts, what a text says behind them), without the closing tag between them.

    ("", text) for a text that does not think, (text, None) for thoughts that never end.

    A text that begins with a tag of a judgment has no thoughts. One that begins with a family's opening tag ends
    its thoughts with that family's closing tag. Any other text may have lost its opening tag, so any closing tag
    counts. Thoughts may quote the tag, and so may the text after the verdict: the last one before the last answer
    counts.
    """
    if BEGINS_A_JUDGMENT.match(text):
        return "", text
    begun = BEGINS_A_THOUGHT.match(text)
    pattern = ENDS_A_THOUGHT
    if begun:
        closing = THOUGHTS[next(tag for tag in THOUGHTS if tag.lower() == begun[1].lower())]
        pattern = re.compile(re.escape(closing), re.IGNORECASE)
    closings = list(pattern.finditer(text))
    if not closings:
        return (text, None) if begun else ("", text)
    last_answer = text.rfind("<answer>")
    before = [closing for closing in closings if closing.end() <= last_answer]
    end = (before or closings)[-1]
    return text[: end.start()], text[end.end() :]
