"""One more process for every further GPU, with a share of the questions; what it leaves is answered here."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from utils.evaluation.questions import FOLDERS, Model, Question, load_questions, model_digest
from utils.files import read_json, write_json
from utils.hardware import gpu_ids, processes
from utils.models.tokenizer import model_source
from utils.pipeline.run_dir import RunDir, open_run
from utils.processes import Child
from utils.secrets import hide_secrets


class Workers(ExitStack):
    """The other processes that answer for one model, ended with the block; none where there is at most one GPU."""

    def __init__(self, run: RunDir, which: Model):
        super().__init__()
        self.run, self.which, self.count = run, which, processes(run.config.hardware)
        self._started: list[Child] = []

    def start(self, questions: Sequence[Question]) -> Sequence[Question]:
        """Give every process its share and return ours: each `count`-th, so that all shares are alike in length."""
        ordered = sorted(questions, key=lambda q: (-len(q.prompt), q.id))
        if len(ordered) < 2 * self.count:
            return ordered  # loading a model would take longer than answering
        from utils.models.load import LOADS  # torch

        for number in range(1, self.count):
            write_json(_listed(self.run, self.which, number), [q.id for q in ordered[number :: self.count]])
            self._started.append(self.enter_context(self._launch(number)))
            LOADS[Path(model_source(self.run.config)).name] += 1
        return ordered[:: self.count]

    def wait(self) -> None:
        """Until every process has ended; of one that failed a line is printed, and its share is left to the caller."""
        for number, child in enumerate(self._started, start=1):
            if child.wait() != 0:
                print(f"process {number} failed ({child.last_words()}); its questions are answered here")

    def _launch(self, number: int) -> Child:
        gpus = gpu_ids()
        environment = {"CUDA_VISIBLE_DEVICES": gpus[number]} if number < len(gpus) else {}
        command = [sys.executable, "-m", "utils.evaluation.workers", str(self.run.path), self.which, str(number)]
        return Child(command, _listed(self.run, self.which, number).with_suffix(".log"), environment)


def _listed(run: RunDir, which: Model, number: int) -> Path:
    """The file with the ids of a worker's questions; its log lies beside it."""
    return run.file(f"workers/{FOLDERS[which]}-{number}.json")


def answer_share(run_dir: str, which: Model, number: int) -> None:
    """What a worker does: load the model as the notebook did, and answer the questions listed for it."""
    from utils.evaluation.evaluate import load_for_inference
    from utils.evaluation.generate import answer_questions, share_path

    run = open_run("auto", run_dir)
    listed = read_json(_listed(run, which, number))
    questions = {question.id: question for question in load_questions(run)[0]}
    model, tokenizer = load_for_inference(run, which)
    path, digest = share_path(run.file(f"{FOLDERS[which]}/answers.jsonl"), number), model_digest(run, which)
    mine, ends = [questions[i] for i in listed], run.config.hardware.max_hours
    answer_questions(model, tokenizer, mine, run.config.generate, path, digest, max_hours=ends)


if __name__ == "__main__":
    hide_secrets()
    answer_share(sys.argv[1], sys.argv[2], int(sys.argv[3]))
