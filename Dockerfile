# kvloom in a container. docs/deploy.md says how it is run, how large it is and which of these arguments were built.
#
#   BASE         Debian or what is made of it: python3 comes from its packages
#   TORCH        which of PyTorch's builds: cpu, or cu128 and the like (then give EXTRAS=cuda)
#   TORCH_INDEX  where it comes from, if not from PyTorch's own index: a URL, or a folder of wheels that the build can see
#   EXTRAS       of kvloom's extras, such as cuda
#   MODEL        a built-in model to bring along; empty: it is fetched at the first start, into the volume
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS python
# Versions are the base image's: pinning them here would break the build with every update of Debian.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
ENV PATH=/opt/kvloom/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM python AS build
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH}
ARG EXTRAS=""
WORKDIR /src
RUN python3 -m venv /opt/kvloom
# torch in a step of its own, which changes of kvloom do not repeat; without headers, test programs and their libraries.
COPY pyproject.toml ./
COPY scripts/install.py scripts/
RUN python scripts/install.py --only-torch \
 && rm -rf /opt/kvloom/lib/python3*/site-packages/torch/include /opt/kvloom/lib/python3*/site-packages/torch/test \
 && find /opt/kvloom/lib/python3*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete
COPY . .
# The kernels come ready-made for several processors: no compiler is needed where the image runs.
RUN python scripts/install.py --fixed ${EXTRAS}

FROM build AS model
ARG MODEL=""
RUN mkdir -p /brought/models \
 && if [ -n "${MODEL}" ]; then KVLOOM_CACHE=/brought kvloom models pull "${MODEL}"; fi

FROM python AS bare
ENV KVLOOM_CACHE=/var/cache/kvloom KVLOOM_HOST=0.0.0.0 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 10001 --no-create-home --home-dir /var/cache/kvloom --shell /usr/sbin/nologin kvloom \
 && install --directory --owner=10001 --group=10001 --mode=0700 /var/cache/kvloom /reports
USER 10001:10001
VOLUME /var/cache/kvloom
ENTRYPOINT ["kvloom"]

FROM bare AS server
COPY --from=build /opt/kvloom /opt/kvloom
COPY --from=model /brought/models /opt/kvloom/share/kvloom/models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-m", "kvloom.server.probe"]
CMD ["serve"]

FROM build AS bench-build
# The version is the one that is installed: only what the extra adds is fetched.
# hadolint ignore=DL3013
RUN pip install "kvloom[bench]"

# The load test: writes its report to /reports.
FROM bare AS bench
COPY --from=bench-build /opt/kvloom /opt/kvloom
COPY --from=model /brought/models /opt/kvloom/share/kvloom/models
WORKDIR /reports
CMD ["bench", "serve", "--help"]

# What is built if nobody says what.
FROM server
