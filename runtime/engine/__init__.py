"""What a process loads once: ONNX Runtime, sessions, kernels and KV cache buffers."""
