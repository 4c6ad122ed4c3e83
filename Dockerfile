# The README's steps in an image; see docs/distributed.md for running it on several machines.
#
#   docker build -t fairseq-lite .                                  # CPU
#   docker build -t fairseq-lite:cuda \
#       --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .      # NVIDIA GPUs
#   docker run -it --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" \
#       -v "$PWD":/workspace fairseq-lite:cuda
#
# Build arguments:
#   BASE       any Debian or Ubuntu image, with Python or without; pytorch/pytorch:... keeps its torch
#   TORCH      what to install as PyTorch
#   PIP_FLAGS  for pip, for example `--index-url URL` of an index of CPU-only builds
#   EXTRAS     optional packages, for example `deepspeed,fairscale`
#   UID        of the user that commands run as
ARG BASE=python:3.11-slim
FROM ${BASE}

# Text in every script shows right in the terminal, less and vim; Python, git and less go by these.
ENV LANG=C.UTF-8 LC_ALL=C.UTF-8 LESSCHARSET=utf-8

RUN apt-get update \
    && apt-get install -y --no-install-recommends git less vim \
    && { python3 -c 'import ensurepip, venv' \
         || apt-get install -y --no-install-recommends python3 python3-venv; } \
    && rm -rf /var/lib/apt/lists/*

# A torch that the base image brings is seen and kept.
RUN python3 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# Before the sources, so that a changed line of ours does not fetch it again.
ARG TORCH=torch
ARG PIP_FLAGS=
RUN pip install ${PIP_FLAGS} ${TORCH}

COPY . /opt/fairseq-lite
WORKDIR /opt/fairseq-lite
RUN pip install -e .

# DeepSpeed is built from source and looks at torch, so not in an environment apart from it.
ARG EXTRAS=
RUN test -z "${EXTRAS}" \
    || { pip install setuptools wheel \
         && DS_BUILD_OPS=0 pip install --no-build-isolation -e ".[${EXTRAS}]"; }

ARG UID=10001
RUN useradd --create-home --uid ${UID} flite && install -d -o flite /workspace
USER flite
WORKDIR /workspace
CMD ["bash"]
