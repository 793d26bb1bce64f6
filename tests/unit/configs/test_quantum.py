"""The prefill quantum by device and model."""

import pytest

from saqqara.cluster.planning.models import model_of
from saqqara.configs.quantum import CPU_QUANTUM, prefill_quantum
from saqqara.configs.schema import EngineConfig


def test_a_gpu_gets_a_tenth_of_a_second_whatever_the_model() -> None:
    found: dict[tuple[str, int], int] = {}
    for name, ranks in (("llama-3-8b", 1), ("llama-3-70b", 8), ("llama-3-70b", 4)):
        layer = model_of(name).spec.layer_parameters
        quantum = prefill_quantum("auto", "cuda:0", ranks, layer)
        assert quantum is not None
        found[name, ranks] = quantum
        assert prefill_quantum("auto", "cpu", ranks, layer) == CPU_QUANTUM
    assert CPU_QUANTUM < found["llama-3-8b", 1] < found["llama-3-70b", 8]
    # Eight layers of a group of 8,192 tokens, and more, in each step: not four.
    assert found["llama-3-70b", 8] > 8 * 8192
    assert found["llama-3-70b", 8] == pytest.approx(2 * found["llama-3-70b", 4], abs=1)


def test_what_is_set_stays() -> None:
    assert EngineConfig(model="m").prefill_quantum == "auto"
    for setting in (1, 5000, None):
        config = EngineConfig(model="m", prefill_quantum=setting)
        assert prefill_quantum(config.prefill_quantum, "cuda:0", 1, 10**8) == setting
    unbound = EngineConfig(model="m", prefill_quantum="none")
    assert prefill_quantum(unbound.prefill_quantum, "cpu", 1, 10**8) is None
    for wrong in (0, -1, "many"):
        with pytest.raises(ValueError, match="prefill_quantum"):
            EngineConfig(model="m", prefill_quantum=wrong)
