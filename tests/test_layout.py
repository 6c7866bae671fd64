"""The rooms of the project: who imports whom, how long and how wide files are. A reader of the recipe meets four files."""
import ast
import io
import tokenize

import pytest

from conftest import ROOT

LESSON = ("model.py", "rewards.py", "ppo.py", "rlsp.py")
LIB = sorted(f"lib/{file.name}" for file in (ROOT / "lib").glob("*.py"))
LINES = {"model.py": 330, "ppo.py": 430, "rewards.py": 300, "rlsp.py": 330, "lib/answers.py": 700}  # of lib's others: 350
STEP_TOKENS = 17_000  # Python tokens over the files that one PPO step takes a reader through

# Imports go one way: {model, lib.files, lib.answers} -> the rest of lib -> rewards -> ppo -> rlsp. Of lib, `logs`, `report`,
# `judge` and `evaluation` speak of rewards. `answers` has its tokens, values and long numbers in files of their own.
VERIFIER = {"lib.answers", "lib.tex", "lib.values", "lib.bignum"}
ALONE = {"model", "lib.files", *VERIFIER}
OF_REWARDS = {"lib.logs", "lib.report", "lib.judge", "lib.evaluation"}
READERS = {"rewards": VERIFIER, "ppo": {"model", "rewards"}, "rlsp": {"model", "rewards", "ppo"}}


def own_imports(name):
    """The project's modules that a file imports, anywhere in it."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {f"lib.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    ours = {file.removesuffix(".py").replace("/", ".") for file in (*LESSON, *LIB)}
    return found & ours


def code(name):
    """(lines of code: neither blank nor comment nor docstring; Python tokens on them) of a file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline)
              if t.type not in nothing and t.start[0] not in docstrings]
    lines = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    return len(lines), len(tokens)


@pytest.mark.parametrize("name", [*LESSON, *LIB])
def test_imports_go_one_way(name):
    module, imports = name.removesuffix(".py").replace("/", "."), own_imports(name)
    if module in ALONE:
        assert imports <= (VERIFIER if module in VERIFIER else set())
    elif module == "rewards":
        assert imports <= READERS[module]
    elif module in READERS:
        assert {i for i in imports if not i.startswith("lib.")} <= READERS[module]
    else:
        assert not imports & {"ppo", "rlsp"}
        assert "rewards" not in imports or module in OF_REWARDS


def test_no_circle():
    """Importing any one file of ours first works: no module is needed by one that it needs itself."""
    graph = {name.removesuffix(".py").replace("/", "."): own_imports(name) for name in (*LESSON, *LIB)}
    done = set()
    while graph:
        free = [module for module, needs in graph.items() if needs <= done]
        assert free, f"a circle among {sorted(graph)}"
        done |= set(free)
        for module in free:
            del graph[module]


@pytest.mark.parametrize("name", [*LESSON, *LIB])
def test_a_file_is_read_in_one_sitting(name):
    lines, _ = code(name)
    assert lines <= LINES.get(name, 350)


@pytest.mark.parametrize("name", [*LESSON, *LIB])
def test_lines_fit_beside_another_window(name):
    most = 100 if name in LESSON else 110
    wide = [f"{name}:{n}" for n, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1) if len(line) > most]
    assert not wide


@pytest.mark.parametrize("name", [*LESSON, *LIB])
def test_one_statement_stands_on_a_line(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    starts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    twice = {line for line in starts if starts.count(line) > 1}
    assert not twice


def test_one_ppo_step_is_an_evening_of_reading():
    assert sum(code(name)[1] for name in LESSON) <= STEP_TOKENS
