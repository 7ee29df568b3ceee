# syntax=docker/dockerfile:1
# docker build -t perennial:0.1.0 .
# docker run -p 8080:8080 -v perennial:/var/lib/perennial perennial:0.1.0

# For reproducible builds, pin both images by their digests: rust:1.95-slim-trixie@sha256:..
FROM rust:1.95-slim-trixie AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# cargo-auditable writes the list of dependencies into the binary, for `cargo audit bin` and image scanners.
RUN --mount=type=cache,target=/usr/local/cargo/registry cargo install --locked cargo-auditable
WORKDIR /src
RUN mkdir /symbols
COPY . .
# The build context has no .git directory: docker build --build-arg GIT_COMMIT=$(git rev-parse --short=12 HEAD)
ARG GIT_COMMIT=
ENV GIT_COMMIT=${GIT_COMMIT}
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo auditable build --profile dist --locked --bin perennial \
    && install -D target/dist/perennial /out/perennial \
    && objcopy --only-keep-debug /out/perennial /symbols/perennial.debug \
    && objcopy --strip-all --add-gnu-debuglink=/symbols/perennial.debug /out/perennial \
    && install -d /out/data

# The symbols of the binary, for debuggers and profilers: docker build --target symbols --output . .
FROM scratch AS symbols
COPY --from=build /symbols/perennial.debug /

# The base image has the C library and the certificates of authorities, but no shell and no package manager.
FROM gcr.io/distroless/cc-debian13:nonroot
COPY --from=build /out/perennial /perennial
COPY --from=build --chown=65532:65532 /out/data /var/lib/perennial
ENV PERENNIAL_DATA_DIR=/var/lib/perennial
# The user is a number, so that Kubernetes can see that it is not root.
USER 65532:65532
EXPOSE 8080 9090
VOLUME /var/lib/perennial
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=4s --start-period=60s CMD ["/perennial", "health"]
ENTRYPOINT ["/perennial"]
# Without arguments, the public listener is reached through a published port, and the admin listener stays inside the
# container. Arguments such as --config replace this.
CMD ["--set", "server.listen=0.0.0.0:8080"]
