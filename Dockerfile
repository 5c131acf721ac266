# syntax=docker/dockerfile:1
#
#   docker build --target cpu  -t deltaserve:cpu .
#   docker build --target cuda -t deltaserve:cuda .        run it with --gpus all
#
# torch from the package index is built for CUDA, and runs on CPUs too. For a CPU image several times smaller,
# name PyTorch's index of CPU-only wheels in PIP_ARGS (as pip's option for an extra index).

ARG CPU_IMAGE=python:3.11-slim-bookworm
# torch brings CUDA's libraries; of the base image only the hooks for the driver are needed.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04

# What runs: a Python, and the C compiler for the small kernels that are compiled at the first start.
FROM ${CPU_IMAGE} AS cpu-base
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 deltaserve \
    && install -d -o deltaserve -g deltaserve /data

FROM ${CUDA_IMAGE} AS cuda-base
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 deltaserve \
    && install -d -o deltaserve -g deltaserve /data

# The installed environment. Dependencies come before the code, so that a change of code reuses their layer.
FROM cpu-base AS cpu-build
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/deltaserve
COPY requirements.lock ./
COPY deploy/install.sh deploy/
RUN deploy/install.sh dependencies /opt/deltaserve/bin/python requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY deltas deltas
COPY server server
RUN deploy/install.sh project /opt/deltaserve/bin/python

FROM cuda-base AS cuda-build
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/deltaserve
COPY requirements.lock ./
COPY deploy/install.sh deploy/
RUN deploy/install.sh dependencies /opt/deltaserve/bin/python requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY deltas deltas
COPY server server
RUN deploy/install.sh project /opt/deltaserve/bin/python

FROM cpu-base AS cpu
COPY --from=cpu-build /opt/deltaserve /opt/deltaserve
COPY deploy/healthcheck.py /opt/deltaserve/healthcheck.py
ENV PATH=/opt/deltaserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    XDG_CACHE_HOME=/data/cache \
    DELTASERVE_HOST=0.0.0.0 \
    DELTASERVE_DATA_DIR=/data
USER deltaserve
WORKDIR /home/deltaserve
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 \
    CMD ["python", "/opt/deltaserve/healthcheck.py"]
ENTRYPOINT ["deltaserve"]
CMD ["serve"]

FROM cuda-base AS cuda
COPY --from=cuda-build /opt/deltaserve /opt/deltaserve
COPY deploy/healthcheck.py /opt/deltaserve/healthcheck.py
ENV PATH=/opt/deltaserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    XDG_CACHE_HOME=/data/cache \
    DELTASERVE_HOST=0.0.0.0 \
    DELTASERVE_DATA_DIR=/data
USER deltaserve
WORKDIR /home/deltaserve
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 \
    CMD ["python", "/opt/deltaserve/healthcheck.py"]
ENTRYPOINT ["deltaserve"]
CMD ["serve"]
