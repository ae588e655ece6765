"""ONNX graphs and the operators they define."""
