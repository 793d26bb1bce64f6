"""What an evaluation found, prompt by prompt: enough to make every table and plot again."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from saqqara.compression.retention import Retention
from saqqara.configs.json_text import json_text


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one prompt went under one retention setting.

    Attributes:
        retention: label of the setting.
        sample: number of the prompt, the same under every setting.
        group: what tables are split by: a length, a task, a data set.
        prompt_tokens: length of the prompt (of the context, where a continuation is scored).
        score: the task's figure; see the task.
        details: plain values that explain the score, such as the answer.
    """

    retention: str
    sample: int
    group: str
    prompt_tokens: int
    score: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """All outcomes of one task.

    Attributes:
        task: name of the task.
        model: folder or hub id.
        settings: everything else that the outcomes depend on, as JSON values.
        retentions: label and settings of each setting, `full` first.
        kept_shares: by label, the share of the prompts' keys and values that is kept: expected
            tokens, not counting that pages are filled up.
        full_kv_bytes: mean bytes of a prompt's keys and values under full retention.
        local_kv_bytes: what layers with sliding-window attention hold besides, under every setting;
            shares and the bytes above are of the other layers.
        outcomes: by prompt, then by setting; settings that were added later come after those.
    """

    task: str
    model: str
    settings: Mapping[str, Any]
    retentions: Mapping[str, Mapping[str, Any]]
    kept_shares: Mapping[str, float]
    full_kv_bytes: float
    outcomes: tuple[Outcome, ...]
    local_kv_bytes: float = 0.0

    @property
    def labels(self) -> list[str]:
        """Labels of the settings, `full` first."""
        return list(self.retentions)

    @property
    def groups(self) -> list[str]:
        """The groups, in the order in which they first come."""
        return list(dict.fromkeys(outcome.group for outcome in self.outcomes))

    def of(self, label: str, group: str | None = None) -> list[Outcome]:
        """The outcomes of one setting (in one group), in the order of the prompts."""
        mine = (o for o in self.outcomes if o.retention == label)
        return [outcome for outcome in mine if group in (None, outcome.group)]

    def retention(self, label: str) -> Retention:
        """One of the settings."""
        return Retention.parse(dict(self.retentions[label]))

    def only(self, labels: Sequence[str]) -> "Result":
        """The outcomes of some settings, in the order of `labels`."""
        return replace(
            self,
            retentions={label: self.retentions[label] for label in labels},
            kept_shares={label: self.kept_shares[label] for label in labels},
            outcomes=tuple(o for o in self.outcomes if o.retention in labels),
        )

    def joined(self, other: "Result") -> "Result":
        """These outcomes and those of the settings that only `other` has, on the same prompts."""
        added = [label for label in other.labels if label not in self.retentions]
        more = other.only(added)
        return replace(
            self,
            retentions={**self.retentions, **more.retentions},
            kept_shares={**self.kept_shares, **more.kept_shares},
            outcomes=self.outcomes + more.outcomes,
        )

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json_text(asdict(self), indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read what `write` wrote.

        Raises:
            ValueError: the file is not a result.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            outcomes = tuple(_outcome(outcome) for outcome in data.pop("outcomes"))
            return cls(outcomes=outcomes, **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the result of an evaluation: {error}") from None


def _outcome(data: Mapping[str, Any]) -> Outcome:
    """An outcome of a file, which has null for a score that is no finite number."""
    score = math.nan if data["score"] is None else data["score"]
    return Outcome(**{**data, "score": score})
