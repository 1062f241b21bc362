"""
Conversations and pairs: one reader for every published form of row, and the markers of a prompt.

A **pair** is a conversation and two responses, A and B, of which people preferred one. `read_conversation`
reads conversations wherever they come from: rows of files, calls, requests. `pair_of` reads a row. Both raise
ValueError with a sentence for what they do not understand, so nothing is left out in silence. What they join
or rename, they note. Text only, no torch.
"""

import functools
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from lib.files import Failure, json_object, json_or_none, read_rows, this_rank

# ---------------------------------------------------------------- markers

# The user message about a single turn: the question and both responses, between the published markers.
COMPARISON = (
    "[Client Question]\n{}\n\n"
    "[The Start of Chatbot A's Response]\n{}\n[The End of Chatbot A's Response]\n\n"
    "[The Start of Chatbot B's Response]\n{}\n[The End of Chatbot B's Response]"
)
# The same about one response, and about none.
ONE_RESPONSE = (
    "[Client Question]\n{}\n\n"
    "[The Start of the Chatbot's Response]\n{}\n[The End of the Chatbot's Response]"
)
NO_RESPONSE = "[Client Question]\n{}\n[The End of the Client Question]"
# The opening bracket of every marker: the published ones, those of multi-turn prompts included, and ours.
MARKER = re.compile(
    r"\[(?=Client Question\]|The (?:Start|End) of (?:(?:Chatbot [AB]|the Chatbot)'s Response|"
    r"the Conversation between (?:Chatbot [AB]|the Chatbot) and the Client|"
    r"the Client Question|the Criteria)\])"
)


def space_markers(text):
    """The text with a space behind the bracket of every marker, so that it spells no marker any more."""
    return MARKER.sub("[ ", text)


# ---------------------------------------------------------------- a pair


@dataclass(frozen=True)
class Pair:
    """One comparison.

    context   messages before the responses, [{"role", "content"}, ...]; a single-turn pair has one, the user's
    a, b      the two responses, in the order in which the judge sees them; both "" for a published prompt
              from which they cannot be extracted (a multi-turn one). Where b is None it is one response, to be
              scored; where both are None, a question, for which criteria are to be written
    label     "A" or "B": the response that people preferred; None where neither is better
    source    where the pair came from
    type      "chat", "reasoning" or whatever its source says
    trace     an oracle's judgment of it (SFT rows), else None
    messages  the chat messages of a published dataset, used word for word; None where we write our own
    criteria  what to judge by, and by nothing else, as `read_criteria` writes it; None leaves it to the judge
    meta      anything else, e.g. {"style_a": 0, "style_b": 2} in the synthetic world; "strength" where the row
              says how much better the preferred response is, see `strength_of`
    """

    id: str
    context: list
    a: str
    b: str
    label: str | None
    source: str = ""
    type: str = ""
    trace: str | None = None
    messages: list | None = None
    criteria: str | None = None
    meta: dict = field(default_factory=dict)

    def swapped(self):
        """The same pair with A and B exchanged, in a published prompt too.

        It keeps its id. Its trace is left behind, because a trace names the sides. Raises ValueError where
        the responses of a published prompt cannot be extracted.
        """
        return replace(
            self,
            a=self.b,
            b=self.a,
            label=other_label(self.label),
            trace=None,
            messages=self.swapped_messages(),
            meta={swapped_name(name): value for name, value in self.meta.items()},
        )

    def swapped_messages(self):
        """The messages of a published prompt, with the responses exchanged in the last one; None without them.

        `published_pair` read question and responses from between the markers of that message. So the message
        holds the comparison exactly as COMPARISON spells it, once, and text around it stays as it is.
        """
        if self.messages is None:
            return None
        if not self.a:
            raise ValueError(f"{self.id}: the responses of a published prompt cannot be extracted")
        *before, last = self.messages
        question = self.context[0]["content"]
        comparison = COMPARISON.format(question, self.a, self.b)
        swapped = COMPARISON.format(question, self.b, self.a)
        return [*before, {**last, "content": last["content"].replace(comparison, swapped)}]

    def row(self, trace=None, **more):
        """The pair as a JSON row that `pair_of` reads, with a trace and more fields.

        A published prompt stays one. Fields that are None or {} are left out.
        """
        row = {"id": self.id, "source": self.source, "type": self.type}
        if is_single(self):
            row["context"] = self.context
            row["response"] = None if self.a is None else response_to_write(self.a)
            row["trace"] = trace
        elif self.messages is None:
            row["context"] = self.context
            row["a"] = response_to_write(self.a)
            row["b"] = response_to_write(self.b)
            row["label"] = self.label or "tie"
            row["trace"] = trace
        else:
            winner = f"model_{self.label.lower()}"
            row["context_messages"] = self.messages
            row["winner"] = trace or winner
            row["ground_truth"] = winner if trace else None
        row["criteria"] = self.criteria
        row["meta"] = self.meta
        row |= more
        return {name: value for name, value in row.items() if value not in (None, {})}


