"""The table of model families: one entry each, nowhere else a family's name. What the fields mean: `entry.Family`.

One file per way of scoring the experts. Every entry was compared with Transformers' modelling source, block by block
(tests/models).
"""

from moerunner.models.families import chosen, external, grouped, hashed, sigmoid, sigmoid_unusual, singular, softmax

TABLE = (
    *softmax.TABLE,
    *grouped.TABLE,
    *sigmoid.TABLE,
    *sigmoid_unusual.TABLE,
    *chosen.TABLE,
    *hashed.TABLE,
    *external.TABLE,
    *singular.TABLE,
)

# Blocks that look like a mixture of experts and stay as they are, with the reason.
LEFT_ALONE = {
    "transformers.models.doge.modeling_doge.DogeCDMoE": (
        "its experts are rows of two embeddings, and what it computes for a token depends on the other tokens of the batch"
    ),
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeAttention": (
        "its experts are the projections of an attention layer, which has to run between the two products"
    ),
    "transformers.models.nllb_moe.modeling_nllb_moe.NllbMoeSparseMLP": (
        "Transformers runs only its experts 0 and 1, whatever the router says: there is no reference to be equal to"
    ),
    "transformers.models.vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneMoeMLP": (
        "its expert is named by the number of a data set, not by a router, and computes a part of the output's channels"
    ),
}

__all__ = ["LEFT_ALONE", "TABLE"]
