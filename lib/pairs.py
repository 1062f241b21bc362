"""
Conversations and pairs: one reader for every published form of row, and the markers of a prompt.

A **pair** is a conversation and two responses, A and B, of which people preferred one. Text only, no torch.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from lib.files import Failure, json_object, read_rows, this_rank

# ---------------------------------------------------------------- markers

# The user message about a single turn: the question and both responses, between the published markers.
COMPARISON = (
    "[Client Question]\n{}\n\n"
    "[The Start of Chatbot A's Response]\n{}\n[The End of Chatbot A's Response]\n\n"
    "[The Start of Chatbot B's Response]\n{}\n[The End of Chatbot B's Response]"
)
# The opening bracket of every published marker, those of multi-turn prompts included.
MARKER = re.compile(
    r"\[(?=Client Question\]|The (?:Start|End) of (?:Chatbot [AB]'s Response|"
    r"the Conversation between Chatbot [AB] and the Client)\])"
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
              from which they cannot be extracted (a multi-turn one)
    label     "A" or "B": the response that people preferred; None where neither is better
    source    where the pair came from
    type      "chat", "reasoning" or whatever its source says
    trace     an oracle's judgment of it (SFT rows), else None
    messages  the chat messages of a published dataset, used word for word; None where we write our own
    meta      anything else, e.g. {"style_a": 0, "style_b": 2} in the synthetic world
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
        if self.messages is None:
            row["context"] = self.context
            row["a"] = self.a
            row["b"] = self.b
            row["label"] = self.label
            row["trace"] = trace
        else:
            winner = f"model_{self.label.lower()}"
            row["context_messages"] = self.messages
            row["winner"] = trace or winner
            row["ground_truth"] = winner if trace else None
        row["meta"] = self.meta
        row |= more
        return {name: value for name, value in row.items() if value not in (None, {})}


def other_label(label):
    """The label of the other side; None stays None."""
    return {"A": "B", "B": "A", None: None}[label]


def swapped_name(name):
    """The name of a `meta` field for the other side: style_a and style_b change places, others stay."""
    if name.endswith("_a"):
        return name[:-1] + "b"
    if name.endswith("_b"):
        return name[:-1] + "a"
    return name


# ---------------------------------------------------------------- reading pairs


def read_pairs(source, skip_bad=False, both_orders=False):
    """All pairs of a JSONL, JSON or parquet file, or of the train split of a hub dataset owner/name.

    skip_bad     report bad rows, count them and leave them out; else the first one ends the program
    both_orders  refuse published prompts that cannot be swapped

    The rows have one of three forms:

    ours       {"context": [...] or "prompt": str, "a", "b", "label": "A" | "B", ...the fields of `Pair`}
    preferred  {"prompt": str or messages, "chosen": str, "rejected": str}; a hash of the content chooses
               which side is A
    published  {"context_messages": [...], "winner": "model_a" | "model_b"}, and its SFT rows, where `winner`
               is the oracle's trace and `ground_truth` the label

    A null field is an absent one. Raises Failure with the file and the line.
    """
    pairs, bad_lines = [], []
    for number, row, error in read_rows(source):
        try:
            if error:
                raise ValueError(error)
            pairs.append(pair_of(row, default_id=f"{Path(str(source)).stem}-{number}"))
        except ValueError as unusable:
            bad_lines.append(f"{source}:{number}: {unusable}")

    bad_count = len(bad_lines)
    if bad_lines and not skip_bad:
        more = f" (and {bad_count - 1} more bad lines)" if bad_count > 1 else ""
        raise Failure(f"{bad_lines[0]}{more}; mend it, or leave bad lines out with --skip-bad")
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
    return pairs


def check_swappable(pairs, source):
    """Raises Failure if a pair is a published prompt whose responses are unknown."""
    for pair in pairs:
        if pair.messages is not None and not pair.a:
            raise Failure(
                f"--both-orders: {source}: responses of published prompts cannot be extracted, "
                f"first in {pair.id}"
            )


def pair_of(row, default_id):
    """A `Pair` from a row in any of the three forms. Raises ValueError with what is wrong."""
    row = json_object(row)
    if "context_messages" in row:
        pair = published_pair(row, default_id)
    elif "chosen" in row and "rejected" in row:
        pair = preferred_pair(row, default_id)
    elif "a" in row and "b" in row:
        pair = Pair(
            context=messages_of(row.get("context", row.get("prompt"))),
            a=field_text(row, "a"),
            b=field_text(row, "b"),
            label=row.get("label"),
            trace=row.get("trace"),
            **id_and_origin(row, default_id),
        )
    else:
        names = ", ".join(map(str, row)) or "none"
        raise ValueError(
            "neither a/b/label, prompt/chosen/rejected nor context_messages/winner among its "
            f"fields ({names})"
        )
    check_pair(pair)
    return pair


def check_pair(pair):
    """Raises ValueError for a label, a response or a trace that a pair cannot have."""
    if pair.label not in ("A", "B"):
        raise ValueError(f'unknown label {pair.label!r}, expected "A" or "B"')
    if pair.messages is None and not pair.a.strip():
        raise ValueError("response A is empty")
    if pair.messages is None and not pair.b.strip():
        raise ValueError("response B is empty")
    if pair.a == pair.b and pair.a:
        raise ValueError("the two responses are equal")
    if not isinstance(pair.trace, str | None):
        raise ValueError("trace is not a text")


def preferred_pair(row, default_id):
    """A row with `chosen` and `rejected`. The hash that chooses sides does not depend on which is which."""
    pair = Pair(
        context=messages_of(row.get("context", row.get("prompt"))),
        a=field_text(row, "chosen"),
        b=field_text(row, "rejected"),
        label="A",
        **id_and_origin(row, default_id),
    )
    content = json.dumps([pair.context, *sorted((pair.a, pair.b))])
    first_byte = hashlib.sha256(content.encode()).digest()[0]
    return pair.swapped() if first_byte % 2 else pair


def published_pair(row, default_id):
    """The pair of a published prompt, whose messages are kept word for word.

    Question and responses are read back from between the single-turn markers. A prompt with other markers,
    or with a marker inside a response, leaves the responses empty: it can be judged, but not swapped.
    """
    messages = messages_of(row["context_messages"])
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
        "meta": row.get("meta", {}),
    }


def messages_of(value):
    """The messages of a context: a text is one message of the user.

    Messages keep their role and content only. Raises ValueError unless the last one is the user's.
    """
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(
            "the context is missing: give prompt (a text) or context (a list of messages)"
        )
    if not all(map(is_message, value)):
        raise ValueError("a context message is not {role, content}")
    if value[-1]["role"] != "user":
        raise ValueError("the context does not end with a user message")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def is_message(value):
    """True for an object with a role and a content that are texts."""
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def last_content(response):
    """What a response says: of messages the last one's content, anything else as it is."""
    if isinstance(response, list) and response and isinstance(response[-1], dict):
        return response[-1].get("content")
    return response


def field_text(row, name):
    """The text of a row's field, which may be a response as messages. Raises ValueError."""
    text = last_content(row.get(name))
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a text")
    return text


def text_or_none(response):
    """The text of a response; None where that is empty or no text."""
    text = last_content(response)
    return text if isinstance(text, str) and text.strip() else None


def response_text(response):
    """The text of a response. Raises ValueError where that is empty or no text."""
    text = text_or_none(response)
    if text is None:
        raise ValueError("a response is empty, or not a text")
    return text
