"""Make the tokenizers and train the two text encoders, until every attribute of a scene can be read from their outputs.

Linear read-outs of CLIP's pooled output and of every T5 token, pads included, have to name each attribute; they are
thrown away afterwards. The transformer then trains on these encoders, which no longer change.
"""

import json
import random
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from demo.scenes import COLOURS, POSITIONS, SHAPES, SIZES, TRAINED, Scene, caption
from demo.training import train

STEPS = 1200
BATCH = 32
WIDTH = 64
LAYERS = 2
T5_LENGTH = 40  # tokens in training; later pads come out like earlier ones
EMPTY = 0.05  # share of empty captions
CAPTIONS = 20_000  # from which the tokenizers are made
CLIP_VOCABULARY = 800
CHARACTERS = [chr(code) for code in range(33, 127)]

ATTRIBUTES: dict[str, list[str]] = {
    "shape": [*SHAPES, ""],
    "colour": [*COLOURS, ""],
    "background": [*COLOURS, ""],
    "size": [*SIZES, ""],
    "position": [*POSITIONS, ""],
    "style": ["plain", "TOK"],
}


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding of the captions."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=CLIP_VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(_captions(), trainer)
    merges = [tuple(merge) for merge in _model(tokenizer)["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def t5_tokenizer() -> T5Tokenizer:
    """A unigram model of whole words, scored by their frequency in captions; other words are split into letters."""
    words = Counter(word for text in _captions() for word in text.replace(",", " ,").replace(".", " .").split())
    total = sum(words.values())
    pieces = [(f"\u2581{word}", log(count / total)) for word, count in words.items() if word not in {",", "."}]
    rare = log(1 / total) - 5
    letters = [(letter, rare) for letter in CHARACTERS]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", rare)]
    return T5Tokenizer(vocab=special + letters + pieces, extra_ids=0, model_max_length=512)


def _captions() -> list[str]:
    rng = random.Random("captions")
    return [caption(rng.choice(TRAINED), rng) for _ in range(CAPTIONS)]


def new_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_ff=2 * WIDTH,
            d_kv=32,
            num_heads=2,
            num_layers=LAYERS,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


class Readers(nn.Module):
    """Both encoders with a linear read-out of every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer(), t5_tokenizer()
        self.clip, self.t5 = new_clip(self.clip_tokenizer), new_t5(self.t5_tokenizer)
        answers = sum(len(values) for values in ATTRIBUTES.values())
        self.clip_reader, self.t5_reader = nn.Linear(WIDTH, answers), nn.Linear(WIDTH, answers)

    def forward(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Logits from CLIP [n, answers] and from every T5 token [n, length, answers]."""
        clip_ids = token_ids(self.clip_tokenizer, texts, 77)
        t5_ids = token_ids(self.t5_tokenizer, texts, length)
        return self.clip_reader(self.clip(clip_ids).pooler_output), self.t5_reader(self.t5(t5_ids)[0])


def token_ids(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Token ids [n, length], padded or cut."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def train_text(folder: Path, steps: int = STEPS) -> None:
    """Train both encoders and write them and their tokenizers into `folder`."""
    torch.manual_seed(0)
    readers = Readers()
    optimizer = torch.optim.AdamW(readers.parameters(), lr=2e-3, weight_decay=0.01)

    def loss(rng: random.Random, _progress: float) -> Tensor:
        texts, answers = labelled_captions(BATCH, rng)
        clip_logits, t5_logits = readers(texts, T5_LENGTH if rng.random() < 0.8 else 128)
        t5_answers = answers[:, None].expand(-1, t5_logits.shape[1], -1)
        return attribute_loss(clip_logits, answers) + attribute_loss(t5_logits, t5_answers)

    train("text", readers, [optimizer], steps, loss, average=0.99)
    readers.clip.save_pretrained(folder / "text_encoder")
    readers.t5.save_pretrained(folder / "text_encoder_2")
    readers.clip_tokenizer.save_pretrained(folder / "tokenizer")
    readers.t5_tokenizer.save_pretrained(folder / "tokenizer_2")


def labelled_captions(count: int, rng: random.Random) -> tuple[list[str], Tensor]:
    """Captions and the index of each attribute's value [count, attributes]."""
    texts, answers = [], []
    for _ in range(count):
        scene = rng.choice(TRAINED)
        text = "" if rng.random() < EMPTY else caption(scene, rng)
        texts.append(text)
        answers.append([values.index(_value(name, scene, text)) for name, values in ATTRIBUTES.items()])
    return texts, torch.tensor(answers)


def _value(attribute: str, scene: Scene, text: str) -> str:
    if attribute == "style":
        return "TOK" if "TOK" in text else "plain"
    return str(getattr(scene, attribute)) if text else ""


def attribute_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean cross entropy over the attributes; `logits` [..., all values], `answers` [..., attributes]."""
    parts = torch.split(logits, [len(values) for values in ATTRIBUTES.values()], dim=-1)
    losses = [F.cross_entropy(part.flatten(0, -2), answers[..., i].flatten()) for i, part in enumerate(parts)]
    return torch.stack(losses).mean()
