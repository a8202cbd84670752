# SPDX-License-Identifier: Apache-2.0
# The image of a server, for hosts without a card; docs/container.md says how to build and run it.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# The index of PyTorch's CPU wheels, for pip here and for the build of vLLM, which wants PyTorch too.
ARG PIP_EXTRA_INDEX_URL=""
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY vllm_spyre_mm vllm_spyre_mm
RUN VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE="$(sed -n 's/^vllm==//p' constraints.txt)" \
    pip install --no-binary vllm --constraint constraints.txt .
RUN python -c "import sys, torch; sys.exit(torch.version.cuda and 'this PyTorch is built for CUDA: \
give the index of CPU wheels as PIP_EXTRA_INDEX_URL')"

FROM python:${PYTHON}-slim AS serve
# Graphs are compiled by a C++ compiler when the server starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 serve
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    TORCHINDUCTOR_CACHE_DIR=/home/serve/.cache/inductor \
    VLLM_PLUGINS=spyre_mm
USER 10001
WORKDIR /home/serve
VOLUME ["/model"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve", "/model", "--device", "spyre", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--served-model-name", "model"]
