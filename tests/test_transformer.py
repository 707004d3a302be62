import pytest
import torch

from cytosyn_aug.encoder import TileEncoder
from cytosyn_aug.transformer import SiT

SMALL = {
    "input_size": 8,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "conditioning_dim": 6,
    "encoder_depth": 2,
    "z_dims": (6,),
    "projector_dim": 16,
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_xl_parameter_counts_are_cytosyns():
    with torch.device("meta"):
        assert count(SiT()) == 682_906_128
        assert count(SiT(z_dims=())) == 674_774_800


def test_encoder_defaults_have_h0_minis_parameter_count_and_tokens():
    with torch.device("meta"):
        encoder = TileEncoder()
        features = encoder(torch.zeros(1, 3, 224, 224, dtype=torch.uint8, device="meta"))
    assert count(encoder) == 85_739_520
    assert features.cls.shape == (1, 768)
    assert features.patches.shape == (1, 256, 768)


def test_state_dict_names_and_shapes_are_repa_es():
    with torch.device("meta"):
        state = SiT().state_dict()
    block = {
        "attn.qkv.weight": (3456, 1152),
        "attn.qkv.bias": (3456,),
        "attn.proj.weight": (1152, 1152),
        "attn.proj.bias": (1152,),
        "mlp.fc1.weight": (4608, 1152),
        "mlp.fc1.bias": (4608,),
        "mlp.fc2.weight": (1152, 4608),
        "mlp.fc2.bias": (1152,),
        "adaLN_modulation.1.weight": (6912, 1152),
        "adaLN_modulation.1.bias": (6912,),
    }
    want = {
        "pos_embed": (1, 196, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.linear.weight": (1152, 768),
        "y_embedder.linear.bias": (1152,),
        "projectors.0.0.weight": (2048, 1152),
        "projectors.0.0.bias": (2048,),
        "projectors.0.2.weight": (2048, 2048),
        "projectors.0.2.bias": (2048,),
        "projectors.0.4.weight": (768, 2048),
        "projectors.0.4.bias": (768,),
        "final_layer.linear.weight": (16, 1152),
        "final_layer.linear.bias": (16,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
        "bn.running_mean": (4,),
        "bn.running_var": (4,),
        "bn.num_batches_tracked": (),
    } | {f"blocks.{n}.{k}": v for n in range(28) for k, v in block.items()}
    assert {k: tuple(v.shape) for k, v in state.items()} == want


def test_an_untrained_transformer_is_zero():
    out = SiT(**SMALL)(torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 6))
    assert out.shape == (2, 4, 8, 8)
    assert out.abs().max() == 0


@pytest.fixture
def random_sit():
    torch.manual_seed(0)
    network = SiT(**SMALL).eval()
    for parameter in network.parameters():  # zero-initialised layers would hide errors
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def test_a_batch_is_its_rows(random_sit):
    x, t, c = torch.randn(3, 4, 8, 8), torch.rand(3), torch.randn(3, 6)
    rows = torch.cat([random_sit(x[i : i + 1], t[i : i + 1], c[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(random_sit(x, t, c), rows, rtol=1e-4, atol=1e-5)


def test_time_and_condition_change_the_velocity(random_sit):
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([0.3]), torch.randn(1, 6)
    base = random_sit(x, t, c)
    assert not torch.allclose(base, random_sit(x, t + 0.4, c))
    assert not torch.allclose(base, random_sit(x, t, c + 1))


def test_positions_encode_columns_first():
    positions = SiT(**SMALL).pos_embed[0].unflatten(0, (4, 4))
    # The first half of the width is constant down a column, the second along a row.
    torch.testing.assert_close(positions[0, 2, :16], positions[3, 2, :16])
    torch.testing.assert_close(positions[2, 0, 16:], positions[2, 3, 16:])
    assert not torch.allclose(positions[0, 0, :16], positions[0, 1, :16])


def test_unpatchify_puts_every_token_in_its_place():
    network = SiT(**SMALL)
    tokens = torch.arange(16 * 16, dtype=torch.float32).view(1, 16, 16)
    image = network._unpatchify(tokens)
    # Token of row 1, column 2; patch row 1, column 0; channel 3: (p q c) order.
    assert image[0, 3, 2 * 1 + 1, 2 * 2 + 0] == tokens[0, 1 * 4 + 2, (1 * 2 + 0) * 4 + 3]


def test_whitening_inverts_and_uses_the_buffers(random_sit):
    random_sit.bn.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    random_sit.bn.running_var.copy_(torch.tensor([4.0, 1.0, 0.25, 9.0]))
    z = torch.randn(2, 4, 8, 8)
    white = random_sit.whiten(z)
    torch.testing.assert_close(white[:, 0], (z[:, 0] - 1) / 2)
    torch.testing.assert_close(random_sit.unwhiten(white), z)


def test_it_compiles_without_graph_breaks(random_sit):
    x, t, c = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 6)
    compiled = torch.compile(random_sit, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, c), random_sit(x, t, c))
