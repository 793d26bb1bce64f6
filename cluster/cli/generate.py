"""What `saqqara generate` does once its settings are checked."""

import sys
from collections.abc import Sequence

from saqqara.cluster.engine.client import EngineClient
from saqqara.cluster.launch import launch
from saqqara.cluster.request import Request, RequestOutput

from .options import Settings

POLL_SECONDS = 1.0


def generate_and_print(
    settings: Settings, prompts: Sequence[str], *, chat: bool, stream: bool
) -> None:
    """Answer prompts on standard output, in order; a single one while it is written.

    Raises:
        ValueError: the engine refused a prompt.
        RuntimeError: the engine failed, as a whole or on a prompt.
    """
    live = stream and len(prompts) == 1 and settings.sampling.n == 1
    requests = [
        Request(
            request_id=str(i),
            prompt=None if chat else prompt,
            messages=({"role": "user", "content": prompt},) if chat else None,
            sampling_params=settings.sampling,
            stream=live,
        )
        for i, prompt in enumerate(prompts)
    ]
    client = launch(settings.config)
    try:
        for rejection in client.submit(requests):
            raise ValueError(f"prompt {int(rejection.request_id) + 1}: {rejection.error}")
        _print_answers(client, len(requests))
    finally:
        client.shutdown()


def _print_answers(client: EngineClient, count: int) -> None:
    """Print outputs as they come, but whole answers only in the order of their prompts."""
    finished: dict[int, RequestOutput] = {}
    num_shown = num_printed = 0
    while num_printed < count:
        for output in client.poll(POLL_SECONDS):
            assert isinstance(output, RequestOutput)
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.finished:
                finished[int(output.request_id)] = output
            else:
                num_shown = _print_more(output.outputs[0].text, num_shown)
        while num_printed in finished:
            for answer in finished[num_printed].outputs:
                num_shown = _print_more(answer.text, num_shown)
                sys.stdout.write("\n")
                num_shown = 0
            num_printed += 1


def _print_more(text: str, num_shown: int) -> int:
    sys.stdout.write(text[num_shown:])
    sys.stdout.flush()
    return len(text)
