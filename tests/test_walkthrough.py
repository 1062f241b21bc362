"""docs/walkthrough.md prints what it says it prints, and its exercises can be failed and passed.

python tests/test_walkthrough.py        # write what its code prints now into the document
"""

import contextlib
import re
import shlex
import tempfile
from decimal import Decimal
from pathlib import Path

import pytest

from conftest import ROOT, run

DOCUMENT = ROOT / "docs/walkthrough.md"
BLOCK = re.compile(r"^```(sh|python|text)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-\d+)?")


def lesson():
    """The document up to its exercises, which a student runs."""
    return DOCUMENT.read_text().partition("\n## Exercises\n")[0]


def run_blocks(text, folder):
    """Run a document's commands, then its Python blocks in one process, in `folder` for runs/walk.
    -> [what each Python block prints]"""
    blocks = [(kind, code.replace("runs/walk", str(folder))) for kind, code in BLOCK.findall(text)]
    for kind, code in blocks:
        if kind == "sh":
            for line in code.splitlines():
                run(*shlex.split(line)[1:])  # without the word python
    script = folder / "lesson.py"
    programs = [code for kind, code in blocks if kind == "python"]
    script.write_text("print('\\0', end='')\n".join(programs))
    return run(script).stdout.split("\0")


def is_near(x, y):
    """Are two numbers equal? Whole ones exactly, others to a unit of the last digit that is printed."""
    digits = max(x.as_tuple().exponent, y.as_tuple().exponent)
    return x == y if digits == 0 else abs(x - y) <= Decimal(1).scaleb(digits)


def is_same(printed, expected):
    """Do two texts say the same? Machines differ in the order of their sums, so numbers need only be near."""
    texts = [NUMBER.sub("#", " ".join(text.split())) for text in (printed, expected)]
    numbers = [list(map(Decimal, NUMBER.findall(text))) for text in (printed, expected)]
    return texts[0] == texts[1] and all(map(is_near, *numbers))


def test_the_document_says_what_its_code_prints(tmp_path):
    blocks = BLOCK.findall(lesson())
    expected = []
    for (kind, _), (next_kind, text) in zip(blocks, blocks[1:]):
        if kind == "python" and next_kind == "text":
            expected.append(text)
    outputs = run_blocks(lesson(), tmp_path)
    assert len(expected) == len(outputs)
    for number, (text, output) in enumerate(zip(expected, outputs)):
        assert is_same(output, text), f"block {number} prints\n{output}"


EXERCISES = re.split(r"^### ", DOCUMENT.read_text().partition("\n## Exercises\n")[2], flags=re.M)[
    1:
]


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda text: text.split("\n")[0])
def test_an_exercise_is_red_until_it_is_solved(exercise):
    task, solution = (code for kind, code in BLOCK.findall(exercise) if kind == "python")
    assert exercise.index("<details>") < exercise.index(solution) < exercise.index("</details>")
    for code, green in ((task, False), (task + solution, True)):
        names = {}
        exec(code, names)
        (check,) = (f for name, f in names.items() if name.startswith("test_"))
        with (
            contextlib.nullcontext()
            if green
            else pytest.raises((AssertionError, pytest.fail.Exception))
        ):
            check()


def rewrite():
    """Write what the code prints now into the document."""
    document, text = DOCUMENT.read_text(), lesson()
    with tempfile.TemporaryDirectory() as folder:
        outputs = iter(run_blocks(text, Path(folder)))

    def fresh_block(match):
        if match[1] != "text":
            return match[0]
        return f"```text\n{next(outputs).rstrip()}\n```"

    DOCUMENT.write_text(BLOCK.sub(fresh_block, text) + document[len(text) :])


if __name__ == "__main__":
    rewrite()
