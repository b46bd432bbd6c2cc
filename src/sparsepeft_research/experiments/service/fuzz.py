"""Schemathesis on the service's own description: cases that fit it and cases that do not."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from sparsepeft_research.experiments.service.process import service
from sparsepeft_research.experiments.service.tasks import save_tasks

ADMIN = "a" * 32
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
LONGEST_S = 20.0
_ROUNDS = 10


def measure(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and results; rounds of other seeds are run until there are enough cases."""
    root = work / "tasks"
    root.mkdir()
    save_tasks(options.model, root, options.num_tasks, options.seed)
    (work / "admin").write_text(ADMIN)
    rounds: list[dict[str, Any]] = []
    more = ("--tasks-dir", root, "--default-task", "task0", "--admin-token-file", work / "admin")
    with service(options.model, {}, work / "log", *more) as server:
        while len(rounds) < _ROUNDS and len(server.requests) < options.cases:
            rounds.append(_round(server.address, options.seed + len(rounds), work))
        requests = server.requests
        is_well = server.process.poll() is None
        memory = server.memory_mib
        code = server.stop()
    longest = max(requests, key=lambda one: float(one["ms"]))
    statuses = Counter(str(one["status"]) for one in requests)
    results = {
        "cases": len(requests),
        "statuses": dict(sorted(statuses.items())),
        "server_errors": sum(count for status, count in statuses.items() if status >= "500"),
        "operations": len({(one["method"], re.sub(r"(?<=/tasks/)[^/]+", "{task}", one["path"])) for one in requests}),
        "longest": {"path": longest["path"], "ms": longest["ms"]},
        "well_at_the_end": is_well,
        "code": code,
        "memory_mib": round(memory, 1),
        "rounds": rounds,
    }
    settings = {
        "checks": CHECKS.split(","),
        "longest_s": LONGEST_S,
    }
    return settings, results


def _round(address: str, seed: int, work: Path) -> dict[str, Any]:
    # In every other round names of tasks are those of one that is there, and stays.
    (work / "schemathesis.toml").write_text('[parameters]\ntask = "task1"\nname = "task1"\n' if seed % 2 else "")
    report = work / f"report{seed}.json"
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{address}/openapi.json"]
    given: dict[str, Any] = {
        "--checks": CHECKS,
        "--phases": "examples,coverage,fuzzing",
        "--max-examples": 100,
        "--seed": seed,
        "--request-timeout": LONGEST_S,
        "--header": f"Authorization: Bearer {ADMIN}",
        "--report": "json",
        "--report-json-path": report,
        "--suppress-health-check": "all",
    }
    if seed % 2:
        given["--exclude-method"] = "DELETE"
    arguments = [str(part) for pair in given.items() for part in pair]
    done = subprocess.run(
        [*map(str, command), *arguments, "--continue-on-failure"], capture_output=True, text=True, cwd=work, check=False
    )
    if not report.is_file():
        raise RuntimeError(f"Schemathesis wrote no report and said: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    content = json.loads(report.read_text())
    return {"seed": seed, "code": done.returncode, "failures": content.get("failures", [])}
