"""One clock for a clip's pictures and sound, whatever a file's own timestamps do."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

from av.container import InputContainer
from av.format import Flags
from av.packet import Packet
from av.stream import Stream

# Those of FFmpeg's own tools: a packet that is so much earlier or later than due is on a new clock.
BACK, AHEAD = Fraction(1, 10), Fraction(10)
WAIT = 200  # packets that wait at most for the picture to continue as well


def restarts(container: InputContainer) -> bool:
    """Whether the format's clock may begin anew within a file, as in joined MPEG streams."""
    return Flags.ts_discont in Flags(container.format.flags)


def continuous(container: InputContainer, *streams: Stream) -> Iterator[Packet]:
    """Demux streams, their timestamps moved where the format's clock begins anew.

    Where it does, the first stream, the picture, goes on when it is due, and the others with it.
    A packet may return to a clock from before: then only what came between was wrong. Two walks
    through the same streams of a file give the same times.
    """
    packets = container.demux(*streams)
    return _Clock(streams[0]).set(packets) if restarts(container) else packets


class _Clock:
    """What is added to the timestamps of packets, and when each stream's next one is due."""

    def __init__(self, leader: Stream) -> None:
        self.leader = leader.index
        self.offsets = [Fraction(0)]
        self.due: dict[int, Fraction] = {}
        self.waiting: list[Packet] = []

    def set(self, packets: Iterable[Packet]) -> Iterator[Packet]:
        for packet in packets:
            index = packet.stream.index
            offset = self.known(packet)
            if offset is None and index != self.leader and len(self.waiting) < WAIT:
                self.waiting.append(packet)
                continue
            # one that was early, and one that only seemed to begin a new clock
            returned = offset is not None and any(p.stream.index == index for p in self.waiting)
            yield from self.released() if returned or len(self.waiting) >= WAIT else ()
            yield self.moved(packet, self.new(packet) if offset is None else offset)
            yield from self.released() if offset is None else ()
        yield from self.released()

    def known(self, packet: Packet) -> Fraction | None:
        """The offset that brings a packet nearest to when it is due, if that is near enough."""
        if packet.dts is None or packet.stream.index not in self.due:
            return self.offsets[-1]
        time, due = packet.dts * packet.time_base, self.due[packet.stream.index]
        if abs(time + self.offsets[-1] - due) <= BACK:
            return self.offsets[-1]
        offset = min(self.offsets, key=lambda offset: abs(time + offset - due))
        near = due - BACK <= time + offset <= max(self.due.values()) + AHEAD
        return offset if near else None

    def new(self, packet: Packet) -> Fraction:
        """The offset with which a packet comes when it is due."""
        assert packet.dts is not None
        self.offsets.append(self.due[packet.stream.index] - packet.dts * packet.time_base)
        return self.offsets[-1]

    def released(self) -> Iterator[Packet]:
        """Those that have waited."""
        for packet in self.waiting:
            offset = self.known(packet)
            yield self.moved(packet, self.new(packet) if offset is None else offset)
        self.waiting = []

    def moved(self, packet: Packet, offset: Fraction) -> Packet:
        base = packet.time_base
        ticks = round(offset / base) if base else 0
        packet.dts = None if packet.dts is None else packet.dts + ticks
        packet.pts = None if packet.pts is None else packet.pts + ticks
        if packet.dts is not None:
            self.due[packet.stream.index] = (packet.dts + (packet.duration or 0)) * base
        return packet


def repaired(
    times: Sequence[Fraction | None], period: Fraction, first: Fraction = Fraction(0)
) -> tuple[list[Fraction], int]:
    """Increasing times, as many as possible of those given, and how many are new.

    Those that are missing or out of order are spaced evenly between their neighbours, or one
    `period` apart at the ends, and from `first` on where none is known.
    """
    given = [time for time in times if time is not None]
    if len(given) == len(times) and all(a < b for a, b in pairwise(given)):
        return given, 0
    good = longest_increasing(times)
    if not good:
        return [first + index * period for index in range(len(times))], len(times)
    result: list[Fraction] = []
    for index, time in enumerate(times):
        after = bisect_left(good, index)
        if after < len(good) and good[after] == index:
            assert time is not None
            result.append(time)
        elif after == 0:
            result.append(known(times, good[0]) - (good[0] - index) * period)
        elif after == len(good):
            result.append(known(times, good[-1]) + (index - good[-1]) * period)
        else:
            a, b = good[after - 1], good[after]
            share = Fraction(index - a, b - a)
            result.append(known(times, a) + share * (known(times, b) - known(times, a)))
    return result, len(times) - len(good)


def known(times: Sequence[Fraction | None], index: int) -> Fraction:
    time = times[index]
    assert time is not None
    return time


def longest_increasing(times: Sequence[Fraction | None]) -> list[int]:
    """The indices of a longest strictly increasing subsequence; None is never part of it."""
    ends: list[Fraction] = []  # the least time that a subsequence of each length ends with
    indices: list[int] = []
    before: list[int | None] = []
    for index, time in enumerate(times):
        before.append(None)
        if time is None:
            continue
        length = bisect_left(ends, time)
        before[index] = indices[length - 1] if length else None
        ends[length : length + 1] = [time]
        indices[length : length + 1] = [index]
    chosen = []
    last = indices[-1] if indices else None
    while last is not None:
        chosen.append(last)
        last = before[last]
    return chosen[::-1]
