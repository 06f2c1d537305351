"""The configurations of `benchmarks.train`, and what they change in notebook 03's recipe: packing, attention, batch size.

A T4 has neither flash attention nor what is built on it, so wherever xformers is taken, it is by its cutlass kernel.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from benchmarks.training_graphs import use_graphs
from utils.errors import first_line
from utils.hardware import gpus

_T4 = {"hardware.emulate_t4": True, "hardware.dtype": "float16", "train.loss_on": "all", "prompt.style": "native",
       "train.save_steps": 10_000, "train.num_train_epochs": 100}  # fmt: skip
_OURS = {"profile": "t4"}
# Packs of 2,048 tokens, four in an update, as ours, in one micro-batch; every layer recomputes.
_UNSLOTH_PACKING = {**_OURS, "attention": "unsloth", "train.step_plan": "given"}
# Not train.packing, for which 03 would take as many padded rows as its packs hold: the case packs by itself.
_PLAIN_PACKING = {**_OURS, "pack": True, "hardware.backend": "transformers", "train.packing": False,
                  "train.step_plan": "given"}  # fmt: skip
DRY = {"hardware.device": "cpu", "hardware.backend": "transformers", "hardware.dtype": "float32",
       "hardware.emulate_t4": False, "model.load_in_4bit": False, "train.optim": "adamw_torch"}  # fmt: skip
CASES: dict[str, dict] = {
    "tutorial": {"profile": "tutorial", "what": "the tutorial's recipe under unsloth: 2 x 4 rows"},
    "plain": {"profile": "tutorial", "what": "the same in plain TRL + PEFT + bitsandbytes, padded",
              "hardware.backend": "transformers"},
    "ours": {**_OURS, "what": "profile t4: packed, step plan by trials"},
    "ours, one pack at a time": {**_OURS, "one": True,
                                 "what": "the plan of least arithmetic, which limits a T4: 1 x 4, as few layers recomputing as fit"},
    "ours, 1,024 tokens": {**_OURS, "what": "packs of 1,024 tokens", "model.max_seq_length": 1024},
    "ours, 512 tokens": {**_OURS, "what": "packs of 512 tokens, longer rows cut", "model.max_seq_length": 512},
    "unsloth's attention": {**_OURS, "what": "ours without utils/models/unsloth_patches.py", "attention": "unsloth"},
    "unsloth packing": {**_UNSLOTH_PACKING, "what": "unsloth's packing, padding-free and checkpointing, 4 x 1 packs"},
    "unsloth packing, largest batch": {**_UNSLOTH_PACKING, "largest": True,
                                       "what": "the same with as many packs in an update as fit into one micro-batch"},
    "plain packing": {**_PLAIN_PACKING, "what": "TRL's packing on transformers' padding-free path under sdpa, 4 x 1 packs"},
    "plain packing, 1 x 4": {**_PLAIN_PACKING, "what": "the same, one pack at a time", "train.per_device_train_batch_size": 1,
                             "train.gradient_accumulation_steps": 4},
    "ours, xformers' attention": {**_OURS, "what": "ours with xformers' cutlass kernel, a T4's", "attention": "xformers"},
    "ours, torch's attention": {**_OURS, "what": "ours without xformers where it loads", "attention": "torch"},
    "ours, in graphs": {**_OURS, "one": True, "what": "ours, a micro-batch's pass through the layers and back as two CUDA graphs",
                        "attention": "graphs"},
    "ours, flex attention": {**_OURS, "what": "ours with torch's flex attention", "attention": "flex"},
}  # fmt: skip
LARGEST = 16  # packs in a micro-batch, at which the search for the largest one ends
_BACKENDS = {"xformers": "xformers", "torch": "sdpa", "flex": "sdpa"}  # unsloth's names for them


def settings_of(name: str, standin: Path) -> tuple[str, dict]:
    """(profile, overrides) of a case."""
    chosen = {key: value for key, value in CASES[name].items() if "." in key}
    return CASES[name]["profile"], {**_T4, "model.name": str(standin.resolve()), **chosen, **({} if gpus() else DRY)}


def pack_without_unsloth(make_trainer: Callable) -> Callable:
    """make_trainer with rows packed on the plain backend too, on transformers' padding-free path.

    TRL then passes neither an attention mask nor a cache, and transformers keeps documents apart by their position_ids.
    """
    import trl

    def make(*arguments, **more):
        settings = trl.SFTConfig
        with mock.patch.object(trl, "SFTConfig", lambda **given: settings(**given | {"packing": True})):
            return make_trainer(*arguments, **more)

    return make


def largest_batch(fits: Callable[[int], bool], known: int) -> int:
    """The largest micro-batch that `fits`, from one that is `known` to, by one pack at a time up to `LARGEST`."""
    while known < LARGEST and fits(known + 1):
        known += 1
    return known


def largest_plan(plan, model, tokenizer, config, frame, make_trainer):
    """`plan` with all its packs in one micro-batch, and as many more as fit: then an update holds more rows than ours."""
    from utils.training.step_plan import run_trial

    longest = frame.sort_values("tokens").tail(1)[["prompt", "completion"]]
    times = config.model.max_seq_length // int(frame["tokens"].max()) + 2
    full = longest.assign(completion=longest["completion"] * times)  # fills a whole pack; the trainer cuts it there

    def of(micro: int):
        return replace(plan, per_device_train_batch_size=micro, gradient_accumulation_steps=1)

    def fits(micro: int) -> bool:
        return run_trial(model, tokenizer, config, full, make_trainer, of(micro)) is not None

    return of(largest_batch(fits, plan.per_device_train_batch_size * plan.gradient_accumulation_steps))


def use_attention(kind: str) -> None:
    """Choose what attends within packed rows under unsloth, before a model is loaded.

    `ours` is what the series does, `unsloth` what unsloth does by itself, `xformers`, `torch` (its memory-efficient
    kernel) and `flex` (torch's flex attention) that one; `graphs` is ours in CUDA graphs. Raises SystemExit with a sentence
    that begins with "skipped: " for `xformers` and `torch`, where xformers does not load.
    """
    os.environ["UNSLOTH_TORCH_VARLEN"] = "0"  # flash attention, which unsloth takes from torch 2.12 on, switch or not
    if kind in ("xformers", "torch"):
        try:
            # Raises where it was built for another torch; an import alone only warns then.
            importlib.import_module("xformers._cpp_lib")._register_extensions()
            importlib.import_module("xformers.ops.fmha.cutlass")
        except Exception as error:
            raise SystemExit(f"skipped: xformers does not load here ({first_line(error)})") from None
    from utils.models import unsloth_patches

    choose = unsloth_patches.choose_attention if kind != "unsloth" else lambda unsloths: unsloths
    unsloth_patches.choose_attention = lambda unsloths: _as_on_a_t4(choose(unsloths), _BACKENDS.get(kind))
    if kind == "graphs":
        use_graphs()
    if kind == "flex":
        unsloth_patches.attend_within_documents = flex_attention_within_documents(bool(gpus()))


def _as_on_a_t4(attend: Callable, backend: str | None) -> Callable:
    """`attend`, with `backend` for packed rows (None leaves it to unsloth), and xformers by its cutlass kernel."""

    def attend_so(*, config, context, **more):
        if backend and context.seq_info is not None and context.attention_mask is None:
            config.backend = backend
        if config.backend == "xformers":
            from xformers.ops.fmha import cutlass

            config.xformers_kwargs = {**(config.xformers_kwargs or {}), "op": (cutlass.FwOp, cutlass.BwOp)}
        return attend(config=config, context=context, **more)

    return attend_so


def flex_attention_within_documents(on_gpu: bool) -> Callable:
    """What computes as `unsloth_patches.attend_within_documents` does, by torch's flex attention, compiled `on_gpu`."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=True, fullgraph=True) if on_gpu else flex_attention
    last = [None, None]  # boundaries and mask: one for all layers of a micro-batch

    def attend_within_documents(query, key, value, boundaries, longest: int):
        tokens = query.shape[1]
        if boundaries is not last[0]:
            document = torch.searchsorted(boundaries, torch.arange(tokens, device=query.device), right=True)

            def visible(batch, head, at, other):
                return (document[at] == document[other]) & (at >= other)

            last[:] = boundaries, create_block_mask(visible, None, None, tokens, tokens, device=str(query.device))
        queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))
        return attend(queries, keys, values, block_mask=last[1], enable_gqa=True).transpose(1, 2)

    return attend_within_documents
