"""Bytes kept for the backward pass: closed forms, and the same without memory as with."""

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.synthetic import random_parts
from training.costs import Kept, kept_bytes, saved_bytes
from training.stages.discriminator import PatchDiscriminator


def test_a_layer_keeps_its_input_and_a_copy_of_its_weight_in_bfloat16():
    with torch.device("meta"):
        kept = kept_bytes(nn.Linear(8, 4), nn.Module.__call__, torch.zeros(1, 8))
    assert kept == Kept(fixed=2 * 8 * 4, per_sample=2 * 8)


def test_weights_do_not_count_and_what_is_saved_twice_counts_once():
    layer, x = nn.Linear(8, 4), torch.zeros(3, 8, requires_grad=True)
    assert saved_bytes(layer, lambda: (layer(x), layer(x.view(3, 8)))) == x.nbytes


def test_attention_keeps_nothing_for_pairs_of_tokens():
    with torch.device("meta"):
        layer = Attention(64, num_heads=2)
        short, long = (
            kept_bytes(layer, nn.Module.__call__, torch.zeros(1, num, 64)).per_sample
            for num in (256, 512)
        )
    assert long == 2 * short


def test_a_pass_of_some_samples_copies_all_weights():
    assert Kept(8.0, 4.0).scaled(1 / 2) == Kept(8.0, 2.0)


def tile():
    return torch.zeros(2, 3, 112, 112)


CALLS = {
    "encode": (lambda: random_parts().vae, lambda vae: vae.encode(tile()).latent_dist.std),
    "decode": (lambda: random_parts().vae, lambda vae: vae.decode(torch.zeros(2, 4, 14, 14))),
    "judge": (lambda: PatchDiscriminator(8), lambda judge: judge(tile())),
    "transformer": (
        lambda: random_parts().transformer,
        lambda sit: sit(torch.zeros(2, 4, 14, 14), torch.zeros(2), torch.zeros(2, 24)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_memory_keep_what_real_ones_do(name):
    build, call = CALLS[name]
    network = build()
    with torch.autocast("cpu", torch.bfloat16):
        real = saved_bytes(network, lambda: call(network))
    network = network.to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        network = network.to_empty(device="cpu")
        # Statistics of group norms: float32 on the CPU, bfloat16 in torch's description of it.
        assert saved_bytes(network, lambda: call(network)) == pytest.approx(real, rel=1e-3)
