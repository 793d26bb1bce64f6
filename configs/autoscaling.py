"""How the number of a server's replicas follows its load; names and meaning are Ray Serve's."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_REPLICAS = 1024
_DAY = 86400.0


class AutoscalingConfig(BaseModel):
    """Between which numbers of replicas a server is, and how fast it changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    min_replicas: int = Field(
        1, ge=0, le=MAX_REPLICAS, description="0: none while nobody asks; a request then waits."
    )
    max_replicas: int = Field(4, ge=1, le=MAX_REPLICAS)
    initial_replicas: int | None = Field(
        None, ge=0, le=MAX_REPLICAS, description="At the start; default: min_replicas."
    )
    target_load: float = Field(
        0.8,
        gt=0,
        le=10,
        description="Load of a replica that is aimed at: sequences, waiting ones too, by "
        "max_num_seqs, or the share of KV pages in use if that is more.",
    )
    look_back_period_s: float = Field(30.0, gt=0, le=_DAY, description="The load's mean is over.")
    upscale_delay_s: float = Field(30.0, ge=0, le=_DAY)
    downscale_delay_s: float = Field(600.0, ge=0, le=_DAY)
    downscale_to_zero_delay_s: float | None = Field(None, ge=0, le=_DAY)
    upscaling_factor: float | None = Field(None, gt=0)
    downscaling_factor: float | None = Field(None, gt=0)
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Serve's own rule instead of target_load: open requests each."
    )
    policy: dict[str, Any] | None = Field(
        None, description="Another rule instead of target_load: Serve's AutoscalingPolicy."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}"
            )
        first = self.first_replicas
        if not self.min_replicas <= first <= self.max_replicas:
            raise ValueError(
                f"initial_replicas={first} must be from min_replicas={self.min_replicas} to "
                f"max_replicas={self.max_replicas}"
            )
        if self.policy is not None and self.target_ongoing_requests is not None:
            raise ValueError("give target_ongoing_requests or policy, not both")
        return self

    @property
    def first_replicas(self) -> int:
        """Replicas at the start."""
        return self.min_replicas if self.initial_replicas is None else self.initial_replicas

    @property
    def follows_load(self) -> bool:
        """Whether `target_load` counts: no other rule was given."""
        return self.policy is None and self.target_ongoing_requests is None

    def for_serve(self) -> dict[str, Any]:
        """The fields that Serve knows, without those that were left open."""
        return self.model_dump(exclude={"target_load"}, exclude_none=True)
