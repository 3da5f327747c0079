"""BitNet: Llama's layer with a squared ReLU gate and an RMSNorm before o and before down (arXiv:2504.12285).

The weights are trained to be ternary; how such checkpoints are stored is `core/models/bitnet_io.py`. As a plain float model
this adapter describes what transformers computes without a quantisation configuration.
"""

from core.models.adapter import ADAPTERS, ModelAdapter

BITNET = ADAPTERS.register(
    "bitnet",
    ModelAdapter(
        name="BitNet",
        model_types=("bitnet",),
        norm="rms",
        attn_sub_norm="self_attn.attn_sub_norm",
        ffn_sub_norm="mlp.ffn_sub_norm",
    ),
)
