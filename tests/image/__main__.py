"""``make test-image``: the Dockerfile's steps in a temporary folder, and its service without a network.

    python -m tests.image [NAME=VALUE ...]

Arguments are those of the build. The wheel is built and installed by the steps' own commands. Then the entry point runs
where there is no network but the machine's own loopback (Linux's ``unshare`` and ``ip``), trains the demo's task, and
is asked by the health check's own command, without a token, and with one.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.image.dockerfile import Image, only

_ALONE = ("unshare", "--map-root-user", "--net", "sh", "-ec", 'ip link set lo up; exec "$@"', "sh")
_ADDRESS = f"http://127.0.0.1:{only('EXPOSE').argument}"
_PATIENCE_S = 3600  # training takes a minute, on a machine that does nothing else


def _ask(path: str, token: str | None) -> object:
    headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    body = json.dumps({"inputs": "The striker scored twice in the second half."}).encode()
    with urllib.request.urlopen(urllib.request.Request(_ADDRESS + path, body, headers), timeout=60) as response:
        return json.load(response)


def serve(image: Image) -> None:
    """Start the entry point, ask it, and stop it; there is no network here."""
    token_file = Path(image.inside(only("ENTRYPOINT").words[-1]))
    token_file.parent.mkdir(parents=True)
    token_file.write_text(token := secrets.token_hex(32))
    command = [image.inside(word) for word in only("ENTRYPOINT").words]
    check = only("HEALTHCHECK").words
    environment = {"env": image.environment, "cwd": image.folder}
    service = subprocess.Popen(command, **environment)
    try:
        began = time.monotonic()
        while subprocess.run(check, **environment, stderr=subprocess.DEVNULL).returncode:
            if service.poll() is not None or time.monotonic() - began > _PATIENCE_S:
                raise SystemExit("The service did not become healthy.")
            time.sleep(2)
        print(f"healthy after {time.monotonic() - began:.0f} s")
        print(_ask("/predict", token))
        try:
            raise SystemExit(f"Without a token it answered {_ask('/predict', None)}.")
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
    finally:
        service.send_signal(signal.SIGTERM)
        status = service.wait(60)
    if status != 128 + signal.SIGTERM:
        raise SystemExit(f"The service ended with {status}.")
    if not subprocess.run(check, **environment, stderr=subprocess.DEVNULL).returncode:
        raise SystemExit("The health check passes where there is no service.")
    print("fine")


def main() -> None:
    """Build, and serve in a process of its own."""
    if sys.argv[1:2] == ["--serve"]:
        image = Image(Path(sys.argv[2]))
        image.folder, image.variables = Path(sys.argv[3]), json.loads(sys.argv[4])
        serve(image)
        return
    with tempfile.TemporaryDirectory() as folder:
        image = Image(Path(folder) / "image", dict(pair.split("=", 1) for pair in sys.argv[1:]))
        image.build()
        state = [str(image.root), str(image.folder), json.dumps(image.variables)]
        done = subprocess.run([*_ALONE, sys.executable, "-m", "tests.image", "--serve", *state])
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
