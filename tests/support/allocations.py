"""What a call allocates, from the profiler's tree of events: `events()` has only what is outside of every operator."""

from __future__ import annotations

from collections.abc import Callable

import torch


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes taken, and below 0 those given back, in their order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    found = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(found, key=lambda each: each[0])]
