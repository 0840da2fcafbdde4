"""ONNX graphs: reading, describing, making them of networks, cleaning them up, changing their opset."""
