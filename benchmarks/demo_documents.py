"""Documents with facts in them, and how many of the facts answers give: what the demo asks."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saqqara.cluster.tokenizer import Tokenizer
from saqqara.evaluation.haystack import Haystack

FACTS_PER_DOCUMENT = 4
_INSTRUCTION = "Complete these sentences with the numbers from the text above:"

_PLACES = ("harbour", "library", "bakery", "museum", "stable", "theatre", "garage", "laundry")
_PEOPLE = ("Marta", "Jonas", "Priya", "Tomas", "Ingrid", "Oskar", "Leila", "Bruno")
_CITIES = ("Lisbon", "Vienna", "Oslo", "Prague", "Dublin", "Athens", "Riga", "Turin")
# Beginnings of sentences that end with a number, each about one of these.
_SENTENCES = (
    ("The door code of the {} is", _PLACES),
    ("The phone number of {} is", _PEOPLE),
    ("The train to {} has the number", _CITIES),
    ("The invoice for the {} has the number", _PLACES),
    ("The locker of {} has the number", _PEOPLE),
    ("The flight from {} has the number", _CITIES),
    ("The alarm of the {} is turned off with", _PLACES),
    ("{} was born in the town with the postcode", _PEOPLE),
)


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation about one document, and what the answer should hold.

    Attributes:
        messages: the user's, with document and question, and the beginning of the answer.
        sentences: asked for, in this order, without their numbers.
        numbers: that end the sentences.
    """

    messages: tuple[dict[str, str], ...]
    sentences: tuple[str, ...]
    numbers: tuple[str, ...]

    def line(self, custom_id: str) -> dict[str, Any]:
        """The document as a line of a batch job; the answer goes on with its beginning."""
        open_end = {"add_generation_prompt": False, "continue_final_message": True}
        return {"custom_id": custom_id, "messages": list(self.messages), **open_end}

    def found(self, answer: str) -> int:
        """How many of the numbers stand in the answer, each behind its own sentence."""
        text = f"{self.messages[-1]['content']}{answer}"
        pairs = zip(self.sentences, self.numbers, strict=True)
        return sum(f"{sentence} {number}" in text for sentence, number in pairs)


def make_documents(
    tokenizer: Tokenizer, lengths: Sequence[int], seed: int = 0, num_facts: int = FACTS_PER_DOCUMENT
) -> list[Document]:
    """Pieces of Python's documentation with facts hidden in them, evenly spread.

    Args:
        tokenizer: of the model.
        lengths: of the prompts, in tokens, chat template included (off by a few).
        seed: of the pieces, the facts and the order in which they are asked for.
        num_facts: in each document.
    """
    haystack = Haystack.load(tokenizer, None, "report")
    generator = np.random.default_rng(seed)
    return [_document(tokenizer, haystack, n, num_facts, generator) for n in lengths]


def _document(
    tokenizer: Tokenizer,
    haystack: Haystack,
    num_tokens: int,
    num_facts: int,
    generator: np.random.Generator,
) -> Document:
    sentences, numbers = [], []
    for kind in generator.permutation(len(_SENTENCES))[:num_facts]:
        sentence, names = _SENTENCES[kind]
        sentences.append(sentence.format(names[int(generator.integers(len(names)))]))
        numbers.append(str(int(generator.integers(10_000, 100_000))))
    facts = [
        tokenizer.encode(f"\n{sentence} {number}.\n", add_special_tokens=False)
        for sentence, number in zip(sentences, numbers, strict=True)
    ]
    order = generator.permutation(num_facts).tolist()
    asked = [sentences[i] for i in order]
    question = "\n".join(("", _INSTRUCTION, *(f"{sentence} ..." for sentence in asked)))
    answer = {"role": "assistant", "content": asked[0]}

    around = len(tokenizer.apply_chat([{"role": "user", "content": question}, answer]))
    room = num_tokens - around - sum(map(len, facts))
    piece = haystack.piece(room, generator)
    text = tokenizer.decode(
        piece.insert([((i + 0.5) / num_facts, fact) for i, fact in enumerate(facts)])
    )
    user = {"role": "user", "content": f"{text}\n{question}"}
    return Document((user, answer), tuple(asked), tuple(numbers[i] for i in order))


def write_documents(folder: Path, documents: Sequence[Document]) -> Path:
    """Leave the input of the batch jobs in `folder`, and the facts beside it; returns the input."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(d.line(f"document-{i}")) for i, d in enumerate(documents, start=1)]
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = json.dumps([asdict(document) for document in documents], indent=1)
    (folder / "facts.json").write_text(facts + "\n", encoding="utf-8")
    return path


def facts_found(results: Path, documents: Sequence[Document]) -> int:
    """How many facts the answers of a batch job give.

    Raises:
        ValueError: a document has no answer.
    """
    answers = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answers[record["line"]] = record["text"]
    found = 0
    for place, document in enumerate(documents, start=1):
        answer = answers.get(place)
        if answer is None:
            raise ValueError(f"{results}: line {place} of the input has no answer")
        found += document.found(answer)
    return found
