"""From ONNX graphs to instructions."""
