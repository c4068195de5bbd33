# syntax=docker/dockerfile:1
# The server of week 12. docs/deploying.md tells how it is built, started and kept running.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
# Where torch comes from. These wheels are for CPUs, and gigabytes smaller; for a GPU take the index that the selector on pytorch.org names.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# "serve,page,rag" lets the page answer from documents (--page --documents), and adds hundreds of megabytes.
ARG EXTRAS=serve,page
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /build
COPY requirements.txt .
# Only the versions are taken from it: the image needs few of the course's packages.
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -v '^-e' requirements.txt > constraints.txt \
    && pip install -c constraints.txt --index-url "$TORCH_INDEX" torch
COPY pyproject.toml .
COPY shared shared
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim
# "gcc libc6-dev" lets quantized models run in the course's own kernels, which are compiled on the machine that they run on.
ARG SYSTEM_PACKAGES=""
# hadolint ignore=DL3008,SC2086
RUN if [ -n "$SYSTEM_PACKAGES" ]; then \
        apt-get update && apt-get install -y --no-install-recommends $SYSTEM_PACKAGES && rm -rf /var/lib/apt/lists/*; \
    fi \
    && useradd --uid 10001 --home-dir /data --create-home --shell /usr/sbin/nologin llm
COPY --from=build /venv /venv
# /data, the user's home, keeps what is downloaded. The folder that a server starts in is no place to import from.
ENV PATH=/venv/bin:$PATH LLM_WEEKS_DATA=/data PIP_NO_CACHE_DIR=1 PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
USER 10001
# So that --model NAME is a folder of what is mounted there.
WORKDIR /models
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); assert c.getresponse().status == 200"]
ENTRYPOINT ["python", "-m", "shared.serving", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "smollm2"]
