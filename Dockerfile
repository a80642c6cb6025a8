# The service in an image: docker build --tag nox .   (or podman, buildah). How to run it: docs/docker.md
#
# BASE is any Debian 12 or 13, Ubuntu 22.04 or 24.04: its own python3 is what runs the service and the sandboxed programs.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-pip
COPY requirements/app-py*.lock /src/
RUN version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
    && python3 -m venv --without-pip /opt/nox/venv \
    && python3 -m pip install --quiet --no-cache-dir --no-compile --require-hashes --only-binary=:all: \
       --target "/opt/nox/venv/lib/python$version/site-packages" --requirement "/src/app-py$version.lock" \
    && rm -rf /opt/nox/venv/lib/python*/site-packages/bin /opt/nox/venv/lib/python*/site-packages/pip*
COPY app/nox_api /src/nox_api
COPY app/nox_runner /src/nox_runner
COPY container/start container/health /opt/nox/bin/
RUN cp -r /src/nox_api /src/nox_runner /opt/nox/venv/lib/python*/site-packages/ \
    && /opt/nox/venv/bin/python3 -m compileall -q /opt/nox/venv/lib \
    && chmod -R u=rwX,go=rX /opt/nox && chmod 0755 /opt/nox/bin/*

FROM ${BASE}
LABEL org.opencontainers.image.title="Nox" org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 bubblewrap libseccomp2 \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 64990 nox \
    && useradd --system --uid 64990 --gid nox --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin nox \
    && install -d -o nox -g nox -m 0755 /run/nox /var/lib/nox-api /var/lib/nox-api/history \
    && install -d -o nox -g nox -m 0755 /home/nox/nox/sandbox
COPY --from=build /opt/nox /opt/nox
USER 64990:64990
EXPOSE 8080
# No shell in between: signals reach the service. SIGTERM lets running work finish, SIGHUP reads the settings again.
ENTRYPOINT ["/opt/nox/bin/start"]
CMD ["both"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s CMD ["/opt/nox/bin/health"]
