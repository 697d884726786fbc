"""Captions as numbers, a word each, and the tokenizer of transformers that says the same.

A sequence has the start, the words, the end, and padding; an empty caption is start, end and padding. Words
are runs of letters and digits in lower case; signs between them are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
"""First entries of every vocabulary. An end of index 2 would make CLIP look for the largest index instead."""
SIGNS = r"[^\w\s]"
"""What is between words, as a regular expression."""
PAD, UNKNOWN, START, END = range(len(SPECIAL))


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Words that captions are made of.

    Raises:
        ValueError: For repeated or empty words, or no room for a word.
    """

    words: tuple[str, ...]
    """In the order of their numbers, the special ones left out; lower case."""
    length: int = 12
    """Numbers of a sequence, start and end included."""

    def __post_init__(self) -> None:
        strange = [word for word in self.words if split_words(word) != [word]]
        if strange or len(set(self.words)) != len(self.words):
            raise ValueError(f"words {strange or self.words}, allowed: different ones in lower case")
        if self.length < 3:
            raise ValueError(f"length of a sequence is {self.length}, allowed: 3 and more")

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.words)

    def ids(self, caption: str) -> list[int]:
        """Numbers of a caption.

        Raises:
            ValueError: For words that are unknown, and for captions that are too long.
        """
        words = split_words(caption)
        if unknown := [word for word in words if word not in self.words]:
            raise ValueError(f"words {unknown} of {caption!r} are unknown, allowed: {', '.join(self.words)}")
        if len(words) > self.length - 2:
            raise ValueError(f"{caption!r} has {len(words)} words, allowed: at most {self.length - 2}")
        known = [START, *(len(SPECIAL) + self.words.index(word) for word in words), END]
        return known + [PAD] * (self.length - len(known))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The same for pipelines, but that unknown words become ``<unk>`` and long captions are cut."""
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        table = {word: i for i, word in enumerate((*SPECIAL, *self.words))}
        backend = Tokenizer(models.WordLevel(table, unk_token=SPECIAL[UNKNOWN]))
        without_signs = normalizers.Replace(Regex(SIGNS), " ")
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), without_signs])
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[START]} $A {SPECIAL[END]}",
            special_tokens=[(SPECIAL[START], START), (SPECIAL[END], END)],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            model_max_length=self.length,
            pad_token=SPECIAL[PAD],
            unk_token=SPECIAL[UNKNOWN],
            bos_token=SPECIAL[START],
            eos_token=SPECIAL[END],
        )


def split_words(caption: str) -> list[str]:
    """Words of a caption."""
    return re.sub(SIGNS, " ", caption.lower()).split()


def words_of(captions: Iterable[str]) -> tuple[str, ...]:
    """All words of captions, in lower case and in alphabetical order."""
    return tuple(sorted({word for caption in captions for word in split_words(caption)}))
