"""A tokenizer of about a hundred words and texts written in them, built here: nothing is downloaded."""

from __future__ import annotations

import random
from typing import Any

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u")]
SIZE = len(SPECIAL) + len(WORDS)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {word: at for at, word in enumerate([*SPECIAL, *WORDS])}
    fast = Tokenizer(WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def texts(count: int, longest: int, seed: int = 3) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(2, longest))) for _ in range(count)]