def response_to_write(text):
    """A response for a row: its text, or a message where the text alone would be read as messages."""
    message = {"role": "assistant", "content": text}
    try:
        reads_alike = turns_of(text, "assistant", "a response", set()) == [message]
    except ValueError:
        reads_alike = False
    return text if reads_alike else message


def check_label(label):
    """Raises ValueError for a label that is neither "A" nor "B"."""
    if label not in ("A", "B"):
        raise ValueError(f'unknown label {label!r}, expected "A" or "B"')


def other_label(label):
    """The label of the other side; None stays None. Raises ValueError for any other value."""
    if label is None:
        return None
    check_label(label)
    return "B" if label == "A" else "A"


def swapped_name(name):
    """The name of a `meta` field for the other side: style_a and style_b change places, others stay."""
    if name.endswith("_a"):
        return name[:-1] + "b"
    if name.endswith("_b"):
        return name[:-1] + "a"
    return name


# ---------------------------------------------------------------- criteria

# A line of criteria with a weight, "3 accuracy: are the facts right?", "30 % accuracy: ...". A name that ends in % has
# been read already.
WEIGHTED = re.compile(
    r"(?P<weight>\d{1,9}(?:\.\d{1,9})?)\s?%?\s+(?P<name>[^:]{0,199}[^:%\s])\s?:\s*(?P<text>.*)"
)


