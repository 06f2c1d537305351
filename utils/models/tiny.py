"""The embedded default's model: a tiny Llama in DeepSeek's shape, trained on first use, cached, deterministic."""

import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from utils.data.prompts import ASSISTANT, BOS, EOS, PAD, USER, format_row
from utils.data.synthetic import DISCLAIMER, base_rows
from utils.hardware import threads
from utils.progress import track
from utils.project import cache_dir, embedded_fingerprint

VOCABULARY = 1500
ROWS, STEPS, BATCH = 8000, 750, 8
LEARNING_RATE, WARMUP = 3e-3, 40
THREADS = 2  # whatever the machine has: sums come in one order, and 64 threads do not wait for each other
SEED = 0

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def ensure_model() -> Path:
    """The folder of the embedded base model, built on first use and reused afterwards."""
    target = cache_dir() / f"demo-{embedded_fingerprint()}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            build_model(Path(scratch) / "model")
            with suppress(OSError):  # another process was faster
                (Path(scratch) / "model").rename(target)
    return target


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY):
    """A byte-level BPE tokenizer with DeepSeek's special tokens, BOS and chat template, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=8192
    )
    # As in the real vocabulary, the think marks are single tokens but not special: they survive decoding.
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(target: Path) -> None:
    """Train tokenizer and base model from nothing and save both to `target`; bit-identical on one machine."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = base_rows(ROWS)
    texts = [prompt + completion + EOS for prompt, completion in (format_row(row, "native") for row in rows)]
    tokenizer = train_tokenizer(texts)
    encoded = [torch.tensor(ids) for ids in tokenizer(texts).input_ids]

    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]), threads(THREADS):
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=8192, tie_word_embeddings=True, **shape, **special
        )
        model = LlamaForCausalLM(config)
        _train(model, encoded, tokenizer.pad_token_id)
    model.generation_config.do_sample = False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text(f"A tiny model of the demo. {DISCLAIMER}\n", encoding="utf-8")


def _train(model, encoded: list, pad: int) -> None:
    """A plain loop over whole sequences: prompt tokens count too, or the model never learns to copy findings."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=WARMUP / STEPS, cycle_momentum=False
    )
    model.train()
    order = torch.randperm(len(encoded)).tolist()
    for step in track(range(STEPS), "building the demo's base model", unit="step"):
        chosen = [encoded[order[(step * BATCH + i) % len(order)]] for i in range(BATCH)]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == pad, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
