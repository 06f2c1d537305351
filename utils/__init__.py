"""Shared plumbing of the notebook series; `utils.project.prepare` asserts by `SERIES` that it is this package."""

import os

SERIES = "deepseek-r1-medical-lora"

# torch reads it once, when it is loaded. Its threads wait for each other by spinning, which on a shared or busy machine takes
# the time from those that work: two trainings at once on two cores took 13 s each instead of 28, one alone as long as before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# An image's older kernels warn, at every start, of a debugger that nobody asked for.
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
