"""Rematerialization: which activations of a layer the backward pass recomputes."""

from typing import Any, Literal

import jax

from sdpo_models.attention import ATTENTION

Remat = Literal["none", "dots", "full", "offload"]
LAYER_INPUT = "layer_input"


def recomputed(remat: Remat, layer_step: Any) -> Any:
    """Wraps the scan step of a layer in the rematerialization policy `remat`.

    Args:
      remat: `none` keeps every activation; `dots` keeps the outputs of matrix products and of
        attention; `full` keeps the layer's input alone; `offload` keeps that input in host memory.
      layer_step: the step of a scan over layers.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer_step
    if remat == "full":
        return jax.checkpoint(layer_step, prevent_cse=False)
    if remat == "dots":
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
        )
        return jax.checkpoint(layer_step, policy=policy, prevent_cse=False)
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(layer_step, policy=policy, prevent_cse=False)
