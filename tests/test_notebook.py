"""Whether this process is a notebook's kernel."""

from __future__ import annotations

import subprocess
import sys

from utils.project import ROOT


def test_a_plain_process_has_no_shell_and_gets_no_ipython_and_a_notebook_its_own():
    code = """
import sys
from utils.notebook import notebook_shell
assert notebook_shell() is None and "IPython" not in sys.modules
from IPython.core.interactiveshell import InteractiveShell
assert notebook_shell() is None  # imported, and no notebook
assert InteractiveShell.instance() is notebook_shell()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
