"""Where files lie and what they import: the size of folders and files, the order of
folders, cycles, late imports, private names, and what a folder says of itself.

Each rule is a function that returns a line for each thing that breaks it.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("autoclip_core", "autoclip_torch", "autoclip_tf", "autoclip_jax")
MOST_FILES, MOST_FILES_IF_FLAT, MOST_TEST_FILES, MOST_LINES = 12, 16, 40, 300
HEAVY = (
    *("torch", "tensorflow", "keras", "tf_keras", "jax", "matplotlib"),
    *("lightning", "transformers", "tensorboard", "rich"),
)

KERNEL = "autoclip_torch.kernels.scale"
"""The one file that is imported late: it imports Triton at its top, which looks up the
names of a kernel there."""


# What a tree holds.


def python_files(root, folder):
    """The Python files below a folder, as paths relative to the root."""
    return sorted(p.relative_to(root) for p in (root / folder).rglob("*.py"))


def package_files(root):
    return [file for package in PACKAGES for file in python_files(root, package)]


def read(root, file):
    return (root / file).read_text(encoding="utf-8")


def unit(file):
    """The folder inside the package, or the name of a file at its top."""
    return file.parts[1].removesuffix(".py")


def imports(root, file):
    """Yield `(names, line, is_late)` for each imported module or name.

    `names` are the parts of the dotted name, `is_late` is true inside a function.
    """

    def walk(node, is_late):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split(".")), node.lineno, is_late
        elif isinstance(node, ast.ImportFrom):
            base = file.parts[: len(file.parts) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield (*base, alias.name), node.lineno, is_late
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, is_late or is_function)

    yield from walk(ast.parse(read(root, file)), False)


def imported_file(root, names):
    """The file of the tree that an import reads, or None for another package."""
    for parts in (names, names[:-1]):
        if parts and parts[0] in PACKAGES:
            path = Path(*parts)
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if (root / file).is_file():
                    return file
    return None


def import_graph(root, package):
    """Each file of a package, and the files of this package that it imports.

    `__version__` is no code: every file may import it.
    """
    return {
        file: {
            target
            for names, _, _ in imports(root, file)
            if names[-1] != "__version__"
            and (target := imported_file(root, names))
            and target.parts[0] == package
        }
        for file in python_files(root, package)
    }


def folder_order(root):
    """Package to levels of folders, lowest first, from the list in docs/design.md."""
    page = read(root, "docs/design.md")
    rows = re.findall(r"^- `(autoclip_\w+)`: (.+(?:\n  .+)*)", page, re.MULTILINE)
    return {
        package: [re.findall(r"`(\w+)`", level) for level in levels.split("<")]
        for package, levels in rows
    }


def shared_with_adapters(root):
    """The parts of the core that an adapter may import, from docs/design.md."""
    page = " ".join(read(root, "docs/design.md").split())
    sentence = re.search(r"An adapter imports [^.]*core[^.]* from ([^.]*)\.", page)
    return re.findall(r"`(\w+)`", sentence[1])


# The rules.


def crowded_folders(root):
    for package in PACKAGES:
        files = python_files(root, package)
        is_flat = all(len(file.parts) == 2 for file in files)
        most = MOST_FILES_IF_FLAT if is_flat else MOST_FILES
        yield from folders_above(files, most)
    yield from folders_above(python_files(root, "tests"), MOST_TEST_FILES)


def folders_above(files, most):
    folders = [file.parent for file in files]
    for folder in sorted(set(folders)):
        if (count := folders.count(folder)) > most:
            yield f"{folder} has {count} files, at most {most} are allowed"


def long_files(root):
    for file in package_files(root):
        if (count := len(read(root, file).splitlines())) > MOST_LINES:
            yield f"{file} has {count} lines, at most {MOST_LINES} are allowed"


def cycles(graph):
    """Return the groups of nodes that reach each other."""
    reached = {}
    for start in graph:
        visited, ahead = set(), [start]
        while ahead:
            new = graph.get(ahead.pop(), set()) - visited
            visited |= new
            ahead += new
        reached[start] = visited
    return {
        frozenset(n for n in reached[node] if node in reached.get(n, ()))
        for node in graph
        if node in reached[node]
    }


def import_cycles(root):
    for package in PACKAGES:
        files = import_graph(root, package)
        folders = {}
        for file, targets in files.items():
            others = {unit(target) for target in targets} - {unit(file)}
            folders.setdefault(unit(file), set()).update(others)
        for kind, graph in (("files", files), ("folders", folders)):
            for cycle in cycles(graph):
                names = ", ".join(sorted(map(str, cycle)))
                yield f"{package}: a cycle of {kind}: {names}"


def upward_imports(root):
    for package, levels in folder_order(root).items():
        height = {name: n for n, level in enumerate(levels) for name in level}
        for file, targets in import_graph(root, package).items():
            for target in sorted(targets):
                source, other = unit(file), unit(target)
                above = height.get(other, len(levels)) >= height.get(
                    source, len(levels)
                )
                if source != other and source in height and above:
                    yield f"{file} imports {target}: `{other}` is not below `{source}`"


def unlisted_folders(root):
    order = folder_order(root)
    for package in PACKAGES:
        folders = {unit(file) for file in python_files(root, package) if file.parts[2:]}
        listed = {name for level in order.get(package, ()) for name in level}
        for name in sorted(folders - listed):
            yield f"{package}/{name} is not in the order of docs/design.md"
        for name in sorted(listed):
            path = root / package / name
            if not path.is_dir() and not path.with_suffix(".py").is_file():
                yield f"docs/design.md lists {package}/{name}, which does not exist"


def late_imports(root):
    for file in package_files(root):
        for names, line, is_late in imports(root, file):
            if is_late and names[0] not in HEAVY and ".".join(names) != KERNEL:
                yield f"{file}:{line} imports {'.'.join(names)} inside a function"


def private_imports(root):
    shared = shared_with_adapters(root)
    for file in package_files(root):
        for names, line, _ in imports(root, file):
            if names[0] not in PACKAGES or names[0] == file.parts[0]:
                continue
            target = imported_file(root, names)
            is_private = any(n[0] == "_" and n != "__version__" for n in names)
            is_shared = target and (
                target.parts[1] == "__init__.py" or unit(target) in shared
            )
            if is_private or not is_shared:
                yield f"{file}:{line} imports {'.'.join(names)}, which is private"


def silent_folders(root):
    """A folder's `__init__.py` has two or three sentences and no logic.

    A `try` is allowed: it names the extra of a framework that is missing.
    """
    for file in package_files(root):
        if file.name != "__init__.py":
            continue
        tree = ast.parse(read(root, file))
        text = ast.get_docstring(tree) or ""
        sentences = re.findall(r"\.(?=\s|$)", text)
        first = re.search(r"Read\s+`(\w+\.py)`\s+first", text)
        if not 2 <= len(sentences) <= 3:
            yield f"{file} has {len(sentences)} sentences, two or three are asked for"
        if "import" not in text:
            yield f"{file} does not say what the folder may import"
        if not first or not (root / file.parent / first[1]).is_file():
            yield f"{file} does not say which file of the folder to read first"
        plain = (ast.Import, ast.ImportFrom, ast.Try, ast.Assign, ast.Expr)
        if any(not isinstance(node, plain) for node in tree.body):
            yield f"{file} holds logic"


def false_claims(root):
    """A folder that says what it imports "only" or "alone" imports nothing else."""
    for package in PACKAGES:
        graph = import_graph(root, package)
        for init in (file for file in graph if file.name == "__init__.py"):
            text = " ".join(
                (ast.get_docstring(ast.parse(read(root, init))) or "").split()
            )
            claims = re.findall(r"[^.]*\bimports?\b[^.]*\b(?:only|alone)\b[^.]*", text)
            claims += re.findall(r"[^.]*\bimports? (?:only|no|nothing)\b[^.]*", text)
            if not claims or len(init.parts) == 2:
                continue
            inside = {file for file in graph if init.parent in file.parents}
            used = {unit(t) for file in inside for t in graph[file] - inside}
            for name in sorted(used - set(re.findall(r"`(\w+)", " ".join(claims)))):
                yield f"{init} does not say that the folder imports {name}"


def missing_paths(root):
    """A path in a page exists, and defines what it names; NAME stands for any name."""
    paths = (
        r"\b((?:autoclip_\w+|tests|docs|examples|benchmarks)/[\w./]*\w)(?:`: `(\w+))?"
    )
    pages = [*root.glob("*.md"), *root.glob("*.txt"), *root.glob("docs/**/*.md")]
    for page in sorted(file.relative_to(root).as_posix() for file in pages):
        for path, name in sorted(set(re.findall(paths, read(root, page)))):
            if not any(root.glob(path.replace("NAME", "*"))):
                yield f"{page} names {path}, which does not exist"
            elif name and f"def {name}(" not in read(root, path):
                yield f"{page} names {name} in {path}, which does not define it"


RULES = [
    *(crowded_folders, long_files, import_cycles, upward_imports, unlisted_folders),
    *(late_imports, private_imports, silent_folders, false_claims, missing_paths),
]


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_the_rule(rule):
    broken = list(rule(ROOT))
    assert not broken, "\n".join(["what breaks the rule:", *broken])


# Controls: a tree that keeps every rule, and what breaks each of them.


DESIGN = """
- `autoclip_core`: `scale` < `history` <
  `policies`

