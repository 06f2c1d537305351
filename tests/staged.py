"""Run directories for tests: stages opened and finished with a small file for each output."""

from __future__ import annotations

from pathlib import Path

from utils.files import write_text
from utils.pipeline.run_dir import RunDir, open_run
from utils.pipeline.stage import StageRun, open_stage
from utils.pipeline.stages import STAGES


def write_outputs(run: StageRun) -> None:
    """A small file for each output of the stage; an output without a suffix is a folder."""
    for name in run.stage.outputs:
        write_text(run.file(name if Path(name).suffix else f"{name}/part.txt"), f"{name} of {run.stage.name}\n")


def saved(profile: str, path: Path, overrides=None) -> RunDir:
    """A run directory opened and written."""
    run = open_run(profile, path, overrides)
    run.save()
    return run


def complete(path: Path, last: str = "05", **overrides) -> RunDir:
    """A demo run directory in which the stages up to `last` are done."""
    for stage in STAGES[: int(last) + 1]:
        run = open_stage(stage.name, "demo", path, overrides or None)
        write_outputs(run)
        run.finish()
    return open_run("demo", path)


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file below a folder, by content."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def stale(run: RunDir) -> dict[str, str]:
    """{number: reason} of the stages that are not current."""
    reasons = {stage.number: run.stale_because(stage) for stage in STAGES}
    return {number: reason for number, reason in reasons.items() if reason}
