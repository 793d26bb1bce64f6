"""How many replicas there are: flags and files, one number or bounds."""

from typing import Any

import pytest

from saqqara.cluster.cli.serve import ServerFlags, merged_config

LOADING = {"model_loading_config": {"model_id": "m"}}


def merged(flags: ServerFlags, **deployment: Any) -> Any:
    given = {**LOADING, **({"deployment_config": deployment} if deployment else {})}
    return merged_config(given, flags, {}).deployment_config


def test_bounds_make_the_number_follow_the_load() -> None:
    config = merged(ServerFlags(max_replicas=3))
    assert (config.first_replicas, config.most_replicas) == (1, 3)
    config = merged(ServerFlags(min_replicas=2, max_replicas=3), num_replicas=1)
    assert (config.first_replicas, config.most_replicas) == (2, 3)
    config = merged(
        ServerFlags(max_replicas=8), autoscaling_config={"min_replicas": 2, "upscale_delay_s": 1}
    )
    assert config.autoscaling_config.upscale_delay_s == 1
    assert (config.first_replicas, config.most_replicas) == (2, 8)


def test_a_number_ends_the_bounds_of_a_file() -> None:
    config = merged(ServerFlags(num_replicas=2), autoscaling_config={"max_replicas": 3})
    assert (config.first_replicas, config.most_replicas) == (2, 2)


def test_defaults_are_finite() -> None:
    config = merged(ServerFlags(), autoscaling_config={})
    assert (config.first_replicas, config.most_replicas) == (1, 4)
    assert merged(ServerFlags()).most_replicas == 1


@pytest.mark.parametrize(
    ("flags", "deployment", "message"),
    [
        (ServerFlags(num_replicas=1, max_replicas=2), {}, "--num-replicas, or --min-replicas"),
        (ServerFlags(min_replicas=3, max_replicas=2), {}, "min_replicas=3 is more than"),
        (ServerFlags(min_replicas=5), {}, "min_replicas=5 is more than max_replicas=4"),
        (
            ServerFlags(),
            {"num_replicas": 1, "autoscaling_config": {}},
            "give num_replicas or autoscaling_config, not both",
        ),
        (ServerFlags(), {"autoscaling_config": {"max": 2}}, r"autoscaling_config\.max"),
        (ServerFlags(), {"autoscaling_config": {"max_replicas": 10**9}}, "max_replicas"),
        (
            ServerFlags(),
            {"autoscaling_config": {"initial_replicas": 9}},
            "initial_replicas=9 must be from",
        ),
    ],
)
def test_what_does_not_go_together_is_an_error(
    flags: ServerFlags, deployment: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merged(flags, **deployment)
