"""What a cut between two stages takes away: tensors that layers hand each other beside the hidden states."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glmpp.dryrun.messages import StageResult
from glmpp.partition import Stage


@dataclass(frozen=True)
class Crossing:
    """A layer that reads what another stage computes: vLLM hands it no such tensor, and on its stage nobody has written it.

    Attributes:
        stage, layer: who reads: the first layer of its stage that refers to the tensor.
        tensor: what vLLM's modules call it.
        source, computed_by: stage and layer that compute what it should be.
    """

    stage: int
    layer: int
    tensor: str
    source: int
    computed_by: int

    def __str__(self) -> str:
        return f"stage {self.stage} reads {self.tensor} that stage {self.source} computes"


def computing(results: Iterable[StageResult], kinds: Sequence | None = None) -> dict[str, dict[int, bool]]:
    """Tensor -> layer -> whether it computes it or reads it; of tensors that some layers compute and others read.

    A layer that has other modules, or others' numbers, refers to a tensor for other reasons and is left out.

    Args:
        results: of ranks that hold the layers between them, or of the PP=1 control.
        kinds: of each layer; one that was not run is taken for one of its kind.
    """
    modules: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for result in results:
        for tensor, layers in () if result.run.drafter else result.carried.items():
            modules[tensor] |= layers
    found = {}
    for tensor, layers in modules.items():
        like = {kinds[layer]: those for layer, those in layers.items()} if kinds else {}
        layers |= {at: like[kind] for at, kind in enumerate(kinds or ()) if kind in like and at not in layers}
        most = max(map(len, layers.values()))
        computing = [Counter(those) for those in layers.values() if len(those) == most]
        readers = {
            at for at, those in layers.items() if len(those) < most and any(Counter(those) <= one for one in computing)
        }
        if readers:
            found[tensor] = {at: at not in readers for at in sorted(layers) if at in readers or len(layers[at]) == most}
    return found


def crossings(results: Iterable[StageResult], stages: Sequence[Stage], kinds: Sequence | None = None) -> list[Crossing]:
    """What the stages of a split read across their cuts. Args: as of `computing`."""
    found = []
    for tensor, computes in computing(results, kinds).items():
        for stage in stages:
            first = next((layer for layer in stage.layers if layer in computes), None)
            before = [layer for layer in computes if computes[layer] and first is not None and layer < first]
            if before and not computes[first]:
                (source,) = (one.rank for one in stages if before[-1] in one.layers)
                found.append(Crossing(stage.rank, first, tensor, source, before[-1]))
    return sorted(found, key=lambda one: (one.stage, one.tensor))


def uncut(results: Iterable[StageResult], num_layers: int, kinds: Sequence | None = None) -> list[int]:
    """Layers that a stage can begin with and read nothing of another's. Args: as of `computing`."""
    tables = computing(results, kinds).values()
    return [
        start
        for start in range(num_layers)
        if all(next((computes[layer] for layer in computes if layer >= start), True) for computes in tables)
    ]
