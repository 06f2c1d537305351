"""A run directory with everything that 05 reads, made in a second: a tiny model, an adapter, files as 00 to 04 write them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from utils.files import write_json
from utils.models.load import load_model
from utils.pipeline.run_dir import RunDir, open_run

QUESTIONS = [f"A man of {age} has a dry cough. What is it?" for age in range(30, 36)]


def make_run(base: Path, path: Path, **settings) -> RunDir:
    """A run whose adapter's B is not zero, on the model folder `base`; `settings` with __ for a dot."""
    from peft import LoraConfig, get_peft_model

    overrides = {
        "model.name": str(base),
        "export.prompts": 4,
        "evaluate.benchmark.name": "GBaker/MedQA-USMLE-4-options",
        "evaluate.more_benchmarks": [{"name": "qiaojin/PubMedQA", "split": "train"}],
    }
    overrides |= {key.replace("__", "."): value for key, value in settings.items()}
    run = open_run("demo", path, overrides)
    run.save()
    model, tokenizer = load_model(run.config)
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for part in (model, tokenizer):
        part.save_pretrained(run.file("training/adapter"))
    run.file("data").mkdir()
    pd.DataFrame({"Question": QUESTIONS}).to_parquet(run.file("data/eval.parquet"))
    return run


def result(name: str, base: float, tuned: float, low: float, high: float, **values) -> dict:
    """One metric as comparison/metrics.json holds it."""
    return {
        "name": name, "label": values.pop("label", name), "unit": "share", "higher_is_better": True, "n": 200,
        "groups": 200, "base": base, "tuned": tuned, "base_ci95": [base, base], "tuned_ci95": [tuned, tuned],
        "difference": tuned - base, "ci95": [low, high], "test": "exact McNemar", "p_value": 0.01, "p_holm": 0.02,
    } | values  # fmt: skip


def write_evidence(run: RunDir, verdict: str = "worse", **metrics) -> None:
    """What a card is made from; the figures are invented, and worse."""
    sentence = f"On 200 questions, accuracy went from 55.0% to 48.0%. The fine-tuned model is {verdict} on this metric."
    primary = result("multiple_choice", 0.55, 0.48, -0.12, -0.02, label="multiple-choice accuracy, strict")
    write_json(
        run.file("comparison/metrics.json"),
        {
            "profile": "demo",
            "primary": primary,
            "secondary": [
                result("truncated", 0.25, 0.125, -0.2, -0.05, label="answers cut off at the limit"),
                result("multiple_choice:pubmedqa", 0.7, 0.71, -0.02, 0.04),
                result("nll", 1.5, 1.2, -0.4, -0.2, unit="nats per token", p_holm=0.0001),
                result("well_formed", 0.9, 0.95, 0.01, 0.09),
            ],
            "contamination": {"near_benchmark": 7, "exact_duplicates": 3, "largest_group": None},
            "registration": {
                "primary": "multiple_choice", "open_questions": 16, "choice_questions": 200, "questions_sha256": "0",
                "decoding": {"max_new_tokens": 4096, "do_sample": True, "temperature": 0.6, "top_p": 0.95, "seed": 1},
                "seed": 1, "changed_after_answers": False,
            },
            "claims": [{"claim": "knows more", "metric": "multiple_choice", "verdict": verdict, "sentence": sentence}],
            "verdict": verdict,
            "sentence": sentence,
        }
        | metrics,
    )  # fmt: skip
    split = {"source": "invented rows", "revision": "f" * 40, "train_rows": 500, "eval_rows": 200, "dropped": [1, 2]}
    split |= {"train_sha256": "a" * 64, "eval_sha256": "b" * 64, "rule": ""}
    write_json(run.file("data/split.json"), split)
    machine = {"gpus": [{"name": "Tesla T4", "memory_gib": 15.0, "capability": "7.5"}], "processors": 4}
    write_json(run.file("environment.json"), {"machine": machine})
    computed = {"device": "cuda", "backend": "unsloth", "dtype": "float16"}
    manifest = run.manifest()
    manifest["stages"]["03_lora_training"] = {
        "figures": {"steps": 60, "optim": "adamw_8bit", "learning_rate": 0.0002, "lr_scheduler_type": "cosine", "seed": 1},
        "seconds": 2640.0, "peak_memory": {"rss_gib": 4.2, "gpu_reserved_gib": 9.1},
        "computed_on": computed, "versions": {"torch": "2.11.0", "unsloth": "2026.10.7", "trl": None},
    }  # fmt: skip
    write_json(run.manifest_path, manifest)
