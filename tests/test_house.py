"""The rule of imports, and one name for one thing (CONTRIBUTING.md)."""

import ast
from collections import defaultdict

from conftest import ROOT

# Which folder may import which. "scripts" are the five files at the top that are not rubrics.py.
MAY_IMPORT = {
    "lib": {"lib"},
    "rubrics": {"lib"},
    "judge": {"lib", "rubrics", "judge"},
    "scripts": {"lib", "rubrics", "judge"},
    "serve": {"lib", "rubrics", "judge", "scripts", "serve"},
    "data": {"lib", "rubrics", "judge", "data"},
    "forks": {"lib", "rubrics", "judge", "grpo", "forks"},
    "tools": {"lib", "rubrics", "judge", "scripts", "tools", "data", "bench"},
}
TOP = {"rubrics.py", "sft.py", "grpo.py", "eval.py", "rmr1.py"}
FOLDERS = ("lib", "judge", "serve", "forks", "tools", "data")
PACKAGES = ("lib", "judge", "serve", "forks", "tools")

# Names that several modules may define: every script has the first, and sft.py plays the roles of grpo.py.
EVERYWHERE = {"main", "arguments", "flags"}
STAGES = {"Row", "Data", "read_data", "accumulate_gradients"}


def module_files():
    """{name by which others import it: path} of the project without tests and bench"""
    paths = [
        *ROOT.glob("*.py"),
        *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py")),
    ]
    modules = {}
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        # The scripts in data/ find each other by their bare names.
        name = parts[-1] if parts[0] == "data" else ".".join(parts)
        modules[name.removesuffix(".__init__")] = path
    return modules


MODULES = module_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def folder_of(module):
    """A key of MAY_IMPORT."""
    folder = MODULES[module].relative_to(ROOT).parts[0]
    if folder in FOLDERS:
        return folder
    return "rubrics" if module == "rubrics" else "scripts"


def imports_of(module):
    """The modules of this project that a module imports, also those inside its functions."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return sorted(name for name in found & set(MODULES) if name not in PACKAGES)


def test_imports_follow_the_rule():
    faults = []
    for module in MODULES:
        folder = folder_of(module)
        for imported in imports_of(module):
            if not {folder_of(imported), imported} & MAY_IMPORT[folder]:
                faults.append(f"{module} imports {imported}; {folder} may not")
    assert not faults, "\n".join(faults)


def test_nothing_outside_imports_tests_or_bench():
    """Only tools/check.py does, which runs both."""
    foreign = {path.stem for folder in ("tests", "bench") for path in ROOT.glob(f"{folder}/*.py")}
    faults = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            faults += [
                f"{module} imports {name}" for name in names if name in foreign - set(MODULES)
            ]
    assert set(faults) <= {"tools.check imports common"}, "\n".join(faults)


def circles():
    """Modules that import each other over some way, [[name, ..., the first again], ...]"""
    found, finished = [], set()

    def visit(module, path):
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in finished:
            for imported in imports_of(module):
                visit(imported, [*path, module])
            finished.add(module)

    for module in MODULES:
        visit(module, [])
    return found


def test_there_is_no_circle():
    faults = [" imports ".join(circle) for circle in circles()]
    assert not faults, "\n".join(faults)


def test_the_top_has_five_scripts_and_each_folder_of_modules_is_a_package():
    assert {path.name for path in ROOT.glob("*.py")} == TOP
    for folder in PACKAGES:
        assert (ROOT / folder / "__init__.py").read_text() == "", folder
    assert not (ROOT / "tests/__init__.py").exists()


def names_defined(module):
    """Functions, classes and constants at module level."""
    for node in TREES[module].body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stored = [n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            yield from (n.id for n in stored if isinstance(n.ctx, ast.Store))


def test_one_name_is_one_thing():
    """A fork may define what it replaces in grpo.py, and keep what it replaced as grpo_NAME."""
    homes = defaultdict(list)
    for module in MODULES:
        for name in set(names_defined(module)) - EVERYWHERE:
            homes[name].append(module)
    faults = []
    for name, modules in sorted(homes.items()):
        if "grpo" in modules or name.startswith("grpo_"):
            modules = [m for m in modules if folder_of(m) != "forks"]
        if name in STAGES:
            modules = [m for m in modules if m != "sft"]
        if len(modules) > 1:
            faults.append(f"{name}: {', '.join(modules)}")
    assert not faults, "\n".join(faults)


# ---------------------------------------------------------------- what a reader holds in mind


def code_lines(function, text):
    """Lines of a function without its docstring, comments and blank lines."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = range(first.lineno, first.end_lineno + 1) if is_docstring else ()
    lines = text.splitlines()
    counted = 0
    for number in range(function.lineno, function.end_lineno + 1):
        line = lines[number - 1].strip()
        counted += bool(line) and not line.startswith("#") and number not in docstring
    return counted


def test_a_function_fits_a_screen():
    """50 code lines, but for lists of flags; 90 for a main, whose loop is in sight."""
    faults = []
    for module, tree in TREES.items():
        text = MODULES[module].read_text(encoding="utf-8")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                limit = 90 if node.name == "main" else 50
                is_flags = node.name in ("flags", "arguments", "training_flags")
                lines = code_lines(node, text)
                if lines > limit and not is_flags:
                    faults.append(f"{module}.{node.name}: {lines} code lines")
    assert not faults, "\n".join(faults)
