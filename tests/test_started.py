"""Everything that a person starts can be started, in a fresh process from the project's root, as the docs say.

Other tests fork a process that has the imports already, and a path of its own. Here Python begins anew.
"""

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import ROOT, environment, turn

SCRIPTS = ("grpo.py", "sft.py", "eval.py", "rmr1.py", "data/toy.py", "data/prepare.py")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2")


def files_in(folder):
    """The scripts of a folder, as a person names them. What only others import has no last line to run."""
    paths = sorted((ROOT / folder).glob("*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if "__main__" in path.read_text()]


def all_scripts():
    return [*SCRIPTS, "data/distill.py", *files_in("forks"), *files_in("tools")]


def start(*words):
    """A fresh process of Python, from the project's root. -> CompletedProcess, output as text"""
    variables = environment() | {"COLUMNS": "250"}  # nothing in a help text is wrapped
    variables.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def start_all(commands):
    """Start {name: words} next to each other. -> {name: CompletedProcess}

    Most of their time is the import of torch, and more at a time than two a core take memory only.
    """
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda words: start(*words), commands.values())
        return dict(zip(commands, results))


def purpose(path):
    """The first line of a script's docstring; a fork's help text is grpo.py's."""
    if path.startswith("forks/"):
        path = "grpo.py"
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return docstring.splitlines()[0]


def test_every_script_says_what_it_is_for():
    commands = {path: (path, "--help") for path in all_scripts()}
    commands["serve/__main__.py"] = ("-m", "serve", "--help")
    faults = []
    for path, done in start_all(commands).items():
        if done.returncode != 0:
            faults.append(f"{path} --help: exit code {done.returncode}\n{done.stderr[-1500:]}")
        elif purpose(path) not in done.stdout:
            faults.append(f"{path} --help: does not say {purpose(path)!r}\n{done.stdout[:500]}")
    assert not faults, "\n".join(faults)


def test_a_bad_flag_on_two_ranks_is_one_sentence():
    """By torchrun, which runs a script by its path, on every rank."""
    scripts = ["grpo.py", "eval.py", *files_in("forks")[:1]]
    commands = {path: (*TORCHRUN, path, "--no-such-flag") for path in scripts}
    faults = []
    with turn(ranks=2):
        results = start_all(commands)
    for path, done in results.items():
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        if done.returncode == 0 or len(errors) != 1:
            faults.append(f"{path}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    assert not faults, "\n".join(faults)


def test_the_toy_world_shows_itself_on_bare_python():
    """-S: no installed packages at all. -I: no variables of the environment, no folder of the user."""
    done = start("-S", "-I", "data/toy.py", "--show")
    assert done.returncode == 0, done.stderr
    assert "<answer>[[" in done.stdout


@pytest.mark.parametrize("module", ["rubrics", "lib.pairs"])
def test_text_needs_no_installed_package(module):
    done = start("-S", "-c", f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["rmr1", "eval", "judge.report", "judge.benchmarks"])
def test_asking_a_server_and_reading_results_need_no_torch(module):
    """torch takes seconds to import, and a machine that asks a server need not have it."""
    without_torch = "import sys; sys.modules['torch'] = None"
    done = start("-c", f"{without_torch}; import {module}")
    assert done.returncode == 0, done.stderr