def read_criteria(value, name="criteria"):
    """Criteria that a user gives, as the text that the judge sees; None for None.

    value  a text; or a list of texts, one for each criterion
    name   of the value, for the message of a ValueError

    A text whose first two lines are "weight name: description" has such lines only. Its weights become percent of their
    sum: "3 tone: is it kind?" beside one of weight 1 becomes "tone 75%: is it kind?". Every other text stays as it
    is, and one line "3 sentences: no more" has no weight. So what has been read once is not changed by reading it again.
    """
    if value is None:
        return None
    if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {kind_of(value)}, not a text or a list of texts")
    lines = [line.strip() for line in value.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{name}: there is no text in it")
    found = [WEIGHTED.fullmatch(line) for line in lines]
    if len(found) == 1 or None in found[:2]:
        return value.strip()
    if None in found:
        place = found.index(None)
        raise ValueError(
            f"{name}, line {place + 1}: {lines[place][:60]!r} is not `weight name: description`, as the first two are"
        )
    total = sum(float(line["weight"]) for line in found)
    if not total:
        raise ValueError(f"{name}: all weights are 0")
    return "\n".join(
        f"{line['name'].strip()} {100 * float(line['weight']) / total:.3g}%: {line['text']}".strip()
        for line in found
    )


def criteria_of_row(row):
    """The criteria of a row; None where its column says nothing. Raises ValueError for what cannot be read."""
    return read_criteria(row["criteria"]) if filled(row, "criteria") else None


# ---------------------------------------------------------------- reading conversations

# What each speaker is called, in lower case, and the role that it has here. A call is what the assistant wrote.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
# A message's thoughts are not what the client sees.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
# What a part of a content may have beside its text. Anything else would be left out in silence.
PART_FIELDS = {
    "type",
    "text",
    "cache_control",
    "citations",
    "annotations",
    "logprobs",
    "id",
    "index",
}

# A text that is meant as messages begins with a bracket, perhaps behind quotes, a byte order mark or a name
# such as `array(`, ends with one, and has these keys, the first of them soon.
BRACKET = re.compile(r"[\ufeff\s\"']{0,20}(?:\w{0,20}\()?\s{0,20}[\[{]")
SPEAKER_KEY = re.compile(r"""['"](?:role|from)\\*['"]\s*[:,]""")
SAID_KEY = re.compile(r"""['"](?:content|value)\\*['"]\s*[:,]""")

# A control token of any family.
CONTROL_TOKEN = (
    r"(?:<[|｜][^<>|｜\n]{1,40}[|｜]>|<\|turn>|<turn\|>|\[/?(?:INST|SYSTEM_PROMPT)\]|\[gMASK\]|"
    r"\[\|\w{1,20}\|\]|\]~!?b[\]\[]|\[e~\[|<(?:SPECIAL|reserved)_\d{1,4}>|"
    r"<(?:s|bos|eos|pad|sop|BOS_TOKEN|(?:start|end)_of_turn|end_of_utterance|seed:\w{1,20})>)"
)
# At its beginning or its end a text has such a token where a template has written it.
BEGINS_RENDERED = re.compile(rf"\s*{CONTROL_TOKEN}")
ENDS_RENDERED = re.compile(
    rf"(?:{CONTROL_TOKEN}|</s>)\w{{0,20}}\s{{0,9}}(?:</?[\w:]{{1,20}}>\s{{0,9}})*\Z"
)
# Where the assistant's turn begins.
OPENS_ASSISTANT = re.compile(
    rf"\[/INST\]|<[|｜]/?(?:assistant|model|chatbot_token)[|｜]>|"
    rf"{CONTROL_TOKEN}\s?(?:assistant|model|ai)\b",
    re.IGNORECASE,
)


def read_conversation(
    prompt, responses, system=None, names=None, notes=None, prompt_name="the prompt"
):
    """A conversation and the responses to it, in any form. -> context, [text of each response]

    prompt     a text, messages, or JSON of messages as a text; None where the responses hold the conversation
    responses  each a text, a message, messages, or JSON of those as a text. Messages are a reply to the
               prompt, or the whole conversation that begins with it. There may be none
    system     the system prompt, which becomes the first message
    names      of the responses, for the message of a ValueError; prompt_name: of the prompt
    notes      a set that gets what was joined or renamed, in words
    context    [{"role", "content"}, ...], whose last message is the user's, or a tool's result

    A message is {"role", "content"} or {"from", "value"}; its content is a text or a list of text parts. A
    text that begins with "\\n\\nHuman:" is a transcript. Turns that all responses share belong to the context.
    Several turns that remain make one response, with their speakers. Give what a policy wrote as a message, whose
    content is taken word for word: a bare text that looks like JSON or a transcript would be parsed.
    """
    notes = set() if notes is None else notes
    names = names or [f"response {number}" for number in range(1, len(responses) + 1)]
    before = [] if prompt is None else messages_of(prompt, notes, prompt_name)

    conversations = []
    for name, response in zip(names, responses, strict=True):
        turns = turns_of(response, "assistant", name, notes)
        if not turns or turns[-1]["role"] != "assistant":
            raise ValueError(f"{name} does not end with a message of the assistant")
        if not turns[-1]["content"].strip():
            raise ValueError(f"{name} is empty")
        whole = after_prompt(before, turns, name)
        conversations.append(with_system(system, whole, notes))

    if not responses:
        context = with_system(system, before, notes)
        check_context(context)
        return context, []
    shared = shared_turns(conversations)
    check_context(conversations[0][:shared])
    texts = [turns_text(turns[shared:], notes) for turns in conversations]
    return conversations[0][:shared], texts


def messages_of(prompt, notes=None, name="the prompt"):
    """The messages of a prompt in any form that `read_conversation` reads. -> [{"role", "content"}, ...]"""
    messages = turns_of(prompt, "user", name, set() if notes is None else notes)
    check_context(messages)
    return messages


def check_context(messages):
    """Raises ValueError unless the user speaks in a context, and the user or a tool speaks last."""
    if messages and messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("the context does not end with a user message or a tool's result")
    said = [message["content"] for message in messages if message["role"] == "user"]
    if not "".join(said).strip():
        raise ValueError(
            "the context is missing: give prompt (a text) or context (a list of messages) with a "
            "message of the user"
        )


def after_prompt(prompt, turns, name):
    """The whole conversation of a response: the prompt's messages, then its own."""
    if not prompt:
        return turns
    prompt_system, prompt_turns = cut_system(prompt)
    system, own_turns = cut_system(turns)
    beginning = own_turns[: len(prompt_turns)]
    if all_alike(beginning, prompt_turns):
        if system and prompt_system and not all_alike(system, prompt_system):
            raise ValueError(f"{name} has another system message than the prompt")
        return [*(prompt_system or system), *prompt_turns, *own_turns[len(prompt_turns) :]]
    if turns[0]["role"] in ("system", "user"):
        raise ValueError(f"{name} is a conversation that does not begin with the prompt")
    return [*prompt, *turns]


def cut_system(messages):
    """(system messages at the beginning, the others)"""
    count = 0
    while count < len(messages) and messages[count]["role"] == "system":
        count += 1
    return messages[:count], messages[count:]


def all_alike(messages, others):
    """Do messages say the same, but for blanks around them?"""
    said = [(message["role"], message["content"].strip()) for message in messages]
    return said == [(message["role"], message["content"].strip()) for message in others]


def with_system(system, messages, notes):
    """The messages with the system prompt first, unless they begin with it already."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise ValueError(f"the system prompt is {kind_of(system)}, not a text")
    first = [{"role": "system", "content": system}]
    own, _ = cut_system(messages)
    if own and not all_alike(own, first):
        raise ValueError("the system prompt is another one than the messages begin with")
    if own:
        return messages
    notes.add("the system column put first")
    return first + messages


def shared_turns(conversations):
    """How many turns all conversations share, up to a message of the user or a tool."""
    first, *others = conversations
    shared = 0
    while all(len(turns) > shared and turns[shared] == first[shared] for turns in others):
        if shared == len(first):
            break
        shared += 1
    while shared and first[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    speaks = any(message["role"] == "user" for turns in conversations for message in turns)
    if speaks and not shared:
        raise ValueError("the conversations do not begin alike")
    return shared


def turns_text(turns, notes):
    """One turn of the assistant as it is; several turns with their speakers."""
    if len(turns) == 1:
        return turns[0]["content"]
    notes.add("several turns made one response")
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


# ---------------------------------------------------------------- messages in every form


def turns_of(value, role, name, notes):
    """The messages of a value. role: who speaks in a text. name: of the value, for a ValueError."""
    if isinstance(value, str):
        said = messages_as_json(value, name)
        if said is not None:
            notes.add("messages read from JSON in a text")
            return turns_of(said, role, name, notes)
        if value.startswith(("\n\nHuman:", "\n\nAssistant:")):
            return transcript(value)
        return [{"role": role, "content": value}] if value.strip() or role != "user" else []
    if isinstance(value, dict):
        return [message_of(value, name, notes)]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is not a text or messages, but {kind_of(value)}")
    messages = []
    for number, message in enumerate(value, 1):
        if isinstance(message, dict) and message.get("channel") == "analysis":
            notes.add("thoughts left out")  # gpt-oss gives them a message of their own
            continue
        messages.append(message_of(message, f"{name}, message {number}", notes))
    return messages


def messages_as_json(text, name):
    """The messages that a text holds as JSON; None for every other text.

    Raises ValueError for a text that is meant as messages and is no JSON, as Python, numpy or a hand writes
    it. A text that says something behind the messages, such as a question about them, is a text.
    """
    bracket = BRACKET.match(text)
    if not bracket:
        return None
    value = json_or_none(text)
    if isinstance(value, str):  # JSON in JSON
        return messages_as_json(value, name)
    if value is not None:
        messages = value if isinstance(value, list) else [value]
        return messages if any(map(is_message, messages)) else None

    speaker, said = SPEAKER_KEY.search(text), SAID_KEY.search(text)
    if speaker and said and min(speaker.start(), said.start()) < bracket.end() + 100:
        if text.rstrip(" \t\r\n,;\"')").endswith(("]", "}", "dtype=object")):
            raise ValueError(
                f"{name} looks like messages, but is no JSON; write them as JSON, or a text that is meant "
                "as it is as the content of a message"
            )
    return None


def is_rendered(text):
    """Has a chat template written it as a whole, up to an open turn or the end of the assistant's?"""
    if not BEGINS_RENDERED.match(text):
        return False
    tail = text.rstrip()[-200:]  # bounded, since anybody can send such texts
    return bool(ENDS_RENDERED.search(tail) and OPENS_ASSISTANT.search(text))


def is_message(value):
    """Is it an object with a known speaker and something said? Other JSON is a text like any other."""
    if not isinstance(value, dict):
        return False
    speaker = value.get("role", value.get("from"))
    says = {"content", "value", "tool_calls"} & set(value)
    return isinstance(speaker, str) and speaker.lower() in ROLES and bool(says)


def transcript(text):
    """The messages of a transcript, "\\n\\nHuman: ...\\n\\nAssistant: ..."; an empty last one is no message."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    messages = []
    for speaker, content in zip(parts[1::2], parts[2::2]):
        messages.append({"role": ROLES[speaker.lower()], "content": content.strip()})
    if not messages[-1]["content"]:
        messages.pop()
    return messages


def marked_turns(prompt):
    """The messages of a prompt of HelpSteer2, whose turns after the first have a line <extra_id_1>Assistant or
    <extra_id_1>User above them; a prompt of one turn stays as it is."""
    if not isinstance(prompt, str):
        return prompt
    first, *others = re.split(r"\n<extra_id_1>(User|Assistant)\n", prompt)
    messages = [{"role": "user", "content": first}]
    for speaker, content in zip(others[::2], others[1::2]):
        messages.append({"role": ROLES[speaker.lower()], "content": content})
    return messages if others else prompt


def message_of(message, name, notes):
    """{"role", "content"} of a message in any form."""
    if not isinstance(message, dict):
        raise ValueError(f"{name} is not {{role, content}} or {{from, value}}")
    speaker = one_of(message, ("role", "from"), name)
    if not isinstance(speaker, str):
        raise ValueError(f"{name} has no role")
    role = ROLES.get(speaker.lower())
    if role is None:
        raise ValueError(f"{name} has the unknown role {speaker[:40]!r}")
    for field_name, value in message.items():
        if holds_talk(field_name) and filled(message, field_name) and not is_number(value):
            raise ValueError(f"{name} has {field_name}; only text is read")
    if any(message.get(thoughts) for thoughts in THOUGHT_FIELDS):
        notes.add("thoughts left out")

    content = one_of(message, ("content", "value", "refusal"), name)
    calls = message.get("tool_calls") or message.get("function_call")
    if calls:
        notes.add("tool calls written as text")
        calls_text = text_of_calls(calls, name)
        text = content_text(content, name, notes) if content else ""
        return {"role": role, "content": f"{text}\n{calls_text}" if text else calls_text}
    return {"role": role, "content": content_text(content, name, notes)}


def one_of(fields, names, name):
    """The value of the fields with these names. Raises ValueError where two hold different ones."""
    values = {key: fields[key] for key in names if fields.get(key) is not None}
    first = next(iter(values.values()), None)
    if any(value != first for value in values.values()):
        raise ValueError(f"{name} has {' and '.join(values)}, which differ; keep one")
    return first


def content_text(content, name, notes):
    """The text of a message's content, which may come in parts."""
    if content is None:
        raise ValueError(f"{name} has no content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"{name} has a content that is not a text, but {kind_of(content)}")
    texts = [part_text(part, name, notes) for part in content]
    notes.add("text parts joined")
    return "".join(texts)


def part_text(part, name, notes):
    """The text of a part of a content. Raises ValueError for a part of another kind."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
    if kind in ("thinking", "reasoning"):
        notes.add("thoughts left out")
        return ""
    text = part.get("text") if kind in ("text", "input_text", "output_text") else None
    if not isinstance(text, str):
        raise ValueError(f"{name} has a part of type {str(kind)[:40]!r}; only text is read")
    for field_name in part.keys() - PART_FIELDS:
        if filled(part, field_name):
            raise ValueError(
                f"{name} has a part with {field_name} beside its text; only text is read"
            )
    return text


def text_of_calls(calls, name):
    """Tool calls as JSON, one a line."""
    if not isinstance(calls, list | dict):
        raise ValueError(f"{name} has tool calls that are not a list")
    lines = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else call
        lines.append(json.dumps(function, ensure_ascii=False, default=str))
    return "\n".join(lines)


def kind_of(value):
    """What a value is, for a sentence."""
    kinds = {type(None): "null", bool: "a truth value", int: "a number", float: "a number"}
    kinds |= {str: "a text", dict: "an object", list: "a list"}
    return kinds.get(type(value), type(value).__name__)


# ---------------------------------------------------------------- reading pairs

# The two responses of each form of row, and the columns that are parts of them.
FORMS = {
    ("a", "b"): (),
    ("full_chosen", "full_rejected"): ("initial_reason_steps", "chosen", "rejected"),
    ("accepted", "rejected"): (),
    ("chosen", "rejected"): (),
    ("response1", "response2"): (),
    ("response_1", "response_2"): (),
}
# The column with the preference of a form: below 0 for the first response, above 0 for the second, 0 for neither.
PREFERENCE_COLUMNS = {
    ("response1", "response2"): "overall_preference",
    ("response_1", "response_2"): "preference_strength",
}
# A row with one of them is meant as a pair.
PAIR_COLUMNS = {name for form in FORMS for name in form} | {"label", "winner"}
# Columns for what was said before the responses. One of them is filled.
PROMPT_COLUMNS = (
    "prompt",
    "context",
    "conversations",
    "conversation",
    "question",
    "instruction",
    "input",
    "query",
)
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
CONTEXT_COLUMNS = PROMPT_COLUMNS + SYSTEM_COLUMNS
# Names of further columns that hold a part of what the responses answer, or of what they are.
TALK = re.compile(
    r"sys.*|(user|client|chosen|rejected)[_-]?prompt|pre_?prompt|chat|follow_?ups?|files|attachments|"
    r"response|completion|response_?[ab012]|"
    r"(.*[_-])?(messages|history|instructions?|dialog(ue)?|turns|passages?|documents?|articles?|posts?|story|"
    r"evidence|knowledge|persona|choices|options|tools|functions)([_-](texts?|content|json|str))?|"
    r"(.*[_-])?(images?|videos?|audios?)([_-](urls?|paths?|files?|bytes|base64))?|"
    + "|".join([*PROMPT_COLUMNS, *(name for form in FORMS for name in form)]),
    re.IGNORECASE,
)
# Our own columns with texts that are no part of the conversation.
OWN_COLUMNS = {
    "id",
    "source",
    "type",
    "label",
    "trace",
    "criteria",
    "meta",
    "winner",
    "ground_truth",
}


def read_pairs(source, skip_bad=False, both_orders=False, ties=False, singles=False):
    """All pairs of a JSONL, JSON or parquet file, or of the train split of a hub dataset owner/name.

    skip_bad     report bad rows, count them and leave them out; else the first one ends the program
    both_orders  refuse published prompts that cannot be swapped
    ties         keep pairs in which neither response is better; else they are left out, and counted in a sentence
    singles      read rows of one response or of none, too; else they are bad rows

    `pair_of` says which rows it reads. A null field is an absent one. What was joined or renamed is counted
    and said once. Raises Failure with the file and the line.
    """
    pairs, bad_lines = [], []
    counts = Counter()  # {what was joined or renamed: rows}
    for number, row, error in read_rows(source):
        notes = set()
        try:
            if error:
                raise ValueError(error)
            pairs.append(pair_of(row, f"{Path(str(source)).stem}-{number}", notes, singles))
            counts.update(notes)
        except ValueError as unusable:
            bad_lines.append(f"{source}:{number}: {unusable}")

    bad_count = len(bad_lines)
    if bad_lines and not skip_bad:
        more = f" (and {bad_count - 1} more bad lines)" if bad_count > 1 else ""
        raise Failure(f"{bad_lines[0]}{more}; mend it, or leave bad lines out with --skip-bad")
    labelled = [pair for pair in pairs if pair.label or ties or is_single(pair)]
    tie_count = len(pairs) - len(labelled)
    pairs = labelled
    if tie_count and this_rank() == 0:
        print(
            f"{source}: {tie_count} ties left out, in which neither response is better",
            file=sys.stderr,
        )
    if not pairs:
        first = f", and {bad_count} bad lines, the first: {bad_lines[0]}" if bad_lines else ""
        raise Failure(f"{source}: no pairs in it{first}")
    if both_orders:
        check_swappable(pairs, source)
    if bad_lines and this_rank() == 0:
        for line in bad_lines:
            print(line, file=sys.stderr)
        total = bad_count + len(pairs)
        print(f"{bad_count} bad lines of {total} left out", file=sys.stderr)
    print_notes(source, counts)
    return pairs


def print_notes(source, counts):
    """Say what was joined or renamed. counts: {what: number of rows}"""
    if counts and this_rank() == 0:
        said = ", ".join(f"{rows:,} with {what}" for what, rows in sorted(counts.items()))
        print(f"{source}: of its rows {said}", file=sys.stderr)


def check_swappable(pairs, source):
    """Raises Failure if a pair is a published prompt whose responses are unknown."""
    for pair in pairs:
        if pair.messages is not None and not pair.a:
            raise Failure(
                f"--both-orders: {source}: responses of published prompts cannot be extracted, "
                f"first in {pair.id}"
            )


def pair_of(row, default_id, notes=None, singles=False):
    """A `Pair` from a row in any known form. Raises ValueError with what is wrong.

    ours         {"context": messages or "prompt": text, "a", "b", "label": "A" | "B", ...fields of `Pair`}
    preferred    {"prompt", "chosen", "rejected"}, or the whole conversations as chosen and rejected, or turns
                 after `conversations` (ShareGPT); a hash of the content chooses which side is A
    code         {"input", "accepted", "rejected"} (Code-Preference-Pairs)
    math         {"prompt", "initial_reason_steps", "full_chosen", "full_rejected"} (Math-Step-DPO)
    scored       {"context", "response1", "response2", "overall_preference"} (HelpSteer3), and
                 {"prompt", "response_1", "response_2", "preference_strength"} (HelpSteer2)
    tie          {"a", "b", "label": "tie"}; without a label, a preference of 0 or equal scores: its
                 label is None. A published row cannot be a tie
    single       {"prompt", "response", "trace"}: one response and its score; {"prompt", "trace"}: a question and its
                 criteria. Refused unless `singles`
    published    {"context_messages": [...], "winner": "model_a" | "model_b"} (RM-R1), and its SFT rows, where
                 `winner` is the oracle's trace and `ground_truth` the label

    Each may have `criteria`, see `read_criteria`. `read_conversation` reads prompts and responses. A column that
    holds a part of the conversation and has no place in the form is refused by its name (see `check_unused`). All other columns are ignored.
    notes: a set, see `read_conversation`.
    """
    row = json_object(row)
    notes = set() if notes is None else notes
    form = next((form for form in FORMS if form[0] in row and form[1] in row), None)
    if "context_messages" in row:
        pair = published_pair(row, default_id, notes)
    elif form:
        pair = pair_of_form(form, row, default_id, notes)
    elif row.get("trace") and not PAIR_COLUMNS & set(row):
        if not singles:
            raise ValueError("it has not two responses; only SFT learns from such rows")
        return single_of(row, default_id, notes)
    else:
        names = ", ".join(map(str, row)) or "none"
        raise ValueError(
            "neither a/b/label, prompt/chosen/rejected nor context_messages/winner among its "
            f"fields ({names})"
        )
    pair = replace(pair, criteria=criteria_of_row(row))
    strength = strength_of(row)
    if strength == 0 and pair.messages is not None:
        raise ValueError("its scores are equal, but a published prompt has a winner")
    if strength == 0 and form != ("a", "b"):  # that form has a label of its own
        pair = replace(pair, label=None)
    elif strength:
        pair = replace(pair, meta=pair.meta | {"strength": strength})
    said = pair.meta.get("strength", 1)
    if not is_finite(said) or said <= 0:
        raise ValueError(f"the strength in its meta is {str(said)[:60]}, expected a number above 0")
    check_pair(pair)
    return pair


# Columns of scores, the preferred response's first (UltraFeedback on the hub, in two spellings).
SCORE_COLUMNS = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"))


def strength_of(row):
    """How much better the preferred response is, in the unit of its row; 0 is a tie; None where the row does not say.

    It is the size of the preference (HelpSteer2 and 3: 1 slightly, 2, 3 much better), or the preferred response's
    score less the other one's. Scores that contradict the preference say nothing of its strength.
    """
    differences = []
    for column in PREFERENCE_COLUMNS.values():
        if is_finite(row.get(column)):
            differences.append(abs(row[column]))
    for better, worse in SCORE_COLUMNS:
        if is_finite(row.get(better)) and is_finite(row.get(worse)):
            differences.append(row[better] - row[worse])
    sound = (value for value in differences if is_finite(value) and value >= 0)
    return next(sound, None)


def check_pair(pair):
    """Raises ValueError for a label, a response or a trace that a pair cannot have."""
    if pair.label is not None:
        check_label(pair.label)
    if pair.messages is None and not (pair.a.strip() and pair.b.strip()):
        raise ValueError("a response is empty")
    if pair.a == pair.b and pair.a:
        raise ValueError("the two responses are equal")
    if not isinstance(pair.trace, str | None):
        raise ValueError("trace is not a text")


def pair_of_form(form, row, default_id, notes):
    """The pair of a row that names its responses as `form` does."""
    context, (a, b) = row_conversation(row, form, notes)
    fields = id_and_origin(row, default_id)
    answer = row.get("answer")
    if "full_chosen" in form and isinstance(answer, str):  # the reference answer of Math-Step-DPO
        fields["meta"]["answer"] = answer
    if form == ("a", "b"):
        label = row.get("label")
        if label == "tie":
            label = None
        else:
            check_label(label)
        return Pair(context=context, a=a, b=b, label=label, trace=row.get("trace"), **fields)
    if form in PREFERENCE_COLUMNS:
        label = preference(row, PREFERENCE_COLUMNS[form])
        return Pair(context=context, a=a, b=b, label=label, **fields)

    # The first response is the preferred one. The hash that chooses sides does not depend on which is which.
    content = json.dumps([context, *sorted((a, b))])
    first_byte = hashlib.sha256(content.encode()).digest()[0]
    if first_byte % 2 == 0:
        return Pair(context=context, a=a, b=b, label="A", **fields)
    fields["meta"] = {swapped_name(name): value for name, value in fields["meta"].items()}
    return Pair(context=context, a=b, b=a, label="B", **fields)


def single_of(row, default_id, notes):
    """The `Pair` of a row with one response, or with a question alone, and a trace."""
    columns = ("response",) if row.get("response") is not None else ()
    context, texts = row_conversation(row, columns, notes)
    if not isinstance(row["trace"], str):
        raise ValueError("trace is not a text")
    return Pair(
        context=context,
        a=texts[0] if texts else None,
        b=None,
        label=None,
        trace=row["trace"],
        criteria=criteria_of_row(row),
        **id_and_origin(row, default_id),
    )


def is_single(pair):
    """Is it one response, or a question alone?"""
    return pair.b is None


def preference(row, column):
    """The label of a row with a column of `PREFERENCE_COLUMNS`."""
    score = row.get(column)
    if not is_number(score) or score != score:  # NaN; math.isnan cannot take every whole number
        raise ValueError(f"{column} is {score!r}, which is no preference")
    if score == 0:
        return None
    return "A" if score < 0 else "B"


def published_pair(row, default_id, notes):
    """The pair of a published prompt, whose messages are kept word for word.

    Question and responses are read back from between the single-turn markers. A prompt with other markers,
    or with a marker inside a response, leaves the responses empty: it can be judged, but not swapped.
    """
    check_unused(row, ("context_messages",), notes)
    messages = messages_of(row["context_messages"], notes, "context_messages")
    if "ground_truth" in row:  # then `winner` is the oracle's trace
        trace, winner = row.get("winner"), row["ground_truth"]
    else:
        trace, winner = None, row.get("winner")
    if winner not in ("model_a", "model_b"):
        raise ValueError(f"unknown winner {str(winner)[:60]!r}, expected model_a or model_b")

    prompt = messages[-1]["content"]
    question, a, b = prompt, "", ""
    markers = COMPARISON.split("{}")
    if all(prompt.count(marker) == 1 for marker in markers):
        pattern = "(.*)".join(map(re.escape, markers))
        found = re.search(pattern, prompt, re.DOTALL)
        if found:
            question, a, b = found.groups()
    return Pair(
        context=[{"role": "user", "content": question}],
        a=a,
        b=b,
        label=winner[-1].upper(),
        trace=trace,
        messages=messages,
        **id_and_origin(row, default_id),
    )


# ---------------------------------------------------------------- fields of a row


def row_conversation(row, columns, notes=None):
    """The conversation of a row. -> context, [text of each response]

    columns  names of the responses; one name is a response, or a list of them under the name "responses"
    """
    notes = set() if notes is None else notes
    missing = [name for name in columns if row.get(name) is None]
    if missing:
        raise ValueError(f"no {missing[0]} among its fields ({', '.join(row) or 'none'})")
    names = [name for name in CONTEXT_COLUMNS if name in row and filled(row, name)]
    prompt_names = [name for name in names if name in PROMPT_COLUMNS and name not in columns]
    system_names = [name for name in names if name in SYSTEM_COLUMNS]
    used = (*columns, *FORMS.get(columns, ()), *prompt_names, *system_names)
    check_unused(row, used, notes)
    for name in (*prompt_names, *columns):
        if isinstance(row[name], str) and is_rendered(row[name]):
            raise ValueError(f"{name} is rendered by a chat template; give its messages")
    prompt = one_of(row, prompt_names, "the row")
    system = one_of(row, system_names, "the row")

    responses = [row.get(name) for name in columns]
    if "full_chosen" in columns:
        start = row.get("initial_reason_steps", "")
        for name, text in zip((*columns, "initial_reason_steps"), (*responses, start)):
            if not isinstance(text, str):
                raise ValueError(f"{name} is not a text")
        responses = [start + text for text in responses]
    if columns == ("responses",):
        responses, columns = row["responses"], None
    elif columns == ("response_1", "response_2"):
        prompt = marked_turns(prompt)
    prompt_name = next(iter(prompt_names), "prompt")
    return read_conversation(prompt, responses, system, columns, notes, prompt_name)


def filled(row, name):
    """Does a row say something in a column? Exports write "", [], "[]", 0 or NaN for nothing."""
    value = row.get(name)
    return bool(value) and value not in ("[]", "{}") and value == value


@functools.lru_cache
def holds_talk(name):
    """Is it the name of a column with a part of a conversation? The columns of all rows are the same few."""
    return TALK.fullmatch(name) is not None


def check_unused(row, used, notes):
    """Raises ValueError for a column that holds a part of the conversation and is not one of `used`.

    The judge would not see it, so the label may rest on what is not shown. A copy of a used column is none.
    Any other column with prose is noted, for nobody knows all names.
    """
    for name, value in row.items():
        if name in used or name in OWN_COLUMNS or not filled(row, name) or is_number(value):
            continue
        if value in map(row.get, used):
            continue
        if holds_talk(name):
            known = ", ".join(used)
            raise ValueError(
                f"its column {name} is not read beside {known}; put it into the prompt, or drop it"
            )
        if holds_prose(value):
            notes.add(f"a column {name} that is not read")


def holds_prose(value):
    """Is it a text of some words, a message, or a list or object with one?"""
    if isinstance(value, str):
        return value.count(" ") >= 5 or (len(value) >= 20 and not value.isascii())
    if is_message(value):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list | tuple) and any(map(holds_prose, parts))


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value):
    """Is it a number, and no NaN, no infinity, and no whole number that is too large for a float?"""
    return is_number(value) and abs(value) <= sys.float_info.max


def id_and_origin(row, default_id):
    """{id, source, type, meta} of a row; an id may be a number. Raises ValueError for other types."""
    kinds = {"id": str | int, "source": str, "type": str, "meta": dict}
    for name, kind in kinds.items():
        if name in row and not isinstance(row[name], kind):
            raise ValueError(f"{name} is not {'an object' if kind is dict else 'a text'}")
    return {
        "id": str(row.get("id", default_id)),
        "source": row.get("source", ""),
        "type": row.get("type", ""),
        # Dates and other values of a parquet file become texts here: they are written again at the end.
        "meta": json.loads(json.dumps(row["meta"], default=str)) if row.get("meta") else {},
    }
