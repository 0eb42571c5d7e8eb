# The service alone: Python, the dependencies it serves with, app/ and models_store/.
#
#   docker build -t quartet .                                  for CPUs
#   docker build -t quartet:gpu --build-arg TORCH=cu128 .      for NVIDIA GPUs
#   docker run --rm -p 127.0.0.1:8000:8000 --read-only quartet
#
# Nothing is written, uploads neither, so all of it may be read-only. Workers count their figures together in /dev/shm,
# which Docker makes in memory.

ARG PYTHON=3.12-slim

FROM python:${PYTHON} AS builder

RUN pip install --no-cache-dir --root-user-action=ignore "uv>=0.8,<1"
# The environment must run on this image's Python: one that uv fetched would be missing in the final image.
ENV UV_PYTHON_DOWNLOADS=never
WORKDIR /srv

# Before the source, so that a change in app/ does not install PyTorch again. The cache mount spares the download
# when pyproject.toml changes, and leaves nothing in the image.
COPY pyproject.toml ./
# cpu, or a CUDA version such as cu128. PyTorch for CUDA is several gigabytes larger.
ARG TORCH=cpu
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /opt/venv \
    && uv pip install --python /opt/venv/bin/python --torch-backend="${TORCH}" --link-mode=copy --compile-bytecode \
        -r pyproject.toml --extra tracing --extra redis

# What is in the image, as CycloneDX. The tool that lists it runs from an environment of its own, which stays behind.
RUN --mount=type=cache,target=/root/.cache/uv \
    uvx --from "cyclonedx-bom>=5" cyclonedx-py environment --no-validate --output-format JSON --output-file /srv/sbom.json \
        /opt/venv/bin/python

# Bytecode is made here because the service can write none. Another user will read these files, whatever umask they
# were checked out with.
COPY models_store models_store
COPY app app
RUN /opt/venv/bin/python -m compileall -q app && chmod -R a+rX app models_store


FROM python:${PYTHON}

# A number, so that permissions on mounted folders and Kubernetes' runAsNonRoot can refer to it.
RUN groupadd --gid 10001 quartet \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin quartet

# Owned by root: the service cannot change its own code or networks. What changes most often comes last.
WORKDIR /srv
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /srv/sbom.json sbom.json
COPY --from=builder /srv/models_store models_store
COPY --from=builder /srv/app app

# Python's own library comes without bytecode. This compiles what the service and its health check import of it, and
# ends the build when something that they import is missing.
RUN /opt/venv/bin/python -c "import app.main, urllib.request"

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    QUARTET_HOST=0.0.0.0 \
    QUARTET_PORT=8000 \
    QUARTET_STORE=/srv/models_store

USER 10001:10001
EXPOSE 8000

# There is no curl in this image. The empty ProxyHandler keeps a proxy set for the container out of the way.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['QUARTET_PORT'] + '/health/live', timeout=4)"]

# The process is the first of its container and handles the signal itself: it finishes what runs, then exits with 0.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "app.main"]
