"""Generation over a mesh: the tokens of one device, and nothing on every device that need not be.

8 fake devices: data parallel by either axis, tensor parallel, and both.
"""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest
import tiny_pairs
from flax.traverse_util import unflatten_dict

from jax_encdec import (
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    make_mesh,
    shard_params,
)
from jax_encdec.decoding import streaming
from jax_encdec.layers import flatten
from jax_encdec.training import init_state, make_optimizer
from jax_encdec.training.optimizer_config import OptimizerConfig
from jax_encdec.training.sharding import rows

MESHES = ("replica=8", "fsdp=8", "tensor=8", "replica=2,fsdp=2,tensor=2")
NEW = 12
SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "top_k": 20, "top_p": 0.9, "num_return_sequences": 2},
    "drawn beams": {"do_sample": True, "num_beams": 3, "temperature": 0.7},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
}
CONFIG = tiny_pairs.bert(hidden_size=32, num_attention_heads=8, num_hidden_layers=2)
IDS = np.random.default_rng(1).integers(5, 150, (8, 12))
MASK = np.where(np.arange(12) < np.arange(5, 13)[:, None], 1, 0)


@functools.cache
def pair():
    """Eight heads, so that every device may have one of its own."""
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        CONFIG, CONFIG, decoder_start_token_id=2, eos_token_id=3, pad_token_id=0
    )
    model = EncoderDecoderModel(config, GenerationConfig(max_new_tokens=NEW))
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in flatten(model.param_shapes()).items():
        scale = 0.8 if path[-1] in ("kernel", "token") else 0.1
        flat[path] = (path[-1] == "scale") + scale * rng.standard_normal(leaf.shape, np.float32)
    return model, unflatten_dict(flat)


@functools.cache
def on_one_device(search: str) -> np.ndarray:
    return generated(pair()[1], search)


def generated(params, search: str, count: int = 8) -> np.ndarray:
    key = jax.random.key(3) if "do_sample" in SEARCHES[search] else None
    out = pair()[0].generate(
        params, IDS[:count], attention_mask=MASK[:count], key=key, **SEARCHES[search]
    )
    return np.asarray(out.sequences)


@pytest.mark.parametrize(
    ("mesh", "search"),
    [(mesh, search) for mesh in MESHES for search in ("greedy", "beams")]
    + [(MESHES[-1], "samples")],
)
def test_a_mesh_generates_the_tokens_of_one_device(mesh, search):
    model, params = pair()
    placed = shard_params(model, params, mesh)
    np.testing.assert_array_equal(generated(placed, search), on_one_device(search))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", MESHES)
def test_so_do_all_searches_and_batches_that_the_mesh_does_not_divide(mesh):
    model, params = pair()
    placed = shard_params(model, params, mesh)
    for search in SEARCHES:
        np.testing.assert_array_equal(generated(placed, search), on_one_device(search))
    some = generated(placed, "beams", 3)
    whole = on_one_device("beams")[:6, : some.shape[1]]
    np.testing.assert_array_equal(some, whole)


@pytest.mark.parametrize("mesh", ["fsdp=8", "replica=2,fsdp=2,tensor=2"])
def test_parameters_that_lie_as_in_training_generate_as_they_are(mesh):
    model, params = pair()
    optimizer = make_optimizer(OptimizerConfig(), model, 8)
    state = init_state(model, optimizer, make_mesh(mesh), params=params)
    np.testing.assert_array_equal(generated(state.params, "beams"), on_one_device("beams"))


@pytest.mark.parametrize(("mesh", "search"), [("tensor=8", "greedy"), (MESHES[-1], "beams")])
def test_a_stream_over_a_mesh_is_that_of_one_device_from_as_many_programs(mesh, search):
    model, params = pair()
    placed = shard_params(model, params, mesh)
    programs = (streaming._begin, streaming._proceed, streaming._end)
    before = [program._cache_size() for program in programs]
    options = SEARCHES[search] | {"num_return_sequences": 1}
    *_, last = model.stream(placed, IDS, attention_mask=MASK, chunk=4, **options)
    best = on_one_device(search)[:: SEARCHES[search].get("num_return_sequences", 1)]
    sequences = np.asarray(last.output.sequences)
    np.testing.assert_array_equal(sequences, best[:, : sequences.shape[1]])
    assert [program._cache_size() for program in programs] == [n + 1 for n in before]


# What the compiler makes of it


def compiled(mesh: str, search: str) -> str:
    """The program of a `generate` within somebody's `jit`."""
    model, params = pair()
    place = make_mesh(mesh)

    def generate(params, ids, mask):
        return model.generate(params, ids, attention_mask=mask, **SEARCHES[search])

    with jax.set_mesh(place):
        arguments = shard_params(model, params, place), *jax.device_put((IDS, MASK), rows(place))
        return jax.jit(generate).lower(*arguments).compile().as_text()


def exchanged(program: str) -> list[tuple[str, int]]:
    """What devices exchange: kinds, and elements of each result."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* ({kinds})(?:-start)?\(", program)
    return [(kind, int(np.prod([int(n) for n in shape.split(",") if n]))) for shape, kind in found]


def carried(program: str) -> list[tuple[int, ...]]:
    """Shapes of what the loop over tokens carries, on each device."""
    loops = [line for line in program.splitlines() if " while(" in line]
    shapes = [re.findall(r"f32\[(\d+(?:,\d+)*)\]", line) for line in loops]
    return [tuple(map(int, shape.split(","))) for shape in max(shapes, key=len)]


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_devices_that_split_the_rows_tell_each_other_only_whether_they_are_done(search):
    assert exchanged(compiled("replica=4,fsdp=2", search)) == [("all-reduce", 1)]


@pytest.mark.parametrize(
    ("mesh", "batch", "heads"), [("fsdp=8", 1, 8), ("tensor=8", 8, 1), (MESHES[-1], 2, 4)]
)
def test_caches_are_split_over_rows_and_heads(mesh, batch, heads):
    """Keys and values, of both attentions, of two layers."""
    own, shapes = [batch, heads, CONFIG.hidden_size // 8], carried(compiled(mesh, "beams"))
    for slots in (4 * (NEW + 1), IDS.shape[1]):  # of 4 beams' tokens, and of the source
        caches = [shape for shape in shapes if len(shape) == 4 and slots in shape]
        assert [sorted(shape) for shape in caches] == [sorted([*own, slots])] * 4
