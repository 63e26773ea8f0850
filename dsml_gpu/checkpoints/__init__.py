"""Files of checkpoints: what is in them, how they are written so that there is always a whole one, and what goes where.

Knows no gRPC and no devices. A checkpoint is a folder with one safetensors file for each rank and a manifest, which is
written last. Files are reached through fsspec.
"""
