"""The parts of a run's wall time are those of its files and cells, and add up to the whole."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import nbformat
import pytest

from benchmarks import wall
from benchmarks.evidence import where
from utils.files import write_json
from utils.pipeline.stages import STAGES

BEGAN, KERNEL_S, CELL_S, LEAVING_S = 1_800_000_000, 5, 10, 2  # of each notebook, the next a thousand seconds later


@pytest.fixture
def run_dir(tmp_path):
    """A run of the committed notebooks in which every code cell took ten seconds, with the files that tell of parts."""
    folder = tmp_path / "report" / "notebooks"
    folder.mkdir(parents=True)

    def stamps(began: float, ended: float) -> dict:
        times = {"start_time": began, "end_time": ended}
        return {key: datetime.fromtimestamp(time, UTC).isoformat() for key, time in times.items()}

    for number, stage in enumerate(STAGES):
        notebook = nbformat.read(stage.notebook, as_version=4)
        began = at = BEGAN + 1000 * number
        at += KERNEL_S
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.metadata["papermill"] = stamps(at, at + CELL_S)
                at += CELL_S
        notebook.metadata["papermill"] = stamps(began, at + LEAVING_S)
        nbformat.write(notebook, folder / f"{stage.name}.ipynb")
    for name, which in wall._QUESTIONS.items():
        asked, _ = wall.Cells(folder / f"{name}.ipynb").calling("evaluate_model(")
        for file, after in (("answers.jsonl", 3), ("forced.jsonl", 4), ("nll.parquet", 6)):
            write_at(tmp_path / which / file, asked + after)
    trained, _ = wall.Cells(folder / "03_lora_training.ipynb").calling("train_adapter(")
    write_at(tmp_path / "training" / "step_plan.json", trained + 6, {"trials": [{"tokens_per_second": 5}]})
    write_at(tmp_path / "training" / "summary.json", trained + 9, {"update_seconds": [0.5, 0.5]})
    started = trained - 4.0
    record = {
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "figures": {"seconds_to_first_update": 11.0},
    }
    write_json(tmp_path / "manifest.json", {"profile": "t4", "stages": {"03_lora_training": record}})
    return tmp_path


def write_at(path, time: float, content: object = None) -> None:
    write_json(path, content)
    os.utime(path, (time, time))


def test_the_parts_are_told_by_cells_and_files_and_add_up_to_the_whole(run_dir):
    parts = wall.parts_of(run_dir, 1000.0, trials=4.0)
    assert sum(parts.values()) == pytest.approx(1000.0)
    assert parts["notebooks begun and left"] == 6 * (KERNEL_S + LEAVING_S + 2 * CELL_S)
    assert (parts["answers"], parts["forced letters"], parts["losses"]) == (6.0, 2.0, 4.0)
    assert (parts["trials"], parts["first update"], parts["updates"]) == (4.0, 1.0, 1.0)
    assert parts["loads"] == 2 * CELL_S + 6.0 - 4.0
    codes = {
        stage.number: sum(c.cell_type == "code" for c in nbformat.read(stage.notebook, 4).cells) for stage in STAGES
    }
    assert parts["exports"] == CELL_S * (codes["05"] - 2)
    assert parts["rows and questions"] == CELL_S * (codes["00"] - 2 + codes["02"] - 2)


def test_a_run_without_trials_has_none_of_their_seconds(run_dir):
    write_at(run_dir / "training" / "step_plan.json", BEGAN + 3000 + KERNEL_S + 3 * CELL_S, {"trials": []})
    assert wall.parts_of(run_dir, 1000.0, trials=4.0)["trials"] == 0.0


def test_the_share_of_the_trials_is_of_training_all_rows_at_the_measured_speed():
    ours = {"seconds": {"trials": 30.0}, "tokens_per_second": 8000.0}
    assert wall.trials_share(ours, rows=4000, tokens=600.0) == 0.1


def test_figures_of_another_machine_are_refused_by_a_sentence(tmp_path):
    write_json(tmp_path / "train.json", {**where(), "configurations": {"ours": {"fit": 1}}})
    assert wall.measured_ours(tmp_path / "train.json") == {"fit": 1}
    write_json(tmp_path / "train.json", {**where(), "gpu": ["another"], "configurations": {"ours": {}}})
    with pytest.raises(
        SystemExit, match=r"The gpu of .*train.json are not this machine's; measure it here, or leave --train out"
    ):
        wall.measured_ours(tmp_path / "train.json")
