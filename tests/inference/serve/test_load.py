"""Callers of the load experiment against a real service, and cases made from the service's own description."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from tests.inference.serve.conftest import answering

from sparsepeft import MultiTaskEngine
from sparsepeft_research.experiments.service.clients import at_rate, in_turn
from sparsepeft_serve import ServeSettings

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
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
    few = settings(
        max_examples=6, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    with answering(changing_engine, ServeSettings(default_task="two")) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        for operation in operations:

            @few
            @given(case=operation.as_strategy())
            def check(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=CHECKS)

            check()
    assert len(operations) >= 15
