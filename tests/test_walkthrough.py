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
BLOCK = re.compile(r"^```(sh|python|text|diff)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-\d+)?")


def lesson():
    """The document up to its exercises, which a student runs."""
    return DOCUMENT.read_text().partition("\n## Exercises\n")[0]


def printed(text, folder):
    """Run a document's commands, then its Python blocks in one process, in `folder` for runs/walk.
    -> [what each Python block prints]"""
    blocks = [(kind, code.replace("runs/walk", str(folder))) for kind, code in BLOCK.findall(text)]
    for line in "".join(code for kind, code in blocks if kind == "sh").splitlines():
        run(*shlex.split(line)[1:])                                # without the word python
    script = folder / "lesson.py"
    script.write_text("print('\\0', end='')\n".join(code for kind, code in blocks if kind == "python"))
    return run(script).stdout.split("\0")


def same(said, got):
    """Do two texts say the same? Whole numbers have to be equal, others to a unit of the last digit printed:
    machines differ in the order of their sums."""
    def near(x, y):
        digits = max(x.as_tuple().exponent, y.as_tuple().exponent)
        return x == y if digits == 0 else abs(x - y) <= Decimal(1).scaleb(digits)

    (words, numbers), (others, found) = (
        (NUMBER.sub("#", " ".join(text.split())), map(Decimal, NUMBER.findall(text))) for text in (said, got))
    return words == others and all(map(near, numbers, found))


def test_the_document_says_what_its_code_prints(tmp_path):
    blocks = BLOCK.findall(lesson())
    said = [text for (kind, _), (after, text) in zip(blocks, blocks[1:]) if kind == "python" and after == "text"]
    got = printed(lesson(), tmp_path)
    assert len(said) == len(got)
    for number, (one, two) in enumerate(zip(said, got)):
        assert same(one, two), f"block {number} prints\n{two}"


EXERCISES = re.split(r"^### ", DOCUMENT.read_text().partition("\n## Exercises\n")[2], flags=re.M)[1:]


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda text: text.split("\n")[0])
def test_an_exercise_is_red_until_it_is_solved(exercise):
    task, solution = (code for kind, code in BLOCK.findall(exercise) if kind == "python")
    assert exercise.index("<details>") < exercise.index(solution) < exercise.index("</details>")
    for code, green in ((task, False), (task + solution, True)):
        names = {}
        exec(code, names)
        check, = (f for name, f in names.items() if name.startswith("test_"))
        with contextlib.nullcontext() if green else pytest.raises((AssertionError, pytest.fail.Exception)):
            check()


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda text: text.split("\n")[0])
def test_an_exercise_names_its_place_in_grpo(exercise):
    """The lines of its diff that grpo.py should have are there, together, once."""
    diff, = (code for kind, code in BLOCK.findall(exercise) if kind == "diff")
    before = "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in " -")
    assert (ROOT / "grpo.py").read_text().count("\n" + before) == 1


def rewrite():
    whole, text = DOCUMENT.read_text(), lesson()
    with tempfile.TemporaryDirectory() as folder:
        outputs = iter(printed(text, Path(folder)))
    fresh = BLOCK.sub(lambda m: f"```text\n{next(outputs).rstrip()}\n```" if m[1] == "text" else m[0], text)
    DOCUMENT.write_text(fresh + whole[len(text):])


if __name__ == "__main__":
    rewrite()
