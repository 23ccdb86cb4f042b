"""Shows that the tests of every exercise fail before it is solved, and pass with its solution.

    python docs/exercises/check.py                  # or only some: check.py ex05 ex10

Works on two copies of docs/exercises; to one of them it applies the patches in docs/solutions.
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
COPIES = ("start", "solved")

def outcomes(folder, names):
    """Run the tests of both copies -> {(copy, exercise): Counter of PASSED, FAILED, ERROR}."""
    files = [f"{copy}/docs/exercises/{name}.py" for copy in COPIES for name in names]
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-rA", "--tb=no", "--rootdir=."]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["--import-mode=importlib"]                  # two files can have the same name
    paths = [str(ROOT), str(DOCS / "exercises"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([*command, *files], cwd=folder, env=environment, capture_output=True,
                         text=True)
    found = {(copy, name): Counter() for copy in COPIES for name in names}
    results = re.findall(r"^(PASSED|FAILED|ERROR) (\w+)/\S*?(ex\d\d_\w+)", run.stdout, re.M)
    for outcome, copy, name in results:
        found[copy, name][outcome] += 1
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
        folder = Path(folder).resolve()
        for copy in COPIES:
            without = shutil.ignore_patterns("__pycache__")
            target = folder / copy / "docs" / "exercises"
            shutil.copytree(DOCS / "exercises", target, ignore=without)
        for name in names:
            solve(folder / "solved", name)
        found = outcomes(folder, names)
    good = True
    for name in names:
        before, after = found["start", name], found["solved", name]
        total = before.total()
        ok = before["FAILED"] == total == after["PASSED"] == after.total() > 0
        good = good and ok
        print(f"{'ok ' if ok else 'BAD'} {name:16} before: {before['PASSED']} of {total} pass, "
              f"solved: {after['PASSED']} of {after.total()} pass")
    return 0 if good else 1

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
