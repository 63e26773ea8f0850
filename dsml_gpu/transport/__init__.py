"""Moving slices between ranks: peer-to-peer in one process, and gRPC streams. Both sit behind `link.SendLink` and `link.RecvLink`."""
