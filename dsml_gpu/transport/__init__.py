"""Moving slices between ranks: p2p in one process, and gRPC streams, both behind the small interface of `link`."""
