"""Base model and LoRA, loaded by unsloth where it runs and by transformers elsewhere: ordinary PEFT models both."""

import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from utils.errors import HardwareError, ModelError, first_line
from utils.hardware import GIB, gpu_ids, local_rank, resolve_hardware
from utils.models.tokenizer import load_tokenizer, model_source, require_safetensors
from utils.models.unsloth_patches import import_unsloth, patch_unsloth
from utils.schema import Config, LoraSection
from utils.secrets import share_secrets

LOADS: Counter[str] = Counter()  # models by name, loaded by this process or by those that it started: for the manifest
_T4_GIB, _T4_KIND = 14.0, (40, 7, 5)  # memory for one process; multiprocessors and compute capability


def start_backend(config: Config) -> str:
    """Prepare `unsloth`, which patches transformers, or `transformers`; HardwareError where it cannot run."""
    prepare_device(config)
    resolved = resolve_hardware(config.hardware)
    if resolved["backend"] == "transformers":
        return "transformers"
    if resolved["device"] == "cpu":
        raise HardwareError("hardware.backend=unsloth needs a CUDA GPU; use transformers, or leave it on auto.")
    if importlib.util.find_spec("unsloth") is None:
        raise HardwareError("hardware.backend=unsloth, but unsloth is not installed; run 00_setup to install it.")
    os.environ.setdefault("UNSLOTH_DATASET_NUM_PROC", "0")  # starting its eight processes costs each trial seconds
    if config.train.step_plan == "auto":  # a step plan fills the memory
        # GiB for the loss, read on import: four pieces for 2,048 tokens. By itself unsloth takes half of what is free when it
        # first looks: on a full GPU that makes dozens of pieces, each of which reads the whole output head.
        os.environ.setdefault("UNSLOTH_CE_LOSS_TARGET_GB", "1")
    import_unsloth()
    from torch._inductor import config as inductor

    inductor.deterministic = True  # kernels chosen by their speed let a resumed training part from the undisturbed
    patch_unsloth()
    return "unsloth"


