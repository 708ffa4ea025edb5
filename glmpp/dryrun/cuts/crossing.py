"""What a cut between two stages takes away: tensors that layers hand each other beside the hidden states."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glmpp.dryrun.messages import Holder, StageResult
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
    held: dict[str, dict[int, list[Holder]]] = defaultdict(dict)
    for result in results:
        for tensor, layers in () if result.run.drafter else result.carried.items():
            held[tensor] |= layers
    found = {}
    for tensor, layers in held.items():
        modules = alike(layers)
        like = {kinds[layer]: those for layer, those in modules.items()} if kinds else {}
        modules |= {at: like[kind] for at, kind in enumerate(kinds or ()) if kind in like and at not in modules}
        most = max(those.total() for those in modules.values())
        whole = [those for those in modules.values() if those.total() == most]
        readers = {at for at, those in modules.items() if those.total() < most and any(those <= one for one in whole)}
        if readers:
            found[tensor] = {at: at not in readers for at in sorted(modules) if at in readers or modules[at] in whole}
    return found


def alike(layers: dict[int, list[Holder]]) -> dict[int, Counter]:
    """Layer -> its modules by what tells them from others: class and numbers, but for a number that is the layer's own."""
    own: dict[tuple[str, str], bool] = {}  # class, name of a number -> whether it is the layer's in every layer
    for at, modules in layers.items():
        for module in modules:
            for name, value in module.numbers.items():
                own[module.kind, name] = own.get((module.kind, name), True) and value == at

    def said(module: Holder) -> tuple:
        return module.kind, *sorted(item for item in module.numbers.items() if not own[module.kind, item[0]])

    return {at: Counter(map(said, modules)) for at, modules in layers.items()}


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
