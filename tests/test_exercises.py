"""Every exercise can be solved, its tests notice it, and docs/exercises.md describes it."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = [path.stem for path in sorted((ROOT / "docs" / "exercises").glob("ex*.py"))]

def check(root, *exercises):
    """Run check.py of a copy of docs -> exit status, {exercise: its line}, errors."""
    command = [sys.executable, root / "docs" / "exercises" / "check.py", *exercises]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    return run.returncode, {line.split()[1]: line for line in run.stdout.splitlines()}, run.stderr

@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path

def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")

def test_the_tests_of_every_exercise_fail_before_it_is_solved_and_pass_after():
    status, lines, errors = check(ROOT)
    assert status == 0, (lines, errors)
    assert [*lines] == NAMES and len(NAMES) == 10
    for line in lines.values():
        assert re.fullmatch(r"ok .* 0 of ([1-9]\d*) pass, solved: \1 of \1 pass", line)

def test_a_wrong_solution_and_a_test_that_always_passes_are_noticed(copy):
    change(copy / "docs" / "solutions" / "ex01_sentences.patch", "number += 1", "number += 2")
    with open(copy / "docs" / "exercises" / "ex04_importance.py", "a") as file:
        file.write("\ndef test_nothing():\n    pass\n")
    status, lines, _ = check(copy, "ex01", "ex04")
    assert status == 1
    assert "BAD" in lines["ex01_sentences"] and "solved: 0 of 4" in lines["ex01_sentences"]
    assert "BAD" in lines["ex04_importance"] and "before: 1 of 13" in lines["ex04_importance"]

def test_a_patch_that_does_not_fit_and_an_unknown_exercise_give_one_line(copy):
    begun = copy / "docs" / "exercises" / "ex01_sentences.py"
    change(begun, "raise NotImplementedError", "return []")
    assert "does not fit docs/exercises/ex01_sentences.py" in check(copy, "ex01")[2]
    assert "no exercise ex99; there are ex01_sentences ex02" in check(copy, "ex99")[2]

def test_the_page_describes_every_exercise_and_its_commands_run():
    page = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    sections = page.split("\n## ")[1:]
    assert [section.split(".")[0] for section in sections] == [str(i) for i in range(1, 11)]
    for section, name in zip(sections, NAMES):
        assert f"python -m pytest docs/exercises/{name}.py" in section
        assert "Hint: " in section
    for number, name in enumerate(NAMES, start=1):
        assert name.startswith(f"ex{number:02}_")
        source = (ROOT / "docs" / "exercises" / f"{name}.py").read_text(encoding="utf-8")
        assert source.startswith(f'"""Exercise {number} of docs/exercises.md: ')
        assert (ROOT / "docs" / "solutions" / f"{name}.patch").exists()
