"""Real sentences from ``chatterbot-corpus``, split once and for all by their hash."""

import hashlib
import importlib.util
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT = 0.2


class MissingPackage(RuntimeError):
    """Something to install first; the message is the command."""

    def __init__(self, package: str) -> None:
        super().__init__(f"pip install {package}")


def package_folder(module: str, package: str) -> Path:
    """Where an installed package keeps its files, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(package)
    return Path(next(iter(spec.submodule_search_locations)))


def _conversations() -> Iterator[tuple[str, list[str]]]:
    """Topic and turns of each English conversation."""
    folder = package_folder("chatterbot_corpus", "chatterbot-corpus")
    try:
        import yaml
    except ImportError as error:
        raise MissingPackage("pyyaml") from error
    for path in sorted((folder / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            yield path.stem, [" ".join(str(turn).split()) for turn in turns]


def _key(text: str) -> str:
    """Equal for sentences that differ only in case, spacing or punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _by_hash(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(_key(text).encode()).digest())


def topics(
    min_words: int = 3, min_sentences: int = 30
) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[str]]:
    """Sentences with the topic they belong to.

    A sentence that occurs twice is kept once, and one that occurs under two topics not at all, so
    nothing held out is in training. The split is stratified by topic.

    Args:
        min_words: Shorter sentences ("Yes.") say nothing about a topic.
        min_sentences: Topics with fewer sentences are left out.

    Returns:
        Training pairs, held-out pairs (text, label), and the names of the labels.
    """
    found: dict[str, dict[str, str]] = {}
    for topic, turns in _conversations():
        for text in turns:
            if len(text.split()) >= min_words:
                found.setdefault(_key(text), {})[topic] = text
    sentences: dict[str, list[str]] = {}
    for by_topic in found.values():
        if len(by_topic) == 1:
            ((topic, text),) = by_topic.items()
            sentences.setdefault(topic, []).append(text)
    labels = sorted(topic for topic, texts in sentences.items() if len(texts) >= min_sentences)
    train, held_out = [], []
    for label, topic in enumerate(labels):
        texts = _by_hash(sentences[topic])
        cut = round(len(texts) * HELD_OUT)
        held_out += [(text, label) for text in texts[:cut]]
        train += [(text, label) for text in texts[cut:]]
    return train, held_out, labels


def dialogues() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Question and answer pairs, training and held-out, in which no sentence occurs twice."""
    pairs: dict[str, tuple[str, str]] = {}
    seen: set[str] = set()
    for _, turns in _conversations():
        if len(turns) != 2:
            continue
        question, answer = map(_key, turns)
        if question and answer and question != answer and not seen & {question, answer}:
            seen |= {question, answer}
            pairs[turns[0]] = (turns[0], turns[1])
    ordered = [pairs[question] for question in _by_hash(pairs)]
    cut = round(len(ordered) * HELD_OUT)
    return ordered[cut:], ordered[:cut]


def shuffled_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Indices of full batches, reshuffled each epoch, for ever."""
    generator = random.Random(seed)
    order = list(range(count))
    while True:
        generator.shuffle(order)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
