"""One more process for every further GPU, each with the same model, answering its share of the questions.

    with Workers(run, "baseline") as workers:
        answer_questions(..., helpers=workers)

The processes do not talk to each other: each appends to a file of its own, and what one leaves undone, because it ran
out of memory or was killed, is answered by the notebook's own process afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from utils.evaluation.questions import Question, arm_digest, load_questions
from utils.files import write_json
from utils.hardware import gpu_ids, processes
from utils.pipeline.run_dir import RunDir, open_run
from utils.project import ROOT, python_path
from utils.secrets import hide_secrets

_ADAPTER = "training/adapter"
PARENT = "SERIES_PARENT"  # set where standard input is held open by the process that waits for us


class Workers:
    """The other processes of one arm; none where there is a single GPU, or none."""

    def __init__(self, run: RunDir, arm: str):
        self.run, self.arm, self.count = run, arm, processes(run.config.hardware)
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        for process in self._started:
            process.terminate()
        for process in self._started:
            process.wait()
        self._started = []

    def start(self, questions: Sequence[Question]) -> Sequence[Question]:
        """Give every process its share and return ours: each `count`-th, so that all shares are alike in length."""
        ordered = sorted(questions, key=lambda q: (-len(q.prompt), q.id))
        if len(ordered) < 2 * self.count:
            return ordered  # loading a model would take longer than answering
        for number in range(1, self.count):
            self._started.append(self._launch(number, ordered[number :: self.count]))
        return ordered[:: self.count]

    def wait(self) -> None:
        """Until every process has ended; one that failed is told, and its share is left to the caller."""
        for number, process in enumerate(self._started, start=1):
            waiting = time.monotonic()
            if process.wait() != 0:
                log = self._file(number, "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                print(f"process {number} failed ({(log or ['no message'])[-1][:200]}); its questions are answered here")
            elif time.monotonic() - waiting > 2:
                print(f"waited {time.monotonic() - waiting:.0f} s for process {number}")
        self._started = []

    def _file(self, number: int, ending: str) -> Path:
        return self.run.file(f"workers/{self.arm}-{number}.{ending}")

    def _launch(self, number: int, questions: Sequence[Question]) -> subprocess.Popen:
        write_json(self._file(number, "json"), [question.id for question in questions])
        environment = {**os.environ, "PYTHONPATH": python_path()}
        if number < len(gpu_ids()):
            environment["CUDA_VISIBLE_DEVICES"] = gpu_ids()[number]
        command = [sys.executable, "-m", "utils.evaluation.workers", str(self.run.path), self.arm, str(number)]
        with self._file(number, "log").open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )


def answer_share(run_dir: str, arm: str, number: int) -> None:
    """What a process does: load the model as the notebook did, and answer the questions listed for it."""
    import json

    from utils.evaluation.generate import answer_questions, share_path
    from utils.models.load import load_model, ready_for_inference

    run = open_run("auto", run_dir)
    listed = json.loads(run.file(f"workers/{arm}-{number}.json").read_text(encoding="utf-8"))
    questions = {question.id: question for question in load_questions(run)[0]}
    model, tokenizer = load_model(run.config, adapter=run.file(_ADAPTER) if arm == "tuned" else None)
    model = ready_for_inference(model)
    place = os.environ.get("CUDA_VISIBLE_DEVICES") if model.device.type == "cuda" else "cpu"
    print(f"{len(listed)} questions on device {place}", flush=True)
    path = share_path(run.file(f"{arm}/answers.jsonl"), number)
    answer_questions(model, tokenizer, [questions[i] for i in listed], run.config.generate, path, arm_digest(run, arm))


def end_with_parent() -> None:
    """The parent holds our standard input open; when it is gone, however it went, nobody waits for our answers."""

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock a daemon thread would still hold when Python shuts down
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    hide_secrets()
    end_with_parent()
    answer_share(sys.argv[1], sys.argv[2], int(sys.argv[3]))
