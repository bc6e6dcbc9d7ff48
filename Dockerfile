# The orchestrator, without llama.cpp: models run in containers of their own.
#
#   docker build -t orchestrator/orchestrator:latest .
#
# BASE is what it runs on: a Debian with Python 3.11 as `python3`. BUILD_BASE is the same with pip and venv, where
# BASE has none. PUID and PGID are who it runs as, and whose new volumes are. Nothing here needs BuildKit.
ARG BASE=python:3.11-slim-bookworm
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS build
COPY requirements-server.lock /build/
RUN python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --require-hashes --requirement /build/requirements-server.lock

FROM ${BASE}
ARG PUID=1000
ARG PGID=1000
ENV PATH=/opt/venv/bin:/app/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/data/.huggingface \
    ORCHESTRATOR_DATABASE=/data/state/orchestrator.db
COPY --from=build /opt/venv /opt/venv
COPY deploy/orchestrator /app/bin
COPY orchestrator /app/orchestrator
COPY migrations /app/migrations
COPY services /app/services
# A new volume takes over the owner of the folder that it is mounted at.
RUN python3 -m compileall -q /app/orchestrator /app/migrations \
    && mkdir -p /data/state /data/.huggingface \
    && chown -R ${PUID}:${PGID} /data
USER ${PUID}:${PGID}
WORKDIR /app
VOLUME ["/data/state"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["healthy"]
ENTRYPOINT ["entrypoint"]
CMD ["serve"]