An adapter imports the public names of `autoclip_core`, and modules from `scale` and
`history`.
"""
FOLDER = '"""Past norms. It imports `scale`. Read `window.py` first."""\n'
TREE = {
    "docs/design.md": DESIGN,
    "autoclip_core/__init__.py": FOLDER.replace("window", "scale")
    + '__version__ = "1"\nfrom .policies.quantile import Quantile as Quantile\n',
    "autoclip_core/scale.py": "import math\n",
    "autoclip_core/history/__init__.py": FOLDER,
    "autoclip_core/history/window.py": "from autoclip_core.scale import scale\n",
    "autoclip_core/history/lookup.py": "from . import window\n",
    "autoclip_core/policies/__init__.py": FOLDER.replace("window", "quantile"),
    "autoclip_core/policies/quantile.py": "from autoclip_core.history import window\n"
    "def draw():\n    import matplotlib\n",
    "autoclip_jax/__init__.py": FOLDER.replace("window", "clipper"),
    "autoclip_jax/clipper.py": "from autoclip_core import Quantile, __version__\n"
    "from autoclip_core.history.window import Window\n",
    "tests/core/test_window.py": "",
}


def write_tree(root, changes):
    for file, text in (TREE | changes).items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_in_order_keeps_the_rule(rule, tmp_path):
    write_tree(tmp_path, {})
    assert list(rule(tmp_path)) == []


def many(folder, count):
    return {f"{folder}/extra{n}.py": "" for n in range(count)}


WINDOW, JAX = "autoclip_core/history/window.py", "autoclip_jax/clipper.py"
HISTORY = "autoclip_core/history/__init__.py"
BROKEN = [
    (crowded_folders, many("autoclip_core/history", 10), "history has 13 files"),
    (crowded_folders, many("autoclip_jax", 15), "autoclip_jax has 17 files"),
    (crowded_folders, many("tests/core", 40), "tests/core has 41 files"),
    (long_files, {WINDOW: "\n" * 301}, "window.py has 301 lines"),
    (
        import_cycles,
        {WINDOW: "from .lookup import f"},
        "lookup.py, autoclip_core/history",
    ),
    (import_cycles, {WINDOW: "if TYPE_CHECKING:\n    from . import lookup"}, "files"),
    (import_cycles, {WINDOW: "def f():\n    from . import lookup"}, "of files"),
    (
        import_cycles,
        {WINDOW: "from autoclip_core import Quantile"},
        "__init__, history",
    ),
    (import_cycles, {WINDOW: "import autoclip_core.policies"}, "history, policies"),
    (upward_imports, {WINDOW: "import autoclip_core.policies"}, "`policies` is not"),
    (upward_imports, {WINDOW: "from autoclip_core import Quantile"}, "`__init__` is"),
    (unlisted_folders, {"autoclip_core/log/step.py": ""}, "autoclip_core/log is not"),
    (
        unlisted_folders,
        {"docs/design.md": DESIGN.replace("scale", "sale")},
        "core/sale,",
    ),
    (late_imports, {WINDOW: "def f():\n    import numpy"}, "window.py:2 imports numpy"),
    (
        late_imports,
        {WINDOW: "def f():\n    from . import x"},
        "autoclip_core.history.x",
    ),
    (
        private_imports,
        {JAX: "from autoclip_core.scale import _x"},
        "_x, which is private",
    ),
    (
        private_imports,
        {JAX: "import autoclip_core.policies"},
        "policies, which is private",
    ),
    (
        missing_paths,
        {"CONTRIBUTING.md": "`tests/gone.py`"},
        "CONTRIBUTING.md names tests/gone",
    ),
    (
        missing_paths,
        {"constraints-floors.txt": "tests/test_torch_*.py"},
        "constraints-floors.txt names tests/test_torch_",
    ),
    (
        missing_paths,
        {"docs/evidence.md": "`benchmarks/gone_NAME.py`"},
        "docs/evidence.md names benchmarks/gone_NAME",
    ),
    (
        missing_paths,
        {"docs/design.md": DESIGN + f"`{WINDOW}`: `quantile`"},
        "names quantile in",
    ),
    (silent_folders, {HISTORY: '"""Past norms."""'}, "has 1 sentences"),
    (silent_folders, {HISTORY: '"""A. B. Read `window.py` first."""'}, "may import"),
    (silent_folders, {HISTORY: FOLDER.replace("window", "gone")}, "to read first"),
    (silent_folders, {HISTORY: FOLDER + "if True:\n    x = 1\n"}, "holds logic"),
    (
        false_claims,
        {HISTORY: FOLDER.replace("`scale`", "only `checks`")},
        "history/__init__.py does not say that the folder imports scale",
    ),
    (
        false_claims,
        {HISTORY: FOLDER.replace("`scale`", "`checks` alone")},
        "does not say that the folder imports scale",
    ),
]


@pytest.mark.parametrize(("rule", "changes", "line"), BROKEN)
def test_what_breaks_a_rule_is_reported(rule, changes, line, tmp_path):
    write_tree(tmp_path, changes)
    assert line in "\n".join(rule(tmp_path))
