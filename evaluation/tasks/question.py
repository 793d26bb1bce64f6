"""Questions with known answers, asked under every retention setting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saqqara.evaluation.result import Outcome, Result
from saqqara.evaluation.session import Session

Scorer = Callable[["Question", str], float]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what a right answer holds.

    Attributes:
        token_ids: the whole prompt, with the chat template and the beginning of the answer.
        references: strings that scores look for.
        group: what tables are split by.
        max_tokens: length of the answer at most.
        details: plain values for the report.
    """

    token_ids: tuple[int, ...]
    references: tuple[str, ...]
    group: str
    max_tokens: int
    details: Mapping[str, Any] = field(default_factory=dict)


def found_share(question: Question, answer: str) -> float:
    """Share of the references that the answer holds, upper and lower case being the same."""
    text = answer.lower()
    return sum(one.lower() in text for one in question.references) / len(question.references)


def ask(
    session: Session,
    task: str,
    settings: Mapping[str, Any],
    questions: Sequence[Question],
    scorer: Scorer = found_share,
) -> Result:
    """Ask all questions under all settings and score the answers, each in [0, 1].

    Raises:
        ValueError: a prompt does not fit the engine.
        RuntimeError: a request failed.
    """
    answers = session.answers([q.token_ids for q in questions], [q.max_tokens for q in questions])
    outcomes = []
    for sample, (question, outputs) in enumerate(zip(questions, answers, strict=True)):
        for retention, output in zip(session.retentions, outputs, strict=True):
            text = output.outputs[0].text
            outcomes.append(
                Outcome(
                    retention=retention.label,
                    sample=sample,
                    group=question.group,
                    prompt_tokens=len(question.token_ids),
                    score=scorer(question, text),
                    details={
                        **question.details,
                        "references": list(question.references),
                        "answer": text,
                    },
                )
            )
    return session.result(task, settings, outcomes)
