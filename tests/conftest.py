"""Real parts in small: a tiny random Llama as a model folder and as a served folder, and a tiny random BERT."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

# Tiny models gain nothing from threads, and lose much where several processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

SERVED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_TEXT = [
    "The quick brown fox jumps over the lazy dog while the sentiment of the tweet is positive, negative or neutral.",
    "system user assistant Classify the following message and answer with one word. Please help me with my order.",
    "A luthier builds and tunes instruments; this one tunes language models, from raw data to a served model.",
    "0 1 2 3 4 5 6 7 8 9 10 yes no maybe hello world good morning, how are you today? Thank you very much!",
]
VOCABULARY_SIZE = 400
CONTEXT_TOKENS = 2048
ENCODER_CONTEXT_TOKENS = 64
ENCODER_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a random Llama (2 layers, hidden 64, 400 tokens, context 2,048) as a Hugging Face model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    folder.mkdir()
    size = _write_tokenizer(folder)
    _write_weights(folder, size)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a random BERT (2 layers, hidden 32, some 200 tokens, context 64) as a Hugging Face model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    folder.mkdir()
    _write_encoder_weights(folder, _write_encoder_tokenizer(folder))
    return folder


@pytest.fixture(scope="session")
def served_tiny_model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a served model folder of the tiny model: GGUF weights and the files of its chat format."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    folder.mkdir()
    for name in SERVED_FILES:
        shutil.copy(tiny_base / name, folder / name)
    _write_gguf(tiny_base, folder / "model.gguf")
    return folder


@pytest.fixture(scope="session")
def endless_model(served_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a served model folder whose greedy answers only end at their limit.

    Its end-of-turn token is the padding token, whose embedding is zero: some other token always scores higher.
    """
    folder = Path(shutil.copytree(served_tiny_model, tmp_path_factory.mktemp("served") / "endless"))
    for name, change in {
        "config.json": {"eos_token_id": SPECIAL_TOKENS.index("<|endoftext|>")},
        "generation_config.json": {"eos_token_id": SPECIAL_TOKENS.index("<|endoftext|>")},
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
    }.items():
        settings = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(settings | change), "utf-8")
    return folder


def _write_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": CONTEXT_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "chat_template.jinja").write_text(CHATML, "utf-8")
    return int(tokenizer.get_vocab_size())


def _write_weights(folder: Path, vocabulary_size: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=SPECIAL_TOKENS.index("<|im_start|>"),
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        # Not <|im_end|>: transformers starts the padding token's embedding at zero, and it could never be learned.
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


def _write_encoder_tokenizer(folder: Path) -> int:
    """Write a WordPiece tokenizer that, like all-MiniLM's, pads and truncates by itself."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=ENCODER_SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    first, last = (ENCODER_SPECIAL_TOKENS.index(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": ENCODER_CONTEXT_TOKENS,
        **dict(zip(names, ENCODER_SPECIAL_TOKENS, strict=True)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return int(tokenizer.get_vocab_size())


def _write_encoder_weights(folder: Path, vocabulary_size: int) -> None:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=ENCODER_CONTEXT_TOKENS,
        pad_token_id=ENCODER_SPECIAL_TOKENS.index("[PAD]"),
        initializer_range=0.2,
    )
    BertModel(config).to(torch.float32).save_pretrained(folder)


def _write_gguf(folder: Path, destination: Path) -> None:
    from luthier.compress.engine.gguf import write_gguf

    write_gguf(folder, destination, "f16")
