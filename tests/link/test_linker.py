"""Relocation and the memory plan."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from bedplate.compile.units import placeholder
from bedplate.link.linker import Template, link
from bedplate.link.memory import plan_memory


def strings(*texts: str) -> bytes:
    """As a flatbuffer holds them."""
    return b"".join(len(text).to_bytes(4, "little") + text.encode() + b"\0\0\0\0" for text in texts)


def test_link_writes_each_key_into_its_holes_and_nothing_else() -> None:
    one, two = placeholder("one"), placeholder("two")
    other = "0" * 64  # hex that is nobody's placeholder
    data = strings("x", one, two, "z", one, other)
    template = Template.find_holes(data, {one: "one", two: "two"}, fixed={})
    keys = {"one": "1" * 64, "two": "2" * 64, "three": "3" * 64}
    assert link(template, keys) == strings("x", "1" * 64, "2" * 64, "z", "1" * 64, other)


@st.composite
def plans(draw: st.DrawFn) -> SimpleNamespace:
    """A chain of instructions, each of which reads some values before it and writes one."""
    count = draw(st.integers(2, 12))
    values = [
        SimpleNamespace(
            val=SimpleNamespace(
                sizes=[draw(st.integers(1, 50))],
                scalar_type=draw(st.sampled_from([1, 4, 6])),
                allocation_info=SimpleNamespace(memory_id=0, memory_offset_low=0, memory_offset_high=0),
            )
        )
        for _ in range(count)
    ]
    steps = [
        SimpleNamespace(
            instr_args=SimpleNamespace(args=[*draw(st.lists(st.integers(0, i - 1), max_size=3)), i])
        )
        for i in range(1, count)
    ]
    return SimpleNamespace(
        values=values,
        inputs=[0],
        outputs=[count - 1],
        chains=[SimpleNamespace(instructions=steps)],
        non_const_buffer_sizes=[],
    )


@given(plans())
def test_values_that_live_at_the_same_time_never_overlap(plan: SimpleNamespace) -> None:
    plan_memory(plan, [])
    steps = [step.instr_args.args for step in plan.chains[0].instructions]
    item = {1: 1, 4: 8, 6: 4}
    spans = []
    for index, value in enumerate(plan.values):
        uses = [at for at, args in enumerate(steps) if index in args]
        first = -1 if index in plan.inputs else uses[0]
        last = len(steps) if index in plan.outputs else max(uses, default=first)
        offset = value.val.allocation_info.memory_offset_low
        end = offset + value.val.sizes[0] * item[value.val.scalar_type]
        assert value.val.allocation_info.memory_id in (0, 1)
        assert end <= plan.non_const_buffer_sizes[1]
        spans.append((first, last, offset, end))
    for i, (first, last, low, high) in enumerate(spans):
        for other_first, other_last, other_low, other_high in spans[:i]:
            if first <= other_last and other_first <= last:
                assert high <= other_low or other_high <= low
