"""SIGTERM and Ctrl-C: a checkpoint where something is trained, the line that goes on, and the same bits afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import psutil
import pytest

from tests.faults.series_process import SeriesProcess, results, stage_seconds

CHECKPOINTS = "training/checkpoints/*/checkpoint-*/trainer_state.json"
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def ask(series: SeriesProcess, number: signal.Signals) -> None:
    """Ctrl-C reaches the foreground process group, SIGTERM the process that was started."""
    series.at_work = series.everybody()
    if number == signal.SIGINT:
        os.killpg(series.process.pid, number)
    else:
        os.kill(series.process.pid, number)


def stopped_well(series: SeriesProcess, number: signal.Signals) -> str:
    """What is wrong with how `series` ended after the signal; empty where nothing is."""
    status = series.wait(60)
    state = json.loads((series.path / "state.json").read_text())
    found = {
        "status": status == 128 + number,
        "line": f"--run-dir {series.path} --from {state['stage'][:2]}" in series.lines[-1],
        "state": state["state"] == "continue" and state["kind"] == "Interrupted",
        "no stack": "Traceback" not in series.output and "KeyboardInterrupt" not in series.output,
        "nobody left": not [one for one in series.at_work if one.is_running() and one.status() != psutil.STATUS_ZOMBIE],
    }
    wrong = [name for name, well in found.items() if not well]
    return f"{', '.join(wrong)}; {status}:\n{series.output}" if wrong else ""


@pytest.mark.parametrize("turned", [False, True])
def test_asked_to_stop_it_keeps_what_it_has_says_how_to_go_on_and_ends_with_the_same_bits(
    small_run, tmp_path, turned, record_fault, long
):
    if turned and not long:
        pytest.skip("make faults sends each stage the other signal too")
    path, usual, rows = tmp_path / "run", stage_seconds(small_run), []
    stages = ("00", "01", "02", "03", "03", "04", "05") if long else ("01", "03", "03", "05")
    for place, stage in enumerate(stages):
        number = (signal.SIGTERM, signal.SIGINT)[(place + turned) % 2]
        before = set(path.glob(CHECKPOINTS))
        series = SeriesProcess(path)
        begun = "state.json"  # before it is there nothing was begun, and there is nothing to go on with
        assert series.wait_until(stage, 0 if stage == "03" else usual[stage] / 2, begun), series.output
        if stage == "03":  # in the middle of training, and further on the second time
            assert wait_for(lambda: set(path.glob(CHECKPOINTS)) - before)  # noqa: B023
        asked = time.monotonic()
        ask(series, number)
        wrong = stopped_well(series, number)
        if stage == "03" and not wrong:
            said = re.search(r"Training stopped at step (\d+) of 16 with a checkpoint", series.output)
            kept = said and path.glob(f"training/checkpoints/*/checkpoint-{said[1]}/trainer_state.json")
            wrong = "" if kept and list(kept) else f"no checkpoint of the last step:\n{series.output}"
        rows.append((series.place, number, wrong, series.lost(asked)))
    last = SeriesProcess(path)
    same = last.wait() == 0 and results(path) == results(small_run)
    for stage, number, wrong, lost in rows:
        record_fault(f"{SIGNALS[number]} in {stage}", survived=int(same and not wrong), lost_seconds=lost)
    assert not [wrong for _, _, wrong, _ in rows if wrong], rows
    assert same, last.output


def test_a_second_one_ends_it_at_once(tmp_path, record_fault):
    series = SeriesProcess(tmp_path / "run")
    assert series.wait_until("01", 1.0)
    [os.kill(one.pid, signal.SIGSTOP) for one in series.everybody()[1:]]  # a kernel that does nothing for a wish
    ask(series, signal.SIGINT)
    time.sleep(3.5)
    ask(series, signal.SIGINT)
    wrong = stopped_well(series, signal.SIGINT)
    record_fault("Ctrl-C twice, the kernel hangs", survived=int(not wrong))
    assert not wrong


def test_a_driver_killed_alone_leaves_no_kernel_at_work_beside_the_next_one(tmp_path, record_fault):
    series = SeriesProcess(tmp_path / "run", "--to", "00")
    assert series.wait_until("00") and wait_for(lambda: (tmp_path / "run" / "manifest.json").exists())
    orphans = series.everybody()[1:]
    os.kill(series.process.pid, signal.SIGKILL)
    series.process.wait()
    again = SeriesProcess(tmp_path / "run", "--to", "00")
    status = again.wait()
    left = [one for one in orphans if one.is_running() and one.status() != "zombie"]
    record_fault("kill -9 of the driver alone", survived=int(status == 0 and not left))
    assert status == 0, again.output
    assert not left


def test_a_kernel_killed_alone_is_told_and_the_same_command_goes_on(tmp_path, record_fault):
    series = SeriesProcess(tmp_path / "run", "--to", "00")
    assert wait_for(lambda: (tmp_path / "run" / "manifest.json").exists())
    os.kill(series.everybody()[1].pid, signal.SIGKILL)
    told = series.wait() == 1 and "its kernel died" in series.output and "To continue" in series.lines[-1]
    again = SeriesProcess(tmp_path / "run", "--to", "00")
    status = again.wait()
    record_fault("kill -9 of the kernel alone", survived=int(told and status == 0))
    assert told, series.output
    assert status == 0, again.output


def wait_for(condition, seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
