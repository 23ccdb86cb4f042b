"""The tests import the modules of the repository's root, from whichever folder pytest is run."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
