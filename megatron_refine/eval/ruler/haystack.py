"""Text to hide things in: one sentence over and over, or prose."""

import hashlib
import re
import sys
from dataclasses import dataclass
from itertools import cycle, islice

from megatron_refine.config import ConfigError
from megatron_refine.data.corpus import find_corpus

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_LONGEST = 60  # words; a longer sentence is cut, so that text without full stops is no single line


@dataclass(frozen=True)
class Prose:
    sentences: tuple[str, ...]
    description: str  # which text it is, for the record of a result

    def take(self, number: int) -> list[str]:
        """The first sentences; from the beginning again where there are not enough, as RULER does."""
        return list(islice(cycle(self.sentences), number))


def read_prose(essays: str) -> Prose:
    """The text at `essays`: files of text, or tables with a column "text". Nothing named: prose of Python's manual.

    RULER hides its needles in Paul Graham's essays, which cannot be shipped: for scores to set beside published ones,
    name a folder that holds them. Raises ConfigError where there is nothing to read.
    """
    if essays:
        texts, name = list(find_corpus([essays], "text", "essays").documents()), f"essays of {essays}"
    else:
        version = ".".join(map(str, sys.version_info[:3]))
        texts, name = _manual(), f"prose of the language reference in Python {version}, no essays"
    sentences = tuple(sentence for text in texts for sentence in _sentences(text))
    if not sentences:
        raise ConfigError(f"essays: {essays}: holds no text; name a file or folder that does")
    text = " ".join(sentences)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Prose(sentences, f"{name} ({len(text.split())} words, sha256 {digest})")


def _manual() -> list[str]:
    """Paragraphs of the language reference that Python carries for help(): the same for one version of Python."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(part.split()) for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    return list(dict.fromkeys(filter(_is_prose, paragraphs)))  # some stand under several topics


def _is_prose(paragraph: str) -> bool:
    """Whole sentences, and no code, grammar or table."""
    letters = sum(char.isalpha() or char in " ,.'" for char in paragraph)
    whole = paragraph[:1].isupper() and paragraph.endswith(".") and paragraph.count(" ") >= 7
    return whole and letters > 0.85 * len(paragraph)


def _sentences(text: str) -> list[str]:
    found = []
    for sentence in re.split(r"(?<=[.!?]) ", " ".join(text.split())):
        words = sentence.split()
        found += [" ".join(words[i : i + _LONGEST]) for i in range(0, len(words), _LONGEST)]
    return found
