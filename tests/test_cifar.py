"""The main job's first half on the full CIFAR-10 test set: a public float network, calibrated, before any training."""

import pytest
import torch

import qtemper
from qtemper.data import NORMALIZATIONS, MemorySource, normalize
from qtemper.models import ModelConfig, build
from qtemper.train import evaluate
from qtemper.weights import load_strictly, read_safetensors


@pytest.mark.slow
def test_calibrated_w8a8_loses_less_than_a_third_of_a_point(cifar10, shared_data):
    path = shared_data / "weights" / "cifar10_resnet20_akamaster-12fca82f.safetensors"
    model = build(ModelConfig())
    load_strictly(model, read_safetensors(path), path)
    images = normalize(cifar10.train.images[:512], *NORMALIZATIONS["imagenet"])
    qtemper.prepare(model, "tempering", "W8A8")
    qtemper.calibrate(model, [images])
    with torch.no_grad():
        top1 = evaluate(model, MemorySource(cifar10, "imagenet"))
    assert top1 > 91.73 - 0.3
