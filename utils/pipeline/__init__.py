"""A run: its directory, its six stages, and the driver that executes them."""

from importlib import import_module
from typing import Any

_SURFACE = {  # name: module, imported when it is asked for
    "STAGES": "stages", "BY_NAME": "stages", "Stage": "stages", "ancestors": "stages", "find_stage": "stages",
    "RunDir": "run_dir", "open_run": "run_dir", "read_manifest": "run_dir", "altered_files": "run_dir",
    "require_recorded": "run_dir", "CONFIG": "run_dir", "StageRun": "stage", "open_stage": "stage",
    "require_hardware": "stage", "take_lock": "lock", "release_lock": "lock", "Deadline": "time_limit",
    "session_started": "time_limit", "StopRequest": "signals", "SeriesState": "state", "read_state": "state",
    "write_state": "state", "run_series": "runner", "StageEnded": "runner", "summarise": "console",
}  # fmt: skip
__all__ = list(_SURFACE)


def __getattr__(name: str) -> Any:
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
