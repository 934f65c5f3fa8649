"""What flax itself writes: a train state of the official code's kind, of a network of width 8. Writes beside this file:

    checkpoint_7          flax.training.checkpoints before Orbax: msgpack
    chunked               a tree by flax.serialization.msgpack_serialize, with arrays in chunks
    orbax/checkpoint_7/   flax.training.checkpoints by way of Orbax, the default of newer flax

Run in an environment of its own: pip install flax && python tests/data/flax/make_flax.py
The arrays are functions of their paths: the tests compute them too, without flax.
"""

import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
WIDTH, CLASSES, PATCH, CHANNELS = 8, 3, 2, 4


def linear(path: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}/_flax_linear/kernel": (rows, columns), f"{path}/_flax_linear/bias": (columns,)}


SHAPES = {
    "x_embedder/proj/kernel": (PATCH, PATCH, CHANNELS, WIDTH),
    "x_embedder/proj/bias": (WIDTH,),
    **linear("t_embedder/mlp/layers_0", 256, WIDTH),
    **linear("t_embedder/mlp/layers_2", WIDTH, WIDTH),
    **linear("h_embedder/mlp/layers_0", 256, WIDTH),
    **linear("h_embedder/mlp/layers_2", WIDTH, WIDTH),
    "y_embedder/embedding_table/_flax_embedding/embedding": (CLASSES + 1, WIDTH),
    **linear("blocks/layers_0/attn/qkv", WIDTH, 3 * WIDTH),
    **linear("blocks/layers_0/attn/proj", WIDTH, WIDTH),
    **linear("blocks/layers_0/mlp/fc1", WIDTH, 4 * WIDTH),
    **linear("blocks/layers_0/mlp/fc2", 4 * WIDTH, WIDTH),
    **linear("blocks/layers_0/adaLN_modulation/layers_1", WIDTH, 6 * WIDTH),
    **linear("final_layer/linear", WIDTH, PATCH * PATCH * CHANNELS),
    **linear("final_layer/adaLN_modulation/layers_1", WIDTH, 2 * WIDTH),
}


def array(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(shape, np.float32) / 4


def arrays(seed: int) -> dict[str, np.ndarray]:
    return {path: array(path, shape, seed) for path, shape in SHAPES.items()}


def main() -> None:
    import optax
    from flax import serialization, traverse_util
    from flax.training import checkpoints, train_state

    class TrainState(train_state.TrainState):
        ema_params: Any

    def tree(seed: int) -> dict:
        return traverse_util.unflatten_dict({("net", *path.split("/")): x for path, x in arrays(seed).items()})

    optimizer = optax.adamw(learning_rate=1e-4, weight_decay=0, b2=0.95)
    state = TrainState.create(apply_fn=None, params=tree(0), ema_params=tree(1), tx=optimizer).replace(step=7)
    (HERE / "checkpoint_7").write_bytes(serialization.to_bytes(state))
    serialization.MAX_CHUNK_SIZE = 64
    example = {"large": np.arange(60, dtype=np.float32).reshape(3, 20), "small": np.float64(3), "deep": {"n": 5}}
    (HERE / "chunked").write_bytes(serialization.msgpack_serialize(example))
    shutil.rmtree(HERE / "orbax", ignore_errors=True)
    checkpoints.save_checkpoint_multiprocess(HERE / "orbax", state, 7, keep=3)
    (HERE / "orbax" / "checkpoint_7" / "commit_success.txt").unlink()  # it names this machine's folder


if __name__ == "__main__":
    main()
