"""Shows that the tests of every exercise fail before it is solved, and pass with its solution.

    python docs/exercises/check.py                  # or only some: check.py ex05 ex10

Works on a copy of docs/exercises, to which it applies the patches in docs/solutions.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent

def outcomes(copy, names):
    """Run the tests of some exercises in a copy -> {name: Counter of PASSED, FAILED, ERROR}."""
    files = [f"docs/exercises/{name}.py" for name in names]
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-rA", "--tb=no"]
    command += ["-p", "no:cacheprovider"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([*command, *files], cwd=copy, env={**os.environ, "PYTHONPATH": path},
                         capture_output=True, text=True)
    found = {name: Counter() for name in names}
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) \S*?(ex\d\d_\w+)", run.stdout, re.M):
        found[name][outcome] += 1
    return found

def solve(copy, name):
    """Apply the patch of an exercise to a copy. SystemExit if it does not fit."""
    patch = DOCS / "solutions" / f"{name}.patch"
    program = ["git", "apply"] if shutil.which("git") else ["patch", "-p1", "-s", "-i"]
    no_repository = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)}
    run = subprocess.run([*program, patch], cwd=copy, env=no_repository, capture_output=True)
    if run.returncode:
        raise SystemExit(f"error: docs/solutions/{name}.patch does not fit "
                         f"docs/exercises/{name}.py: undo your changes first, with git stash")

def main(wanted):
    exercises = [path.stem for path in sorted((DOCS / "exercises").glob("ex*.py"))]
    names = [name for name in exercises if not wanted or name[:4] in wanted]
    if not names:
        raise SystemExit(f"error: no exercise {' '.join(wanted)}; there are {' '.join(exercises)}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(DOCS / "exercises", copy / "docs" / "exercises", ignore=without)
        before = outcomes(copy, names)
        for name in names:
            solve(copy, name)
        after = outcomes(copy, names)
    good = True
    for name in names:
        total = before[name].total()
        ok = before[name]["FAILED"] == total == after[name]["PASSED"] == after[name].total() > 0
        good = good and ok
        print(f"{'ok ' if ok else 'BAD'} {name:16} before: {before[name]['PASSED']} of {total} "
              f"pass, solved: {after[name]['PASSED']} of {after[name].total()} pass")
    return 0 if good else 1

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
