"""The nodes of `serve_multiple_models`: a text is tidied, looked at from two sides at once, and summed up.

Each node is a class that is made without arguments, in a process of its own, and has a method `forward`. These compute
on any CPU; where a model is to be loaded, it is loaded in `__init__` and asked in `forward`.
"""

import re
from collections import Counter

SMALL_WORDS = frozenset(
    {"a", "an", "and", "are", "as", "for", "in", "is", "it", "of", "on", "or", "that", "the", "to", "with"}
)


class Tidy:
    """The text of the request, its spaces made single."""

    def forward(self, prompt: str) -> str:
        return " ".join(prompt.split())


class Keywords:
    """The words that a text uses most, small ones left out."""

    def __init__(self) -> None:
        self.pattern = re.compile(r"\w+")

    def forward(self, text: str) -> list[str]:
        words = (word.lower() for word in self.pattern.findall(text))
        counted = Counter(word for word in words if word not in SMALL_WORDS)
        return [word for word, _ in counted.most_common(5)]


class Sentences:
    """The sentences of a text. A coroutine is given many calls at a time."""

    async def forward(self, text: str) -> list[str]:
        return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]


class Summary:
    """The sentence with most of the keywords. The results of other nodes come in the order of `depends`."""

    def forward(self, keywords: list[str], sentences: list[str]) -> dict[str, object]:
        def score(sentence: str) -> int:
            return sum(word in sentence.lower() for word in keywords)

        return {"keywords": keywords, "sentence": max(sentences, key=score, default="")}
