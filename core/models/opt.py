"""OPT, the paper's architecture: LayerNorm, learned positions, biases, ReLU, no gate. Pre-norm only, as in the paper:
opt-350m normalises after the residual sum, where no order of channels can be folded away."""

from transformers import PretrainedConfig

from core.models.adapter import ADAPTERS, ModelAdapter


def _rejects(config: PretrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return (
            "This OPT normalises after the residual sum (as opt-350m does), which RPTQ cannot reorder: "
            "use a pre-norm size such as opt-125m."
        )
    return None


OPT = ADAPTERS.register(
    "opt",
    ModelAdapter(
        name="OPT",
        model_types=("opt",),
        norm="layer",
        layers="model.decoder.layers",
        norm1="self_attn_layer_norm",
        norm2="final_layer_norm",
        o="self_attn.out_proj",
        mlp_in=("fc1",),
        down="fc2",
        rope=False,
        ffn_field="ffn_dim",
        activation_field="activation_function",
        eps_field=None,
        rejects=_rejects,
    ),
)
