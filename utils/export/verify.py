"""Are the exports what was trained? Each is loaded back in a fresh process and held against the model in memory.

`python -m utils.export.verify TASK.json` is that process: nothing of the notebook that wrote the exports is in its
memory, and the tokenizer is the one in the export's own folder.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from utils.data.prompts import format_prompt
from utils.errors import ModelError
from utils.export import compare_logits
from utils.export.compare_logits import Continuations
from utils.export.gguf import check_folder
from utils.export.merge import find_shards, list_tensors
from utils.files import read_json, write_json
from utils.hardware import resolve_hardware
from utils.models.load import LOADS, load_plain, prepare_device
from utils.models.memory import free_memory
from utils.models.tokenizer import guard_tokenizer, load_tokenizer, model_source
from utils.pipeline.run_dir import RunDir
from utils.pipeline.stages import BY_NAME
from utils.processes import Child
from utils.schema import Config
from utils.secrets import hide_secrets

REFERENCE = "export/reference.safetensors"
_GGUF_PROMPTS = 20


def export_prompts(run: RunDir) -> list[str]:
    """The held-out prompts that exports are compared on."""
    held_out = pd.read_parquet(run.file("data/eval.parquet")).head(run.config.export.prompts)
    return [format_prompt(question, run.config.prompt) for question in held_out["Question"]]


def write_reference(run: RunDir) -> None:
    """Continue the prompts with the trained adapter on its base, here in memory, and keep that beside the exports."""
    from peft import PeftModel

    prepare_device(run.config)
    model = load_plain(run.config, model_source(run.config))
    model = PeftModel.from_pretrained(model, str(run.file("training/adapter"))).eval()
    tokenizer = load_tokenizer(model_source(run.config), run.config.model.revision)
    reference = compare_logits.continue_greedily(model, tokenizer, export_prompts(run), "the model in memory")
    del model
    free_memory()
    reference.save(run.file(REFERENCE))


def choose_tolerances(run: RunDir, folders: Mapping[str, Path]) -> dict[str, str]:
    """{adapter, merged: how far it may be from the model in memory}, by the dtypes of both (see `choose_tolerance`)."""
    now, then = resolve_hardware(run.config.hardware), run.record(BY_NAME["05_export"]).get("computed_on") or {}
    # Another device or backend rounds float32 otherwise.
    dtypes = {now["dtype"]} if now == then else {now["dtype"], then.get("dtype"), "float16"}
    tolerances = {"adapter": compare_logits.choose_tolerance(dtypes)}
    if "merged" in folders:
        dtypes |= {dtype for _, dtype, _ in list_tensors(find_shards(folders["merged"])).values()}
        dtypes |= {"4-bit"} if run.config.model.load_in_4bit else set()
        tolerances["merged"] = compare_logits.choose_tolerance(dtypes)
    return tolerances


def verify_exports(run: RunDir, folders: Mapping[str, Path]) -> dict[str, dict]:
    """Load the exports back and compare: figures by check; raises ModelError where one misses its tolerance."""
    tolerances, prompts, figures = choose_tolerances(run, folders), export_prompts(run), {}
    reference = Continuations.load(run.file(REFERENCE))
    answers = answer_elsewhere(run.config, {kind: folders[kind] for kind in tolerances}, prompts, run.file(REFERENCE))
    for kind, tolerance in tolerances.items():
        found = compare_logits.compare(reference, answers[kind])
        level = "exact" if tolerance == "exact" else f"rounded to {tolerance}"
        figures[kind] = {"level": level, **found}
        if problem := compare_logits.check_tolerance(found, tolerance):
            raise ModelError(f"The exported {kind}, loaded back, gives {problem}; delete export/ and run 05 again.")
    if "gguf" in folders:
        # In 4-bit, the model in memory is no measure of files that were rounded less.
        asked, judged = prompts[:_GGUF_PROMPTS], not run.config.model.load_in_4bit
        figures |= check_folder(folders["gguf"], load_tokenizer(folders["adapter"]), asked, reference, judged)
    return figures


def answer_elsewhere(
    config: Config, folders: Mapping[str, Path], prompts: Sequence[str], reference: Path
) -> dict[str, Continuations]:
    """{kind: continuations} of exports that follow the reference in a fresh process, or ModelError."""
    with tempfile.TemporaryDirectory() as scratch:
        task = Path(scratch) / "task.json"
        wanted = {"folders": {kind: str(folder) for kind, folder in folders.items()}, "reference": str(reference)}
        write_json(task, wanted | {"config": config.model_dump(mode="json"), "prompts": list(prompts)})
        command = [sys.executable, "-m", "utils.export.verify", task]
        with Child(command, task.with_name("log"), {"PYTHONUNBUFFERED": "1"}) as child:
            if child.wait():
                raise ModelError(f"An export could not be loaded afresh ({child.last_words()}); run 05 again.")
        loaded = (model_source(config) if kind == "adapter" else folder for kind, folder in folders.items())
        LOADS.update(Path(source).name for source in loaded)
        return {kind: Continuations.load(task.with_name(f"{kind}.safetensors")) for kind in folders}


def answer(task: Path) -> None:
    """What the fresh process does."""
    wanted = read_json(task)
    config = Config.model_validate(wanted["config"])
    prepare_device(config)
    reference = Continuations.load(Path(wanted["reference"]))
    for kind, folder in wanted["folders"].items():
        model, tokenizer = load_export(config, folder, on_base=kind == "adapter")
        answers = compare_logits.follow(model, tokenizer, wanted["prompts"], reference, f"loaded back: {kind}")
        answers.save(task.with_name(f"{kind}.safetensors"))
        del model
        free_memory()


def load_export(config: Config, folder: str, on_base: bool = False):
    """(model, tokenizer) of an export, as a stranger loads it; an adapter goes `on_base`, the run's base model."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    model = load_plain(config, model_source(config) if on_base else folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    guard_tokenizer(tokenizer, folder)
    return (PeftModel.from_pretrained(model, folder) if on_base else model).eval(), tokenizer


def write_record(run: RunDir, folders: Mapping[str, Path], figures: dict[str, dict]) -> None:
    """export/verify.json: where the exports are, what was compared, and the tolerances."""
    places = {
        kind: str(folder.relative_to(run.path) if folder.is_relative_to(run.path) else folder)
        for kind, folder in folders.items()
    }
    tolerances = {"exact": compare_logits.EXACT, **compare_logits.ROUNDED}
    write_json(run.file("export/verify.json"), {"folders": places, "tolerances": tolerances, "agreement": figures})


if __name__ == "__main__":
    hide_secrets()
    answer(Path(sys.argv[1]))
