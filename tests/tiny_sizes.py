"""The sizes of tiny systems, for every test that needs one."""

from typing import Any

from varestorer.weights.published.varsr import VQVAE

HVAR_SIZES: dict[str, Any] = {
    "schedule": {"sides": [1, 2, 3, 4, 6, 8], "targets": [2, 4, 8]},
    "tokenizer": {
        "channels": 32,
        "multipliers": [1, 1],
        "latent_width": 8,
        "num_encoder_blocks": 1,
        "num_decoder_blocks": 1,
        "patch_size": 2,
        "vocabulary": 32,
        "use_attention": True,
        "use_quant_conv": True,
        "num_phi": 4,
        "enlarge": "bicubic",
        "shrink": "area",
    },
    "transformer": {"width": 32, "depth": 2, "num_heads": 2, "gamma_init": 1.0},
}
VARSR_SIZES: dict[str, Any] = {
    "schedule": {"sides": [1, 2, 4]},
    "tokenizer": {"channels": 32, "multipliers": [1, 1, 1], "latent_width": 8, "vocabulary": 16} | VQVAE,
    "transformer": {"width": 32, "depth": 2, "num_heads": 2, "gamma_init": 1.0},
    "prefix": {"channels": [4, 6, 8]},
    "refiner": {"width": 16, "depth": 1},
    "sampling": {"refiner_steps": 3},
}
