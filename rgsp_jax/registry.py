"""Every merge method by name."""

from collections.abc import Mapping
from types import MappingProxyType

from rgsp_jax.grafting import graft_layer
from rgsp_jax.merging import average, slerp
from rgsp_jax.method import Method
from rgsp_jax.rgsp import dgsm, gsf, relative, rgsp, rgsp_seed

TABLE = (
    Method(
        "average",
        average,
        "Weighted mean of the weights.",
        models=(1, None),
        scope="tensors",
        elementwise=True,
        order_invariant=True,
        scale_equivariant=True,
    ),
    Method(
        "slerp",
        slerp,
        "Spherical interpolation of two models.",
        models=(2, 2),
        scope="tensors",
        scale_equivariant=True,
    ),
    Method(
        "rgsp",
        rgsp,
        "Well-posed pairwise RGSP-TEFM: the mean plus a task vector carried through aligned subspaces.",
        models=(2, 2),
        order_invariant=True,
        scale_equivariant=True,
    ),
    Method("rgsp_seed", rgsp_seed, "RGSP-TEFM to the letter of the source; depends on the order.", models=(2, 2)),
    Method(
        "dgsm",
        dgsm,
        "The source's comparator with the first model as absolute base.",
        models=(2, 2),
        keeps_copies=False,
    ),
    Method("gsf", gsf, "dgsm without the dynamic map.", models=(2, 2), keeps_copies=False),
    Method(
        "relative",
        relative,
        "Base-free fusion of K models: decorrelated low-rank departures from their mean.",
        order_invariant=True,
        scale_equivariant=True,
    ),
    Method(
        "graft",
        graft_layer,
        "Null-space graft: all the first model does on its own data, with what the second knows beside it.",
        models=(2, 2),
        needs=frozenset({"covariances"}),
        rest="first",
        covariances=1,
        scale_equivariant=True,
    ),
)

methods: Mapping[str, Method] = MappingProxyType({method.name: method for method in TABLE})
"""Name -> method; each is callable as `methods[name](stack [K, m, n], **hyperparameters)`."""
