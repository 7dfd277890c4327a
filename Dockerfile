# One image with all of Basal's commands. They are built outside (`cargo build --release`) and stand in the context:
#
#     cp target/release/basal-operator target/release/basal-agent target/release/basal-cni target/release/basal context/
#     docker build --build-arg BASE=my-base --file Dockerfile context        (or: buildah bud …)
#
# The base holds a glibc that is not older than the builder's, CA certificates, nft from Debian's nftables package, which the
# agent masquerades with, and iptables in both of its forms, for nodes whose own iptables would keep packets from pods. On a
# network this is one:
#
#     FROM debian:bookworm-slim
#     RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates iptables nftables
ARG BASE
FROM ${BASE}

LABEL org.opencontainers.image.title="Basal" \
      org.opencontainers.image.licenses="Apache-2.0"

COPY basal-operator basal-agent basal-cni basal /usr/bin/

# The chart names the command of each container, and runs the operator as a user without rights.
CMD ["/usr/bin/basal", "--help"]
