# The image of the service. It contains Python, the runtime dependencies, app/ and models_store/.
#
#   docker build -t quartet .                                  for CPUs
#   docker build -t quartet:gpu --build-arg TORCH=cu128 .      for NVIDIA GPUs
#   docker run --rm -p 127.0.0.1:8000:8000 --read-only quartet
#
# The service writes no files on disk, so the file system can be read-only. Workers share their metrics in /dev/shm, which is
# in memory.

# The base image. It must have Python 3.11 or newer as the command `python`.
ARG BASE=python:3.12-slim

FROM ${BASE} AS builder

RUN python -m pip install --no-cache-dir --root-user-action=ignore "uv>=0.8,<1"
# Use the Python of the base image, because a Python that uv downloads would be missing in the final image.
ENV UV_PYTHON_DOWNLOADS=never
WORKDIR /srv

# Dependencies are installed before the source is copied, so that a change in app/ does not reinstall PyTorch. The cache mount
# avoids downloads when pyproject.toml changes. It is not part of the image.
COPY pyproject.toml ./
# The build of PyTorch: cpu, or a CUDA version such as cu128, which makes the image several gigabytes larger. If this is empty,
# uv chooses the build.
ARG TORCH=cpu
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /opt/venv \
    && uv pip install --python /opt/venv/bin/python ${TORCH:+--torch-backend="${TORCH}"} --link-mode=copy --compile-bytecode \
        -r pyproject.toml --extra tracing --extra redis

# Write the software bill of materials (CycloneDX). The tool has its own environment, which is not part of the final image.
RUN --mount=type=cache,target=/root/.cache/uv \
    uvx --from "cyclonedx-bom>=5" cyclonedx-py environment --no-validate --output-format JSON --output-file /srv/sbom.json \
        /opt/venv/bin/python

# Compile bytecode now, because the service cannot write it. Make all files readable, because another user runs the service.
COPY models_store models_store
COPY app app
RUN /opt/venv/bin/python -m compileall -q app && chmod -R a+rX app models_store


FROM ${BASE}

# The user has a fixed uid, for the permissions of mounted folders and for Kubernetes' runAsNonRoot.
RUN groupadd --gid 10001 quartet \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin quartet

# Root owns these files, so the service cannot change its code or networks. The files that change most often come last.
WORKDIR /srv
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /srv/sbom.json sbom.json
COPY --from=builder /srv/models_store models_store
COPY --from=builder /srv/app app

# Compile the modules of Python's standard library that the service and its health check import. The build fails if a module
# is missing.
RUN /opt/venv/bin/python -c "import app.main, urllib.request"

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    QUARTET_HOST=0.0.0.0 \
    QUARTET_PORT=8000 \
    QUARTET_STORE=/srv/models_store

USER 10001:10001
EXPOSE 8000

# The check uses Python, because the image has no curl. The empty ProxyHandler ignores proxy settings of the container.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['QUARTET_PORT'] + '/health/live', timeout=4)"]

# The service is process 1 and handles the signal itself. It finishes its requests and exits with status 0.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "app.main"]
