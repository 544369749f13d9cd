"""Data for the training examples: made here, read from the documentation that Python carries, or a hub data set.

No network is used unless a data set or model of the hub is named.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

MODULES = (
    "argparse", "ast", "asyncio", "base64", "calendar", "cmd", "codecs", "collections", "configparser", "contextlib",
    "copy", "csv", "datetime", "decimal", "difflib", "dis", "doctest", "email.message", "enum", "fileinput",
    "fractions", "ftplib", "functools", "gettext", "glob", "gzip", "heapq", "html.parser", "http.client", "imaplib",
    "inspect", "ipaddress", "json", "locale", "logging", "mailbox", "mimetypes", "multiprocessing.pool", "netrc",
    "numbers", "optparse", "os", "pathlib", "pickle", "pkgutil", "platform", "plistlib", "poplib", "pprint", "queue",
    "random", "re", "sched", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "types",
    "typing", "unittest", "urllib.parse", "urllib.request", "uuid", "wave", "weakref", "xml.dom.minidom", "zipfile",
)  # fmt: skip


def documented() -> Iterator[tuple[str, str, str]]:
    """``(module, qualified name, docstring)`` of what the standard library documents, sorted, each text once."""
    seen = set()
    for name in MODULES:
        module = importlib.import_module(name)
        members = [(name, module)]
        for attribute, value in sorted(vars(module).items(), key=lambda item: item[0]):
            if getattr(value, "__module__", None) == name and not attribute.startswith("_"):
                members.append((attribute, value))
                if inspect.isclass(value):
                    inner = sorted(vars(value).items(), key=lambda item: item[0])
                    members += [(f"{attribute}.{key}", each) for key, each in inner if not key.startswith("_")]
        for qualified, value in members:
            text = inspect.getdoc(value) if callable(value) or value is module else None
            if text and len(text) > 30 and text not in seen:
                seen.add(text)
                yield name, qualified, text


def prose(limit: int | None = None) -> list[str]:
    """Paragraphs of at least eight words."""
    paragraphs = []
    for _, _, text in documented():
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            if len(line.split()) >= 8 and line[0].isalpha():
                paragraphs.append(line)
    return paragraphs[:limit]


def summaries() -> list[tuple[str, str]]:
    """``(body, title)``: a docstring without its first sentence, and that sentence."""
    pairs = []
    for _, _, text in documented():
        first, _, rest = text.partition("\n")
        title, body = " ".join(first.split()), " ".join(rest.split())
        if 3 <= len(title.split()) <= 14 and len(body.split()) >= 12:
            pairs.append((body, title))
    return pairs


def hub_texts(name: str, config: str | None, split: str, column: str, limit: int | None = None) -> list[str]:
    """A column of a data set of the hub."""
    from datasets import load_dataset

    texts = load_dataset(name, config, split=split)[column]
    return [text for text in texts if text.strip()][:limit]


def train_tokenizer(texts: Iterable[str], vocabulary: int, *, pairs: bool = False):
    """Byte-level BPE with ``<pad>``, ``<s>``, ``</s>``, ``<mask>`` (0 to 3); ``pairs``: texts end with ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(texts, trainer)
    if pairs:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


# ---- words in reverse: what a tiny encoder-decoder learns in seconds -------------------------------------------------

WORDS = (
    "red",
    "blue",
    "green",
    "one",
    "two",
    "three",
    "four",
    "sun",
    "moon",
    "star",
    "tree",
    "house",
    "river",
    "stone",
)


def reversal(count: int, seed: int) -> list[tuple[str, str]]:
    """``(words, the same in reverse order)``."""
    rng = random.Random(seed)
    drawn = [rng.sample(WORDS, rng.randint(2, 3)) for _ in range(count)]
    return [(" ".join(words), " ".join(reversed(words))) for words in drawn]


def t5_tokenizer(folder: Path):
    """A sentencepiece tokenizer as T5's checkpoints have, trained on the words above."""
    import sentencepiece
    from transformers import AutoTokenizer, T5Config

    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(source for source, _ in reversal(400, 0)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    T5Config().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


# ---- sentences whose likeness is known: slots with synonyms, hidden among fillers ------------------------------------

SLOTS = (
    (("dog", "hound"), ("cat", "kitten"), ("horse", "pony"), ("bird", "sparrow"), ("fish", "trout"), ("child", "kid"),
     ("doctor", "physician"), ("teacher", "tutor"), ("thief", "burglar"), ("sailor", "seaman")),
    (("sleeps", "rests"), ("runs", "hurries"), ("eats", "dines"), ("sings", "chants"), ("waits", "lingers"),
     ("works", "labours"), ("hides", "lurks"), ("falls", "tumbles"), ("laughs", "giggles"), ("reads", "studies")),
    (("forest", "woods"), ("street", "road"), ("house", "home"), ("sea", "ocean"), ("shop", "store"),
     ("field", "meadow"), ("church", "chapel"), ("kitchen", "galley"), ("cellar", "basement"), ("hill", "slope")),
    (("morning", "dawn"), ("evening", "dusk"), ("winter", "frost"), ("summer", "heat"), ("war", "battle"),
     ("storm", "gale"), ("feast", "banquet"), ("harvest", "reaping"), ("exam", "test"), ("wedding", "marriage")),
)  # fmt: skip
FILLERS = (
    "so they say and nobody seems to mind it at all",
    "to tell the truth it comes as no surprise to us",
    "once again and without a word more or less",
)


def _sentence(concepts: list[int], rng: random.Random) -> str:
    """The second of two synonyms is the rarer one."""
    words = [slot[concept][rng.random() < 0.3] for slot, concept in zip(SLOTS, concepts, strict=True)]
    text = "the {} {} in the {} during the {}".format(*words)
    filler = rng.choice(FILLERS)
    return f"{filler} {text}" if rng.random() < 0.5 else f"{text} {filler}"


def _change(concepts: list[int], slots: Iterable[int], rng: random.Random) -> list[int]:
    changed = list(concepts)
    for slot in slots:
        changed[slot] = rng.choice([concept for concept in range(len(SLOTS[slot])) if concept != concepts[slot]])
    return changed


def triples(count: int, seed: int) -> list[tuple[str, str, str]]:
    """``(sentence, one of the same meaning, one that differs in half of it)``; synonyms and fillers are drawn anew."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        concepts = [rng.randrange(len(slot)) for slot in SLOTS]
        hard = _change(concepts, rng.sample(range(4), 2), rng)
        rows.append(tuple(_sentence(each, rng) for each in (concepts, concepts, hard)))
    return rows


def graded_pairs(count: int, seed: int) -> list[tuple[str, str, int]]:
    """``(one, other, likeness 0 … 4)``: how many of the four meanings they share, as raters of STS would say."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        likeness = number % 5
        concepts = [rng.randrange(len(slot)) for slot in SLOTS]
        other = _change(concepts, rng.sample(range(4), 4 - likeness), rng)
        rows.append((_sentence(concepts, rng), _sentence(other, rng), likeness))
    return rows


def labelled_sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """``(sentence, where it happens)``: the class is a meaning, which two words stand for."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        concepts = [rng.randrange(len(slot)) for slot in SLOTS]
        rows.append((_sentence(concepts, rng), concepts[2]))
    return rows
