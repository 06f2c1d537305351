"""A stand-in for DeepSeek-R1-Distill-Llama-8B: exact shapes, random weights, DeepSeek's special tokens.

    python -m benchmarks.standin /tmp/standin-8b [--vocabulary llama3_bpe.model] [--size 8b|1b|tiny] \
        [--quantised /tmp/standin-8b-4bit]

It takes the place of the real model's folder wherever weights cannot be fetched. With `--vocabulary`, a Llama-3
vocabulary in tiktoken form, its token counts are the real ones; otherwise a small vocabulary is trained here and padded
to the real size. With `--quantised` it is written in 4 bit too, as the repositories ending in -bnb-4bit are.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Annotated

import typer

from utils.data.prompts import ASSISTANT, BOS, EOS, PAD, USER
from utils.models.tiny import CHAT_TEMPLATE, train_tokenizer

# meta-llama/llama-models, models/llama3/tokenizer.py
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2},
}  # fmt: skip


def build_tokenizer(vocabulary: Path | None):
    """DeepSeek's tokenizer over the Llama-3 vocabulary (ids 0 to 127,999), or over one trained on the demo's text."""
    if vocabulary is None:
        from utils.data import synthetic as demo_data

        texts = [text for row in demo_data.base_rows(2000) for text in row.values()]
        return train_tokenizer(texts)
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        """Reads the file itself: lines of base64 token and rank; the original asks for the tiktoken package."""

        @staticmethod
        def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
            lines = Path(path).read_bytes().splitlines()
            return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}

    backend = Converter(str(vocabulary), pattern=_SPLIT).converted()
    # As published: 128,000 BOS, 128,001 EOS, 128,004 padding, 128,011 user, 128,012 assistant, 128,013/14 think.
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(9)]
    names = [BOS, EOS, reserved[0], reserved[1], PAD, *reserved[2:8], USER, ASSISTANT]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=16384
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_standin(target: Path, vocabulary: Path | None = None, size: str = "8b", shard_gib: float = 5.0) -> None:
    """Write config, sharded bf16 safetensors of random weights, and tokenizer to `target`; one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(vocabulary)
    config = LlamaConfig(
        **_SHAPES[size],
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map, shard, held, count = {}, {}, 0, math.ceil(_total_bytes(shapes) / (shard_gib * 2**30))
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        if name.endswith("norm.weight"):
            shard[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            shard[name] = (drawn * 0.02).cpu()
        held += shard[name].nbytes
        if held >= _total_bytes(shapes) / count or number == len(shapes):
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, target / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    index = {"metadata": {"total_size": _total_bytes(shapes)}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def quantise(source: Path, target: Path) -> None:
    """The model in `source` as a pre-quantised repository: NF4 by bitsandbytes, made for computing in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source,
        trust_remote_code=False,
        dtype=torch.bfloat16,
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        quantization_config=four_bit,
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(target)


def _total_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values())


def main(
    target: Path,
    vocabulary: Annotated[Path | None, typer.Option(help="A Llama-3 vocabulary in tiktoken form.")] = None,
    size: str = "8b",
    shard_gib: Annotated[float, typer.Option(help="The largest shard.")] = 5.0,
    quantised: Annotated[Path | None, typer.Option(help="Where it goes in 4 bit.")] = None,
) -> None:
    """Build the stand-in in TARGET."""
    build_standin(target, vocabulary if vocabulary and vocabulary.exists() else None, size, shard_gib)
    if quantised:
        quantise(target, quantised)


if __name__ == "__main__":
    typer.run(main)
