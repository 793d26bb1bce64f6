"""How far the answers of two runs agree: the first question after dropping keys and values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class AnswerComparison:
    """How one run agrees with a reference run over the answers that both have.

    `identical` counts equal answers. `common_prefix_share` is the mean, over the answers, of the
    length of the common prefix divided by the length of the longer answer (1.0 for two empty ones).
    """

    answers: int
    identical: int
    common_prefix_share: float

    @property
    def identical_share(self) -> float:
        """Share of the answers that are equal; 0.0 when there is nothing to compare."""
        return self.identical / self.answers if self.answers else 0.0

    def cells(self) -> list[tuple[str, list[str]]]:
        """Rows for a summary table: label and one cell."""
        same = f"{self.identical} of {self.answers} ({self.identical_share:.1%})"
        return [
            ("identical answers", [same]),
            ("common prefix of answers", [f"{self.common_prefix_share:.1%}"]),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain values, for JSON reports."""
        return {
            "answers": self.answers,
            "identical": self.identical,
            "identical_share": self.identical_share,
            "common_prefix_share": self.common_prefix_share,
        }


def common_prefix_share(a: Sequence[int], b: Sequence[int]) -> float:
    """Length of the common prefix of two token sequences over the longer one's length."""
    longest = max(len(a), len(b))
    if longest == 0:
        return 1.0
    common = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        common += 1
    return common / longest


def compare_answers(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> AnswerComparison:
    """Compare two runs, answer by answer, in the same order.

    Args:
        a: token ids of each answer of one run.
        b: token ids of each answer of the other run.

    Raises:
        ValueError: the runs have different numbers of answers.
    """
    if len(a) != len(b):
        raise ValueError(f"answers: {len(a)} in one run and {len(b)} in the other; equal is needed")
    shares = [common_prefix_share(x, y) for x, y in zip(a, b, strict=True)]
    return AnswerComparison(
        answers=len(shares),
        identical=sum(list(x) == list(y) for x, y in zip(a, b, strict=True)),
        common_prefix_share=sum(shares) / len(shares) if shares else 0.0,
    )


def result_tokens(path: str | Path) -> dict[int, list[int]]:
    """Token ids of each answered line of a batch job's results, by input line number.

    Raises:
        ValueError: the file cannot be read, is none of a batch job, has two results of a line, or
            one without token ids (the job ran without `--return-token-ids`).
    """
    answers: dict[int, list[int]] = {}
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                line, tokens = _line_and_tokens(text, f"{path}, line {number}")
                if line in answers:
                    raise ValueError(
                        f"results: {path}, line {number} is a second result of input line {line}"
                    )
                if tokens is not None:
                    answers[line] = tokens
    except OSError as error:
        raise ValueError(f"results: cannot read {path}: {error.strerror}") from None
    return answers


def _line_and_tokens(text: str, where: str) -> tuple[int, list[int] | None]:
    """Input line and token ids of one result; None for an error record."""
    try:
        record: dict[str, Any] = json.loads(text)
        line = int(record["line"])
        if record["error"] is not None:
            return line, None
        tokens = _token_ids(record)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ValueError(f"results: {where} is no batch result") from None
    if tokens is None:
        raise ValueError(
            f"{where}: the result of input line {line} has no token_ids; run the batch with "
            "--return-token-ids to compare it"
        )
    return line, tokens


def compare_results(path: str | Path, reference: str | Path) -> AnswerComparison:
    """AnswerComparison of two batch result files over the input lines that both have answered.

    Raises:
        ValueError: no line is answered in both, or token ids are missing.
    """
    ours, theirs = result_tokens(path), result_tokens(reference)
    lines = sorted(ours.keys() & theirs.keys())
    if not lines:
        raise ValueError(f"{path} and {reference} have no answered line in common")
    return compare_answers([ours[i] for i in lines], [theirs[i] for i in lines])


def _token_ids(record: Mapping[str, Any]) -> list[int] | None:
    if "response" in record:  # an OpenAI batch record
        choices = record["response"]["body"]["choices"]
        tokens = choices[0].get("token_ids")
    else:
        tokens = record.get("token_ids")
    return None if tokens is None else [int(token) for token in tokens]
