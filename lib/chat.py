"""
Tokenizer and chat template: from messages to token ids, and from sampled ids back to text.

transformers is imported inside the one function that loads a tokenizer: whoever asks a server, or only counts
what is on disk, imports this module and needs no package but numpy.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np

from lib.files import Failure, first_line


def load_tokenizer(folder):
    """The tokenizer of a model folder, and the ids that end its turn. -> tokenizer, [id, ...]

    Raises Failure for a tokenizer without a chat template, without an end of turn, or that is broken.
    """
    sample = "Judge A and B."
    path = Path(folder) / "generation_config.json"
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = json.loads(path.read_text()) if path.exists() else {}
        more = config.get("eos_token_id")
        more = [] if more is None else more
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
    end = tokenizer.eos_token_id
    more = more if isinstance(more, list) else [more]
    return tokenizer, [end, *(extra for extra in more if extra != end)]


def encode(tokenizer, messages):
    """The token ids of a prompt, up to where the judge begins to write. -> int32 (tokens,)

    The template brings its own BOS. From here on only ids travel, so a prompt cannot get a second one.
    Raises Failure where the template refuses the messages.
    """
    messages = without_control_tokens(tokenizer, messages)
    reason, cause = "it writes nothing", None
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if ids:
            return np.array(ids, np.int32)  # (tokens,)
    except Exception as error:  # a template is the model's own program, and fails in its own ways
        reason, cause = " ".join(str(error).split())[:200], error
    advice = ""
    if messages[0]["role"] == "system":
        advice = "; if it knows no system message, try --protocol reasoning"
    raise Failure(
        f"{tokenizer.name_or_path}: its chat template refuses the prompt ({reason}){advice}"
    ) from cause


def without_control_tokens(tokenizer, messages):
    """The messages without control tokens, ready for a chat template.

    The tokenizer reads a control token wherever a text spells one: a response with `<|im_end|>` in it would
    end the user's turn and go on as the judge. A space behind the first character makes plain text of it,
    in published messages too; other texts keep their ids. Half a surrogate pair, which JSON can bring and a
    tokenizer refuses, becomes a question mark.
    """
    control = control_tokens(tokenizer)
    cleaned = []
    for message in messages:
        content = control.sub(space_inside, message["content"])
        content = content.encode(errors="replace").decode()
        cleaned.append({**message, "content": content})
    return cleaned


def space_inside(found):
    """The text of a match with a space behind its first character."""
    return f"{found[0][0]} {found[0][1:]}"


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """A pattern for the control tokens as a text spells them.

    They are the special tokens, and those that look like one: DeepSeek's <｜User｜> and <｜Assistant｜> are
    not special by its tokenizer file.
    """
    spellings = []
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or re.fullmatch(r"<[|｜].+[|｜]>", token.content):
            spellings.append(re.escape(token.content))
    matches_nothing = "(?!)"
    return re.compile("|".join(spellings) or matches_nothing)


def decode_sample(tokenizer, prompt, tokens):
    """The text of a judgment, special tokens included, because the published reward reads them too.

    prompt  the ids of its prompt
    tokens  the sampled ids

    Where the template has opened the thinking (DeepSeek's prompt ends in `<think>`), it is put back in front,
    so that the parser sees where the thinking ends.
    """
    opened = tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>")
    return ("<think>\n" if opened else "") + tokenizer.decode(tokens)
