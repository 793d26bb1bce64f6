"""A plan in the making, and what of it must be known when its results come."""

from collections.abc import Collection
from dataclasses import dataclass, field

from saqqara.cluster.reuse.cached import Use
from saqqara.workers.plan import DecodeItem, NewSequence, Parking, PrefillGroup, StepPlan

from .sequence import Sequence


@dataclass(slots=True)
class Draft:
    """A plan in the making and, once it is made, what must be known to absorb its results."""

    drop: list[int] = field(default_factory=list)
    park: list[Parking] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    evict: list[int] = field(default_factory=list)
    offload: list[int] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    prefill: list[PrefillGroup] = field(default_factory=list)
    decode: list[DecodeItem] = field(default_factory=list)
    sequences: dict[int, Sequence] = field(default_factory=dict)  # every slot it works on
    sampling: list[int] = field(default_factory=list)
    busy_stages: set[int] = field(default_factory=set)
    prefilling: dict[int, Use] = field(default_factory=dict)  # slots in prefill groups
    through: list[int] = field(default_factory=list)  # of them, those whose prefill ends
    copied_bytes: int = 0  # of parked sequences, to the host and back
    has_pool_alone: bool = False  # one slot holds pages, and nothing else does

    def mention(self, slot: int, sequence: Sequence) -> None:
        """Note that the plan works on a sequence."""
        self.sequences[slot] = sequence
        sequence.num_in_flight += 1

    def sample(self, slot: int, sequence: Sequence) -> None:
        """Note that the plan samples a sequence that it works on."""
        self.sampling.append(slot)
        sequence.num_sampling += 1

    def give_up(self, parked_ids: Collection[int]) -> None:
        """Have workers drop what is parked; what this plan would park or move is left out of it."""
        gone, parked_now = set(parked_ids), {parking.parked_id for parking in self.park}
        self.park = [parking for parking in self.park if parking.parked_id not in gone]
        self.offload = [parked_id for parked_id in self.offload if parked_id not in gone]
        self.drop += [parked_id for parked_id in parked_ids if parked_id not in parked_now]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done."""
        before = self.park or self.free or self.evict or self.drop or self.offload
        return not (before or self.new or self.prefill or self.decode)

    def plan(self, step: int) -> StepPlan:
        """The plan, as the workers get it."""
        return StepPlan(
            step=step,
            drop=tuple(self.drop),
            park=tuple(self.park),
            free=tuple(self.free),
            evict=tuple(self.evict),
            offload=tuple(self.offload),
            new=tuple(self.new),
            prefill=tuple(self.prefill),
            decode=tuple(self.decode),
        )
