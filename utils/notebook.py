"""Whether this process is a notebook's kernel, asked without importing IPython."""

from __future__ import annotations

import sys
from typing import Any


def notebook_shell() -> Any:
    """IPython's shell, where this process has one; None in a plain one."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module is not None else None
