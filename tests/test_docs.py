"""What README and docs say can be typed and followed: commands, flags, files, links, names, tests.

The scripts themselves say which flags they know: their --help is asked, in processes that have the imports.
"""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from test_criteria import Model

import rmr1
from conftest import ROOT, run

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/ISSUE_TEMPLATE/*.md")]
)
# Where a file may be that a page names by its last part only.
FOLDERS = (
    "",
    "lib",
    "judge",
    "serve",
    "forks",
    "tools",
    "data",
    "bench",
    "launch",
    "tests",
    "docs",
    "assets",
)
SUBCOMMANDS = {
    "eval.py": ("report", "compare"),
    "rmr1.py": ("judge", "rank", "score", "reward", "select"),
}

OTHER_PROGRAMS = {"vllm", "curl", "pip", "git", "sbatch", "tensorboard"}  # their flags are not ours
# Flags of other programs that pages name without their command.
OTHER_FLAGS = {"--hf-overrides", "--reward.remote_url", "--env.n", "--nproc_per_node"}


# ---------------------------------------------------------------- what a page says


def split_page(text):
    """-> lines of its code blocks, continued ones joined; pieces in backticks; the text without them"""
    code, prose = [], []
    fenced = False
    for line in text.splitlines():
        is_fence = line.lstrip().startswith("```")
        if is_fence:
            fenced = not fenced
            code.append("")
            prose.append("")
        elif fenced or line.startswith("    "):
            code.append(line)
            prose.append("")
        else:
            prose.append(line)
    joined = re.sub(r"\\\n\s*", "", "\n".join(code))
    prose = "\n".join(prose)
    pieces = re.findall(r"`([^`]+)`", prose)
    return joined.splitlines(), pieces, re.sub(r"`[^`]+`", "", prose)


def words_of(line):
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an apostrophe: no command, but it may name files
        return line.split()


def commands_of(text):
    """The commands of a page, each a list of words, without the NAME=value before them."""
    lines, pieces, _ = split_page(text)
    for line in lines + pieces:
        command = []
        for word in [*words_of(line), "&&"]:
            if word in ("&&", "&", "|", ";"):
                if command:
                    yield command
                command = []
            elif command or not re.match(r"[A-Z_0-9]+=", word):
                command.append(word)


def find_file(name):
    for folder in FOLDERS:
        if (ROOT / folder / name).is_file():
            return ROOT / folder / name


# ---------------------------------------------------------------- what the scripts know


@cache
def flags_of(script, subcommand=None):
    """The flags that the --help of a script has; None where it needs a package that is not installed.

    script  its path from the project's root
    """
    words = [script, subcommand, "--help"] if subcommand else [script, "--help"]
    done = run(*words, ok=False)
    if "ModuleNotFoundError" in done.stderr:
        return None
    assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    options = re.findall(r"^ +(?:-\w, )?(--.*?)(?:  |$)", done.stdout, re.MULTILINE)
    return frozenset(re.findall(r"--[\w.-]+", " ".join(options)))


@cache
def all_flags():
    """The flags of every script."""
    found = set(OTHER_FLAGS)
    for folder in ("", "data", "bench", "tools", "forks", "serve"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if "__main__" not in path.read_text(encoding="utf-8") and path.name != "__main__.py":
                continue
            if path.name == "trl_peer.py":  # has no flags
                continue
            script = str(path.relative_to(ROOT))
            for subcommand in (None, *SUBCOMMANDS.get(script, ())):
                found |= flags_of(script, subcommand) or set()
    return frozenset(found)


# ---------------------------------------------------------------- the rules: a page and its text -> faults


def wrong_commands(page, text):
    for words in commands_of(text):
        line = " ".join(words)
        for word in words:
            # Files in runs/ are what a reader makes.
            if re.fullmatch(r"(?!runs/)[\w./-]+\.(py|sh|sbatch)", word) and not find_file(word):
                yield f"{line}: there is no {word}"
        if words[0] == "make":
            faults = wrong_targets(words[1:])
        elif Path(words[0]).name in OTHER_PROGRAMS:
            faults = []
        else:
            faults = wrong_flags(words)
        yield from (f"{line}: {fault}" for fault in faults)


def wrong_targets(words):
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} *\?=" if is_variable else rf"^{name}:"
        if not re.search(pattern, makefile, re.MULTILINE):
            yield f"the Makefile has no {name}"


def flags_in(words):
    return {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}


def wrong_flags(words):
    """Flags that the script of a command does not know; without a script, those that no script knows."""
    if "-m" in words and "serve" in words:
        words = ["serve/__main__.py", *words[words.index("serve") + 1 :]]
    scripts = [n for n, word in enumerate(words) if re.search(r"\.(py|sh|sbatch)$", word)]
    scripts = [n for n in scripts if find_file(words[n])]
    if not scripts:
        if words[0] not in ("python", "torchrun"):
            yield from (f"no script has {flag}" for flag in flags_in(words) - all_flags())
        return
    rest = words[scripts[0] + 1 :]
    if "--" in rest:  # what follows goes to vLLM
        rest = rest[: rest.index("--")]
    script = str(find_file(words[scripts[0]]).relative_to(ROOT))
    if not script.endswith(".py"):
        yield from wrong_launch(rest)
        return
    subcommand = rest[0] if rest and rest[0] in SUBCOMMANDS.get(script, ()) else None
    if script == "rmr1.py" and flags_in(rest) and not subcommand:
        yield f"rmr1.py wants one of {', '.join(SUBCOMMANDS[script])}"
        return
    if not flags_in(rest):
        return
    known = flags_of(script, subcommand)
    if known is None:
        return
    for n in scripts[1:]:  # tools/dryrun.py takes the flags of the script that it is given
        known = known | flags_of(str(find_file(words[n]).relative_to(ROOT)))
    yield from (f"{script} has no {flag}" for flag in flags_in(rest) - known)


def wrong_launch(words):
    """Of launch/rm-r1.sh SIZE STAGE [flags of the stage's script]."""
    if not words:
        return
    size, stage = [*words, ""][:2]
    launcher = (ROOT / "launch/rm-r1.sh").read_text()
    if f"{size}) " not in launcher or f"{stage}) " not in launcher:
        yield "no such size or stage"
        return
    script = "sft.py" if stage == "sft" else "grpo.py"
    known = flags_of(script) | {"--dry-run"}
    if "--dry-run" in words:
        known |= flags_of("tools/dryrun.py")
    yield from (f"{script} has no {flag}" for flag in flags_in(words) - known)


def unknown_names(page, text):
    """`module.name` in backticks is a word of that module's file."""
    for piece in split_page(text)[1]:
        match = re.fullmatch(r"(?:\w+\.)?(\w+)\.(\w+)(?:\(.*\))?", piece)
        path = match and find_file(f"{match[1]}.py")
        is_file = match and match[2] in ("py", "json", "jsonl", "txt", "md")
        if path and not is_file and not re.search(rf"\b{match[2]}\b", path.read_text()):
            yield f"{piece}: {path.name} has no {match[2]}"


def anchors(path):
    """The anchors that GitHub gives a page's headings."""
    text = re.sub("```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall("^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page, text):
    for link in re.findall(r"\]\(([^)\s]+)\)", split_page(text)[2]):
        if re.match("https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


def unknown_tests(page, text):
    """Names in a column headed "shown by `tests/`" are files of tests, or parts of tests' names."""
    sources = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    tests = "\n".join(re.findall(r"def (test_\w+)", sources))
    column = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif "shown by `tests/`" in cells:
            column = cells.index("shown by `tests/`")
        elif column is not None and "---" not in line:
            names = re.findall(r"`([\w.]+)`", cells[column])
            if not names:
                yield f"{line[:60]}: shown by nothing"
            for name in names:
                is_file = name.endswith(".py")
                if not ((ROOT / "tests" / name).is_file() if is_file else name in tests):
                    yield f"{name}: no such test"


def unlinked(page, text):
    for path in ROOT.glob("docs/*.md"):
        if f"](docs/{path.name}" not in text:
            yield f"docs/{path.name} is not linked"


# ---------------------------------------------------------------- the tests


RULES = [wrong_commands, unknown_names, broken_links, unknown_tests]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_pages(rule):
    faults = []
    for page in PAGES:
        faults += [f"{page.relative_to(ROOT)}: {fault}" for fault in rule(page, page.read_text())]
    assert not faults, "\n".join(faults)


def test_the_readme_links_every_page():
    faults = list(unlinked(ROOT / "README.md", (ROOT / "README.md").read_text()))
    assert not faults, "\n".join(faults)


def test_readme_has_the_results_of_its_page():
    """The first table is an excerpt of the one in docs/results.md."""
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [re.findall(r"\| ([\d.]+)(?= \|)", line) for line in lines]
    rows = [row for row in rows if len(row) == 3]
    results = (ROOT / "docs/results.md").read_text()
    assert rows
    for row in rows:
        assert re.search(" +".join(map(re.escape, row)) + "$", results, re.MULTILINE), row


def test_the_examples_of_the_judge_run(monkeypatch):
    """The Python of docs/judge.md, in its order and in one namespace, on a simulated judge."""

    def simulated(_, **settings):
        return make_judge(Model(), protocol="instruct", **settings)

    make_judge = rmr1.Judge
    monkeypatch.setattr(rmr1, "Judge", simulated)
    names = {"prompt": "q", "a": "is 5", "b": "is 3", "response": "is 7"}
    names |= {
        "responses": ["is 4", "is 1", "is 3"],
        "prompts": ["q", "q"],
        "completions": ["is 4", "is 1"],
    }
    text = (ROOT / "docs/judge.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        if "(BestOfNEnv)" not in block:  # tests/test_trainers.py has it
            exec(block, names)
    assert names["ranked"].order == [0, 2, 1] and names["rewards"][0] > names["rewards"][1]


TABLE = "| what | shown by `tests/` |\n|---|---|\n"


@pytest.mark.parametrize(
    "rule, text",
    [
        (wrong_commands, "    python sft.py --batchsize 3"),
        (wrong_commands, "Use `--batchsize`."),
        (
            wrong_commands,
            "```\npython \\\n  grpo.py --batch 8 \\\n  --epochs 3  # of another script\n```",
        ),
        (wrong_commands, "`torchrun --nproc_per_node 8 stf.py`"),
        (wrong_commands, "    make demos"),
        (wrong_commands, "`make demo SEEDS=1`"),
        (wrong_commands, "    python rmr1.py judge --model M --count 3"),
        (wrong_commands, "    python rmr1.py --model M"),
        (wrong_commands, "    python eval.py report DIR --model M"),
        (wrong_commands, "    python eval.py --model M --training DIR"),
        (wrong_commands, "    python forks/gspo.py --overlong 3"),
        (wrong_commands, "    python tools/dryrun.py sft.py --ranks 8 --beta 0"),
        (wrong_commands, "`launch/rm-r1.sh 8b sft`"),
        (wrong_commands, "`launch/rm-r1.sh 7b sft --beta 0`"),
        (wrong_commands, "    A=1 python bench/step.py grpo --layer 3"),
        (wrong_commands, "    python -m serve --model M --data-parallel-size 8"),
        (unknown_names, "a term of `grpo.rewards_of`"),
        (broken_links, "[a](no.md)"),
        (broken_links, "[a\nb](results.md#no-such-heading)"),
        (broken_links, "[a](../README.md#no)"),
        (unknown_tests, TABLE + "| x | `no_such_test_at_all` |"),
        (unknown_tests, TABLE + "| x | |"),
        (unlinked, "docs/data.md"),
    ],
)
def test_the_rules_can_fail(rule, text):
    assert list(rule(ROOT / "docs/page.md", text))


@pytest.mark.parametrize(
    "text",
    [
        "    OMP_NUM_THREADS=2 python -m serve --model M -- --data-parallel-size 8",
        "    python sft.py --no-recompute --seed 3",
        "    torchrun --nproc_per_node 8 forks/overlong.py --overlong 3 --beta 0",
        "    python tools/dryrun.py grpo.py --ranks 8 --gb 80 --beta 0",
        "    python bench/step.py grpo --layers 3 --trl trl/bin/python",
        "    python rmr1.py select --model M --data F --count 3",
        "    python eval.py compare A B --all",
        "    make controls SEED=1 && make test PY=python READY=",
        "    vllm serve MODEL --port 3",
        "`launch/rm-r1.sh 7b grpo --beta 0`",
        "`launch/rm-r1.sh 7b grpo --beta 0 --dry-run`",
    ],
)
def test_what_is_right_passes(text):
    assert not list(wrong_commands(ROOT / "docs/page.md", text))
