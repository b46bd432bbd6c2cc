"""What the Dockerfile says of the rest of the project; ``make test-image`` follows its steps."""

from __future__ import annotations

import inspect
import re
import tomllib

from tests.image.dockerfile import ROOT, only, read_steps

from sparsepeft_cli.serve import command
from sparsepeft_serve.access import needs_token


def test_what_is_copied_is_there_and_let_through() -> None:
    copied = {
        source
        for step in read_steps()
        if step.name == "COPY" and not step.argument.startswith("--from")
        for source in step.words[:-1]
    }
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


def test_what_is_installed_is_pinned_and_has_those_extras() -> None:
    steps = "\n".join(step.argument for step in read_steps() if step.name == "RUN")
    extras = set(re.findall(r"\[([a-z,]+)\]", steps)[0].split(","))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cli", "serve", "minilm"} <= extras <= project["optional-dependencies"].keys()
    assert "--constraint constraints.txt" in steps
    assert "'^torch==' constraints.txt" in steps


def test_how_it_runs() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", only("USER").argument)
    program, name, *options = only("ENTRYPOINT").words
    assert (program, name, options[::2]) == ("sparsepeft", "serve", ["--host", "--token-file"])
    assert only("EXPOSE").argument == str(inspect.signature(command).parameters["port"].default)
    path = re.search(rf"http://127\.0\.0\.1:{only('EXPOSE').argument}(/\w+)'", only("HEALTHCHECK").argument)
    assert path
    assert not needs_token(path[1])
