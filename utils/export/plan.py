"""What 05 exports besides the adapter, and where each goes: decided and said before anything large is fetched or made."""

import math
import shutil
from collections.abc import Iterable

from utils.errors import ModelError
from utils.export.adapter import measure_base
from utils.export.gguf import BITS, fetch_llama_cpp, find_llama_cpp
from utils.export.places import Plan, scratch_folder
from utils.hardware import GIB, free_disk_gib, require_disk, where
from utils.pipeline.run_dir import RunDir
from utils.project import KAGGLE
from utils.secrets import find_secret

_OUTPUT_BYTES = 19e9  # of the 20 GB that Kaggle keeps of a session
_TOO_LARGE = "{:.3g} GB, and {:.3g} GB are left; with export.push_to_hub and HF_TOKEN it is made, and uploaded"
_NO_LLAMA_CPP = "no llama.cpp was found; get one as docs/exports.md says, then delete export/ and run 05 again"


def plan_exports(run: RunDir) -> Plan:
    """What `export.merged` and `export.gguf` come to here; `auto` on Kaggle and Colab is q4_k_m and no merged model.

    What the session's output has room for is kept, q4_k_m first; the rest is made only where it will be uploaded.
    """
    wanted, own = run.config.export, where() == "local"
    merged = own if wanted.merged == "auto" else wanted.merged
    kinds = list(BITS)[: 3 if own else 1] if wanted.gguf == "auto" else [kind for kind in BITS if kind in wanted.gguf]
    plan = Plan(kinds)
    if not merged:
        ask = "export.merged=true asks for it" if own else "export.merged=true export.gguf=[] ask for it"
        plan.left_out["merged"] = ask
    if kinds:
        fetch = not own if wanted.install_llama_cpp == "auto" else wanted.install_llama_cpp
        plan.llama_cpp = find_llama_cpp() or (fetch_llama_cpp() if fetch else None)
        if plan.llama_cpp is None:
            plan.left_out["gguf"], plan.kinds = _NO_LLAMA_CPP, []
    if not own:  # an earlier run's exports would take the room; at home they stay until the new ones are whole
        for kind in ("gguf", "merged"):
            shutil.rmtree(run.file(f"export/{kind}"), ignore_errors=True)
    if merged or plan.kinds:
        _find_places(run, plan, merged)
    return plan


def _find_places(run: RunDir, plan: Plan, merged: bool) -> None:
    try:
        sizes, commit = measure_base(run.config)
    except ModelError as error:
        if merged or where() == "local":
            raise
        plan.kinds, plan.left_out["gguf"] = [], str(error)
        return
    weights, room = sum(sizes.values()), output_room(run)
    if commit:
        plan.lines.append("The base comes shard by shard: this disk has no room for it beside what is made of it.")
        require_disk(scratch_folder(run, "base"), max(sizes.values()) / GIB, "Fetching one shard of the base")
    uploaded = bool(run.config.export.push_to_hub and find_secret("HF_TOKEN"))
    while plan.kinds and not uploaded and gguf_bytes(weights, plan.kinds) > room:
        largest = plan.kinds.pop()
        size, left = gguf_bytes(weights, [largest]), room - gguf_bytes(weights, plan.kinds)
        plan.left_out[f"gguf {largest}"] = _TOO_LARGE.format(size / 1e9, left / 1e9)
    for kind, size in (("gguf", gguf_bytes(weights, plan.kinds)), ("merged", weights * merged)):
        kept = size <= room
        if size and (kept or uploaded):
            room -= size * kept
            plan.places[kind] = run.file(f"export/{kind}") if kept else scratch_folder(run, kind)
            fate = "kept" if kept else "too large to be kept: uploaded, and gone with the session"
            plan.lines.append(f"{kind}: {size / 1e9:.3g} GB, {fate}")
        elif size:
            plan.left_out[kind] = _TOO_LARGE.format(size / 1e9, room / 1e9)


def gguf_bytes(weights: float, kinds: Iterable[str]) -> float:
    """What files of these kinds take, of a model with so many bytes in 16 bit."""
    return sum(weights * BITS[kind] / 16 for kind in kinds)


def output_room(run: RunDir) -> float:
    """Bytes that can still be kept: on Kaggle of its output, on Colab of the run's disk (a Drive); elsewhere all."""
    if where() == "colab":
        return free_disk_gib(run.path) * GIB
    if where() == "local":
        return math.inf
    working = KAGGLE / "working"
    root = working if run.path.is_relative_to(working) else run.path
    return _OUTPUT_BYTES - sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
