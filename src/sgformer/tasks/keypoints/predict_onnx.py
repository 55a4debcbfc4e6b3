"""Finding keypoints with an exported file, without torch: as detection, which returns what the file holds."""

from sgformer.tasks.detect.predict_onnx import predict, prepare

__all__ = ["predict", "prepare"]