def prepare_device(config: Config) -> None:
    """What both backends need before torch starts: the Hub token, one visible GPU, a T4's limits if asked for."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    share_secrets("HF_TOKEN")
    if resolve_hardware(config.hardware)["device"] == "cpu":
        return
    if len(gpu_ids()) > 1 and "LOCAL_RANK" not in os.environ:
        # TRL raises for one process that sees two GPUs (sft_trainer.py), and unsloth would split batches badly.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_ids()[0]
    if config.hardware.emulate_t4:  # choose kernels and run out of memory as on a T4
        if config.model.load_in_4bit:
            from bitsandbytes.backends.cuda import ops

            ops._gpu_dispatch_props = lambda index: _T4_KIND  # which 4-bit products are fused
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        total = torch.cuda.get_device_properties(local_rank()).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, _T4_GIB / total), local_rank())


def torch_dtype(config: Config):
    """The dtype of activations: as configured, or what `resolve_hardware` makes of auto."""
    return getattr(torch, resolve_hardware(config.hardware)["dtype"])


def load_model(config: Config, adapter: Path | None = None, max_seq_length: int | None = None):
    """(model, tokenizer): the base model as configured, with a trained adapter on top where one is given.

    unsloth cuts whatever is longer than `max_seq_length`. Raises ModelError where the model cannot be loaded.
    """
    if max_seq_length is not None:
        room = config.model.model_copy(update={"max_seq_length": max_seq_length})
        config = config.model_copy(update={"model": room})
    backend, source = start_backend(config), model_source(config)
    for folder, what in ((Path(source), "model"), (adapter, "adapter")):
        if folder is not None and folder.is_dir():
            require_safetensors(folder, what)
    tokenizer = load_tokenizer(source, config.model.revision)
    try:
        if backend == "unsloth":
            from unsloth import FastLanguageModel

            model, _ = FastLanguageModel.from_pretrained(
                model_name=source,
                revision=config.model.revision,
                max_seq_length=config.model.max_seq_length,
                dtype=torch_dtype(config),
                load_in_4bit=config.model.load_in_4bit,
                trust_remote_code=False,
                use_exact_model_name=True,  # or the Hub id is silently remapped to a dynamically quantised repository
            )
            model.loaded_through_unsloth = True
            model.generation_config.max_length = None  # set by unsloth, and warned of in every batch
            LOADS[Path(source).name] += 1
        else:
            model = load_plain(config, source)
    except (OSError, ValueError, SafetensorError) as error:
        expected = "expected a Hub id that can be reached, or a folder with config.json and safetensors"
        raise ModelError(f"The model {source} could not be loaded ({first_line(error)}); {expected}.") from None
    if getattr(model.config, "quantization_config", None) and not config.model.load_in_4bit:
        instead = "name the repository of its 16-bit weights, or leave model.load_in_4bit on"
        raise ModelError(f"The model {source} is stored quantised, but model.load_in_4bit is false; {instead}.")
    if adapter is not None:
        from peft import PeftModel  # it would load a pickle, weights only, where there is no safetensors file

        model = PeftModel.from_pretrained(model, str(adapter))
    return model, tokenizer


def add_lora(model, config: Config, **lora: Any):
    """Wrap the base model with fresh LoRA weights; `lora` are arguments of peft.LoraConfig."""
    if lora.get("target_modules") == ["all-linear"]:
        lora["target_modules"] = list(LoraSection().target_modules) if is_unsloth(model) else "all-linear"
    if is_unsloth(model):
        from unsloth import FastLanguageModel

        # "unsloth" moves activations to main memory; a step plan decides layer by layer, without that.
        kind = True if config.train.step_plan == "auto" else "unsloth"
        return FastLanguageModel.get_peft_model(
            model,
            use_gradient_checkpointing=kind if config.train.gradient_checkpointing else False,
            random_state=config.train.seed,
            max_seq_length=config.model.max_seq_length,
            **{key: value for key, value in lora.items() if key != "task_type"},
        )
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.train.seed)
    return get_peft_model(model, LoraConfig(**lora))


def ready_for_inference(model):
    """Switch dropout and checkpointing off, the KV cache on."""
    if is_unsloth(model):
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.eval()
    model.config.use_cache = True
    return model


def keep_lora_in_float32(model) -> None:
    """Undo TRL's cast of LoRA weights to bfloat16, which fp16's scaler cannot take; after the trainer is built (TRL 4901)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def is_unsloth(model) -> bool:
    """Whether the model was loaded through unsloth."""
    return getattr(_base_of(model), "loaded_through_unsloth", False)


def transformer_layers(model):
    """The model's stack of layers, LoRA wrapper or not."""
    return _base_of(model).model.layers


def _base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_fused_layers(model) -> dict[str, int] | None:
    """How many layers run unsloth's fused LoRA kernels (qkv, o, mlp), all layers being the goal; None without it."""
    if not is_unsloth(model):
        return None
    from unsloth.kernels import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

    layers = transformer_layers(model)
    return {
        "layers": len(layers),
        "qkv": sum(layer.self_attn.apply_qkv is apply_lora_qkv for layer in layers),
        "o": sum(layer.self_attn.apply_o is apply_lora_o for layer in layers),
        "mlp": sum(getattr(layer.mlp.forward, "__func__", None) is apply_lora_mlp_swiglu for layer in layers),
    }


def load_plain(config: Config, source: str):
    """The model in `source` by plain transformers, in the run's dtype and quantisation, on its device."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    LOADS[Path(source).name] += 1
    device, dtype, four_bit = resolve_hardware(config.hardware)["device"], torch_dtype(config), None
    own = AutoConfig.from_pretrained(source, revision=config.model.revision, trust_remote_code=False)
    if stored := getattr(own, "quantization_config", None):
        # Its maker's dtype for computing comes with it: bfloat16 mostly, which a T4 only emulates.
        own.quantization_config = stored | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    elif config.model.load_in_4bit:
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(
        source,
        config=own,
        revision=config.model.revision,
        trust_remote_code=False,  # left out, transformers asks whoever sits there
        use_safetensors=True,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": torch.device("cuda", local_rank()) if device == "cuda" else "cpu"},
        quantization_config=four_bit,
    )
