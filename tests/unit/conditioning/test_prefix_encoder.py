"""The degraded image as prefix tokens."""

import pytest
import torch

from varestorer.conditioning.prefix_encoder import PrefixEncoder
from varestorer.utils.errors import UserError


@pytest.fixture
def encoder() -> PrefixEncoder:
    made = PrefixEncoder(12, channels=(4, 4, 8, 8, 8))
    made.init_weights(torch.Generator().manual_seed(0))
    return made


def test_a_token_for_every_16_pixels_row_by_row(encoder: PrefixEncoder) -> None:
    tokens = encoder(torch.zeros(2, 3, 32, 64))
    assert tokens.shape == (2, 8, 12)
    with torch.no_grad():
        for layer in (encoder.conv_in, *encoder.blocks, encoder.conv_out):  # each output the mean of the inputs there
            layer.weight.zero_()[:, :, 1, 1] = 1 / layer.weight.shape[1]
    image = torch.zeros(1, 3, 64, 64)
    image[..., 48, 0] = 1
    assert encoder(image)[0, :, 0].nonzero().tolist() == [[12]]


def test_the_published_encoder_has_33_million_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in PrefixEncoder(1536).parameters()) == 32_934_560


def test_a_new_encoder_passes_the_image_on_whatever_its_channels(encoder: PrefixEncoder) -> None:
    tokens = encoder(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert 0.02 < tokens.std() < 5


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 32, 40)])
def test_other_images_are_refused(encoder: PrefixEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        encoder(torch.zeros(shape))


def test_one_number_of_channels_is_refused() -> None:
    with pytest.raises(UserError, match="at least two"):
        PrefixEncoder(12, channels=(4,))
