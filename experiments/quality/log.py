"""A log of measurements as JSON lines, so that an interrupted run continues where it stopped."""
import json
from pathlib import Path

from sentencekv import need

class Log:
    """Records by key. A record is a dict; the values of its fields `keys` are its key.

    path: the file, created when the first record is added; None: the log is in memory only. A last
    line without a line end is the rest of an interrupted write, and is removed. Raises ValueError
    for other lines that are not records.
    """

    def __init__(self, path, keys):
        self.path = path and Path(path)
        self.keys = keys
        self.records = {}
        if self.path and self.path.exists():
            self._read()

    def _read(self):
        text = self.path.read_text(encoding="utf-8")
        complete = text[:text.rfind("\n") + 1]
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[self.key(record)] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}, line {number}: not a record of this command, "
                                 f"with {', '.join(self.keys)}: give another --log") from None
        if complete != text:
            self.path.write_text(complete, encoding="utf-8")

    def key(self, record):
        return tuple(record[name] for name in self.keys)

    def add(self, record):
        """Append a record to the file at once. ValueError if its key has a record."""
        key = self.key(record)
        need(key not in self.records, f"{key} is in the log")
        self.records[key] = record
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def __contains__(self, key):
        return key in self.records

    def __getitem__(self, key):
        return self.records[key]
