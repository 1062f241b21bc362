"""What README and docs say can be typed and followed: commands, flags, files, links, tests. Flags are read
from the scripts' text, so that nothing has to start."""
import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/ISSUE_TEMPLATE/*.md")])
FOLDERS = ("", "data", "bench", "launch", "tests", "docs", "assets")
# Flags that docs name without the command of another program to which they belong.
FOREIGN = {"--hf-overrides", "--reward.remote_url", "--env.n"}
OTHERS = {"vllm", "curl", "pip", "git", "sbatch"}          # programs whose flags are not ours


# ---------------------------------------------------------------- what a page says

def code_of(text):
    """-> its block lines, continued ones joined; the pieces in backticks; the rest of its text"""
    blocks, prose, fenced = [], [], False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        if fenced or fence or line.startswith("    "):
            blocks.append("" if fence else line)
            prose.append("")
        else:
            prose.append(line)
    joined = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    prose = "\n".join(prose)
    return joined, re.findall(r"`([^`]+)`", prose), re.sub(r"`[^`]+`", "", prose)


def words_of(command):
    try:
        return shlex.split(command, comments=True)
    except ValueError:                                     # an apostrophe: no command, but files may be in it
        return command.split()


def commands(text):
    """The commands of a page, each a list of words, without what stands before as NAME=value."""
    blocks, pieces, _ = code_of(text)
    for line in blocks + pieces:
        part = []
        for word in [*words_of(line), "&&"]:
            if word in ("&&", "&", "|", ";"):
                if part:
                    yield part
                part = []
            elif part or not re.match(r"[A-Z_0-9]+=", word):
                part.append(word)


def file_of(name):
    """Where a file is that docs may name by its last part only."""
    return next((p for folder in FOLDERS if (p := ROOT / folder / name).is_file()), None)


# ---------------------------------------------------------------- what scripts know

@cache
def flags_of(path, sub=None):
    """The flags that a script adds to its parser, or (`sub`) those of one of its subcommands."""
    if path.name == "eval.py" and sub in ("report", "compare"):
        path = ROOT / "report.py"
    tree, found = ast.parse(path.read_text()), set()
    if path.name == "report.py":
        tree = next((f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == sub), tree)

    def visit(node):
        if isinstance(node, ast.If) and (m := re.fullmatch(r"run is (not )?(\w+)", ast.unparse(node.test))):
            for one in node.body if (m[2] == sub) != bool(m[1]) else node.orelse:
                visit(one)
            return
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "R.flags":
                found.update(flags_of(ROOT / "ranks.py"))
            if called == "flags" and len(node.args) == 2:            # of askers.py: those that are named
                found.update(f"--{name}" for name in node.args[1].value.split())
            if called == "common.flags":
                found.update(flags_of(ROOT / "bench/common.py"))
            for a in node.args[:1] if called.split(".")[-1] in ("arg", "add_argument") else ():
                if isinstance(a, ast.Constant) and a.value.startswith("--"):
                    found.add(a.value)
                    if "BooleanOptionalAction" in ast.unparse(node):
                        found.add(a.value.replace("--", "--no-", 1))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return frozenset(found)


SUBCOMMANDS = {"eval.py": ("report", "compare"), "rmr1.py": ("judge", "rank", "reward", "select")}


@cache
def all_flags():
    scripts = [p for folder in ("", "data", "bench", "tests") for p in (ROOT / folder).glob("*.py")]
    return frozenset({"--help"}).union(FOREIGN, *(
        flags_of(p, sub) for p in scripts for sub in (None, *SUBCOMMANDS.get(p.name, ()))))


# ---------------------------------------------------------------- the rules: page and text to faults

def wrong_commands(page, text):
    for words in commands(text):
        said, first = " ".join(words), words[0]
        for word in words:
            # What a reader makes lies in runs/, which git ignores.
            if re.fullmatch(r"(?!runs/)[\w./-]+\.(py|sh|sbatch)", word) and not file_of(word):
                yield f"{said}: there is no {word}"
        if first == "make":
            made = (ROOT / "Makefile").read_text()
            for word in words[1:]:
                name, is_set, _ = word.partition("=")
                if not re.search(rf"^{name} *\?=" if is_set else rf"^{name}:", made, re.MULTILINE):
                    yield f"{said}: the Makefile has no {name}"
        flags = lambda some: {w.partition("=")[0] for w in some if re.match("--[a-z]", w)}
        at = next((i for i, w in enumerate(words) if re.search(r"\.(py|sh|sbatch)$", w) and file_of(w)), None)
        if at is None:
            if Path(first).name not in OTHERS and first not in ("python", "torchrun"):
                yield from (f"{said}: no script has {f}" for f in flags(words) - all_flags())
            continue
        script, rest = file_of(words[at]), words[at + 1:]
        if "--" in rest:                                   # what follows goes to vLLM
            rest = rest[:rest.index("--")]
        sub = next((w for w in rest[:1] if w in SUBCOMMANDS.get(script.name, ())), None)
        if script.name == "rmr1.py" and flags(rest) and not sub:
            yield f"{said}: rmr1.py wants one of {', '.join(SUBCOMMANDS['rmr1.py'])}"
            continue
        if script.suffix != ".py":
            size, stage = [*rest, "", ""][:2]
            if rest and not all(f"{x}) " in (ROOT / "launch/rm-r1.sh").read_text() for x in (size, stage)):
                yield f"{said}: no such size or stage"
            script = ROOT / ("sft.py" if stage == "sft" else "grpo.py")
        for flag in flags(rest) - flags_of(script, sub) - {"--help"}:
            yield f"{said}: {script.name} has no {flag}"


def anchors(path):
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall("^#+ (.+)$", re.sub("```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def unknown_names(page, text):
    """`module.name` in backticks is a word of that module's file."""
    for piece in code_of(text)[1]:
        if (m := re.fullmatch(r"(\w+)\.(\w+)", piece)) and (path := file_of(f"{m[1]}.py")) and m[2] != "py":
            if not re.search(rf"\b{m[2]}\b", path.read_text()):
                yield f"{piece}: {path.name} has no {m[2]}"


def broken_links(page, text):
    for link in re.findall(r"\]\(([^)\s]+)\)", code_of(text)[2]):
        if re.match("https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


def typed_counts(page, text):
    """Counts of lines go wrong with the next commit, and `wc` has them."""
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if re.fullmatch(r"`[\w/]+\.py`", cells[0]) and any(re.fullmatch(r"[\d,]+", c) for c in cells[1:]) or \
                ".py" in line and re.search(r"\b\d[\d,]* lines\b", line):
            yield f"{line[:60]}: a count of lines"


def unknown_tests(page, text):
    """Names in a column headed "shown by `tests/`" are files of tests, or parts of tests' names."""
    tests = "".join(p.read_text() for p in ROOT.glob("tests/test_*.py"))
    known = "\n".join(re.findall(r"def (test_\w+)", tests))
    column = None
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif "shown by `tests/`" in cells:
            column = cells.index("shown by `tests/`")
        elif column is not None:
            names = re.findall(r"`([\w.]+)`", cells[column])
            if not names and "---" not in line:
                yield f"{line[:60]}: shown by nothing"
            for name in names:
                if not ((ROOT / "tests" / name).is_file() if name.endswith(".py") else name in known):
                    yield f"{name}: no such test"


def too_big(page, text):
    lines = text.splitlines()
    if len(lines) > 150:
        yield f"{len(lines)} lines; what does not fit into 150 belongs in docs/"
    for n, line in enumerate(lines, 1):
        shown = re.sub(r"\]\([^)]*\)", "]", line)
        if len(shown) > 80 and not line.startswith(("|", "    ")):
            yield f"line {n} is {len(shown)} wide"


def unlinked(page, text):
    for path in ROOT.glob("docs/*.md"):
        if f"](docs/{path.name}" not in text:
            yield f"docs/{path.name} is not linked"


# ---------------------------------------------------------------- the tests

@pytest.mark.parametrize("rule", [wrong_commands, unknown_names, broken_links, typed_counts, unknown_tests])
def test_pages(rule):
    faults = [f"{page.relative_to(ROOT)}: {x}" for page in PAGES for x in rule(page, page.read_text())]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("rule", [too_big, unlinked])
def test_readme(rule):
    faults = list(rule(ROOT / "README.md", (ROOT / "README.md").read_text()))
    assert not faults, "\n".join(faults)


def test_readme_has_the_results_of_its_page():
    """The first table is an excerpt of the one in docs/results.md."""
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [r for r in (re.findall(r"\| ([\d.]+)(?= \|)", line) for line in lines) if len(r) == 3]
    results = (ROOT / "docs/results.md").read_text()
    assert rows
    for row in rows:
        assert re.search(" +".join(map(re.escape, row)) + "$", results, re.MULTILINE), row


SHOWN = "| what | shown by `tests/` |\n|---|---|\n"


@pytest.mark.parametrize("rule, text", [
    (wrong_commands, "    python sft.py --batchsize 3"),
    (wrong_commands, "Use `--batchsize`."),
    (wrong_commands, "```\npython \\\n  grpo.py --pairs 8 \\\n  --batch 3  # of another script\n```"),
    (wrong_commands, "`torchrun --nproc_per_node 8 stf.py`"),
    (wrong_commands, "    make demos"),
    (wrong_commands, "`make demo SEEDS=1`"),
    (wrong_commands, "    python rmr1.py judge --model M --count 3"),
    (wrong_commands, "    python eval.py report DIR --model M"),
    (wrong_commands, "    python eval.py --model M --training DIR"),
    (wrong_commands, "`launch/rm-r1.sh 8b sft`"),
    (wrong_commands, "`launch/rm-r1.sh 7b sft --beta 0`"),
    (wrong_commands, "    A=1 python bench/step.py grpo --layer 3"),
    (wrong_commands, "    python serve.py --model M --data-parallel-size 8"),
    (unknown_names, "a term of `grpo.rewards_of`"),
    (broken_links, "[a](no.md)"),
    (broken_links, "[a\nb](results.md#no-such-heading)"),
    (broken_links, "[a](../README.md#no)"),
    (typed_counts, "| `sft.py` | 129 | stage 1 |"),
    (typed_counts, "grpo.py has 475 lines."),
    (unknown_tests, SHOWN + "| x | `no_such_test_at_all` |"),
    (unknown_tests, SHOWN + "| x | |"),
    (too_big, "x\n" * 151),
    (too_big, "x" * 81),
    (unlinked, "docs/data.md")])
def test_the_rules_can_fail(rule, text):
    assert list(rule(ROOT / "docs/page.md", text))


@pytest.mark.parametrize("text", [
    "    OMP_NUM_THREADS=2 python serve.py --model M -- --data-parallel-size 8",
    "    python sft.py --no-recompute --seed 3",
    "    python bench/step.py grpo --layers 3 --trl trl/bin/python",
    "    python rmr1.py select --model M --data F --count 3",
    "    python eval.py compare A B --all",
    "    make controls SEED=1 && make test PY=python READY=",
    "    vllm serve MODEL --port 3",
    "`launch/rm-r1.sh 7b grpo --beta 0`"])
def test_what_is_right_passes(text):
    assert not list(wrong_commands(ROOT / "docs/page.md", text))


def test_flags_are_those_of_help():
    """What is read from the text of a script, beside what it prints itself."""
    for script, *sub in (["bench/step.py"], ["eval.py", "report"]):
        command = [sys.executable, ROOT / script, *sub, "--help"]
        shown = subprocess.run(command, capture_output=True, text=True).stdout
        assert set(re.findall(r"\[(--[a-z][\w-]*)", shown)) - {"--help"} == flags_of(ROOT / script, *sub)


def test_the_forks_of_the_docs_apply():
    """docs/training.md, "Fork it": what every diff expects stands in the file it names, once, and it changes at most
    12 lines."""
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.S)
    assert len(diffs) == 5
    for diff in diffs:
        name, *hunks = re.split(r"^@@.*\n", diff, flags=re.M)
        text, changed = (ROOT / re.search(r"\+\+\+ (\S+)", name)[1]).read_text(), 0
        for lines in (hunk.splitlines() for hunk in hunks):
            before = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
            assert text.count(before) == 1, before
            changed += sum(line[:1] in ("+", "-") for line in lines)
        assert 0 < changed <= 12
