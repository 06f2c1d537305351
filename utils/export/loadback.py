"""Exports loaded as a stranger loads them, in a process of their own: `python -m utils.export.loadback TASK.json`.

Nothing of the notebook that wrote them is in memory here, and the tokenizer is the one in the export's own folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import ModelError
from utils.export.compare_logits import Continuations, continue_greedily, follow
from utils.files import write_json
from utils.models.load import load_plain, prepare_device
from utils.models.memory import free_memory
from utils.models.tokenizer import guard_tokenizer
from utils.project import ROOT, python_path
from utils.schema import Config
from utils.secrets import hide_secrets


def answer_elsewhere(
    config: Config, exports: Mapping[str, dict[str, Any]], prompts: Sequence[str], reference: Path
) -> dict[str, Continuations]:
    """Load each export in one fresh process and let it answer the prompts; returns {name: continuations}.

    An export is {"folder", "base" (for an adapter: folder or Hub id), "revision", "four_bit", "follows"}: it follows an
    export before it, or "reference", the file given; without either it decodes by itself. Raises ModelError with the
    process's last line where one cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as scratch:
        task = Path(scratch) / "task.json"
        shutil.copy(reference, task.with_name("reference.safetensors"))
        write_json(task, {"config": config.model_dump(mode="json"), "exports": dict(exports), "prompts": list(prompts)})
        command = [sys.executable, "-m", "utils.export.loadback", str(task)]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if answer.returncode:
            last = (answer.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise ModelError(f"An export could not be loaded in a fresh process ({last}); run 05 again.")
        return {name: Continuations.load(task.with_name(f"{name}.safetensors")) for name in exports}


def load_export(config: Config, folder: Path, base: str | None, revision: str | None, four_bit: bool):
    """(model, tokenizer) of an export: an adapter on `base`, or without one a model complete on its own."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    section = config.model.model_copy(update={"revision": revision, "load_in_4bit": four_bit})
    config = config.model_copy(update={"model": section})
    model = load_plain(config, base or str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    guard_tokenizer(tokenizer, str(folder))
    return (PeftModel.from_pretrained(model, str(folder)) if base else model).eval(), tokenizer


def main(task: Path) -> None:
    """What the process does."""
    wanted = json.loads(task.read_text(encoding="utf-8"))
    config = Config.model_validate(wanted["config"])
    prepare_device(config)
    for name, export in wanted["exports"].items():
        model, tokenizer = load_export(
            config, Path(export["folder"]), export["base"], export["revision"], export["four_bit"]
        )
        prompts, description = wanted["prompts"], f"loaded back: {name}"
        if export["follows"]:
            leader = Continuations.load(task.with_name(f"{export['follows']}.safetensors"))
            answers = follow(model, tokenizer, prompts, leader, description)
        else:
            answers = continue_greedily(model, tokenizer, prompts, description)
        answers.save(task.with_name(f"{name}.safetensors"))
        del model
        free_memory()


if __name__ == "__main__":
    hide_secrets()
    main(Path(sys.argv[1]))
