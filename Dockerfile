# The image of the service. It contains Python, the runtime dependencies, app/ and models_store/.
#
#   docker build -t quartet .                                  for CPUs
#   docker build -t quartet:gpu --build-arg TORCH=cu128 .      for NVIDIA GPUs
#   docker build -t quartet --build-arg EXTRAS="tables tracing redis postgres onnx" .      also for imported ONNX networks
#   docker run --rm -p 127.0.0.1:8000:8000 --read-only --stop-timeout 45 quartet
#
# The service writes no files on disk, so the file system can be read-only. Workers share their metrics through a folder
# in /dev/shm, which is in memory.

# The base image. Its command `python` must be Python 3.11 or newer.
ARG BASE=python:3.12-slim

FROM ${BASE} AS builder

RUN python -m pip install --no-cache-dir --root-user-action=ignore "uv>=0.8,<1"
# Make uv use the Python of the base image. If uv downloaded a Python, the final image would not contain it.
ENV UV_PYTHON_DOWNLOADS=never
WORKDIR /srv

# Install the dependencies before the source is copied, so that a change in app/ does not reinstall PyTorch. If
# pyproject.toml changes, the cache mount avoids new downloads. The cache is not part of the image.
COPY pyproject.toml ./
# TORCH is the build of PyTorch: cpu, or a CUDA version such as cu128. A CUDA build makes the image several gigabytes
# larger. If TORCH is empty, uv installs the default build.
ARG TORCH=cpu
# EXTRAS are optional dependencies of pyproject.toml. Add onnx to serve imported ONNX networks.
ARG EXTRAS="tables tracing redis postgres"
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /opt/venv \
    && uv pip install --python /opt/venv/bin/python ${TORCH:+--torch-backend="${TORCH}"} --link-mode=copy --compile-bytecode \
        -r pyproject.toml $(for extra in ${EXTRAS}; do echo "--extra ${extra}"; done)

# Write the software bill of materials (CycloneDX). The tool has its own environment, which is not part of the final
# image.
RUN --mount=type=cache,target=/root/.cache/uv \
    uvx --from "cyclonedx-bom>=5" cyclonedx-py environment --no-validate --output-format JSON --output-file /srv/sbom.json \
        /opt/venv/bin/python

# Compile bytecode now, because the service cannot write files. Make all files readable, because another user runs the
# service.
COPY models_store models_store
COPY app app
RUN /opt/venv/bin/python -m compileall -q app && chmod -R a+rX app models_store


FROM ${BASE}

# The uid is fixed, so that administrators can set the permissions of mounted folders. The setting runAsNonRoot of
# Kubernetes also needs a numeric uid.
RUN groupadd --gid 10001 quartet \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin quartet

# Root owns these files, so the service cannot change its code or networks. The files that change most often come
# last, so that a new build reuses the layers of the other files.
WORKDIR /srv
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /srv/sbom.json sbom.json
COPY --from=builder /srv/models_store models_store
COPY --from=builder /srv/app app

# Compile the modules of the standard library that the service and its health check import. The build fails if a
# module is missing.
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

# The service is process 1. On SIGTERM, the service finishes its requests and exits with status 0.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "app.main"]
