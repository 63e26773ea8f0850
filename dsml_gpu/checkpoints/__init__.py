"""Checkpoints: files that hold what communicators have in device memory. Knows no gRPC."""
