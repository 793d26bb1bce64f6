"""A worker gets plain values: those of the engine's settings that are its business, no others."""

from dataclasses import MISSING, fields, replace

import psutil
import pytest
import torch

from saqqara.configs.schema import EngineConfig
from saqqara.configs.step_limits import OPEN
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.host_memory import available_bytes, resident_bytes
from saqqara.workers.part import choose_device


def test_defaults_are_those_of_the_engine() -> None:
    by_device = replace(WorkerSettings(model="m"), left_open=OPEN)
    assert EngineConfig(model="m").for_worker() == by_device
    for field in fields(WorkerSettings):
        if field.name == "left_open":
            continue
        expected = EngineConfig.model_fields[field.name]
        assert (field.default is MISSING) == expected.is_required(), field.name


def test_every_value_arrives() -> None:
    given = {"model": "m", "dtype": "float16", "seed": 3, "kv_memory_gib": 0.5, "budget": "25%"}
    settings = EngineConfig.model_validate({**given, "retention": {"score": "knorm"}}).for_worker()
    assert {name: getattr(settings, name) for name in given} == given
    assert settings.retention == {"score": "knorm"}


def test_memory_is_what_psutil_says() -> None:
    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    # Others use the machine, too.
    assert available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_a_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    settings = WorkerSettings(model="m")
    assert choose_device(settings, 6) == torch.device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(settings, 6) == torch.device("cuda:3")
    for wrong in ("-1", "one", "", "4"):
        monkeypatch.setenv("LOCAL_RANK", wrong)
        with pytest.raises(ValueError, match="LOCAL_RANK must be the number of one of 4 GPUs"):
            choose_device(settings, 6)
