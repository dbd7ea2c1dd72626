"""How much memory of the host loading takes beyond the parameters: a process of its own prints it.

    python tests/load_memory.py VARIANT LAYERS SHARD_MB [DEVICES]

The checkpoint is as large as it says and takes no disk: its files are headers with a hole after.
"""

import json
import os
import struct
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from sdpo_models.checkpoint_files import INDEX
from sdpo_models.families import is_transposed, tensor_names
from sdpo_models.hugging_face import load_params
from sdpo_models.transformer import parameter_table
from sdpo_models.variants import VARIANTS


def tensors(a):
    """Names and shapes, in the order of published checkpoints: layer by layer."""
    table = parameter_table(a)
    layers = {ours: leaf.shape[1:] for ours, leaf in table["layers"].items()}
    top = {ours: leaf.shape for ours, leaf in table.items() if ours != "layers"}
    for ours, shape in top.items():
        yield tensor_names(a.family, ours, None)[0], _theirs(ours, shape)
    for i in range(a.layers):
        for ours, shape in layers.items():
            yield tensor_names(a.family, ours, a.layers)[i], _theirs(ours, shape)


def _theirs(ours, shape):
    return shape[::-1] if is_transposed(ours, len(shape)) else shape


def write_holes(folder, a, max_shard_bytes):
    """A bfloat16 checkpoint of zeros in shards; returns the size of the largest."""
    shards = [[]]
    for name, shape in tensors(a):
        size = 2 * int(np.prod(shape))
        if shards[-1] and sum(s for _, _, s in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append((name, shape, size))
    weight_map = {}
    for i, shard in enumerate(shards):
        path, header, end = folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors", {}, 0
        for name, shape, size in shard:
            span = [end, end := end + size]
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": span}
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + end)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def memory():
    """Now and at most so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return tuple(1024 * int(values[key].split()[0]) for key in ("VmRSS", "VmHWM"))


def main():
    name, layers, shard_mb, *rest = sys.argv[1:]
    a = VARIANTS[name]
    sliding = (a.sliding_layers * int(layers))[: int(layers)]
    a = replace(a, layers=int(layers), sliding_layers=sliding)
    count = int(rest[0]) if rest else 1
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(3)))  # the runtime's own memory
    with tempfile.TemporaryDirectory() as folder:
        largest = write_holes(Path(folder), a, int(float(shard_mb) * 1e6))
        before, _ = memory()
        shardings = tiny.make_devices(fsdp=count).parameter_shardings
        params = load_params(Path(folder), a, shardings=shardings, dtype=jnp.bfloat16)
        after, peak = memory()
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    out = {"held": held, "largest_shard": largest, "beyond": peak - before - held}
    print(json.dumps(out | {"after": after - before - held}))


if __name__ == "__main__":
    main()
