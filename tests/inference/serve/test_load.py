"""Callers of the load experiment against a real service, and cases made from the service's own description."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from tests.inference.serve.conftest import answering

from sparsepeft import MultiTaskEngine
from sparsepeft_research.experiments.service.clients import at_rate, in_turn
from sparsepeft_serve import ServeSettings, create_app

TEXT = "the striker scored twice"


def test_callers_note_what_comes(engine: MultiTaskEngine) -> None:
    requests = [("/tasks/two", {"inputs": TEXT}), ("/tasks/five", {"inputs": TEXT}), ("/tasks/none", {"inputs": TEXT})]

    async def ask(address: str) -> None:
        load = await in_turn(address, iter(requests * 4), clients=3, check=lambda request, _: "two" in request[0])
        assert load.statuses == {200: 8, 404: 4}
        assert (load.wrong, len(load.seconds)) == (4, 8)
        load = await at_rate(address, itertools.cycle(requests[:1]), rate=40, seconds=0.5)
        assert load.statuses == {200: 20}
        assert load.duration > 0.4
        assert load.to_dict()["latency_ms"]["p50"] > 0

    with answering(engine) as address:
        asyncio.run(ask(address))
    gone = asyncio.run(in_turn(address, iter(requests), clients=1))
    assert gone.statuses == {0: 3}
    assert set(gone.problems) == {"ClientConnectorError"}


@pytest.mark.slow
def test_answers_are_as_the_description_says(changing_engine: MultiTaskEngine) -> None:
    app = create_app(changing_engine, ServeSettings(default_task="two"))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    quiet = settings(max_examples=8, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    num_operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @quiet
        @schemathesis.pytest.given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate()

        check()
        num_operations += 1
    assert num_operations >= 15
