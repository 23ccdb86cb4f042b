"""The documents say what a run shows, and the arrows between the files point down."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "
SKIP = {".git", ".venv", "__pycache__", ".hypothesis", ".pytest_cache"}
SOURCES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
           for path in ROOT.rglob("*.py") if not SKIP & set(path.relative_to(ROOT).parts)}
MODULES = {name[:-3].replace("/", ".").removesuffix(".__init__"): name for name in SOURCES}

# From the ground floor up: a file may import what lies below it, or beside it in its own folder.
FLOORS = ["sentencekv.py", "tokenizer.py", "model.py", "extras/", "experiments/", "train_tiny.py",
          "ask/", "docs/", "tests/"]
STAND_ALONE = {"sentencekv.py": set(), "tokenizer.py": set(), "model.py": {"sentencekv.py"},
               "test_sentencekv.py": {"sentencekv.py"}}

def imports(name):
    """Files of the project that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {MODULES[module] for module in found if module in MODULES} - {name}

def floor(name):
    if name == "test_sentencekv.py":
        return len(FLOORS)
    return next(i for i, start in enumerate(FLOORS) if name.startswith(start))

def test_arrows_between_files_point_down():
    for name in SOURCES:
        for other in imports(name):
            beside = name.rpartition("/")[0] == other.rpartition("/")[0] != ""
            assert floor(other) < floor(name) or beside or floor(name) == floor(other) > 2, (
                f"{name} imports {other}, which lies above it")

def test_no_file_imports_itself_through_others():
    def reachable(name, seen):
        for other in imports(name) - seen:
            seen.add(other)
            reachable(other, seen)
        return seen
    assert [name for name in SOURCES if name in reachable(name, set())] == []

@pytest.mark.parametrize("name", STAND_ALONE)
def test_the_files_that_people_copy_stand_alone(name):
    assert imports(name) <= STAND_ALONE[name]

@pytest.mark.parametrize("file", ["README.md", "docs/walkthrough.md"])
def test_the_python_in_the_documents_runs_as_it_stands(file, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    text = (ROOT / file).read_text(encoding="utf-8")
    blocks, names = re.findall(r"```python\n(.*?)```", text, re.S), {}
    assert blocks
    for block in blocks:
        if "transformers" in block:
            pytest.importorskip("transformers")
        exec(compile(block.replace("/tmp/", f"{tmp_path}/"), file, "exec"), names)
    printed = capsys.readouterr().out
    for line in re.findall(r"# prints (.*)", "".join(blocks)):
        assert line in printed

def test_the_two_commands_of_the_readme_are_those_of_ci():
    commands = [line for line in README.splitlines() if line.startswith(SETUP)]
    assert sorted(commands) == [SETUP + "-m ask", SETUP + "-m pytest"]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert sorted(line for line in ci if ".venv" in line) == sorted(commands)

def test_the_readme_names_every_file_and_every_setting():
    names = [p.name for p in ROOT.iterdir() if p.suffix in (".py", ".txt") or p.name in (
        "ask", "extras", "experiments", "tests", "docs")]
    import sentencekv
    names += [*sentencekv.Settings.__dataclass_fields__]
    assert [name for name in names if f"`{name}" not in README] == []

@pytest.mark.parametrize("file", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_and_commands_in_the_documents_lead_somewhere(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    base = (ROOT / file).parent
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (base / link).exists(), f"{file} links to {link}"
    for module in re.findall(r"python -m ((?:experiments|ask|extras)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
            f"{file} runs {module}")
    for script in re.findall(r"python ([\w/]+\.py)", text):
        assert (ROOT / script).exists(), f"{file} runs {script}"
