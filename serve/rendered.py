"""
Prompts and responses as a trainer's chat template has rendered them, taken apart again.

A trainer that sends texts only (OpenRLHF) sends the control tokens of its policy's template with them. The judge
has a template of its own, and must see what was said and not how another model spells it.
"""

import re

from lib.pairs import BEGINS_RENDERED, ENDS_RENDERED, ROLES, messages_of

# The opening of a turn, whose group names the role, and what ends a turn.
# A template marked "open" does not end every turn: there a turn ends where the next one begins.
TEMPLATES = {
    "ChatML": (r"<\|im_start\|>(\w+)(?:\n|<\|im_sep\|>)", r"<\|im_end\|>", "closed"),
    "Llama 3": (r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n", r"<\|eot_id\|>", "closed"),
    "Llama 4": (r"<\|header_start\|>(\w+)<\|header_end\|>\n\n", r"<\|eot\|>", "closed"),
    "Gemma": (r"<start_of_turn>(\w+)\n", r"<end_of_turn>", "closed"),
    "Gemma 4": (r"<\|turn>(\w+)\n", r"<turn\|>", "closed"),
    "Command R": (
        r"<\|START_OF_TURN_TOKEN\|><\|(\w+)_TOKEN\|>(?:<\|START_RESPONSE\|>)?",
        r"(?:<\|END_RESPONSE\|>)?<\|END_OF_TURN_TOKEN\|>",
        "closed",
    ),
    "Granite": (r"<\|start_of_role\|>(\w+)<\|end_of_role\|>", r"<\|end_of_text\|>", "closed"),
    "Phi-3, GLM, OLMo, Tulu, Zephyr": (
        r"<\|(system|user|assistant|observation)\|>",
        r"<\|end\|>|<\|endoftext\|>|</s>",
        "open",
    ),
    "DeepSeek": (r"<｜(User|Assistant)｜>", r"<｜end▁of▁sentence｜>", "open"),
    "Mistral, Llama 2": (
        r"(\[SYSTEM_PROMPT\]|\[INST\] ?<<SYS>>|<</SYS>>|\[INST\]|\[/INST\])",
        r"\[/SYSTEM_PROMPT\]|</s>(?:<s>)?",
        "open",
    ),
}
BRACKETS = {  # whose turn begins behind a bracket of Mistral's or Llama 2's
    "[system_prompt]": "system",
    "[inst]<<sys>>": "system",
    "<</sys>>": "user",
    "[inst]": "user",
    "[/inst]": "assistant",
}

# What stands before the first turn: a token that begins a text, and padding.
BEGINNING = re.compile(
    r"(?:<s>|<bos>|<BOS_TOKEN>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|<\|startoftext\|>|"
    r"\[gMASK\]|<sop>|<pad>|<\|pad\|>|<\|endoftext\|>|\s)*"
)
TAGS = re.compile(r"(?:\s|<[^<>\n]{1,40}>)*")  # with which a template opens a response
NO_THOUGHT = re.compile(r"\A<think>\s*</think>\s*")

# The tokens that end a response.
END = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|eot|endoftext|end_of_text|end|return|user|observation|pad|"
    r"END_RESPONSE|END_OF_TURN_TOKEN)\|>|</s>|<eos>|<pad>|<end_of_turn>|<turn\|>|<｜end▁of▁sentence｜>"
)


def rendered_context(prompt):
    """The chat messages of a prompt that a trainer may have put through its chat template.

    A prompt is rendered if a control token begins or ends it. Then it is taken apart, from its first turn to the
    assistant's, which is open and whose text is the response. Raises ValueError for a rendered prompt of a
    template that is not known, or that is cut: the judge would read control tokens as what somebody said.
    Every other prompt is the user's message word for word, since it may quote a template.
    """
    tail = prompt.rstrip()[-200:]  # bounded, since anybody can send such texts
    if not BEGINS_RENDERED.match(prompt) and not ENDS_RENDERED.search(tail):
        return messages_of(prompt)
    for opening, end, kind in TEMPLATES.values():
        messages = turns(prompt, opening, end, kind)
        if messages:
            return messages_of(messages)
    raise ValueError(
        "it begins or ends with a control token, and is no whole prompt of a chat template that is known "
        f"({', '.join(TEMPLATES)}); /reward takes messages"
    )


def turns(prompt, opening, end, kind):
    """The messages of a prompt that one template has rendered as a whole, else None."""
    beginning = BEGINNING.match(prompt).end()
    head, *parts = re.split(opening, prompt[beginning:])
    names = [name.lower().replace(" ", "") for name in parts[::2]]
    roles = [(BRACKETS | ROLES).get(name, name) for name in names]
    if not roles or roles[-1] != "assistant" or not TAGS.fullmatch(parts[-1]):
        return None

    messages = []
    if head:  # DeepSeek's system message has no opening but the token that begins the text
        if roles[0] != "user" or "｜" not in prompt[:beginning]:
            return None
        messages.append({"role": "system", "content": head})
    for role, text in zip(roles[:-1], parts[1:-1:2]):
        last_end = re.search(rf"(?:{end})\s*\Z", text)
        content = text[: last_end.start()] if last_end else text
        within = content.replace("</s>", "")  # is HTML, too
        if re.search(end, within) or (kind == "closed" and not last_end):
            return None
        if kind == "open":  # white space between turns is the template's
            content = content.strip()
        if role == "assistant":
            content = NO_THOUGHT.sub("", content)
        if content.strip() or role != "system":  # some templates write an empty system turn
            messages.append({"role": role, "content": content})

    # Where turns have no ends, a text that quotes the opening of a turn looks like two of them.
    spoken = [message["role"] for message in messages] + ["assistant"]
    repeated = any(role == after != "tool" for role, after in zip(spoken, spoken[1:]))
    return None if repeated and kind == "open" else messages


def without_end(response):
    """A response without the tokens that end it. In linear time, since anybody can send such texts."""
    end = len(response)
    for token in reversed(list(END.finditer(response))):
        if response[token.end() : end].strip():
            break
        end = token.start()
    return response[:end]
