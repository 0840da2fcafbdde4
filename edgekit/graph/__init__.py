"""ONNX graphs: read and describe them, lower networks to them, clean them up, change their opset."""
