"""Documents with facts in them, and how many of the facts answers give: what the demo asks."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.evaluation.prompts.haystack import Haystack
from saqqara.evaluation.prompts.words import draw_key

FACTS_PER_DOCUMENT = 4
_CITIES = ("Lisbon", "Vienna", "Oslo", "Prague", "Dublin", "Athens", "Riga", "Turin")
_PEOPLE = ("Marta", "Jonas", "Priya", "Tomas", "Ingrid", "Oskar", "Leila", "Bruno")


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation about one document, and what the answer should hold.

    Attributes:
        messages: the user's, with document and question, and the beginning of the answer.
        facts: `FACTS_PER_DOCUMENT` phrases of the document that are asked for.
    """

    messages: tuple[dict[str, str], ...]
    facts: tuple[str, ...]

    def line(self, custom_id: str) -> dict[str, Any]:
        """The document as a line of a batch job; the answer goes on with its beginning."""
        open_end = {"add_generation_prompt": False, "continue_final_message": True}
        return {"custom_id": custom_id, "messages": list(self.messages), **open_end}

    def found(self, answer: str) -> int:
        """How many of the facts the answer gives."""
        text = f"{self.messages[-1]['content']}{answer}"
        return sum(fact in text for fact in self.facts)


def make_documents(tokenizer: Tokenizer, lengths: Sequence[int], seed: int = 0) -> list[Document]:
    """Pieces of Python's documentation, each with a note about a parcel somewhere in it.

    Args:
        tokenizer: of the model.
        lengths: of the prompts, in tokens, chat template included (off by a few).
        seed: of the pieces, of the notes and of where they stand.
    """
    haystack = Haystack.load(tokenizer, None, "report")
    generator = np.random.default_rng(seed)
    return [_document(tokenizer, haystack, n, generator) for n in lengths]


def _document(
    tokenizer: Tokenizer, haystack: Haystack, num_tokens: int, generator: np.random.Generator
) -> Document:
    key = draw_key(generator)
    facts = (
        f"weighs {generator.integers(1000, 10_000)} grams",
        f"costs {generator.integers(1000, 10_000)} crowns",
        f"comes from {_CITIES[generator.integers(len(_CITIES))]}",
        f"goes to {_PEOPLE[generator.integers(len(_PEOPLE))]}",
    )
    note = (
        f"\nRemember this: the parcel of {key} {facts[0]}, {facts[1]}, {facts[2]} and {facts[3]}.\n"
    )
    question = (
        f"\n\nWhat does the parcel of {key} weigh and cost, where does it come from and to whom "
        "does it go?"
    )
    answer = {"role": "assistant", "content": f"The parcel of {key} weighs"}
    note_ids = tokenizer.encode(note, add_special_tokens=False)
    around = len(tokenizer.apply_chat([{"role": "user", "content": question}, answer]))
    piece = haystack.piece(num_tokens - around - len(note_ids), generator)
    text = tokenizer.decode(piece.insert([(generator.random(), note_ids)]))
    return Document(({"role": "user", "content": f"{text}{question}"}, answer), facts)


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
