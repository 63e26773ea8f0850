"""The wire: generated stubs of proto/gpu_sim.proto, and how bytes and errors travel."""
