# Two images of this package:
#   docker build --target cpu  --tag fiberpo-megatron:cpu  .    the demo and the tests, no GPU
#   docker build --target cuda --tag fiberpo-megatron:cuda .    training on NVIDIA GPUs
# Without a Docker engine: tools/image/build_cpu.sh builds the cpu target on plain Debian. Apptainer: apptainer.def.
# The base images by their content (each digest is that of the index over all processors), so that no later build gets
# another one unnoticed. tools/image/base_images.sh compares the digests with the registries.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
ARG PYTORCH_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3@sha256:1dc787f5c6264fcc1c99809f99b84823e73ed4588d5a581b94290fc2a8fecff8

FROM ${PYTORCH_IMAGE} AS cuda
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Everything that changes rarely, in layers of their own: SGLang alone is several GB.
COPY tools/image/cuda_sglang.sh tools/image/sglang.lock /opt/build/
RUN /opt/build/cuda_sglang.sh
COPY setup.py README.md /opt/fiberpo/
COPY tools/image/cuda_python.sh /opt/build/
COPY fiberpo_megatron /opt/fiberpo/fiberpo_megatron
RUN /opt/build/cuda_python.sh /opt/fiberpo
COPY examples /opt/fiberpo/examples
# A user of its own number: 1000 is taken in Ubuntu's images
RUN useradd --create-home --uid 10001 --user-group fiberpo \
    && install --directory --owner fiberpo --group fiberpo /opt/fiberpo/runs
USER 10001:10001
WORKDIR /opt/fiberpo
# The engines' interpreter (SGLang pins its own torch), and one NCCL for both sides: two versions cannot share a
# communicator, which is how weights are published.
ENV FIBERPO_SGLANG_PYTHON=/opt/sglang/bin/python \
    LD_LIBRARY_PATH=/opt/nccl:${LD_LIBRARY_PATH}
HEALTHCHECK --interval=5m --timeout=60s --start-period=2m CMD ["fiberpo", "--version"]
ENTRYPOINT ["fiberpo"]
CMD ["--help"]

FROM ${PYTHON_IMAGE} AS cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# No versions: Debian's archive drops old ones, so that a pin would break the next build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make procps \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --user-group fiberpo \
    && install --directory --owner fiberpo --group fiberpo /opt/fiberpo /opt/fiberpo/runs
USER 10001:10001
WORKDIR /opt/fiberpo
COPY --chown=fiberpo:fiberpo tools/make_env.sh tools/requirements-cpu.txt tools/requirements-cpu.lock tools/
RUN tools/make_env.sh requirements
COPY --chown=fiberpo:fiberpo . .
RUN tools/make_env.sh
ENV PATH=/opt/fiberpo/.venv/bin:${PATH}
HEALTHCHECK --interval=5m --timeout=60s --start-period=2m CMD ["fiberpo", "--version"]
ENTRYPOINT ["fiberpo"]
CMD ["--help"]
