# A service on a CPU: `docker build --tag sparsepeft .`; docs/serve.md says how it is run.
# `make test-image` runs these steps without Docker. There is no compiler in it: memories are read by plain PyTorch.

FROM python:3.12-slim AS build
# Where PyTorch has no CUDA: from PyPI it would bring gigabytes of it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
RUN python -m venv /opt/sparsepeft
COPY constraints.txt ./
RUN /opt/sparsepeft/bin/python -m pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src ./src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
RUN /opt/sparsepeft/bin/python -m pip install --no-cache-dir --constraint constraints.txt "$(ls /wheels/*.whl)[cli,serve,minilm]"

FROM python:3.12-slim
COPY --from=build /opt/sparsepeft /opt/sparsepeft
# Whatever user it runs as may write here, and nowhere else: the demo's task, and models from the hub.
RUN mkdir --mode 1777 /data
WORKDIR /data
VOLUME /data
ENV PATH=/opt/sparsepeft/bin:$PATH HOME=/data HF_HOME=/data/huggingface PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8080
# The demo's task is trained before the first answer.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=5)"]
# Others can reach it, so it asks for a token: the file has to be mounted, or be a secret of that name.
ENTRYPOINT ["sparsepeft", "serve", "--host", "0.0.0.0", "--token-file", "/run/secrets/tokens"]
