"""What every task has in common, and how one is run."""

from collections.abc import Sequence
from typing import Protocol

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.result import Result
from saqqara.evaluation.session import Session


class Task(Protocol):
    """A frozen dataclass of settings that can be run on an engine."""

    @property
    def name(self) -> str:
        """Name of the task, as in `summary.FIGURES`."""
        ...

    def run(self, session: Session) -> Result:
        """Run under all settings of the session.

        Raises:
            ValueError: a setting is wrong or does not fit the model.
            RuntimeError: the engine failed.
        """
        ...


def evaluate(config: EngineConfig, retentions: Sequence[Retention], task: Task) -> Result:
    """Start an engine and run one task under `full` and the given settings.

    Raises:
        ValueError: a setting is wrong or does not fit the model.
        RuntimeError: the engine failed.
    """
    with Session(config, retentions) as session:
        return task.run(session)
