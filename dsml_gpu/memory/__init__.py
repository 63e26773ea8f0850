"""Device memory: address ranges over an array module (numpy or CuPy), and the allocator. Knows no gRPC."""
