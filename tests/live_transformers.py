"""Our models against transformers' PyTorch models, on random checkpoints made on the spot.

    pip install -e '.[train]' torch
    python tests/live_transformers.py [--seeds N]

What the committed fixtures check, on fresh weights; and the way back: a folder that we export loads
in transformers and gives the same logits, the same greedy tokens, and bit for bit the same tensors.
Three minutes on two CPU cores.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import make_fixtures
import numpy as np
import parity
import tiny

from sdpo_models.architecture import to_hugging_face
from sdpo_models.checkpoint_files import list_tensors, read_slice
from sdpo_models.families import is_transposed, tensor_names
from sdpo_models.hugging_face import load_architecture, load_params, save_run, save_weights
from sdpo_models.transformer import parameter_table
from sdpo_models.variants import VARIANTS


def tensors(folder):
    """Every tensor of a folder as bytes, with its dtype."""
    found = list_tensors(folder)
    whole = {name: read_slice(stored, name, (slice(None),)) for name, stored in found.items()}
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in whole.items()}


def check_case(name, seed, work):
    """Fresh checkpoint of a case: parity both ways, and a bit-equal way through our hands."""
    folder = work / f"{name}_{seed}"
    make_fixtures.write_checkpoint(folder, name, seed)
    case = make_fixtures.expected(make_fixtures.load(folder), seed)
    errors = all_errors(folder, case)

    exported = work / f"{name}_{seed}_exported"
    stored = jnp.dtype(make_fixtures.STORED.get(name, "float32"))
    architecture = load_architecture(folder)
    params = load_params(folder, architecture, dtype=stored)
    save_run(exported, params, source=folder, dtype=stored, max_shard_bytes=40_000)
    assert tensors(exported) == tensors(folder), f"{name}: not bit-equal"
    again = make_fixtures.expected(make_fixtures.load(exported), seed)
    for key, value in case.items():
        np.testing.assert_array_equal(again[key], value, err_msg=f"{name}: {key} after export")
    return errors


def all_errors(folder, case):
    loaded = parity.load(folder)
    errors = parity.hidden_errors(*loaded, case) | {
        "prefill and decode": parity.decode_error(*loaded, case)
    }
    assert max(errors.values()) <= parity.TOLERANCE, f"{folder.name}: {errors}"
    assert parity.greedy_matches(*loaded, case), f"{folder.name}: greedy tokens differ"
    return errors


def check_export_of_ours(name, seed, work):
    """A model that began here: our config.json, our weights in two dtypes."""
    a, errors = VARIANTS[name], {}
    params = tiny.make_params(a, seed)
    for dtype in ("float32", "bfloat16"):
        folder = work / f"{name}_{seed}_{dtype}"
        folder.mkdir()
        config = to_hugging_face(a, dtype=dtype)
        (folder / "config.json").write_text(json.dumps(config))
        save_weights(folder, params, a, dtype=dtype)
        assert load_architecture(folder) == a
        case = make_fixtures.expected(make_fixtures.load(folder), seed)
        errors[dtype] = max(all_errors(folder, case).values())
    return errors


def check_published_shapes(name):
    """transformers' model of our config.json has our tensors, in name and in shape."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForCausalLM

    a = VARIANTS[name]
    config = to_hugging_face(a)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        )
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    table, ours = parameter_table(a), {}
    for leaf_name, leaf in table.items():
        if leaf_name != "layers":
            shape = leaf.shape[::-1] if is_transposed(leaf_name, len(leaf.shape)) else leaf.shape
            ours[tensor_names(a.family, leaf_name, None)[0]] = shape
    for leaf_name, leaf in table["layers"].items():
        shape = leaf.shape[1:]
        shape = shape[::-1] if is_transposed(leaf_name, len(shape)) else shape
        ours |= dict.fromkeys(tensor_names(a.family, leaf_name, a.layers), shape)
    assert ours == theirs, f"{name}: {set(ours.items()) ^ set(theirs.items())}"
    return sum(int(np.prod(shape)) for shape in ours.values())


def show(name, errors):
    print(f"{name:16}", *(f"{key} {value:.1e}" for key, value in errors.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description="Our models against transformers'.")
    parser.add_argument("--seeds", type=int, default=1, help="checkpoints of each case")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for name in VARIANTS:
        print(f"{name:16} {check_published_shapes(name):,} parameters", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for seed in range(100, 100 + options.seeds):
            for name in make_fixtures.CASES:
                show(name, check_case(name, seed, Path(work)))
            for name in VARIANTS:
                if name.endswith("_mu"):
                    show(name, check_export_of_ours(name, seed, Path(work)))
    print("all equal")


if __name__ == "__main__":
    main()
