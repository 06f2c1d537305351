"""A session of the tests in every Python below it, which imports this at its start: where /kaggle is, when it began.

A session counts from the machine's first process; here that one is older than any session.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

_CHANGED = {
    "utils.project": lambda module: setattr(module, "KAGGLE", Path(os.environ["TEST_KAGGLE"])),
    "utils.pipeline.time_limit": lambda module: setattr(
        module, "session_started", lambda: float(os.environ["TEST_BEGUN"])
    ),
}


class _Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in _CHANGED:
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_and_change(module):
            execute(module)
            _CHANGED[name](module)

        spec.loader.exec_module = exec_and_change
        return spec


sys.meta_path.insert(0, _Finder())
